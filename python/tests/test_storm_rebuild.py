"""Rebuilding: which tensors have a recipe, that it is proved, and that no bit depends on it.

``rebuild_everything`` makes the planner rebuild whatever was proved, by telling it that the link is all but
dead; the workloads of the matrix then run through recipes on every step.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from storm_harness import devices, first_difference, offload_everything, prove_everything, train
from test_storm_matrix import baseline
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from overspill import Storm, _recipes


def rebuild_everything(model: nn.Module, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """STORM made to rebuild all that it can, and to send the rest away."""
    storm = offload_everything(model, **options)
    storm._link_gbps = lambda: (1e-9, 1e-9)  # type: ignore[attr-defined]
    prove_everything(storm)
    return storm


# Workload: fewest rebuilds in each of 20 steps.
REBUILDING = {
    "mlp": 3,
    "llama": 10,
    "gpt2": 5,
    "t5": 5,
    "vit": 3,
    "moe": 1,
    "checkpoint_nonreentrant": 0,
    "retain_graph": 1,
    "double_backward": 0,
    "many_forwards": 1,
    "inplace": 0,
    "autocast": 1,
}


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", list(REBUILDING))
def test_bits_are_the_same(name: str, device: str) -> None:
    """Everything that has a recipe is rebuilt."""
    run = train(name, rebuild_everything, device=device)
    assert first_difference(baseline(name, device), run) is None
    run.context.close()
    report = run.context.report()
    assert report["units"]["rebuilt"] >= 20 * REBUILDING[name]
    assert (report["live_units"], report["held_bytes"], report["pool"]["bytes_in_use"]) == (0, 0, 0)


class Gated(nn.Module):
    """Norms, a gate and a product: everything but the matmuls' outputs has a recipe."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=3e-5)
        self.gate, self.up = nn.Linear(width, width), nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.tamper: Callable[[Tensor], None] = lambda _: None

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        h = self.norm(x)
        product = F.silu(self.gate(h)) * self.up(h)
        self.tamper(product)
        return x + self.down(product)


def gated(layers: int = 2) -> nn.Sequential:
    """A seeded chain of :class:`Gated`, behind a layer whose output they may save."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), *(Gated() for _ in range(layers)))


def batch(n: int = 0) -> Tensor:
    """A batch."""
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(n))


def gradients(model: nn.Module, n: int = 0, **options: Any) -> list[Tensor]:
    """Gradients of one step."""
    model.zero_grad()
    model(batch(n)).square().sum().backward(**options)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def rebuilt(storm: Any) -> int:
    """Units rebuilt so far."""
    return int(storm.report()["units"]["rebuilt"])


def test_norm_gate_and_product_are_rebuilt() -> None:
    """Three a layer, in every step; the same bits."""
    model = gated()
    expected = [gradients(model, n) for n in range(5)]
    with rebuild_everything(model) as storm:
        for n, want in enumerate(expected):
            before = rebuilt(storm)
            assert all(map(torch.equal, want, gradients(model, n)))
            assert rebuilt(storm) - before == 6
    with Storm(model, vram_budget="1TiB", min_bytes=1, rebuild=False) as storm:
        assert all(map(torch.equal, expected[0], gradients(model)))
        assert rebuilt(storm) == 0


@pytest.mark.parametrize("shape", [(16, 32), (2, 8, 32)], ids=["matrix", "sequences"])
def test_products_are_rebuilt(shape: tuple[int, ...]) -> None:
    """What a linear layer without a bias made, of its input and the weight; a layer's input comes back or is
    rebuilt itself.
    """
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))

    def grads(n: int) -> list[Tensor]:
        model.zero_grad()
        x = batch(n).view(shape)
        for layer in model:
            x = F.silu(layer(x))
        x.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = [grads(n) for n in range(4)]
    with rebuild_everything(model) as storm:
        assert all(all(map(torch.equal, want, grads(n))) for n, want in enumerate(expected))
    # The first layer's input needs no gradient, so the weight that made its output was not saved.
    assert rebuilt(storm) == 4 * (3 + 3)
    assert {signature[0] for signature in storm._proofs.proved.values()} == {"MmBackward0", "SiluBackward0"}


def test_a_product_with_what_is_not_the_models_is_not_rebuilt() -> None:
    """Such a matrix may be emptied before backward, as the shards of FSDP are, and filled when its layer is due."""
    torch.manual_seed(0)
    model, weight = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 32))

    def grads(n: int) -> list[Tensor]:
        model.zero_grad()
        (F.silu(model(batch(n)) @ weight.t()).sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = [grads(n) for n in range(3)]
    with rebuild_everything(model) as storm:
        assert all(all(map(torch.equal, want, grads(n))) for n, want in enumerate(expected))
    assert rebuilt(storm) == 0


def test_casts_of_16_bit_values_are_kept_as_16_bit() -> None:
    """As in the norm of a Llama: the 32-bit input, its normalised cast, the weighted result."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, dtype=torch.bfloat16))
    model = nn.ParameterList([weight])

    def grads(n: int) -> list[Tensor]:
        model.zero_grad()
        x = batch(n).bfloat16().requires_grad_()
        wide = (x * 1).float()
        normal = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)
        (weight * normal).sin().sum().backward()
        assert x.grad is not None and weight.grad is not None
        return [x.grad.clone(), weight.grad.clone()]

    expected = [grads(n) for n in range(4)]
    with rebuild_everything(model) as storm:
        assert all(all(map(torch.equal, want, grads(n))) for n, want in enumerate(expected))
    operations = {signature[0] for signature in storm._proofs.proved.values()}
    assert operations == {"widen", "MulBackward0"}
    assert rebuilt(storm) == 4 * 3
    assert storm.report()["live_units"] == 0


