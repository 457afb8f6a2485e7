"""Writes after save that autograd refuses, and what it says when it does.

Under saved-tensor hooks autograd checks no versions, so STORM has to; :func:`outcome` runs a case with and
without it and gives what the user would see.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Case = Callable[[nn.Module], Tensor]


def output_of_exp(model: nn.Module) -> Tensor:
    """The node's own output, overwritten."""
    y = model(torch.ones(4, 8)).exp()
    with torch.no_grad():
        y.add_(1)
    return y.sum()


def input_of_mul(model: nn.Module) -> Tensor:
    """An input that an earlier node made."""
    x = model(torch.ones(4, 8))
    y = x * x
    with torch.no_grad():
        x.mul_(2)
    return y.sum()


def through_a_view(model: nn.Module) -> Tensor:
    """A row of what was saved."""
    x = model(torch.ones(4, 8))
    y = x.sin()
    x[1].detach().zero_()
    return y.sum()


def base_of_a_view(model: nn.Module) -> Tensor:
    """The base, where a view of it was saved."""
    x = model(torch.ones(4, 8))
    y = x[1:3].cos()
    with torch.no_grad():
        x.add_(1)
    return y.sum()


def under_grad_mode(model: nn.Module) -> Tensor:
    """A write that autograd itself records."""
    x = model(torch.ones(4, 8))
    y = x.square()
    x += 1
    return (y + x).sum()


def a_constant(model: nn.Module) -> Tensor:
    """A saved tensor that is no one's output."""
    scale = torch.full((8,), 3.0)
    y = model(torch.ones(4, 8)) * scale
    scale.fill_(0)
    return y.sum()


def a_mask(model: nn.Module) -> Tensor:
    """A bool tensor."""
    mask = torch.zeros(4, 8, dtype=torch.bool)
    y = model(torch.ones(4, 8)).masked_fill(mask, 0)
    mask.logical_not_()
    return y.sum()


def a_parameter(model: nn.Module) -> Tensor:
    """A parameter stepped between forward and backward: left alone, and still checked."""
    y = model(model(torch.ones(4, 8)))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return y.sum()


def saved_twice(model: nn.Module) -> Tensor:
    """Saved, written, saved again: the second copy is good, the first is not."""
    x = model(torch.ones(4, 8))
    y = x.sin()
    with torch.no_grad():
        x.mul_(2)
    return (x.cos() + y).sum()


class Scribbles(torch.autograd.Function):
    """Writes to what it saved in its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.mul_(0).add_(g)


def in_backward(model: nn.Module) -> Tensor:
    """What one node's backward writes to, another node saved."""
    x = model(torch.ones(4, 8))
    return (x.sin() + Scribbles.apply(x)).sum()


CASES: tuple[Case, ...] = (
    output_of_exp, input_of_mul, through_a_view, base_of_a_view, under_grad_mode, a_constant, a_mask, a_parameter,
    saved_twice, in_backward,
)  # fmt: skip


def outcome(case: Case, wrap: Callable[[nn.Module], contextlib.AbstractContextManager[object]] | None) -> str:
    """What a backward of ``case`` ends in, the second time: the error's class and text, or the gradients.

    The second time, because STORM sends everything away while it learns what a step is.
    """
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    with contextlib.nullcontext() if wrap is None else wrap(model):
        once(case, model)
        return once(case, model)


def once(case: Case, model: nn.Module) -> str:
    """One backward of ``case``."""
    model.zero_grad()
    try:
        case(model).backward()
    except RuntimeError as error:
        # The type's spelling, the node's name and the hint are advice (torch itself says both CPUBoolType and
        # torch.FloatTensor); the class, the shape and both versions are the contract.
        said = re.sub(r"\[[\w.]+ (\[.*?\])\](, which is output \d+ of \w+,)?", r"\1", str(error))
        return f"{type(error).__name__}: {said.partition(' Hint:')[0]}"
    return str([None if p.grad is None else p.grad.tolist() for p in model.parameters()])
