"""The schedule of an experiment, turn by turn: under the cap, or with nothing swapped.

Both do the same forwards with the same rows. Under the cap sessions leave, come back and pause as the schedule says;
the oracle has room for all (or for one group after the other), moves nothing and pauses nowhere.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .._native import return_freed_tensors
from ..demo.data import warm_up
from ..djinn import Break, Generated, Ongoing, Output, Paused, Session, SessionPool
from ..djinn.steering import tensor_bytes
from ..errors import OverspillError
from .build import build, prompts, steering
from .meter import Meter

WARM_TOKENS = 16
LINK_REPEATS = 5


class Run:
    """One pass over the schedule."""

    def __init__(self, experiment: dict[str, Any], pool: SessionPool, role: str) -> None:
        self.config, self.plan, self.role = experiment["config"], experiment["plan"], role
        self.pool, self.swaps = pool, role == "pool"
        self.prompts = prompts(self.config)
        self.vector = steering(self.config, pool.shape.device)
        self.sessions: dict[int, Session] = {}
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, str] = {}
        self.lost: list[dict[str, Any]] = []
        self.turns: list[dict[str, Any]] = []

    def schedule(self, turns: list[dict[str, Any]]) -> None:
        """Runs turns; one that fails is noted, and its sessions go on if they can."""
        for index, turn in enumerate(turns):
            begin, before = time.perf_counter(), self.counted()
            if self.swaps:
                self.expect(turns, index)
                self.bring_back(turn)
            coming = [self.sessions[name] for name in turn["prefetch"] if name in self.sessions]
            for name in turn["start"]:
                self.attempt([name], lambda name=name: self.start(name))
                if self.swaps and coming:
                    coming.pop(0).restore()
            due: dict[int, list[int]] = {}
            for name, to in zip(turn["rows"], turn["to"], strict=True):
                steps = to - len(self.tokens.get(name, []))
                stands_in_prompt = name in turn["start"] and not self.tokens.get(name)
                if name in self.sessions and steps > 0 and not stands_in_prompt:
                    due.setdefault(steps, []).append(name)
            for steps, names in due.items():
                bring, coming = (coming if self.swaps else []), []
                self.attempt(
                    names, lambda steps=steps, names=names, bring=bring: self.decode(names, steps, bring)
                )
            seconds = time.perf_counter() - begin
            count = self.counted() - before
            self.turns.append({"s": seconds, "tokens": count, "starts": len(turn["start"])})

    def counted(self) -> int:
        """Tokens so far."""
        return sum(map(len, self.tokens.values()))

    def attempt(self, names: list[int], what: Any) -> None:
        """Does something for sessions; if that fails they are noted."""
        try:
            what()
        except OverspillError as error:
            text = f"{type(error).__name__}: {error}"
            self.lost += [{"session": name, "error": text} for name in names]

    def expect(self, turns: list[dict[str, Any]], index: int) -> None:
        """Says when those who are done will be needed: who leaves for another, and who goes to disk, is decided by it."""
        for name in self.sessions.keys() & turns[index]["leave"]:
            later = (n for n, turn in enumerate(turns[index:]) if name in turn["rows"])
            # The order counts: no turn takes a minute, so that nobody is overdue.
            away_us = 60e6 * next(later, len(turns))
            self.pool._native.expect(self.sessions[name]._key, away_us)

    def bring_back(self, turn: dict[str, Any]) -> None:
        """Brings back who decodes now and is not there yet."""
        for name in [name for name in turn["rows"] if name in self.sessions]:
            self.attempt([name], lambda name=name: self.sessions[name].restore())

    def start(self, name: int) -> None:
        """Runs a session's prompt."""
        session = self.sessions[name] = self.pool.session(str(name))
        if self.vector is not None:
            session.steer(self.config["steer_layer"], self.vector)
        breaks = [Break(one["layer"], one["step"]) for one in self.config["breaks"]] if self.swaps else []
        self.note(name, session.start(self.prompts[name], self.config["new_tokens"], breaks))

    def decode(self, names: list[int], steps: int, bring: list[Session]) -> None:
        """Some tokens more for some sessions; meanwhile others come back."""
        outcomes = self.pool.decode([self.sessions[name] for name in names], steps, bring)
        for name, outcome in zip(names, outcomes, strict=True):
            self.note(name, outcome)

    def note(self, name: int, outcome: Paused | Generated | Ongoing | Output) -> None:
        """What a session has now."""
        if isinstance(outcome, Paused):
            self.tokens[name] = list(outcome.generated)
        elif isinstance(outcome, Generated | Ongoing):
            self.tokens[name] = list(outcome.tokens)
        if isinstance(outcome, Generated):
            self.logits[name] = hashlib.sha256(tensor_bytes(outcome.logits)).hexdigest()

    def close(self) -> None:
        """Ends all sessions."""
        for session in self.sessions.values():
            session.close()
        self.sessions.clear()