def test_a_wrong_recipe_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted one: where the node says silu, mish is tried. It is refused, and no bit changes."""
    monkeypatch.setitem(_recipes._NODES, "SiluBackward0", (("self",), (), F.mish))
    model = gated()
    expected = gradients(model)
    with rebuild_everything(model) as storm:
        for _ in range(3):
            assert all(map(torch.equal, expected, gradients(model)))
    assert "SiluBackward0" not in {signature[0] for signature in storm._proofs.proved.values()}


def test_the_proof_is_what_keeps_wrong_recipes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same planted recipe without the proof changes bits: this test file can see it."""
    monkeypatch.setitem(_recipes._NODES, "SiluBackward0", (("self",), (), F.mish))
    monkeypatch.setattr(_recipes.Recipe, "makes", lambda *_: True)
    model = gated()
    expected = gradients(model)
    with rebuild_everything(model):
        assert not all(map(torch.equal, expected, gradients(model)))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_tensor_changed_after_it_was_made_is_not_rebuilt(first: int) -> None:
    """``no_grad`` writes leave ``grad_fn`` as it was: from the first step on, or from a later one on."""
    model = gated(1)

    def tamper(product: Tensor) -> None:
        with torch.no_grad():
            product.mul_(2)

    def grads(n: int) -> list[Tensor]:
        model[1].tamper = tamper if n >= first else lambda _: None
        return gradients(model, n)

    expected = [grads(n) for n in range(6)]
    with rebuild_everything(model):
        for n, want in enumerate(expected):
            assert all(map(torch.equal, want, grads(n)))


