"""Djinn's scheduler against other rules, simulated: ``results/djinn_scheduler.json``, and its two goals in
``results/djinn_density.json``, where other rows stay as they are.

    python bench/djinn_scheduler.py        # 5 minutes on one core; no GPU
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
# A disk on which 10,000 sessions have a place, should each grow to a slab.
ROOMY_GB = 17_000


def simulated(name: str, *options: str) -> dict[str, Any]:
    """What ``overspill sessions simulate`` found."""
    command = ["overspill", "sessions", "simulate", str(TRACES / f"{name}.json"), "--json", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows_of(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a rule and figure."""
    note = (
        f"simulated on recorded costs (H200, Llama-2-13B shape), {found['sessions']} sessions of "
        f"bench/traces/{name}.json, xxh3 {found['xxh3']}"
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


def ratio(found: dict[str, Any]) -> tuple[float, str, float, float]:
    """Sessions a second in time: Djinn's over the best static rule's, which that is, its own, the clairvoyant's."""
    by_name = {one["policy"]: one["sessions_per_s_in_time"] for one in found["policies"]}
    static = [one["policy"] for one in found["policies"] if one["is_static"]]
    best = max(static, key=lambda name: by_name[name])
    return by_name["djinn"] / by_name[best], best, by_name[best], by_name["clairvoyant"] / by_name[best]


def main() -> int:
    traces = {name: simulated(name, "--capacity") for name in ("agents", "coding")}
    with tempfile.TemporaryDirectory() as folder:
        roomy = Path(folder) / "machine.json"
        roomy.write_text(json.dumps({**json.loads(MACHINE.read_text()), "disk_gb": ROOMY_GB}))
        crowd = simulated("crowd", "--policy", "djinn", "--machine", str(roomy))["policies"][0]
    rows = [one for name, found in traces.items() for one in rows_of(name, found)]
    print(write_results("djinn_scheduler", rows))
    shares = {name: ratio(found) for name, found in traces.items()}
    value, best, best_per_s, clairvoyant = shares["coding"]
    other = shares["agents"]
    goals = [
        row(
            "djinn.decision_us_p99", crowd["decision_us_p99"], "us",
            note=f"one call of the scheduler, {crowd['decisions']} calls, bench/traces/crowd.json: 10,000 sessions "
            f"alive at once; median {crowd['decision_us_p50']:.2f}; the clock's own 0.03 included",
        ),
        row(
            "djinn.agents.vs_best_static_policy", value, "ratio", peer=best, peer_value=best_per_s,
            limit=f"{clairvoyant:.3f}: the same scheduler told every wait truly",
            note="sessions/s that may arrive with 99 of 100 turns' first token within 500 ms, over the best of lru, fifo, "
            "always-swap, never-swap and recompute under the same admission; simulated on recorded costs (H200, "
            "Llama-2-13B shape, 80 GB cap, 96 GB host, disk), bench/traces/coding.json, 10,000 sessions. On "
            f"bench/traces/agents.json it is {other[0]:.3f} (clairvoyant {other[3]:.3f}): compute binds there, and "
            "who has a slab hardly matters",
        ),
    ]  # fmt: skip
    for goal in goals:
        goal["note"] += f"; {machine()}; commit {commit()[:10]}"
    print(update_results("djinn_density", goals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
