"""STORM against keeping everything: half and a quarter of the memory, at what cost, and against its peers.

Llama blocks (transformers' own decoder layers, random weights, bf16, SDPA), 16,384 tokens in four
sequences of 4,096 unless a part says otherwise, no optimizer, torch's default algorithms. A part is a
model and a budget: ``k``-x is keep-all's saved bytes (what a forward leaves allocated) over k, on top of
parameters, gradients and the input. All methods of a part run in one process, one after the other;
overhead is the median step over keep-all's median. Beside each figure stands what the simulator says the
plan costs at best, over the same recorded step without any transfer or rebuild.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from storm_v1 import GB, Blocks, checkpointing, raw_link, timed_hooks, trl_offload

import overspill
from common import row, write_results
from overspill import Storm


@dataclass
class Part:
    """One row of the table."""

    width: int
    layers: int
    divisor: float
    sequence: int = 4_096
    sequences: int = 4


PARTS = {
    "h4096_2x": Part(4096, 8, 2),
    "h8192_2x": Part(8192, 4, 2),
    "h2048_2x": Part(2048, 16, 2),
    "h8192_4x": Part(8192, 12, 4),
    "h4096_2x_seq32k": Part(4096, 4, 2, 32_768, 1),
    "h4096_4x": Part(4096, 8, 4),
    "h4096_5x": Part(4096, 8, 5.1),
}


def step_times(model: Blocks, x: torch.Tensor, context: Any, warmup: int, steps: int) -> tuple[float, int]:
    """Median step in ms and most bytes allocated, after ``warmup`` steps."""
    times, peak = [], 0
    with context:
        for n in range(warmup + steps):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            x.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            model(x).backward()
            end.record()
            torch.cuda.synchronize()
            if n >= warmup:
                times.append(begin.elapsed_time(end))
                peak = max(peak, torch.cuda.max_memory_allocated())
    return statistics.median(times), peak


def saved_bytes(model: Blocks, x: torch.Tensor) -> int:
    """What a forward leaves allocated."""
    before = torch.cuda.memory_allocated()
    loss = model(x)
    torch.cuda.synchronize()
    saved = torch.cuda.memory_allocated() - before
    del loss
    return saved


def bench(name: str, part: Part, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method on one part."""
    torch.manual_seed(0)
    model = Blocks(part.width, part.layers).to("cuda", torch.bfloat16)
    x = torch.randn(part.sequences, part.sequence, part.width, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_(True)
    model(x).backward()
    x.grad = None
    fixed = torch.cuda.memory_allocated()
    saved = saved_bytes(model, x)
    keep_ms, keep_peak = step_times(model, x, contextlib.nullcontext(), 2, options.steps)
    rows: list[dict[str, Any]] = []

    def say(method: str, ms: float, peak: int, note: str = "") -> None:
        text = f"{name:<18} {method:<14} {ms:8.1f} ms {ms / keep_ms:6.3f}x"
        print(f"{text}  peak {(peak - fixed) / GB:6.2f} GB = {(peak - fixed) / saved:5.3f} of saved {note}")

    say("keep_all", keep_ms, keep_peak, f"saved {saved / GB:.2f} GB")
    budget = fixed + int(saved / part.divisor)
    hooks: list[float] = []
    for variant in options.variants:
        storm = Storm(
            model, vram_budget=budget, host_budget=options.host_budget, rebuild=variant != "offload"
        )
        if variant == "hooks":
            hooks = timed_hooks(storm)
        begin = time.perf_counter()
        ms, peak = step_times(model, x, storm, 6, options.steps)
        wall_s = time.perf_counter() - begin
        storm.close()
        report = storm.report()
        predicted = report["predicted"]
        say(f"storm:{variant}", ms, peak, f"{wall_s:.1f} s in all")
        shown = {k: round(v / (1e3 if k.endswith("_us") else GB), 2) for k, v in predicted.items()}
        print(f"    predicted (ms, GB): {shown}; units {report['units']}; over {report['over_budget_bytes']}")
        print(f"    flows {report['flows']}")
        if hooks:
            print(f"    hooks: median {statistics.median(hooks):.1f} us of {len(hooks)}")
        folder = os.environ.get("OUT")
        if folder and options.dump and variant == "rebuild":
            dump = {"record": json.loads(storm._planner.record_json() or "null")}
            dump["plan"] = json.loads(storm._planner.plan_json() or "null")
            dump["budget"], dump["keep_ms"], dump["ms"], dump["fixed"] = budget, keep_ms, ms, fixed
            (Path(folder) / f"plan_{name}.json").write_text(json.dumps(dump))
        if variant == "rebuild":
            rows += storm_rows(name, part, ms, peak, keep_ms, fixed, saved, report)
        del storm
        gc.collect()
        torch.cuda.empty_cache()
    for peer in options.peers:
        with contextlib.suppress(KeyError):
            ms, peak = run_peer(peer, model, x, options.steps)
            say(peer, ms, peak)
            rows.append(
                row(
                    f"storm_limit.{name}.{peer}",
                    ms / keep_ms * 100 - 100,
                    "%",
                    note=f"activation peak {(peak - fixed) / saved:.3f} of saved bytes",
                )
            )
    return rows


def storm_rows(
    name: str,
    part: Part,
    ms: float,
    peak: int,
    keep_ms: float,
    fixed: int,
    saved: int,
    report: dict[str, Any],
) -> list[dict[str, Any]]:
    """The goals' rows of one STORM run."""
    predicted = report["predicted"]
    own_ms = (predicted["stall_us"] + predicted["rebuild_us"]) / 1e3
    bound = own_ms / (predicted["step_us"] / 1e3 - own_ms) * 100
    note = (
        f"{part.layers} layers, {part.sequences} x {part.sequence} tokens, random weights, bf16, no optimizer; "
        f"{ms:.1f} against {keep_ms:.1f} ms; activation peak {(peak - fixed) / GB:.3f} GB = "
        f"{(peak - fixed) / saved:.4f} of {saved / GB:.3f} GB saved; rebuilt "
        f"{predicted['rebuilt_bytes'] / GB:.2f}, offloaded {predicted['offloaded_bytes'] / GB:.2f} GB"
    )
    rows = [
        row(
            f"storm.overhead_pct.{name}",
            ms / keep_ms * 100 - 100,
            "%",
            peer="keep-all",
            peer_value=keep_ms,
            limit=f"simulator: {bound:.2f}%",
            note=note,
        )
    ]
    if name == "h4096_2x":
        step_error = abs(predicted["step_us"] / 1e3 / ms - 1) * 100
        peak_error = abs(predicted["peak_bytes"] / peak - 1) * 100
        rows.append(row("storm.peak_prediction_err_pct", peak_error, "%", note="of all bytes allocated"))
        rows.append(row("storm.step_prediction_err_pct", step_error, "%"))
    return rows


def run_peer(peer: str, model: Blocks, x: torch.Tensor, steps: int) -> tuple[float, int]:
    """Median ms and peak of another method."""
    if peer == "checkpointing":
        model.checkpoint = checkpointing
        try:
            return step_times(model, x, contextlib.nullcontext(), 2, steps)
        finally:
            model.checkpoint = None
    if peer == "save_on_cpu":
        return step_times(model, x, torch.autograd.graph.save_on_cpu(pin_memory=True), 1, 2)
    context = trl_offload(model) if peer == "trl" else None
    if context is None:
        raise KeyError(peer)
    return step_times(model, x, context, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    parser.add_argument("--variants", nargs="*", default=["rebuild", "hooks"])
    parser.add_argument("--peers", nargs="*", default=["checkpointing", "trl", "save_on_cpu"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--host-budget", default="64GiB")
    parser.add_argument("--dump", action="store_true", help="leave the record and the plan in $OUT")
    parser.add_argument("--name", default="storm_limit")
    options = parser.parse_args()
    print(f"overspill {overspill.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    link = raw_link()
    print(f"link {link['d2h']:.1f} / {link['h2d']:.1f} GB/s")
    rows = []
    for name in options.parts:
        try:
            rows += bench(name, PARTS[name], options)
        except Exception as error:
            print(f"{name}: {error!r}", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
    print(write_results(options.name, rows))


if __name__ == "__main__":
    main()
