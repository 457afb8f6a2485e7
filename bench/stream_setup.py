"""Large models for the streaming benchmark, made in seconds: one layer is drawn and packed, the others repeat it.

Every repeated layer has its own place on the device, its own copies over the link and its own decoding; what it shares
with the drawn one is the packed bytes in host memory, so that 80 GB of weights need neither 80 GB of packing nor of
page-locking. Result notes say so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from overspill import _stream, _stream_cpu, _stream_cuda, tpde

HIDDEN_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
HIDDEN_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
HIDDEN_TINY = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BEGIN = time.monotonic()


def say(*what: Any) -> None:
    """A line with the time since the start."""
    print(f"[{time.monotonic() - BEGIN:.1f} s]", *what, flush=True)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """Wall clock of work and of what it enqueued."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def link_gbps() -> float:
    """Page-locked memory to the device, 512 MiB, best of 5."""
    memory = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
    there = torch.empty_like(memory, device=DEVICE)
    return max(
        memory.numel() / seconds(lambda: there.copy_(memory, non_blocking=True)) / 1e9 for _ in range(5)
    )


def held_bytes() -> int:
    """What torch has allocated on the device."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def peak_bytes() -> int:
    """What torch had allocated on the device at most."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def shell(shape: dict[str, int], dtype: torch.dtype) -> LlamaForCausalLM:
    """A model without weights."""
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


def drawn_name(name: str) -> str:
    """The weight whose bytes a weight of a repeated layer has."""
    parts = name.split(".")
    if "layers" in parts:
        parts[parts.index("layers") + 1] = "0"
    return ".".join(parts)


def draw(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Weights on the CPU, N(0, 0.02), ones for the norms; layers share the first one's memory."""
    torch.manual_seed(0)
    drawn: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if drawn_name(name) == name:
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
            drawn[name] = (made.fill_(1) if parameter.dim() == 1 else made.normal_(0, 0.02)).cpu()
    return {name: drawn[drawn_name(name)] for name, _ in model.named_parameters()}


def of_layers(weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of the layers' matrices."""
    return [name for name, tensor in weights.items() if ".layers." in name and tensor.dim() == 2]


def quantized(weights: dict[str, torch.Tensor], own_blocks: bool) -> dict[str, tpde.Quantized]:
    """The layers' matrices in 4 bits, on the device; with ``own_blocks`` each layer has memory of its own there."""
    drawn = {name: tpde.quantize(weights[name]) for name in of_layers(weights) if drawn_name(name) == name}
    if not own_blocks:
        drawn = {name: blocks.to(DEVICE) for name, blocks in drawn.items()}
    return {name: drawn[drawn_name(name)].to(DEVICE) for name in of_layers(weights)}


def fill(model: LlamaForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Gives a model its weights."""
    for name, tensor in weights.items():
        path, _, attribute = name.rpartition(".")
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        model.get_submodule(path)._parameters[attribute] = parameter


class Repeated(_stream.Streamed):
    """Packs and page-locks what was drawn, and uses it for all that repeat it."""

    _drawn: dict[str, Any]

    def _pack_group(self, group: list[Any], patch: Any, packed: bool) -> None:
        self.__dict__.setdefault("_drawn", {})
        for weight in group:
            name = drawn_name(weight.key)
            if name == weight.key:
                begin = time.perf_counter()
                super()._pack_group([weight], patch, packed)
                self._drawn[name] = weight
                say(f"{name}: {weight.nbytes / 1e6:.0f} MB, {time.perf_counter() - begin:.2f} s")
                continue
            drawn = self._drawn[name]
            weight.patch, weight.entry, weight.streamed = drawn.patch, drawn.entry, drawn.streamed
            weight.host, weight.start, weight.packed_bytes = drawn.host, drawn.start, drawn.packed_bytes
            weight.base = None if drawn.base is None else weight.base.to(self.device)
            self._host_bytes += weight.packed_bytes


@contextmanager
def streamed(model: LlamaForCausalLM, budget_bytes: int, **options: Any) -> Iterator[Repeated]:
    """The model, streamed; its weights are gone afterwards."""
    defaults = {"patch": None, "base": None, "packed": True, "reserve": None, "on_disk": False}
    begin = time.perf_counter()
    handle = Repeated(model, budget_bytes, device=DEVICE, **{**defaults, **options})
    synchronize()
    say(f"ready in {time.perf_counter() - begin:.1f} s", handle.report())
    try:
        yield handle
    finally:
        for hook in handle._hooks:
            hook.remove()
        handle._way.close()
        for unit in handle._units:
            unit.live.clear()
        del handle
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def nothing_stays() -> Iterator[None]:
    """Every unit crosses the link at every use, whatever room the budget has."""
    way = _stream_cuda if DEVICE == "cuda" else _stream_cpu
    with mock.patch.object(way, "spread", lambda units, room_bytes, size_of: []):
        yield
