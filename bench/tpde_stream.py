"""Models larger than their budget of VRAM: tokens a second with packed weights, raw ones, and accelerate's cpu_offload.

    python bench/tpde_stream.py [--parts 13b,link,80gb,disk] [--layers N]

Weights are random, N(0, 0.02), whose exponents are distributed as those of trained weights are; one layer is drawn and
the others repeat it (``stream_setup.py``). Every row is written to ``bench/results/tpde_stream.json`` when it is known,
in the place of the last one of its id. ``13b``: Llama-2-13B's shape in bf16 under 8 GB, decoding after a prompt of 32
tokens, then the same with accelerate's ``cpu_offload``; logits of all ways are compared bit for bit. ``link``: host
memory to ready weights, nothing computed with them, against copying them raw: from resident 4-bit blocks, from a
resident bf16 base at several ratios, and alone. ``80gb``: 80 GB of fp32 weights in 16 GB, base in 4 bits, with the
driver's own count of used memory ten times a second. ``disk``: layers of Llama-2-13B's shape packed alone into a file and
streamed from it under 2 GB, against a plain read of what is read.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stream_setup import (
    DEVICE,
    HIDDEN_13B,
    HIDDEN_TINY,
    draw,
    drawn_name,
    fill,
    held_bytes,
    link_gbps,
    nothing_stays,
    of_layers,
    peak_bytes,
    quantized,
    say,
    seconds,
    shell,
    streamed,
    synchronize,
)
from transformers import LlamaForCausalLM

from common import median, row, update_results, write_series
from overspill import tpde

PROMPT_TOKENS, STEPS = 32, 6
SHAPES = {
    "13b": {**HIDDEN_13B, "num_hidden_layers": 40},
    "link": {**HIDDEN_13B, "num_hidden_layers": 20},
    "80gb": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_attention_heads": 48,
        "num_hidden_layers": 44,
    },
    "disk": {**HIDDEN_13B, "num_hidden_layers": 4},
    "tiny": {**HIDDEN_TINY, "num_hidden_layers": 3},
}
DRAWN = (
    "random weights N(0, 0.02), one layer drawn and packed, the others repeat it and share its host memory"
)


def add(*args: Any, **facts: Any) -> None:
    made = row(*args, **facts)
    say(made["id"], made["value"], made["unit"], made["note"])
    update_results("tpde_stream", [made])


def decode(model: LlamaForCausalLM, steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """Seconds of each decode step after the prompt, greedy, and the logits of all."""
    ids = torch.arange(1, PROMPT_TOKENS + 1, device=DEVICE)[None]
    times, logits, cache = [], [], None
    with torch.no_grad():
        for _ in range(steps + 1):
            synchronize()
            begin = time.perf_counter()
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            synchronize()
            times.append(time.perf_counter() - begin)
            logits.append(out.logits[:, -1].cpu())
    return times[1:], logits


def same_bits(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))


def resident_logits(
    shape: dict[str, int], weights: dict[str, torch.Tensor]
) -> tuple[float, list[torch.Tensor]]:
    """Tokens a second and logits with all weights on the device."""
    model = shell(shape, torch.bfloat16)
    drawn = {name: tensor.to(DEVICE) for name, tensor in weights.items() if drawn_name(name) == name}
    fill(model, {name: drawn[drawn_name(name)] for name in weights})
    model.model.rotary_emb.to(DEVICE)
    times, logits = decode(model, STEPS)
    say("resident, one layer's memory for all, seconds a token:", [round(t, 4) for t in times])
    return 1 / median(times), logits


def streamed_tokens(
    model: LlamaForCausalLM, weights: dict[str, torch.Tensor], budget_bytes: int, **options: Any
) -> tuple[float, list[torch.Tensor], dict[str, int]]:
    """Tokens a second, logits, and the report with the bytes of one token and the most that torch held."""
    fill(model, weights)
    torch.cuda.reset_peak_memory_stats() if DEVICE == "cuda" else None
    with streamed(model, budget_bytes, **options) as handle:
        decode(model, 1)
        before = handle.report()["link_bytes"]
        times, logits = decode(model, STEPS)
        report = handle.report()
    report["token_bytes"] = (report["link_bytes"] - before) // (STEPS + 1)
    report["peak_bytes"] = peak_bytes()
    say("seconds a token", [round(t, 4) for t in times], report)
    return 1 / median(times), logits, report


def part_13b(shape: dict[str, int], link: float, budget_bytes: int) -> None:
    model = shell(shape, torch.bfloat16)
    weights = draw(model)
    say("drawn")
    raw_gb = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    whole, expected = resident_logits(shape, weights)
    torch.cuda.empty_cache()
    packed, logits, ours = streamed_tokens(model, weights, budget_bytes)
    raw, raw_logits, theirs = streamed_tokens(model, weights, budget_bytes, packed=False)
    floor = [report["token_bytes"] / link / 1e9 for report in (ours, theirs)]
    limit = f"link {link:.1f} GB/s in the same run: {floor[0]:.4f} s a token for what crosses packed, {floor[1]:.4f} s raw"
    note = (
        f"Llama-2-13B's shape, {shape['num_hidden_layers']} layers, bf16, {raw_gb:.1f} GB, {DRAWN}, batch 1; budget "
        f"{budget_bytes / 1e9:.1f} GB, torch held {ours['peak_bytes'] / 1e9:.2f} GB at most "
        f"({theirs['peak_bytes'] / 1e9:.2f} raw); {1 / packed:.4f} and {1 / raw:.4f} s a token; "
        f"{ours['token_bytes'] / 1e9:.2f} and {theirs['token_bytes'] / 1e9:.2f} GB cross, the rest of the budget holds "
        f"{ours['resident_bytes'] / 1e9:.2f} GB packed or {theirs['resident_bytes'] / 1e9:.2f} GB raw; {whole:.1f} "
        f"tokens/s with all resident; logits of {STEPS + 1} steps bit-identical to those: {same_bits(logits, expected)}, "
        f"raw: {same_bits(raw_logits, expected)}"
    )
    facts = {"peer": "the same engine, weights not packed, tokens/s", "peer_value": raw}
    add("tpde.stream.tokens_vs_raw", packed / raw, "x", limit=limit, note=note, **facts)
    theirs_seconds, same = accelerates(model, weights, expected)
    facts = {"peer": "accelerate cpu_offload, tokens/s", "peer_value": 1 / theirs_seconds}
    note = (
        f"as tpde.stream.tokens_vs_raw; ours {1 / packed:.4f} s a token under {budget_bytes / 1e9:.1f} GB, accelerate "
        f"{theirs_seconds:.3f} s (median of 2; pageable memory, as it leaves it); its logits are the same bits: {same}"
    )
    add("tpde.stream.tokens_vs_accelerate", packed * theirs_seconds, "x", limit=limit, note=note, **facts)


def accelerates(
    model: LlamaForCausalLM, weights: dict[str, torch.Tensor], expected: list[torch.Tensor]
) -> tuple[float, bool]:
    """Seconds a token with accelerate's cpu_offload, and whether the logits are the expected ones."""
    from accelerate import cpu_offload

    fill(model, weights)
    cpu_offload(model, execution_device=torch.device(DEVICE))
    times, logits = decode(model, 2)
    return median(times), same_bits(logits, expected)


