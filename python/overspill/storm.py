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
from ._recipes import MAX_DEPTH, Recipe, recipes
from ._saved import Saved, Unit, span
from ._timeline import Timeline
from ._units import format_bytes, parse_bytes

_MIB = 2**20
_KEEP, _OFFLOAD, _REBUILD = 0, 1, 2
_NAMES = ("kept", "offloaded", "rebuilt")


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
            # A process's memory is what the system says, in pages, and with what the allocator holds back.
            slack_bytes=lookahead if self._edge.device.type == "cpu" else 0,
            # Until the copies of the first step have been timed.
            offload_gbps=1.0,
            onboard_gbps=1.0,
        )
        self._timeline = Timeline(self._edge)
        self._timing = False
        self._rebuild = rebuild
        self._epsilons = _epsilons_of(model) if rebuild else ()
        # By place in the step: what has been proved. By signature: the best time measured.
        self._proved: dict[int, tuple[Any, ...]] = {}
        self._costs_us: dict[tuple[Any, ...], float] = {}
        self._rebuilt: list[tuple[int, tuple[Any, ...]]] = []
        self._first_id = 0
        # While a recipe is proved: the units that were brought back for it.
        self._borrowed: list[Unit] | None = None
        self._engine = self._open_engine(host_budget, spill_dir, spill_limit, seed, trace)
        self._units: weakref.WeakValueDictionary[int, Unit] = weakref.WeakValueDictionary()
        self._by_storage: dict[int, list[weakref.ref[Unit]]] = {}
        self._leaving: deque[weakref.ref[Unit]] = deque()
        self._leaving_bytes = 0
        self._fixed_storages: set[int] = set()
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []
        self._warned = False
        self._counts = {"kept": 0, "offloaded": 0, "rebuilt": 0, "left_alone": 0}
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
        return Saved(tensor, unit, keep=unit.slot is None and unit.recipe is None)

    def _restore(self, saved: Saved, unit: Unit) -> torch.Tensor:
        allocated, peak = self._sample()
        self._planner.need(unit.id, allocated, peak)
        if self._timing:
            self._timeline.event()
        if saved.tensor is not None:
            self._follow(unit.id, allocated)
            return saved.tensor
        stream = self._edge.stream()
        self._fetch(unit, stream)
        self._follow(unit.id, allocated)
        storage = self._storage_of(unit, stream)
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
            self._begin_step()
        allocated, peak = self._sample()
        unit_id, action = self._planner.pack(nbytes, allocated, peak)
        if self._timing:
            self._timeline.event()
        if not self._units:
            self._first_id = unit_id
        unit = self._enter(unit_id, storage, start, nbytes, tensor)
        if action == _REBUILD:
            action = self._apply_proved(unit, storage, tensor)
        elif action == _OFFLOAD and self._rebuild and self._planner.is_exploring:
            action = self._explore(unit, storage, tensor)
        self._act(unit, storage, action)
        if self._leaving:
            self._follow(None, allocated)
        return unit

    def _enter(
        self, unit_id: int, storage: torch.UntypedStorage, start: int, nbytes: int, tensor: torch.Tensor
    ) -> Unit:
        unit = Unit(self, unit_id, storage, start, nbytes, tensor)
        self._units[unit_id] = unit
        self._by_storage.setdefault(unit.storage_ref.cdata, []).append(weakref.ref(unit))
        return unit

    def _act(self, unit: Unit, storage: torch.UntypedStorage, action: int) -> None:
        self._counts[_NAMES[action]] += 1
        if action == _KEEP:
            return
        _ = unit.probe  # from here on it does not hold the storage
        if action == _OFFLOAD:
            address = storage.data_ptr() + unit.start
            unit.slot = self._engine.offload(address, unit.nbytes, storage, self._edge.stream())
            unit.source = storage
            self._leaving.append(weakref.ref(unit))
            self._leaving_bytes += unit.nbytes

    def _begin_step(self) -> None:
        """Hands the times of a recorded step to the planner, before it plans the next one."""
        if self._timing:
            times, costs = self._timeline.close()
            for unit_id, signature in self._rebuilt:
                if unit_id in costs:
                    before = self._costs_us.get(signature, costs[unit_id])
                    self._costs_us[signature] = min(before, costs[unit_id])
            known = [(unit_id, self._costs_us.get(signature, 0.0)) for unit_id, signature in self._rebuilt]
            self._planner.settle(times, known, *self._link_gbps())
        self._rebuilt.clear()
        self._timing = self._planner.is_timing
        if self._planner.is_exploring:
            self._proved.clear()
        self._edge.reset_peak()

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

    # ---- recipes -----------------------------------------------------------------------------

    def _candidates(self, unit: Unit, storage: torch.UntypedStorage, tensor: torch.Tensor) -> list[Recipe]:
        """Recipes that read the graph right, proved or not."""
        if unit.start != 0 or unit.nbytes != storage.nbytes():
            return []
        base = _base_of(tensor)
        return [
            recipe
            for recipe in recipes(base, self._epsilons)
            if all(self._may_be_read(saved, unit, recipe) for saved in recipe.inputs)
            and recipe.depth <= MAX_DEPTH
        ]

    def _may_be_read(self, saved: Saved, unit: Unit, recipe: Recipe) -> bool:
        if saved.unit is not None:
            other = saved.unit
            return (
                other.storm is self
                and other.id >= self._first_id
                and other.storage_ref.cdata != unit.storage_ref.cdata
            )
        tensor = saved.tensor
        if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
        is_fixed = tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._fixed_storages
        # A leaf that is not of the model, or what a product reads of it in another shape, may be a shard
        # that is emptied until its layer's backward.
        return is_fixed or not (tensor.is_leaf and tensor.requires_grad or recipe.is_product)

    def _signature(self, recipe: Recipe) -> tuple[Any, ...]:
        inputs: list[Any] = []
        for saved in recipe.inputs:
            if saved.unit is not None:
                inputs.append(saved.unit.id - self._first_id)
            elif saved.tensor is not None:
                inputs.append((saved.tensor.dtype, saved.tensor.shape))
        return (*recipe.signature, tuple(inputs))

    def _explore(self, unit: Unit, storage: torch.UntypedStorage, tensor: torch.Tensor) -> int:
        """Looks for a recipe and proves it while the tensor is there to be compared with."""
        candidates = self._candidates(unit, storage, tensor)
        if not candidates or not self._edge.has_room(3 * unit.nbytes, self.vram_budget_bytes):
            return _OFFLOAD
        base = _base_of(tensor).detach()
        begin = self._timeline.begin()
        with torch.no_grad():
            proved = next((r for r in candidates if self._is_proved(r, storage, base)), None)
        self._timeline.end(begin)
        self._edge.sample()  # what the proof took is not the model's
        if proved is None:
            return _OFFLOAD
        signature = self._signature(proved)
        self._give_recipe(unit, base, proved)
        self._planner.set_recipe(
            unit.id, [saved.unit.id for saved in proved.inputs if saved.unit is not None]
        )
        self._proved[unit.id - self._first_id] = signature
        return _REBUILD

    def _is_proved(self, recipe: Recipe, storage: torch.UntypedStorage, base: torch.Tensor) -> bool:
        """Runs ``recipe`` and compares; what has to be brought back or rebuilt for it is dropped again."""
        self._borrowed = []
        try:
            if recipe.narrow is not None:
                inputs = [base.to(recipe.narrow)]
            else:
                stream = self._edge.stream()
                inputs = [self._tensor_of(saved, stream) for saved in recipe.inputs]
            return recipe.makes(storage, base, inputs)
        except RuntimeError:
            return False  # an input was written to since, or there is no memory for it now
        finally:
            borrowed, self._borrowed = self._borrowed, None
            for unit in borrowed:
                unit.buffer = None
                self._planner.evicted(unit.id)

    def _apply_proved(self, unit: Unit, storage: torch.UntypedStorage, tensor: torch.Tensor) -> int:
        """Gives ``unit`` the recipe that was proved for its place, or sends it away if that is not
        the one that it has now.
        """
        proved = self._proved.get(unit.id - self._first_id)
        for recipe in self._candidates(unit, storage, tensor):
            if self._signature(recipe) == proved:
                self._give_recipe(unit, _base_of(tensor).detach(), recipe)
                return _REBUILD
        self._planner.deviate()
        return _OFFLOAD

    def _give_recipe(self, unit: Unit, base: torch.Tensor, recipe: Recipe) -> None:
        if self._timing:
            self._rebuilt.append((unit.id, recipe.signature))
        if recipe.narrow is not None:
            begin = self._timeline.begin() if self._timing else None
            with torch.no_grad():
                narrow = base.to(recipe.narrow)
            if self._timing:
                self._timeline.end(begin, unit.id)
            storage = narrow.untyped_storage()
            allocated, peak = self._sample()
            unit_id, action = self._planner.pack_narrow(storage.nbytes(), allocated, peak)
            copy = self._enter(unit_id, storage, 0, storage.nbytes(), narrow)
            copy.saves = copy.pending = 1
            self._act(copy, storage, action)
            recipe.inputs = (Saved(narrow, copy, keep=action == _KEEP),)
        unit.recipe = recipe

    # ---- transfers ---------------------------------------------------------------------------

    def _follow(self, needed: int | None, allocated: int) -> None:
        """Does what is due by the plan; without one, what bounds the bytes on their way."""
        if needed is None and not self._planner.has_plan:
            self._release_sources()
            return
        releases, fetches = self._planner.due(needed, allocated)
        stream = None
        for unit_id in releases:
            unit = self._units.get(unit_id)
            if unit is not None and unit.source is not None and unit.slot is not None:
                stream = self._edge.stream() if stream is None else stream
                self._release(unit, stream)
        for unit_id in fetches:
            ahead = self._units.get(unit_id)
            if ahead is None or ahead.buffer is not None or ahead.slot is None or ahead.source is not None:
                continue
            stream = self._edge.stream() if stream is None else stream
            self._onboard(ahead, stream, prefetch=True)
            self._planner.prefetched(unit_id)

    def _release(self, unit: Unit, stream: int) -> None:
        assert unit.slot is not None
        begin = self._timeline.begin() if self._timing else None
        self._engine.release_source(unit.slot, stream)
        if self._timing:
            self._timeline.end(begin)
        self._forget_source(unit)
        if self._planner.is_recording:
            self._edge.forget_peak()  # with what has just gone it is not the model's

    def _release_sources(self) -> None:
        """Lets sources of offloads go, oldest first, while too many bytes are on their way out."""
        over_budget = self._edge.allocated_bytes() > self.vram_budget_bytes
        while self._leaving and (over_budget or self._leaving_bytes > self._leaving_limit):
            unit = self._leaving.popleft()()
            if unit is None or unit.source is None or unit.slot is None:
                continue
            self._release(unit, self._edge.stream())
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

    def _sample(self) -> tuple[int, int]:
        """Bytes allocated now and at most since the last sample, where the planner wants to know;
        nothing in a step that follows its plan.
        """
        return self._edge.sample() if self._planner.is_recording else (0, 0)

    def _forget_source(self, unit: Unit) -> None:
        unit.source = None
        self._leaving_bytes -= unit.nbytes
        self._planner.left(unit.id)
        while self._leaving and ((first := self._leaving[0]()) is None or first.source is None):
            self._leaving.popleft()

    def _fetch(self, unit: Unit, stream: int) -> None:
        """Starts bringing ``unit`` back, or what it is rebuilt from, if that is not there."""
        if unit.source is not None or unit.buffer is not None:
            return
        if unit.recipe is None:
            if self._revived(unit) is None:
                self._onboard(unit, stream, prefetch=False)
            return
        for saved in unit.recipe.inputs:
            if saved.tensor is None and saved.unit is not None:
                self._fetch(saved.unit, stream)

    def _storage_of(self, unit: Unit, stream: int) -> torch.UntypedStorage:
        """The bytes of ``unit`` on the device, which ``stream`` may read."""
        if unit.source is not None:
            return unit.source
        storage = unit.buffer or self._revived(unit)
        if storage is None and unit.recipe is not None:
            return self._rebuild_now(unit, unit.recipe, stream)
        if storage is None:
            storage = self._onboard(unit, stream, prefetch=False)
        if unit.onboarding is not None:
            begin = self._timeline.begin() if self._timing else None
            stalled_us = unit.onboarding.wait(stream)
            if self._timing:
                self._timeline.end(begin)
            unit.onboarding = None
            self._planner.arrived(unit.id, stalled_us)
        elif stream != unit.stream:
            self._edge.join(unit.stream)
        return storage

    def _rebuild_now(self, unit: Unit, recipe: Recipe, stream: int) -> torch.UntypedStorage:
        inputs = [self._tensor_of(saved, stream) for saved in recipe.inputs]
        begin = self._timeline.begin() if self._timing else None
        storage = recipe.run(inputs).untyped_storage()
        if self._timing:
            self._timeline.end(begin, unit.id)
        unit.buffer = storage
        unit.stream = stream
        if self._borrowed is not None:
            self._borrowed.append(unit)
        self._planner.arrived(unit.id, 0.0)
        return storage

    def _tensor_of(self, saved: Saved, stream: int) -> torch.Tensor:
        """The tensor of a handle that a recipe reads."""
        saved.check_version()
        if saved.tensor is not None:
            return saved.tensor
        assert saved.unit is not None
        storage = self._storage_of(saved.unit, stream)
        return saved.view(storage, 0 if storage is saved.unit.source else saved.unit.start)

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
        if self._borrowed is not None:
            self._borrowed.append(unit)
        return buffer

    def _let_go(self, unit: Unit) -> None:
        """Every tensor of ``unit`` was unpacked: whoever asked holds the bytes now, and a retained
        graph gets them from the slot again.
        """
        unit.round += 1
        unit.pending = unit.saves
        if unit.buffer is not None:
            unit.buffer_ref = torch.multiprocessing.reductions.StorageWeakRef(unit.buffer)
            unit.buffer = None

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
        step_peak = self._edge.peak_bytes() if len(self._units) <= 1 else None
        is_event = self._planner.free(unit.id, *self._sample(), step_peak)
        if is_event and self._timing:
            self._timeline.event()

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
            slab_bytes=min(host_bytes, (4096 if on_gpu else 1024) * _MIB),
            # One copy a tensor where the copy engine reads it at once; small pieces for the disk.
            segment_bytes=max(min((1024 if on_gpu else 8) * _MIB, host_bytes // 8), 4096),
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


def _base_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor._base


def _epsilons_of(model: torch.nn.Module) -> tuple[float, ...]:
    """Every epsilon that a normalisation of the model has."""
    names = ("eps", "variance_epsilon")
    found = {getattr(module, name, None) for module in model.modules() for name in names}
    return tuple(sorted(value for value in found if isinstance(value, float)))


def _half_of_free_disk(folder: str) -> int:
    import os

    try:
        stat = os.statvfs(folder)
    except OSError:
        return 2**20  # the engine says what is wrong with the folder
    return max(stat.f_bavail * stat.f_frsize // 2, 4096)
