"""Streaming on CUDA: packed bytes cross ahead of time into a ring, and are decoded on the stream that computes.

Order, per unit: the copy stream waits until the units that lay in the same bytes of the ring have computed, copies,
records; the compute stream waits for that, decodes into the buffer that all units share, computes, records. The host
waits for nothing but a reader's thread, and nothing is allocated after the beginning. A unit that is called out of
order is brought at once, and the ring begins anew behind it.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from . import _native, tpde
from ._patch import ordinal
from ._stream_units import Task, Unit, Weight, aligned, spread, too_small, views
from .errors import FormatError


def pin(weights: list[tuple[Weight, tpde.Patch | None]], device: torch.device) -> None:
    """Moves what crosses the link into page-locked memory, one slab for all of it."""
    total = sum(aligned(weight.packed_bytes) for weight, _ in weights)
    memory = _native.HostMemory(ordinal(device), max(total, 1))
    raw = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
    raw._overspill_memory = memory  # type: ignore[attr-defined]
    slab, at = torch.frombuffer(raw, dtype=torch.uint8), 0
    for weight, patch in weights:
        own = slab[at : at + weight.packed_bytes]
        if patch is None:
            assert weight.host is not None
            own.copy_(weight.host)
        else:
            patch._native.read_payloads(weight.start, (own.data_ptr(), own.numel()))
        weight.host = own
        at += aligned(weight.packed_bytes)


class OnCuda:
    """Brings packed bytes ahead into a ring, decodes on the compute stream."""

    def __init__(self, task: Task) -> None:
        self._units, self._counts, self._device = task.units, task.counts, task.device
        self._copies = torch.cuda.Stream(self._device)
        # What the allocator gives may still be in use by what was enqueued before.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        tables = {id(w.streamed): w.streamed for unit in self._units for w in unit.weights if w.streamed}
        held = torch.cuda.memory_allocated(self._device) + sum(t.device_bytes for t in tables.values())
        held += task.reserve_bytes
        raw = max((unit.raw_bytes for unit in self._units if unit.weights[0].streamed), default=0)
        packed = max((unit.packed_bytes for unit in self._units), default=0)
        ring_bytes = min(max(3 * packed, 256 << 20), sum(unit.packed_bytes for unit in self._units))
        room = task.budget_bytes - held - raw
        if room < ring_bytes:
            ring_bytes = max(2 * packed, room)
        if room < ring_bytes:
            raise too_small(task, held + raw + ring_bytes)
        self._buffer = torch.empty(raw, dtype=torch.uint8, device=self._device)
        kept = spread(self._units, room - ring_bytes, lambda unit: unit.packed_bytes)
        for unit in kept:
            unit.is_resident = True
            unit.payload = torch.empty(unit.packed_bytes, dtype=torch.uint8, device=self._device)
        self._kept_bytes = sum(unit.packed_bytes for unit in kept)
        self._ring = [unit for unit in self._units if not unit.is_resident]
        self._lay_out(torch.empty(ring_bytes if self._ring else 0, dtype=torch.uint8, device=self._device))
        self._reader = _FromDisk(packed, self._copies) if task.on_disk else None
        self._used = self._fetched = self._floor = 0
        self._behind = self._record()
        self._done: dict[int, torch.cuda.Event] = {}
        self._there: dict[int, torch.cuda.Event | Future[torch.cuda.Event]] = {}
        for unit in self._units:
            self._place(unit)

    def _lay_out(self, ring: torch.Tensor) -> None:
        """Gives each unit its bytes of the ring and finds whom it has to wait for."""
        self._ring_buffer, at = ring, 0
        for number, unit in enumerate(self._ring):
            at = 0 if at + unit.packed_bytes > ring.numel() else at
            unit.start, unit.payload = number, ring[at : at + unit.packed_bytes]
            at += unit.packed_bytes
        count = len(self._ring)
        for unit in self._ring:
            before = (back for back in range(1, count + 1) if _overlap(unit, self._ring[unit.start - back]))
            unit.back = next(before, count)

    def _place(self, unit: Unit) -> None:
        """Plans its decoding and tries it: kernels must decode all of it."""
        assert unit.payload is not None
        if unit.weights[0].streamed is None:
            unit.live = views(unit.payload, unit.weights)
            if unit.is_resident:
                self._arrived(self._send(unit, None)).synchronize()
            return
        unit.live = views(self._buffer, unit.weights)
        at = 0
        for weight in unit.weights:
            out = unit.live[weight.attribute].data
            base = getattr(weight.base, "blocks", weight.base)
            address = 0 if base is None else base.data_ptr()
            payload = unit.payload[at:].data_ptr()
            assert weight.streamed is not None
            weight.placed = weight.streamed.place(
                weight.entry, payload, address, (out.data_ptr(), weight.nbytes)
            )
            if weight.placed is None:
                raise _undecodable(weight)
            at += aligned(weight.packed_bytes)
        self._arrived(self._send(unit, None)).synchronize()
        self._decode(unit)
        for weight in unit.weights:
            assert weight.placed is not None
            if weight.placed.left(torch.cuda.current_stream(self._device).cuda_stream):
                raise _undecodable(weight)

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _send(
        self, unit: Unit, behind: torch.cuda.Event | None
    ) -> torch.cuda.Event | Future[torch.cuda.Event]:
        """Enqueues the copy of its packed bytes behind an event; what passes when they are there."""
        self._counts["link_bytes"] += unit.packed_bytes
        if self._reader is not None:
            return self._reader.send(unit, behind)
        return _copy(unit, [weight.host for weight in unit.weights], self._copies, behind)

    @staticmethod
    def _arrived(there: torch.cuda.Event | Future[torch.cuda.Event]) -> torch.cuda.Event:
        return there.result() if isinstance(there, Future) else there

    def _decode(self, unit: Unit) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for weight in unit.weights:
            if weight.placed is not None:
                weight.placed.enqueue(stream)

    def _fetch_ahead(self) -> None:
        """Enqueues every fetch whose bytes of the ring nobody ahead of it still needs."""
        count = len(self._ring)
        while self._fetched - self._used < count:
            unit = self._ring[self._fetched % count]
            before = self._fetched - unit.back
            if before >= self._used:
                return
            event = self._behind if before < self._floor else self._done[before]
            self._there[self._fetched] = self._send(unit, event)
            self._fetched += 1

    def bring(self, unit: Unit) -> dict[str, torch.nn.Parameter]:
        if not unit.is_resident:
            count = len(self._ring)
            number = self._used + (unit.start - self._used) % count
            if number >= self._fetched:
                # Not on its way: begin anew at this unit, behind all that computes.
                self._counts["on_demand"] += 1
                number = self._fetched + (unit.start - self._fetched) % count
                self._behind, self._floor = self._record(), number
                self._fetched = number
                self._done.clear()
                self._there.clear()
            elif number > self._used:
                self._behind, self._floor = self._record(), number
            self._used = number
            self._fetch_ahead()
            there = self._arrived(self._there.pop(number))
            torch.cuda.current_stream(self._device).wait_event(there)
        self._decode(unit)
        return unit.live

    def used(self, unit: Unit) -> None:
        if unit.is_resident:
            return
        self._done[self._used] = self._record()
        self._done.pop(self._used - len(self._ring), None)
        self._used += 1
        self._fetch_ahead()

    def report(self) -> dict[str, int]:
        return {
            "resident_bytes": self._kept_bytes,
            "ring_bytes": self._ring_buffer.numel(),
            "buffer_bytes": self._buffer.numel(),
        }

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        torch.cuda.synchronize(self._device)


def _copy(
    unit: Unit, sources: list[Any], stream: torch.cuda.Stream, behind: torch.cuda.Event | None
) -> torch.cuda.Event:
    """Enqueues copies to where a unit's payloads belong on the device."""
    assert unit.payload is not None
    there, at = torch.cuda.Event(), 0
    if behind is not None:
        stream.wait_event(behind)
    with torch.cuda.stream(stream):
        for weight, source in zip(unit.weights, sources, strict=True):
            unit.payload[at : at + weight.packed_bytes].copy_(source, non_blocking=True)
            at += aligned(weight.packed_bytes)
        there.record(stream)
    return there


