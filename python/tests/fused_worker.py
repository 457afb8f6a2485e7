"""A stand-in for a worker of an inference engine: fused matrices, a rank's part of each, a loader that knows both.

The names of methods are those of vLLM's models and weight transfer; nothing else of it is here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

FUSED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", 0),
    "self_attn.k_proj": ("self_attn.qkv_proj", 1),
    "self_attn.v_proj": ("self_attn.qkv_proj", 2),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}
PADDED_ROWS = 64
"""A vocabulary is padded to a multiple of this, as vLLM does."""


class FusedWorker(nn.Module):
    """A Llama's weights as rank ``rank`` of ``ranks`` holds them; it computes nothing."""

    def __init__(self, checkpoint: dict[str, torch.Tensor], rank: int, ranks: int, device: str) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.weights = nn.ParameterDict()
        self.rows: dict[str, dict[int, int]] = {}
        for name, tensor in checkpoint.items():
            fused, slot = self._fused(name)
            if slot is not None:
                self.rows.setdefault(fused, {})[slot] = tensor.shape[0] // ranks
        for name, tensor in checkpoint.items():
            fused, slot = self._fused(name)
            if slot is None or slot == 0:
                shape = self._shape(fused, tensor)
                made = torch.zeros(shape, dtype=tensor.dtype, device=device)
                self.weights[fused.replace(".", "/")] = nn.Parameter(made, requires_grad=False)

    def _fused(self, name: str) -> tuple[str, int | None]:
        for part, (whole, slot) in FUSED.items():
            if part in name:
                return name.replace(part, whole), slot
        return name, None

    def _shape(self, name: str, tensor: torch.Tensor) -> tuple[int, ...]:
        if name in self.rows:
            return (sum(self.rows[name].values()), *tensor.shape[1:])
        if "embed_tokens" in name or "lm_head" in name:
            return (-(-tensor.shape[0] // (PADDED_ROWS * self.ranks)) * PADDED_ROWS, *tensor.shape[1:])
        if "o_proj" in name or "down_proj" in name:
            return (tensor.shape[0], tensor.shape[1] // self.ranks)
        return tuple(tensor.shape)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copies each tensor of a checkpoint to where this rank holds it, if it does."""
        for name, tensor in weights:
            fused, slot = self._fused(name)
            data = self.weights[fused.replace(".", "/")].data
            if slot is not None:
                rows = self.rows[fused]
                start = sum(rows[i] for i in range(slot))
                part = tensor.narrow(0, self.rank * rows[slot], rows[slot])
                data.narrow(0, start, rows[slot]).copy_(part)
            elif "embed_tokens" in name or "lm_head" in name:
                first = self.rank * data.shape[0]
                count = max(0, min(data.shape[0], tensor.shape[0] - first))
                data[:count].copy_(tensor[first : first + count])
            elif "o_proj" in name or "down_proj" in name:
                data.copy_(tensor.narrow(1, self.rank * data.shape[1], data.shape[1]))
            else:
                data.copy_(tensor)
        return set(self.weights)


class Worker:
    """What an engine keeps of a rank, reached by ``collective_rpc``."""

    def __init__(self, model: FusedWorker, engine: object) -> None:
        self.model, self.engine = model, engine


class Cluster:
    """Stands for the inference engine: four calls that reach every worker's transfer engine."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.versions: list[str | None] = []
        self.received_bytes = 0

    def collective_rpc(self, method: str, *args: object) -> list[object]:
        return [getattr(worker.engine, method)(*args) for worker in self.workers]

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        for worker in self.workers:
            worker.engine.init_transfer_engine(worker.engine.parse_init_info(init_info))  # type: ignore[attr-defined]

    def start_weight_update(self) -> None:
        self.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict) -> None:
        self.received_bytes += len(update_info["data"] or b"")
        self.collective_rpc("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.collective_rpc("finish_weight_update")
        self.versions.append(weight_version)
