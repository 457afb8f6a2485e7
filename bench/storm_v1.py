"""STORM's starting line on a GPU: links, hooks, and what saving activation memory costs by each method.

Llama blocks (transformers' own decoder layers, random weights, bf16, SDPA), 16,384 tokens in four
sequences of 4,096, no optimizer. Per width: keep-all, STORM at half and at a quarter of keep-all's
activation peak, ``save_on_cpu(pin_memory=True)``, gradient checkpointing, and TRL's
``OffloadActivations`` and Unsloth's offloaded checkpointing where their files load. Activation peak = most bytes allocated in the step less
parameters and gradients. The link is measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import overspill
from common import row, write_results
from overspill import Storm
from overspill._native import Engine

TOKENS, SEQUENCE = 16_384, 4_096
SHAPES = {2048: 16, 4096: 8, 8192: 4}
GB = 1e9


class Blocks(torch.nn.Module):
    """Decoder layers between an input and a mean: what a step saves, without an embedding or a loss."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=int(width * 2.6875) // 256 * 256,
            num_attention_heads=width // 128,
            num_key_value_heads=width // 128,
            num_hidden_layers=layers,
            max_position_embeddings=SEQUENCE,
            attn_implementation="sdpa",
        )
        self.layers = torch.nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(layers))
        self.rotary = LlamaRotaryEmbedding(config)
        self.checkpoint: Callable[..., torch.Tensor] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotation = self.rotary(hidden, positions)
        for layer in self.layers:
            run = functools.partial(_run_layer, layer, rotation)
            hidden = run(hidden) if self.checkpoint is None else self.checkpoint(run, hidden)
        return hidden.float().pow(2).mean()


