"""1,000 open sessions over room for 20, each one's text checked: the part ``sessions`` of ``bench/server.py``.

A session is told a number of its own a few times and says it again; in its second turn it is told nothing but to go
on, so that what it says comes from its own keys and values alone. On the server all first turns come before any
second one: each session has left the device in between. Steps are batched over whoever is there.

The reference is made before, of plain transformers without pool, server or swap. A batch may change a row's last
bits: a session whose choices were so close that bits might decide is made ``exact`` on the server, and its reference
is what it says alone in a pool that never swaps.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from server_load import TESTS, complete, request, serve

from common import row

SESSIONS, ROOM, SESSION_TOKENS = 1000, 20, 64
SLAB_BYTES = 30 * 2 * 3 * 64 * 4 * SESSION_TOKENS  # layers, keys and values, heads, head_dim, fp32
CLIENTS = 32
TURN_TOKENS = (3, 3)
# Logits of the first choice less those of the second; a batch changes them by less than a thousandth of this.
CLOSE = 0.05

# Rows of a batch of the reference.
ROWS = 25


def prompts(number: int) -> tuple[str, str]:
    """What a session is told in its two turns."""
    return f"{number:03},{number:03},{number:03},{number:03},", ","


# ---- the reference -----------------------------------------------------------------------------------


def alone(executor: Any, number: int, counts: tuple[int, int]) -> dict[str, Any]:
    """The texts of a session's turns in a pool of its own, and its tokens at the end."""
    session, said = executor.pool.session(str(number)), []
    for prompt, count in zip(prompts(number), counts, strict=True):
        ids = executor.tokenizer.encode(prompt, add_special_tokens=not session.tokens)
        made: Any = session.generate(ids, count, eos_token_id=sorted(executor.ends))
        said.append(executor.tokenizer.decode(made.tokens, skip_special_tokens=True).rstrip("\ufffd"))
    tokens = session.tokens
    session.close()
    return {"said": said, "tokens": tokens, "exact": True}


def plain(model: Any, tokenizer: Any, ends: set[int], numbers: list[int]) -> list[dict[str, Any] | None]:
    """The same of several sessions, of transformers alone; None where bits might decide, or an answer ends early."""
    import torch

    first = [tokenizer.encode(prompts(number)[0]) for number in numbers]
    again = [tokenizer.encode(prompts(number)[1], add_special_tokens=False) for number in numbers]
    assert len({len(ids) for ids in first}) == len({len(ids) for ids in again}) == 1, "rows of one length"
    cache, gaps = None, torch.full((len(numbers),), torch.inf)
    ids, turns = torch.tensor(first), []
    for count in TURN_TOKENS:
        chosen = []
        for _ in range(count):
            with torch.no_grad():
                out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, best = out.past_key_values, out.logits[:, -1].topk(2)
            gaps = torch.minimum(gaps, best.values[:, 0] - best.values[:, 1])
            ids = best.indices[:, :1]
            chosen.append(ids)
        turns.append(torch.cat(chosen, 1).tolist())
        ids = torch.cat([ids, torch.tensor(again)], 1)
    found: list[dict[str, Any] | None] = []
    for at in range(len(numbers)):
        said = [tokenizer.decode(turn[at], skip_special_tokens=True).rstrip("\ufffd") for turn in turns]
        ended = any(ends.intersection(turn[at]) for turn in turns)
        one = {"said": said, "tokens": cache.get_seq_length(), "exact": False}
        found.append(None if ended or gaps[at] < CLOSE else one)
    return found


def reference(model: Path, path: Path, limit_s: float) -> int:
    """What every session of SmolLM2 says, kept in a file: goes on where the last run ended, for ``limit_s``; how many
    there are.
    """
    import torch

    from overspill.djinn import SessionPool
    from overspill.serve.executor import SessionExecutor
    from overspill.serve.model import load_model, load_tokenizer

    begin = time.monotonic()
    loaded = load_model(model, torch.device("cpu"), None)
    pool = SessionPool(loaded, arena_budget=2 * SLAB_BYTES, session_tokens=SESSION_TOKENS)
    executor = SessionExecutor(pool, load_tokenizer(model))
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    while len(found) < SESSIONS and time.monotonic() - begin < limit_s:
        numbers = list(range(len(found), min(len(found) + ROWS, SESSIONS)))
        made = plain(loaded, executor.tokenizer, executor.ends, numbers)
        found += [
            one or alone(executor, number, TURN_TOKENS) for number, one in zip(numbers, made, strict=True)
        ]
        path.write_text(json.dumps(found))
    return len(found)


