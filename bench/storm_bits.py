"""Bits on this machine: every workload of the test matrix, and Llama blocks of a real width, with and without STORM.

Deterministic algorithms are on. Each workload's baseline is first held against itself; then everything is
offloaded, and then everything that has a recipe is rebuilt. Wants ``PYTHONPATH=python/tests``. Adds ``storm.bit_identical`` to
``bench/results/storm_limit.json`` once all are done: the number of steps that were compared stands in its note.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterator

import torch
from storm_harness import first_difference, offload_everything, train
from storm_limit import earlier_rows, with_worst
from storm_v1 import Blocks
from test_storm_rebuild import rebuild_everything
from workloads import BUILDERS

from common import row, write_results
from overspill import Storm

LONG = ("blocks", "t5", "compiled", "moe", "lora", "gpt2", "llama", "gan")


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
        print(
            f"    saved / {divisor}: {units} {sorted({s[0] for s in storm._proofs.proved.values()})}",
            flush=True,
        )
    return None


def compare(name: str, device: str, steps: int) -> str | None:
    """How a case differs, in a process of its own; None if it does not."""
    torch.set_num_threads(1)
    try:
        return blocks(device, 1024, steps) if name == "blocks" else workload(name, device, steps)
    except Exception as error:
        traceback.print_exc()
        return repr(error)[:200]


def differences(names: list[str], options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Every case with how it differs, as they end: on each GPU ``jobs`` processes that take the next one."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    spawn = multiprocessing.get_context("spawn")

    def work(pool: concurrent.futures.ProcessPoolExecutor) -> None:
        with pool:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    difference = pool.submit(compare, name, options.device, options.steps).result()
                except concurrent.futures.BrokenExecutor as error:
                    difference = repr(error)  # its process died, and those behind it find no other
                done.put((name, difference))

    for gpu in options.gpus or [None]:
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # of the processes that are made from here on
        for _ in range(options.jobs):
            pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)
            pool.submit(os.getpid).result()
            threading.Thread(target=work, args=(pool,), daemon=True).start()
    for _ in names:
        yield done.get()


def note_of(steps: int, same: list[str], failed: dict[str, str], left: int) -> str:
    """What was compared, in words."""
    return (
        f"{steps} steps each, deterministic algorithms, offloading all and rebuilding all, loss and every "
        f"gradient: {len(same)} of {len(same) + len(failed)} workloads have the same bits: {', '.join(sorted(same))}"
        + (f"; failed: {failed}" if failed else "")
        + (f"; not run: {left}" if left else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes a GPU; each compares one workload at a time"
    )
    parser.add_argument(
        "--gpus", nargs="*", default=[], help="as CUDA_VISIBLE_DEVICES names them; default: the first"
    )
    parser.add_argument("--only", nargs="*", default=["blocks", *BUILDERS], help="blocks needs a GPU")
    parser.add_argument("--name", default="storm_limit")
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    begin = time.perf_counter()
    same: list[str] = []
    failed: dict[str, str] = {}
    # The longest first, or one of them runs alone at the end.
    names = sorted(options.only, key=lambda name: (name not in LONG, name))
    for name, difference in differences(names, options):
        print(f"{name}: {difference or 'same bits'} at {time.perf_counter() - begin:.1f} s", flush=True)
        if difference is None:
            same.append(name)
        else:
            failed[name] = difference
        left = len(names) - len(same) - len(failed)
        share = len(same) / (len(same) + len(failed))
        which = "storm.bit_identical" if left == 0 else "storm_limit.bit_identical_so_far"
        mine = row(which, share, "share", note=note_of(options.steps, same, failed, left))
        rows = [r for r in earlier_rows(options.name) if "bit_identical" not in r["id"]]
        write_results(options.name, with_worst([*rows, mine]))


if __name__ == "__main__":
    main()
