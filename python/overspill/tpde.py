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

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import _native
from ._checkpoint import (
    DEFAULT_MEMORY_BYTES,
    DeviceState,
    Framework,
    PathType,
    Progress,
    Quantized,
    Source,
    StateDict,
    TensorInfo,
    cuda_device,
    quantize,
    state_id,
)
from ._patch import Patch, PatchBytes, ordinal, resident_id, view

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
    "encode",
    "host_buffer",
    "inspect",
    "open",
    "pack",
    "quantize",
    "resident_id",
    "state_id",
    "stream",
    "variants",
]


@dataclass(frozen=True)
class Packed:
    """What was packed. ``data`` is the patch where no output was named."""

    kind: str
    base_id: str | None
    final_id: str
    raw_bytes: int
    packed_bytes: int
    data: bytes | memoryview | None = None

    @property
    def ratio(self) -> float:
        """Raw bytes over packed bytes, everything counted."""
        return self.raw_bytes / max(self.packed_bytes, 1)


def pack(
    base: PathType | StateDict | None,
    final: PathType | StateDict,
    output: PathType | None = None,
    *,
    absolute: bool = False,
    codec: Literal["auto", "elias-zstd", "gpu"] = "auto",
    progress: Progress | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int = 0,
) -> Packed:
    """Packs ``final`` against ``base`` (None: alone) into the file ``output``, or into ``Packed.data``.

    ``absolute`` stores positions and final words, which may be applied twice; the default stores steps, smaller.
    """
    old, new = Source(base), Source(final)
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


def encode(
    base: Mapping[str, Any] | None,
    final: Mapping[str, Any],
    *,
    base_id: str | None = None,
    final_id: str | None = None,
) -> Packed:
    """Packs ``final`` against ``base`` where they lie, for weight sync: what takes longer is left out, not what is exact.

    Tensors on one CUDA device are hashed and packed there, and only the patch comes down: ``Packed.data`` is then a
    view of page-locked memory, which is used again once nobody holds the view. Tensors on the CPU are packed there, in
    the same modes. ``base_id`` and ``final_id``, where the caller knows them (a step's base is the last step's final),
    save hashing; a wrong one makes a patch that no right receiver takes.
    """
    device = cuda_device(final) if base is None else cuda_device(base, final)
    if device is None:
        return pack(base, final, codec="gpu")
    import torch

    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        old, new = None if base is None else DeviceState(base), DeviceState(final)
        (start, end, raw_bytes, packed_bytes), memory = _native.tpde_encode(
            None if old is None else old.native,
            new.native,
            device.index,
            stream,
            base_id=base_id,
            final_id=final_id,
        )
    kind = "standalone" if start is None else "relative"
    return Packed(kind, start, end, raw_bytes, packed_bytes, view(memory)[:packed_bytes])


def host_buffer(nbytes: int, device: Any = "cuda") -> memoryview:
    """Memory to receive a patch in: page-locked for a CUDA device, kept for the next patch when this one is dropped.

    A patch that is opened from it is not copied, and crosses to the device at the link's speed.
    """
    if not str(device).startswith("cuda"):
        return memoryview(bytearray(nbytes))
    return view(_native.HostMemory.of_patches(ordinal(device), nbytes))


def apply(
    patch: PathType | PatchBytes | Patch,
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


def open(patch: PathType | PatchBytes) -> Patch:
    """Opens a patch: a path or bytes; memory that can be written is not copied and must stay as it is meanwhile."""
    return Patch(patch)


def variants(model: Any, patches: Mapping[str, PathType | PatchBytes | Patch]) -> Variants:
    """Many fine-tunes over one resident base: ``patches`` are of the weights that ``model`` holds now.

    ``switch(name)`` turns the weights into a variant where they lie, bit for bit, ``switch(None)`` back into the
    base. ``model`` is a module or a mapping, as for :meth:`Patch.apply_`.
    """
    from ._variants import Variants

    return Variants(model, patches)


def stream(
    model: Any,
    vram_budget: int | str,
    *,
    patch: PathType | PatchBytes | Patch | None = None,
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


def inspect(patch: PathType | PatchBytes | Patch) -> dict[str, Any]:
    """What a patch holds: see :meth:`Patch.inspect`."""
    return (patch if isinstance(patch, Patch) else Patch(patch)).inspect()


def __getattr__(name: str) -> Any:
    if name == "Chain":  # it builds on this module
        from ._chain import Chain

        return Chain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
