"""Draws docs/figures/*.svg from bench/results/*.json: one figure a result file, nothing where there is none.

A figure holds only what its file holds, with the machine and the commit below it. It does not measure.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from common import RESULTS

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
OURS, OTHERS = "#1f6f8b", "#b9c3c9"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    # Text stays text, and the same data gives the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "overspill",
}
STEP_PEERS = ("xor + zstd-1", "16-bit gaps + values + zstd-1")


def tpde_cpu(document: dict[str, Any]) -> plt.Figure:
    """Ratio of every real step: TPDE, two peers on the same bytes, and the entropy bound."""
    steps: dict[str, dict[str, float]] = {}
    for row in document["rows"]:
        name = row["id"].removeprefix("tpde_cpu.step.")
        if name == row["id"]:
            continue
        step = steps.setdefault(name, {"TPDE": row["value"], "limit": row["limit"]})
        step[row["peer"]] = row["peer_value"]
    ordered = sorted(steps.items(), key=lambda item: item[1]["TPDE"])
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(ordered) + 1.4))
    for n, (label, colour) in enumerate(
        (("TPDE", OURS), (STEP_PEERS[0], "#d9a441"), (STEP_PEERS[1], OTHERS))
    ):
        places = [y + 0.26 * (1 - n) for y in range(len(ordered))]
        axes.barh(places, [step[label] for _, step in ordered], height=0.26, color=colour, label=label)
    bounds = [step["limit"] for _, step in ordered]
    axes.plot(
        bounds,
        [y + 0.26 for y in range(len(ordered))],
        "|",
        color="black",
        ms=9,
        label="entropy given tensor and base exponent",
    )
    axes.set_yticks(
        range(len(ordered)), [re.sub(r"\.(\d+)_(\d+)$", r", step \1 to \2", n) for n, _ in ordered]
    )
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel("times smaller than the raw checkpoint (log scale)")
    axes.set_title("TPDE on real fine-tune steps of two trained models", loc="left")
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def storm_v1(document: dict[str, Any]) -> plt.Figure | None:
    """Step time against activation peak, a panel a width, both as shares of keep-all."""
    points: dict[int, list[tuple[str, float, float]]] = {}
    for row in document["rows"]:
        found = re.fullmatch(r"storm_v1\.h(\d+)\.(\w+)", row["id"])
        share = re.search(r"([\d.]+) of keep-all", row["note"] or "")
        if found and share and row["unit"] == "ms":
            ratio = row["value"] / row["peer_value"]
            points.setdefault(int(found[1]), []).append((found[2], float(share[1]), ratio))
    if not points:
        return None
    figure, panels = plt.subplots(1, len(points), figsize=(3.6 * len(points), 3.6), squeeze=False)
    for axes, (width, methods) in zip(panels[0], sorted(points.items()), strict=True):
        for name, share, ratio in methods:
            axes.plot(share, ratio, "o", color=OURS if name.startswith("storm") else OTHERS)
            axes.annotate(
                name.replace("_", " "), (share, ratio), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
        axes.set_title(f"h = {width}", loc="left")
        axes.set_xlabel("activation peak / keep-all")
        axes.set_ylabel("step time / keep-all")
        axes.set_xlim(0, 1.25)
    return figure


def djinn_sessions(document: dict[str, Any]) -> plt.Figure | None:
    """What a session costs, in milliseconds, beside plain transformers and PyTorch."""
    names = {
        "djinn.swap_out_ms": "a session leaves",
        "djinn.swap_in_ms": "it comes back",
        "djinn.decode_ms_13b": "a decode step",
    }
    rows = [row for row in document["rows"] if row["id"] in names and row["peer_value"]]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 0.75 * len(rows) + 1.2))
    for y, row in enumerate(reversed(rows)):
        for offset, label, value, colour in (
            (0.18, names[row["id"]], row["value"], OURS),
            (-0.18, row["peer"], row["peer_value"], OTHERS),
        ):
            axes.barh(y + offset, value, height=0.34, color=colour)
            axes.annotate(
                f"{label}: {value:.1f} ms", (value, y + offset), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
    axes.set_yticks([])
    axes.set_xscale("log")
    axes.set_xlim(1, 4e4)
    axes.set_xlabel("milliseconds (log scale)")
    axes.set_title("Djinn: one session of 2048 tokens of a 13B shape, fp16, random weights", loc="left")
    return figure


def nvml(document: dict[str, Any]) -> plt.Figure:
    """The driver's own figure of the used memory over a run, and what it is held against."""
    figure, axes = plt.subplots(figsize=(7.5, 3))
    axes.plot(document["seconds"], [used / 1e9 for used in document["used_bytes"]], color=OURS)
    for height, label in document["marks"]:
        axes.axhline(height / 1e9, color=OTHERS, lw=1)
        axes.annotate(label, (0, height / 1e9), xytext=(2, 3), textcoords="offset points", fontsize=8)
    axes.set_ylim(0, max(height for height, _ in document["marks"]) / 1e9 * 1.12)
    axes.set_xlabel("seconds")
    axes.set_ylabel("GB used (NVML)")
    axes.set_title(document["title"], loc="left")
    return figure


