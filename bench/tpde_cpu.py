#!/usr/bin/env python3
"""TPDE on the CPU: ratios against bounds and peers on the same bytes, and speed. Writes bench/results/tpde_cpu.json.

usage: tpde_cpu.py DATA_DIR [--only PART,PART] [--out FILE] [--resume] [--limit-s SECONDS]

DATA_DIR is what `tpde_workloads.py` made. Parts: `speed`; `seed`, `q4`, `smollm`, `minilm`, `standalone`, `moments`
(ratios); `long` (checkpoints 500 steps apart); `zstd19` (that peer on one step of SmolLM2, minutes); `big` (a 6.4 GB
checkpoint under a 2 GiB address-space limit, in a scratch folder). All of them take about 20 minutes on 2 cores, most
of it zstd-19. A run of some parts replaces their rows and keeps the others, which then name the commit they are of.
Needs cargo (`big`), overspill, torch, gguf, safetensors, zstandard, zipnn, pcodec, blosc2.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import tpde_peers as peers
from safetensors.torch import load_file

import common
from overspill import tpde

RESULTS = Path(__file__).parent / "results" / "tpde_cpu.json"
# (run, from step, to step): the rows of the table of real steps, and checkpoints 500 steps apart.
REAL_STEPS = [
    *(("smollm-lr1e-6", a, b) for a, b in (("00", "01"), ("02", "03"), ("05", "06"))),
    *(("smollm-lr1e-5", a, b) for a, b in (("00", "01"), ("05", "06"))),
    *(("smollm-lr5e-5", a, b) for a, b in (("00", "01"), ("02", "03"))),
    *(("minilm-lr1e-6", a, b) for a, b in (("00", "01"), ("05", "06"), ("09", "10"), ("00", "10"))),
    *(("minilm-lr1e-5", a, b) for a, b in (("05", "06"), ("00", "10"))),
    *(("minilm-lr5e-5", a, b) for a, b in (("00", "01"), ("09", "10"))),
    *(("minilm-long-lr1e-5", a, b) for a, b in (("499", "500"), ("000", "500"))),
]
# zstd-19 takes minutes for a step of SmolLM2, so it gets one of them.
SLOW_SMOLLM_STEP = ("smollm-lr1e-6", "02", "03")
DENSEST_FOR_XOR_GOAL_PCT = 3.0
PROVENANCE = {
    "smollm": "SmolLM2-135M, trained by others, public weights 4-bit dequantized",
    "minilm": "MiniLM-L6, trained by others, never quantized",
}


class Report:
    """The rows of the result file: those of this run, and those of earlier runs that it did not replace."""

    def __init__(self, out: Path, limit_s: float = float("inf")) -> None:
        self.out = out
        self.limit_s = limit_s
        self.began = time.monotonic()
        self.rows: list[dict] = []
        old = json.loads(out.read_text()) if out.exists() else {"rows": [], "commit": common.commit()}
        # What this commit has measured already: a part that was cut short goes on with `--resume`.
        same = old["commit"] == common.commit()
        self.done = {row["id"] for row in old["rows"] if same and "; at commit " not in row["note"]}
        self.kept = [row for row in old["rows"] if not row["id"].startswith("tpde.ratio.real_step.")]
        if old["commit"] != common.commit():
            for row in self.kept:
                if "; at commit " not in row["note"]:
                    row["note"] += f"; at commit {old['commit'][:12]}"
        self.load_before = os.getloadavg()[0]

    def add(self, name: str, value: float, unit: str, note: str, **more) -> None:
        """Notes and prints one row; ``more`` may hold peer, peer_value and limit."""
        if unit == "GB/s":
            note += f"; load average before the run {self.load_before:.1f}"
        row = row_of(name, value, unit, note, **more)
        self.rows.append(row)
        peer = f"  {row['peer']}: {row['peer_value']:.3f}" if row["peer"] else ""
        limit = f"  limit {row['limit']:.3f}" if row["limit"] else ""
        print(f"{name}: {value:.4g} {unit}{peer}{limit}  ({note})", flush=True)

    def save(self) -> None:
        """Writes all rows, and the goals that are worst cases over them."""
        made = {(row["id"], row["peer"]) for row in self.rows}
        rows = [row for row in self.kept if (row["id"], row["peer"]) not in made] + self.rows
        packages = ("overspill", "torch", "numpy", "zstandard", "zipnn", "pcodec", "blosc2")
        versions = {name: importlib.metadata.version(name) for name in packages}
        result = {
            "machine": common.machine(),
            "commit": common.commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": versions | {"python": platform.python_version()},
            "rows": rows + worst_steps(rows),
        }
        self.out.parent.mkdir(exist_ok=True)
        self.out.write_text(json.dumps(result, indent=1) + "\n")


def row_of(name: str, value: float, unit: str, note: str, **more) -> dict:
    """A row of the result file; ``more`` may hold peer, peer_value and limit."""
    return (
        {"id": name, "value": value, "unit": unit, "peer": None, "peer_value": None, "limit": None}
        | more
        | {"note": note}
    )


def words_of(state: dict[str, torch.Tensor]) -> np.ndarray:
    """All tensors' words, flat, in order of name."""
    kinds = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    flat = []
    for name in sorted(state):
        view, unsigned = kinds[state[name].dtype.itemsize]
        flat.append(state[name].contiguous().view(-1).view(view).numpy().view(unsigned))
    return np.concatenate(flat)


