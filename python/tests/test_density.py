"""The short experiment, whole: it passes, and every flaw of a run fails its verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from overspill._native import run_cli

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "bench" / "sessions"
TINY = CONFIGS / "cpu_tiny.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The folder of the sound run, and the checks that failed by flaw."""
    folder = tmp_path_factory.mktemp("sessions")
    worker = [sys.executable, str(Path(__file__).parent / "density_worker.py"), str(TINY), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(worker, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_the_report_of_a_sound_run(
    runs: tuple[Path, dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = runs
    monkeypatch.setenv("OVERSPILL_PYTHON", sys.executable)
    command = ["overspill", "bench", "sessions", str(TINY), "--out", str(folder), "--parts", "plot"]
    assert run_cli(command) == 0
    report = json.loads((folder / "report.json").read_text())
    figures, plan = report["verdict"]["figures"], report["plan"]
    assert figures["lost_sessions"] == figures["over_cap_bytes"] == 0
    assert plan["demand_bytes"] > plan["cap_bytes"]
    assert figures["restores"] >= plan["expected"]["restores"]
    pool = report["parts"]["pool"]
    assert all(len(tokens) == report["config"]["new_tokens"] for tokens in pool["tokens"].values())
    assert len(pool["timeline"]) > 10
    restores = [swap for swap in pool["swaps"] if swap["cause"] == "restore"]
    assert sum(swap["bytes"] for swap in restores) == figures["restored_bytes"]
    assert pool["pool"]["pool"]["onboarded_bytes"] >= figures["restored_bytes"]
    assert (folder / "report.svg").read_text().startswith("<?xml")


def test_every_flaw_fails_the_verdict(runs: tuple[Path, dict[str, list[str]]]) -> None:
    _, found = runs
    assert "the timeline stays under the cap" in found["ballast"]
    assert "tokens and logits are those of no swap" in found["corrupt"]
    assert "sessions were swapped" in found["lazy"]
    assert "no session was lost" in found["no host memory"]


def test_what_fits_under_the_cap_is_refused(tmp_path: Path) -> None:
    roomy = tmp_path / "roomy.yaml"
    roomy.write_text(TINY.read_text().replace("cap_gb: 0.1", "cap_gb: 1"))
    assert run_cli(["overspill", "bench", "sessions", str(roomy), "--plan"]) == 2


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_has_its_arithmetic(config: Path) -> None:
    assert run_cli(["overspill", "bench", "sessions", str(config), "--plan"]) == 0
