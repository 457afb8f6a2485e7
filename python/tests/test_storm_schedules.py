"""Thousands of seeded schedules of the simulated device, and bugs planted in it that they must find.

Each seed is a short training run in which copies, disk operations and waits are interleaved, split and
delayed as the seed says. A failure names its seed. ``OVERSPILL_SCHEDULES`` sets how many seeds run.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from storm_harness import keep_everything, offload_everything
from torch import Tensor, nn

from overspill import _native
from overspill._transfers import Transfers

SCHEDULES = int(os.environ.get("OVERSPILL_SCHEDULES", "2000"))
PAGE = 4096


class Chain(nn.Module):
    """Layers that save outputs, inputs and a shared mask, of sizes around a segment of the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 48) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        keep = x > -1
        for layer in self.layers:
            x = torch.where(keep, torch.sigmoid(layer(x)) * x, x)
        return x.square().mean()


def steps(model: nn.Module, count: int = 3) -> list[Tensor]:
    """Gradients of a few steps of growing batch, one graph abandoned and one used twice on the way."""
    got = []
    for n in range(count):
        model.zero_grad()
        x = torch.full((16 * (n + 1), 48), 0.5)
        abandoned = model(x)
        loss = model(x)
        loss.backward(retain_graph=True)
        del abandoned
        loss.backward()
        got += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return got


def fresh() -> nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    return Chain()


@functools.cache
def expected() -> tuple[Tensor, ...]:
    """Without offloading."""
    return tuple(steps(fresh()))


def differs(seed: int, wrap: Any, **options: Any) -> bool:
    """Whether a run under the schedule ``seed`` comes out wrong, in its bits or in its counters."""
    model = fresh()
    with wrap(model, seed=seed, **options) as storm:
        got = steps(model)
    storm.close()
    report = storm.report()
    left = (report["live_units"], report["held_bytes"], report["pool"]["bytes_in_use"], report["disk_bytes"])
    return left != (0, 0, 0, 0) or not all(map(torch.equal, expected(), got))


@pytest.mark.parametrize("part", range(10))
def test_every_schedule_gives_the_same_bits(part: int, tmp_path: Path) -> None:
    """Host memory only, host and disk, and disk through two pages of host memory; all out, or what fits kept."""
    for seed in range(part, SCHEDULES, 10):
        wrap = keep_everything if seed // 10 % 4 == 0 else offload_everything
        options: dict[str, Any] = {"spill_dir": str(tmp_path), "spill_limit": "8MiB"}
        options["host_budget"] = (256 * PAGE, 16 * PAGE, 4 * PAGE)[seed // 10 % 3]
        assert not differs(seed, wrap, **options), f"seed {seed}, {wrap.__name__}, {options}"


PLANTED = """
import functools, sys
from overspill import _host, _native
from test_storm_schedules import PAGE, differs, offload_everything

bug, folder = sys.argv[1:]
if bug != "none":
    _host.Engine = functools.partial(_native.Engine, planted=bug)
for seed in range(50):
    if differs(seed, offload_everything, spill_dir=folder, spill_limit="8MiB", host_budget=16 * PAGE):
        sys.exit(3)
"""


@pytest.mark.parametrize("bug", ["none", "events_pass_early", "stream_waits_ignored"])
def test_a_planted_ordering_bug_is_found(bug: str, tmp_path: Path) -> None:
    """Sources and slots given up before their copies have passed; waits between streams that do nothing.

    In a process of its own: what a freed destination is overwritten with may as well be the heap.
    """
    ended = subprocess.run(
        [sys.executable, "-c", PLANTED, bug, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if bug == "none":
        assert ended.returncode == 0, ended.stderr
    else:
        assert ended.returncode == 3 or ended.returncode < 0, ended.stderr


def test_a_source_freed_before_its_event_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Planted in the edge: the storage goes back to torch while its copy is still to run."""
    real = Transfers.release_sources

    def early(transfers: Transfers) -> None:
        for reference in list(transfers.leaving):
            unit = reference()
            if unit is not None and unit.source is not None:
                transfers.forget_source(unit)
        transfers.leaving.clear()
        real(transfers)

    class Ownerless:
        """An engine whose leases keep nothing alive."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.engine = _native.Engine(*args, **options)

        def offload(self, address: int, nbytes: int, _owner: object, stream: int) -> Any:
            return self.engine.offload(address, nbytes, None, stream)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engine, name)

    monkeypatch.setattr("overspill._host.Engine", Ownerless)
    monkeypatch.setattr(Transfers, "release_sources", early)
    options = {"spill_dir": str(tmp_path), "spill_limit": "8MiB", "host_budget": 256 * PAGE}
    assert any(differs(seed, offload_everything, **options) for seed in range(50))
