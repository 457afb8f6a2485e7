"""Streaming on CUDA without CUDA: streams that run late and in any order, as far as events let them.

A packed weight is here the first half of one that is twice the same bytes. What a layer reads when it computes is
compared with its weight; that every edge is needed is shown by streams that are deaf to events.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from overspill import _stream_cuda
from overspill._stream_units import Ring, Task, Unit, Weight

SIZES = [64 << 10, 96 << 10, 64 << 10, 200 << 10, 64 << 10, 64 << 10, 128 << 10]
"""Bytes of each layer's weight."""


class Stream:
    """Work that is done later."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.queue: list[Callable[[], bool]] = []
        self.enqueued = self.finished = 0
        self.cuda_stream = len(world.streams)
        world.streams.append(self)

    def put(self, work: Callable[[], Any]) -> None:
        self.queue.append(lambda: work() is not False)
        self.enqueued += 1

    def wait_event(self, event: Event) -> None:
        if self.name not in self.world.deaf:
            self.put(event.query)

    def try_one(self) -> bool:
        """Does the first thing in the queue, if it may be done."""
        if not self.queue or not self.queue[0]():
            return False
        self.queue.pop(0)
        self.finished += 1
        return True


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.count = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.count = stream, stream.enqueued

    def query(self) -> bool:
        return self.stream is None or self.stream.finished >= self.count

    def synchronize(self) -> None:
        assert self.stream is not None
        while not self.query():
            self.stream.world.run(1)


class World:
    """All streams, and who runs next; one kind of them is slow."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.deaf: set[str] = set()
        self.slow = self.random.choice(["compute", "copies", "decoder"])
        self.compute = Stream(self, "compute")

    def run(self, steps: int) -> None:
        for _ in range(steps):
            order = self.random.sample(self.streams, len(self.streams))
            if self.random.random() < 0.9:
                order.sort(key=lambda stream: stream.name.startswith(self.slow))
            if not any(stream.try_one() for stream in order):
                assert all(not stream.queue for stream in self.streams), "streams wait for each other"
                return

    def drain(self) -> None:
        while any(stream.queue for stream in self.streams):
            self.run(1)


class Placed:
    def __init__(self, world: World, payload: int, out: tuple[int, int]) -> None:
        self.world, self.payload, self.out = world, payload, out

    def enqueue(self, stream: int) -> None:
        half = self.out[1] // 2

        def decode() -> None:
            for i in range(2):
                ctypes.memmove(self.out[0] + i * half, self.payload, half)

        self.world.streams[stream].put(decode)

    def left(self, _stream: int) -> int:
        self.world.drain()
        return 0


class Streamed:
    """A patch's tables."""

    device_bytes = 0

    def __init__(self, world: World) -> None:
        self.world = world

    def place(self, _entry: int, payload: int, _base: int, out: tuple[int, int]) -> Placed:
        return Placed(self.world, payload, out)


@contextmanager
def cuda(world: World) -> Iterator[None]:
    """Puts the world in the place of torch.cuda."""
    names = iter(["copies", *[f"decoder {i}" for i in range(100)]])

    def copy(unit: Unit, sources: list[Any], stream: Stream, behind: list[Event]) -> Event:
        for event in behind:
            stream.wait_event(event)
        payload, (source,) = unit.payload, sources
        stream.put(lambda: payload[: source.numel()].copy_(source))
        event = Event()
        event.record(stream)
        return event

    fakes = {
        "Stream": lambda _device: Stream(world, next(names)),
        "Event": Event,
        "current_stream": lambda _device=None: world.compute,
        "memory_allocated": lambda _device: 0,
        "synchronize": lambda _device: world.drain(),
    }
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(_stream_cuda, "_copy", copy))
        yield


def units(world: World, packed: bool) -> tuple[list[Unit], list[torch.Tensor]]:
    made, whole = [], []
    for i, size in enumerate(SIZES):
        half = torch.randint(256, (size // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        whole.append(torch.cat([half, half]))
        weight = Weight(f"{i}.weight", "weight", (size,), torch.uint8, size)
        weight.host = half if packed else whole[-1]
        weight.packed_bytes = weight.host.numel()
        weight.streamed = Streamed(world) if packed else None  # type: ignore[assignment]
        made.append(Unit(torch.nn.Module(), [weight]))
    return made, whole


def wrong_reads(seed: int, packed: bool, budget_bytes: int, deaf: str = "", jumps: float = 0.0) -> int:
    """How many layers computed with something else than their weights."""
    world = World(seed)
    with cuda(world):
        made, whole = units(world, packed)
        task = Task(torch.nn.Module(), made, torch.device("cpu"), budget_bytes, 0, False)
        way = _stream_cuda.OnCuda(task)
        world.deaf = {stream.name for stream in world.streams if deaf and stream.name.startswith(deaf)}
        wrong, at = [], 0
        for _ in range(80):
            live = way.bring(made[at])["weight"]
            world.compute.put(
                lambda live=live, at=at: wrong.append(not torch.equal(live.data, whole[at])) or True
            )
            way.used(made[at])
            world.run(world.random.choice([0, 0, 1, 5]))
            jump = world.random.random() < jumps
            at = world.random.randrange(len(made)) if jump else (at + 1) % len(made)
        world.drain()
        way.close()
    assert len(wrong) == 80
    return sum(wrong)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget_bytes", [500_000, 900_000, 1_300_000])
def test_every_layer_reads_its_own_weight(packed: bool, budget_bytes: int) -> None:
    for seed in range(50):
        assert wrong_reads(seed, packed, budget_bytes, jumps=seed % 3 / 4) == 0, f"seed {seed}"


@pytest.mark.parametrize("deaf", ["copies", "decoder", "compute"])
def test_every_wait_is_needed(deaf: str) -> None:
    assert sum(wrong_reads(seed, True, 500_000, deaf) for seed in range(25)) > 0


def test_raw_words_wait_for_their_copy_and_copies_for_who_computes() -> None:
    for deaf in ("copies", "compute"):
        assert sum(wrong_reads(seed, False, 500_000, deaf) for seed in range(25)) > 0


def test_a_ring_knows_who_lay_there_before() -> None:
    ring = Ring([4, 4, 6, 2], 10)
    assert ring.starts == [0, 4, 0, 6]
    assert ring.backs == [[2], [2, 3], [1, 2], [2]]
    assert Ring([1, 1], 2).backs == [[2], [2]]
    assert Ring([1] * 60, 4).backs == [[4]] * 60
    assert Ring([0, 0], 0).backs == [[2], [2]]
    assert Ring([], 0).backs == []
