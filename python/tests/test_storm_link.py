"""The link codec on STORM's link: chosen by the plan where the link binds, and no bit depends on it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from storm_harness import devices, offload_everything
from torch import Tensor, nn

from overspill import TransferError
from overspill._edge import edge_for
from overspill._link import Link


def compress_everything(model: nn.Module, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """STORM made to compress all that leaves: the link is all but dead, and nothing is rebuilt."""
    storm = offload_everything(model, rebuild=False, compress=True, **options)
    storm._link_gbps = lambda: (1e-9, 1e-9)  # type: ignore[attr-defined]
    return storm


def layers(dtype: torch.dtype, device: str) -> nn.Module:
    """A seeded chain whose saved tensors have exponents worth coding, and are larger than a chunk."""
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*made).to(device, dtype)


def gradients(model: nn.Module, n: int, *, again: bool = False) -> list[Tensor]:
    """Loss and gradients of step ``n``; ``again`` runs backward twice over a retained graph."""
    model.zero_grad()
    parameter = next(model.parameters())
    # Without a GPU the budget counts the whole process, and nothing fits.
    rows = 6000 if parameter.is_cuda else 300
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(n)).to(parameter)
    loss = model(x).square().mean()
    if again:
        loss.backward(retain_graph=True)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("again", [False, True])
def test_bits_are_the_same(dtype: torch.dtype, device: str, again: bool) -> None:
    """Steps that compress, with one backward and with two."""
    model = layers(dtype, device)
    expected = [gradients(model, n, again=again) for n in range(6)]
    with compress_everything(model) as storm:
        for n, want in enumerate(expected):
            assert all(map(torch.equal, want, gradients(model, n, again=again))), f"step {n}"
    storm.close()
    report = storm.report()
    assert report["units"]["compressed"] >= 5 * 4
    assert report["predicted"]["compressed_bytes"] > 0
    assert (report["live_units"], report["held_bytes"], report["pool"]["bytes_in_use"]) == (0, 0, 0)


@pytest.mark.parametrize("part", range(4))
def test_every_schedule_gives_the_same_bits(part: int, tmp_path: Path) -> None:
    """Host memory with and without disk, under seeded schedules; abandoned graphs in between."""
    model = layers(torch.bfloat16, "cpu")
    expected = [gradients(model, n) for n in range(4)]
    for seed in range(part, 40, 4):
        budget = ("1MiB", "8MiB")[seed % 2]
        options = {"seed": seed, "host_budget": budget, "spill_dir": str(tmp_path), "spill_limit": "8MiB"}
        with compress_everything(model, **options) as storm:
            for n, want in enumerate(expected):
                if n == 2:
                    del_me = model(torch.ones(300, 64, dtype=torch.bfloat16))
                    del del_me
                assert all(map(torch.equal, want, gradients(model, n))), f"seed {seed}, step {n}"
        storm.close()
        assert storm.report()["units"]["compressed"] > 0, f"seed {seed}"
        assert storm.report()["pool"]["bytes_in_use"] == 0, f"seed {seed}"


@pytest.mark.parametrize("seed", [63, 81, 141])
def test_a_read_finds_the_memory_of_a_copy_that_is_being_finished(seed: int, tmp_path: Path) -> None:
    """These schedules run a read from disk while an older copy is out of its queue and its memory not free yet."""
    model = layers(torch.bfloat16, "cpu")
    expected = [gradients(model, n) for n in range(4)]
    options = {"seed": seed, "host_budget": "64KiB", "spill_dir": str(tmp_path), "spill_limit": "8MiB"}
    with compress_everything(model, **options) as storm:
        for n, want in enumerate(expected):
            assert all(map(torch.equal, want, gradients(model, n))), f"step {n}"
    storm.close()


def test_another_shape_in_mid_run_is_exact() -> None:
    """A step that is not the planned one: codes under way, then plain offloads."""
    model = layers(torch.bfloat16, "cpu")
    model[2].register_forward_hook(lambda _m, _i, out: out.repeat(2, 1) if deviates else out)
    deviates = False
    plain = gradients(model, 0)
    deviates = True
    other = gradients(model, 0)
    with compress_everything(model) as storm:
        for n in range(8):
            deviates = n % 4 == 3
            assert all(map(torch.equal, other if deviates else plain, gradients(model, 0))), f"step {n}"
    storm.close()
    assert storm.report()["units"]["compressed"] > 0


def test_a_code_that_is_none_is_refused() -> None:
    """Damage between the two halves is an error, not a gradient."""
    edge = edge_for(torch.device("cpu"))
    link = Link(edge)
    words = torch.randn(20_000).to(torch.bfloat16)
    code = link.encode(words.untyped_storage(), torch.bfloat16, 0)
    assert code.length() < 0.8 * words.nbytes
    again = torch.empty(0, dtype=torch.bfloat16).set_(link.decode(code, code.length(), 0))
    assert torch.equal(again.view(torch.int16), words.view(torch.int16))
    assert code.buffer is not None
    torch.empty(0, dtype=torch.uint8).set_(code.buffer)[:8] = 255
    with pytest.raises(Exception, match="record"):
        link.decode(code, code.length(), 0)
    link._status.fill_(1)
    with pytest.raises(TransferError, match="damaged"):
        link.check()
