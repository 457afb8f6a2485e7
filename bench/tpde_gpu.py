"""Rates of the codecs' kernels on a GPU, with the copy rate of the same run beside them.

Runs the test binary ``tpde_cuda`` (``TPDE_CUDA`` names it; else cargo builds it) and writes
``bench/results/tpde_gpu.json``. Weights and activations are random.
"""

from __future__ import annotations

import os
import subprocess
import sys

from common import row, write_results


def rows_of(mode: str) -> list[list[str]]:
    """The rows that the binary prints in one of its measuring modes."""
    binary = os.environ.get("TPDE_CUDA")
    cargo = [
        "cargo",
        "test",
        "--release",
        "--quiet",
        "-p",
        "overspill-codec-cuda",
        "--test",
        "tpde_cuda",
        "--",
    ]
    command = [*([binary] if binary else cargo), mode]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        print(f"{mode}: exit {done.returncode}", file=sys.stderr)
    return [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("ROW\t")]


def main() -> None:
    measured = rows_of("bench") + rows_of("link")
    copy = next((float(value) for name, value, *_ in measured if name == "tpde.gpu.copy_tbps"), None)
    rows = []
    for name, value, unit, note in measured:
        limit = (
            None if copy is None else f"copy on the device, read + written, {copy:.2f} TB/s in the same run"
        )
        rows.append(row(name, float(value), unit, limit=limit, note=note))
    print(write_results("tpde_gpu", rows))
    if not rows:
        sys.exit("nothing was measured: no GPU?")


if __name__ == "__main__":
    main()
