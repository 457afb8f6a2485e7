"""The one form of a benchmark's result: ``bench/results/NAME.json``."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def row(
    goal_id: str,
    value: float | None,
    unit: str,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
    limit: str | None = None,
    note: str = "",
) -> dict[str, Any]:
    """One figure, with what it is held against: a peer, and the physical limit."""
    return {
        "id": goal_id,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "limit": limit,
        "note": note,
    }


def write_results(name: str, rows: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """Writes ``name``.json with the machine, the commit, the date and the versions beside ``rows``."""
    document = {**_provenance(), "versions": versions(), "rows": rows}
    return _write(folder or Path(os.environ.get("OUT", RESULTS)), name, json.dumps(document, indent=1))


def write_series(name: str, series: dict[str, Any]) -> Path:
    """Writes what a run saw over time to ``series/name.json``, or to $OUT where that is set."""
    folder = Path(os.environ["OUT"]) if "OUT" in os.environ else RESULTS / "series"
    return _write(folder, name, json.dumps({**_provenance(), **series}))


def _provenance() -> dict[str, str]:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"machine": machine(), "commit": commit(), "date": date}


def _write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(text + "\n")
    return path


def update_results(name: str, rows: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """Puts ``rows`` into ``name``.json in the place of those with their ids. The rest of it stays what it was, so
    each row's note has to say where and when it is from.
    """
    path = (folder or Path(os.environ.get("OUT", RESULTS))) / f"{name}.json"
    if not path.exists():
        return write_results(name, rows, folder)
    document = json.loads(path.read_text())
    new = {one["id"]: one for one in rows}
    document["rows"] = [new.pop(one["id"], one) for one in document["rows"]] + list(new.values())
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def machine() -> str:
    """Processor, cores, and GPU with its driver."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    cores = len(os.sched_getaffinity(0))
    gpu = _gpu()
    return f"{model}, {cores} cores" + (f"; {gpu}" if gpu else "")


def _gpu() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{len(lines)} x {lines[0]}" if lines else ""


def commit() -> str:
    """The commit that was measured; "COMMIT" in the environment where there is no checkout."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return head.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "overspill", "numpy"):
        if name in sys.modules:
            found[name] = str(getattr(sys.modules[name], "__version__", "?"))
    if "torch" in sys.modules and sys.modules["torch"].version.cuda:
        found["cuda"] = sys.modules["torch"].version.cuda
    return found


def median(values: list[float]) -> float:
    """The middle value."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
