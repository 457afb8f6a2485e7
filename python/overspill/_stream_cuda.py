"""Streaming on CUDA: packed bytes cross ahead of time into one ring, and are decoded ahead of time into another.

One tensor does not fill a GPU with decoding, so several are decoded at once, on streams of their own, as far as the
ring of decoded bytes goes. Order, per unit:

- The copy stream waits until those that lay in the same packed bytes are decoded (raw words: have computed), copies,
  records.
- A decode stream waits for that copy and until those that lay in the same decoded bytes have computed, decodes,
  records.
- The compute stream waits for that, computes, records.

The host waits for nothing but a reader's thread, and nothing is allocated after the beginning. Units have positions:
unit i of the n-th pass is at n * (number of units) + i. A unit that is called out of order is brought at once, and
everything begins anew behind what all streams have been given so far.
"""

from __future__ import annotations

import ctypes
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from . import _native, tpde
from ._patch import ordinal
from ._stream_units import Ring, Task, Unit, Weight, aligned, spread, too_small, views
from .errors import FormatError

DECODED_BYTES = 512 << 20
"""What is decoded ahead, where the budget has room for more than the largest unit."""
DECODERS = 4
"""Decode streams. With fewer than three or four matrices at once parts of a large GPU have nothing to decode."""
PACKED_BYTES = 256 << 20
"""The least that is on its way over the link, as far as there is that much: 5 ms of a PCIe 5 link."""

