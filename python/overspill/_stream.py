"""Whole models whose weights live packed in host memory or on disk: a layer's weights exist around its forward only.

The unit is a module with large weights of its own (a linear layer, the fused experts of a block). On CUDA its packed
bytes cross the link ahead of time, in the order of the modules, into a ring on the device; right before its forward
they are decoded, on the stream that computes, into one buffer that all units share. So there is nothing to wait for
but the link, and the bytes that cross it are the packed ones. What of the budget is left after ring and buffer holds
packed units, spread over the pass, that need not cross at all. On the CPU the next unit is decoded on another thread
while one computes, and the budget keeps decoded weights.

Order on CUDA, per unit: copy stream waits until the units that lay in the same bytes of the ring have computed,
copies, records; the compute stream waits for that, decodes, computes, records. A unit that is called out of order
is brought at once, and the ring begins anew behind it: slower, counted in ``on_demand``, and the same bits.

Not here: training, weights that two modules share and embeddings (they stay on the device), several devices.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _native, tpde
from ._units import format_bytes, parse_bytes
from .errors import BudgetError, FormatError

LEAST_BYTES = 64 << 10
"""Smaller weights stay on the device: moving them costs more calls than bytes."""
GROUP_BYTES = 1 << 30
"""Weights are packed in groups of about this size, so that packing a model does not take it twice."""
ALIGN_BYTES = 256


def _aligned(count: int) -> int:
    return -(-count // ALIGN_BYTES) * ALIGN_BYTES


@dataclass
class _Weight:
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
class _Unit:
    """A module and its streamed weights."""

    module: torch.nn.Module
    weights: list[_Weight]
    hollow: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    live: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    payload: torch.Tensor | None = None
    """Where its packed bytes are on the device: of its own, or its part of the ring."""
    is_resident: bool = False
    start: int = 0
    back: int = 0
    """How many units earlier in the ring the last one lay that shares bytes with this one."""

    @property
    def raw_bytes(self) -> int:
        return sum(_aligned(weight.nbytes) for weight in self.weights)

    @property
    def packed_bytes(self) -> int:
        return sum(_aligned(weight.packed_bytes) for weight in self.weights)

    def fill(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.module._parameters.update(parameters)


def _views(buffer: torch.Tensor, weights: list[_Weight]) -> dict[str, torch.nn.Parameter]:
    """Parameters over a byte buffer, one after the other."""
    made, at = {}, 0
    for weight in weights:
        words = buffer[at : at + weight.nbytes].view(weight.dtype).view(weight.shape)
        made[weight.attribute] = torch.nn.Parameter(words, requires_grad=False)
        at += _aligned(weight.nbytes)
    return made


def _units(model: torch.nn.Module) -> list[_Unit]:
    """The modules to stream, in order, their large weights described."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    units = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        weights = [
            _Weight(f"{path}.{name}".lstrip("."), name, tuple(p.shape), p.dtype, p.nbytes)
            for name, p in module._parameters.items()
            if p is not None and p.nbytes >= LEAST_BYTES and holders[id(p)] == 1
        ]
        if weights:
            units.append(_Unit(module, weights))
    return units


def _spread(units: list[_Unit], room_bytes: int, size_of: Any) -> list[_Unit]:
    """Units whose sizes sum up to about ``room_bytes`` and no more, evenly over the list."""
    total = sum(size_of(unit) for unit in units)
    chosen, taken, seen = [], 0, 0
    for unit in units:
        seen += size_of(unit)
        if taken + size_of(unit) <= min(room_bytes, room_bytes * seen / max(total, 1)):
            chosen.append(unit)
            taken += size_of(unit)
    return chosen