def tpde_bytes(base, final, codec: str = "auto") -> int:
    """Size of the patch, everything counted; raises unless the final comes back exactly."""
    packed = tpde.pack(base, final, codec=codec)
    found = tpde.apply(packed.data, base)
    if not np.array_equal(words_of(found), words_of(final)):
        raise AssertionError("TPDE does not give the final back")
    return packed.packed_bytes


def compare(
    report: Report, name: str, base, final, note: str, limit: float | None, slow: bool, *, peers_base=None
) -> dict[str, float]:
    """One row a peer; returns the ratio of each, ours under "tpde". ``peers_base`` is the base as tensors, if it is not."""
    new = words_of(final)
    old = None if base is None else words_of(base if peers_base is None else peers_base)
    raw = new.nbytes
    found = {"tpde": raw / tpde_bytes(base, final)}
    table = {**peers.STANDALONE, **(peers.SLOW_STANDALONE if slow else {})}
    if old is not None:
        table |= peers.DELTA
        if peers_base is None:
            found["elias-zstd"] = raw / tpde_bytes(base, final, "elias-zstd")
    for peer, codec in table.items():
        found[peer] = raw / peers.packed_bytes(codec, old, new)
    for peer, ratio in found.items():
        if peer != "tpde":
            report.add(name, found["tpde"], "x", note, peer=peer, peer_value=ratio, limit=limit)
    return found


def real_step(data: Path, run: str, a: str, b: str) -> tuple[str, list[dict[str, torch.Tensor]], str, float]:
    """Name, base and final, note and bound of a step."""
    base, final = (load_file(data / f"{run}-k{k}.safetensors") for k in (a, b))
    model, lr = run.split("-")[0], run.split("lr")[1]
    bound = sum(peers.step_bound_bytes(words_of({"": base[n]}), words_of({"": final[n]})) for n in base)
    old, new = words_of(base), words_of(final)
    changed_pct = 100 * float(np.count_nonzero(old != new)) / new.size
    batch = (
        "128 tokens" if model == "smollm" else "8 pairs of 32 tokens" if "long" in run else "16 pairs of 64"
    )
    note = f"{PROVENANCE[model]}; AdamW lr {lr}, cold start, {batch} a step, step {a} to {b}; {changed_pct:.2f}% changed"
    return f"tpde_cpu.step.{run}.{a}_{b}", [base, final], note, new.nbytes / bound


