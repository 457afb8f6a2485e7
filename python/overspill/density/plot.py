"""A report as a picture: memory over time under its cap, every swap against the link, what others do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

OURS, OTHERS, LIMIT = "#1f6f8b", "#b9c3c9", "#b5402a"
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}


def plot(report: dict[str, Any], target: Path) -> int:
    """Draws ``report`` to ``target``; says so where there is no matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return 0
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    pool, baselines = report["parts"]["pool"] or {}, report["parts"]["baselines"] or {}
    ways = turns(baselines)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2 + bool(ways), 1, figsize=(7.5, 5.2 + 1.8 * bool(ways)))
        _memory(axes[0], report, pool)
        _swaps(axes[1], pool)
        if ways:
            _ways(axes[2], ways)
        verdict = "passed" if report["verdict"]["passed"] else "FAILED"
        figure.suptitle(
            f"{report['config']['name']} on {pool.get('machine', '?')}: {verdict}", x=0.02, ha="left"
        )
        figure.tight_layout()
        figure.savefig(target, metadata={"Date": None}, dpi=150)
    return 0


def _memory(axes: Any, report: dict[str, Any], pool: dict[str, Any]) -> None:
    plan, timeline = report["plan"], pool.get("timeline", [])
    axes.plot([at for at, _ in timeline], [used / 1e9 for _, used in timeline], color=OURS, lw=1)
    axes.axhline(plan["limit_bytes"] / 1e9, color=LIMIT, lw=1)
    axes.axhline(plan["demand_bytes"] / 1e9, color=OTHERS, lw=1, ls="--")
    end = timeline[-1][0] if timeline else 1
    axes.text(end, plan["limit_bytes"] / 1e9, "cap ", ha="right", va="bottom", color=LIMIT)
    axes.text(end, plan["demand_bytes"] / 1e9, "demand ", ha="right", va="bottom", color="#6b767c")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB in use")
    axes.set_title(f"memory in use: {pool.get('timeline_source', '?')}", loc="left")


def _swaps(axes: Any, pool: dict[str, Any]) -> None:
    colours = {"restore": OURS, "evict": "#d9a441", "write-through": OTHERS}
    origin = min((one["start_us"] for one in pool.get("swaps", []) if one["start_us"]), default=0.0)
    for cause, colour in colours.items():
        chosen = [one for one in pool.get("swaps", []) if one["cause"] == cause and one["copy_us"] > 0]
        if chosen:
            times = [(one["start_us"] - origin) / 1e6 for one in chosen]
            rates = [one["bytes"] / one["copy_us"] / 1e3 for one in chosen]
            # Thousands of points: a picture of them is smaller than they are.
            axes.plot(times, rates, ".", ms=4, color=colour, label=cause, rasterized=True)
    if "in_gbps" in pool.get("link", {}):
        axes.axhline(pool["link"]["in_gbps"], color=LIMIT, lw=1, label="link, in")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("GB/s")
    axes.set_title("every swap, and the link in the same run", loc="left")
    axes.legend(frameon=False, ncols=4, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 1.2))


def turns(baselines: dict[str, Any]) -> list[tuple[str, float]]:
    """Milliseconds of a session's turn, by way."""
    rows = baselines.get("rows", [])
    return [(one["way"], one["value"]) for one in rows if one["what"] == "turn" and one["value"] is not None]


def _ways(axes: Any, ways: list[tuple[str, float]]) -> None:
    names = [name for name, _ in ways]
    colours = [OURS if name == "overspill" else OTHERS for name in names]
    bars = axes.barh(names, [value for _, value in ways], color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("ms: a session comes back, generates its tokens of a turn alone, and leaves")