class Streamed:
    """A model whose weights are streamed; see :func:`overspill.tpde.stream`."""

    def __init__(
        self,
        model: torch.nn.Module,
        vram_budget: int | str,
        *,
        patch: tpde.PathType | bytes | tpde.Patch | None,
        base: Mapping[str, Any] | None,
        device: Any,
        packed: bool,
        reserve: int | str | None,
        on_disk: bool,
    ) -> None:
        self.model = model
        fallback = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(fallback if device is None else device)
        self.budget_bytes = parse_bytes(vram_budget, "vram_budget")
        self._reserve_bytes = self.budget_bytes // 16 if reserve is None else parse_bytes(reserve, "reserve")
        self._units = _units(model)
        self._counts = {"link_bytes": 0, "on_demand": 0}
        self._hooks: list[Any] = []
        self._host_bytes = 0
        if on_disk and not isinstance(patch, (str, os.PathLike)):
            raise ValueError("on_disk=True needs the path of a patch")
        self._on_disk = on_disk
        self._tables: _native.TpdeStreamedPatch | None = None
        opened = patch if isinstance(patch, tpde.Patch) or patch is None else tpde.Patch(patch)
        if opened is not None:
            _check(opened, base)
            self._host_bytes = opened.packed_bytes
        self._keep_rest(opened, base or {})
        self._pack(opened, base, packed)
        self._way: _OnCpu | _OnCuda = (_OnCuda if self.device.type == "cuda" else _OnCpu)(self)
        for unit in self._units:
            self._hooks.append(unit.module.register_forward_pre_hook(self._before(unit)))
            self._hooks.append(unit.module.register_forward_hook(self._after(unit), always_call=True))

    def _keep_rest(self, patch: tpde.Patch | None, base: Mapping[str, Any]) -> None:
        """Brings everything that is not streamed to the device."""
        streamed = {weight.key for unit in self._units for weight in unit.weights}
        entries = {} if patch is None else {name: i for i, name in enumerate(patch.tensors)}
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(False)
            if key in streamed:
                continue
            if parameter.device.type == "meta" and (patch is None or key not in entries):
                raise ValueError(f"{key!r} is on the meta device and in no patch")
            if patch is not None and key in entries:
                made = patch.decode(key, base.get(key)).to(self.device)
                owner = self.model.get_submodule(key.rpartition(".")[0])
                self._replace(parameter, torch.nn.Parameter(made, requires_grad=False), owner)
            else:
                parameter.data = parameter.data.to(self.device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def _replace(self, old: torch.nn.Parameter, new: torch.nn.Parameter, owner: torch.nn.Module) -> None:
        """Puts one parameter in the place of another, wherever it is."""
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new
        assert all(parameter is not old for parameter in owner._parameters.values())

    def _pack(self, patch: tpde.Patch | None, base: Mapping[str, Any] | None, packed: bool) -> None:
        group: list[_Weight] = []
        for unit in self._units:
            for weight in unit.weights:
                parameter = unit.module._parameters[weight.attribute]
                assert parameter is not None
                shell = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                unit.hollow[weight.attribute] = torch.nn.Parameter(shell, requires_grad=False)
                weight.base = None if base is None else base.get(weight.key)
                unit.fill({weight.attribute: unit.hollow[weight.attribute]})
                if patch is None:
                    if parameter.device.type == "meta":
                        raise ValueError(f"{weight.key!r} is on the meta device and there is no patch")
                    weight.host = parameter.data.contiguous()
                group.append(weight)
                if sum(one.nbytes for one in group) >= GROUP_BYTES:
                    self._pack_group(group, patch, packed)
                    group = []
        if group:
            self._pack_group(group, patch, packed)

    def _pack_group(self, group: list[_Weight], patch: tpde.Patch | None, packed: bool) -> None:
        """Turns raw words into a patch, or finds them in the one that was given."""
        if patch is None and not packed:
            for weight in group:
                assert weight.host is not None
                weight.host = weight.host.reshape(-1).view(torch.uint8)
                weight.packed_bytes = weight.nbytes
                self._host_bytes += weight.nbytes
            if self.device.type == "cuda":
                _pin([(weight, None) for weight in group], self.device)
            return
        own = patch
        if own is None:
            final = {weight.key: weight.host for weight in group}
            start = {weight.key: weight.base for weight in group if weight.base is not None}
            data = tpde.pack(start or None, final).data
            assert data is not None
            own = tpde.Patch(data)
            self._host_bytes += own.packed_bytes
        entries = {name: i for i, name in enumerate(own.tensors)}
        kinds = own.bases
        streamed = self._tables
        if self.device.type == "cuda" and streamed is None:
            streamed = _native.TpdeStreamedPatch(own._native, tpde._ordinal(self.device))
        # One patch for all weights has one set of tables.
        self._tables = None if patch is None else streamed
        for weight in group:
            if weight.key not in entries or own.tensors[weight.key].bytes != weight.nbytes:
                raise ValueError(f"the patch makes no {weight.key!r} of {weight.nbytes} bytes")
            if kinds[weight.key] != "none" and weight.base is None:
                raise ValueError(f"{weight.key!r} starts from a base of {kinds[weight.key]}, none was given")
            weight.patch, weight.entry, weight.streamed = own, entries[weight.key], streamed
            weight.host = None
            if streamed is not None:
                weight.start, weight.packed_bytes = streamed.payload(weight.entry)
            if kinds[weight.key] == "none":
                weight.base = None
            elif weight.base is not None:
                weight.base = weight.base.to(self.device)
        if streamed is not None and not self._on_disk:
            _pin([(weight, own) for weight in group], self.device)
            for weight in group:
                weight.patch = None  # its bytes are in page-locked memory now

    def _before(self, unit: _Unit) -> Any:
        def fill(_module: torch.nn.Module, _args: Any) -> None:
            unit.fill(self._way.bring(unit))

        return fill

    def _after(self, unit: _Unit) -> Any:
        def empty(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
            unit.fill(unit.hollow)
            self._way.used(unit)

        return empty

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every streamed weight in turn, on the device, valid until the next."""
        for unit in self._units:
            made = self._way.bring(unit)
            for weight in unit.weights:
                yield weight.key, made[weight.attribute].data
            self._way.used(unit)

    def report(self) -> dict[str, int]:
        """Bytes: raw and packed, resident, in the ring, in the buffer; bytes that crossed; units out of order."""
        return {
            "raw_bytes": sum(unit.raw_bytes for unit in self._units),
            "packed_bytes": self._host_bytes,
            "units": len(self._units),
            **self._way.report(),
            **self._counts,
        }

    def close(self) -> torch.nn.Module:
        """Gives the model its weights back, on the CPU, and ends the streaming."""
        whole = {key: tensor.cpu().clone() for key, tensor in self.weights()}
        for hook in self._hooks:
            hook.remove()
        self._way.close()
        for unit in self._units:
            back = {w.attribute: torch.nn.Parameter(whole[w.key], requires_grad=False) for w in unit.weights}
            unit.fill(back)
        self._units = []
        return self.model.cpu()


def _check(patch: tpde.Patch, base: Mapping[str, Any] | None) -> None:
    """That a patch is what was packed, and that the base is the one it starts from."""
    patch.authenticate()
    if patch.kind == "standalone":
        return
    found = tpde.state_id(base) if base else None
    if found != patch.base_id:
        raise FormatError("wrong base for a patch", expected_state=patch.base_id, found_state=found)


def _pin(weights: list[tuple[_Weight, tpde.Patch | None]], device: torch.device) -> None:
    """Moves what crosses the link into page-locked memory, one slab for all of it."""
    total = sum(_aligned(weight.packed_bytes) for weight, _ in weights)
    memory = _native.HostMemory(tpde._ordinal(device), max(total, 1))
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
        at += _aligned(weight.packed_bytes)


class _OnCpu:
    """Decodes a unit ahead on a thread, into a buffer of its own; keeps decoded units while the budget lasts."""

    def __init__(self, owner: Streamed) -> None:
        self._units = owner._units
        self._counts = owner._counts
        largest = max((unit.raw_bytes for unit in self._units), default=0)
        room = owner.budget_bytes - owner._reserve_bytes - sum(p.nbytes for p in _rest(owner))
        # Two in turn; the last of an odd number of units would meet the first, so it has a third.
        self._buffer_bytes = 3 * largest
        if room < self._buffer_bytes:
            raise _too_small(owner, owner.budget_bytes - room + self._buffer_bytes)
        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(3)]
        self._kept_bytes = 0
        kept = _spread(self._units, room - self._buffer_bytes, lambda unit: unit.raw_bytes)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="overspill-stream")
        self._ahead: tuple[_Unit, Future[None]] | None = None
        for unit in kept:
            unit.is_resident = True
            unit.live = _views(torch.empty(unit.raw_bytes, dtype=torch.uint8), unit.weights)
            self._kept_bytes += unit.raw_bytes
            _decode_on_cpu(unit)
        self._ring = [unit for unit in self._units if not unit.is_resident]
        for number, unit in enumerate(self._ring):
            unit.start = number
            is_odd_last = number == len(self._ring) - 1 and number % 2 == 0
            unit.live = _views(buffers[2 if is_odd_last else number % 2], unit.weights)

    def bring(self, unit: _Unit) -> dict[str, torch.nn.Parameter]:
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

    def used(self, unit: _Unit) -> None:
        """A buffer is written again only by ``bring`` of the next unit, which is after this one's forward."""

    def report(self) -> dict[str, int]:
        return {"resident_bytes": self._kept_bytes, "ring_bytes": 0, "buffer_bytes": self._buffer_bytes}

    def close(self) -> None:
        self._pool.shutdown()


def _decode_on_cpu(unit: _Unit) -> None:
    for weight in unit.weights:
        out = unit.live[weight.attribute]
        if weight.patch is None:
            assert weight.host is not None
            out.data.reshape(-1).view(torch.uint8).copy_(weight.host)
        else:
            weight.patch.decode_into(weight.entry, weight.base, out.data)


def _rest(owner: Streamed) -> list[torch.Tensor]:
    """What is on the device besides streamed weights: other parameters, buffers, bases."""
    hollow = {id(p) for unit in owner._units for p in unit.hollow.values()}
    held: list[torch.Tensor] = [
        p for p in owner.model.parameters() if id(p) not in hollow and p.device.type != "meta"
    ]
    held += list(owner.model.buffers())
    bases = [weight.base for unit in owner._units for weight in unit.weights if weight.base is not None]
    return held + [getattr(base, "blocks", base) for base in bases]


def _too_small(owner: Streamed, needed_bytes: int) -> BudgetError:
    text = f"vram_budget of {format_bytes(owner.budget_bytes)}: the model needs {format_bytes(needed_bytes)}"
    return BudgetError(text, budget_bytes=owner.budget_bytes, requested_bytes=needed_bytes, tier="device")


class _OnCuda:
    """Brings packed bytes ahead into a ring, decodes on the compute stream."""

    def __init__(self, owner: Streamed) -> None:
        self._units, self._counts, self._device = owner._units, owner._counts, owner.device
        self._copies = torch.cuda.Stream(self._device)
        # What the allocator gives may still be in use by what was enqueued before.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        tables = {id(w.streamed): w.streamed for unit in self._units for w in unit.weights if w.streamed}
        held = torch.cuda.memory_allocated(self._device) + sum(t.device_bytes for t in tables.values())
        held += owner._reserve_bytes
        raw = max((unit.raw_bytes for unit in self._units if unit.weights[0].streamed), default=0)
        packed = max((unit.packed_bytes for unit in self._units), default=0)
        ring_bytes = min(max(3 * packed, 256 << 20), sum(unit.packed_bytes for unit in self._units))
        room = owner.budget_bytes - held - raw
        if room < ring_bytes:
            ring_bytes = max(2 * packed, room)
        if room < ring_bytes:
            raise _too_small(owner, held + raw + ring_bytes)
        self._buffer = torch.empty(raw, dtype=torch.uint8, device=self._device)
        kept = _spread(self._units, room - ring_bytes, lambda unit: unit.packed_bytes)
        for unit in kept:
            unit.is_resident = True
            unit.payload = torch.empty(unit.packed_bytes, dtype=torch.uint8, device=self._device)
        self._kept_bytes = sum(unit.packed_bytes for unit in kept)
        self._ring = [unit for unit in self._units if not unit.is_resident]
        self._lay_out(torch.empty(ring_bytes if self._ring else 0, dtype=torch.uint8, device=self._device))
        self._reader = _FromDisk(packed, self._copies) if owner._on_disk else None
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

    def _place(self, unit: _Unit) -> None:
        """Plans its decoding and tries it: kernels must decode all of it."""
        assert unit.payload is not None
        if unit.weights[0].streamed is None:
            unit.live = _views(unit.payload, unit.weights)
            return
        unit.live = _views(self._buffer, unit.weights)
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
            at += _aligned(weight.packed_bytes)
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
        self, unit: _Unit, behind: torch.cuda.Event | None
    ) -> torch.cuda.Event | Future[torch.cuda.Event]:
        """Enqueues the copy of its packed bytes behind an event; what passes when they are there."""
        self._counts["link_bytes"] += unit.packed_bytes
        if self._reader is not None:
            return self._reader.send(unit, behind)
        return _copy(unit, [weight.host for weight in unit.weights], self._copies, behind)

    @staticmethod
    def _arrived(there: torch.cuda.Event | Future[torch.cuda.Event]) -> torch.cuda.Event:
        return there.result() if isinstance(there, Future) else there

    def _decode(self, unit: _Unit) -> None:
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

    def bring(self, unit: _Unit) -> dict[str, torch.nn.Parameter]:
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

    def used(self, unit: _Unit) -> None:
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
    unit: _Unit, sources: list[Any], stream: torch.cuda.Stream, behind: torch.cuda.Event | None
) -> torch.cuda.Event:
    """Enqueues copies to where a unit's payloads belong on the device."""
    assert unit.payload is not None
    there, at = torch.cuda.Event(), 0
    if behind is not None:
        stream.wait_event(behind)
    with torch.cuda.stream(stream):
        for weight, source in zip(unit.weights, sources, strict=True):
            unit.payload[at : at + weight.packed_bytes].copy_(source, non_blocking=True)
            at += _aligned(weight.packed_bytes)
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

    def send(self, unit: _Unit, behind: torch.cuda.Event | None) -> Future[torch.cuda.Event]:
        """As ``_copy``; the event is recorded when the future is done."""
        return self._pool.submit(self._run, unit, behind)

    def _run(self, unit: _Unit, behind: torch.cuda.Event | None) -> torch.cuda.Event:
        number, self._next = self._next, 1 - self._next
        last, at, sources = self._read[number], 0, []
        if last is not None:
            last.synchronize()
        for weight in unit.weights:
            source = self._buffers[number][at : at + weight.packed_bytes]
            assert weight.patch is not None
            weight.patch._native.read_payloads(weight.start, (source.data_ptr(), source.numel()))
            sources.append(source)
            at += _aligned(weight.packed_bytes)
        there = self._read[number] = _copy(unit, sources, self._copies, behind)
        return there

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown()


def _undecodable(weight: _Weight) -> FormatError:
    return FormatError(f"{weight.key!r} is packed in a way that kernels do not decode", tensor=weight.key)


def _overlap(one: _Unit, other: _Unit) -> bool:
    assert one.payload is not None and other.payload is not None
    a, b = one.payload.data_ptr(), other.payload.data_ptr()
    return a < b + other.packed_bytes and b < a + one.packed_bytes
