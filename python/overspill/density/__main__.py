"""One part of an experiment in a process of its own: ``python -m overspill.density PART EXPERIMENT.json FOLDER``.

``overspill bench sessions`` writes the experiment and calls this; each part leaves ``PART.json`` in the folder.
``plot REPORT.json FIGURE.svg`` draws a report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

USAGE = 2


def main(args: list[str]) -> int:
    """Runs one part."""
    if len(args) != 3 or args[0] not in ("pool", "oracle", "baselines", "plot"):
        print(__doc__, file=sys.stderr)
        return USAGE
    part, source, target = args[0], Path(args[1]), Path(args[2])
    if part == "plot":
        from .plot import plot

        return plot(json.loads(source.read_text()), target)
    experiment = json.loads(source.read_text())
    if part == "baselines":
        from .baselines import measure

        result = measure(experiment, target)
    else:
        from .run import run

        result = run(experiment, part, target)
    (target / f"{part}.json").write_text(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
