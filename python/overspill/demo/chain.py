"""The demo's own training steps, kept in a chain: what that takes, and a step brought back."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from overspill import tpde
from overspill._units import format_bytes


def keep_in_chain(files: list[Path], folder: Path) -> dict[str, Any]:
    """Commits the states in ``files`` (step 0 first), brings the middle one back and compares it bit for bit."""
    shutil.rmtree(folder, ignore_errors=True)
    chain = tpde.Chain(folder)
    seconds = []
    for step, path in enumerate(files):
        begin = time.perf_counter()
        part = chain.commit(step, path).parts["params"]
        seconds.append(time.perf_counter() - begin)
        size = format_bytes(part.new_bytes)
        print(f"  chain     step {step}: {part.role}, {size} added, {seconds[-1]:.1f} s", flush=True)
    middle = len(files) // 2
    restored = folder / "restored.safetensors"
    begin = time.perf_counter()
    chain.restore(middle, restored)
    restore_s = time.perf_counter() - begin
    identical = tpde.state_id(restored) == tpde.state_id(files[middle])
    restored.unlink()
    log = chain.log()
    raw = sum(step.parts["params"].raw_bytes for step in log)
    added = sum(step.parts["params"].new_bytes for step in log)
    return {
        "chain.steps": len(log),
        "chain.raw_bytes": raw,
        "chain.bytes": added,
        "chain.ratio": raw / added,
        "chain.patch_ratio": log[-1].parts["params"].raw_bytes / log[-1].parts["params"].new_bytes,
        "chain.commit_s": sorted(seconds)[len(seconds) // 2],
        "chain.restored_step": middle,
        "chain.restore_s": restore_s,
        "chain.bit_identical": identical,
    }


def print_chain(report: dict[str, Any]) -> None:
    """The table for people."""
    ratio = f"{report['chain.ratio']:.2f}:1, one step {report['chain.patch_ratio']:.2f}:1"
    verdict = "identical, bit for bit" if report["chain.bit_identical"] else "DIFFERENT"
    rows = (
        (f"{report['chain.steps']} checkpoints, raw", format_bytes(report["chain.raw_bytes"])),
        ("in the chain", format_bytes(report["chain.bytes"])),
        ("ratio", ratio),
        ("commit, median", f"{report['chain.commit_s']:.1f} s"),
        (f"step {report['chain.restored_step']} restored", f"{verdict}, {report['chain.restore_s']:.1f} s"),
    )
    print()
    for name, value in rows:
        print(f"{name:<28}{value}")