class Pass:
    """All layers' matrices made in turn on the device."""

    def __init__(self, model: LlamaForCausalLM, weights: dict[str, torch.Tensor], **options: Any) -> None:
        there = {key: weights[key].to(DEVICE) for key in weights if drawn_name(key) == key}
        fill(model, {key: tensor for key, tensor in weights.items() if ".layers." in key})
        fill(model, {key: tensor[:1] for key, tensor in weights.items() if ".layers." not in key})
        with nothing_stays(), streamed(model, held_bytes() + (6 << 30), reserve=1 << 20, **options) as handle:
            self.same = all(
                torch.equal(made.view(torch.uint8), there[drawn_name(key)].view(torch.uint8))
                for key, made in handle.weights()
            )
            before = handle.report()["link_bytes"]
            times = [seconds(lambda: [None for _ in handle.weights()]) for _ in range(5)]
            report = handle.report()
        self.seconds = median(times)
        self.bytes = (report["link_bytes"] - before) // 5 or report[
            "packed_bytes"
        ]  # on the CPU nothing crosses
        self.raw_bytes = report["raw_bytes"]
        say("seconds a pass", [round(t, 4) for t in times], "bits:", self.same, "bytes:", self.bytes)


def repeat(drawn: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    return {name: drawn[drawn_name(name)] for name in names}


def stepped(weights: dict[str, torch.Tensor], lr: float) -> dict[str, torch.Tensor]:
    """The layers' weights after a step that moved their masters by ``lr`` times a uniform number in [-1, 1]."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    made = {}
    for name in of_layers(weights):
        if drawn_name(name) == name:
            master = weights[name].to(DEVICE, torch.float32)
            # Masters lie anywhere between two words of 16 bits.
            master *= 1 + (torch.rand(master.shape, generator=generator, device=DEVICE) - 0.5) / 256
            moved = master + lr * (2 * torch.rand(master.shape, generator=generator, device=DEVICE) - 1)
            before, after = master.to(weights[name].dtype).cpu(), moved.to(weights[name].dtype).cpu()
            made[name] = torch.where(before == after, weights[name], after)
    return {**weights, **repeat(made, of_layers(weights))}


def part_link(shape: dict[str, int], link: float, rates: tuple[float, ...] = (6e-5, 1e-4, 1e-6)) -> None:
    model = shell(shape, torch.bfloat16)
    weights = draw(model)
    say("drawn")
    raw = Pass(model, weights, packed=False)
    limit = f"link {link:.1f} GB/s in the same run"
    peer = {"peer": "raw copies, the same engine, s", "peer_value": raw.seconds}
    what = (
        f"{shape['num_hidden_layers']} layers of Llama-2-13B's shape, bf16, {raw.raw_bytes / 1e9:.2f} GB, {DRAWN}; host "
        f"memory to ready weights, each matrix in turn, whole passes, median of 5, raw {1e3 * raw.seconds:.1f} ms"
    )
    told: list[str] = []
    shares: list[float] = []

    def measure(name: str, final: dict[str, torch.Tensor], base: dict[str, Any] | None) -> Pass:
        one = Pass(model, final, base=base)
        ratio, gain = raw.bytes / one.bytes, raw.seconds / one.seconds
        told.append(
            f"{name}: ratio {ratio:.2f}, {1e3 * one.seconds:.1f} ms, {gain:.2f}x, share {gain / ratio:.3f}, same bits: "
            f"{one.same}"
        )
        say(told[-1])
        if ratio <= 10:
            shares.append(gain / ratio if one.same else 0.0)
        note = f"{what}; worst of the ratios up to 10 of: {'; '.join(told)}"
        add("tpde.link.effective_share_of_ratio", min(shares), "share", limit=limit, note=note, **peer)
        return one

    q4 = measure("4-bit base resident", weights, quantized(weights, own_blocks=False))
    gain = raw.seconds / q4.seconds if q4.same else None
    add("tpde.q4.link_over_raw", gain, "x", limit=limit, note=f"{what}; {told[0]}", **peer)
    measure("alone", weights, None)
    names = of_layers(weights)
    there = {name: weights[name].to(DEVICE) for name in names if drawn_name(name) == name}
    for lr in rates:
        measure(f"bf16 base resident, step of {lr:g}", stepped(weights, lr), repeat(there, names))


class Watch:
    """The driver's count of used memory, ten times a second."""

    QUERY = (
        "nvidia-smi",
        "--query-gpu=memory.used,memory.total",
        "--format=csv,noheader,nounits",
        "-lms",
        "100",
    )

    def __init__(self) -> None:
        self._lines = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(self.QUERY, stdout=self._lines)

    def used_bytes(self) -> list[int]:
        """Ends it; all that it saw."""
        time.sleep(0.3)
        self._process.terminate()
        self._process.wait()
        self._lines.seek(0)
        return [int(line.split(",")[0]) << 20 for line in self._lines if line.count(",") == 1]


def part_80gb(shape: dict[str, int], link: float, budget_bytes: int) -> None:
    model = shell(shape, torch.float32)
    weights = draw(model)
    say("drawn")
    torch.cuda.empty_cache()
    watch = Watch() if DEVICE == "cuda" else None
    try:
        base = quantized(weights, own_blocks=True)
        say("quantized")
        fill(model, weights)
        with streamed(model, budget_bytes, base=base, reserve="256MiB") as handle:
            decode(model, 1)
            times, _ = decode(model, 2)
            checked = [
                torch.equal(made.cpu(), weights[key])
                for key, made in handle.weights()
                if key.endswith(("layers.0.mlp.down_proj.weight", "layers.1.self_attn.q_proj.weight"))
            ]
            report = handle.report()
        say("seconds a token", times, report, checked)
    finally:
        used = watch.used_bytes() if watch else [0]
    total = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    note = (
        f"{shape['num_hidden_layers']} layers of h = {shape['hidden_size']} in fp32, {total:.1f} GB of weights, {DRAWN}; each "
        f"layer has Q4_0 blocks of its own on the device ({sum(b.blocks.nbytes for b in base.values()) / 1e9:.1f} GB), the "
        f"residuals, {report['packed_bytes'] / 1e9:.1f} GB if every layer had its own, cross; the driver's count every "
        f"100 ms in series/tpde_80gb_nvml.json, context included; torch held {peak_bytes() / 1e9:.2f} GB at most; "
        f"{median(times):.2f} s a token; two weights compared bit for bit: {all(checked) and len(checked) == 2}"
    )
    series = {
        "seconds": [i / 10 for i in range(len(used))],
        "used_bytes": used,
        "title": f"TPDE: {total:.0f} GB of fp32 weights under 16 GB, {median(times):.2f} s a token",
        "marks": [[16 * 10**9, "16 GB"]],
    }
    write_series("tpde_80gb_nvml", series)
    add("tpde_stream.fp32_80gb_nvml_peak", max(used) / 1e9, "GB", limit=f"link {link:.1f} GB/s", note=note)


def forget(path: Path) -> None:
    """Drops a file from the page cache, where the system lets us."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_gbps(path: Path) -> float:
    """A plain read from front to back, in pieces of 16 MiB, from the disk."""
    forget(path)
    piece = bytearray(16 << 20)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    return path.stat().st_size / (time.perf_counter() - begin) / 1e9


def part_disk(shape: dict[str, int], link: float, budget_bytes: int) -> None:
    model = shell(shape, torch.bfloat16)
    weights = draw(model)
    resident = shell(shape, torch.bfloat16)
    fill(resident, {name: tensor.to(DEVICE) for name, tensor in weights.items()})
    resident.model.rotary_emb.to(DEVICE)
    ids = torch.arange(1, 9, device=DEVICE)[None]
    with torch.no_grad():
        expected = resident(ids).logits
    del resident
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tpde"
        packed = tpde.pack(None, weights, path, codec="gpu")
        say(f"packed {packed.raw_bytes / 1e9:.1f} GB, {packed.ratio:.2f}:1")
        plain_gbps = read_gbps(path)
        forget(path)
        handle = tpde.stream(model, held_bytes() + budget_bytes, patch=path, device=DEVICE, on_disk=True)
        try:
            with torch.no_grad():
                right = torch.equal(model(ids).logits, expected)
                forget(path)
                before = handle.report()["link_bytes"]
                cold = seconds(lambda: model(ids))
                read_gb = (handle.report()["link_bytes"] - before) / 1e9
                warm = median([seconds(lambda: model(ids)) for _ in range(3)])
            report = handle.report()
        finally:
            handle.close()
    note = (
        f"{shape['num_hidden_layers']} layers of Llama-2-13B's shape, bf16, {packed.raw_bytes / 1e9:.1f} GB, random weights, "
        f"packed alone {packed.ratio:.2f}:1 into a file of {packed.packed_bytes / 1e9:.1f} GB, which stays on disk; budget "
        f"{budget_bytes / 1e9:.1f} GB, of which {report['resident_bytes'] / 1e9:.1f} GB keep packed weights on the device; "
        f"a forward of 8 tokens after the file was dropped from the page cache reads {read_gb:.2f} GB; with the file in "
        f"the page cache {warm:.3f} s; logits bit for bit those of the resident model: {right}"
    )
    limit = f"a plain read of the file {plain_gbps:.2f} GB/s, dropped from the cache before: {read_gb / plain_gbps:.2f} s for what is read; link {link:.1f} GB/s"
    add("tpde_stream.from_disk_s", cold if right else None, "s", limit=limit, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="13b,link,80gb,disk")
    parser.add_argument("--layers", type=int, default=0, help="instead of each part's own number")
    parser.add_argument("--tiny", action="store_true", help="a few MB, to try the benchmark itself")
    args = parser.parse_args()
    budget_bytes = {"13b": 8 * 10**9, "80gb": 147 * 10**8, "disk": 2 * 10**9}
    link = link_gbps()
    say(f"link {link:.1f} GB/s")
    for part in args.parts.split(","):
        shape = SHAPES["tiny" if args.tiny else part]
        shape = {**shape, "num_hidden_layers": args.layers or shape["num_hidden_layers"]}
        say(part, shape)
        if part == "link":
            part_link(shape, link)
            continue
        run: Callable[..., None] = {"13b": part_13b, "80gb": part_80gb, "disk": part_disk}[part]
        run(shape, link, (held_bytes() + 10**9 if args.tiny else budget_bytes[part]))


if __name__ == "__main__":
    main()
