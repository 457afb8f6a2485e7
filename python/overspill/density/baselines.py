"""What others do with a session that pauses, on the same model under the same cap: a row a figure.

A *turn* of a session alone: it comes back, generates the tokens of a turn, and leaves. Its time is put together from
what was measured: ``in`` + tokens x ``token`` + ``out``. ``held`` is what a paused session keeps of the device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ..djinn import SessionPool
from .build import build, prompts
from .meter import Meter

REPEATS = 3
# Tokens over which a token's time is taken, where a token is slow.
SAMPLE_TOKENS = 16


class Baselines:
    """Rows so far, written after each way."""

    def __init__(self, experiment: dict[str, Any], out: Path) -> None:
        self.config, self.plan, self.out = experiment["config"], experiment["plan"], out
        cuda = self.config["device"] == "cuda"
        self.device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        self.meter = Meter(self.device)
        if cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.zeros(1, device=self.device)
            fraction = (self.plan["cap_bytes"] - self.meter.gauge.used_bytes()) / total
            torch.cuda.set_per_process_memory_fraction(fraction)
        self.model = build(self.config, self.device)
        self.prompts = prompts(self.config)
        self.count = min(SAMPLE_TOKENS, self.config["tokens_per_turn"])
        self.rows: list[dict[str, Any]] = []

    def add(self, way: str, what: str, value: float | None, unit: str, note: str = "") -> None:
        """One figure."""
        self.rows.append({"way": way, "what": what, "value": value, "unit": unit, "note": note})

    def turn(self, way: str, out_ms: float, in_ms: float, token_ms: float, held: int, note: str = "") -> None:
        """The figures of one way."""
        self.add(way, "out", out_ms, "ms")
        self.add(way, "in", in_ms, "ms")
        self.add(way, "token", token_ms, "ms")
        self.add(way, "held", held, "bytes", "of the device, by a paused session")
        whole = in_ms + self.config["tokens_per_turn"] * token_ms + out_ms
        self.add(way, "turn", whole, "ms", f"{self.config['tokens_per_turn']} tokens{note}")

    def ms(self, work: Callable[[], Any]) -> float:
        """Milliseconds until the device is done."""
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return (time.perf_counter() - begin) * 1e3

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forward(self, ids: list[int], cache: Any) -> int:
        """The token after ``ids``."""
        tensor = torch.tensor([ids], device=self.device)
        logits = self.model(input_ids=tensor, past_key_values=cache, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def token_ms(self, **options: Any) -> float:
        """Milliseconds a token of plain decode after a prompt; the second time, when libraries have planned every
        length.
        """
        for _ in range(2):
            cache: Any = DynamicCache(config=self.model.config, **options)
            token = self.forward(self.prompts[0], cache)

            def steps(token: int = token, cache: Any = cache) -> None:
                for _ in range(self.count):
                    token = self.forward([token], cache)

            took = self.ms(steps) / self.count
        return took

    # ---- ways ------------------------------------------------------------------------------------

    def way_overspill(self) -> None:
        """A session of a pool."""
        slabs = 2 * self.plan["slab_bytes"]
        pool = SessionPool(
            self.model, arena_budget=slabs, host_budget=2 * slabs, session_tokens=self.plan["slab_tokens"],
            fixed_decode=self.device.type == "cuda",
        )  # fmt: skip
        session = pool.session("turn")
        session.start(self.prompts[0], self.config["new_tokens"])
        count = max(1, min(self.config["tokens_per_turn"], (self.config["new_tokens"] - 2) // 2))
        pool.decode([session], count)
        token = self.ms(lambda: pool.decode([session], count)) / count
        outs, ins = [], []
        for _ in range(REPEATS):
            outs.append(self.ms(lambda: self.swap(pool, session.evict)))
            ins.append(self.ms(lambda: self.swap(pool, session.restore)))
        self.turn(
            "overspill", min(outs), min(ins), token, 0, "; what it leaves with is in the host copy already"
        )

    def swap(self, pool: SessionPool, what: Callable[[], None]) -> None:
        """A move, until its last byte is there."""
        what()
        pool.synchronize()

    def way_dynamic_cache(self) -> None:
        """Held through the pause, as PyTorch has it; and how many then fit under the cap."""
        caches: list[Any] = []
        held, before = 0, self.meter.gauge.used_bytes()
        try:
            for index in range(self.config["sessions"]):
                cache = DynamicCache(config=self.model.config)
                self.forward(self.prompts[index], cache)
                caches.append(cache)
        except torch.OutOfMemoryError:
            pass
        self.wait()
        note = (
            f"of {self.config['sessions']}; the next one has no memory" if self.device.type == "cuda" else ""
        )
        self.add("DynamicCache, held", "sessions", len(caches), "", note)
        used = self.meter.gauge.used_bytes()
        self.add("DynamicCache, held", "in use through the pause", used, "bytes", f"{before} before")
        held = bytes_of(caches[0])
        caches.clear()
        self.turn("DynamicCache, held", 0.0, 0.0, self.token_ms(), held)

    def way_cpu(self) -> None:
        """Every tensor to the CPU and back."""
        cache: Any = DynamicCache(config=self.model.config)
        self.forward(self.prompts[0], cache)
        outs, ins = [], []
        for _ in range(REPEATS):
            outs.append(self.ms(lambda: move(cache, "cpu")))
            ins.append(self.ms(lambda: move(cache, self.device)))
        self.turn(".cpu() and back", min(outs), min(ins), self.token_ms(), 0)

    def way_offloading(self) -> None:
        """Transformers' own: layers come for each token and leave again."""
        cache: Any = DynamicCache(config=self.model.config, offloading=True)
        self.forward(self.prompts[0], cache)
        on_device = sum(
            part.numel() * part.itemsize
            for layer in cache.layers
            for part in (layer.keys, layer.values)
            if part.device.type == self.device.type
        )
        self.turn("DynamicCache(offloading=True)", 0.0, 0.0, self.token_ms(offloading=True), on_device)

    def way_recompute(self) -> None:
        """Nothing kept: the prompt again."""
        ids = self.prompts[0] + self.prompts[1][: self.config["tokens_per_turn"]]
        work = lambda: self.forward(ids, DynamicCache(config=self.model.config))  # noqa: E731
        work()
        again = min(self.ms(work) for _ in range(REPEATS))
        self.turn("recompute", 0.0, again, self.token_ms(), 0)

    def way_continuous_batching(self) -> None:
        """Transformers' continuous batching with a CPU pool behind it: all sessions as requests, no pauses."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        name = "continuous batching, cpu_offload_space"
        block = 256
        per_block = block * self.plan["token_bytes"]
        settings = ContinuousBatchingConfig(
            block_size=block, num_blocks=self.plan["arena_bytes"] // per_block,
            max_batch_tokens=self.config["prompt_tokens"],
            cpu_offload_space=self.plan["host_bytes"] / (1 << 30), allow_block_sharing=False,
        )  # fmt: skip
        new = self.config["new_tokens"]
        generation = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        begin = time.perf_counter()
        found = self.model.generate_batch(
            inputs=self.prompts, generation_config=generation, continuous_batching_config=settings
        )
        seconds = time.perf_counter() - begin
        tokens = sum(len(one.generated_tokens) for one in found.values())
        note = f"{tokens} tokens of {len(found)} requests in {seconds:.1f} s, set-up included; in use: {self.meter.gauge.used_bytes()} bytes"
        self.add(name, "all tokens", tokens / seconds, "tokens/s", note)


def bytes_of(cache: Any) -> int:
    """Bytes of a cache."""
    return sum(p.numel() * p.itemsize for layer in cache.layers for p in (layer.keys, layer.values))


def move(cache: Any, device: Any) -> None:
    """Every tensor of a cache, one after the other."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def measure(experiment: dict[str, Any], out: Path) -> dict[str, Any]:
    """All ways; one that fails says why and the others go on."""
    torch.set_grad_enabled(False)
    one = Baselines(experiment, out)
    ways = [name for name in vars(Baselines) if name.startswith("way_")]
    for way in ways:
        try:
            getattr(one, way)()
        except Exception as error:
            one.add(
                way.removeprefix("way_"), "failed", None, "", f"{type(error).__name__}: {str(error)[:300]}"
            )
        if one.device.type == "cuda":
            torch.cuda.empty_cache()
        (out / "baselines.json").write_text(json.dumps({"rows": one.rows}) + "\n")
    return {"rows": one.rows}