Arrival = torch.cuda.Event | Future[torch.cuda.Event]


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
    """Brings packed bytes ahead, decodes ahead."""

    def __init__(self, task: Task) -> None:
        self._units, self._counts, self._device = task.units, task.counts, task.device
        self._copies = torch.cuda.Stream(self._device)
        self._decoders = [torch.cuda.Stream(self._device) for _ in range(DECODERS)]
        self._is_packed = any(weight.streamed for unit in self._units for weight in unit.weights)
        self._share_out(task)
        largest = max((unit.packed_bytes for unit in self._units), default=0)
        self._reader = _FromDisk(largest, self._copies) if task.on_disk else None
        count = len(self._units)
        self._there: list[Arrival | None] = [None] * count
        self._made: list[torch.cuda.Event | None] = [None] * count
        self._done: list[torch.cuda.Event | None] = [None] * count
        for unit in self._units:
            self._place(unit)
        # Positions: of the next unit to compute and to decode; of fetches, counted in units of the ring.
        self._used = self._decoded = self._fetched = self._floor = 0
        self._restart(0)
        # Memory goes back behind all that uses it, whoever lets go of it.
        weakref.finalize(self, torch.cuda.synchronize, self._device).atexit = False

    def _share_out(self, task: Task) -> None:
        """Divides what the budget leaves: the two rings, and packed units that stay."""
        tables = {id(w.streamed): w.streamed for unit in self._units for w in unit.weights if w.streamed}
        held = torch.cuda.memory_allocated(self._device) + sum(t.device_bytes for t in tables.values())
        room = task.budget_bytes - task.reserve_bytes - held
        packed = [unit.packed_bytes for unit in self._units]
        raw = [unit.raw_bytes if self._is_packed else 0 for unit in self._units]
        largest_packed, largest_raw = max(packed, default=0), max(raw, default=0)
        ring = min(max(3 * largest_packed, PACKED_BYTES), sum(packed))
        decoded = min(max(largest_raw, DECODED_BYTES), sum(raw)) if self._is_packed else 0
        decoded = max(largest_raw, min(decoded, room - ring))
        ring = max(min(2 * largest_packed, sum(packed)), min(ring, room - decoded))
        if room < ring + decoded:
            raise too_small(task, task.budget_bytes - room + ring + decoded)
        self._buffer = torch.empty(decoded, dtype=torch.uint8, device=self._device)
        self._outs = Ring(raw, decoded)
        kept = spread(self._units, room - ring - decoded, lambda unit: unit.packed_bytes)
        for unit in kept:
            unit.is_resident = True
            unit.payload = torch.empty(unit.packed_bytes, dtype=torch.uint8, device=self._device)
        self._kept_bytes = sum(unit.packed_bytes for unit in kept)
        # Units of the ring by number, and how many of them come before each unit.
        self._ring = [i for i, unit in enumerate(self._units) if not unit.is_resident]
        self._before = [
            sum(not unit.is_resident for unit in self._units[:i]) for i in range(len(self._units))
        ]
        self._ins = Ring([packed[i] for i in self._ring], ring if self._ring else 0)
        self._ring_buffer = torch.empty(ring if self._ring else 0, dtype=torch.uint8, device=self._device)
        for number, i in enumerate(self._ring):
            start = self._ins.starts[number]
            self._units[i].payload = self._ring_buffer[start : start + packed[i]]
        for i, unit in enumerate(self._units):
            unit.start = i

    def _place(self, unit: Unit) -> None:
        """Plans its decoding and tries it: kernels must decode all of it."""
        assert unit.payload is not None
        if not self._is_packed:
            unit.live = views(unit.payload, unit.weights)
            if unit.is_resident:
                _arrived(self._send(unit, [])).synchronize()
            return
        start, at = self._outs.starts[unit.start], 0
        unit.live = views(self._buffer[start : start + unit.raw_bytes], unit.weights)
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
        compute = torch.cuda.current_stream(self._device)
        _arrived(self._send(unit, [_record(compute)])).synchronize()
        for weight in unit.weights:
            assert weight.placed is not None
            weight.placed.enqueue(compute.cuda_stream)
            if weight.placed.left(compute.cuda_stream):
                raise _undecodable(weight)

    def _send(self, unit: Unit, behind: list[torch.cuda.Event]) -> Arrival:
        """Enqueues the copy of its packed bytes behind events; what passes when they are there."""
        self._counts["link_bytes"] += unit.packed_bytes
        if self._reader is not None:
            return self._reader.send(unit, behind)
        return _copy(unit, [weight.host for weight in unit.weights], self._copies, behind)

    def _fetch_one(self) -> bool:
        """Enqueues the next fetch, if nobody ahead of it still needs its bytes of the ring."""
        if not self._ring:
            return False
        count = len(self._ring)
        i = self._ring[self._fetched % count]
        behind: list[torch.cuda.Event] = []
        for back in self._ins.backs[self._fetched % count]:
            turn, number = divmod(self._fetched - back, count)
            position = turn * len(self._units) + self._ring[number]
            if position >= (self._decoded if self._is_packed else self._used):
                return False
            # Decoders are not in order among themselves, so all of them that read there are waited for.
            released = (self._made if self._is_packed else self._done)[self._ring[number]]
            if position < self._floor or released is None:
                behind += self._behind
                break
            behind.append(released)
        self._there[i] = self._send(self._units[i], behind)
        self._fetched += 1
        return True

    def _decode_one(self, needed: int) -> bool:
        """Enqueues the next decoding, if its bytes are on their way and nobody still needs those it is made in."""
        if not self._units:
            return False
        turn, i = divmod(self._decoded, len(self._units))
        unit, there = self._units[i], self._there[i]
        before = self._decoded - self._outs.backs[i][0]  # the last to compute there
        if before >= self._used:
            return False
        if not unit.is_resident:
            if turn * len(self._ring) + self._before[i] >= self._fetched:
                return False
            if isinstance(there, Future) and not there.done() and self._decoded != needed:
                return False
        stream = self._decoders[self._decoded % DECODERS]
        if not unit.is_resident:
            assert there is not None
            stream.wait_event(_arrived(there))
        done = self._done[before % len(self._units)]
        for event in [done] if before >= self._floor and done is not None else self._behind:
            stream.wait_event(event)
        for weight in unit.weights:
            if weight.placed is not None:
                weight.placed.enqueue(stream.cuda_stream)
        self._made[i] = _record(stream)
        self._decoded += 1
        return True

    def _advance(self, needed: int = -1) -> None:
        """Enqueues whatever has a place to go to; waits for a reader only for the unit at position ``needed``."""
        while self._fetch_one() | self._decode_one(needed):
            pass

    def _restart(self, i: int) -> None:
        """Begins anew at unit ``i``, behind all that any stream has been given."""
        compute = torch.cuda.current_stream(self._device)
        self._behind = [_record(stream) for stream in (compute, *self._decoders)]
        turns = self._decoded // max(len(self._units), 1) + 2
        self._used = self._decoded = self._floor = turns * len(self._units) + i
        self._fetched = turns * len(self._ring) + (self._before[i] if self._units else 0)
        self._advance()

    def bring(self, unit: Unit) -> dict[str, torch.nn.Parameter]:
        count = len(self._units)
        position = self._used + (unit.start - self._used) % count
        if position > self._used and position >= self._decoded:
            self._counts["on_demand"] += 1
            self._restart(unit.start)
            position = self._used
        while self._used < position:  # left out by the model
            self._await_decoding()
            self._finish()
        self._advance(position)
        self._await_decoding()
        return unit.live

    def _await_decoding(self) -> None:
        made = self._made[self._used % len(self._units)]
        assert self._decoded > self._used and made is not None
        torch.cuda.current_stream(self._device).wait_event(made)

    def _finish(self) -> None:
        self._done[self._used % len(self._units)] = _record(torch.cuda.current_stream(self._device))
        self._used += 1

    def used(self, unit: Unit) -> None:
        if self._used % len(self._units) == unit.start:
            self._finish()
            self._advance()

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


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _arrived(there: Arrival) -> torch.cuda.Event:
    return there.result() if isinstance(there, Future) else there


def _copy(
    unit: Unit, sources: list[Any], stream: torch.cuda.Stream, behind: list[torch.cuda.Event]
) -> torch.cuda.Event:
    """Enqueues copies to where a unit's payloads belong on the device."""
    assert unit.payload is not None
    there, at = torch.cuda.Event(), 0
    for event in behind:
        stream.wait_event(event)
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

    def send(self, unit: Unit, behind: list[torch.cuda.Event]) -> Future[torch.cuda.Event]:
        """As ``_copy``; the event is recorded when the future is done."""
        return self._pool.submit(self._run, unit, behind)

    def _run(self, unit: Unit, behind: list[torch.cuda.Event]) -> torch.cuda.Event:
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
