"""Models larger than their budget of VRAM: tokens a second with packed weights, raw ones, and accelerate's cpu_offload.

    python bench/tpde_stream.py [--parts 13b,q4,80gb] [--layers N]

Weights are random, N(0, 0.02), whose exponents are distributed as those of trained weights are. Every part writes
``bench/results/tpde_stream.json`` anew, so that a run cut short loses nothing. ``13b``: Llama-2-13B's shape in bf16
under 8 GB, decoding after a prompt of 32 tokens; logits of all ways are compared bit for bit. ``q4``: weights ready on
the device from a resident 4-bit base and residuals in host memory, against copying them raw. ``80gb``: 80 GB of fp32
weights in 16 GB, base in 4 bits, with the driver's own count of used memory ten times a second.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from common import median, row, write_results
from overspill import _native, _stream, tpde

ROWS: list[dict[str, Any]] = []
DEVICE = "cuda"
PROMPT_TOKENS, STEPS = 32, 6
DRAWN = 2
"""Layers that are drawn; the others repeat them."""
SHAPES = {
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
    },
    "q4": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_hidden_layers": 6,
    },
    "80gb": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_attention_heads": 48,
        "num_hidden_layers": 44,
    },
}


def add(*args: Any, **facts: Any) -> None:
    ROWS.append(row(*args, **facts))
    print(ROWS[-1]["id"], ROWS[-1]["value"], ROWS[-1]["unit"], ROWS[-1]["note"], flush=True)
    write_results("tpde_stream", ROWS)


def link_gbps() -> float:
    """Page-locked memory to the device, 1 GiB, best of 5."""
    memory = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(memory, device=DEVICE)
    return max(
        memory.numel() / seconds(lambda: there.copy_(memory, non_blocking=True)) / 1e9 for _ in range(5)
    )


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def shell(shape: dict[str, int], dtype: torch.dtype) -> LlamaForCausalLM:
    """The model without weights."""
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


def draw(model: LlamaForCausalLM, distinct_layers: int) -> dict[str, torch.Tensor]:
    """Random weights on the CPU; layers beyond ``distinct_layers`` share memory with earlier ones."""
    torch.manual_seed(0)
    drawn: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) % distinct_layers)
        key = ".".join(parts)
        if key not in drawn:
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
            drawn[key] = (made.fill_(1) if parameter.dim() == 1 else made.normal_(0, 0.02)).cpu()
        if key != name:
            drawn[name] = drawn[key]
    return {name: drawn[name] for name, _ in model.named_parameters()}


def fill(model: LlamaForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters[attribute] = torch.nn.Parameter(tensor, requires_grad=False)


def decode(model: LlamaForCausalLM, steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """Seconds of each decode step after the prompt, greedy, and the logits of all."""
    ids = torch.arange(1, PROMPT_TOKENS + 1, device=DEVICE)[None]
    times, logits, cache = [], [], None
    with torch.no_grad():
        for _ in range(steps + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            logits.append(out.logits[:, -1].cpu())
    return times[1:], logits


BEGIN = time.monotonic()


def say(*what: Any) -> None:
    print(f"[{time.monotonic() - BEGIN:.1f} s]", *what, flush=True)


class Repeated(_stream.Streamed):
    """Packs each of the layers that were drawn once, and uses its bytes again for those that repeat it.

    With ``shares_host`` a repeated layer lies in the same page-locked memory too, which saves the time to make it.
    """

    drawn_layers = 1
    shares_host = True
    known: dict[tuple[str, ...], Any]
    hosts: dict[str, torch.Tensor]

    def _pack_group(self, group: list[Any], patch: Any, packed: bool) -> None:
        pack, names = tpde.pack, [weight.key for weight in group]

        def once(base: Any, final: Any) -> Any:
            key = tuple(final)
            if key not in self.known:
                self.known[key] = pack(base, final, memory_bytes=16 << 30)
            return self.known[key]

        for weight in group:
            parts = weight.key.split(".")
            if "layers" in parts:
                parts[2] = str(int(parts[2]) % self.drawn_layers)
            weight.key = ".".join(parts)
        pin = _stream._pin

        def pin_once(weights: list[Any], device: torch.device) -> None:
            new = [(weight, own) for weight, own in weights if weight.key not in self.hosts]
            if new:
                pin(new, device)
            self.hosts.update({weight.key: weight.host for weight, _ in new})
            for weight, _ in weights:
                weight.host = self.hosts[weight.key]

        tpde.pack = once  # type: ignore[assignment]
        if self.shares_host:
            _stream._pin = pin_once
        try:
            super()._pack_group(group, patch, packed)
        finally:
            tpde.pack, _stream._pin = pack, pin
            for weight, name in zip(group, names, strict=True):
                weight.key = name


def stream_repeated(
    model: LlamaForCausalLM, drawn_layers: int, budget: int, shares_host: bool = True, **options: Any
) -> Repeated:
    Repeated.drawn_layers, Repeated.shares_host = drawn_layers, shares_host
    Repeated.known, Repeated.hosts = {}, {}
    defaults = {
        "patch": None,
        "base": None,
        "device": DEVICE,
        "packed": True,
        "reserve": None,
        "on_disk": False,
    }
    return Repeated(model, budget, **{**defaults, **options})


def close(model: LlamaForCausalLM, handle: _stream.Streamed) -> None:
    for hook in handle._hooks:
        hook.remove()
    handle._way.close()
    del handle
    gc.collect()
    torch.cuda.empty_cache()


def streamed_tokens(
    model: LlamaForCausalLM, weights: dict[str, torch.Tensor], **options: Any
) -> tuple[float, list[torch.Tensor], dict[str, int], float]:
    """Tokens a second, logits, the handle's report, GB that torch held at most."""
    fill(model, weights)
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    handle = stream_repeated(model, DRAWN, 8 * 10**9, **options)
    say(f"ready in {time.perf_counter() - begin:.1f} s", handle.report())
    decode(model, 1)
    before = handle.report()["link_bytes"]
    times, logits = decode(model, STEPS)
    report = handle.report()
    report["link_bytes_a_token"] = (report["link_bytes"] - before) // (STEPS + 1)
    peak = torch.cuda.max_memory_allocated() / 1e9
    say("seconds a token", [round(t, 4) for t in times], report, f"peak {peak:.2f} GB")
    close(model, handle)
    return 1 / median(times), logits, report, peak