# ---- what they say on the server ---------------------------------------------------------------------


def sessions(model: Path, scratch: Path, count: int = SESSIONS) -> list[dict[str, Any]]:
    """Of SmolLM2. Without a whole reference of its texts it is a tiny random model, and the rows say so."""
    path = scratch / "reference.json"
    expected = json.loads(path.read_text())[:count] if path.exists() else []
    if len(expected) < count:
        return tiny_sessions(scratch, count)
    spill = scratch / "spill"
    spill.mkdir(exist_ok=True)
    server = serve(
        model, scratch / "log", "--session-tokens", str(SESSION_TOKENS), "--arena-budget", str(ROOM * SLAB_BYTES),
        "--host-budget", "512MiB", "--spill-dir", str(spill), "--spill-limit", "2GiB",
    )  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    what = f"SmolLM2, trained weights (4 bit, dequantized), fp32, {threads} compute threads"
    rows = take_turns(server.address, TURN_TOKENS, expected, what)
    server.end()
    return rows


def tiny_sessions(scratch: Path, count: int) -> list[dict[str, Any]]:
    """Of a tiny random model, whose reference is made here; host memory for a quarter, the rest on disk."""
    sys.path.insert(0, str(TESTS))
    from server_harness import Servers
    from server_worker import tiny_executor

    executor, counts = tiny_executor(), (3, 3)
    expected = [alone(executor, number, counts) for number in range(count)]
    spill = scratch / "spill"
    spill.mkdir(exist_ok=True)
    servers = Servers.make()
    model = {"slabs": ROOM, "host_budget": "8MiB", "spill_dir": str(spill)}
    server = servers.start(model, log=str(scratch / "tiny.log"))
    rows = take_turns(server.address, counts, expected, "a tiny random model of 4 layers, not SmolLM2")
    servers.close()
    return rows


def take_turns(
    address: str, counts: tuple[int, int], expected: list[dict[str, Any]], what: str
) -> list[dict[str, Any]]:
    """The turns of all sessions, and what came of them."""
    begin, count = time.perf_counter(), len(expected)
    exact = [one["exact"] for one in expected]
    for number in range(count):
        made = {"id": f"s{number}", "exact": exact[number]}
        status, found = request(address, "POST", "/v1/sessions", made)
        assert status == 200, found
    said: list[list[str]] = [[] for _ in range(count)]
    for turn, length in enumerate(counts):

        def ask(number: int, turn: int = turn, length: int = length) -> None:
            text = complete(address, prompts(number)[turn], length, f"s{number}")
            said[number].append(text.rstrip("\ufffd"))

        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(ask, range(count)))
    elapsed_s = time.perf_counter() - begin
    _, listed = request(address, "GET", "/v1/sessions")
    there = {one["id"]: one for one in listed["data"] if one["state"] == "idle"}
    kept = [f"s{number}" in there and there[f"s{number}"]["tokens"] == one["tokens"]
            for number, one in enumerate(expected)]  # fmt: skip
    wrong = [number for number, one in enumerate(expected) if said[number] != one["said"]]
    for number in wrong[:10]:
        print(f"s{number}: {said[number]} for {expected[number]['said']}", file=sys.stderr)
    pool = counters(address)
    texts = {tuple(one["said"]) for one in expected}
    note = (
        f"{what}; {CLIENTS} clients, {count} sessions open at once, two turns each, room for {ROOM} on the device, "
        f"{pool['pool_evictions']} evictions; {pool['tokens']} tokens in {pool['steps']} steps, "
        f"{elapsed_s:.0f} s; {len(texts)} different texts; {sum(exact)} sessions exact, the others batched; every text, "
        "and the number of tokens kept, against the same model without a server or a swap"
    )
    return [
        row("server.sessions_1000.lost", count - sum(kept), "sessions", note=note),
        row("server.sessions_1000.mixed_up", len(wrong), "sessions", note=note),
        row("server.sessions_1000.s", round(elapsed_s, 1), "s", note=note),
    ]


def counters(address: str) -> dict[str, int]:
    """What the server has counted."""
    line = http.client.HTTPConnection(address, timeout=60)
    line.request("GET", "/metrics")
    text = line.getresponse().read().decode()
    names = {
        "pool_evictions": "overspill_pool_pool_evictions",
        "tokens": "overspill_tokens_total",
        "steps": "overspill_step_seconds_count",
    }
    return {key: int(re.search(rf"^{name} (\d+)", text, re.M)[1]) for key, name in names.items()}  # type: ignore[index]