def _run_layer(layer: Any, rotation: Any, hidden: torch.Tensor) -> torch.Tensor:
    out = layer(hidden, position_embeddings=rotation, attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


def checkpointing(run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Plain gradient checkpointing of one layer."""
    return torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=False)


def measure(model: Blocks, x: torch.Tensor, context: Any, steps: int) -> dict[str, float]:
    """Median step time in ms and the activation peak in bytes, after two steps of warm-up."""
    times, peaks = [], []
    fixed = sum(2 * p.numel() * p.element_size() for p in model.parameters()) + x.numel() * x.element_size()
    with context:
        for n in range(steps + 2):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            model(x).backward()
            end.record()
            torch.cuda.synchronize()
            if n >= 2:
                times.append(begin.elapsed_time(end))
                peaks.append(torch.cuda.max_memory_allocated())
    return {"ms": statistics.median(times), "peak": max(peaks) - fixed, "total_peak": max(peaks)}


def raw_link() -> dict[str, float]:
    """Pinned copies of 1 GiB each way, GB/s, by events: the limit."""
    device = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True).random_()
    speeds = {}
    for name, copy in {
        "d2h": lambda: host.copy_(device, non_blocking=True),
        "h2d": lambda: device.copy_(host, non_blocking=True),
    }.items():
        speeds[name] = _gbps(copy, 2**30)
    return speeds


def _gbps(copy: Callable[[], object], count: int, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        copy()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return count / statistics.median(times[1:]) / 1e6


def engine_link() -> dict[str, float]:
    """The engine moving sixteen tensors of 64 MiB each way: bytes over the busy time of its copies."""
    begin = time.perf_counter()
    engine = Engine(
        "cuda:0", host_budget_bytes=2**30, slab_bytes=2**30, segment_bytes=2**26, eager_spill=False
    )
    engine.reserve_host()
    reserve_s = time.perf_counter() - begin
    tensors = [torch.empty(2**26, dtype=torch.uint8, device="cuda").random_() for _ in range(16)]
    stream = torch.cuda.current_stream().cuda_stream
    back = [torch.empty_like(t) for t in tensors]
    for _ in range(3):
        torch.cuda.synchronize()
        slots = [engine.offload(t.data_ptr(), t.numel(), t, stream) for t in tensors]
        engine.drain()
        onboardings = [
            engine.onboard(s, b.data_ptr(), b.numel(), b, stream, prefetch=True)
            for s, b in zip(slots, back, strict=True)
        ]
        for onboarding in onboardings:
            onboarding.wait(stream)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))
        del slots, onboardings
    engine.drain()
    counters = json.loads(engine.counters_json())
    flows = counters["flows"]
    return {
        "d2h": flows["offload"]["bytes"] / flows["offload"]["busy_us"] / 1e3,
        "h2d": flows["prefetch"]["bytes"] / flows["prefetch"]["busy_us"] / 1e3,
        "outstanding": counters["pool"]["bytes_in_use"],
        "reserve_s_per_gib": reserve_s,
    }


def timed_hooks(storm: Storm) -> list[float]:
    """Makes ``storm`` note the CPU time of each hook, in microseconds."""
    times: list[float] = []

    def timed(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(argument: Any) -> Any:
            begin = time.perf_counter()
            result = hook(argument)
            times.append((time.perf_counter() - begin) * 1e6)
            return result

        return run

    storm._pack, storm._unpack = timed(storm._pack), timed(storm._unpack)  # type: ignore[method-assign]
    return times


def trl_offload(model: torch.nn.Module) -> Any:
    """TRL's context manager, or None where it does not load."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return None
    # The one file: the package around it asks for a whole training stack.
    path = Path(spec.submodule_search_locations[0]) / "models" / "activation_offloading.py"
    try:
        loaded = importlib.util.spec_from_file_location("trl_activation_offloading", path)
        module = importlib.util.module_from_spec(loaded)
        loaded.loader.exec_module(module)
        importlib.import_module("accelerate").PartialState()  # its logger asks for it
        return module.OffloadActivations()
    except Exception as error:
        print(f"TRL's OffloadActivations does not load here: {error!r}", file=sys.stderr)
        return None


@functools.cache
def unsloth_checkpoint() -> Callable[..., torch.Tensor] | None:
    """Unsloth's offloaded checkpointing (inputs of layers to RAM), or None where its file does not load."""
    spec = importlib.util.find_spec("unsloth_zoo")
    if spec is None or not spec.submodule_search_locations:
        return None
    # The one file and what it imports: the package's own start asks for a whole training stack.
    package = types.ModuleType("unsloth_zoo")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["unsloth_zoo"] = package
    try:
        loaded = importlib.import_module("unsloth_zoo.gradient_checkpointing")
    except Exception as error:
        print(f"Unsloth's checkpointing does not load here: {error!r}", file=sys.stderr)
        return None
    return loaded.Unsloth_Offloaded_Gradient_Checkpointer.apply


def pinned_kinds(gib: int) -> list[dict[str, Any]]:
    """Seconds to reserve ``gib`` GiB of host memory in each kind, and the link over it; by ``link_speed``."""
    found = os.environ.get("LINK_SPEED")
    if found is None:
        print("pinned kinds: left out, LINK_SPEED names no program", file=sys.stderr)
        return []
    run = subprocess.run([found, str(gib)], capture_output=True, text=True, timeout=150, check=False)
    rows = []
    for line in run.stdout.splitlines():
        facts = json.loads(line)
        kind = facts["kind"].lower()
        if "reserve_gib" in facts:
            seconds = facts["reserve_gib"] / facts["reserve_gib_per_s"]
            rows.append(
                row(f"storm_v1.reserve_{gib}gib_s.{kind}", seconds, "s", note="zeroed and given back")
            )
            print(f"{gib} GiB {kind}: {seconds:.1f} s")
        elif facts["copy_bytes"] == 2**28:
            for way in ("offload", "onboard", "both"):
                rows.append(
                    row(f"storm_v1.{way}_gbps.{kind}", facts[f"{way}_gbps"], "GB/s", note="copies of 256 MiB")
                )
            print(f"{kind}: offload {facts['offload_gbps']}, onboard {facts['onboard_gbps']} GB/s")
    if run.returncode:
        print(f"pinned kinds: {run.stderr[-500:]}", file=sys.stderr)
    return rows


def pool_growth(steps: int) -> dict[str, float]:
    """Host bytes the pool holds after step 2 and after ``steps`` small steps, all offloaded; seconds a step."""
    width = 256
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4))).cuda()
    x = torch.randn(4096, width, device="cuda")
    model(x).tanh().square().mean().backward()  # cuBLAS takes its workspace
    gc.collect()
    storm = Storm(model, vram_budget=torch.cuda.memory_allocated() + 12 * 2**20, host_budget="1GiB")
    held = []
    begin = time.perf_counter()
    with storm:
        for n in range(steps):
            model(x).tanh().square().mean().backward()
            if n == 2 or n == steps - 1:
                held.append(storm.report()["pool"]["bytes_reserved"])
    seconds = time.perf_counter() - begin
    moved = storm.report()["flows"]
    storm.close()
    left = storm.report()["pool"]["bytes_in_use"]
    return {"early": held[0], "late": held[-1], "left": left, "s": seconds / steps, "moved": moved}


