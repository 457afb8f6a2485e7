"""Checkpoints as the native side sees them: names, types, shapes and addresses, in either direction.

A checkpoint is a path, or a mapping of names to torch tensors, numpy arrays or quantized blocks. What is given to the
native side is kept alive here as long as it may be read; what the native side is to write lies in memory made here.

Not here: what a patch does with them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from . import _native

DEFAULT_MEMORY_BYTES = 1536 << 20

PathType = str | os.PathLike[str]
"""A path."""
StateDict = Mapping[str, Any]
"""Names to torch tensors or numpy arrays."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from any thread."""
Framework = Literal["torch", "numpy"]
_RawTensor = tuple[str, str, list[int], int, int]

TORCH_NAMES = {
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
_NAMES = {name: code for code, name in TORCH_NAMES.items()}


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


class Source:
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


def empty(infos: list[TensorInfo], framework: Framework) -> list[tuple[Any, int]]:
    """Uninitialised tensors and their addresses."""
    unknown = next((info.dtype for info in infos if info.dtype not in TORCH_NAMES), None)
    if unknown is not None:
        raise TypeError(f"{unknown} has no counterpart in {framework}; apply to a file instead")
    made: list[tuple[Any, int]] = []
    for info, (buffer, offset) in zip(infos, _pieces([info.bytes for info in infos]), strict=True):
        name = TORCH_NAMES[info.dtype]
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


def cuda_device(*states: Any) -> Any:
    """The one CUDA device that all tensors of these mappings are on; None where that is not so."""
    found = {
        getattr(tensor, "device", None)
        for state in states
        if isinstance(state, Mapping)
        for tensor in state.values()
    }
    device = found.pop() if len(found) == 1 else None
    is_cuda = getattr(device, "type", None) == "cuda" and all(isinstance(state, Mapping) for state in states)
    return device if is_cuda else None


class DeviceState:
    """A state on a CUDA device for the native side, and the tensors that keep its addresses valid."""

    def __init__(self, state: StateDict) -> None:
        self.keep: list[Any] = []
        self.native: list[_RawTensor] = []
        for name, tensor in state.items():
            kept = tensor.detach().resolve_conj().resolve_neg().contiguous()
            dtype = str(kept.dtype).removeprefix("torch.")
            if dtype not in _NAMES:
                raise TypeError(f"{name!r}: {dtype} has no safetensors dtype")
            self.keep.append(kept)
            self.native.append((name, _NAMES[dtype], list(kept.shape), kept.data_ptr(), kept.nbytes))


def state_id(
    checkpoint: PathType | StateDict, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, threads: int = 0
) -> str:
    """The id of a state: of its tensors' names, types, shapes and bytes, wherever they lie.

    Tensors that are all on one CUDA device are hashed there.
    """
    if (device := cuda_device(checkpoint)) is not None:
        import torch

        with torch.cuda.device(device):
            state, stream = DeviceState(checkpoint), torch.cuda.current_stream().cuda_stream  # type: ignore[arg-type]
            return _native.tpde_device_state_id(state.native, device.index, stream)
    source = Source(checkpoint)
    if source.native is None:
        raise ValueError("nothing to hash")
    return _native.tpde_state_id(source.native, memory_bytes=memory_bytes, threads=threads)


def tensors_of(target: Any) -> StateDict:
    """The tensors of a module or a mapping, by name."""
    return target if isinstance(target, Mapping) else target.state_dict(keep_vars=True)
