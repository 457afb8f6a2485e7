"""STORM against keeping everything: half and a quarter of the memory, at what cost, and against its peers.

Llama blocks (transformers' own decoder layers, random weights, bf16, SDPA), 16,384 tokens in four
sequences of 4,096 unless a part says otherwise, no optimizer, torch's default algorithms. A part is a
model and its budgets: ``k``-x is keep-all's saved bytes (what a forward leaves allocated) over k, a peer's
name that peer's activation peak, both on top of parameters, gradients and the input. All methods of a part
run in one process, one after the other; overhead is the median step over keep-all's median. Beside each
figure stands what the simulator says the plan costs, over the same recorded step without any transfer or
rebuild. Results are written after every part, and ``--continue`` adds to the file of an earlier call.
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
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from storm_evidence import Memory, exposed, lanes
from storm_parts import PARTS, WARM_STEPS, Part, build, liger_loss, saved_bytes, step_times
from storm_peers import checkpointing_offload, selective
from storm_v1 import GB, checkpointing, raw_link, timed_hooks, trl_offload, unsloth_checkpoint

import overspill
from common import RESULTS, row, write_results, write_series
from overspill import Storm

Rows = list[dict[str, Any]]
PEERS = ("checkpointing", "selective", "checkpointing_offload", "trl", "unsloth", "save_on_cpu")
CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "checkpointing": lambda: checkpointing,
    "selective": lambda: selective,
    "checkpointing_offload": lambda: checkpointing_offload,
    "unsloth": unsloth_checkpoint,
}


@dataclass
class Attempt:
    """One way to stay within a budget, and what came of it."""

    storm: Storm | None
    how: str
    ms: float
    peak: int
    report: dict[str, Any]


@dataclass
class Bench:
    """One part as it is measured."""

    name: str
    part: Part
    options: argparse.Namespace
    rows: Rows = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    peer_ms: dict[str, float] = field(default_factory=dict)

    def run(self) -> Iterator[Rows]:
        """Every method; gives the rows so far after each."""
        self.model, self.x = build(self.part)
        self.model(self.x).backward()  # cuBLAS takes its workspace
        self.x.grad = None
        self.fixed = torch.cuda.memory_allocated()
        self.saved = saved_bytes(self.model, self.x)
        self.keep_ms, peak = step_times(self.model, self.x, contextlib.nullcontext(), 2, self.options.steps)
        self.say("keep_all", self.keep_ms, peak, f"saved {self.saved / GB:.2f} GB")
        for peer in PEERS if self.part.has_peers else ():
            if peer in self.options.peers and peer != "save_on_cpu":
                self.peer(peer)
                yield self.rows
        for goal, budget in self.part.budgets.items():
            if self.options.budgets and goal not in self.options.budgets:
                continue
            try:
                if not isinstance(budget, str):
                    yield from self.storm(goal, self.fixed + int(self.saved / budget), None)
                elif budget in self.peaks:
                    yield from self.storm(goal, self.peaks[budget], budget)
            except Exception:
                traceback.print_exc()  # the other budgets are still worth knowing
            yield self.rows
        if "save_on_cpu" in (PEERS if self.part.has_peers else ()) and "save_on_cpu" in self.options.peers:
            self.peer("save_on_cpu")  # last: the pinned memory that it takes stays with torch
            yield self.rows

    def say(self, method: str, ms: float, peak: int, note: str = "") -> None:
        """One line of the table."""
        held = peak - self.fixed
        text = f"{self.name:<10} {method:<28} {ms:8.1f} ms {ms / self.keep_ms:6.3f}x"
        print(f"{text}  peak {held / GB:6.2f} GB = {held / self.saved:5.3f} of saved {note}", flush=True)

    def storm(self, goal: str, budget: int, peer: str | None) -> Iterator[Rows]:
        """One budget, with what can be asked of a plan in force; where that is asked for also with the link codec, and
        then the faster of the two counts.
        """
        best = self.attempt(goal, budget, compress=False)
        self.overhead(goal, best, budget)
        if goal in self.options.compress:
            yield self.rows
            best.storm = None  # its host memory is the next one's
            try:
                both = best, self.attempt(goal, budget, compress=True)
            except Exception:
                traceback.print_exc()  # the first is still worth having
            else:
                best, other = sorted(both, key=lambda one: (one.peak > budget, one.ms))
                self.overhead(goal, best, budget, f"; with {best.how}, {other.ms:.1f} ms with {other.how}")
        storm, ms, peak, report, over = best.storm, best.ms, best.peak, best.report, best.peak - budget
        if peer is not None and over <= 0:
            speedup = self.peer_ms[peer] / ms
            self.rows.append(
                row(
                    f"storm_limit.{self.name}.vs_{peer}_speedup",
                    speedup,
                    "x",
                    peer=peer,
                    peer_value=self.peer_ms[peer],
                    note=f"at an activation peak of {(peak - self.fixed) / GB:.2f} GB against "
                    f"{(self.peaks[peer] - self.fixed) / GB:.2f}",
                )
            )
        if goal == "h4096_2x" and storm is not None:
            yield self.rows
            yield from self.evidence(storm, ms, peak, report)
        folder = os.environ.get("OUT")
        if folder and goal in self.options.dump and storm is not None:
            document = {"record": json.loads(storm._planner.record_json() or "null"), "fixed": self.fixed}
            document |= {"budget": budget, "keep_ms": self.keep_ms, "ms": ms, "saved": self.saved}
            (Path(folder) / f"record_{goal}.json").write_text(json.dumps(document))
        best.storm = storm = None
        gc.collect()
        torch.cuda.empty_cache()

    def attempt(self, goal: str, budget: int, *, compress: bool) -> Attempt:
        """Steps under one budget, with or without the link codec."""
        gc.collect()
        torch.cuda.empty_cache()
        storm = Storm(self.model, vram_budget=budget, host_budget=self.options.host_budget, compress=compress)
        ms, peak = step_times(self.model, self.x, storm, WARM_STEPS, self.options.steps)
        storm.close()
        made = Attempt(storm, f"compress={compress}", ms, peak, storm.report())
        self.say(f"storm:{goal}", ms, peak, f"over budget {max(peak - budget, 0)}; {made.how}")
        print(f"    {made.report['predicted']} {made.report['units']}", flush=True)
        return made

    def overhead(self, goal: str, best: Attempt, budget: int, remark: str = "") -> None:
        """The goal's row, in the place of an earlier one."""
        ms, peak, predicted, part = best.ms, best.peak, best.report["predicted"], self.part
        held = peak - self.fixed
        if peak > budget:
            remark = f"; {peak - budget} bytes over the budget{remark}"
        if part.has_fused_loss:
            remark += "; loss in pieces" if liger_loss() is None else "; Liger's fused loss on both sides"
        self.rows = [one for one in self.rows if one["id"] != f"storm.overhead_pct.{goal}"]
        self.rows.append(
            row(
                f"storm.overhead_pct.{goal}",
                ms / self.keep_ms * 100 - 100,
                "%",
                peer="keep-all",
                peer_value=self.keep_ms,
                limit=f"simulator: {bound_pct(predicted):.2f}%",
                note=f"{part.layers} layers, {part.sequences} x {part.sequence} tokens, random weights, bf16, no "
                f"optimizer; median of {self.options.steps}: {ms:.1f} against {self.keep_ms:.1f} ms; activation "
                f"peak {held / GB:.3f} GB = {held / self.saved:.4f} of {self.saved / GB:.3f} GB saved; rebuilt "
                f"{predicted['rebuilt_bytes'] / GB:.2f}, offloaded {predicted['offloaded_bytes'] / GB:.2f}, "
                f"compressed {predicted['compressed_bytes'] / GB:.2f}, kept "
                f"{predicted['kept_bytes'] / GB:.2f} GB{remark}",
            )
        )

    def evidence(self, storm: Storm, ms: float, peak: int, report: dict[str, Any]) -> Iterator[Rows]:
        """How true the prediction was, what hooks take, and what the profiler saw of transfers."""
        predicted = report["predicted"]
        error = abs(predicted["step_us"] / 1e3 / ms - 1) * 100
        self.rows.append(
            row("storm.step_prediction_err_pct", error, "%", note="the plan's step against the median")
        )
        error = abs(predicted["peak_bytes"] / peak - 1) * 100
        self.rows.append(row("storm.peak_prediction_err_pct", error, "%", note="of all bytes allocated"))
        times = timed_hooks(storm)
        step_times(self.model, self.x, storm, 1, 3)
        storm.close()
        median = statistics.median(times)
        print(f"    hooks: median {median:.1f} us of {len(times)}", flush=True)
        self.rows.append(row("storm_limit.hook_us.h4096_2x", median, "us", note=f"median of {len(times)}"))
        yield self.rows
        self.profile(storm)

    def profile(self, storm: Storm) -> None:
        """One step as the profiler sees it."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with storm:
            self.model(self.x).backward()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=activities) as profile:
                self.model(self.x).backward()
                torch.cuda.synchronize()
        seen = lanes(profile)
        facts = exposed(seen)
        print(f"    profiler: {facts}", flush=True)
        self.rows.append(
            row(
                "storm.exposed_stall_pct",
                facts["exposed_pct"],
                "%",
                note=f"one profiled step of h4096_2x: a copy ran and no kernel did, of {facts['step_ms']:.1f} ms; "
                f"kernels ran {facts['kernels_pct']:.1f}% of it, copies out {facts['offload_ms']:.1f} ms at "
                f"{facts['offload_gbps']:.1f} GB/s, back {facts['onboard_ms']:.1f} ms at {facts['onboard_gbps']:.1f}",
            )
        )
        title = f"STORM: one step of Llama blocks in half the memory, h = {self.part.width}, {facts['step_ms']:.0f} ms"
        write_series("storm_timeline", {"title": title, **seen})

    def peer(self, peer: str) -> None:
        """Another method."""
        model, nothing, steps = self.model, contextlib.nullcontext(), self.options.steps
        try:
            if peer in CHECKPOINTS:
                model.checkpoint = CHECKPOINTS[peer]()
                if model.checkpoint is None:
                    return
                ms, peak = step_times(model, self.x, nothing, 2, steps)
            elif peer == "save_on_cpu":
                context = torch.autograd.graph.save_on_cpu(pin_memory=True)
                ms, peak = step_times(model, self.x, context, 1, 1)
            else:
                context = trl_offload(model)
                if context is None:
                    return
                ms, peak = step_times(model, self.x, context, 1, 2)
        except Exception:
            traceback.print_exc()
            return
        finally:
            model.checkpoint = None
            self.x.grad = None
            gc.collect()
            torch.cuda.empty_cache()
        self.peaks[peer], self.peer_ms[peer] = peak, ms
        self.say(peer, ms, peak)
        note = f"activation peak {(peak - self.fixed) / self.saved:.3f} of saved bytes"
        overhead = ms / self.keep_ms * 100 - 100
        self.rows.append(row(f"storm_limit.{self.name}.{peer}_overhead_pct", overhead, "%", note=note))


def bound_pct(predicted: dict[str, Any]) -> float:
    """What the simulator says a plan costs, in percent of the same step alone."""
    own_us = predicted["stall_us"] + predicted["rebuild_us"] + predicted["codec_us"]
    return float(own_us / (predicted["step_us"] - own_us) * 100)


def capacity(options: argparse.Namespace) -> Rows:
    """A step whose activations exceed the card, in half of the card: h = 4096."""
    part = Part(4096, options.capacity_layers, {}, 4096, options.capacity_sequences)
    total = torch.cuda.get_device_properties(0).total_memory
    with Memory() as memory:
        model, x = build(part)
        # The driver's context, cuBLAS, and what torch's allocator cannot give out are not torch's bytes.
        budget = memory.total_bytes // 2 - options.capacity_gaps_gib * 2**30
        storm = Storm(model, vram_budget=budget, host_budget=options.capacity_host_budget)
        begin = time.perf_counter()
        ms, peak = step_times(model, x, storm, options.capacity_warm, 2)
        seconds = time.perf_counter() - begin
        storm.close()
    parameters = sum(p.nbytes for p in model.parameters())
    record = json.loads(storm._planner.record_json() or "null")["units"]
    saved = wide = 0
    for unit, after in zip(record, [*record[1:], None], strict=True):
        if not unit["is_narrow"]:
            saved += unit["bytes"]
            wide += unit["bytes"] // 2 if after and after["is_narrow"] else 0
    report = storm.report()
    demand = (parameters + saved - wide) / memory.total_bytes * 100
    most = max(memory.used_bytes)
    note = (
        f"Llama blocks h=4096, {part.layers} layers, {part.sequences} x {part.sequence} tokens, random weights, bf16, "
        f"no optimizer: parameters {parameters / GB:.1f} GB, saved {saved / GB:.1f} GB, of which copies in fp32 count "
        f"as 16 bit; card {memory.total_bytes / GB:.1f} GB; median step {ms:.0f} ms, {seconds:.0f} s for "
        f"{options.capacity_warm + 2} steps; budget {budget / GB:.1f}, peak {peak / GB:.1f} GB of torch's own bytes; plan "
        f"{report['predicted']}; host pool {report['pool']['bytes_reserved'] / GB:.1f} GB"
    )
    print(
        f"capacity: demand {demand:.1f}% of {total / GB:.1f} GB, NVML at most {most / memory.total_bytes * 100:.1f}%"
    )
    print(f"    {note}", flush=True)
    marks = [
        (memory.total_bytes, "the card"),
        (memory.total_bytes // 2, "half of it"),
        (parameters + saved - wide, "parameters and activations in 16 bit"),
    ]
    title = f"STORM: {demand:.0f}% of the card, in half of it (h = 4096, {part.layers} layers, {part.sequences * part.sequence:,} tokens)"
    write_series("storm_capacity_nvml", {**memory.log(), "marks": marks, "title": title})
    bound = f"simulator: {report['predicted']['step_us'] / 1e3:.0f} ms a step, {bound_pct(report['predicted']):.2f}% over keep-all"
    used = f"{len(memory.used_bytes)} samples of NVML, every 50 ms, model built to last step"
    return [
        row("storm.capacity.demand_pct", demand, "%", limit=bound, note=note),
        row("storm.capacity.nvml_used_pct_max", most / memory.total_bytes * 100, "%", note=used),
    ]


def with_worst(rows: Rows) -> Rows:
    """``rows`` with the goals that are the worse of two widths."""
    rows = list(rows)
    for peer in ("checkpointing", "trl"):
        found = [
            r["value"] for r in rows if r["id"].endswith(f".vs_{peer}_speedup") and "storm_limit" in r["id"]
        ]
        if len(found) == 2:
            note = "h=4096 and 8192, at equal or lower activation peak, the worse"
            rows.append(row(f"storm.vs_{peer}_speedup", min(found), "x", note=note))
    return rows


def earlier_rows(name: str) -> Rows:
    """Rows that an earlier call left."""
    path = Path(os.environ.get("OUT", RESULTS)) / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [r for r in rows if r["id"] not in ("storm.vs_checkpointing_speedup", "storm.vs_trl_speedup")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=[*PARTS, "capacity"])
    parser.add_argument("--budgets", nargs="*", help="of the parts, these goals only")
    parser.add_argument("--peers", nargs="*", default=PEERS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--host-budget", default="64GiB")
    parser.add_argument("--capacity-layers", type=int, default=27)
    parser.add_argument(
        "--capacity-gaps-gib", type=int, default=16, help="of half of the card, what is not torch's bytes"
    )
    parser.add_argument("--capacity-warm", type=int, default=5)
    parser.add_argument("--capacity-sequences", type=int, default=16)
    parser.add_argument("--capacity-host-budget", default="88GiB")
    parser.add_argument(
        "--compress", nargs="*", default=[], help="goals that are run with the link codec too"
    )
    parser.add_argument("--dump", nargs="*", default=[], help="goals whose record is left in $OUT")
    parser.add_argument(
        "--continue", dest="adds", action="store_true", help="add to what an earlier call wrote"
    )
    parser.add_argument("--name", default="storm_limit")
    options = parser.parse_args()
    print(f"overspill {overspill.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    link = raw_link()
    print(f"link {link['d2h']:.1f} / {link['h2d']:.1f} GB/s", flush=True)
    rows = earlier_rows(options.name) if options.adds else []
    for name in options.parts:
        begin = time.perf_counter()
        done: Rows = []
        try:
            if name == "capacity":
                done = capacity(options)
                write_results(options.name, with_worst(rows + done))
            else:
                for done in Bench(name, PARTS[name], options).run():
                    write_results(options.name, with_worst(rows + done))
        except Exception:
            traceback.print_exc()
        rows += done
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    print(write_results(options.name, with_worst(rows)))


if __name__ == "__main__":
    sys.exit(main())
