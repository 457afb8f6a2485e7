"""Bits on this machine: every workload of the test matrix, and Llama blocks of a real width, with and without STORM.

Deterministic algorithms are on. Each workload's baseline is first held against itself; then everything is
offloaded, and then everything that has a recipe is rebuilt. Wants ``PYTHONPATH=python/tests``. Adds ``storm.bit_identical`` to
``bench/results/storm_limit.json``: the number of steps that were compared stands in its note.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback

import torch
from storm_harness import first_difference, offload_everything, train
from storm_limit import earlier_rows, with_worst
from storm_v1 import Blocks
from test_storm_rebuild import rebuild_everything
from workloads import BUILDERS

from common import row, write_results
from overspill import Storm


def workload(name: str, device: str, steps: int) -> str | None:
    """How a workload differs from itself offloaded or rebuilt; None if it does not."""
    base = train(name, device=device, steps=steps)
    if (difference := first_difference(base, train(name, device=device, steps=steps))) is not None:
        return f"its baseline does not repeat itself: {difference}"
    for wrap in (offload_everything, rebuild_everything):
        if (difference := first_difference(base, train(name, wrap, device=device, steps=steps))) is not None:
            return f"{wrap.__name__}: {difference}"
    return None


def blocks(device: str, width: int, steps: int) -> str | None:
    """Llama blocks in bf16 at four budgets."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = Blocks(width, 6).to(device, torch.bfloat16)
    x = torch.randn(2, 2048, width, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        loss = model(x)
        loss.backward()
        return [loss.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())]

    want = step()
    if not all(map(torch.equal, want, step())):
        return "the baseline does not repeat itself"
    fixed = torch.cuda.memory_allocated()
    loss = model(x)
    saved = torch.cuda.memory_allocated() - fixed
    del loss
    for divisor in (1.5, 2, 4, 6):
        storm = Storm(model, vram_budget=fixed + int(saved / divisor) + 2**25, host_budget="4GiB")
        with storm:
            for n in range(steps):
                if not all(map(torch.equal, want, step())):
                    return f"budget of saved / {divisor}: step {n}"
        storm.close()
        units = storm.report()["units"]
        print(f"    saved / {divisor}: {units} {sorted({s[0] for s in storm._proved.values()})}", flush=True)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no workload after this time")
    parser.add_argument("--only", nargs="*", default=["blocks", *BUILDERS], help="blocks needs a GPU")
    parser.add_argument("--name", default="storm_limit")
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    begin = time.perf_counter()
    same: list[str] = []
    failed: dict[str, str] = {}
    cases = []
    for name in options.only:
        if name == "blocks":
            cases.append(("Llama blocks h=1024", lambda: blocks(options.device, 1024, options.steps)))
        else:
            cases.append((name, lambda name=name: workload(name, options.device, options.steps)))
    for name, compare in cases:
        if time.perf_counter() - begin > options.seconds:
            break
        try:
            difference = compare()
        except Exception as error:
            traceback.print_exc()
            difference = repr(error)[:200]
        print(f"{name}: {difference or 'same bits'} at {time.perf_counter() - begin:.1f} s", flush=True)
        if difference is None:
            same.append(name)
        else:
            failed[name] = difference
        note = (
            f"{options.steps} steps each, deterministic algorithms, offloading all and rebuilding all, loss and every "
            f"gradient: {len(same)} of {len(same) + len(failed)} workloads have the same bits: {', '.join(same)}"
            + (f"; failed: {failed}" if failed else "")
            + (f"; not run: {len(cases) - len(same) - len(failed)}")
        )
        rows = [r for r in earlier_rows(options.name) if r["id"] != "storm.bit_identical"]
        share = len(same) / (len(same) + len(failed))
        write_results(
            options.name, with_worst([*rows, row("storm.bit_identical", share, "share", note=note)])
        )


if __name__ == "__main__":
    main()
