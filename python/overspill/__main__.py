"""The ``overspill`` command, and ``python -m overspill``."""

import os
import sys

from ._native import run_cli


def main() -> int:
    """Runs the command line of this process."""
    # Commands that run a model's steps call this interpreter.
    os.environ.setdefault("OVERSPILL_PYTHON", sys.executable)
    return run_cli(["overspill", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
