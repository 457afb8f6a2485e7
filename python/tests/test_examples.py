"""Examples run to their end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_weight_sync_ends_with_the_same_bits() -> None:
    command = [sys.executable, str(EXAMPLES / "weight_sync.py"), "--steps", "2", "--width", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout


def test_a_streamed_model_makes_the_same_tokens() -> None:
    command = [sys.executable, str(EXAMPLES / "stream_model.py"), "--device", "cpu", "--tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "the same tokens" in done.stdout


def test_fine_tune_ends_with_the_same_bits() -> None:
    """transformers' Trainer, accelerate and peft under STORM."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "fine_tune.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same weights, bit for bit") == 3


def test_fsdp2_ends_with_the_same_bits_on_two_ranks() -> None:
    """Two gloo ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "fsdp2.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same bits") == 2
