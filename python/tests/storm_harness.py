"""Runs a workload with and without offloading and compares every bit of what comes out.

:func:`train` is one run: seeds, deterministic algorithms, SGD, and a copy of the loss and of every gradient
after each step. :func:`first_difference` compares two runs with ``torch.equal`` and names the first thing
that is not the same, so that a failure says where, not only that.

:class:`NaiveStorm` is the slow exact twin: saved-tensor hooks that copy each tensor's storage to bytes and
back, with no pool, no overlap and no plan. The matrix passes with it and must fail with each of its planted
faults; that is what shows the matrix can see.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from workloads import BUILDERS, Workload

STEPS = 20
SEED = 20_240

Wrap = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


@dataclass
class Run:
    """What a run left behind: per step the loss and each parameter's gradient."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    context: Any = None
    """What the ``with`` statement gave, for its report."""


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms for the duration, as every exactness run uses."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def seed_all(seed: int = SEED) -> None:
    """Seeds every generator that a workload could draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(name: str, device: str = "cpu") -> Workload:
    """A fresh, seeded instance of the workload ``name``."""
    seed_all()
    return BUILDERS[name](device)


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of every gradient, tied parameters once; of a sharded one this rank's shard."""

    def copy(grad: Any) -> Tensor:
        local = grad.to_local() if hasattr(grad, "to_local") else grad
        return local.detach().to_dense().clone()

    return {name: None if p.grad is None else copy(p.grad) for name, p in model.named_parameters()}


def train(name: str, wrap: Wrap | None = None, *, device: str = "cpu", steps: int = STEPS) -> Run:
    """Trains the workload ``name`` under the context that ``wrap`` makes for its model."""
    with deterministic():
        work = build(name, device)
        trained = [p for p in work.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)
        run = Run()
        with contextlib.nullcontext() if wrap is None else wrap(work.model) as run.context:
            for n in range(steps):
                optimizer.zero_grad()
                run.losses.append(work.step(n).clone())
                run.gradients.append(gradients_of(work.model))
                optimizer.step()
        return run


def first_difference(expected: Run, got: Run) -> str | None:
    """Where two runs first differ, or ``None`` where they are the same bits."""
    if len(expected.losses) != len(got.losses):
        return f"{len(expected.losses)} steps against {len(got.losses)}"
    if expected.losses[0].is_cuda and _are_same(expected, got):
        return None
    for n, (loss, other) in enumerate(zip(expected.losses, got.losses, strict=True)):
        if not torch.equal(loss, other):
            return f"step {n}: loss {loss.item()!r} against {other.item()!r}"
        for name, grad in expected.gradients[n].items():
            have = got.gradients[n].get(name)
            if (grad is None) != (have is None):
                return f"step {n}: gradient of {name} is missing on one side"
            if grad is not None and have is not None and not torch.equal(grad, have):
                return (
                    f"step {n}: gradient of {name} differs by at most {(grad - have).abs().max().item():.3g}"
                )
    return None


