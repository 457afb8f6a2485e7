"""Djinn's scheduler against other rules, simulated: ``results/djinn_scheduler.json``, and its two goals in
``results/djinn_density.json``, where other rows stay as they are.

    python bench/djinn_scheduler.py        # 10 minutes on one core; no GPU
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import commit, machine, row, update_results, write_results

TRACES = Path(__file__).parent / "traces"
MACHINE = Path(__file__).parent.parent / "crates/overspill-cli/machines/h200_llama13b.json"
# The cap and the host memory of bench/sessions/agents.yaml: 60 GB less weights and workspace, and 64 GB.
SMALLER = {"slabs": 18, "seats": 16, "host_gb": 64}
# A disk on which 10,000 sessions have a place, should each grow to a slab.
ROOMY_GB = 17_000


def simulated(name: str, *options: str) -> dict[str, Any]:
    """What ``overspill sessions simulate`` found."""
    command = ["overspill", "sessions", "simulate", str(TRACES / f"{name}.json"), "--json", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def changed(folder: Path, name: str, **change: float) -> str:
    """A machine's file: the recorded one but for some figures."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**json.loads(MACHINE.read_text()), **change}))
    return str(path)


def rows_of(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a rule and figure."""
    trace, _, where = name.partition("_")
    note = (
        f"simulated on recorded costs (H200, Llama-2-13B shape{where and ', 60 GB cap, 16 seats, 64 GB host'}), "
        f"{found['sessions']} sessions of bench/traces/{trace}.json, xxh3 {found['xxh3']}"
    )
    rows = []
    for one in found["policies"]:
        for figure, unit in (
            ("sessions_per_s_in_time", "sessions/s"),
            ("tokens_per_s", "tokens/s"),
            ("first_ms_p50", "ms"),
            ("first_ms_p99", "ms"),
            ("turns_late", "turns"),
            ("lost_sessions", "sessions"),
        ):
            if one[figure] is not None:
                identity = f"djinn_scheduler.{name}.{one['policy']}.{figure}"
                rows.append(row(identity, one[figure], unit, note=note))
    return rows


def ratios(found: dict[str, Any]) -> tuple[str, float, dict[str, float]]:
    """The best static rule, its sessions a second in time, and every other rule's over it."""
    by_name = {one["policy"]: one["sessions_per_s_in_time"] for one in found["policies"]}
    best = max(
        (one["policy"] for one in found["policies"] if one["is_static"]), key=lambda name: by_name[name]
    )
    return best, by_name[best], {name: value / by_name[best] for name, value in by_name.items()}


def agents_goal(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over the best static rule where memory is what is short, and what it is elsewhere."""
    best, best_per_s, small = ratios(found["coding_60gb"])
    large, other = ratios(found["coding"])[2], ratios(found["agents"])[2]
    return row(
        "djinn.agents.vs_best_static_policy", small["djinn-discard"], "ratio", peer=best, peer_value=best_per_s,
        limit=f"{small['clairvoyant']:.3f}: the same scheduler told every wait truly",
        note="sessions/s that may arrive with 99 of 100 turns' first token within 500 ms, over the best of lru, fifo, "
        "always-swap, never-swap and recompute under the same admission; simulated on recorded costs (H200, "
        "Llama-2-13B shape), bench/traces/coding.json, 10,000 sessions; preserve, swap or discard, under the cap and "
        "host memory of bench/sessions/agents.yaml (60 GB, 64 GB). Without discard, as the pool runs it since a "
        f"prefill gives other bits: {small['djinn']:.3f}. With an 80 GB cap and 96 GB of host memory "
        f"{large['djinn']:.3f} (clairvoyant {large['clairvoyant']:.3f}): compute is full there before memory is; on "
        f"bench/traces/agents.json {other['djinn']:.3f} (clairvoyant {other['clairvoyant']:.3f}) for the same reason",
    )  # fmt: skip


def main() -> int:
    found = {name: simulated(name, "--capacity") for name in ("agents", "coding")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smaller = changed(folder, "smaller", **SMALLER)
        found["coding_60gb"] = simulated("coding", "--capacity", "--machine", smaller)
        roomy = changed(folder, "roomy", disk_gb=ROOMY_GB)
        crowd = simulated("crowd", "--policy", "djinn", "--machine", roomy)["policies"][0]
    rows = [one for name, report in found.items() for one in rows_of(name, report)]
    print(write_results("djinn_scheduler", rows))
    decision = row(
        "djinn.decision_us_p99", crowd["decision_us_p99"], "us",
        note=f"one call of the scheduler, {crowd['decisions']} calls, bench/traces/crowd.json: 10,000 sessions "
        f"alive at once; median {crowd['decision_us_p50']:.2f}; the clock's own 0.03 included",
    )  # fmt: skip
    goals = [decision, agents_goal(found)]
    for goal in goals:
        goal["note"] += f"; {machine()}; commit {commit()[:10]}"
    print(update_results("djinn_density", goals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
