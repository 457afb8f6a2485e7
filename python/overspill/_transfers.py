"""Moves units: away, back, and through what makes them again.

Every call runs on a hook's thread with the context's lock held. The planner says what is due; this does it through
the engine, and tells the planner what memory came and went. Does not decide, and knows nothing of autograd.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping

import torch

from ._edge import Edge
from ._fused import Fused, Kernels
from ._link import Link
from ._native import Engine, Planner
from ._saved import Saved, Unit
from ._timeline import Shares, Timeline
from ._units import format_bytes

# Codes made and not yet on their way, at most: the host may be that far ahead of the device, and no farther.
_CODES_AHEAD = 8


class Transfers:
    """See the module."""

    def __init__(
        self,
        edge: Edge,
        engine: Engine,
        planner: Planner,
        timeline: Timeline,
        units: Mapping[int, Unit],
        budget_bytes: int,
        leaving_limit_bytes: int,
    ) -> None:
        self.edge, self.engine, self.planner, self.timeline = edge, engine, planner, timeline
        self.link: Link | None = None
        self.kernels: Kernels | None = None
        self.timing = False
        self.budget_bytes = budget_bytes
        self._units = units
        self._leaving_limit = leaving_limit_bytes
        self.leaving: deque[weakref.ref[Unit]] = deque()
        self._leaving_bytes = 0
        # In the order of compute: codes whose length is not known, and what was packed behind them.
        self._waiting: deque[tuple[weakref.ref[Unit], bool]] = deque()
        self._codes = 0
        # While a recipe is proved: the units that were brought back for it.
        self._borrowed: list[Unit] | None = None
        self._warned = False

    # ---- away --------------------------------------------------------------------------------

    def offload(self, unit: Unit, storage: torch.UntypedStorage) -> None:
        """Starts sending ``unit`` away; its source stays until it is released."""
        unit.source = storage
        if self._waiting:
            # One stream carries all copies: this one waits there for its point of compute, which the host is ahead of,
            # and the codes before it would wait behind it.
            unit.mark = self.engine.mark(self.edge.stream())
            self._waiting.append((weakref.ref(unit), False))
        else:
            self._send_source(unit)
        self._leaves(unit)

    def compress(self, unit: Unit, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
        """Makes ``unit``'s code, which leaves as soon as its length is known; the source may go at once."""
        assert self.link is not None
        unit.stream = self.edge.stream()
        begin = self.timeline.begin() if self.timing else None
        unit.code = self.link.encode(storage, dtype, unit.stream)
        if self.timing:
            self.timeline.end(begin)
        self._leaves(unit)
        self._waiting.append((weakref.ref(unit), True))
        self._codes += 1
        self._send_waiting()

    def _leaves(self, unit: Unit) -> None:
        unit.is_leaving = True
        self.leaving.append(weakref.ref(unit))
        self._leaving_bytes += unit.nbytes

    def _send_waiting(self) -> None:
        """Sends what may leave, in the order of compute: codes whose length is known, and the oldest in any case until
        the host is no farther ahead than it may be.
        """
        while self._waiting:
            ref, is_code = self._waiting[0]
            unit = ref()
            if unit is not None and unit.slot is None and unit.is_leaving:
                if not is_code:
                    self._send_source(unit)
                elif unit.code is not None and unit.code.buffer is not None:
                    if self._codes <= _CODES_AHEAD and not unit.code.is_known():
                        return
                    self._send_code(unit)
            self._waiting.popleft()
            self._codes -= is_code

    def _send_source(self, unit: Unit) -> None:
        assert unit.source is not None
        address = unit.source.data_ptr() + unit.start
        behind = self.edge.stream() if unit.mark is None else unit.mark
        unit.slot = self.engine.offload(address, unit.nbytes, unit.source, behind)
        unit.mark = None

    def _send_code(self, unit: Unit) -> None:
        assert unit.code is not None and unit.code.buffer is not None
        buffer, nbytes = unit.code.buffer, unit.code.length()
        # The code is there once its length is known; compute may have been given much since.
        unit.slot = self.engine.offload(buffer.data_ptr(), nbytes, buffer, None)

    def _send_through(self, unit: Unit) -> None:
        """Sends ``unit``, and what waits before it."""
        while unit.slot is None and self._waiting:
            first = self._waiting[0][0]()
            if first is not None and first.slot is None and first.code is not None:
                first.code.length()  # waits for it
            self._send_waiting()

    def release(self, unit: Unit) -> None:
        """Makes compute wait until ``unit`` has left, and gives up the memory that it left from."""
        self._send_through(unit)
        assert unit.slot is not None
        begin = self.timeline.begin() if self.timing else None
        self.engine.release_source(unit.slot, self.edge.stream())
        if self.timing:
            self.timeline.end(begin)
        self.forget_source(unit)
        if self.planner.is_recording:
            self.edge.forget_peak()  # with what has just gone it is not the model's

    def release_sources(self) -> None:
        """Lets sources go, oldest first, while too many bytes are on their way out."""
        over_budget = self.edge.allocated_bytes() > self.budget_bytes
        while self.leaving and (over_budget or self._leaving_bytes > self._leaving_limit):
            unit = self.leaving.popleft()()
            if unit is not None and unit.is_leaving:
                self.release(unit)
        if over_budget and not self._warned:
            self._warn_if_over_budget()

    def _warn_if_over_budget(self) -> None:
        """Says once that everything that may leave has left and the budget is still exceeded."""
        allocated = self.edge.allocated_bytes()
        if allocated > self.budget_bytes:
            self._warned = True
            warnings.warn(
                f"vram_budget of {format_bytes(self.budget_bytes)} is exceeded: "
                f"{format_bytes(allocated)} are in use with all that may leave sent away; parameters, gradients, "
                "and the operation at hand need the rest",
                stacklevel=2,
            )

    def forget_source(self, unit: Unit) -> None:
        """The memory that ``unit`` left from is no longer held."""
        unit.source = None
        unit.is_leaving = False
        if unit.code is not None:
            unit.code.buffer = None
        self._leaving_bytes -= unit.nbytes
        self.planner.left(unit.id)
        while self.leaving and ((first := self.leaving[0]()) is None or not first.is_leaving):
            self.leaving.popleft()

    # ---- what is due -------------------------------------------------------------------------

    def sample(self) -> tuple[int, int]:
        """Bytes allocated now and at most since the last sample, where the planner wants to know;
        nothing in a step that follows its plan.
        """
        return self.edge.sample() if self.planner.is_recording else (0, 0)

    def follow(self, needed: int | None, allocated: int) -> None:
        """Does what is due by the plan; without one, what bounds the bytes on their way."""
        self._send_waiting()
        if needed is None and not self.planner.has_plan:
            self.release_sources()
            return
        releases, fetches = self.planner.due(needed, allocated)
        for unit_id in releases:
            unit = self._units.get(unit_id)
            if unit is not None and unit.is_leaving:
                self.release(unit)
        for unit_id in fetches:
            ahead = self._units.get(unit_id)
            if ahead is not None and ahead.slot is not None and not _is_here(ahead):
                self._onboard(ahead, self.edge.stream(), prefetch=True)
                self.planner.prefetched(unit_id)

    # ---- back --------------------------------------------------------------------------------

    def fetch(self, unit: Unit, stream: int) -> None:
        """Starts bringing ``unit`` back, or what it is rebuilt from, if that is not there."""
        if _is_here(unit):
            return
        if unit.recipe is None:
            if _revived(unit) is None:
                self._onboard(unit, stream, prefetch=False)
            return
        for saved in unit.recipe.inputs:
            if saved.tensor is None and saved.unit is not None:
                self.fetch(saved.unit, stream)

    def storage_of(self, unit: Unit, stream: int) -> torch.UntypedStorage:
        """The bytes of ``unit`` on the device, which ``stream`` may read."""
        if unit.source is not None:
            return unit.source
        storage = unit.buffer or _revived(unit)
        if storage is None and unit.recipe is not None:
            return self._rebuild(unit, stream)
        if storage is None and unit.code is not None:
            return self._decode(unit, stream)
        if storage is None:
            storage = self._onboard(unit, stream, prefetch=False)
        if unit.onboarding is not None:
            self._arrive(unit, stream)
        elif stream != unit.stream:
            self.edge.join(unit.stream)
        return storage

    def tensor_of(self, saved: Saved, stream: int) -> torch.Tensor:
        """The tensor of a handle that a recipe reads."""
        saved.check_version()
        if saved.tensor is not None:
            return saved.tensor
        assert saved.unit is not None
        storage = self.storage_of(saved.unit, stream)
        return saved.view(storage, 0 if storage is saved.unit.source else saved.unit.start)

    def let_go(self, unit: Unit) -> None:
        """Every tensor of ``unit`` was unpacked: whoever asked holds the bytes now, and a retained
        graph gets them from the slot again.
        """
        unit.round += 1
        unit.pending = unit.saves
        if unit.buffer is not None:
            unit.buffer_ref = torch.multiprocessing.reductions.StorageWeakRef(unit.buffer)
            unit.buffer = None

    def borrowing(self, run: Callable[[], bool]) -> bool:
        """What ``run`` says; what had to be brought back or rebuilt for it is dropped again."""
        self._borrowed = []
        try:
            return run()
        finally:
            borrowed, self._borrowed = self._borrowed, None
            for unit in borrowed:
                unit.buffer = None
                self.planner.evicted(unit.id)

    def _onboard(self, unit: Unit, stream: int, *, prefetch: bool) -> torch.UntypedStorage:
        """The memory that ``unit``, or its code, is on its way to."""
        assert unit.slot is not None
        nbytes = unit.slot.nbytes
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.edge.device).untyped_storage()
        unit.onboarding = self.engine.onboard(
            unit.slot, buffer.data_ptr(), nbytes, buffer, stream, prefetch=prefetch
        )
        unit.stream = stream
        if unit.code is not None:
            unit.code.buffer, unit.code.is_back = buffer, True
            return buffer
        unit.buffer = buffer
        if self._borrowed is not None:
            self._borrowed.append(unit)
        return buffer

    def _arrive(self, unit: Unit, stream: int) -> None:
        assert unit.onboarding is not None
        begin = self.timeline.begin() if self.timing else None
        stalled_us = unit.onboarding.wait(stream)
        if self.timing:
            self.timeline.end(begin)
        unit.onboarding = None
        self.planner.arrived(unit.id, stalled_us)

    def _decode(self, unit: Unit, stream: int) -> torch.UntypedStorage:
        code = unit.code
        assert self.link is not None and code is not None
        if code.buffer is None:
            self._onboard(unit, stream, prefetch=False)
        if unit.onboarding is not None:
            self._arrive(unit, stream)
        elif stream != unit.stream:
            self.edge.join(unit.stream)
        begin = self.timeline.begin() if self.timing else None
        unit.buffer = self.link.decode(code, code.length(), stream)
        if self.timing:
            self.timeline.end(begin)
        unit.stream = stream
        if code.is_back:
            code.buffer, code.is_back = None, False
        return unit.buffer

    def _rebuild(self, unit: Unit, stream: int) -> torch.UntypedStorage:
        assert unit.recipe is not None
        fused = unit.recipe.fused
        if fused is not None and not any(_is_here(other) or _revived(other) for other in fused.others):
            return self._rebuild_fused(unit, fused, stream)
        inputs = [self.tensor_of(saved, stream) for saved in unit.recipe.inputs]
        begin = self.timeline.begin() if self.timing else None
        storage = unit.recipe.run(inputs).untyped_storage()
        if self.timing:
            self.timeline.end(begin, unit.id)
        self._made(unit, storage, stream)
        return storage

    def _rebuild_fused(self, unit: Unit, fused: Fused, stream: int) -> torch.UntypedStorage:
        """Rebuilds ``unit`` and what it is made of."""
        assert self.kernels is not None
        parts = [self.tensor_of(saved, stream) for saved in fused.parts]
        units = (*fused.others, unit)
        begin = self.timeline.begin() if self.timing else None
        made = [tensor.untyped_storage() for tensor in self.kernels.run(fused, parts, stream)]
        if self.timing:
            total = sum(one.nbytes for one in units)
            self.timeline.end(begin, Shares((one.id, one.nbytes / total) for one in units))
        for one, storage in zip(units, made, strict=True):
            self._made(one, storage, stream)
        return made[-1]

    def _made(self, unit: Unit, storage: torch.UntypedStorage, stream: int) -> None:
        """``unit`` was rebuilt."""
        unit.buffer = storage
        unit.stream = stream
        if self._borrowed is not None:
            self._borrowed.append(unit)
        self.planner.arrived(unit.id, 0.0)


def _is_here(unit: Unit) -> bool:
    """Whether the bytes of ``unit`` are on the device or on their way to it, as they are or coded."""
    return (
        unit.source is not None
        or unit.buffer is not None
        or (unit.code is not None and unit.code.buffer is not None)
    )


def _revived(unit: Unit) -> torch.UntypedStorage | None:
    """The buffer that was let go, if somebody still uses it."""
    if unit.buffer_ref is None or unit.buffer_ref.expired():
        return None
    return torch.UntypedStorage._new_with_weak_ptr(unit.buffer_ref.cdata)
