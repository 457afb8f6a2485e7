"""Device times of a recorded step: when each event happened, without what overspill itself took.

The planner needs the times of the model's own work. Whatever overspill adds to the compute stream (a
wait for a copy, a rebuild, a proof) is put between two marks and taken off again, and a rebuild's
marks are its cost.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ._edge import Edge

# More than any step has; a step that never ends is not worth the events.
_MOST = 200_000


class Shares(tuple[tuple[Hashable, float], ...]):
    """Names, and what part of a time each of them has."""


class Timeline:
    """Marks of one step on the device's clock."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._events: list[Any] = []
        self._own: list[tuple[int, Any, Any, Hashable]] = []

    def event(self) -> None:
        """The planner counted an event."""
        if len(self._events) < _MOST:
            self._events.append(self._edge.mark())

    def begin(self) -> Any:
        """Work of overspill's own begins on the current stream."""
        return self._edge.mark()

    def end(self, begin: Any, what: Hashable = None) -> None:
        """It ends; it was the cost of ``what``, or of nothing that is asked for. Several have it in
        :class:`Shares`.
        """
        if len(self._own) < _MOST:
            self._own.append((len(self._events), begin, self._edge.mark(), what))

    def close(self) -> tuple[list[float], dict[Hashable, float]]:
        """Microseconds of the events since the first, and of what was named; begins anew.

        Waits for the device.
        """
        self._edge.synchronize()
        events, own = self._events, self._own
        self._events, self._own = [], []
        costs: dict[Hashable, float] = {}
        taken = [0.0] * (len(events) + 1)
        for index, begin, end, what in own:
            us = self._edge.between_us(begin, end)
            taken[index] += us
            for name, share in what if isinstance(what, Shares) else ((what, 1.0),):
                if name is not None:
                    costs[name] = costs.get(name, 0.0) + us * share
        times: list[float] = []
        total = 0.0
        for index, event in enumerate(events):
            total += taken[index]
            times.append(max(self._edge.between_us(events[0], event) - total, times[-1] if times else 0.0))
        return times, costs