@pytest.mark.parametrize("steps", [0, 3], ids=["explored", "planned"])
@pytest.mark.parametrize("what", ["tensor", "input"])
def test_in_place_after_save_is_noticed(what: str, steps: int) -> None:
    """The tensor that would be rebuilt, or what it would be rebuilt from: autograd's own error."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 32))

    def loss(write: bool) -> Tensor:
        x = batch() @ weight
        product = F.silu(x) * x
        out = (product @ weight).sum()
        if write:
            with torch.no_grad():
                (product if what == "tensor" else x).add_(1)
        return out

    with rebuild_everything(nn.ParameterList([weight])) as storm:
        for _ in range(steps):
            loss(write=False).backward()
        bad = loss(write=True)
        assert rebuilt(storm) == 2 * (steps + 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            bad.backward()


def test_retained_graphs_and_second_derivatives() -> None:
    """Backward twice through one graph, and through the gradient."""
    model = gated()

    def twice(n: int) -> list[Tensor]:
        model.zero_grad()
        x = batch(n).requires_grad_()
        out = model(x).square().sum()
        (g,) = torch.autograd.grad(out, x, create_graph=True)
        out.backward(retain_graph=True)
        g.square().sum().backward()
        assert x.grad is not None
        return [x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = [twice(n) for n in range(5)]
    with rebuild_everything(model) as storm:
        for n, want in enumerate(expected):
            assert all(map(torch.equal, want, twice(n)))
    gc.collect()
    assert storm.report()["live_units"] == 0


def test_a_part_of_the_backward() -> None:
    """Only the last layer's gradient: the nodes that the recipes read from never run."""
    model = gated()
    expected = [torch.autograd.grad(model(batch(n)).sum(), model[2].down.weight)[0] for n in range(4)]
    with rebuild_everything(model) as storm:
        for n, want in enumerate(expected):
            assert torch.equal(want, torch.autograd.grad(model(batch(n)).sum(), model[2].down.weight)[0])
    assert storm.report()["live_units"] == 0


def test_an_abandoned_graph_gives_everything_back_at_once() -> None:
    """Without the collector: a recipe that made a cycle through C++ would keep its storages."""
    model = gated()
    with rebuild_everything(model) as storm:
        for n in range(4):
            gradients(model, n)
        gc.disable()
        try:
            watched: list[StorageWeakRef] = []
            for layer in model[1:]:
                layer.tamper = lambda t: watched.append(StorageWeakRef(t.untyped_storage()))
            out = model(batch())
            del out
            assert len(watched) == 2 and all(ref.expired() for ref in watched)
            assert storm.report()["live_units"] == 0
        finally:
            gc.enable()


def test_nothing_grows_over_a_thousand_steps() -> None:
    """Units, tables, the pool and the objects of Python."""
    model = gated(1)
    with rebuild_everything(model) as storm:
        for step in range(1000):
            if step == 5:
                gc.collect()
                objects = len(gc.get_objects())
            gradients(model)
        storm.close()
        report = storm.report()
        assert (report["live_units"], report["pool"]["bytes_in_use"], report["disk_bytes"]) == (0, 0, 0)
        assert len(storm._by_storage) + len(storm._transfers.leaving) + len(storm._proofs._rebuilt) == 0
        gc.collect()
        assert len(gc.get_objects()) < objects + 500


def test_what_leaves_fits_the_host(tmp_path: Path) -> None:
    """Over a link that costs nothing all would leave; with less room there, some of it is rebuilt."""

    def run(wrap: Callable[..., Any], **options: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        made = (nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64), nn.Tanh()) for _ in range(6))
        model = nn.Sequential(*made)
        storm = wrap(model, spill_dir=str(tmp_path), host_budget="1MiB", **options)
        if wrap is offload_everything:
            storm._link_gbps = lambda: (1e9, 1e9)
        with storm:
            for _ in range(4):
                model(torch.randn(1024, 64)).square().mean().backward()
        storm.close()
        return storm.report()["predicted"]

    least, most = (run(wrap)["host_bytes"] for wrap in (rebuild_everything, offload_everything))
    assert least < most
    room = (least + most) // 2
    predicted = run(offload_everything, spill_limit=room * 8 // 7 - 2**20)
    assert least <= predicted["host_bytes"] <= room
    assert predicted["rebuilt_bytes"] > 0


def test_a_long_chain_is_cut() -> None:
    """Each silu could be rebuilt from the one before: some are sent away, so that recursion ends."""
    torch.manual_seed(0)
    model = nn.Linear(32, 32)

    def grads(n: int) -> list[Tensor]:
        model.zero_grad()
        x = model(batch(n))
        for _ in range(100):
            x = F.silu(x)
        x.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = [grads(n) for n in range(4)]
    with rebuild_everything(model) as storm:
        for n, want in enumerate(expected):
            assert all(map(torch.equal, want, grads(n)))
    units = storm.report()["units"]
    assert units["rebuilt"] > 100 and units["offloaded"] > 20
