"""What is streamed: modules with large weights of their own, and where each weight is while nobody computes with it.

Not here: how the weights come to the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _native, tpde
from ._units import format_bytes
from .errors import BudgetError

LEAST_BYTES = 64 << 10
"""Smaller weights stay on the device: moving them costs more calls than bytes."""
ALIGN_BYTES = 256


def aligned(count: int) -> int:
    return -(-count // ALIGN_BYTES) * ALIGN_BYTES


@dataclass
class Weight:
    """One streamed tensor."""

    key: str
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    patch: tpde.Patch | None = None
    entry: int = 0
    base: Any = None
    host: torch.Tensor | None = None
    """What crosses: packed payloads, or the raw words; None where they are read from the patch's file."""
    start: int = 0
    packed_bytes: int = 0
    streamed: _native.TpdeStreamedPatch | None = None
    placed: _native.TpdePlaced | None = None


@dataclass
class Unit:
    """A module and its streamed weights."""

    module: torch.nn.Module
    weights: list[Weight]
    hollow: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    live: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    payload: torch.Tensor | None = None
    """Where its packed bytes are on the device: of its own, or its part of the ring."""
    is_resident: bool = False
    start: int = 0
    """Its number among those that take turns."""

    @property
    def raw_bytes(self) -> int:
        return sum(aligned(weight.nbytes) for weight in self.weights)

    @property
    def packed_bytes(self) -> int:
        return sum(aligned(weight.packed_bytes) for weight in self.weights)

    def fill(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.module._parameters.update(parameters)


class Ring:
    """Where things of given sizes lie in a buffer that is too small for all of them, one after the other, turn by turn.

    ``starts`` are their offsets; ``backs`` how many things earlier those lay that share bytes with it, the last of
    them first. Who lay where only one of these did is left out: that one has waited for it.
    """

    def __init__(self, sizes: list[int], room_bytes: int) -> None:
        self.starts: list[int] = []
        at = 0
        for size in sizes:
            at = 0 if at + size > room_bytes else at
            self.starts.append(at)
            at += size
        self._ends = [start + size for start, size in zip(self.starts, sizes, strict=True)]
        self.backs = [self._backs(i) for i in range(len(sizes))]

    def _backs(self, i: int) -> list[int]:
        count, found = len(self.starts), []
        open_spans = [(self.starts[i], self._ends[i])] if self.starts[i] < self._ends[i] else []
        for back in range(1, count):
            if not open_spans:
                break
            start, end = self.starts[(i - back) % count], self._ends[(i - back) % count]
            left = []
            for low, high in open_spans:
                left += [(low, min(high, start)), (max(low, end), high)]
            left = [span for span in left if span[0] < span[1]]
            if left != open_spans:
                found.append(back)
                open_spans = left
        return found if found and not open_spans else [*found, count]  # at least itself in the last turn


def views(buffer: torch.Tensor, weights: list[Weight]) -> dict[str, torch.nn.Parameter]:
    """Parameters over a byte buffer, one after the other."""
    made, at = {}, 0
    for weight in weights:
        words = buffer[at : at + weight.nbytes].view(weight.dtype).view(weight.shape)
        made[weight.attribute] = torch.nn.Parameter(words, requires_grad=False)
        at += aligned(weight.nbytes)
    return made


def units_of(model: torch.nn.Module) -> list[Unit]:
    """The modules to stream, in order, their large weights described."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found: dict[str, Unit] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        weights = [
            Weight(f"{path}.{name}".lstrip("."), name, tuple(p.shape), p.dtype, p.nbytes)
            for name, p in module._parameters.items()
            if p is not None and p.nbytes >= LEAST_BYTES and holders[id(p)] == 1
        ]
        if weights:
            found[path] = Unit(module, weights)
    # A module whose forward calls another unit's would hold two at once: its own weights stay on the device.
    outer = {
        path
        for path in found
        for other in found
        if other != path and other.startswith(f"{path}." if path else "")
    }
    return [unit for path, unit in found.items() if path not in outer]


def spread(units: list[Unit], room_bytes: int, size_of: Any) -> list[Unit]:
    """Units whose sizes sum up to about ``room_bytes`` and no more, evenly over the list."""
    total = sum(size_of(unit) for unit in units)
    chosen, taken, seen = [], 0, 0
    for unit in units:
        seen += size_of(unit)
        if taken + size_of(unit) <= min(room_bytes, room_bytes * seen / max(total, 1)):
            chosen.append(unit)
            taken += size_of(unit)
    return chosen


@dataclass
class Task:
    """What is streamed, where to, and within what."""

    model: torch.nn.Module
    units: list[Unit]
    device: torch.device
    budget_bytes: int
    reserve_bytes: int
    """Of the budget, left to activations and caches."""
    on_disk: bool
    counts: dict[str, int] = field(default_factory=lambda: {"link_bytes": 0, "on_demand": 0})


def rest(task: Task) -> list[torch.Tensor]:
    """What is on the device besides streamed weights: other parameters, buffers, bases."""
    hollow = {id(p) for unit in task.units for p in unit.hollow.values()}
    held: list[torch.Tensor] = [
        p for p in task.model.parameters() if id(p) not in hollow and p.device.type != "meta"
    ]
    held += list(task.model.buffers())
    bases = [weight.base for unit in task.units for weight in unit.weights if weight.base is not None]
    return held + [getattr(base, "blocks", base) for base in bases]


def too_small(task: Task, needed_bytes: int) -> BudgetError:
    text = f"vram_budget of {format_bytes(task.budget_bytes)}: the model needs {format_bytes(needed_bytes)}"
    return BudgetError(text, budget_bytes=task.budget_bytes, requested_bytes=needed_bytes, tier="device")