def real_steps(report: Report, data: Path, runs: str, resume: bool) -> None:
    for run, a, b in REAL_STEPS:
        if not re.match(runs, run) or (resume and f"tpde_cpu.step.{run}.{a}_{b}" in report.done):
            continue
        if time.monotonic() - report.began > report.limit_s:
            raise SystemExit("out of time: go on with --resume")
        name, states, note, bound = real_step(data, run, a, b)
        compare(report, name, *states, note, bound, "minilm" in run)
        report.save()


def slow_smollm(report: Report, data: Path) -> None:
    name, (base, final), note, bound = real_step(data, *SLOW_SMOLLM_STEP)
    new = words_of(final)
    for peer, codec in peers.SLOW_STANDALONE.items():
        ratio = new.nbytes / peers.packed_bytes(codec, None, new)
        own = new.nbytes / tpde_bytes(base, final)
        report.add(name, own, "x", note, peer=peer, peer_value=ratio, limit=bound)


def worst_steps(rows: list[dict]) -> list[dict]:
    """The goals over all real steps, from their rows."""
    steps = [row for row in rows if row["id"].startswith("tpde_cpu.step.")]
    if not steps:
        return []
    worst = min(steps, key=lambda row: row["value"] / row["limit"])
    share = worst["value"] / worst["limit"]
    note = f"worst of {len({row['id'] for row in steps})}: {worst['note']}"
    goals = [row_of("tpde.ratio.real_step.bound_share", share, "share", note, limit=1.0)]
    sparse = [
        row
        for row in steps
        if row["peer"] == "xor + zstd-1"
        and float(re.search(r"([0-9.]+)% changed", row["note"]).group(1)) <= DENSEST_FOR_XOR_GOAL_PCT
    ]
    if sparse:
        worst = min(sparse, key=lambda row: row["value"] / row["peer_value"])
        note = f"worst of {len(sparse)}: {worst['note']}"
        goals.append(
            row_of("tpde.ratio.real_step.vs_xor_zstd1", worst["value"] / worst["peer_value"], "x", note)
        )
    return goals


def seed(report: Report) -> None:
    base, final, bound = peers.seed_workload(0)
    note = "random weights: fp32 768x2304 N(0, 0.14), 10% changed by N(0, 0.01), seed 0"
    states = [{"w": torch.from_numpy(array)} for array in (base, final)]
    found = compare(report, "tpde_cpu.seed", *states, note, final.nbytes / bound, slow=True)
    report.add("tpde.ratio.seed_fp32_10pct", found["tpde"] * bound / final.nbytes, "share", note, limit=1.0)


def standalone(report: Report, data: Path) -> None:
    for kind in ("bf16", "fp32"):
        note = f"{PROVENANCE['minilm']}, {kind}, no base"
        found = compare(
            report,
            f"tpde_cpu.standalone.{kind}",
            None,
            load_file(data / f"minilm-{kind}.safetensors"),
            note,
            None,
            True,
        )
        if kind == "bf16":
            report.add("tpde.ratio.standalone_bf16", found["tpde"], "x", note)


def moments(report: Report, data: Path) -> None:
    base, final = (load_file(data / f"minilm-moments-k{k}.safetensors") for k in ("09", "10"))
    for key in ("exp_avg", "exp_avg_sq"):
        old, new = ({n: t for n, t in state.items() if n.endswith(f".{key}")} for state in (base, final))
        note = f"AdamW {key} of {PROVENANCE['minilm']}; fp32, lr 1e-5, after step 9 and step 10"
        compare(report, f"tpde_cpu.moments.{key}", old, new, note, None, True)


