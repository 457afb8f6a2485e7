"""Reports of session experiments as ``results/djinn_density.json``, a row a figure.

    overspill bench sessions bench/sessions/n50_13b.yaml --out target/n50
    python bench/djinn_density.py target/n50/report.json target/n100/report.json ...

It does not measure. Rows of the file that come from elsewhere (the scheduler's simulator) stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, row, write_results

GB = 1e9
# Figures of a verdict that become rows, with their units.
FIGURES = {
    "lost_sessions": "",
    "over_cap_bytes": "bytes",
    "most_bytes": "bytes",
    "restores": "",
    "restored_bytes": "bytes",
    "written_through_bytes": "bytes",
    "spilled_bytes": "bytes",
    "unspilled_bytes": "bytes",
    "restore_ms": "ms",
    "restore_share_of_link": "share",
    "turn_tokens_per_s": "tokens/s",
    "all_tokens_per_s": "tokens/s",
}


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    config, plan, verdict = report["config"], report["plan"], report["verdict"]
    name, figures = config["name"].removesuffix("_13b"), verdict["figures"]
    shape = f"{config['sessions']} sessions of {config['prompt_tokens']} tokens, {config['rows']} rows at most, {config['tokens_per_turn']} tokens a turn; Llama-2-13B shape, {config['model']['dtype']}, {config['model']['weights']} weights"
    demand = f"demand {plan['demand_bytes'] / GB:.1f} GB, cap {plan['cap_bytes'] / GB:.0f} GB"
    checks = "; ".join(f"{one['name']}: {one['detail']}" for one in verdict["checks"])
    rows = [
        row(f"djinn.{name}.passed", float(verdict["passed"]), "bool", limit=demand, note=f"{checks}; {shape}")
    ]
    for scope, what in (("turn", "turns after all prompts"), ("all", "prompts included")):
        ratio = figures[f"{scope}_throughput_vs_oracle"]
        if ratio is not None:
            goal = "throughput_vs_oracle" if scope == "turn" else "all_throughput_vs_oracle"
            peer = figures[f"{scope}_tokens_per_s"] / ratio
            note = f"{what}: {figures[f'{scope}_tokens_per_s']:.0f} of {peer:.0f} tokens/s; same turns, same rows; {shape}"
            rows.append(row(f"djinn.{name}.{goal}", ratio, "ratio", limit=demand, note=note))
    for figure, unit in FIGURES.items():
        if figures[figure] is not None:
            goal = "nvml_over_cap_bytes" if figure == "over_cap_bytes" else figure
            limit = demand
            if figure == "restore_share_of_link":
                limit = f"{figures['link_in_gbps']:.2f} GB/s, pinned copy in this run"
            rows.append(row(f"djinn.{name}.{goal}", figures[figure], unit, limit=limit, note=shape))
    for part, value in (report["parts"]["pool"] or {}).get("memory", {}).items():
        rows.append(row(f"djinn.{name}.memory.{part}", value, "bytes", limit=demand, note=shape))
    found = (report["parts"]["baselines"] or {}).get("rows", [])
    kept = {"sessions": config["sessions"], "in use through the pause": figures["most_bytes"]}
    return rows + ways(f"djinn.{name}", found, shape, kept)


def ways(prefix: str, found: list[dict[str, Any]], shape: str, kept: dict[str, int]) -> list[dict[str, Any]]:
    """What others do: beside overspill's own figure where there is one."""
    ours = kept | {one["what"]: one["value"] for one in found if one["way"] == "overspill"}
    rows = []
    for one in found:
        if one["way"] == "overspill":
            continue
        slug = re.sub(r"\W+", "_", f"{one['what']}.{one['way']}".replace(".", "-")).strip("_").lower()
        note = "; ".join(part for part in (one["note"], shape) if part)
        value = ours.get(one["what"])
        rows.append(
            row(
                f"{prefix}.way.{slug}",
                value,
                one["unit"],
                peer=one["way"],
                peer_value=one["value"],
                note=note,
            )
        )
    return rows


def main(paths: list[str]) -> int:
    reports = [json.loads(Path(path).read_text()) for path in paths]
    rows = [one for report in reports for one in rows_of(report)]
    target = RESULTS / "djinn_density.json"
    ours = {one["id"].split(".")[1] for one in rows}
    if target.exists():
        kept = json.loads(target.read_text())["rows"]
        rows = [one for one in kept if one["id"].split(".")[1] not in ours] + rows
    document = json.loads(write_results("djinn_density", rows).read_text())
    # The machine is the one that ran it, which may be another than this.
    parts = [report["parts"]["pool"] for report in reports]
    document["machine"] = ", ".join(sorted({part["machine"] for part in parts}))
    document["versions"] |= parts[0]["versions"]
    target.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
