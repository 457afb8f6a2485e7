"""Weights as lossless deltas: pack a checkpoint against a base, rebuild it bit for bit.

A checkpoint is a path (safetensors, one file or sharded; a base may be GGUF) or a state dict of torch tensors or
numpy arrays. A patch is a path or bytes. Nothing here needs torch unless a state dict holds its tensors::

    from overspill import tpde

    tpde.pack("step-100.safetensors", "step-101.safetensors", "101.tpde")
    tpde.apply("101.tpde", "step-100.safetensors", "rebuilt.safetensors")

    packed = tpde.pack(old_state_dict, new_state_dict)
    state = tpde.apply(packed.data, old_state_dict)

A model that is resident is patched where it lies, on CUDA by kernels::

    tpde.open("101.tpde").apply_(model)

Many fine-tunes live over one resident base, each a patch::

    tunes = tpde.variants(model, {"law": "law.tpde", "code": "code.tpde"})
    tunes.switch("law")

A model larger than the device runs with its weights packed in host memory::

    tpde.stream(model, vram_budget="8GiB")
    model.generate(ids)
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from . import _native

if TYPE_CHECKING:
    from ._chain import Chain
    from ._stream import Streamed
    from ._variants import Variants

__all__ = [
    "Chain",
    "Packed",
    "Patch",
    "Quantized",
    "TensorInfo",
    "apply",
    "inspect",
    "open",
    "pack",
    "quantize",
    "state_id",
    "stream",
    "variants",
]

DEFAULT_MEMORY_BYTES = 1536 << 20

PathType = str | os.PathLike[str]
"""A path."""
StateDict = Mapping[str, Any]
"""Names to torch tensors or numpy arrays."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from any thread."""
Framework = Literal["torch", "numpy"]
Changes = tuple[str, Any, Any]
"""A tensor's name, positions in it, and the words there."""

_RawTensor = tuple[str, str, list[int], int, int]

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
}
# ml_dtypes spells its numpy extension types as torch does, so one table serves both.
_NAMES = {name: code for code, name in _TORCH_NAMES.items()}


@dataclass(frozen=True)
class Packed:
    """What was packed. ``data`` is the patch where no output was named."""

    kind: str
    base_id: str | None
    final_id: str
    raw_bytes: int
    packed_bytes: int
    data: bytes | None = None

    @property
    def ratio(self) -> float:
        """Raw bytes over packed bytes, everything counted."""
        return self.raw_bytes / max(self.packed_bytes, 1)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a patch makes; ``dtype`` is spelled as safetensors does."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Quantized:
    """Weights as GGUF's 4- or 8-bit blocks (32 weights each), a base that is smaller than what it stands for.

    ``blocks`` is a flat uint8 tensor; ``layout`` is "Q4_0", "Q4_1" or "Q8_0"; ``dtype`` and ``shape`` are those of the
    weights.
    """

    layout: str
    dtype: Any
    shape: tuple[int, ...]
    blocks: Any

    def to(self, device: Any) -> Quantized:
        """The same blocks on another device."""
        return replace(self, blocks=self.blocks.to(device))

    def dequantize(self) -> Any:
        """The weights that the blocks stand for, on the CPU."""
        import torch

        made = _quantize(self.layout, self.dtype, self.blocks, back=True)
        return made.view(self.dtype).view(torch.Size(self.shape))


class _Source:
    """A checkpoint for the native side, and the objects that keep its addresses valid."""

    def __init__(self, checkpoint: PathType | StateDict | None) -> None:
        self.keep: list[Any] = []
        self.framework: Framework | None = None
        self.native: str | list[_RawTensor] | None = None
        if isinstance(checkpoint, Mapping):
            self.native = [self._describe(name, value) for name, value in checkpoint.items()]
        elif checkpoint is not None:
            self.native = os.fspath(checkpoint)

    def _describe(self, name: str, value: Any) -> _RawTensor:
        if isinstance(value, Quantized):
            blocks = value.blocks.cpu().contiguous()
            self.keep.append(blocks)
            return (name, value.layout, list(value.shape), blocks.data_ptr(), blocks.nbytes)
        if hasattr(value, "data_ptr"):
            self.framework = self.framework or "torch"
            kept = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
            dtype, address, size = str(kept.dtype).removeprefix("torch."), kept.data_ptr(), kept.nbytes
        else:
            import numpy

            self.framework = self.framework or "numpy"
            kept = numpy.ascontiguousarray(value)
            dtype, address, size = kept.dtype.name, kept.ctypes.data, kept.nbytes
            if kept.dtype.byteorder == ">":
                raise TypeError(f"{name!r}: big-endian arrays have no safetensors dtype")
        if dtype not in _NAMES:
            raise TypeError(f"{name!r}: {dtype} has no safetensors dtype")
        self.keep.append(kept)
        return (name, _NAMES[dtype], list(value.shape), address, size)


