"""Streaming on the CPU: the next unit is decoded on a thread while one computes, and the budget keeps decoded units."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ._stream_units import Task, Unit, rest, spread, too_small, views


class OnCpu:
    """Decodes a unit ahead on a thread, into a buffer of its own; keeps decoded units while the budget lasts."""

    def __init__(self, task: Task) -> None:
        self._units = task.units
        self._counts = task.counts
        largest = max((unit.raw_bytes for unit in self._units), default=0)
        room = task.budget_bytes - task.reserve_bytes - sum(p.nbytes for p in rest(task))
        # Two in turn; the last of an odd number of units would meet the first, so it has a third.
        self._buffer_bytes = 3 * largest
        if room < self._buffer_bytes:
            raise too_small(task, task.budget_bytes - room + self._buffer_bytes)
        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(3)]
        self._kept_bytes = 0
        kept = spread(self._units, room - self._buffer_bytes, lambda unit: unit.raw_bytes)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="overspill-stream")
        self._ahead: tuple[Unit, Future[None]] | None = None
        for unit in kept:
            unit.is_resident = True
            unit.live = views(torch.empty(unit.raw_bytes, dtype=torch.uint8), unit.weights)
            self._kept_bytes += unit.raw_bytes
            _decode_on_cpu(unit)
        self._ring = [unit for unit in self._units if not unit.is_resident]
        for number, unit in enumerate(self._ring):
            unit.start = number
            is_odd_last = number == len(self._ring) - 1 and number % 2 == 0
            unit.live = views(buffers[2 if is_odd_last else number % 2], unit.weights)

    def bring(self, unit: Unit) -> dict[str, torch.nn.Parameter]:
        if unit.is_resident:
            return unit.live
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].result()
        if ahead is None or ahead[0] is not unit:
            self._counts["on_demand"] += 1
            _decode_on_cpu(unit)
        following = self._ring[(unit.start + 1) % len(self._ring)]
        if following is not unit:
            self._ahead = following, self._pool.submit(_decode_on_cpu, following)
        return unit.live

    def used(self, unit: Unit) -> None:
        """A buffer is written again only by ``bring`` of the next unit, which is after this one's forward."""

    def report(self) -> dict[str, int]:
        return {"resident_bytes": self._kept_bytes, "ring_bytes": 0, "buffer_bytes": self._buffer_bytes}

    def close(self) -> None:
        self._pool.shutdown()


def _decode_on_cpu(unit: Unit) -> None:
    for weight in unit.weights:
        out = unit.live[weight.attribute]
        if weight.patch is None:
            assert weight.host is not None
            out.data.reshape(-1).view(torch.uint8).copy_(weight.host)
        else:
            weight.patch.decode_into(weight.entry, weight.base, out.data)
