"""Which recipe makes a unit again, and the proof of it.

In a step that explores, every candidate is run once while the tensor is there to be compared with, byte for byte. In
later steps what stands at the same place of the step has to read the graph the same way, or it is not rebuilt.
"""

from __future__ import annotations

from typing import Any

import torch

from ._fused import Fused, fused_of
from ._recipes import MAX_DEPTH, Recipe, recipes, same_bytes
from ._saved import Saved, Unit
from ._transfers import Transfers

Signature = tuple[Any, ...]


class Proofs:
    """What has been proved of the steps of one shape.

    ``fixed_storages`` are the model's own, which outlive every step.
    """

    def __init__(self, model: torch.nn.Module, transfers: Transfers, fixed_storages: set[int]) -> None:
        self._epsilons = _epsilons_of(model)
        self._transfers = transfers
        self._fixed_storages = fixed_storages
        # By place in the step: what has been proved. By signature: the best time measured.
        self.proved: dict[int, Signature] = {}
        # Places whose unit one kernel makes together with what it is made of.
        self.fused: set[int] = set()
        self._costs_us: dict[Signature, float] = {}
        self._rebuilt: list[tuple[int, Signature]] = []
        self.first_id = 0

    def begin_step(self, exploring: bool) -> None:
        """The step before is settled."""
        self._rebuilt.clear()
        if exploring:
            self.proved.clear()
            self.fused.clear()

    def costs(self, measured: dict[Any, float]) -> list[tuple[int, float]]:
        """What can be rebuilt, with the shortest time that its like has taken in any step."""
        for unit_id, signature in self._rebuilt:
            if unit_id in measured:
                before = self._costs_us.get(signature, measured[unit_id])
                self._costs_us[signature] = min(before, measured[unit_id])
        known = {self.first_id + place: self._costs_us.get(of[:-1]) for place, of in self.proved.items()}
        return [(unit_id, cost_us) for unit_id, cost_us in known.items() if cost_us is not None]

    def note(self, unit: Unit, recipe: Recipe) -> None:
        """``unit`` is rebuilt in a step that is timed."""
        self._rebuilt.append((unit.id, recipe.signature))

    def prove(self, unit: Unit, storage: torch.UntypedStorage, tensor: torch.Tensor) -> Recipe | None:
        """A recipe that makes ``unit``, run and compared; None where none does."""
        base = base_of(tensor).detach()
        for recipe in self._candidates(unit, storage, tensor):
            if self._is_proved(recipe, storage, base):
                self.proved[unit.id - self.first_id] = self._signature(recipe)
                fused = None if self._transfers.kernels is None else fused_of(recipe)
                if fused is not None and self._fused_makes(fused, storage):
                    self.fused.add(unit.id - self.first_id)
                    recipe.fused = fused
                return recipe
        return None

    def again(self, unit: Unit, storage: torch.UntypedStorage, tensor: torch.Tensor) -> Recipe | None:
        """The recipe that was proved for the place of ``unit``, if that is the one that it has now."""
        proved = self.proved.get(unit.id - self.first_id)
        candidates = self._candidates(unit, storage, tensor)
        found = next((recipe for recipe in candidates if self._signature(recipe) == proved), None)
        if found is not None and unit.id - self.first_id in self.fused:
            found.fused = fused_of(found)
        return found

    def _candidates(self, unit: Unit, storage: torch.UntypedStorage, tensor: torch.Tensor) -> list[Recipe]:
        """Recipes that read the graph right, proved or not."""
        if unit.start != 0 or unit.nbytes != storage.nbytes():
            return []
        return [
            recipe
            for recipe in recipes(base_of(tensor), self._epsilons)
            if all(self._may_be_read(saved, unit, recipe) for saved in recipe.inputs)
            and recipe.depth <= MAX_DEPTH
        ]

    def _may_be_read(self, saved: Saved, unit: Unit, recipe: Recipe) -> bool:
        if saved.unit is not None:
            other = saved.unit
            return (
                other.storm is unit.storm
                and other.id >= self.first_id
                and other.storage_ref.cdata != unit.storage_ref.cdata
            )
        tensor = saved.tensor
        if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
        # A leaf that is not of the model, or what a product reads of it in another shape, may be a shard
        # that is emptied until its layer's backward.
        is_fixed = tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._fixed_storages
        return is_fixed or not (tensor.is_leaf and tensor.requires_grad or recipe.is_product)

    def _signature(self, recipe: Recipe) -> Signature:
        inputs: list[Any] = []
        for saved in recipe.inputs:
            if saved.unit is not None:
                inputs.append(saved.unit.id - self.first_id)
            elif saved.tensor is not None:
                inputs.append((saved.tensor.dtype, saved.tensor.shape))
        return (*recipe.signature, tuple(inputs))

    def _is_proved(self, recipe: Recipe, storage: torch.UntypedStorage, base: torch.Tensor) -> bool:
        """Runs ``recipe`` and compares; what has to be brought back or rebuilt for it is dropped again."""

        def run() -> bool:
            if recipe.narrow is not None:
                inputs = [base.to(recipe.narrow)]
            else:
                stream = self._transfers.edge.stream()
                inputs = [self._transfers.tensor_of(saved, stream) for saved in recipe.inputs]
            return recipe.makes(storage, base, inputs)

        try:
            return self._transfers.borrowing(run)
        except RuntimeError:
            return False  # an input was written to since, or there is no memory for it now

    def _fused_makes(self, fused: Fused, storage: torch.UntypedStorage) -> bool:
        """Whether the kernel makes ``storage``, and of the others what their recipes make."""
        transfers = self._transfers

        def run() -> bool:
            assert transfers.kernels is not None
            stream = transfers.edge.stream()
            parts = [transfers.tensor_of(saved, stream) for saved in fused.parts]
            made = transfers.kernels.run(fused, parts, stream)
            wanted = [transfers.storage_of(unit, stream) for unit in fused.others]
            if fused.kernel == "norm":
                # In a step that keeps the wide input it is the kernel's.
                of_wide = Fused("norm_of_wide", fused.parts, fused.others[1:])
                made += transfers.kernels.run(of_wide, [made[0], *parts[1:]], stream)
                wanted += [storage, wanted[1]]
            made_storages = [tensor.untyped_storage() for tensor in made]
            return all(map(same_bytes, made_storages, [*wanted, storage]))

        try:
            return transfers.borrowing(run)
        except RuntimeError:
            return False


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or what it is a view of."""
    return tensor if tensor._base is None else tensor._base


def _epsilons_of(model: torch.nn.Module) -> tuple[float, ...]:
    """Every epsilon that a normalisation of the model has."""
    names = ("eps", "variance_epsilon")
    found = {getattr(module, name, None) for module in model.modules() for name in names}
    return tuple(sorted(value for value in found if isinstance(value, float)))
