"""DDP and FSDP2 under torchrun, two gloo ranks: part of the workload matrix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("dist_worker.py")
NAMES = ("ddp", "fsdp2", "fsdp2_checkpoint")


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the worker on two ranks of one host, on a port of torchrun's choosing."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(WORKER),
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_ranks_see_the_same_bits() -> None:
    """Parameters that FSDP frees and refills, and gradients that DDP averages, come out the same."""
    done = launch(*NAMES)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for name in NAMES:
        for rank in range(2):
            assert f"{name}, rank {rank}, offloaded: same bits" in said
