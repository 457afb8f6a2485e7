"""What stands in the graph in place of a saved tensor, and the storage behind it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from ._link import Code
    from ._native import Mark, Onboarding, Slot
    from ._recipes import Recipe
    from .storm import Storm

# A unit starts on this, so that a tensor restored from it is as well aligned as it was: cuBLAS
# chooses kernels by alignment. torch's CUDA allocator gives out multiples of 512 bytes.
ALIGN_BYTES = 512


class Unit:
    """A run of one storage at one version, saved by autograd once or several times.

    "One version" is one number of one counter: tensors that share a storage may count apart (the
    gates of an LSTM cell are ``unsafe_chunk``s, each written in place after its sibling was saved).

    Its bytes are on the device (``source``: not gone yet; ``buffer``: brought back or rebuilt), in
    ``slot``, both, or nowhere, and then ``recipe`` makes them. If it has a ``code``, that is what the slot
    holds. It dies with the last :class:`Saved` that refers to it.
    """

    __slots__ = (
        "__weakref__", "_counter", "_probe", "buffer", "buffer_ref", "code", "id", "is_kept", "is_leaving",
        "mark", "nbytes", "onboarding", "pending", "recipe", "round", "saves", "slot", "source", "start", "storage_ref", "storm", "stream", "version",
    )  # fmt: skip

    def __init__(
        self,
        storm: Storm,
        unit_id: int,
        storage: torch.UntypedStorage,
        start: int,
        nbytes: int,
        tensor: torch.Tensor,
    ) -> None:
        self.storm = storm
        self.id = unit_id
        # While this weak reference lives, no other storage gets the same address.
        self.storage_ref = StorageWeakRef(storage)
        self.start = start
        self.nbytes = nbytes
        self.version = tensor._version
        self._counter: torch.Tensor | None = tensor.detach()
        self._probe: torch.Tensor | None = None
        self.is_kept = False
        # Whether memory that it came with, or its code's, has yet to be given up.
        self.is_leaving = False
        self.recipe: Recipe | None = None
        self.code: Code | None = None
        self.slot: Slot | None = None
        # Where compute was when the source was written, while it waits behind a code for its turn to leave.
        self.mark: Mark | None = None
        self.source: torch.UntypedStorage | None = None
        self.buffer: torch.UntypedStorage | None = None
        self.buffer_ref: StorageWeakRef | None = None
        self.onboarding: Onboarding | None = None
        self.stream = 0
        self.saves = 0
        self.pending = 0
        self.round = 0

    @property
    def probe(self) -> torch.Tensor:
        """Shares the version counter of the tensor without its storage. A unit that is sent away or
        rebuilt has to be asked for it while it is packed: until then the storage is held.
        """
        if self._counter is not None:
            self._probe, self._counter = self._counter, None
            self._probe = self._probe.detach()
            self._probe.data = _empty(self._probe.dtype, self._probe.device)
        assert self._probe is not None
        return self._probe

    def covers(self, start: int, end: int, tensor: torch.Tensor) -> bool:
        """Whether bytes ``start..end`` of the storage are part of this unit, as ``tensor`` has them now."""
        within = self.start <= start and end <= self.start + self.nbytes
        return within and self.version == tensor._version and self._shares_version_counter(tensor)

    def _shares_version_counter(self, tensor: torch.Tensor) -> bool:
        # Nothing tells two counters apart but counting: the probe has no bytes to be written.
        before = tensor._version
        probe = self.probe
        with torch.autograd._unsafe_preserve_version_counter(probe):  # type: ignore[attr-defined]
            probe.zero_()
            return tensor._version != before

    def __del__(self) -> None:
        self.storm._freed(self)


@functools.cache
def _empty(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)


class Saved:
    """One saved tensor: how to see it again, and whether it was written to meanwhile."""

    __slots__ = (
        "dtype",
        "offset",
        "output",
        "probe",
        "round",
        "shape",
        "stride",
        "tensor",
        "unit",
        "version",
    )

    tensor: torch.Tensor | None

    def __init__(self, tensor: torch.Tensor, unit: Unit | None, keep: bool) -> None:
        self.version = tensor._version
        self.unit = unit
        node = tensor.grad_fn
        self.output = None if node is None else (tensor.output_nr, node.name())
        self.round = -1
        if keep:
            # A leaf is held as it is (autograd holds it anyhow, and `leaf.data = x` must be seen);
            # anything else without its history, which would be a cycle through its own node.
            self.tensor = tensor if tensor.is_leaf and tensor.requires_grad else tensor.detach()
            self.probe = self.tensor
            return
        assert unit is not None
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.tensor = None
        self.probe = unit.probe

    def check_version(self) -> None:
        """Raises what autograd raises for a saved tensor that was modified in place."""
        if self.probe._version != self.version:
            shape = self.shape if self.tensor is None else self.tensor.shape
            which = "" if self.output is None else ", which is output {} of {},".format(*self.output)
            kind = f"{self.probe.type()} {list(shape)}"
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: [{kind}]{which} is at version {self.probe._version}; expected version "
                f"{self.version} instead. Hint: enable anomaly detection to find the operation that failed to "
                "compute its gradient, with torch.autograd.set_detect_anomaly(True, check_nan=False)."
            )

    def view(self, storage: torch.UntypedStorage, start: int) -> torch.Tensor:
        """The tensor over ``storage``, which holds the bytes of its storage from ``start`` on.

        It counts versions with the tensor that was saved: a backward that writes to it in place is
        seen by the next one that asks for it, as it is without overspill.
        """
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        offset = self.offset - start // empty.element_size()
        tensor = self.probe.detach()
        tensor.data = empty.set_(storage, offset, self.shape, self.stride)
        return tensor


def span(tensor: torch.Tensor, storage_bytes: int) -> tuple[int, int]:
    """The bytes ``start, end`` of its storage that have to move for ``tensor``.

    The whole storage when the tensor spans at least half of it (its siblings are likely saved too),
    else its own range, on aligned bounds.
    """
    if tensor.is_contiguous() and 2 * tensor.nbytes >= storage_bytes:
        return 0, storage_bytes
    itemsize = tensor.element_size()
    start = tensor.storage_offset() * itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + (last + 1) * itemsize
    if 2 * (end - start) >= storage_bytes:
        return 0, storage_bytes
    return start // ALIGN_BYTES * ALIGN_BYTES, min(-(-end // ALIGN_BYTES) * ALIGN_BYTES, storage_bytes)
