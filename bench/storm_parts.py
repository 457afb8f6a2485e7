"""The models that STORM's limit is measured on, and how a step of one is timed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from storm_v1 import Blocks
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass
class Part:
    """One model, and the budgets to train it under."""

    width: int
    layers: int
    budgets: dict[str, float | str]
    sequence: int = 4_096
    sequences: int = 4
    has_peers: bool = False
    is_whole: bool = False
    """transformers' whole model of the 8B shape, with its embedding, head and loss."""
    has_fused_loss: bool = False
    """Head and loss are Liger's one operation, which never holds all logits."""


PARTS = {
    "h4096": Part(
        4096,
        8,
        {
            "h4096_2x": 2,
            "h4096_at_checkpointing_peak": "checkpointing",
            "h4096_at_trl_peak": "trl",
            "h4096_4x": 4,
        },
        has_peers=True,
    ),
    "h8192": Part(
        8192,
        4,
        {"h8192_2x": 2, "h8192_at_checkpointing_peak": "checkpointing", "h8192_at_trl_peak": "trl"},
        has_peers=True,
    ),
    "h2048": Part(2048, 16, {"h2048_2x": 2}),
    "h8192_12": Part(8192, 12, {"h8192_4x": 4}),
    "seq32k": Part(4096, 4, {"h4096_2x_seq32k": 2}, 32_768, 1),
    "hf_llama8b": Part(4096, 24, {"hf_llama8b_2x": 2}, is_whole=True),
    "hf_llama8b_liger": Part(4096, 24, {"hf_llama8b_liger_2x": 2}, is_whole=True, has_fused_loss=True),
}
# Storm learns a step in its first four; the rest is for the allocator to settle.
WARM_STEPS = 6


class Whole(torch.nn.Module):
    """transformers' Llama of the 8B shape, with as many layers as a part says."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=part.width,
            intermediate_size=14_336,
            num_hidden_layers=part.layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128_256,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = LlamaForCausalLM(config)
        self.has_fused_loss = part.has_fused_loss

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.has_fused_loss:
            hidden = self.model.model(input_ids=ids).last_hidden_state[:, :-1]
            return fused_loss(hidden.flatten(0, 1), self.model.lm_head.weight, ids[:, 1:].flatten())
        return self.model(input_ids=ids, labels=ids).loss


def liger_loss() -> Any:
    """Liger's head and cross-entropy in one, or None where it does not load."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyFunction.apply


def fused_loss(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Liger's; plain, in checkpointed pieces, where it does not load."""
    fused = liger_loss()
    if fused is None:
        return pieces_loss(hidden, weight, ids)
    made = fused(hidden, weight, ids)
    return made[0] if isinstance(made, tuple) else made


def pieces_loss(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, 2,048 tokens at a time."""

    def one(some: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(some, weight).float()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    pairs = zip(hidden.split(2048), ids.split(2048), strict=True)
    parts = [torch.utils.checkpoint.checkpoint(one, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(parts).sum() / len(ids)


def build(part: Part) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model with its gradients allocated, and a batch."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    # On the device: a CPU takes minutes to draw ten billion weights.
    with torch.device("cuda"):
        model = Whole(part) if part.is_whole else Blocks(part.width, part.layers)
        if part.is_whole:
            x = torch.randint(0, 128_256, (part.sequences, part.sequence))
        else:
            x = torch.randn(part.sequences, part.sequence, part.width).requires_grad_(True)
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, x


def reset(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Gradients as they are when a step begins."""
    for parameter in model.parameters():
        parameter.grad.zero_()
    x.grad = None


def step_times(
    model: torch.nn.Module, x: torch.Tensor, context: Any, warmup: int, steps: int
) -> tuple[float, int]:
    """Median step in ms and most bytes allocated, after ``warmup`` steps."""
    times, peak = [], 0
    with context:
        for n in range(warmup + steps):
            reset(model, x)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            model(x).backward()
            end.record()
            torch.cuda.synchronize()
            if n >= warmup:
                times.append(begin.elapsed_time(end))
                peak = max(peak, torch.cuda.max_memory_allocated())
    return statistics.median(times), peak


def saved_bytes(model: torch.nn.Module, x: torch.Tensor) -> int:
    """What a forward leaves allocated."""
    before = torch.cuda.memory_allocated()
    loss = model(x)
    torch.cuda.synchronize()
    saved = torch.cuda.memory_allocated() - before
    del loss
    return saved