def part_13b(layers: int, link: float, parts: list[str]) -> None:
    shape = {**SHAPES["13b"], "num_hidden_layers": layers}
    model = shell(shape, torch.bfloat16)
    weights = draw(model, DRAWN)
    say("drawn")
    raw_gb = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    what = f"Llama-2-13B's shape, {layers} layers, bf16, {raw_gb:.1f} GB, random weights N(0, 0.02), {DRAWN} layers drawn and "
    what += "repeated (in host memory too), batch 1"
    resident = shell(shape, torch.bfloat16)
    there = {tensor.data_ptr(): tensor.to(DEVICE) for tensor in weights.values()}
    fill(resident, {name: there[tensor.data_ptr()] for name, tensor in weights.items()})
    resident.model.rotary_emb.to(DEVICE)
    whole, expected = decode(resident, STEPS)
    del resident, there
    torch.cuda.empty_cache()
    say("resident:", [round(t, 4) for t in whole])
    packed, logits, report, peak = streamed_tokens(model, weights)
    same = all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    raw, raw_logits, raw_report, raw_peak = streamed_tokens(model, weights, packed=False)
    same_raw = all(torch.equal(a, b) for a, b in zip(raw_logits, expected, strict=True))
    limit = (
        f"link {link:.1f} GB/s in the same run; all of the weights resident: {1 / median(whole):.1f} tokens/s"
    )
    note = (
        f"{what}; budget 8 GB, torch held {peak:.2f} GB at most ({raw_peak:.2f} raw); {packed:.3f} and {raw:.3f} "
        f"tokens/s; {report['link_bytes_a_token'] / 1e9:.2f} and {raw_report['link_bytes_a_token'] / 1e9:.2f} GB "
        f"cross a token, the rest of the budget holds {report['resident_bytes'] / 1e9:.2f} GB packed or "
        f"{raw_report['resident_bytes'] / 1e9:.2f} GB raw; logits of {STEPS + 1} steps bit-identical to resident "
        f"weights: {same}, raw: {same_raw}"
    )
    facts = {"peer": "the same engine, weights not packed, tokens/s", "peer_value": raw}
    add("tpde.stream.tokens_vs_raw", packed / raw, "x", limit=limit, note=note, **facts)
    if "accelerate" not in parts:
        return
    say("accelerate")
    from accelerate import cpu_offload

    fill(model, weights)
    cpu_offload(model, execution_device=torch.device(DEVICE))
    times, their_logits = decode(model, 2)
    same = all(torch.equal(a, b) for a, b in zip(their_logits, expected, strict=False))
    facts = {"peer": "accelerate cpu_offload, tokens/s", "peer_value": 1 / median(times)}
    note = f"{what}; ours {packed:.3f} tokens/s under 8 GB; accelerate's logits the same bits: {same}"
    add("tpde.stream.tokens_vs_accelerate", packed * median(times), "x", limit=limit, note=note, **facts)


