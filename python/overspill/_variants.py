"""Many fine-tunes over one resident base: a model holds one set of weights, and patches turn it into any of them.

A variant is a pair of patches, base to variant and back, both made of what changed only. Switching applies the way
back of the current one and the way out of the next, where the weights lie: no copy of the base is kept, and what
comes out are the variant's weights bit for bit. The way back is packed once, when a variant is added: on the device
where it has room for a second set of weights meanwhile, else on the host, which takes a model's size there.

Not here: the model's work must be done with the old weights, or be on the current stream, before a switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import tpde
from ._checkpoint import PathType, tensors_of
from ._patch import PatchBytes, resident_id, set_state
from .errors import FormatError


class Variants:
    """The variants of a resident model; see :func:`overspill.tpde.variants`."""

    def __init__(self, model: Any, patches: Mapping[str, PathType | PatchBytes | tpde.Patch]) -> None:
        self.model = model
        self.base_id = resident_id(model)
        self._ways: dict[str, tuple[tpde.Patch, tpde.Patch]] = {}
        self._current: str | None = None
        self._state: str | None = self.base_id
        for name, patch in patches.items():
            self.add(name, patch)

    @property
    def names(self) -> list[str]:
        """The variants, in the order they were added."""
        return list(self._ways)

    @property
    def current(self) -> str | None:
        """The variant that the weights are now; None for the base."""
        return self._current

    @property
    def packed_bytes(self) -> int:
        """Size of all patches, both ways."""
        return sum(patch.packed_bytes for ways in self._ways.values() for patch in ways)

    def add(self, name: str, patch: PathType | PatchBytes | tpde.Patch) -> None:
        """Adds a variant that ``patch`` makes of the base; the weights go back to the base for it.

        Raises FormatError for a patch of another base, ValueError for a name that is taken or a patch without a
        base; the weights are then the base's.
        """
        if name in self._ways:
            raise ValueError(f"there is a variant {name!r} already")
        there = patch if isinstance(patch, tpde.Patch) else tpde.Patch(patch)
        if there.kind == "standalone":
            raise ValueError(f"{name!r} stands alone; a variant is a patch of the base")
        self.switch(None)
        self._ways[name] = (there, self._way_back(there))

    def _way_back(self, there: tpde.Patch) -> tpde.Patch:
        """The base as a patch of what ``there`` makes of it."""
        held = tensors_of(self.model)
        copy = _copied(held)
        if copy is None:
            base = {key: tensor.detach().cpu() for key, tensor in held.items()}
            return _opened(tpde.pack(there.apply(base, base_id=self.base_id), base))
        try:
            state = there.apply_(self.model, base_id=self.base_id)
            return _opened(tpde.encode(held, copy, base_id=state, final_id=self.base_id))
        finally:
            for key, tensor in held.items():
                tensor.detach().copy_(copy[key])
            set_state(self.model, self.base_id)

    def remove(self, name: str) -> None:
        """Forgets a variant; weights that are this one go back to the base."""
        if name == self._current:
            self.switch(None)
        del self._ways[name]

    def switch(self, name: str | None) -> str:
        """Turns the weights into a variant, or with None into the base, and returns their state's id.

        A failure half way leaves weights that are neither; every later switch then says so.
        """
        if self._state is None:
            raise FormatError("a switch failed half way: the weights are no variant's, load the model anew")
        out = self._ways[name][0] if name is not None else None
        if name == self._current:
            return self._state
        state, self._state = self._state, None
        if self._current is not None:
            state = self._ways[self._current][1].apply_(self.model, base_id=state)
        if out is not None:
            state = out.apply_(self.model, base_id=state)
        self._current, self._state = name, state
        return state


def _copied(held: Mapping[str, Any]) -> dict[str, Any] | None:
    """A second set of weights beside those on a CUDA device; None where there is no room for it, or no such device."""
    if not held or any(tensor.device.type != "cuda" for tensor in held.values()):
        return None
    import torch

    try:
        return {key: tensor.detach().clone() for key, tensor in held.items()}
    except torch.OutOfMemoryError:
        return None


def _opened(packed: tpde.Packed) -> tpde.Patch:
    assert packed.data is not None
    return tpde.Patch(packed.data)