# Tensors made together share one piece of memory of about this size, so that huge pages can back it: a first touch of
# 4 KiB pages is slower than decoding. A piece is freed with the last tensor in it.
_PIECE_BYTES = 32 << 20
_ALIGN_BYTES = 64


def _pieces(sizes: list[int]) -> list[tuple[Any, int]]:
    """For each size a writable buffer and an offset into it."""
    places: list[tuple[int, int]] = []
    lengths: list[int] = []
    for size in sizes:
        if not lengths or lengths[-1] + size > max(_PIECE_BYTES, size):
            lengths.append(0)
        places.append((len(lengths) - 1, lengths[-1]))
        lengths[-1] += -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
    buffers = [_memory(length) for length in lengths]
    return [(buffers[piece], offset) for piece, offset in places]


def _memory(size: int) -> Any:
    """A buffer of zeros, in huge pages where the system gives them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(max(size, 1))
    made = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without huge pages refuses: then it has plain ones.
    with contextlib.suppress(OSError):
        made.madvise(mmap.MADV_HUGEPAGE)
    return made


def _empty(infos: list[TensorInfo], framework: Framework) -> list[tuple[Any, int]]:
    """Uninitialised tensors and their addresses."""
    unknown = next((info.dtype for info in infos if info.dtype not in _TORCH_NAMES), None)
    if unknown is not None:
        raise TypeError(f"{unknown} has no counterpart in {framework}; apply to a file instead")
    made: list[tuple[Any, int]] = []
    for info, (buffer, offset) in zip(infos, _pieces([info.bytes for info in infos]), strict=True):
        name = _TORCH_NAMES[info.dtype]
        if framework == "torch":
            import torch

            if info.bytes:
                flat = torch.frombuffer(buffer, dtype=torch.uint8, count=info.bytes, offset=offset)
                tensor = flat.view(getattr(torch, name)).view(info.shape)
            else:
                tensor = torch.empty(info.shape, dtype=getattr(torch, name))
            made.append((tensor, tensor.data_ptr()))
            continue
        import numpy

        if not hasattr(numpy, name):
            import ml_dtypes

            dtype = getattr(ml_dtypes, name)
        else:
            dtype = getattr(numpy, name)
        count = info.bytes // numpy.dtype(dtype).itemsize
        array = numpy.frombuffer(buffer, dtype, count, offset if count else 0).reshape(info.shape)
        made.append((array, array.ctypes.data))
    return made


_STATE = "_overspill_state_id"
"""Attribute of a module: the state that :meth:`Patch.apply_` left it in."""


def _in_place(target: Any, needed: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The tensors that a patch is applied to, in its order, each checked to be what the patch says."""
    found = tensors_of(target)
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"no tensor {missing[0]!r} to apply to, and {len(missing) - 1} more are missing")
    tensors = {}
    for name, info in needed.items():
        tensor = found[name].detach()
        dtype = _TORCH_NAMES.get(info.dtype)
        if str(tensor.dtype) != f"torch.{dtype}" or tuple(tensor.shape) != info.shape:
            raise ValueError(
                f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {info.dtype} {info.shape}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name!r} is not contiguous")
        tensors[name] = tensor
    return tensors


def _apart(outs: list[tuple[int, int]], base: _Source) -> None:
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


def _ordinal(device: Any) -> int:
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"{device} is not a CUDA device")
    return torch.cuda.current_device() if device.index is None else device.index