def _are_same(expected: Run, got: Run) -> bool:
    """Whether two runs are the same bits, asked of the device once and not tensor by tensor."""
    pairs: list[tuple[Tensor | None, Tensor | None]] = [*zip(expected.losses, got.losses, strict=True)]
    for have, other in zip(expected.gradients, got.gradients, strict=True):
        pairs += [(grad, other.get(name)) for name, grad in have.items()]
    same = []
    for a, b in pairs:
        if a is None or b is None:
            if a is not b:
                return False
        elif (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        else:
            same.append((a == b).all())
    return bool(torch.stack(same).all())


def devices() -> list[Any]:
    """The devices of the matrix, as pytest parameters; CUDA is skipped, and so counted, where there is none."""
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return [pytest.param("cpu"), pytest.param("cuda", marks=[pytest.mark.gpu, absent])]


def offload_everything(model: nn.Module, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """STORM made to move whatever it may move, however small: the budget is all but taken by the weights."""
    from overspill import Storm

    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    # cuDNN's LSTM saves a workspace that is larger than the whole model.
    on_gpu_lstm = weights and any(
        isinstance(m, nn.LSTM) and next(m.parameters()).is_cuda for m in model.modules()
    )
    room = 2**23 if on_gpu_lstm else 2**20
    return Storm(model, vram_budget=2 * weights + room, min_bytes=1, **options)


def prove_everything(storm: Any) -> None:
    """Lets proofs take memory beyond the budget: on a GPU cuBLAS's workspace alone is more than these tests give, and
    where there is no room for a proof nothing is rebuilt or compressed.
    """
    storm._edge.has_room = lambda _nbytes, _budget_bytes: True


def keep_everything(model: nn.Module, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """STORM with room to spare: only the first step, which it learns from, goes out."""
    from overspill import Storm

    return Storm(model, vram_budget="1TiB", min_bytes=1, **options)


class NaiveStorm(contextlib.AbstractContextManager[Any]):
    """Offloads by copying bytes at pack and building the tensor anew at unpack, one by one.

    ``fault`` plants one of :data:`FAULTS`.
    """

    def __init__(self, model: nn.Module, fault: str | None = None) -> None:
        assert fault is None or fault in FAULTS
        self._fault = fault
        own = [t.to_local() if hasattr(t, "to_local") else t for t in [*model.parameters(), *model.buffers()]]
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._slot = torch.empty(0, dtype=torch.uint8)
        self._seen: dict[tuple[int, int], Tensor] = {}
        self.packed = 0
        self.offloaded = 0

    def __enter__(self) -> Any:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)

    def _pack(self, t: Tensor) -> tuple[Any, ...]:
        self.packed += 1
        if t.is_leaf and t.requires_grad:
            return ("kept", t, t._version, t)
        base = t if t._base is None else t._base
        plain = type(t) is Tensor and t.layout == torch.strided and not t.is_quantized and not t.is_nested
        if not plain or t.device.type == "meta" or t.untyped_storage().nbytes() == 0:
            return ("kept", t.detach(), t._version, t.detach())
        if isinstance(base, nn.Parameter) or t.untyped_storage().data_ptr() in self._own:
            return ("kept", t.detach(), t._version, t.detach())
        self.offloaded += 1
        witness = t.detach()
        witness.data = torch.empty(0, dtype=t.dtype, device=t.device)
        raw = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
        data = raw.clone()
        if self._fault == "slot_reused":
            if self._slot.numel() < data.numel():
                self._slot = torch.zeros_like(data)
            data = self._slot[: data.numel()].copy_(data)
        if self._fault == "stale_dedupe":
            data = self._seen.setdefault((raw.data_ptr(), raw.numel()), data)
        if self._fault == "bit_flipped" and self.offloaded % 7 == 0:
            data[0] ^= 1
        layout = (t.dtype, t.size(), t.stride(), t.storage_offset(), t.is_conj(), t.is_neg())
        return ("moved", data, t._version, witness, layout, (t.type(), list(t.shape)))

    def _unpack(self, packed: tuple[Any, ...]) -> Tensor:
        kind, data, version, witness = packed[:4]
        if self._fault != "version_unchecked" and witness._version != version:
            said = packed[5] if kind == "moved" else (witness.type(), list(witness.shape))
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{said[0]} {said[1]}] is at version {witness._version}; expected version {version} instead."
            )
        if kind == "kept":
            return data
        dtype, size, stride, offset, conj, neg = packed[4]
        with torch.no_grad():
            if self._fault == "stride_lost":
                stride = torch.empty(size, device="meta").stride()
            if self._fault == "offset_lost":
                offset = 0
            out = torch.empty(0, dtype=dtype, device=data.device)
            out.set_(data.clone().untyped_storage(), offset, size, stride)
            if conj and self._fault != "conj_lost":
                out = out.conj()
            shared = witness.detach()
            shared.data = torch._neg_view(out) if neg else out
            return shared


FAULTS = (
    "slot_reused",
    "stale_dedupe",
    "bit_flipped",
    "version_unchecked",
    "stride_lost",
    "offset_lost",
    "conj_lost",
)
