"""Norms and gates rebuilt by one kernel: which are recognised, that the kernel is proved, and that no bit depends on it.

:class:`ByOperations` is the kernel's exact twin in plain PyTorch; the kernel itself is compared with a scalar one in
``crates/overspill-codec-cuda/tests/emulated.rs``, and with PyTorch's operations on a GPU, where there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from storm_harness import devices
from test_storm_rebuild import rebuild_everything
from torch import Tensor, nn

from overspill import Storm
from overspill._fused import fused_of
from overspill._recipes import Recipe
from overspill._saved import Saved


class ByOperations:
    """What the kernel makes, operation by operation; ``wrong`` changes it."""

    def __init__(self, wrong: Callable[[str, list[Tensor]], None] = lambda *_: None) -> None:
        self.runs = {"norm": 0, "norm_of_wide": 0, "gate": 0}
        self._wrong = wrong

    def run(self, fused: Any, parts: list[Tensor], _stream: int) -> list[Tensor]:
        """As :meth:`overspill._fused.Kernels.run`."""
        self.runs[fused.kernel] += 1
        if fused.kernel != "gate":
            given, scale, weight = parts
            wide = given.to(torch.float32)
            normal = (wide * scale).to(weight.dtype)
            made = [wide, normal, weight * normal]
            if fused.kernel == "norm_of_wide":
                del made[0]
        else:
            gate, up = parts
            silu = F.silu(gate)
            made = [silu, silu * up]
        self._wrong(fused.kernel, made)
        return made


class Counted:
    """The device's own kernels."""

    own: Any = None
    runs = 0

    def run(self, *arguments: Any) -> Any:
        """As the kernels do."""
        self.runs += 1
        return self.own.run(*arguments)


class Norm(nn.Module):
    """As transformers' Llama has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width).to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """The norm."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """A norm, and a gated product of what it gives."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        make = functools.partial(nn.Linear, width, width, bias=False, dtype=torch.bfloat16)
        self.gate, self.up, self.down = make(), make(), make()

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        normal = self.norm(x)
        return x + self.down(F.silu(self.gate(normal)) * self.up(normal))


def gradients(width: int, kernels: Any, device: str = "cpu") -> tuple[list[Tensor], Any]:
    """Of six steps, and the context; ``kernels`` None leaves STORM out."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(3))).to(device)
    storm = None if kernels is None else rebuild_everything(model)
    if isinstance(kernels, Counted):
        torch.mm(torch.ones(2, 2, device=device), torch.ones(2, 2, device=device))
        # Beside what cuBLAS has taken there is room for a proof: the first step rebuilds what it proves.
        room = torch.cuda.memory_allocated() + sum(p.nbytes for p in model.parameters()) + 2**20
        storm = Storm(model, vram_budget=room, min_bytes=1)
        kernels.own, storm._transfers.kernels = storm._transfers.kernels, kernels  # type: ignore[assignment]
    elif storm is not None:
        storm._transfers.kernels = kernels  # type: ignore[attr-defined]
    found = []
    for n in range(6):
        x = torch.randn(2, 16, width, generator=torch.Generator().manual_seed(n)).to(device, torch.bfloat16)
        x.requires_grad_(True)  # or the first norm's input has no history to read a recipe off
        model.zero_grad()
        if storm is None:
            model(x).float().square().mean().backward()
        else:
            with storm:
                model(x).float().square().mean().backward()
        found += [p.grad.clone() for p in model.parameters()]
    return found, storm


def test_norms_and_gates_are_rebuilt_in_one_go() -> None:
    """With the same bits, once in every backward, beside the proofs of the first forward."""
    twin = ByOperations()
    expected, _ = gradients(64, None)
    got, storm = gradients(64, twin)
    assert all(map(torch.equal, expected, got))
    assert len(storm._proofs.fused) == 2 * 3
    assert min(twin.runs["norm"], twin.runs["gate"]) >= 3 + 6 * 3
    assert twin.runs["norm_of_wide"] == 3
    storm.close()
    assert storm.report()["held_bytes"] == 0


RESULTS = {"norm": 3, "norm_of_wide": 2, "gate": 2}


@pytest.mark.parametrize(
    ("kernel", "which"), [(name, n) for name, count in RESULTS.items() for n in range(count)]
)
def test_a_kernel_with_other_bits_is_not_used(kernel: str, which: int) -> None:
    """One bit of one of the results, and it runs in no backward."""

    def wrong(name: str, made: list[Tensor]) -> None:
        if name == kernel:
            made[which].view(torch.int16).view(-1)[5] ^= 1

    twin = ByOperations(wrong)
    expected, _ = gradients(64, None)
    got, storm = gradients(64, twin)
    assert all(map(torch.equal, expected, got))
    assert len(storm._proofs.fused) == 3
    assert twin.runs[kernel] == 3
    storm.close()


def test_a_wide_input_that_is_kept_is_the_kernels_own() -> None:
    """There is no narrow copy to start from then."""
    x, scale, weight = torch.rand(4, 16), torch.rand(4, 1), torch.rand(16).to(torch.bfloat16)
    wide, narrow, normal = (Saved(t, None, keep=True) for t in (x, x.bfloat16(), x.bfloat16()))
    factor, by = (Saved(t, None, keep=True) for t in (scale, weight))
    layout = (torch.bfloat16, x.shape, x.stride(), 0, 0)
    widened = Recipe(torch.clone, (narrow,), ("widen", torch.bfloat16, torch.float32), narrow=torch.bfloat16)
    again = Recipe(torch.mul, (wide, factor), ("MulBackward0", (), torch.bfloat16, *layout))
    product = Recipe(torch.mul, (by, normal), ("MulBackward0", (), None, *layout))
    normal.unit, wide.unit = SimpleNamespace(recipe=again), SimpleNamespace(recipe=widened)  # type: ignore[assignment]
    fused = fused_of(product)
    assert fused is not None
    assert (fused.kernel, fused.parts, fused.others) == (
        "norm",
        (narrow, factor, by),
        (wide.unit, normal.unit),
    )
    wide.unit.recipe = None
    fused = fused_of(product)
    assert fused is not None
    assert (fused.kernel, fused.parts, fused.others) == ("norm_of_wide", (wide, factor, by), (normal.unit,))
    wide.tensor = x.double()
    assert fused_of(product) is None


def test_rows_that_the_kernel_cannot_read_are_left_to_the_operations() -> None:
    """Rows of 60 columns do not start on 16 bytes."""
    twin = ByOperations()
    expected, _ = gradients(60, None)
    got, storm = gradients(60, twin)
    assert all(map(torch.equal, expected, got))
    assert twin.runs["norm"] == 0
    storm.close()


@pytest.mark.parametrize("device", [d for d in devices() if d.values != ("cpu",)])
def test_the_kernels_make_the_operations_bits(device: str) -> None:
    """On a GPU they are proved, and used."""
    torch.use_deterministic_algorithms(True)
    expected, _ = gradients(512, None, device)
    counted = Counted()
    got, storm = gradients(512, counted, device)
    torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, expected, got))
    assert len(storm._proofs.fused) == 2 * 3
    assert counted.runs >= 2 * 2 * 3
    storm.close()
