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
from collections.abc import Iterator
from typing import Any

from common import commit, row, update_results

Pool = concurrent.futures.ProcessPoolExecutor


def run(name: str, *arguments: Any) -> Any:
    """A function of ``storm_bits_cases``, which this process does without: to load it takes a while."""
    import storm_bits_cases

    return getattr(storm_bits_cases, name)(*arguments)


def start(options: argparse.Namespace) -> list[Pool]:
    """``jobs`` processes a GPU, which load what they need side by side."""
    pools = []
    for gpu in options.gpus or [None]:
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # of the processes that are made from here on
        for _ in range(options.jobs):
            pools.append(Pool(1, mp_context=multiprocessing.get_context("spawn")))
            pools[-1].submit(os.getpid).result()
    return pools


def differences(
    pools: list[Pool], names: list[str], options: argparse.Namespace
) -> Iterator[tuple[str, str | None]]:
    """Every case with how it differs, as they end; a process that is done takes the next."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)

    def work(pool: Pool) -> None:
        with pool:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    difference = pool.submit(run, "compare", name, options.device, options.steps).result()
                except concurrent.futures.BrokenExecutor as error:
                    difference = repr(error)  # its process died, and those behind it find no other
                done.put((name, difference))

    for pool in pools:
        threading.Thread(target=work, args=(pool,), daemon=True).start()
    for _ in names:
        yield done.get()


def note_of(steps: int, same: list[str], failed: dict[str, str], left: int) -> str:
    """What was compared, in words."""
    return (
        f"at commit {commit()[:10]}; {steps} steps each, deterministic algorithms, offloading all and rebuilding all, loss and every "
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
    parser.add_argument("--only", nargs="*", help="these cases; default: all")
    parser.add_argument("--name", default="storm_limit")
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    begin = time.perf_counter()
    same: list[str] = []
    failed: dict[str, str] = {}
    pools = start(options)
    known = [pool.submit(run, "names") for pool in pools]  # all load side by side
    names = options.only or known[0].result()
    for name, difference in differences(pools, names, options):
        print(f"{name}: {difference or 'same bits'} at {time.perf_counter() - begin:.1f} s", flush=True)
        if difference is None:
            same.append(name)
        else:
            failed[name] = difference
        left = len(names) - len(same) - len(failed)
        share = len(same) / (len(same) + len(failed))
        which = (
            "storm.bit_identical" if left == 0 and not options.only else "storm_limit.bit_identical_so_far"
        )
        update_results(
            options.name, [row(which, share, "share", note=note_of(options.steps, same, failed, left))]
        )


if __name__ == "__main__":
    main()