def q4_base(report: Report, data: Path) -> None:
    final = data / "minilm-bf16.safetensors"
    matrices = {n: t for n, t in load_file(final).items() if t.dim() == 2 and t.shape[1] % 32 == 0}
    best = 0.0
    for kind in ("q4_0", "q4_1"):
        base = data / f"minilm-{kind}.gguf"
        dequantized = {
            block.name: tpde.Quantized(
                kind.upper(),
                torch.bfloat16,
                tuple(matrices[block.name].shape),
                torch.from_numpy(block.data.reshape(-1).copy()),
            ).dequantize()
            for block in gguf.GGUFReader(base).tensors
            if block.name in matrices
        }
        note = f"{PROVENANCE['minilm']}; bf16 matrices from their {kind} blocks, base not counted; peers get it dequantized"
        found = compare(
            report, f"tpde_cpu.q4.{kind}", base, matrices, note, None, True, peers_base=dequantized
        )
        best = max(best, found["tpde"])
    report.add(
        "tpde.ratio.q4_base",
        best,
        "x",
        f"{PROVENANCE['minilm']}; bf16 matrices, the better of Q4_0 and Q4_1 blocks",
    )


ROUNDS = 9


def interleaved(works: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, by turns, after one of each that does not count: what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for counts in [False] + [True] * rounds:
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if counts:
                times[name].append(time.perf_counter() - began)
    return times


def speed(report: Report, data: Path) -> None:
    base, final = (load_file(data / f"smollm-lr1e-6-k{k}.safetensors") for k in ("02", "03"))
    raw_bytes = sum(t.nbytes for t in final.values())
    patch = tpde.pack(base, final).data
    opened = tpde.open(patch)
    into = {name: tensor.clone() for name, tensor in base.items()}
    hashed = "patch authenticated, base and result hashed"
    works = {
        "tpde.cpu.pack_gbps": (
            lambda: tpde.pack(base, final),
            "base and final hashed; bound by the ranks of changed words among their class, then by finding them",
        ),
        "tpde_cpu.apply_allocating_gbps": (
            lambda: opened.apply(base),
            f"{hashed}, into new memory (its first touch included)",
        ),
        "tpde.cpu.apply_gbps": (
            lambda: opened.apply(base, into=into),
            f"{hashed}, into tensors that the caller holds",
        ),
        "tpde_cpu.apply_known_base_gbps": (
            lambda: opened.apply(base, base_id=opened.base_id, into=into),
            "base's state id carried, not hashed again, into tensors that the caller holds",
        ),
    }
    floor = "tpde_cpu.hash_both_gbps"
    works[floor] = (
        lambda: (tpde.state_id(base), tpde.state_id(final)),
        "base and final read and hashed, nothing else: what pack and apply cannot pass",
    )
    times = interleaved({name: work for name, (work, _) in works.items()})
    if not np.array_equal(words_of(into), words_of(final)):
        raise AssertionError("TPDE does not give the final back")
    for name, (_, what) in works.items():
        rates = [raw_bytes / 1e9 / t for t in times[name]]
        note = (
            f"{PROVENANCE['smollm']}; AdamW lr 1e-6, step 2 to 3, 1.07% changed; in memory, {os.cpu_count()} cores; "
            f"median of {ROUNDS} by turns, {min(rates):.2f}-{max(rates):.2f}; {what}"
        )
        limit = None if name == floor else raw_bytes / 1e9 / statistics.median(times[floor])
        report.add(name, statistics.median(rates), "GB/s", note, limit=limit)
    standalone_speed(report, data)


def standalone_speed(report: Report, data: Path) -> None:
    alone = load_file(data / "minilm-bf16.safetensors")
    raw = words_of(alone).tobytes()
    codec = peers.zipnn_codec(2)
    zipped = bytes(codec.compress(raw))
    whole = tpde.open(tpde.pack(None, alone).data)
    times = interleaved(
        {
            "pack": lambda: tpde.pack(None, alone),
            "zipnn pack": lambda: codec.compress(raw),
            "apply": whole.apply,
            "zipnn apply": lambda: codec.decompress(zipped),
        }
    )
    ratios = []
    for name in ("pack", "apply"):
        own, peer = ([len(raw) / 1e9 / t for t in times[who]] for who in (name, f"zipnn {name}"))
        note = (
            f"{PROVENANCE['minilm']}, bf16 alone, in memory, 2 threads each; ours with hashing; medians of {ROUNDS} by "
            f"turns; ours {min(own):.2f}-{max(own):.2f}, zipnn {min(peer):.2f}-{max(peer):.2f}"
        )
        own, peer = statistics.median(own), statistics.median(peer)
        report.add(f"tpde_cpu.standalone_{name}_gbps", own, "GB/s", note, peer="zipnn", peer_value=peer)
        ratios.append((own / peer, note))
    worse, note = min(ratios)
    report.add("tpde.cpu.standalone_vs_zipnn", worse, "x", f"the worse of pack and apply; {note}")


def big(report: Report) -> None:
    """Packs and applies 6 GB under an address-space limit of 2 GiB, through the command line without torch, whose
    libraries alone take more address space.
    """
    subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "overspill-cli"], check=True)
    binary = "target/release/overspill"
    limit = 2 << 30
    words = 3 << 30
    header = json.dumps(
        {
            f"w{i}": {
                "dtype": "BF16",
                "shape": [words // 12],
                "data_offsets": [i * words // 6, (i + 1) * words // 6],
            }
            for i in range(12)
        },
        separators=(",", ":"),
    )
    # The canonical header, which is what a rebuilt file has.
    header += " " * (-len(header) % 8)
    rng = np.random.default_rng(0)
    piece = (rng.standard_normal(1 << 24) * 0.02).astype(np.float32).view(np.uint32) >> 16
    piece = piece.astype(np.uint16)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_SCRATCH")) as folder:
        paths = {
            name: os.path.join(folder, name)
            for name in ("a.safetensors", "b.safetensors", "p.tpde", "out.safetensors")
        }
        for name in ("a.safetensors", "b.safetensors"):
            moved = piece.copy()
            if name.startswith("b"):
                moved[rng.random(piece.size) < 0.01] += 1
            with open(paths[name], "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header.encode())
                for _ in range(words // piece.size):
                    file.write(moved.tobytes())

        def run(*args: str) -> tuple[float, int]:
            began = time.perf_counter()
            command = [binary, "tpde", "-q", "--memory-budget", "1GiB", *args]
            cap = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # noqa: E731
            process = subprocess.Popen(command, preexec_fn=cap)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise RuntimeError(f"{args[0]} failed under the limit: {status}")
            return time.perf_counter() - began, usage.ru_maxrss * 1024

        a, b, p, out = paths.values()
        for name, args in (
            ("pack", ("--base", a, "--final", b, "-o", p)),
            ("apply", ("--base", a, "--patch", p, "-o", out)),
        ):
            took, peak = run(name, *args)
            note = f"random bf16 weights, 6.4 GB, 1% changed, files on disk; address space limited to 2 GiB; {took:.0f} s"
            report.add(f"tpde_cpu.big_{name}_peak_bytes", peak, "bytes", note, limit=limit)
        if subprocess.run(["cmp", b, out], check=False).returncode:
            raise AssertionError("the rebuilt file differs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    work = {
        "speed": lambda: speed(report, args.data),
        "seed": lambda: seed(report),
        "q4": lambda: q4_base(report, args.data),
        "smollm": lambda: real_steps(report, args.data, "smollm-lr", args.resume),
        "minilm": lambda: real_steps(report, args.data, "minilm-lr", args.resume),
        "standalone": lambda: standalone(report, args.data),
        "moments": lambda: moments(report, args.data),
        "long": lambda: real_steps(report, args.data, "minilm-long", args.resume),
        "zstd19": lambda: slow_smollm(report, args.data),
        "big": lambda: big(report),
    }
    parser.add_argument("--only", metavar="PART,PART", default=",".join(work))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--resume", action="store_true", help="leave out real steps that this commit has measured"
    )
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no real step after that")
    args = parser.parse_args()
    report = Report(args.out, args.limit_s)
    for part in args.only.split(","):
        work[part]()
        report.save()


if __name__ == "__main__":
    main()
