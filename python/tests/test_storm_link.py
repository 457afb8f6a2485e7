"""The link codec on STORM's link: chosen by the plan where the link binds, and no bit depends on it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from storm_harness import devices, offload_everything, prove_everything
from torch import Tensor, nn

from overspill import Storm, TransferError
from overspill._edge import edge_for
from overspill._link import Code, Link


def compress_everything(model: nn.Module, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """STORM made to compress all that leaves: the link is all but dead, and nothing is rebuilt."""
    storm = offload_everything(model, rebuild=False, compress=True, **options)
    prove_everything(storm)
    storm._link_gbps = lambda: (1e-9, 1e-9)  # type: ignore[attr-defined]
    return storm


def layers(dtype: torch.dtype, device: str) -> nn.Module:
    """A seeded chain whose saved tensors have exponents worth coding, and are larger than a chunk."""
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*made).to(device, dtype)


class Cast(nn.Module):
    """A layer in another type than its input's."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Saves the cast input and the result."""
        return self.layer(x.to(self.layer.weight.dtype)).tanh()


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


class Noted:
    """An engine whose offloads are noted: bytes, and what they wait for."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.sent = engine, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def offload(self, address: int, nbytes: int, owner: Any, behind: Any) -> Any:
        """As the engine's."""
        self.sent.append((nbytes, type(behind).__name__))
        return self._engine.offload(address, nbytes, owner, behind)


@pytest.mark.parametrize("seed", range(8))
def test_codes_of_late_length_keep_the_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host learns lengths only when it has to: plain offloads wait behind codes, and leave in the order of compute."""
    asked: set[Code] = set()
    length = Code.length
    monkeypatch.setattr(Code, "is_known", lambda code: code in asked)
    monkeypatch.setattr(Code, "length", lambda code: (asked.add(code), length(code))[1])
    # Every second layer is in 32 bit, which the codec does not take.
    model = nn.Sequential(*(Cast(torch.bfloat16 if n % 2 else torch.float32) for n in range(6)))
    want = gradients(model, 0)
    storm = Storm(model, "1TiB", min_bytes=1, rebuild=False, compress=True, seed=seed, host_budget="8MiB")
    act, packed = storm._act, []

    def never_keeps(unit: Any, storage: Any, dtype: torch.dtype, _action: int) -> None:
        """Codes what it can, and sends the rest."""
        packed.append(dtype)
        act(unit, storage, dtype, 3 if dtype is torch.bfloat16 else 1)

    def releases(_model: nn.Module, _input: Any, _output: Tensor) -> None:
        """All that was packed, before backward asks for it."""
        assert len(noted.sent) < len(packed) or not planned
        while storm._transfers.leaving:
            unit = storm._transfers.leaving.popleft()()
            if unit is not None and unit.is_leaving:
                storm._transfers.release(unit)

    noted, planned = Noted(storm._engine), False
    storm._transfers.engine = noted  # type: ignore[assignment]
    with storm:
        gradients(model, 0)
        planned, storm._act = True, never_keeps  # type: ignore[method-assign]
        noted.sent.clear()
        model.register_forward_hook(releases)
        assert all(map(torch.equal, want, gradients(model, 0)))
    storm.close()
    whole = 300 * 64 * 4
    assert [nbytes == whole for nbytes, _ in noted.sent] == [dtype is torch.float32 for dtype in packed]
    waits = [behind for _, behind in noted.sent]
    assert waits[:2] == ["int", "int"], "nothing waits before the first code"
    assert set(waits[2:]) == {"NoneType", "Mark"}, "codes at once, the others behind their marks"


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
