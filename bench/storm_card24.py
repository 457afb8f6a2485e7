"""Two fine-tunes that 24 GB cannot hold, in 24 GB: all weights of a 1B shape, and a LoRA adapter of an 8B shape.

transformers' Llama, random weights, bf16, one long sequence, AdamW with 16-bit states, Liger's fused head and loss on all
sides where it loads (``peers`` folder). torch's allocator is held to 23 GiB, so that what does not fit fails as it
would there; NVML's log of the STORM run stands beside it. Keep-all, gradient checkpointing and STORM, one process.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import peft
import torch
from storm_evidence import Memory
from storm_limit import earlier_rows, with_worst
from storm_v1 import GB
from transformers import LlamaConfig, LlamaModel

from common import row, write_results, write_series
from overspill import Storm

CARD_BYTES = 24 * 2**30
# What a driver's context and cuBLAS take beside torch's own.
TORCH_BYTES = 23 * 2**30
# Left to the gaps of torch's allocator.
GAPS_BYTES = 2**30


@dataclass
class Case:
    """One fine-tune."""

    shape: dict[str, int]
    tokens: int
    is_lora: bool
    what: str


CASES = {
    "full": Case(
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        32_768,
        False,
        "every weight of a 1.2B Llama",
    ),
    "lora": Case(
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        16_384,
        True,
        "a LoRA adapter (peft, r = 16, q and v) of an 8B Llama",
    ),
}


class Model(torch.nn.Module):
    """The model and its head, with a loss that does not hold all logits at once."""

    def __init__(self, case: Case, tokens: int, vocab: int) -> None:
        super().__init__()
        config = LlamaConfig(
            **case.shape, num_key_value_heads=8, vocab_size=vocab, use_cache=False, attn_implementation="sdpa",
            max_position_embeddings=tokens,
        )  # fmt: skip
        self.body = LlamaModel(config)
        self.head = torch.nn.Linear(config.hidden_size, vocab, bias=False)
        if case.is_lora:
            adapter = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
            self.body = peft.get_peft_model(self.body, adapter)
            self.head.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.body(input_ids=ids).last_hidden_state
        return fused_loss(hidden[0, :-1], self.head.weight, ids[0, 1:])


def fused_loss(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Liger's head and cross-entropy in one; plain, in checkpointed pieces, where it does not load."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as fused
    except ImportError:
        return pieces_loss(hidden, weight, ids)
    made = fused.apply(hidden, weight, ids)
    return made[0] if isinstance(made, tuple) else made


def pieces_loss(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, 2,048 tokens at a time."""

    def one(some: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(some, weight).float()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    pairs = zip(hidden.split(2048), ids.split(2048), strict=True)
    parts = [torch.utils.checkpoint.checkpoint(one, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(parts).sum() / len(ids)


def train(model: Model, ids: torch.Tensor, context: Any, steps: int) -> tuple[float, int, float]:
    """Median ms of a step behind the first half of ``steps``, the peak of torch's bytes, and the last loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=ids.is_cuda)
    times, loss = [], torch.zeros(())
    with context:
        for n in range(steps):
            if n == steps // 2 and ids.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            loss = model(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            if ids.is_cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
    peak = torch.cuda.max_memory_allocated() if ids.is_cuda else 0
    return statistics.median(times[steps // 2 :]), peak, float(loss)


def attempt(model: Model, ids: torch.Tensor, context: Any, steps: int) -> tuple[float, int, float] | None:
    """None where the memory does not suffice."""
    try:
        return train(model, ids, context, steps)
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        if ids.is_cuda:
            torch.cuda.empty_cache()


def run(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one case."""
    case = CASES[name]
    tokens = options.tokens or case.tokens
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = Model(case, tokens, options.vocab)
        ids = torch.randint(0, options.vocab, (1, tokens))
    torch.set_default_dtype(torch.float32)
    on_gpu = options.device == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(TORCH_BYTES / total)
    say = {"keep-all": attempt(model, ids, contextlib.nullcontext(), 2)}
    model.body.gradient_checkpointing_enable()
    if case.is_lora:
        model.body.enable_input_require_grads()
    model.train()
    say["checkpointing"] = attempt(model, ids, contextlib.nullcontext(), 4)
    model.body.gradient_checkpointing_disable()
    watch = Memory() if on_gpu else contextlib.nullcontext()
    with watch as memory:
        storm = Storm(
            model, vram_budget=TORCH_BYTES - GAPS_BYTES if on_gpu else None, host_budget=options.host_budget
        )
        say["STORM"] = attempt(model, ids, storm, options.steps)
        storm.close()
    seen = {
        method: "out of memory"
        if got is None
        else f"{got[0]:.0f} ms, {got[1] / GB:.1f} GB, loss {got[2]:.4f}"
        for method, got in say.items()
    }
    record = json.loads(storm._planner.record_json() or '{"units": []}')["units"]
    saved = sum(unit["bytes"] for unit in record if not unit["is_narrow"])
    note = (
        f"{case.what}, random weights, bf16, one sequence of {tokens} tokens, AdamW in bf16; torch held to "
        f"{TORCH_BYTES / GB:.1f} GB; {seen}; autograd saves {saved / GB:.1f} GB; plan {storm.report()['predicted']}"
    )
    print(f"card24 {name}: {note}", flush=True)
    got, peer = say["STORM"], say["checkpointing"]
    rows = []
    if got is not None:
        rows.append(
            row(
                f"storm_limit.card24_{name}.step_ms",
                got[0],
                "ms",
                peer="checkpointing" if peer else None,
                peer_value=peer[0] if peer else None,
                note=note,
            )
        )
    if on_gpu and got is not None:
        most = max(memory.used_bytes)
        rows.append(row(f"storm_limit.card24_{name}.nvml_gb_max", most / GB, "GB", note="of the STORM run"))
        marks = [(CARD_BYTES, "24 GiB"), (saved, "what autograd saves")]
        write_series(
            f"storm_24gb_{name}_nvml",
            {**memory.log(), "marks": marks, "title": f"STORM in 24 GB: {case.what}, {tokens} tokens"},
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, help="instead of the case's")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--host-budget", default="70GiB")
    parser.add_argument("--name", default="storm_limit")
    options = parser.parse_args()
    for name in options.cases:
        rows = run(name, options)
        ids = {r["id"] for r in rows}
        kept = [r for r in earlier_rows(options.name) if r["id"] not in ids]
        write_results(options.name, with_worst([*kept, *rows]))
        gc.collect()


if __name__ == "__main__":
    main()
