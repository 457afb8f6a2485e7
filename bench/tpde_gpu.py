"""Rates of the codecs' kernels on a GPU, with the copy rate of the same run beside them.

Runs the test binary ``tpde_cuda`` (``TPDE_CUDA`` names it; else cargo builds it) and writes
``bench/results/tpde_gpu.json``. Weights and activations are random. The peer of a sparse patch is what one writes
without a codec: 64-bit positions and 16-bit words in device memory, and ``index_put_``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

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


SEGMENT_WORDS = 1 << 24


def index_put_ms(segments: int, share: float) -> tuple[float, float] | None:
    """Milliseconds of ``index_put_`` over as many words, in place and after a copy; None without torch and a GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    old = torch.zeros(segments * SEGMENT_WORDS, dtype=torch.bfloat16, device="cuda")
    new = torch.empty_like(old)
    drawn = [
        torch.nonzero(torch.rand(SEGMENT_WORDS, device="cuda") < share).flatten() + i * SEGMENT_WORDS
        for i in range(segments)
    ]
    where = torch.cat(drawn)
    what = torch.ones(where.numel(), dtype=torch.bfloat16, device="cuda")
    found = []
    for copies in (False, True):
        times = []
        for _ in range(4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            if copies:
                new.copy_(old)
            (new if copies else old).index_put_((where,), what)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        found.append(sorted(times[1:])[1])
    return found[0], found[1]


def results_of(
    measured: list[list[str]], peers: tuple[float, float] | None, segments: int
) -> list[dict[str, Any]]:
    """The rows of a results file."""
    copy = next((float(value) for name, value, *_ in measured if name == "tpde.gpu.copy_tbps"), None)
    limit = None if copy is None else f"copy on the device, read + written, {copy:.2f} TB/s in the same run"
    rows = []
    for name, value, unit, note in measured:
        peer = {}
        if peers and name == "tpde.gpu.apply_7b_ms":
            peer = {"peer": "torch index_put_, 8-byte positions, in place", "peer_value": peers[0]}
        if peers and name == "tpde.gpu.sparse_out_tbps":
            rate = segments * SEGMENT_WORDS * 2 / peers[1] / 1e9
            peer = {"peer": "copy and torch index_put_, 8-byte positions", "peer_value": rate}
        rows.append(row(name, float(value), unit, limit=limit, note=note, **peer))
    return rows


def main() -> None:
    segments = 4 * int(os.environ.get("OVERSPILL_COPIES", "100"))
    measured: list[list[str]] = []
    for mode in ("bench", "encode", "link"):
        measured += rows_of(mode)
        if not measured:
            sys.exit("nothing was measured: no GPU?")
        print(write_results("tpde_gpu", results_of(measured, None, segments)))
    peers = index_put_ms(segments, 0.0241)
    print("index_put_, in place and after a copy:", peers, "ms", flush=True)
    print(write_results("tpde_gpu", results_of(measured, peers, segments)))


if __name__ == "__main__":
    main()