class Patch:
    """An opened patch: its tables are read and checked, its payloads not yet."""

    def __init__(self, patch: PathType | bytes) -> None:
        source = patch if isinstance(patch, bytes) else os.fspath(patch)
        self._native = _native.TpdePatch(source)
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
        made, _ = _empty([info], "torch")[0]
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
            width = getattr(torch, _TORCH_NAMES[info.dtype]).itemsize
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
            on_device = self._on_device(_ordinal(device), DEFAULT_MEMORY_BYTES, 0)
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
        source = _Source(base)
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
        source = _Source(base)
        chosen = framework or source.framework or "torch"
        state, outs = {}, []
        if into is not None:
            state = _in_place(into, self.tensors)
            outs = [(tensor.data_ptr(), tensor.nbytes) for tensor in state.values()]
            if any(tensor.device.type != "cpu" for tensor in state.values()):
                raise ValueError("tensors to write that are not on the CPU; see apply_")
            _apart(outs, source)
            if not isinstance(into, Mapping):
                setattr(into, _STATE, None)
        else:
            infos = self.tensors
            for (name, info), (made, address) in zip(
                infos.items(), _empty(list(infos.values()), chosen), strict=True
            ):
                state[name] = made
                outs.append((address, info.bytes))
        limits = {"memory_bytes": memory_bytes, "threads": threads}
        self._native.apply_into(source.native, outs, base_id=base_id, **limits, progress=progress)
        if into is not None:
            for tensor in state.values():
                written(tensor)
            if not isinstance(into, Mapping):
                setattr(into, _STATE, self.final_id)
        return state

    def to(self, device: Any) -> Patch:
        """Authenticates the patch and brings it up to a CUDA device, ahead of :meth:`apply_`. Returns self."""
        self._on_device(_ordinal(device), DEFAULT_MEMORY_BYTES, 0)
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
        if not isinstance(target, Mapping):
            setattr(target, _STATE, None)
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
        if not isinstance(target, Mapping):
            setattr(target, _STATE, made)
        return made

    def _on_device(self, ordinal: int, memory_bytes: int, threads: int) -> _native.TpdeDevicePatch:
        if ordinal not in self._devices:
            self._devices[ordinal] = _native.TpdeDevicePatch(self._native, ordinal, memory_bytes, threads)
        return self._devices[ordinal]

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
            on_device = self._on_device(_ordinal(device), memory_bytes, threads)
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
        source = _Source(base)
        limits = {"memory_bytes": memory_bytes, "threads": threads}
        return self._native.apply(source.native, os.fspath(output), **limits, progress=progress)


class DevicePatch:
    """A patch in a CUDA device's memory, which makes new tensors beside their base."""

    def __init__(self, patch: Patch, device: Any) -> None:
        self._patch, self._device = patch, device
        self._native = _native.TpdeDevicePatch(patch._native, _ordinal(device), DEFAULT_MEMORY_BYTES, 0)

    def apply(self, base: StateDict) -> dict[str, Any]:
        """The final state. ``base`` holds contiguous tensors on the device, known to be the patch's base."""
        import torch

        made, places = {}, []
        for name, info in self._patch.tensors.items():
            dtype = getattr(torch, _TORCH_NAMES[info.dtype])
            made[name] = torch.empty(info.shape, dtype=dtype, device=self._device)
            start = base[name].data_ptr() if name in base else 0
            places.append((start, made[name].data_ptr(), info.bytes))
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            self._native.apply(places, stream, base_id=self._patch.base_id)
        return made


def pack(
    base: PathType | StateDict | None,
    final: PathType | StateDict,
    output: PathType | None = None,
    *,
    absolute: bool = False,
    codec: Literal["auto", "elias-zstd"] = "auto",
    progress: Progress | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int = 0,
) -> Packed:
    """Packs ``final`` against ``base`` (None: alone) into the file ``output``, or into ``Packed.data``.

    ``absolute`` stores positions and final words, which may be applied twice; the default stores steps, smaller.
    """
    old, new = _Source(base), _Source(final)
    if new.native is None:
        raise ValueError("nothing to pack")
    fields = _native.tpde_pack(
        old.native,
        new.native,
        None if output is None else os.fspath(output),
        absolute=absolute,
        codec=codec,
        memory_bytes=memory_bytes,
        threads=threads,
        progress=progress,
    )
    return Packed(*fields)


def apply(
    patch: PathType | bytes | Patch,
    base: PathType | StateDict | None = None,
    output: PathType | None = None,
    *,
    base_id: str | None = None,
    into: Any = None,
    framework: Framework | None = None,
    progress: Progress | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int = 0,
) -> dict[str, Any]:
    """Rebuilds the final state as a state dict, or as the checkpoint ``output`` (then the dict is empty).

    A wrong base is refused before anything is written. ``base_id``, the id of a state that the caller knows its
    base to be, saves hashing it. ``into``, a module or torch tensors by name, is written instead of new memory, whose
    first touch can take as long as the decoding; a failure after the first write leaves it to be reloaded.
    ``framework`` is that of the base's tensors, else torch.
    """
    opened = patch if isinstance(patch, Patch) else Patch(patch)
    if output is not None and into is not None:
        raise ValueError("one of output and into")
    if output is not None:
        opened.apply_to_file(output, base, progress=progress, memory_bytes=memory_bytes, threads=threads)
        return {}
    return opened.apply(
        base,
        base_id=base_id,
        into=into,
        framework=framework,
        progress=progress,
        memory_bytes=memory_bytes,
        threads=threads,
    )


