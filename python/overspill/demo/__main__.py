"""The demo: keep-all and STORM, a process each, compared bit for bit and byte for byte; their steps in a chain."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from overspill._units import format_bytes

from .chain import keep_in_chain, print_chain
from .data import BATCH, SEQUENCE, STEPS, prepare


def main() -> int:
    """Runs the demo; 0 when the run under the budget was identical and within the budget."""
    options = _options()
    out = Path(options.out)
    model_dir = out / "smollm2-135m"
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    print("SmolLM2-135M, fp32, full fine-tune with SGD on the standard library's sources")
    print(f"{options.steps} steps of {options.batch} x {options.sequence} tokens on {_device_name(device)}\n")
    prepare(model_dir, options.steps * options.batch * options.sequence)
    common = {
        "model_dir": str(model_dir),
        "device": device,
        "steps": options.steps,
        "batch": options.batch,
        "sequence": options.sequence,
        "spill_dir": str(out),
    }
    states = out / "states"
    shutil.rmtree(states, ignore_errors=True)
    states.mkdir()
    first = {"name": "keep-all", "budget_bytes": None, "repeat_first": True, "save_to": str(states)}
    keep_all = _run(out, {**common, **first})
    demand = keep_all["os_peak_bytes"] - keep_all["os_start_bytes"]
    budget = int(demand * options.share)
    # A GPU's driver also counts what PyTorch's allocator rounds up and keeps, and kernels loaded later: 4 % of
    # the budget on an H200. STORM counts tensors.
    allowed = budget if device == "cpu" else budget * 9 // 10
    second = {"name": "storm", "budget_bytes": allowed, "repeat_first": False, "save_to": None}
    storm = _run(out, {**common, **second})
    report = _report(keep_all, storm, demand, (budget, allowed), device)
    files = [states / f"step-{step}.safetensors" for step in range(options.steps + 1)]
    report |= keep_in_chain(files, out / "chain")
    shutil.rmtree(states)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _print_table(report)
    print_chain(report)
    print(f"\n{out / 'report.json'} has all of it; {time.perf_counter() - begin:.0f} s in all")
    return 0 if report["storm.ok"] and report["chain.bit_identical"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m overspill.demo", description=__doc__)
    parser.add_argument("--out", default="target/demo", help="folder for the report and the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--sequence", type=int, default=SEQUENCE, help="tokens per sequence")
    parser.add_argument("--share", type=float, default=0.5, help="budget as a share of what keep-all held")
    return parser.parse_args()


def _run(out: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """One training run in a fresh process, so that the operating system's peak is its own."""
    path = out / f"{spec['name']}.json"
    path.write_text(json.dumps(spec))
    # On a GPU the driver's figure is compared: segments that grow leave no holes that it would count.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    subprocess.run([sys.executable, "-m", "overspill.demo.train", str(path)], check=True, env=environment)
    return json.loads(path.with_suffix(".result.json").read_text())


def _report(
    keep_all: dict[str, Any], storm: dict[str, Any], demand: int, budgets: tuple[int, int], device: str
) -> dict[str, Any]:
    same = ("loss_hex", "gradients")
    pairs = list(zip(keep_all["steps"], storm["steps"], strict=True))
    identical = all(a[key] == b[key] for a, b in pairs for key in same)
    repeats = all(keep_all["repeated"][key] == keep_all["steps"][0][key] for key in same)
    flows = storm["storm"]["flows"]
    peak = storm["os_peak_bytes"] - storm["os_start_bytes"]
    budget, allowed = budgets
    within = peak <= budget
    return {
        "storm.demand_bytes": demand,
        "storm.budget_bytes": budget,
        "storm.allowed_bytes": allowed,
        "storm.peak_device_bytes": storm["storm"]["peak_bytes"] - storm["held_before_bytes"],
        "storm.os_growth_bytes": peak,
        "storm.os_peak_bytes_baseline": keep_all["os_peak_bytes"],
        "storm.os_peak_bytes_storm": storm["os_peak_bytes"],
        "storm.offloaded_bytes": flows.get("offload", {}).get("bytes", 0),
        "storm.spilled_bytes": flows.get("spill", {}).get("bytes", 0),
        "storm.step_ms_baseline": _median_ms(keep_all),
        "storm.step_ms_storm": _median_ms(storm),
        "storm.losses_baseline": [step["loss"] for step in keep_all["steps"]],
        "storm.losses_storm": [step["loss"] for step in storm["steps"]],
        "storm.baseline_repeats_itself": repeats,
        "storm.bit_identical": identical,
        "storm.within_budget": within,
        "storm.ok": identical and repeats and within and flows.get("offload", {}).get("bytes", 0) > 0,
        "device": device,
        "storm.report": storm["storm"],
    }


def _median_ms(result: dict[str, Any]) -> float:
    times = sorted(step["ms"] for step in result["steps"])
    return times[len(times) // 2]


def _print_table(report: dict[str, Any]) -> None:
    size = lambda key: format_bytes(report[f"storm.{key}"])  # noqa: E731
    seconds = lambda key: f"{report[f'storm.step_ms_{key}'] / 1e3:.2f} s"  # noqa: E731
    rows = [
        ("", "keep-all", "storm"),
        ("memory for training (OS)", size("demand_bytes"), size("os_growth_bytes")),
        ("  budget", "none", size("budget_bytes")),
        ("  of it for tensors", "", size("allowed_bytes")),
        ("  overspill's own count", "", size("peak_device_bytes")),
        ("process peak (OS)", size("os_peak_bytes_baseline"), size("os_peak_bytes_storm")),
        ("offloaded", "0 B", size("offloaded_bytes")),
        ("step time, median", seconds("baseline"), seconds("storm")),
        *(
            (f"loss, step {n + 1}", f"{a:.6f}", f"{b:.6f}")
            for n, (a, b) in enumerate(
                zip(report["storm.losses_baseline"], report["storm.losses_storm"], strict=True)
            )
        ),
    ]
    print()
    for name, first, second in rows:
        print(f"{name:<28}{first:>14}{second:>14}")
    verdict = "identical, bit for bit" if report["storm.bit_identical"] else "DIFFERENT"
    print(f"\nlosses and all gradients: {verdict}")
    if not report["storm.baseline_repeats_itself"]:
        print("the baseline does not repeat itself: the comparison says nothing")
    if not report["storm.within_budget"]:
        print("the budget was NOT kept")


def _device_name(device: str) -> str:
    if device == "cpu":
        return f"the CPU ({torch.get_num_threads()} threads): RAM is the device tier, disk is next"
    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    sys.exit(main())