def part_q4(layers: int, link: float) -> None:
    """All weights of some layers made in turn, nothing computed with them."""
    model = shell({**SHAPES["q4"], "num_hidden_layers": layers}, torch.bfloat16)
    weights = draw(model, min(layers, 2))
    keys = [key for key in weights if ".layers." in key and weights[key].dim() == 2]
    blocks = {weights[key].data_ptr(): tpde.quantize(weights[key]) for key in keys}
    base = {key: blocks[weights[key].data_ptr()] for key in keys}
    found, seconds_of = {}, {}
    say("quantized")
    spread, _stream._spread = (
        _stream._spread,
        lambda units, room_bytes, size_of: [],
    )  # nothing stays: all of it crosses
    for name in ("q4", "standalone", "raw"):
        fill(model, weights)
        options = {"base": base} if name == "q4" else {"packed": name != "raw"}
        held = torch.cuda.memory_allocated()
        handle = stream_repeated(model, min(layers, 2), held + 6 * 10**9, reserve=1 << 20, **options)
        same = all(
            torch.equal(made.view(torch.int16), weights[key].to(DEVICE).view(torch.int16))
            for key, made in handle.weights()
        )
        before = handle.report()["link_bytes"]
        best = [seconds(lambda handle=handle: [None for _ in handle.weights()]) for _ in range(4)]
        crossed = (handle.report()["link_bytes"] - before) // 4
        seconds_of[name], found[name] = median(best), (same, crossed, handle.report())
        say(name, same, best, crossed, handle.report())
        close(model, handle)
    _stream._spread = spread
    raw_gb = found["raw"][2]["raw_bytes"] / 1e9
    note = (
        f"{layers} layers of Llama-2-13B's shape, bf16, {raw_gb:.2f} GB, random weights N(0, 0.02) (two draws), base "
        f"Q4_0 blocks resident; host memory to ready weights, whole passes, median of 4: {seconds_of['q4']:.4f} s, raw "
        f"{seconds_of['raw']:.4f} s; {found['q4'][1] / 1e9:.2f} and {found['raw'][1] / 1e9:.2f} GB cross; every "
        f"weight bit-identical: {found['q4'][0]}"
    )
    facts = {"peer": "raw copies, the same engine, s", "peer_value": seconds_of["raw"]}
    ratio = seconds_of["raw"] / seconds_of["q4"]
    add(
        "tpde.q4.link_over_raw", ratio, "x", limit=f"link {link:.1f} GB/s in the same run", note=note, **facts
    )
    note = (
        f"as tpde.q4.link_over_raw, no base: {seconds_of['standalone']:.4f} s, bits: {found['standalone'][0]}"
    )
    value = seconds_of["raw"] / seconds_of["standalone"]
    add("tpde_stream.standalone_link_over_raw", value, "x", note=note, **facts)


