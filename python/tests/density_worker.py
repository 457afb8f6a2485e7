"""The short experiment as it should be, and spoilt on purpose; prints which checks of the verdict fail, by flaw.

A process of its own, for all of them: the timeline is what it has resident, and libraries take longest.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from overspill._native import run_cli
from overspill.density import run as module


def judged(config: Path, folder: Path) -> list[str]:
    code = run_cli(["overspill", "bench", "sessions", str(config), "--out", str(folder), "--judge"])
    verdict = json.loads((folder / "report.json").read_text())["verdict"]
    assert (code == 0) == verdict["passed"]
    return [check["name"] for check in verdict["checks"] if not check["passed"]]


class Spoilt(module.Run):
    """As it should be."""

    def schedule(self, turns: list[dict[str, Any]]) -> None:
        self.before(turns)
        super().schedule(turns)

    def before(self, turns: list[dict[str, Any]]) -> None:
        """What is different."""


class Ballast(Spoilt):
    def before(self, turns: list[dict[str, Any]]) -> None:
        self.ballast = torch.ones(self.plan["limit_bytes"], dtype=torch.uint8)


class Corrupt(Spoilt):
    def decode(self, names: list[int], steps: int, bring: list[Any]) -> None:
        if 3 in names:  # somebody else's hidden state gets in
            self.sessions[3].steer(1, torch.ones(self.config["model"]["hidden"]))
        super().decode(names, steps, bring)


class Lazy(Spoilt):
    def move(self, turn: dict[str, Any]) -> None:
        turn["prefetch"] = []  # nobody leaves


def main(config: Path, sound: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, list[str]] = {}
    judged(config, sound)  # writes the experiment
    experiment = json.loads((sound / "experiment.json").read_text())
    for role in ("oracle", "pool"):
        (sound / f"{role}.json").write_text(json.dumps(module.run(experiment, role, sound)))
    roomy = {"arena_bytes": experiment["config"]["sessions"] * experiment["plan"]["slab_bytes"]}
    flaws: dict[str, tuple[type[Spoilt], dict[str, int]]] = {
        "ballast": (Ballast, {}),
        "corrupt": (Corrupt, {}),
        "lazy": (Lazy, roomy),
        "no host memory": (Spoilt, {"host_bytes": 16 << 20}),
    }
    for flaw, (kind, changes) in flaws.items():
        folder = sound / flaw.replace(" ", "-")
        folder.mkdir()
        shutil.copy(sound / "oracle.json", folder)
        module.Run = kind  # type: ignore[misc]
        changed = {**experiment, "plan": {**experiment["plan"], **changes}}
        (folder / "pool.json").write_text(json.dumps(module.run(changed, "pool", folder)))
        found[flaw] = judged(config, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