class _FromDisk:
    """Reads payloads from their patch's file into one of two page-locked buffers, on a thread, and sends them."""

    def __init__(self, largest_bytes: int, copies: torch.cuda.Stream) -> None:
        self._copies = copies
        self._buffers = [torch.empty(largest_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._next = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="overspill-stream")

    def send(self, unit: Unit, behind: torch.cuda.Event | None) -> Future[torch.cuda.Event]:
        """As ``_copy``; the event is recorded when the future is done."""
        return self._pool.submit(self._run, unit, behind)

    def _run(self, unit: Unit, behind: torch.cuda.Event | None) -> torch.cuda.Event:
        number, self._next = self._next, 1 - self._next
        last, at, sources = self._read[number], 0, []
        if last is not None:
            last.synchronize()
        for weight in unit.weights:
            source = self._buffers[number][at : at + weight.packed_bytes]
            assert weight.patch is not None
            weight.patch._native.read_payloads(weight.start, (source.data_ptr(), source.numel()))
            sources.append(source)
            at += aligned(weight.packed_bytes)
        there = self._read[number] = _copy(unit, sources, self._copies, behind)
        return there

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown()


def _undecodable(weight: Weight) -> FormatError:
    return FormatError(f"{weight.key!r} is packed in a way that kernels do not decode", tensor=weight.key)


def _overlap(one: Unit, other: Unit) -> bool:
    assert one.payload is not None and other.payload is not None
    a, b = one.payload.data_ptr(), other.payload.data_ptr()
    return a < b + other.packed_bytes and b < a + one.packed_bytes