def bench_width(width: int, layers: int, steps: int, link: dict[str, float]) -> list[dict[str, Any]]:
    """All methods at one width."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):  # a CPU takes minutes to draw the weights
        model = Blocks(width, layers)
    torch.set_default_dtype(torch.float32)
    x = torch.randn(TOKENS // SEQUENCE, SEQUENCE, width, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_(True)
    model(x).backward()
    keep = measure(model, x, contextlib.nullcontext(), steps)
    fixed = keep["total_peak"] - keep["peak"]
    rows = []

    def add(name: str, got: dict[str, float], note: str = "") -> None:
        ratio, share = got["ms"] / keep["ms"], got["peak"] / keep["peak"]
        print(
            f"h={width} {name:<28} {got['ms']:9.1f} ms  {ratio:6.3f}x  peak {share:5.2f} ({got['peak'] / GB:.2f} GB)"
        )
        rows.append(
            row(
                f"storm_v1.h{width}.{name}",
                got["ms"],
                "ms",
                peer="keep-all",
                peer_value=keep["ms"],
                limit=f"link {link['d2h']:.1f} / {link['h2d']:.1f} GB/s",
                note=f"activation peak {got['peak'] / GB:.3f} GB = {share:.3f} of keep-all; random weights; {note}",
            )
        )

    add("keep_all", keep, f"{layers} layers, {TOKENS} tokens, bf16")
    for divisor in (2, 4):
        budget = int(fixed + keep["peak"] / divisor)
        storm = Storm(model, vram_budget=budget, host_budget="48GiB")
        hooks = timed_hooks(storm)
        got = measure(model, x, storm, steps)
        storm.close()
        report = storm.report()
        add(f"storm_{divisor}x", got, f"predicted {report['predicted']}; flows {report['flows']}")
        rows.append(row(f"storm_v1.h{width}.hook_us_{divisor}x", statistics.median(hooks), "us"))
        rows.append(row(f"storm_v1.h{width}.pool_{divisor}x", report["pool"]["bytes_in_use"], "bytes"))
        del storm
        gc.collect()
    trl = trl_offload(model)
    peers = {"save_on_cpu_pinned": torch.autograd.graph.save_on_cpu(pin_memory=True)}
    if trl is not None:
        peers["trl_offload_activations"] = trl
    for name, context in peers.items():
        try:
            add(name, measure(model, x, context, max(steps // 2, 1)))
        except Exception as error:
            print(f"h={width} {name}: {error!r}", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
    model.checkpoint = checkpointing
    add("checkpointing", measure(model, x, contextlib.nullcontext(), steps))
    model.checkpoint = unsloth_checkpoint()
    if model.checkpoint is not None:
        add("unsloth_offloaded_checkpointing", measure(model, x, contextlib.nullcontext(), steps))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--growth-steps", type=int, default=10_000)
    parser.add_argument("--name", default="storm_v1")
    options = parser.parse_args()
    print(f"overspill {overspill.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    link, engine = raw_link(), engine_link()
    shares = {way: engine[way] / link[way] for way in ("d2h", "h2d")}
    for way in ("d2h", "h2d"):
        print(f"{way}: raw {link[way]:.1f} GB/s, engine {engine[way]:.1f} GB/s, share {shares[way]:.3f}")
    rows = [
        row(
            f"storm.{way}_share_of_raw",
            shares[way],
            "share",
            peer="torch pinned copy of 1 GiB",
            peer_value=link[way],
            limit="PCIe Gen5 x16",
            note=f"engine {engine[way]:.2f} GB/s over the busy time of 48 copies of 64 MiB, bytes compared",
        )
        for way in ("d2h", "h2d")
    ]
    rows.append(row("storm_v1.reserve_s_per_gib", engine["reserve_s_per_gib"], "s"))
    rows += pinned_kinds(64)
    growth = pool_growth(options.growth_steps)
    print(f"pool: {growth}")
    rows.append(
        row(
            "storm_v1.pool_growth_bytes",
            growth["late"] - growth["early"],
            "bytes",
            note=f"reserved after {options.growth_steps} small steps less after step 2; "
            f"{growth['s'] * 1e3:.1f} ms a step; {growth['moved']}",
        )
    )
    write_results(options.name, rows)
    for width in options.widths:
        rows += bench_width(width, SHAPES[width], options.steps, link)
        write_results(options.name, rows)  # what was measured outlives a time limit
        gc.collect()
        torch.cuda.empty_cache()
    hooks = [r["value"] for r in rows if ".hook_us_" in r["id"]]
    pools = [r["value"] for r in rows if ".pool_" in r["id"]]
    outstanding = max(pools) + engine["outstanding"] + growth["left"]
    rows.append(
        row("storm.hook_us", max(hooks), "us", note="median over all hooks, the worst width and budget")
    )
    rows.append(row("storm.pool_outstanding_bytes", outstanding, "bytes"))
    print(f"hook median {max(hooks):.1f} us; outstanding {outstanding:.0f} bytes")
    print(write_results(options.name, rows))


if __name__ == "__main__":
    main()