def run(experiment: dict[str, Any], role: str, out: Path) -> dict[str, Any]:
    """Runs the schedule as ``pool`` or as ``oracle``; what was found."""
    config, plan = experiment["config"], experiment["plan"]
    device = torch.device("cuda", 0) if config["device"] == "cuda" else torch.device("cpu")
    return_freed_tensors()
    if device.type == "cpu":
        warm_up(device)
    meter = Meter(device)
    before = meter.gauge.used_bytes()
    torch.zeros(1, device=device)
    context = meter.gauge.used_bytes() - before
    if device.type == "cuda" and role == "pool":
        # What torch may take besides: it fails rather than cross the cap.
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((plan["cap_bytes"] - before - context) / total)
    model = build(config, device)
    link = measure_link(plan["session_bytes"], device) if role == "pool" else {}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        pool = make_pool(experiment, model, role, folder)
        warm(pool, config, {len(turn["rows"]) for turn in plan["turns"]})
        pool._native.log_swaps(role == "pool")
        one = Run(experiment, pool, role)
        meter.start()
        begin = time.perf_counter()
        if role == "oracle" and config["oracle_by_group"]:
            for group in groups_of(plan["turns"]):
                one.schedule([turn for turn in plan["turns"] if set(turn["rows"]) <= group])
                one.close()
        else:
            one.schedule(plan["turns"])
        pool.synchronize()
        seconds = time.perf_counter() - begin
        samples = meter.stop()
        swaps = json.loads(pool._native.swaps_json()) if role == "pool" else []
        memory = breakdown(model, pool, before, context, max(used for _, used in samples))
        report = pool.report()
        one.close()
    alone = [turn for turn in one.turns if not turn["starts"]]
    return {
        "role": role, "device": config["device"], "timeline_source": meter.gauge.source,
        "timeline": [[round(at, 4), used] for at, used in samples],
        "link": link, "memory": memory, "swaps": swaps, "lost": one.lost, "turns": one.turns, "pool": report,
        "turn_s": sum(turn["s"] for turn in alone), "turn_tokens": sum(turn["tokens"] for turn in alone),
        "all_s": seconds, "all_tokens": one.counted(),
        "tokens": {str(name): found for name, found in one.tokens.items()},
        "logits": {str(name): found for name, found in one.logits.items()},
        "versions": {"torch": torch.__version__}, "machine": machine(device),
    }  # fmt: skip


def make_pool(experiment: dict[str, Any], model: Any, role: str, folder: str) -> SessionPool:
    """The pool under the cap, or one with room for all that run without a swap."""
    config, plan = experiment["config"], experiment["plan"]
    swaps, disk = role == "pool", config["disk_gb"] > 0
    rows = max(len(turn["rows"]) for turn in plan["turns"])
    together = rows if config["oracle_by_group"] else config["sessions"]
    pool = SessionPool(
        model,
        arena_budget=plan["arena_bytes"] if swaps else together * plan["slab_bytes"],
        host_budget=plan["host_bytes"] if swaps else 1 << 20,
        spill_dir=folder if swaps and disk else None,
        spill_limit=plan["disk_bytes"] if disk else 1 << 20,
        session_tokens=plan["slab_tokens"],
        write_through=swaps,
        fixed_decode=config["device"] == "cuda",
    )
    if swaps and config["device"] == "cuda":
        pool._native.reserve_host()
    return pool


def groups_of(turns: list[dict[str, Any]]) -> list[set[int]]:
    """Sessions that decode together in any turn, directly or through others."""
    groups: list[set[int]] = []
    for turn in turns:
        rows = set(turn["rows"])
        touched = [group for group in groups if group & rows]
        groups = [group for group in groups if not group & rows] + [rows.union(*touched)]
    return groups


def warm(pool: SessionPool, config: dict[str, Any], sizes: set[int]) -> None:
    """Libraries, kernels and graphs that every run loads are not the experiment's time."""
    pool.session("warm").run(prompts(config)[0][: config["prompt_tokens"]], logits_to_keep=1)
    pool.session("warm").close()
    for size in sorted(sizes):
        sessions = [pool.session(f"warm {i}") for i in range(size)]
        for session in sessions:
            session.start(list(range(WARM_TOKENS)), 4, [Break(0, 1)])
        pool.decode(sessions, 4)
        pool.decode(sessions, 4)
        for session in sessions:
            session.close()
    pool.synchronize()


def measure_link(count: int, device: torch.device) -> dict[str, float]:
    """GB/s of a plain copy of as many bytes as a session has, out and in: the best of some."""
    pinned = device.type == "cuda"
    there = torch.zeros(count, dtype=torch.uint8, device=device)
    here = torch.zeros(count, dtype=torch.uint8, pin_memory=pinned)

    def gbps(target: torch.Tensor, source: torch.Tensor) -> float:
        best = float("inf")
        for _ in range(LINK_REPEATS):
            _synchronize(device)
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            _synchronize(device)
            best = min(best, time.perf_counter() - begin)
        return count / best / 1e9

    found = {"out_gbps": gbps(here, there), "in_gbps": gbps(there, here)}
    del there, here
    if pinned:
        torch.cuda.empty_cache()
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def breakdown(model: Any, pool: SessionPool, before: int, context: int, most: int) -> dict[str, int]:
    """What the most that was shown is made of; each part measured by itself, the rest said."""
    weights = sum(one.numel() * one.itemsize for one in {id(p): p for p in model.parameters()}.values())
    parts = {
        "before_bytes": before,
        "context_bytes": context,
        "weight_bytes": weights,
        "arena_bytes": pool._arena.numel(),
    }
    if pool.shape.device.type == "cuda":
        held = torch.cuda.max_memory_reserved(pool.shape.device)
        parts["torch_rest_bytes"] = held - weights - pool._arena.numel()
    else:
        parts["host_pool_bytes"] = pool.report()["host"]["bytes_reserved"]
    return {**parts, "most_bytes": most, "unexplained_bytes": most - sum(parts.values())}


def machine(device: torch.device) -> str:
    """What it ran on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
