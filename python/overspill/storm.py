"""STORM: train a model whose activations do not fit.

    with Storm(model, vram_budget="12GiB"):
        loss = model(batch).loss
        loss.backward()

What autograd saves is kept or sent away, and is back before backward needs it. Nothing of the model
changes, and no bit of the loss or of a gradient does. Decisions are the planner's, copies the
engine's (both Rust); this module is the edge to PyTorch's saved-tensor hooks.
"""

from __future__ import annotations

import json
import tempfile
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from ._edge import edge_for
from ._native import Engine, Planner
from ._saved import Saved, Unit, span
from ._units import format_bytes, parse_bytes

_MIB = 2**20


class Storm:
    """A context in which everything that autograd saves obeys a memory budget.

    Args:
        model: the model that is trained; its parameters and buffers are left alone.
        vram_budget: bytes (an int or text such as "12GiB") that torch may have allocated on the
            model's device, everything included; without a GPU, the anonymous memory of the process. Default: what is free, less a tenth.
        host_budget: bytes of host memory for what was sent away (page-locked with a GPU). Default:
            half of what is free; without a GPU, where host memory is the device's own, 64 MiB to
            stage what goes to disk.
        spill_dir: folder for what does not fit in host memory. Default: the temporary folder
            without a GPU, none with one.
        spill_limit: most bytes of the spill file; default: half of the free disk.
        min_bytes: tensors smaller than this stay where they are.
        seed: draw the schedule of transfers from this seed (tests; model on the CPU only).
        trace: keep a timeline of every transfer for :meth:`trace_json`.

    Raises:
        BudgetError: a budget is not a byte count, or is below what the parameters and gradients, or
            a single saved tensor, need.
        TransferError: the spill folder cannot be used, or a transfer failed. Nothing is lost: a
            tensor that could not be sent away is where it was.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vram_budget: int | str | None = None,
        *,
        host_budget: int | str | None = None,
        spill_dir: str | None = None,
        spill_limit: int | str | None = None,
        min_bytes: int = 64 * 1024,
        seed: int | None = None,
        trace: bool = False,
    ) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._edge = edge_for(tensors[0].device if tensors else torch.device("cpu"))
        self._model = model
        self._min_bytes = max(min_bytes, 1)
        free_bytes = self._edge.free_bytes()
        in_use = self._edge.allocated_bytes()
        budget = (
            in_use + free_bytes * 9 // 10 if vram_budget is None else parse_bytes(vram_budget, "vram_budget")
        )
        self.vram_budget_bytes = budget
        lookahead = max(budget // 16, _MIB)
        self._leaving_limit = max(budget // 16, _MIB)
        self._planner = Planner(
            budget_bytes=budget,
            fixed_bytes=self._fixed_bytes(),
            lookahead_bytes=lookahead,
            offload_gbps=1.0,
            onboard_gbps=1.0,
        )
        self._engine = self._open_engine(host_budget, spill_dir, spill_limit, seed, trace)
        self._units: weakref.WeakValueDictionary[int, Unit] = weakref.WeakValueDictionary()
        self._by_storage: dict[int, list[weakref.ref[Unit]]] = {}
        self._leaving: deque[weakref.ref[Unit]] = deque()
        self._leaving_bytes = 0
        self._fixed_storages: set[int] = set()
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []
        self._warned = False
        self._counts = {"kept": 0, "offloaded": 0, "left_alone": 0}
        # Hooks run on the threads of forwards and backwards, and one thread's backward prefetches for
        # another's. Reentrant, because the collector may free a unit inside a hook.
        self._lock = threading.RLock()

    # ---- the context -------------------------------------------------------------------------

    def __enter__(self) -> Storm:
        self._fixed_storages = {t.untyped_storage()._cdata for t in self._fixed_tensors()}
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.pop().__exit__(kind, error, traceback)

    def close(self) -> None:
        """Waits for everything under way. Graphs that still hold saved tensors stay usable."""
        self._engine.drain()

    def report(self) -> dict[str, Any]:
        """Counters so far: the host pool, bytes and time by cause, the plan, units by decision."""
        counters = json.loads(self._engine.counters_json())
        plan = self._planner.plan_json()
        return {
            "vram_budget_bytes": self.vram_budget_bytes,
            "peak_bytes": self._planner.peak_bytes,
            "over_budget_bytes": max(self._planner.peak_bytes - self.vram_budget_bytes, 0),
            "held_bytes": self._planner.held_bytes,
            "live_units": len(self._units),
            "units": dict(self._counts),
            "pool": counters["pool"],
            "disk_bytes": counters["disk_bytes"],
            "flows": counters["flows"],
            "predicted": json.loads(plan)["predicted"] if plan else None,
        }

    def trace_json(self) -> str:
        """The timeline of transfers, for ui.perfetto.dev; needs ``trace=True``."""
        return self._engine.trace_json()

    # ---- hooks -------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> Saved:
        with self._lock:
            return self._save(tensor)

    def _unpack(self, saved: Saved) -> torch.Tensor:
        saved.check_version()
        if saved.unit is None:
            assert saved.tensor is not None
            return saved.tensor
        with self._lock, torch.no_grad():
            return self._restore(saved, saved.unit)

    def _save(self, tensor: torch.Tensor) -> Saved:
        if not self._is_ours(tensor):
            self._counts["left_alone"] += 1
            return Saved(tensor, None, keep=True)
        storage = tensor.untyped_storage()
        start, end = span(tensor, storage.nbytes())
        key = storage._cdata
        for ref in self._by_storage.get(key, ()):
            unit = ref()
            if unit is not None and unit.covers(start, end, tensor):
                break
        else:
            unit = self._new_unit(storage, key, start, end - start, tensor)
        unit.saves += 1
        unit.pending += 1
        return Saved(tensor, unit, keep=unit.slot is None)

    def _restore(self, saved: Saved, unit: Unit) -> torch.Tensor:
        self._planner.need(unit.id, self._sampled_bytes())
        if saved.tensor is not None:
            self._prefetch(unit)
            return saved.tensor
        storage = self._storage_of(unit)
        # A unit whose source never left is still laid out as its storage was.
        start = 0 if storage is unit.source else unit.start
        tensor = saved.view(storage, start)
        if saved.round != unit.round:
            saved.round = unit.round
            unit.pending -= 1
            if unit.pending == 0:
                self._let_go(unit)
        return tensor

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor may be moved: a dense one of the model's device, large enough, that is
        neither a parameter nor a view of one, nor anything else that a leaf keeps alive anyhow.
        """
        if (
            type(tensor) is not torch.Tensor
            or tensor.layout is not torch.strided
            or tensor.device != self._edge.device
            or tensor.numel() == 0
            or tensor.is_leaf
            and tensor.requires_grad
            or tensor.is_nested
            or tensor.is_quantized
            or tensor._is_zerotensor()
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return False
        base = tensor._base
        if base is not None and (isinstance(base, torch.nn.Parameter) or base.is_leaf and base.requires_grad):
            return False
        storage = tensor.untyped_storage()
        return storage.nbytes() >= self._min_bytes and storage._cdata not in self._fixed_storages

    # ---- units -------------------------------------------------------------------------------

    def _new_unit(
        self, storage: torch.UntypedStorage, key: int, start: int, nbytes: int, tensor: torch.Tensor
    ) -> Unit:
        if not self._units:
            self._edge.reset_peak()
        unit_id, keep = self._planner.pack(nbytes, self._sampled_bytes())
        unit = Unit(self, unit_id, storage, start, nbytes, tensor)
        self._units[unit_id] = unit
        self._by_storage.setdefault(key, []).append(weakref.ref(unit))
        self._counts["kept" if keep else "offloaded"] += 1
        if not keep:
            address = storage.data_ptr() + start
            unit.slot = self._engine.offload(address, nbytes, storage, self._edge.stream())
            unit.source = storage
            self._leaving.append(weakref.ref(unit))
            self._leaving_bytes += nbytes
        self._release_sources()
        return unit

    def _release_sources(self) -> None:
        """Lets sources of offloads go, oldest first, while too many bytes are on their way out."""
        over_budget = self._sampled_bytes() > self.vram_budget_bytes
        while self._leaving and ((first := self._leaving[0]()) is None or first.source is None):
            self._leaving.popleft()  # gone by itself: its graph was freed first
        while self._leaving and (over_budget or self._leaving_bytes > self._leaving_limit):
            unit = self._leaving.popleft()()
            if unit is None or unit.source is None or unit.slot is None:
                continue
            self._engine.release_source(unit.slot, self._edge.stream())
            self._forget_source(unit)
        if over_budget and not self._warned:
            self._warn_if_over_budget()

    def _warn_if_over_budget(self) -> None:
        """Says once that everything that may leave has left and the budget is still exceeded."""
        allocated = self._edge.allocated_bytes()
        if allocated > self.vram_budget_bytes:
            self._warned = True
            warnings.warn(
                f"vram_budget of {format_bytes(self.vram_budget_bytes)} is exceeded: "
                f"{format_bytes(allocated)} are in use with all that may leave sent away; parameters, gradients, "
                "and the operation at hand need the rest",
                stacklevel=2,
            )

    def _sampled_bytes(self) -> int:
        """What is allocated now, where the planner wants to know; 0 in a step that follows its plan."""
        return self._edge.allocated_bytes() if self._planner.is_recording else 0

    def _forget_source(self, unit: Unit) -> None:
        unit.source = None
        self._leaving_bytes -= unit.nbytes
        self._planner.left(unit.id)

    def _storage_of(self, unit: Unit) -> torch.UntypedStorage:
        """The bytes of ``unit`` on the device, brought back if they are not there, and those that
        are needed next on their way.
        """
        if unit.source is not None:
            self._prefetch(unit)
            return unit.source
        stream = self._edge.stream()
        storage = unit.buffer or self._revived(unit)
        if storage is None:
            storage = self._onboard(unit, stream, prefetch=False)
        self._prefetch(unit)
        if unit.onboarding is not None:
            stalled_us = unit.onboarding.wait(stream)
            unit.onboarding = None
            self._planner.arrived(unit.id, stalled_us)
        elif stream != unit.stream:
            self._edge.join(unit.stream)
        return storage

    def _revived(self, unit: Unit) -> torch.UntypedStorage | None:
        """The buffer that was let go, if somebody still uses it."""
        if unit.buffer_ref is None or unit.buffer_ref.expired():
            return None
        return torch.UntypedStorage._new_with_weak_ptr(unit.buffer_ref.cdata)

    def _onboard(self, unit: Unit, stream: int, *, prefetch: bool) -> torch.UntypedStorage:
        assert unit.slot is not None
        buffer = torch.empty(unit.nbytes, dtype=torch.uint8, device=self._edge.device).untyped_storage()
        unit.onboarding = self._engine.onboard(
            unit.slot, buffer.data_ptr(), unit.nbytes, buffer, stream, prefetch=prefetch
        )
        unit.buffer = buffer
        unit.stream = stream
        return buffer

    def _prefetch(self, unit: Unit) -> None:
        stream = None
        for unit_id in self._planner.ahead_of(unit.id, self._sampled_bytes()):
            ahead = self._units.get(unit_id)
            if ahead is None or ahead.buffer is not None:
                continue
            stream = self._edge.stream() if stream is None else stream
            self._onboard(ahead, stream, prefetch=True)
            self._planner.prefetched(unit_id)

    def _let_go(self, unit: Unit) -> None:
        """Every tensor of ``unit`` was unpacked: whoever asked holds the bytes now, and a retained
        graph gets them from the slot again.
        """
        unit.round += 1
        unit.pending = unit.saves
        if unit.buffer is not None:
            unit.buffer_ref = torch.multiprocessing.reductions.StorageWeakRef(unit.buffer)
            unit.buffer = None
            self._planner.evicted(unit.id)

    def _freed(self, unit: Unit) -> None:
        with self._lock:
            self._forget(unit)

    def _forget(self, unit: Unit) -> None:
        key = unit.storage_ref.cdata
        left = [ref for ref in self._by_storage.get(key, ()) if ref() not in (None, unit)]
        if left:
            self._by_storage[key] = left
        else:
            self._by_storage.pop(key, None)
        if unit.source is not None:
            self._forget_source(unit)
        # Only the end of the step uses the peak, and asking for it is not free.
        peak_bytes = self._edge.peak_bytes() if len(self._units) <= 1 else None
        self._planner.free(unit.id, self._sampled_bytes(), peak_bytes)

    # ---- construction ------------------------------------------------------------------------

    def _fixed_tensors(self) -> Iterator[torch.Tensor]:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if tensor.layout is torch.strided:
                yield tensor

    def _fixed_bytes(self) -> int:
        """Parameters, buffers and gradients, each storage once."""
        sizes: dict[int, int] = {}
        for tensor in self._fixed_tensors():
            nbytes = tensor.untyped_storage().nbytes()
            sizes[tensor.untyped_storage()._cdata] = 2 * nbytes if tensor.requires_grad else nbytes
        return sum(sizes.values())

    def _open_engine(
        self,
        host_budget: int | str | None,
        spill_dir: str | None,
        spill_limit: int | str | None,
        seed: int | None,
        trace: bool,
    ) -> Engine:
        on_gpu = self._edge.device.type != "cpu"
        if host_budget is not None:
            host_bytes = parse_bytes(host_budget, "host_budget")
        else:
            host_bytes = self._edge_host_default(on_gpu)
        if spill_dir is None and not on_gpu:
            spill_dir = tempfile.gettempdir()
        limit = 0
        if spill_dir is not None:
            limit = (
                _half_of_free_disk(spill_dir)
                if spill_limit is None
                else parse_bytes(spill_limit, "spill_limit")
            )
        return Engine(
            self._edge.engine_name if seed is None else "sim",
            host_budget_bytes=host_bytes,
            slab_bytes=min(host_bytes, 1024 * _MIB),
            segment_bytes=max(min((256 if on_gpu else 8) * _MIB, host_bytes // 8), 4096),
            spill_dir=spill_dir,
            spill_limit_bytes=limit,
            eager_spill=not on_gpu,
            seed=seed,
            trace=trace,
        )

    @staticmethod
    def _edge_host_default(on_gpu: bool) -> int:
        from ._edge import CpuEdge

        return CpuEdge().free_bytes() // 2 if on_gpu else 64 * _MIB


def _half_of_free_disk(folder: str) -> int:
    import os

    try:
        stat = os.statvfs(folder)
    except OSError:
        return 2**20  # the engine says what is wrong with the folder
    return max(stat.f_bavail * stat.f_frsize // 2, 4096)
