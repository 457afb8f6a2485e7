"""Tensors that autograd saves and STORM must leave alone, or restore with more than sizes and strides."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from overspill import Storm


def sparse_coo(x: Tensor) -> Tensor:
    """A sparse operand has no storage."""
    return torch.sparse.mm(torch.eye(64).to_sparse(), x).sum()


def sparse_csr(x: Tensor) -> Tensor:
    """Nor has a compressed one."""
    return (torch.eye(64).to_sparse_csr() @ x).sum()


def nested(x: Tensor) -> Tensor:
    """A nested tensor says that it is strided."""
    return torch.nested.as_nested_tensor([x[:10], x[10:30]]).relu().to_padded_tensor(0.0).sum()


def jagged(x: Tensor) -> Tensor:
    """A subclass of several tensors."""
    parts = torch.nested.as_nested_tensor([x[:10], x[10:30]], layout=torch.jagged)
    return (parts * parts).values().sum()


def conjugated(x: Tensor) -> Tensor:
    """Conjugation and negation are bits of the tensor, not of its bytes."""
    z = torch.complex(x, x.sin())
    return (z * z.conj()).real.sum() + (z.conj().imag * x).sum()


def quantized(x: Tensor) -> Tensor:
    """A saved tensor with a scale and a zero point beside it."""
    return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255).sum()


def empty(x: Tensor) -> Tensor:
    """No elements, and none of the storage of something else."""
    return x[:0].exp().sum() + x[3:3].sigmoid().sum() + x.sum()


def scalar(x: Tensor) -> Tensor:
    """No dimensions."""
    return (x.sum().exp() * x.mean() * x[0, 0].clone()).log1p()


def half_precision(x: Tensor) -> Tensor:
    """Items of two bytes and of one, at odd offsets."""
    low = x.to(torch.bfloat16).flatten()[1:].exp()
    return (low * low[3]).float().sum() + x.half().sin().float().sum()


def reinterpreted(x: Tensor) -> Tensor:
    """A saved integer view of a saved float."""
    bits = x.detach().sin()
    mask = bits.view(torch.int32).bitwise_and(1).bool()
    return (torch.where(mask, x * bits, x)).sum()


def broadcast(x: Tensor) -> Tensor:
    """Strides of zero in every dimension, then in some."""
    return (x[:1, :1].expand(64, 64) * x[:, :1].expand(64, 64) * x.unsqueeze(0).expand(3, 64, 64)).sum()


def reversed_storage(x: Tensor) -> Tensor:
    """Column-major with a gap and an offset."""
    y = (x * 1).t()[5:40:3, 2:50:7]
    return (y * y.exp()).sum()


CASES = (
    sparse_coo, sparse_csr, nested, jagged, conjugated, quantized, empty, scalar, half_precision, reinterpreted,
    broadcast, reversed_storage,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_gradients_are_the_same(case: Callable[[Tensor], Tensor]) -> None:
    """Twice in a row, so that the second time a plan is in force."""

    def gradient() -> Tensor:
        torch.manual_seed(0)
        x = (torch.randn(64, 64) * 0.1).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case(x * 1).backward()
        assert x.grad is not None
        return x.grad

    expected = gradient()
    for budget in ("1MiB", "1TiB"):
        with Storm(nn.Identity(), vram_budget=budget, min_bytes=1) as storm:
            for _ in range(2):
                assert torch.equal(expected, gradient())
        assert storm.report()["live_units"] == 0