def storm_timeline(document: dict[str, Any]) -> plt.Figure:
    """When kernels ran and when copies did, in one step, as the profiler saw it."""
    figure, axes = plt.subplots(figsize=(9, 2.2))
    lanes = (("kernels", "#6b7b83"), ("offload", OURS), ("onboard", "#d9a441"))
    for y, (lane, colour) in enumerate(reversed(lanes)):
        bars = [(begin / 1e3, (end - begin) / 1e3) for begin, end in document[lane]]
        axes.broken_barh(bars, (y - 0.38, 0.76), color=colour, lw=0, rasterized=True)
    axes.set_yticks(range(3), [name for name, _ in reversed(lanes)])
    axes.set_xlabel("milliseconds")
    axes.set_title(document["title"], loc="left")
    return figure


def djinn_scheduler(document: dict[str, Any]) -> plt.Figure:
    """Sessions a second in time, a panel a trace, a bar a rule; simulated."""
    panels: dict[str, dict[str, float]] = {}
    for row in document["rows"]:
        _, trace, rule, figure = row["id"].split(".")
        if figure == "sessions_per_s_in_time":
            panels.setdefault(trace, {})[rule] = row["value"]
    figure, axes = plt.subplots(1, len(panels), figsize=(8, 2.8), squeeze=False)
    for place, (trace, bars) in zip(axes[0], panels.items(), strict=True):
        ordered = sorted(bars.items(), key=lambda item: item[1])
        colours = [OURS if rule.startswith("djinn") else OTHERS for rule, _ in ordered]
        place.barh([rule for rule, _ in ordered], [value for _, value in ordered], color=colours)
        place.set_title(f"{trace}, simulated", loc="left")
        place.set_xlabel("sessions/s, 99% of turns in time")
    return figure


DRAWN = {
    "tpde_cpu": tpde_cpu,
    "storm_v1": storm_v1,
    "djinn_sessions": djinn_sessions,
    "series/storm_capacity_nvml": nvml,
    "series/storm_24gb_full_nvml": nvml,
    "series/storm_24gb_lora_nvml": nvml,
    "series/storm_timeline": storm_timeline,
    "series/tpde_80gb_nvml": nvml,
    "djinn_scheduler": djinn_scheduler,
}


def main() -> None:
    """Draws what there are results for, and says what was drawn."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        source = RESULTS / f"{name}.json"
        if not source.exists():
            print(f"{name}: no {source.name}, nothing drawn")
            continue
        document = json.loads(source.read_text())
        with plt.rc_context(STYLE):
            figure = draw(document)
            if figure is None:
                print(f"{name}: no rows that the figure needs, nothing drawn")
                continue
            caption = f"{document['machine']}; commit {document['commit'][:10]}; {document['date'][:10]}"
            figure.tight_layout()
            figure.text(0.01, -0.02, textwrap.fill(caption, 110), fontsize=7, color="#555555", va="top")
            path = FIGURES / f"{source.stem}.svg"
            figure.savefig(path, dpi=200, bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
        print(path.relative_to(FIGURES.parent.parent))


if __name__ == "__main__":
    main()
