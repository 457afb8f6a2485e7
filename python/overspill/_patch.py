"""An opened patch: its tables, its authenticity, and the weights it makes, on the CPU and on CUDA.

Bytes are checked before the first write. What is made goes into new memory, into memory that the caller names, or over
the base where it lies; a module that was patched in place carries the id of the state it is in.

Not here: packing, chains of patches, and models whose weights stream.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from . import _native
from ._checkpoint import (
    DEFAULT_MEMORY_BYTES,
    TORCH_NAMES,
    Framework,
    PathType,
    Progress,
    Source,
    StateDict,
    TensorInfo,
    empty,
    state_id,
    tensors_of,
)

PatchBytes = bytes | bytearray | memoryview
"""A whole patch in memory. What can be written is not copied, and must not be written while it is used."""
Changes = tuple[str, Any, Any]
"""A tensor's name, positions in it, and the words there."""

_STATE = "_overspill_state_id"
"""Attribute of a module: the state that :meth:`Patch.apply_` left it in."""


def set_state(target: Any, state: str | None) -> None:
    """Notes the state that a module is in, for its next patch; None while it is being written. A mapping has no place."""
    if not isinstance(target, Mapping):
        setattr(target, _STATE, state)


def _in_place(target: Any, needed: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The tensors that a patch is applied to, in its order, each checked to be what the patch says."""
    found = tensors_of(target)
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"no tensor {missing[0]!r} to apply to, and {len(missing) - 1} more are missing")
    tensors = {}
    for name, info in needed.items():
        tensor = found[name].detach()
        dtype = TORCH_NAMES.get(info.dtype)
        if str(tensor.dtype) != f"torch.{dtype}" or tuple(tensor.shape) != info.shape:
            raise ValueError(
                f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {info.dtype} {info.shape}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name!r} is not contiguous")
        tensors[name] = tensor
    return tensors


def _apart(outs: list[tuple[int, int]], base: Source) -> None:
    """Refuses tensors to write that share memory with each other or with the base."""
    held = [] if base.native is None or isinstance(base.native, str) else [raw[3:] for raw in base.native]
    spans = [(address, size, False) for address, size in held] + [(*out, True) for out in outs]
    end = end_written = 0
    for address, size, is_written in sorted(span for span in spans if span[1]):
        if address < (end if is_written else end_written):
            raise ValueError("the tensors to write share memory with each other or with the base")
        end = max(end, address + size)
        if is_written:
            end_written = max(end_written, address + size)


def written(tensor: Any) -> None:
    """Tells autograd that a tensor was written behind its back."""
    import torch

    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def ordinal(device: Any) -> int:
    """The number of a CUDA device."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"{device} is not a CUDA device")
    return torch.cuda.current_device() if device.index is None else device.index


def view(memory: _native.HostMemory) -> memoryview:
    """Page-locked memory as bytes; it lives as long as its last view."""
    raw = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
    raw._overspill_memory = memory  # type: ignore[attr-defined]
    return memoryview(raw).cast("B")


def _native_source(patch: PatchBytes | PathType) -> Any:
    """A path, bytes, or memory that is not copied: (address, bytes, what keeps it)."""
    if isinstance(patch, bytes):
        return patch
    if not isinstance(patch, memoryview | bytearray):
        return os.fspath(patch)
    view = memoryview(patch).cast("B")
    if view.readonly:
        return bytes(view)
    # Exports the buffer for as long as it lives: a bytearray cannot be resized meanwhile.
    held = (ctypes.c_uint8 * view.nbytes).from_buffer(view)
    return (ctypes.addressof(held), view.nbytes, held)


class Patch:
    """An opened patch: its tables are read and checked, its payloads not yet."""

    def __init__(self, patch: PatchBytes | PathType) -> None:
        self._native = _native.TpdePatch(_native_source(patch))
        self._devices: dict[int, _native.TpdeDevicePatch] = {}

    @property
    def kind(self) -> str:
        """``standalone``, ``relative`` or ``absolute``."""
        return self._native.kind

    @property
    def base_id(self) -> str | None:
        """State that the patch starts from."""
        return self._native.base_id

    @property
    def final_id(self) -> str:
        """State that the patch makes."""
        return self._native.final_id

    @property
    def packed_bytes(self) -> int:
        """Size of the patch."""
        return self._native.packed_bytes

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors that the patch makes."""
        return {n: TensorInfo(dtype, tuple(shape), size) for n, dtype, shape, size in self._native.tensors()}

    @property
    def bases(self) -> dict[str, str]:
        """What each tensor starts from: "none", "words", or the layout of quantized blocks."""
        return dict(zip(self.tensors, self._native.bases(), strict=True))

    def authenticate(self, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, threads: int = 0) -> None:
        """Compares every byte with the patch's hash. Raises FormatError for one that differs."""
        self._native.authenticate(memory_bytes, threads)

    def decode(self, name: str, base: Any = None) -> Any:
        """One tensor, on the CPU; ``base`` is what it starts from, if anything. The patch must be authentic."""
        info = self.tensors[name]
        made, _ = empty([info], "torch")[0]
        self.decode_into(list(self.tensors).index(name), base, made)
        return made

    def decode_into(self, entry: int, base: Any, out: Any, *, threads: int = 0) -> None:
        """Decodes number ``entry`` of :attr:`tensors` into a contiguous CPU tensor. See :meth:`decode`."""
        held = getattr(base, "blocks", base)
        held = None if held is None else held.detach().cpu().contiguous()
        start = (0, 0) if held is None else (held.data_ptr(), held.nbytes)
        self._native.decode_tensor(entry, start, (out.data_ptr(), out.nbytes), DEFAULT_MEMORY_BYTES, threads)

    def changes(self, device: Any = "cpu", names: Collection[str] | None = None) -> Iterator[Changes]:
        """What an absolute patch writes: (name, positions in the flattened tensor, words), on ``device``.

        Words are integers of the tensor's width. ``names`` leaves other tensors out. The patch must be authentic.
        Nothing of the weights is needed: what two opposite bases agree on after decoding is what the patch wrote.
        """
        import torch

        if self.kind != "absolute":
            raise ValueError(f"a {self.kind} patch holds no positions")
        on = torch.device(device)
        chosen = [(i, name, info) for i, (name, info) in enumerate(self.tensors.items())]
        for entry, name, info in chosen:
            if (names is not None and name not in names) or info.bytes == 0:
                continue
            width = getattr(torch, TORCH_NAMES[info.dtype]).itemsize
            word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
            one, other = (self._over(entry, info.bytes, fill, on).view(word) for fill in (0, 255))
            positions = (one == other).nonzero().flatten()
            yield name, positions, one[positions]

    def _over(self, entry: int, nbytes: int, fill: int, device: Any) -> Any:
        """Number ``entry`` decoded over bytes that are all ``fill``."""
        import torch

        made = torch.full((nbytes,), fill, dtype=torch.uint8, device=device)
        if made.device.type == "cpu":
            base = made if self._native.bases()[entry] != "none" else None
            self.decode_into(entry, base, out := torch.empty_like(made))
            return out
        places = [(0, 0, info.bytes) for info in self.tensors.values()]
        places[entry] = (made.data_ptr(), made.data_ptr(), nbytes)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            on_device = self._on_device(ordinal(device), DEFAULT_MEMORY_BYTES, 0)
            on_device.apply(places, stream, base_id=self.base_id)
        return made

    def inspect(self, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, threads: int = 0) -> dict[str, Any]:
        """Raw and packed bytes, ratio, changed share and modes, by tensor and in all."""
        return json.loads(self._native.inspect(memory_bytes, threads))

    def verify(
        self,
        base: PathType | StateDict | None = None,
        *,
        progress: Progress | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        threads: int = 0,
    ) -> bool:
        """Checks every byte; with the base (or where none is needed) also the result. True if it decoded."""
        source = Source(base)
        limits = {"memory_bytes": memory_bytes, "threads": threads}
        return self._native.verify(source.native, **limits, progress=progress)

    def apply(
        self,
        base: PathType | StateDict | None = None,
        *,
        base_id: str | None = None,
        into: Any = None,
        framework: Framework | None = None,
        progress: Progress | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        threads: int = 0,
    ) -> dict[str, Any]:
        """Rebuilds the final state dict. See :func:`apply`."""
        source = Source(base)
        chosen = framework or source.framework or "torch"
        state, outs = {}, []
        if into is not None:
            state = _in_place(into, self.tensors)
            outs = [(tensor.data_ptr(), tensor.nbytes) for tensor in state.values()]
            if any(tensor.device.type != "cpu" for tensor in state.values()):
                raise ValueError("tensors to write that are not on the CPU; see apply_")
            _apart(outs, source)
            set_state(into, None)
        else:
            infos = self.tensors
            for (name, info), (made, address) in zip(
                infos.items(), empty(list(infos.values()), chosen), strict=True
            ):
                state[name] = made
                outs.append((address, info.bytes))
        limits = {"memory_bytes": memory_bytes, "threads": threads}
        self._native.apply_into(source.native, outs, base_id=base_id, **limits, progress=progress)
        if into is not None:
            for tensor in state.values():
                written(tensor)
            set_state(into, self.final_id)
        return state

    def to(self, device: Any) -> Patch:
        """Authenticates the patch and brings it up to a CUDA device, ahead of :meth:`apply_`. Returns self."""
        self._on_device(ordinal(device), DEFAULT_MEMORY_BYTES, 0)
        return self

    def apply_(
        self,
        target: Any,
        *,
        base_id: str | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        threads: int = 0,
    ) -> str:
        """Turns weights into the final ones where they lie and returns the final state's id.

        ``target`` is a module or a mapping of names to contiguous torch tensors, all on the CPU or all on one CUDA
        device. The patch's bytes are authenticated before the first write. The base is what a module carries from
        the last :meth:`apply_`, or ``base_id``; where neither is known the weights are hashed. A failure after the
        first write, which a wrong ``base_id`` can cause, leaves the weights to be reloaded.
        """
        tensors = _in_place(target, self.tensors)
        known = base_id or getattr(target, _STATE, None)
        if known is None and self.kind != "standalone":
            known = state_id(tensors, memory_bytes=memory_bytes, threads=threads)
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) > 1:
            raise ValueError(f"tensors on several devices: {', '.join(sorted(map(str, devices)))}")
        set_state(target, None)
        seen: set[int] = set()
        addresses = []
        for tensor in tensors.values():
            # Tied weights are one memory under two names: patched once.
            address = tensor.data_ptr()
            addresses.append((0 if address in seen else address, tensor.nbytes))
            seen.add(address)
        if devices and next(iter(devices)).type == "cuda":
            made = self._apply_on_device(next(iter(devices)), addresses, known, memory_bytes, threads)
        else:
            limits = {"memory_bytes": memory_bytes, "threads": threads}
            made = self._native.apply_in_place(addresses, base_id=known, **limits)
        for tensor in tensors.values():
            written(tensor)
        set_state(target, made)
        return made

    def _on_device(self, number: int, memory_bytes: int, threads: int) -> _native.TpdeDevicePatch:
        if number not in self._devices:
            self._devices[number] = _native.TpdeDevicePatch(self._native, number, memory_bytes, threads)
        return self._devices[number]

    def _apply_on_device(
        self,
        device: Any,
        addresses: list[tuple[int, int]],
        known: str | None,
        memory_bytes: int,
        threads: int,
    ) -> str:
        import torch

        places = [(address, address, size) for address, size in addresses]
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            on_device = self._on_device(ordinal(device), memory_bytes, threads)
            return on_device.apply(places, stream, base_id=known)[0]

    def apply_to_file(
        self,
        output: PathType,
        base: PathType | StateDict | None = None,
        *,
        progress: Progress | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        threads: int = 0,
    ) -> str:
        """Writes the final checkpoint, whole or not at all, and returns its state id."""
        source = Source(base)
        limits = {"memory_bytes": memory_bytes, "threads": threads}
        return self._native.apply(source.native, os.fspath(output), **limits, progress=progress)


class DevicePatch:
    """A patch in a CUDA device's memory, which makes new tensors beside their base."""

    def __init__(self, patch: Patch, device: Any) -> None:
        self._patch, self._device = patch, device
        self._native = _native.TpdeDevicePatch(patch._native, ordinal(device), DEFAULT_MEMORY_BYTES, 0)

    def apply(self, base: StateDict) -> dict[str, Any]:
        """The final state. ``base`` holds contiguous tensors on the device, known to be the patch's base."""
        import torch

        made, places = {}, []
        for name, info in self._patch.tensors.items():
            dtype = getattr(torch, TORCH_NAMES[info.dtype])
            made[name] = torch.empty(info.shape, dtype=dtype, device=self._device)
            start = base[name].data_ptr() if name in base else 0
            places.append((start, made[name].data_ptr(), info.bytes))
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            self._native.apply(places, stream, base_id=self._patch.base_id)
        return made


def resident_id(target: Any) -> str:
    """The id of a module's or a mapping's state: what :meth:`Patch.apply_` left, else hashed."""
    return getattr(target, _STATE, None) or state_id(tensors_of(target))
