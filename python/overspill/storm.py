"""STORM: train a model whose activations do not fit.

    with Storm(model, vram_budget="12GiB"):
        loss = model(batch).loss
        loss.backward()

What autograd saves is kept, sent away, or let go to be computed again, and is back before backward needs it. Nothing of the model
changes, and no bit of the loss or of a gradient does. Decisions are the planner's, copies the
engine's (both Rust); this module is the edge to PyTorch's saved-tensor hooks.
"""

from __future__ import annotations

import json
import threading
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from ._edge import edge_for
from ._fused import Kernels
from ._host import open_engine
from ._link import Link
from ._native import Planner
from ._proofs import Proofs, base_of
from ._recipes import Recipe
from ._saved import Saved, Unit, span
from ._timeline import Timeline
from ._transfers import Transfers
from ._units import parse_bytes
from .errors import DeviceError

_MIB = 2**20
_KEEP, _OFFLOAD, _REBUILD, _COMPRESS = 0, 1, 2, 3
_NAMES = ("kept", "offloaded", "rebuilt", "compressed")


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
        rebuild: whether tensors may be computed again in backward instead of being kept or sent
            away, by the operation that made them, where that was proved to give the same bits.
        compress: whether tensors may be sent away through the link codec (16-bit floats, lossless) where the plan
            says that it pays: at a fifth of the memory and less, or where the link is short. Off unless asked for.
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
        rebuild: bool = True,
        compress: bool = False,
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
        self._engine = open_engine(self._edge, host_budget, spill_dir, spill_limit, seed, trace)
        capacity = self._engine.capacity_bytes
        self._planner = Planner(
            budget_bytes=budget,
            fixed_bytes=self._fixed_bytes(),
            lookahead_bytes=lookahead,
            # A process's memory is what the system says, in pages, and with what the allocator holds back.
            slack_bytes=lookahead if self._edge.device.type == "cpu" else 0,
            # An eighth for the gaps of the pool.
            host_bytes=capacity - capacity // 8,
            # Until the copies of the first step have been timed.
            offload_gbps=1.0,
            onboard_gbps=1.0,
        )
        self._units: weakref.WeakValueDictionary[int, Unit] = weakref.WeakValueDictionary()
        self._by_storage: dict[int, list[weakref.ref[Unit]]] = {}
        self._timeline = Timeline(self._edge)
        self._transfers = Transfers(
            self._edge, self._engine, self._planner, self._timeline, self._units, budget, lookahead
        )
        self._fixed_storages: set[int] = set()
        self._proofs = Proofs(model, self._transfers, self._fixed_storages) if rebuild else None
        if rebuild and self._edge.device.type == "cuda":
            try:
                self._transfers.kernels = Kernels(self._edge.device.index)
            except DeviceError as error:
                warnings.warn(f"everything is rebuilt operation by operation: {error}", stacklevel=2)
        if compress:
            self._transfers.link = Link(self._edge)
        # Units coded to see what comes of it, and per size the best times to code and to decode.
        self._coded: list[tuple[int, Any]] = []
        self._coding_us: dict[int, tuple[float, float]] = {}
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []
        self._counts = {**dict.fromkeys(_NAMES, 0), "left_alone": 0}
        # Hooks run on the threads of forwards and backwards, and one thread's backward prefetches for
        # another's. Reentrant, because the collector may free a unit inside a hook.
        self._lock = threading.RLock()

    # ---- the context -------------------------------------------------------------------------

    def __enter__(self) -> Storm:
        self._fixed_storages.clear()
        self._fixed_storages.update(t.untyped_storage()._cdata for t in self._fixed_tensors())
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
        """Waits for everything under way. Graphs that still hold saved tensors stay usable.

        Raises:
            TransferError: a compressed tensor came back damaged.
        """
        self._engine.drain()
        if self._transfers.link is not None:
            self._transfers.link.check()

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
        return Saved(tensor, unit, keep=unit.is_kept)

    def _restore(self, saved: Saved, unit: Unit) -> torch.Tensor:
        transfers = self._transfers
        allocated, peak = transfers.sample()
        self._planner.need(unit.id, allocated, peak)
        if transfers.timing:
            self._timeline.event()
        if saved.tensor is not None:
            transfers.follow(unit.id, allocated)
            return saved.tensor
        stream = self._edge.stream()
        transfers.fetch(unit, stream)
        transfers.follow(unit.id, allocated)
        storage = transfers.storage_of(unit, stream)
        # A unit whose source never left is still laid out as its storage was.
        start = 0 if storage is unit.source else unit.start
        tensor = saved.view(storage, start)
        if saved.round != unit.round:
            saved.round = unit.round
            unit.pending -= 1
            if unit.pending == 0:
                transfers.let_go(unit)
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
        first = not self._units
        if first:
            self._begin_step()
        allocated, peak = self._transfers.sample()
        unit_id, action = self._planner.pack(nbytes, allocated, peak)
        if self._transfers.timing:
            self._timeline.event()
        if first and self._proofs is not None:
            self._proofs.first_id = unit_id
        unit = self._enter(unit_id, storage, start, nbytes, tensor)
        if self._planner.is_exploring:
            action = self._explore(unit, storage, tensor)
        elif action == _REBUILD:
            action = self._rebuild_again(unit, storage, tensor)
        self._act(unit, storage, tensor.dtype, action)
        if self._transfers.leaving:
            self._transfers.follow(None, allocated)
        return unit

    def _enter(
        self, unit_id: int, storage: torch.UntypedStorage, start: int, nbytes: int, tensor: torch.Tensor
    ) -> Unit:
        unit = Unit(self, unit_id, storage, start, nbytes, tensor)
        self._units[unit_id] = unit
        self._by_storage.setdefault(unit.storage_ref.cdata, []).append(weakref.ref(unit))
        return unit

    def _act(self, unit: Unit, storage: torch.UntypedStorage, dtype: torch.dtype, action: int) -> None:
        if action == _COMPRESS and not Link.takes(storage, unit.start, unit.nbytes, dtype):
            self._planner.deviate()
            action = _OFFLOAD
        self._counts[_NAMES[action]] += 1
        if action == _KEEP:
            unit.is_kept = True
            return
        _ = unit.probe  # from here on it does not hold the storage
        if action == _OFFLOAD:
            self._transfers.offload(unit, storage)
        elif action == _COMPRESS:
            self._transfers.compress(unit, storage, dtype)

    def _explore(self, unit: Unit, storage: torch.UntypedStorage, tensor: torch.Tensor) -> int:
        """Looks for a recipe, and for what the link codec makes of it, while the tensor is there."""
        if not self._edge.has_room(3 * unit.nbytes, self.vram_budget_bytes):
            return _OFFLOAD
        begin = self._timeline.begin()
        with torch.no_grad():
            recipe = None if self._proofs is None else self._proofs.prove(unit, storage, tensor)
        self._timeline.end(begin)
        self._try_codec(unit, storage, tensor.dtype)
        self._edge.sample()  # what the proofs took is not the model's
        if recipe is None:
            return _OFFLOAD
        self._give_recipe(unit, base_of(tensor).detach(), recipe)
        self._planner.set_recipe(
            unit.id, [saved.unit.id for saved in recipe.inputs if saved.unit is not None]
        )
        return _REBUILD

    def _try_codec(self, unit: Unit, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
        """Codes ``unit`` and decodes it again, to know the bytes and the times, and that they are the same bits."""
        link = self._transfers.link
        if link is None or not Link.takes(storage, unit.start, unit.nbytes, dtype):
            return
        begin = self._timeline.begin()

        def mark(half: str) -> None:
            nonlocal begin
            self._timeline.end(begin, (half, unit.id))
            begin = self._timeline.begin()

        code = link.repeats(storage, dtype, self._edge.stream(), mark)
        self._timeline.end(begin)
        if code is not None:
            self._coded.append((unit.id, code))

    def _rebuild_again(self, unit: Unit, storage: torch.UntypedStorage, tensor: torch.Tensor) -> int:
        """Gives ``unit`` the recipe that was proved for its place, or sends it away if that is not
        the one that it has now.
        """
        recipe = None if self._proofs is None else self._proofs.again(unit, storage, tensor)
        if recipe is None:
            self._planner.deviate()
            return _OFFLOAD
        self._give_recipe(unit, base_of(tensor).detach(), recipe)
        return _REBUILD

    def _give_recipe(self, unit: Unit, base: torch.Tensor, recipe: Recipe) -> None:
        timing = self._transfers.timing
        if timing and self._proofs is not None:
            self._proofs.note(unit, recipe)
        if recipe.narrow is not None:
            begin = self._timeline.begin() if timing else None
            with torch.no_grad():
                narrow = base.to(recipe.narrow)
            if timing:
                self._timeline.end(begin, unit.id)
            storage = narrow.untyped_storage()
            allocated, peak = self._transfers.sample()
            unit_id, action = self._planner.pack_narrow(storage.nbytes(), allocated, peak)
            copy = self._enter(unit_id, storage, 0, storage.nbytes(), narrow)
            copy.saves = copy.pending = 1
            if self._planner.is_exploring:
                self._try_codec(copy, storage, narrow.dtype)
            self._act(copy, storage, narrow.dtype, action)
            recipe.inputs = (Saved(narrow, copy, keep=copy.is_kept),)
        unit.recipe = recipe

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
        if unit.is_leaving:
            self._transfers.forget_source(unit)
        # Only the end of the step uses the peak, and asking for it is not free.
        step_peak = self._edge.peak_bytes() if len(self._units) <= 1 else None
        is_event = self._planner.free(unit.id, *self._transfers.sample(), step_peak)
        if is_event and self._transfers.timing:
            self._timeline.event()

    # ---- steps -------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        """Hands the times of a recorded step to the planner, before it plans the next one."""
        if self._transfers.timing:
            times, measured = self._timeline.close()
            rebuilds = [] if self._proofs is None else self._proofs.costs(measured)
            coded = [self._coding(unit_id, code, measured) for unit_id, code in self._coded]
            self._planner.settle(times, rebuilds, coded, *self._link_gbps())
        self._coded.clear()
        self._transfers.timing = self._planner.is_timing
        if self._proofs is not None:
            self._proofs.begin_step(self._planner.is_exploring)
        self._edge.reset_peak()

    def _coding(self, unit_id: int, code: Any, measured: dict[Any, float]) -> tuple[int, int, float, float]:
        """What the planner wants to know of a unit that was coded; times are the best of its size."""
        times = measured.get(("encode", unit_id), 0.0), measured.get(("decode", unit_id), 0.0)
        best = self._coding_us.get(code.unit_bytes, times)
        self._coding_us[code.unit_bytes] = best = (min(best[0], times[0]), min(best[1], times[1]))
        return (unit_id, code.length(), *best)

    def _link_gbps(self) -> tuple[float, float]:
        """Speed of each direction, by the copies made so far; of the disk where that is slower."""
        flows = json.loads(self._engine.counters_json())["flows"]

        def speed(*causes: str) -> float:
            found = [flows[cause] for cause in causes if flows.get(cause, {}).get("busy_us")]
            busy_us = sum(flow["busy_us"] for flow in found)
            return sum(flow["bytes"] for flow in found) / busy_us / 1e3 if busy_us else 0.0

        ways = (
            [speed("offload"), speed("spill")],
            [speed("prefetch", "on_demand"), speed("unspill")],
        )
        out, back = (min((gbps for gbps in way if gbps > 0), default=1.0) for way in ways)
        return out, back

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
