"""Weights as lossless deltas: pack a checkpoint against a base, rebuild it bit for bit.

A checkpoint is a path (safetensors, one file or sharded; a base may be GGUF) or a state dict of torch tensors or
numpy arrays. A patch is a path or bytes. Nothing here needs torch unless a state dict holds its tensors::

    from overspill import tpde

    tpde.pack("step-100.safetensors", "step-101.safetensors", "101.tpde")
    tpde.apply("101.tpde", "step-100.safetensors", "rebuilt.safetensors")

    packed = tpde.pack(old_state_dict, new_state_dict)
    state = tpde.apply(packed.data, old_state_dict)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import _native

__all__ = ["Packed", "Patch", "TensorInfo", "apply", "inspect", "open", "pack"]

DEFAULT_MEMORY_BYTES = 1536 << 20

PathType = str | os.PathLike[str]
"""A path."""
StateDict = Mapping[str, Any]
"""Names to torch tensors or numpy arrays."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from any thread."""
Framework = Literal["torch", "numpy"]

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


def _empty(info: TensorInfo, framework: Framework) -> tuple[Any, int]:
    """An uninitialised tensor and its address."""
    if info.dtype not in _TORCH_NAMES:
        raise TypeError(f"{info.dtype} has no counterpart in {framework}; apply to a file instead")
    name = _TORCH_NAMES[info.dtype]
    if framework == "torch":
        import torch

        made = torch.empty(info.shape, dtype=getattr(torch, name))
        return made, made.data_ptr()
    import numpy

    if not hasattr(numpy, name):
        import ml_dtypes

        array = numpy.empty(info.shape, dtype=getattr(ml_dtypes, name))
    else:
        array = numpy.empty(info.shape, dtype=name)
    return array, array.ctypes.data


class Patch:
    """An opened patch: its tables are read and checked, its payloads not yet."""

    def __init__(self, patch: PathType | bytes) -> None:
        source = patch if isinstance(patch, bytes) else os.fspath(patch)
        self._native = _native.TpdePatch(source)

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
        framework: Framework | None = None,
        progress: Progress | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        threads: int = 0,
    ) -> dict[str, Any]:
        """Rebuilds the final state dict. See :func:`apply`."""
        source = _Source(base)
        chosen = framework or source.framework or "torch"
        state, outs = {}, []
        for name, info in self.tensors.items():
            state[name], address = _empty(info, chosen)
            outs.append((address, info.bytes))
        limits = {"memory_bytes": memory_bytes, "threads": threads}
        self._native.apply_into(source.native, outs, base_id=base_id, **limits, progress=progress)
        return state

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
    framework: Framework | None = None,
    progress: Progress | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int = 0,
) -> dict[str, Any]:
    """Rebuilds the final state as a state dict, or as the checkpoint ``output`` (then the dict is empty).

    A wrong base is refused before anything is written. ``base_id``, the id of a state that the caller knows its
    base to be, saves hashing it. ``framework`` is that of the base's tensors, else torch.
    """
    opened = patch if isinstance(patch, Patch) else Patch(patch)
    if output is not None:
        opened.apply_to_file(output, base, progress=progress, memory_bytes=memory_bytes, threads=threads)
        return {}
    return opened.apply(
        base,
        base_id=base_id,
        framework=framework,
        progress=progress,
        memory_bytes=memory_bytes,
        threads=threads,
    )


def open(patch: PathType | bytes) -> Patch:
    """Opens a patch."""
    return Patch(patch)


def inspect(patch: PathType | bytes | Patch) -> dict[str, Any]:
    """What a patch holds: see :meth:`Patch.inspect`."""
    return (patch if isinstance(patch, Patch) else Patch(patch)).inspect()
