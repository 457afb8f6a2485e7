"""Examples run to their end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_weight_sync_ends_with_the_same_bits() -> None:
    command = [sys.executable, str(EXAMPLES / "weight_sync.py"), "--steps", "2", "--width", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
