"""Djinn on a GPU: swap speed, pauses, resumes and decode of a Llama-2-13B shape.

fp16, random weights built on the GPU, 2048 tokens of random prompt: 819,200 bytes of keys and values a
token, 1.678 GB a session. Prints a table and writes ``djinn_sessions.json`` after every part. Each part runs
even if one before it failed; a figure that could not be taken is absent. Figures are medians of ``--repeats``
or twice as many.

    python bench/djinn_sessions.py [--only swap,pause,...] [--layers 40] [--tokens 2048]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from common import median, row, write_results
from overspill.djinn import Break, Generated, Output, Paused, Session, SessionPool
from overspill.djinn.attention import repeatable_attention

NOTE = "Llama-2-13B shape, fp16, random weights"
GB = 1e9


def build(layers: int) -> Any:
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=5120, num_attention_heads=40, num_key_value_heads=40,
        intermediate_size=13824, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float16, attn_implementation="sdpa"
        ).eval()


def timed_ms(work: Callable[[], Any], copies: bool = True) -> float:
    """Time until the device has done what ``work`` gave it; without ``copies``, until torch's stream has."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize() if copies else torch.cuda.current_stream().synchronize()
    return (time.perf_counter() - begin) * 1e3


class Bench:
    """A model, a pool and the figures taken so far."""

    def __init__(self, layers: int, tokens: int, repeats: int) -> None:
        self.tokens, self.repeats = tokens, repeats
        self.rows: list[dict[str, Any]] = []
        self.model = build(layers)
        self.layers = layers
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 32000, (tokens,), generator=generator).tolist()
        self.session_bytes = 2 * layers * 5120 * 2 * tokens
        slab_tokens = tokens + 256
        slab_bytes = 2 * layers * 5120 * 2 * slab_tokens
        begin = time.perf_counter()
        self.pool = SessionPool(
            self.model,
            arena_budget=4 * slab_bytes,
            host_budget=10 * slab_bytes,
            session_tokens=slab_tokens,
            fixed_decode=True,
        )
        self.pool._native.reserve_host()
        print(f"pool of 4 slabs, host memory reserved in {time.perf_counter() - begin:.1f} s", flush=True)
        self.link: dict[str, float] = {}

    def add(self, goal: str, value: float, unit: str, **facts: Any) -> None:
        facts["note"] = f"{facts.get('note', '')}; {NOTE}".lstrip("; ")
        self.rows.append(row(f"djinn.{goal}", value, unit, **facts))
        print(f"  djinn.{goal:<32} {value:>10.4g} {unit:<6} {facts['note'][:90]}", flush=True)

    def prefilled(self, name: str) -> Session:
        session = self.pool.session(name)
        outcome = session.run(self.ids, logits_to_keep=1)
        assert isinstance(outcome, Output)
        return session

    # ---- parts -----------------------------------------------------------------------------------

    def part_link(self) -> None:
        size = self.session_bytes
        device = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
        host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        streams = [torch.cuda.Stream() for _ in range(2)]

        def out() -> None:
            with torch.cuda.stream(streams[0]):
                host[0].copy_(device[0], non_blocking=True)

        def back() -> None:
            with torch.cuda.stream(streams[1]):
                device[1].copy_(host[1], non_blocking=True)

        def both() -> None:
            out()
            back()

        for name, work, moved in (("out", out, size), ("in", back, size), ("both", both, 2 * size)):
            timed_ms(work)
            best = min(timed_ms(work) for _ in range(self.repeats))
            self.link[name] = moved / best / 1e6
        self.add("link_out_gbps", self.link["out"], "GB/s", note=f"pinned torch copy of {size} bytes, best")
        self.add("link_in_gbps", self.link["in"], "GB/s", note="same")
        self.add("link_both_gbps", self.link["both"], "GB/s", note="both directions at once, summed, best")

    def part_swap(self) -> None:
        session, pool = self.prefilled("swap"), self.pool
        outs, backs = [], []
        for _ in range(self.repeats):
            session.restore()
            pool.synchronize()
            pool._native.drop_host_copy(session._key)
            outs.append(timed_ms(lambda: (session.evict(), pool.synchronize())))
            backs.append(timed_ms(lambda: (session.restore(), pool.synchronize())))
        naive = self._naive_ms()
        for name, times, link in (("swap_out", outs, "out"), ("swap_in", backs, "in")):
            gbps = self.session_bytes / median(times) / 1e6
            limit = f"{self.link[link]:.2f} GB/s, pinned copy in this run"
            peer = {"peer": "DynamicCache, .cpu() and .cuda() of every tensor", "peer_value": naive[link]}
            self.add(
                f"{name}_ms", median(times), "ms", limit=limit, note=f"{self.session_bytes} bytes", **peer
            )
            self.add(
                f"{name}_share_of_link", gbps / self.link[link], "share", limit=limit, note=f"{gbps:.2f} GB/s"
            )
        other, duplex = self.prefilled("swap 2"), []
        for _ in range(self.repeats):
            session.evict()
            other.restore()
            pool.synchronize()
            pool._native.drop_host_copy(other._key)
            duplex.append(timed_ms(lambda: (session.restore(), other.evict(), pool.synchronize())))
        gbps = 2 * self.session_bytes / median(duplex) / 1e6
        limit = f"{self.link['both']:.2f} GB/s, both directions in this run"
        self.add(
            "duplex_share",
            gbps / self.link["both"],
            "share",
            limit=limit,
            note=f"one session out, one in: {gbps:.1f} GB/s",
        )
        session.close()
        other.close()

    def _naive_ms(self) -> dict[str, float]:
        """The same bytes with plain PyTorch."""
        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(
                input_ids=torch.tensor([self.ids], device="cuda"), past_key_values=cache, logits_to_keep=1
            )
        tensors = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        host: list[torch.Tensor] = []
        out = timed_ms(lambda: host.extend(part.cpu() for part in tensors))
        return {"out": out, "in": timed_ms(lambda: [part.cuda() for part in host])}

    def part_pause(self) -> None:
        session, pool = self.prefilled("pause"), self.pool
        times, moments, leave = [], [], session._leave

        def timed_leave(*args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            moments.append(time.perf_counter())
            leave(*args, **kwargs)

        session._leave = timed_leave  # type: ignore[method-assign]
        steps = max(20, self.repeats)
        for _ in range(steps):
            outcome = session.run([5], breaks=[Break(self.layers // 2)])
            assert isinstance(outcome, Paused)
            session.evict()
            pool._native.drain()
            times.append((time.perf_counter() - moments[-1]) * 1e3)
            outcome.resume()
            torch.cuda.synchronize()
            pool.synchronize()
        session._leave = leave  # type: ignore[method-assign]
        times.sort()
        note = f"paused after layer {self.layers // 2} of a decode step, from the last kernel before the pause to the end of the last copy; {steps} pauses, worst"
        self.add("pause_clean_ms_p99", times[-1], "ms", note=note)
        self.add("pause_clean_ms_median", median(times), "ms", note="same")
        before, tokens = pool.report()["pool"]["offloaded_bytes"], 32
        session.generate([5], tokens, breaks=[Break(self.layers // 2, 7)])
        session.evict()
        session.resume()
        session.evict()
        moved = pool.report()["pool"]["offloaded_bytes"] - before
        per_token = 2 * self.layers * 5120 * 2
        self.add(
            "reevict_bytes_ratio",
            moved / (tokens * per_token),
            "ratio",
            note=f"{tokens} new tokens, evicted twice on the way",
        )
        session.close()

    def part_resume(self) -> None:
        """Prefills that pause at a layer over prefills that do not, in turns."""
        stops = (self.layers // 4, self.layers // 2, 3 * self.layers // 4)
        plain: list[float] = []
        times: dict[int, list[float]] = {layer: [] for layer in stops}
        evicts: dict[int, list[float]] = {layer: [] for layer in stops}
        for _ in range(2 * self.repeats):
            plain.append(self._prefill_ms(None)[0])
            for layer in stops:
                took, evicted = self._prefill_ms(layer)
                times[layer].append(took)
                evicts[layer].append(evicted)
        never = median(plain[1:])
        note = f"{self.tokens} tokens, a session that is never paused, written through meanwhile"
        self.add("prefill_ms", never, "ms", note=note)
        for layer in stops:
            took = median(times[layer][1:])
            note = f"run to the pause + resume until the logits are there, {took:.1f} over {never:.1f} ms; eviction between them, {median(evicts[layer][1:]):.2f} ms, not counted"
            self.add(f"resume_overhead_pct.l{layer}", 100 * (took / never - 1), "%", note=note)

    def _prefill_ms(self, layer: int | None) -> tuple[float, float]:
        """A prefill, paused after ``layer``: running it, and evicting it there."""
        session, pool, evicted = self.pool.session("prefill"), self.pool, 0.0
        breaks = [] if layer is None else [Break(layer)]
        took = timed_ms(lambda: session.run(self.ids, breaks, logits_to_keep=1), copies=False)
        if layer is not None:
            evicted = timed_ms(lambda: (session.evict(), pool.synchronize()))
            took += timed_ms(session.resume, copies=False)
        pool.synchronize()
        session.close()
        return took, evicted

    def part_decode(self) -> None:
        session = self.prefilled("decode")
        session.generate([5], 4)
        count = 32
        times = [timed_ms(lambda: session.generate([], count)) / count for _ in range(self.repeats)]
        peer = self._static_cache_ms(count)
        self.add(
            "decode_ms_13b", median(times), "ms", peer="transformers StaticCache in a CUDA graph", peer_value=peer,
            limit="6.4 ms: weights and keys at the memory's bandwidth", note=f"CUDA graph, {count} steps a call, begin and write-through included",
        )  # fmt: skip
        session.close()

    def _static_cache_ms(self, count: int) -> float:
        length = self.tokens + 256
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        ids = torch.tensor([self.ids], device="cuda")
        with torch.no_grad():
            self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            token = torch.full((1, 1), 5, device="cuda")
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.model(input_ids=token, past_key_values=cache, logits_to_keep=1)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
                token.copy_(logits[:, -1:].argmax(-1))
        work = lambda: [graph.replay() for _ in range(count)]  # noqa: E731
        timed_ms(work)
        return median([timed_ms(work) / count for _ in range(3)])

    def part_next_token(self) -> None:
        pool, session = self.pool, self.prefilled("next")
        resident, away, layer = [], [], self.layers // 2
        for i in range(4 * self.repeats):
            outcome = session.run([5], breaks=[Break(layer)])
            assert isinstance(outcome, Paused)
            if i % 2:
                session.evict()
            pool.synchronize()
            (away if i % 2 else resident).append(timed_ms(outcome.resume, copies=False))
            pool.synchronize()
        link_ms = self.session_bytes * (self.layers - layer - 1) / self.layers / self.link["in"] / 1e6
        limit_ms = max(link_ms, median(resident))
        note = f"after layer {layer}: {median(away):.1f} ms away, {median(resident):.1f} ms resident, {link_ms:.1f} ms of link for the layers left (whole session {self.session_bytes / self.link['in'] / 1e6:.1f})"
        self.add(
            "decode_resume_over_limit",
            median(away) / limit_ms,
            "ratio",
            limit=f"{limit_ms:.1f} ms",
            note=note,
        )
        session.close()

    def part_unarmed(self) -> None:
        """Sessions that nothing interrupts over plain calls, at exact length as those; of the plain calls the
        faster: with torch's choice of attention, and without cuDNN's, which sessions do without.
        """
        self.pool._fixed, fixed = None, self.pool._fixed
        try:
            worst = []
            for name, count, plain, ours in (
                ("prefill", 1, *self._prefills()),
                ("decode", 8, *self._decodes()),
            ):
                peers: dict[bool, list[float]] = {True: [], False: []}
                times: list[float] = []
                for i in range(2 * self.repeats):
                    for which in [True, False, None] if i % 2 else [None, False, True]:
                        if which is not None:
                            torch.backends.cuda.enable_cudnn_sdp(which)
                        work = ours if which is None else plain
                        took = timed_ms(lambda work=work, count=count: [work() for _ in range(count)]) / count
                        torch.backends.cuda.enable_cudnn_sdp(True)
                        (times if which is None else peers[which]).append(took)
                peer = min(median(one[1:]) for one in peers.values())
                over = 100 * (median(times[1:]) / peer - 1)
                worst.append(over)
                others = ", ".join(
                    f"{median(one[1:]):.2f} with{'' if which else 'out'} cuDNN's attention"
                    for which, one in peers.items()
                )
                note = f"{median(times[1:]):.2f} ms, written through meanwhile, the last copy waited for; {count} a sample; plain {others}"
                self.add(f"unarmed_overhead_pct.{name}", over, "%", peer="model(ids, DynamicCache)", peer_value=peer, note=note)  # fmt: skip
            for session in self.pool.sessions():
                session.close()
            self.add("unarmed_overhead_pct", max(worst), "%", note="the worse of prefill and decode")
        finally:
            self.pool._fixed = fixed

    def _prefills(self) -> tuple[Callable[[], None], Callable[[], None]]:
        ids = torch.tensor([self.ids], device="cuda")

        def plain() -> None:
            with torch.no_grad():
                cache = DynamicCache(config=self.model.config)
                self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

        def ours() -> None:
            if (session := self.pool._sessions.get("unarmed")) is not None:
                session.close()
            self.pool.session("unarmed").run(self.ids, logits_to_keep=1)

        return plain, ours

    def _decodes(self) -> tuple[Callable[[], None], Callable[[], None]]:
        ids, step = torch.tensor([self.ids], device="cuda"), torch.tensor([[5]], device="cuda")
        caches = [DynamicCache(config=self.model.config) for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        session = self.prefilled("unarmed decode")

        def plain() -> None:
            with torch.no_grad():
                cache = caches[torch.backends.cuda.cudnn_sdp_enabled()]
                self.model(input_ids=step, past_key_values=cache, logits_to_keep=1)

        def ours() -> None:
            session.run([5], logits_to_keep=1)

        return plain, ours

    def part_bitwise(self) -> None:
        """In a process of its own: deterministic algorithms, which the speed runs do not have."""
        with tempfile.TemporaryDirectory() as folder:
            shape = ["--layers", str(self.layers), "--tokens", str(self.tokens)]
            command = [sys.executable, __file__, "--exact", folder, *shape]
            subprocess.run(command, check=True, env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
            tried = json.loads((Path(folder) / "exact.json").read_text())
        self._bits("bitwise", "deterministic algorithms", tried)

    def part_bitwise_defaults(self) -> None:
        """With what the speed runs have: torch's defaults."""
        self._bits("bitwise_defaults", "torch's defaults", self.exact())

    def _bits(self, goal: str, how: str, tried: dict[str, tuple[int, int]]) -> None:
        """A row for pauses against never pausing, one for never pausing against transformers."""
        for end, wanted in (("", False), ("_transformers", True)):
            kinds = {kind: found for kind, found in tried.items() if ("transformers" in kind) == wanted}
            same, count = (sum(found[i] for found in kinds.values()) for i in (0, 1))
            parts = ", ".join(f"{kind} {found}/{of}" for kind, (found, of) in kinds.items())
            note = f"{same} of {count} torch.equal, {how}: {parts}"
            self.add(f"{goal}{end}", float(same == count), "bool", note=note)

    def exact(self) -> dict[str, tuple[int, int]]:
        """How many pauses and generations give the logits of never pausing, of how many, by kind."""
        tried: dict[str, tuple[int, int]] = {}

        def compare(kind: str, found: Any, expected: Any) -> None:
            same, of = tried.get(kind, (0, 0))
            assert isinstance(found, Output | Generated), found
            if bool(torch.isnan(expected.logits).any()):
                kind = f"{kind}, NaN in the reference"
                same, of = tried.get(kind, (0, 0))
            tried[kind] = (same + torch.equal(found.logits, expected.logits), of + 1)

        decoder, pool = self.pool._fixed, self.pool
        for kind in ("exact length", "fixed length"):
            pool._fixed = decoder if kind == "fixed length" else None
            base = pool.session("base")
            base.run(self.ids)
            for step in range(2):
                never = base.fork("never")
                expected = never.run([5 + step])
                never.close()
                for layer in range(self.layers):
                    paused = base.fork("paused")
                    outcome = paused.run([5 + step], breaks=[Break(layer)])
                    assert isinstance(outcome, Paused)
                    paused.evict()
                    compare(kind, outcome.resume(), expected)
                    paused.close()
                base.run([5 + step])
            base.close()
        pool._fixed = decoder
        expected = self._prefill_paused([])
        for layer in range(0, self.layers, 3):
            compare("prefill", self._prefill_paused([Break(layer)]), expected)
        for kind, stops in (
            ("graphs", []),
            ("graphs, evicted and paused", [(0, 10), (0, 20), (0, 30), (3, 20), (9, 39)]),
        ):
            never = pool.session("never").generate(self.ids, 12)
            session = pool.session("steps")
            outcome = session.generate(
                self.ids, 12, [Break(layer, step) for step, layer in stops if layer < self.layers]
            )
            while isinstance(outcome, Paused):
                session.evict()
                outcome = session.resume()
            assert isinstance(outcome, Generated) and isinstance(never, Generated)
            compare(kind, outcome, never)
            if outcome.tokens != never.tokens:
                print(f"{kind}: {outcome.tokens} against {never.tokens}")
            pool.session("never").close()
            session.close()
        pool._fixed = None
        cache, session = DynamicCache(config=self.model.config), pool.session("plain")
        for step in range(4):
            ids = [5] if step else self.ids
            with repeatable_attention(session.tokens, step=False), torch.no_grad():
                plain = self.model(
                    torch.tensor([ids], device="cuda"), past_key_values=cache, logits_to_keep=1
                )
            compare(
                f"{'decode' if step else 'prefill'}, against transformers with DynamicCache",
                session.run(ids, logits_to_keep=1),
                plain,
            )
        session.close()
        pool._fixed = decoder
        return tried

    def _prefill_paused(self, breaks: list[Break]) -> Any:
        session = self.pool.session("prefill")
        outcome = session.run(self.ids, breaks, logits_to_keep=1)
        while isinstance(outcome, Paused):
            session.evict()
            outcome = session.resume()
        session.close()
        return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = [name.removeprefix("part_") for name in vars(Bench) if name.startswith("part_")]
    parser.add_argument("--only", default=",".join(parts))
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--exact", metavar="FOLDER", help="only compare bits, under deterministic algorithms, into FOLDER"
    )
    options = parser.parse_args()
    if options.exact:
        torch.use_deterministic_algorithms(True)
        with torch.no_grad():
            tried = Bench(options.layers, options.tokens, 1).exact()
        (Path(options.exact) / "exact.json").write_text(json.dumps(tried))
        return 0
    begin = time.perf_counter()
    bench = Bench(options.layers, options.tokens, options.repeats)
    print(f"model and pool in {time.perf_counter() - begin:.1f} s", flush=True)
    failed = []
    for part in ["link", *[name for name in options.only.split(",") if name != "link"]]:
        began = time.perf_counter()
        try:
            getattr(bench, f"part_{part}")()
        except Exception:
            traceback.print_exc()
            failed.append(part)
            for session in bench.pool.sessions():
                session._turn = None
                try:
                    session.close()
                except Exception as error:
                    print(f"closing {session}: {error}")
        print(f"-- {part}: {time.perf_counter() - began:.1f} s", flush=True)
        write_results("djinn_sessions", bench.rows)
    for one in bench.rows:
        print(f"{one['id']:<36} {one['value']:>10.4g} {one['unit']}")
    print(f"{len(bench.rows)} figures; failed parts: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
