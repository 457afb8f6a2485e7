"""Bad input and failing tiers: a typed error with the facts, nothing lost, and no bit wrong after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overspill import BudgetError, OverspillError, Storm, TransferError

MIB = 2**20


def wide_model(layers: int = 8) -> nn.Module:
    """Each layer saves 1 MiB for a batch of 1024."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Sigmoid()) for _ in range(layers)))


def gradients(model: nn.Module) -> list[Tensor]:
    """Gradients of one step."""
    model.zero_grad()
    model(torch.ones(1024, 256)).mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "budget",
    [
        "",
        "lots",
        "12 GiB please",
        "-1",
        -1,
        0,
        "0",
        "1e400",
        10**30,
        "9" * 40 + "TB",
        1.5,
        True,
        "12QiB",
        [],
        b"1",
    ],
)
@pytest.mark.parametrize("which", ["vram_budget", "host_budget", "spill_limit"])
def test_a_budget_that_is_no_byte_count(which: str, budget: Any) -> None:
    """Absurd, negative or unparseable: the error names the argument and what was asked."""
    arguments: dict[str, Any] = {"vram_budget": "1GiB", which: budget}
    with pytest.raises(BudgetError) as caught:
        Storm(wide_model(1), **arguments)
    assert which in str(caught.value)
    assert str(budget) in str(caught.value)
    assert isinstance(caught.value, OverspillError)


@pytest.mark.parametrize("text", ["64MiB", "64 mib", "67108864", 67108864, "64m", "0.0625GiB", " 64MiB "])
def test_budgets_as_people_write_them(text: int | str) -> None:
    """One budget in many spellings."""
    assert Storm(wide_model(1), vram_budget=text).vram_budget_bytes == 64 * MIB


def test_a_budget_below_the_parameters() -> None:
    """Refused before the first step, with what is needed and what there is."""
    model = wide_model()
    weights = sum(p.nbytes for p in model.parameters())
    with pytest.raises(BudgetError, match="parameters") as caught:
        Storm(model, vram_budget=weights)
    assert caught.value.requested_bytes == 2 * weights
    assert caught.value.available_bytes == weights
    assert caught.value.tier == "device"


def test_a_budget_below_the_largest_tensor() -> None:
    """Refused when it is saved; the process goes on, and a smaller batch goes through."""
    model = wide_model(1)
    weights = sum(p.nbytes for p in model.parameters())
    with Storm(model, vram_budget=2 * weights + MIB // 2, min_bytes=1) as storm:
        with pytest.raises(BudgetError, match="one saved tensor") as caught:
            model(torch.ones(1024, 256))
        assert caught.value.requested_bytes == MIB
        assert caught.value.available_bytes == MIB // 2
        assert caught.value.tier == "device"
        model(torch.ones(64, 256)).sum().backward()
    assert storm.report()["live_units"] == 0


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_spill_folder_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    """Refused at once, naming the folder and what to do."""
    folder = tmp_path / "spill"
    if kind == "file":
        folder.write_text("")
    with pytest.raises(TransferError, match="spill-dir") as caught:
        Storm(wide_model(1), vram_budget="1GiB", spill_dir=str(folder))
    assert str(folder) in str(caught.value)
    assert caught.value.tier == "disk"


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root may write anywhere, so root becomes somebody else for the test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_an_unwritable_spill_folder(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As above, by permission."""
    tmp_path.chmod(0o555)
    model = wide_model(1)
    request.getfixturevalue("nobody")
    with pytest.raises(TransferError, match="spill-dir") as caught:
        Storm(model, vram_budget="1GiB", spill_dir=str(tmp_path), spill_limit="1MiB")
    assert "denied" in str(caught.value)


def test_a_disk_without_room() -> None:
    """A file system with nothing free says so before the first step."""
    with pytest.raises(BudgetError, match="spill-dir") as caught:
        Storm(wide_model(1), vram_budget="1GiB", spill_dir="/proc", spill_limit="1MiB")
    assert (caught.value.tier, caught.value.requested_bytes, caught.value.available_bytes) == ("disk", MIB, 0)


def refusal(model: nn.Module) -> dict[str, Any]:
    """The facts of the error that a step ends in, without its traceback, which holds the step's tensors."""
    try:
        gradients(model)
    except BudgetError as error:
        return {**vars(error), "says": str(error)}
    pytest.fail("the step went through")


def test_a_full_disk(tmp_path: Path) -> None:
    """A step that needs more than host and disk hold fails with the facts; one that fits still works."""
    expected = gradients(wide_model(2))
    model = wide_model()
    with Storm(
        model, vram_budget="16MiB", host_budget="1MiB", spill_dir=str(tmp_path), spill_limit="4MiB"
    ) as storm:
        for _ in range(3):
            refused = refusal(model)
            assert refused["tier"] in ("disk", "host")
            assert refused["requested_bytes"] > refused["available_bytes"]
            assert "spill" in refused["says"]
        model.zero_grad()
        model[:2](torch.ones(1024, 256)).mean().backward()
        got = [p.grad for p in model[:2].parameters()]
    assert all(map(torch.equal, expected, got))
    storm.close()
    report = storm.report()
    assert (report["live_units"], report["pool"]["bytes_in_use"], report["disk_bytes"]) == (0, 0, 0)


def test_no_disk_and_a_full_host(tmp_path: Path) -> None:
    """A host budget of one segment and a disk: every byte passes through that one segment."""
    expected = gradients(wide_model())
    model = wide_model()
    with Storm(model, vram_budget="16MiB", host_budget="1MiB", spill_dir=str(tmp_path)) as storm:
        for _ in range(3):
            assert all(map(torch.equal, expected, gradients(model)))
    assert storm.report()["pool"]["bytes_reserved"] <= MIB
    assert storm.report()["flows"]["spill"]["bytes"] >= 3 * 7 * MIB


def test_the_spill_file_is_gone_afterwards(tmp_path: Path) -> None:
    """Unlinked or removed: the folder is as it was, even while it is in use or after a crash."""
    model = wide_model()
    with Storm(model, vram_budget="16MiB", host_budget="1MiB", spill_dir=str(tmp_path)):
        gradients(model)
    del model
    assert list(tmp_path.iterdir()) == []


def test_a_model_on_no_supported_device() -> None:
    """Meta tensors hold nothing to offload."""
    with pytest.raises(OverspillError, match="meta"):
        Storm(nn.Linear(4, 4, device="meta"), vram_budget="1GiB")


def test_a_model_without_parameters() -> None:
    """Nothing to ask the device of: the CPU."""
    x = torch.ones(1024, 64, requires_grad=True)
    with Storm(nn.Sigmoid(), vram_budget="16MiB") as storm:
        nn.Sigmoid()(x + 1).sum().backward()
    assert storm.report()["units"]["offloaded"] == 1