def open(patch: PathType | bytes) -> Patch:
    """Opens a patch."""
    return Patch(patch)


def state_id(
    checkpoint: PathType | StateDict, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, threads: int = 0
) -> str:
    """The id of a state: of its tensors' names, types, shapes and bytes, wherever they lie."""
    source = _Source(checkpoint)
    if source.native is None:
        raise ValueError("nothing to hash")
    return _native.tpde_state_id(source.native, memory_bytes=memory_bytes, threads=threads)


def tensors_of(target: Any) -> StateDict:
    """The tensors of a module or a mapping, by name."""
    return target if isinstance(target, Mapping) else target.state_dict(keep_vars=True)


def resident_id(target: Any) -> str:
    """The id of a module's or a mapping's state: what :meth:`Patch.apply_` left, else hashed."""
    return getattr(target, _STATE, None) or state_id(tensors_of(target))


def variants(model: Any, patches: Mapping[str, PathType | bytes | Patch]) -> Variants:
    """Many fine-tunes over one resident base: ``patches`` are of the weights that ``model`` holds now.

    ``switch(name)`` turns the weights into a variant where they lie, bit for bit, ``switch(None)`` back into the
    base. ``model`` is a module or a mapping, as for :meth:`Patch.apply_`.
    """
    from ._variants import Variants

    return Variants(model, patches)


def quantize(tensor: Any, layout: Literal["Q4_0", "Q4_1", "Q8_0"] = "Q4_0") -> Quantized:
    """Blocks of a bf16, fp16 or fp32 tensor whose last dimension is a multiple of 32, on its device."""
    blocks = _quantize(layout, tensor.dtype, tensor.detach(), back=False)
    return Quantized(layout, tensor.dtype, tuple(tensor.shape), blocks.to(tensor.device))


def _quantize(layout: str, dtype: Any, source: Any, *, back: bool) -> Any:
    import torch

    held = source.cpu().contiguous()
    name = _NAMES[str(dtype).removeprefix("torch.")]
    place, limits = (held.data_ptr(), held.nbytes), {"memory_bytes": DEFAULT_MEMORY_BYTES, "threads": 0}
    made = _native.tpde_quantize(layout, name, place, back=back, **limits)
    return torch.frombuffer(bytearray(made), dtype=torch.uint8)


def stream(
    model: Any,
    vram_budget: int | str,
    *,
    patch: PathType | bytes | Patch | None = None,
    base: Mapping[str, Any] | None = None,
    device: Any = None,
    packed: bool = True,
    reserve: int | str | None = None,
    on_disk: bool = False,
) -> Streamed:
    """Runs a frozen model whose weights live packed in host memory and are rebuilt around their use, bit for bit.

    ``model`` is on the CPU, or on the meta device where ``patch`` makes its weights; without a patch its large weights
    are packed here, against ``base`` (tensors or :class:`Quantized` by name, which then lie on the device) or alone.
    What is on ``device`` (CUDA if there is any) stays below ``vram_budget``, of which ``reserve`` (a sixteenth) is left
    for activations and caches. With ``on_disk`` the packed weights stay in the file ``patch`` and are read as they are
    needed. ``packed=False`` sends raw weights the same way, to compare with. Afterwards
    ``model(...)`` and ``model.generate(...)`` work as before; :meth:`Streamed.close` gives the weights back.
    """
    from ._stream import Streamed

    return Streamed(
        model,
        vram_budget,
        patch=patch,
        base=base,
        device=device,
        packed=packed,
        reserve=reserve,
        on_disk=on_disk,
    )


def inspect(patch: PathType | bytes | Patch) -> dict[str, Any]:
    """What a patch holds: see :meth:`Patch.inspect`."""
    return (patch if isinstance(patch, Patch) else Patch(patch)).inspect()


def __getattr__(name: str) -> Any:
    if name == "Chain":  # it builds on this module
        from ._chain import Chain

        return Chain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