def part_80gb(layers: int, link: float, shares_host: bool) -> None:
    distinct = min(layers, DRAWN)
    model = shell({**SHAPES["80gb"], "num_hidden_layers": layers}, torch.float32)
    weights = draw(model, distinct)
    torch.cuda.empty_cache()
    say("drawn")
    log = Path(write_results("tpde_stream", ROWS)).parent / "tpde_stream_nvml.csv"
    query = ["nvidia-smi", "--query-gpu=timestamp,memory.used,pcie.link.gen.current", "--format=csv,noheader"]
    watch = subprocess.Popen([*query, "-lms", "100", "-f", str(log)])
    try:
        keys = [key for key in weights if ".layers." in key and weights[key].dim() == 2]
        blocks = {weights[key].data_ptr(): tpde.quantize(weights[key]) for key in keys}
        # Each layer has blocks of its own on the device, as it would.
        base = {key: blocks[weights[key].data_ptr()].to(DEVICE) for key in keys}
        fill(model, weights)
        begin = time.perf_counter()
        options = {"base": base, "reserve": "256MiB", "shares_host": shares_host}
        handle = stream_repeated(model, distinct, 15 * 10**9, **options)
        say("ready", handle.report())
        ready = time.perf_counter() - begin
        decode(model, 1)
        times, _ = decode(model, 3)
        sampled = [
            (key, tensor.clone())
            for key, tensor in handle.weights()
            if key.endswith(".0.mlp.down_proj.weight")
        ]
        same = all(torch.equal(t, weights[key].to(DEVICE)) for key, t in sampled)
        report = handle.report()
    finally:
        time.sleep(0.3)
        watch.terminate()
        watch.wait()
    used = [
        int(line.split(",")[1].split()[0]) for line in log.read_text().splitlines() if line.count(",") == 2
    ]
    peak = torch.cuda.max_memory_allocated() / 1e9
    total = sum(t.nbytes for t in weights.values()) / 1e9
    note = (
        f"{layers} layers of h = 6144 in fp32, {total:.1f} GB of weights, random N(0, 0.02), {distinct} drawn and "
        f"repeated; Q4_0 base resident, residuals in page-locked memory, {report['packed_bytes'] / 1e9:.1f} GB of "
        f"them{' (repeats share theirs)' if shares_host else ''}, "
        f"ready in {ready:.0f} s; driver's count every 100 ms in tpde_stream_nvml.csv, context included; torch held "
        f"{peak:.2f} GB at most; {median(times):.2f} s a token; a layer's weight bit-identical: {same}"
    )
    limit = f"link {link:.1f} GB/s in the same run"
    add("tpde_stream.fp32_80gb_nvml_peak", max(used) * 2**20 / 1e9, "GB", limit=limit, note=note)
    close(model, handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="13b,accelerate,q4,80gb")
    parser.add_argument("--layers", type=int, default=0, help="instead of each part's own number")
    parser.add_argument(
        "--share-host", action="store_true", help="80gb: repeated layers share host memory too"
    )
    args = parser.parse_args()
    parts = args.parts.split(",")
    link = link_gbps()
    torch._C._host_emptyCache()
    say(f"link {link:.1f} GB/s; native {_native.__version__}")
    if "13b" in parts:
        part_13b(args.layers or SHAPES["13b"]["num_hidden_layers"], link, parts)
    if "q4" in parts:
        part_q4(args.layers or SHAPES["q4"]["num_hidden_layers"], link)
    if "80gb" in parts:
        part_80gb(args.layers or SHAPES["80gb"]["num_hidden_layers"], link, args.share_host)


if __name__ == "__main__":
    main()
