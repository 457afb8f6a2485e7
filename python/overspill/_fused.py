"""Saved tensors that one kernel makes together instead of one operation each.

Two shapes, both as transformers' bf16 models write them. A *norm* leaves its input in 32 bit, that times the
reciprocal of its root mean square in bf16, and that times the weight: made of the narrow input in one pass, which
moves a quarter of the bytes. A *gate* leaves its silu and that times what is gated. Each of these tensors has a recipe
of its own, read off the graph and proved; that the kernel gives the same bits is proved beside it.
Recognises, and runs; decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ._native import Again
from ._recipes import Recipe
from ._saved import Saved, Unit

_BF16 = torch.bfloat16
# Values that a thread of the kernels takes at once.
_MULTIPLE = 8


@dataclass(slots=True)
class Fused:
    """What a kernel reads, and the units that it makes on the way to the one whose recipe this belongs to."""

    kernel: str
    parts: tuple[Saved, ...]
    others: tuple[Unit, ...]


def fused_of(recipe: Recipe) -> Fused | None:
    """The kernel that makes what ``recipe`` makes, and what that is made of; None where there is none."""
    name, _, after, dtype, *layout, _ = recipe.signature
    if name != "MulBackward0" or after is not None or dtype is not _BF16:
        return None
    form = (_BF16, *layout)
    for other, own in (recipe.inputs, recipe.inputs[::-1]):
        found = _norm(other, own, form) or _gate(other, own, form)
        if found is not None:
            return found
    return None


def _norm(weight: Saved, normal: Saved, form: tuple[Any, ...]) -> Fused | None:
    normal_recipe = _recipe(normal, ("MulBackward0", (), _BF16))
    if weight.tensor is None or normal_recipe is None:
        return None
    shape = form[1]
    rows = (*shape[:-1], 1)
    for wide, scale in (normal_recipe.inputs, normal_recipe.inputs[::-1]):
        forms = {normal: form, wide: (torch.float32, *form[1:]), weight: _plain(_BF16, shape[-1:])}
        forms[scale] = _plain(torch.float32, rows)
        if shape[-1] % _MULTIPLE or wide.unit is None or not _have(forms, form):
            continue
        assert normal.unit is not None
        first = wide.unit.recipe
        if first is None:
            return Fused("norm_of_wide", (wide, scale, weight), (normal.unit,))
        if first.narrow is _BF16 and first.inputs and _have({first.inputs[0]: form}, form):
            return Fused("norm", (first.inputs[0], scale, weight), (wide.unit, normal.unit))
    return None


def _gate(up: Saved, silu: Saved, form: tuple[Any, ...]) -> Fused | None:
    silu_recipe = _recipe(silu, ("SiluBackward0", (), None))
    if silu_recipe is None:
        return None
    (gate,) = silu_recipe.inputs
    if math.prod(form[1]) % _MULTIPLE or not _have({gate: form, up: form, silu: form}, form):
        return None
    assert silu.unit is not None
    return Fused("gate", (gate, up), (silu.unit,))


def _recipe(saved: Saved, begins: tuple[Any, ...]) -> Recipe | None:
    """The recipe of ``saved``'s unit, if its signature begins so."""
    recipe = None if saved.unit is None else saved.unit.recipe
    return recipe if recipe is not None and recipe.signature[: len(begins)] == begins else None


def _plain(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """How a tensor lies in memory, one row after the other from the start of its storage."""
    return dtype, shape, torch.empty(shape, device="meta").stride(), 0


def _have(forms: dict[Saved, tuple[Any, ...]], own: tuple[Any, ...]) -> bool:
    """Whether all lie in memory as the kernels read and write them."""
    if own != _plain(_BF16, own[1]):
        return False
    return all(_form(saved) == form for saved, form in forms.items())


def _form(saved: Saved) -> tuple[Any, ...]:
    tensor = saved.tensor
    if tensor is None:
        return saved.dtype, tuple(saved.shape), tuple(saved.stride), saved.offset
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


class Kernels:
    """The kernels, on one device."""

    def __init__(self, ordinal: int) -> None:
        self._again = Again(ordinal)

    def run(self, fused: Fused, parts: list[torch.Tensor], stream: int) -> list[torch.Tensor]:
        """The others of ``fused`` in their order, and the tensor itself."""
        if fused.kernel == "gate":
            return self._gate(parts, stream)
        made = self._norm(parts, stream, fused.kernel == "norm_of_wide")
        return made[3 - len(fused.others) - 1 :]

    def _norm(self, parts: list[torch.Tensor], stream: int, is_wide: bool) -> list[torch.Tensor]:
        given, scale, weight = parts
        columns = given.shape[-1]
        wide = given if is_wide else torch.empty(given.shape, dtype=torch.float32, device=given.device)
        normal, weighted = (torch.empty(given.shape, dtype=_BF16, device=given.device) for _ in range(2))
        self._again.norm(
            given.numel() // columns, columns, 0 if is_wide else given.data_ptr(), scale.data_ptr(),
            weight.data_ptr(), wide.data_ptr(), normal.data_ptr(), weighted.data_ptr(), stream,
        )  # fmt: skip
        return [wide, normal, weighted]

    def _gate(self, parts: list[torch.Tensor], stream: int) -> list[torch.Tensor]:
        gate, up = parts
        silu, product = torch.empty_like(gate), torch.empty_like(gate)
        self._again.gate(
            gate.numel(), gate.data_ptr(), up.data_ptr(), silu.data_ptr(), product.data_ptr(), stream
        )
        return [silu, product]
