"""torch.compile's own answer to activation memory beside STORM's: the partitioner's memory budget.

Llama blocks as in ``storm_limit.py`` (h = 4096, 8 layers, 4 x 4,096 tokens, random weights, bf16), one compiled region a
layer. ``torch._functorch.config.activation_memory_budget`` keeps that share of what compiled forward would save; 1 keeps
all of it, which is less than eager autograd does, in a step that is shorter. STORM then trains the eager blocks in each
peak that this gave, and the compiled ones in half of theirs. All times are over eager keep-all of the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from storm_parts import PARTS, WARM_STEPS, build, saved_bytes, step_times
from storm_v1 import GB, _run_layer

from common import commit, row, update_results
from overspill import Storm

GOAL = "storm_limit.h4096"


def compiled(share: float, backend: str = "inductor") -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A layer as ``Blocks.checkpoint`` takes it, compiled under a memory budget."""
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = share
    whole = torch.compile(_run_layer, fullgraph=True, backend=backend)
    return lambda run, hidden: whole(*run.args, hidden)


class Bench:
    """The eager step, and what others are held against it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.x = build(PARTS["h4096"])
        self.model(self.x).backward()
        self.x.grad = None
        self.fixed = torch.cuda.memory_allocated()
        self.saved = saved_bytes(self.model, self.x)
        self.keep_ms, peak = step_times(self.model, self.x, contextlib.nullcontext(), 2, options.steps)
        self.say("keep_all", self.keep_ms, peak, f"saved {self.saved / GB:.2f} GB")

    def say(self, name: str, ms: float, peak: int, note: str = "", limit: str | None = None) -> None:
        """A line, and a row of its own where it is not keep-all."""
        held, over = peak - self.fixed, ms / self.keep_ms * 100 - 100
        note = f"{ms:.1f} against {self.keep_ms:.1f} ms; activation peak {held / GB:.2f} GB = {held / self.saved:.3f} of saved bytes{note and '; '}{note}"
        print(f"{name:<24} {over:+6.1f}%  {note} {limit or ''}", flush=True)
        if name != "keep_all":
            made = row(
                f"{GOAL}.{name}_overhead_pct",
                over,
                "%",
                peer="keep-all",
                peer_value=self.keep_ms,
                limit=limit,
                note=f"{note} (commit {commit()[:10]})",
            )
            update_results(self.options.name, [made])

    def storm(self, name: str, budget: int, remark: str) -> float:
        """STORM in ``budget`` bytes; gives ms."""
        gc.collect()
        torch.cuda.empty_cache()
        compress = name.endswith("coded")
        storm = Storm(self.model, vram_budget=budget, host_budget=self.options.host_budget, compress=compress)
        ms, peak = step_times(self.model, self.x, storm, WARM_STEPS, self.options.steps)
        storm.close()
        plan = storm.report()["predicted"]
        own = plan["stall_us"] + plan["rebuild_us"] + plan["codec_us"]
        limit = f"simulator: {own / (plan['step_us'] - own) * 100:.2f}% of the same step alone"
        over = f"; {peak - budget} bytes over the budget" if peak > budget else ""
        self.say(
            name,
            ms,
            peak,
            f"rebuilt {plan['rebuilt_bytes'] / GB:.2f}, offloaded {plan['offloaded_bytes'] / GB:.2f} GB; {remark}{over}",
            limit,
        )
        return ms

    def run(self) -> None:
        """Every budget, then STORM in the peaks that came of them."""
        peaks: dict[float, int] = {}
        for share in self.options.shares:
            begin = time.perf_counter()
            try:
                self.model.checkpoint = compiled(share)
                if share == 1:
                    self.model(self.x).backward()
                    saved = saved_bytes(self.model, self.x)
                ms, peaks[share] = step_times(
                    self.model, self.x, contextlib.nullcontext(), 2, self.options.steps
                )
                seconds = time.perf_counter() - begin
                self.say(
                    f"memory_budget_{share:g}",
                    ms,
                    peaks[share],
                    f"torch.compile a layer, activation_memory_budget={share:g}; {seconds:.0f} s with compiling",
                )
                if share == 1:
                    self.storm(
                        "storm_compiled_2x",
                        self.fixed + saved // 2,
                        f"over compiled layers, half of the {saved / GB:.2f} GB that they save",
                    )
            except Exception:
                traceback.print_exc()
            self.model.checkpoint = None
            gc.collect()
            torch.cuda.empty_cache()
        for share, peak in peaks.items():
            self.storm(
                f"storm_at_memory_budget_{share:g}", peak, f"eager, in the peak of memory_budget_{share:g}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", nargs="*", type=float, default=[1, 0.5, 0.2])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--host-budget", default="44GiB")
    parser.add_argument("--name", default="storm_limit")
    Bench(parser.parse_args()).run()


if __name__ == "__main__":
    main()
