"""What every test of the Python edge starts from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# cuBLAS repeats its bits only with a workspace of its own; it reads this when CUDA is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors: threads cost more than they save, and two test machines then agree."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server_processes() -> Iterator[Any]:
    """Starts servers, each a process; what they all import is imported once."""
    from server_harness import Servers

    made = Servers.make()
    yield made
    made.close()


def pytest_configure(config: pytest.Config) -> None:
    """Tests that send everything away state a budget below what the process itself takes."""
    config.addinivalue_line("filterwarnings", "ignore:vram_budget of .* is exceeded")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says what a machine without a GPU has not tested."""
    left_out = sum("gpu" in report.keywords for report in terminalreporter.stats.get("skipped", []))
    if left_out:
        terminalreporter.write_line(f"no GPU here: {left_out} GPU tests were left out")
