"""How a saved tensor is computed again: the operation that made it, on what autograd saved for that.

A recipe is read off the graph (``grad_fn``), never recorded from calls, so that it costs nothing where
it is not used. Elementwise and normalisation nodes that save their inputs have one, and products of two
matrices; a node that saved the tensor itself (sigmoid, exp, tanh save their output) would be a cycle that
no collector sees.
It holds :class:`Saved` handles of the inputs and never a node or a tensor with a history. Whether its
bits are the tensor's is not known here; see :meth:`Recipe.makes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._saved import Saved

if TYPE_CHECKING:
    from ._fused import Fused

# Rebuilding is recursive, and so is letting go of a chain.
MAX_DEPTH = 8

Operation = Callable[..., torch.Tensor]


@dataclass(slots=True)
class Recipe:
    """``operation(*inputs)``; its result has the storage of the tensor."""

    operation: Operation
    inputs: tuple[Saved, ...]
    signature: tuple[Any, ...]
    """What has to be the same in another step for the proof to hold there; comparable."""
    narrow: torch.dtype | None = None
    """Set where the one input is a copy in this type that has yet to be made."""
    fused: Fused | None = None
    """Set where one kernel makes this and what it is made of, with the same bits."""

    @property
    def is_product(self) -> bool:
        """Whether it multiplies two matrices."""
        return bool(self.signature[0] == "MmBackward0")

    @property
    def depth(self) -> int:
        """Rebuilds in a row at most, this one included."""
        depths = (
            s.unit.recipe.depth for s in self.inputs if s.unit is not None and s.unit.recipe is not None
        )
        return 1 + max(depths, default=0)

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The tensor's base, made of the inputs' present tensors."""
        # The inputs are as the operation saw them, after autocast had its say.
        with torch._C._DisableAutocast():
            return self.operation(*inputs)

    def makes(self, storage: torch.UntypedStorage, base: torch.Tensor, inputs: list[torch.Tensor]) -> bool:
        """Whether it makes ``base`` of these inputs, layout and all: every byte of its storage."""
        made = self.run(inputs)
        if (made.dtype, made.shape, made.stride()) != (base.dtype, base.shape, base.stride()):
            return False
        if (
            made.storage_offset() != base.storage_offset()
            or made.untyped_storage().nbytes() != storage.nbytes()
        ):
            return False
        return same_bytes(made.untyped_storage(), storage)


def same_bytes(a: torch.UntypedStorage, b: torch.UntypedStorage) -> bool:
    """Whether two storages of one length hold the same bytes."""
    return torch.equal(_words(a), _words(b))


def _words(storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes as integers, so that a NaN equals itself and zeros keep their sign."""
    dtype = torch.int64 if storage.nbytes() % 8 == 0 else torch.uint8
    words = torch.empty(0, dtype=dtype, device=storage.device)
    return words.set_(storage, 0, (storage.nbytes() // words.element_size(),), (1,))


# Node: names of the saved inputs, names of other saved arguments, and the operation on both.
_NODES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Operation]] = {
    "MmBackward0": (("self", "mat2"), (), torch.mm),
    "MulBackward0": (("self", "other"), (), torch.mul),
    "DivBackward0": (("self", "other"), (), torch.div),
    "SiluBackward0": (("self",), (), torch.nn.functional.silu),
    "MishBackward0": (("self",), (), torch.nn.functional.mish),
    "HardswishBackward0": (("self",), (), torch.nn.functional.hardswish),
    "SinBackward0": (("self",), (), torch.sin),
    "CosBackward0": (("self",), (), torch.cos),
    "GeluBackward0": (
        ("self",),
        ("approximate",),
        lambda x, how: torch.nn.functional.gelu(x, approximate=how),
    ),
    "LeakyReluBackward0": (("self",), ("negative_slope",), torch.nn.functional.leaky_relu),
    "NativeLayerNormBackward0": (
        ("input", "weight", "bias"),
        ("normalized_shape",),
        lambda x, weight, bias, shape, eps: torch.native_layer_norm(x, shape, weight, bias, eps)[0],
    ),
    "FusedRmsNormBackward0": (
        ("input", "weight"),
        ("normalized_shape",),
        lambda x, weight, shape, eps: torch._fused_rms_norm(x, shape, weight, eps)[0],
    ),
}
# These nodes do not save their epsilon: every one that the model has is tried.
_WITH_EPSILON = {"NativeLayerNormBackward0", "FusedRmsNormBackward0"}
_WIDENED = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def recipes(base: torch.Tensor, epsilons: tuple[float, ...]) -> list[Recipe]:
    """What may make ``base``, a tensor that is no view; none for most tensors."""
    node = base.grad_fn
    if node is None or base.output_nr != 0:
        return []
    layout = (base.dtype, base.shape, base.stride(), base.storage_offset(), base._version)
    try:
        if node.name() == "UnsafeViewBackward0":
            # A linear layer without a bias on a batch of sequences: the product, in another shape.
            before, output = node.next_functions[0]
            return _of_node(before, epsilons, layout, base.shape) if before and output == 0 else []
        if node.name() != "ToCopyBackward0":
            return _of_node(node, epsilons, layout, None)
        before, output = node.next_functions[0]
        if before is None:
            return []
        dtype = before._input_metadata[output].dtype
        if _WIDENED.get(dtype) is base.dtype:
            return [Recipe(_widen(base.dtype), (), ("widen", dtype, *layout), narrow=dtype)]
        return _of_node(before, epsilons, layout, base.dtype) if output == 0 else []
    except RuntimeError:
        return []  # the node's saved tensors were released: its backward has run


def _of_node(
    node: Any, epsilons: tuple[float, ...], layout: tuple[Any, ...], after: torch.dtype | torch.Size | None
) -> list[Recipe]:
    """Recipes of what ``node`` made, cast to another type or seen in another shape ``after`` it."""
    name = node.name()
    if name not in _NODES:
        return []
    names, constants, operation = _NODES[name]
    inputs: list[Saved] = []
    for argument in names:
        # The raw saved tensor gives what our hook packed, without asking any hook to unpack it: in a
        # checkpointed region that would run the region again.
        packed = getattr(getattr(node, "_raw_saved_" + argument), "data", None)
        if not isinstance(packed, Saved):
            return []
        inputs.append(packed)
    values = tuple(getattr(node, "_saved_" + constant) for constant in constants)
    tails = [(*values, epsilon) for epsilon in epsilons] if name in _WITH_EPSILON else [values]
    return [
        Recipe(_with_tail(operation, tail, after), tuple(inputs), (name, tail, after, *layout))
        for tail in tails
    ]


def _with_tail(
    operation: Operation, tail: tuple[Any, ...], after: torch.dtype | torch.Size | None
) -> Operation:
    if after is None:
        return lambda *inputs: operation(*inputs, *tail)
    if isinstance(after, torch.Size):
        return lambda *inputs: operation(*inputs, *tail).view(after)
    return lambda *inputs: operation(*inputs, *tail).to(after)


def _widen(dtype: torch.dtype) -> Operation:
    return lambda narrow: narrow.to(dtype)
