"""The server under load from a second process on loopback: overhead, 1,000 sessions, idle streams, garbage, kill -9.

``python bench/server.py MODEL_DIR --part NAME`` measures one part and keeps the rows of the others. MODEL_DIR is
SmolLM2-135M with its tokenizer, as ``overspill serve`` prepares it. The part ``malformed`` needs schemathesis, and
uses a tiny random model: it is about requests, not tokens.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import http.client
import importlib.metadata
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, row, write_results

HERE = Path(__file__).parent
TESTS = HERE.parent / "python" / "tests"
SESSIONS, ROOM, SESSION_TOKENS = 1000, 20, 64
SLAB_BYTES = 30 * 2 * 3 * 64 * 4 * SESSION_TOKENS  # layers, keys and values, heads, head_dim, fp32
CLIENTS = 32
# Raw requests are sent for this long at most; how many they were is in the result.
RAW_S = 110


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment}
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "http://" in line:
                self.address = line.split("http://")[1].split(",")[0]
                return
        raise RuntimeError(f"no server: {log.read_text()[-2000:]}")

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of a request."""
        return request(self.address, method, path, body)

    def complete(self, prompt: str, count: int, session: str | None = None) -> str:
        """Greedy text."""
        return complete(self.address, prompt, count, session)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=300)


def request(address: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a request."""
    line = http.client.HTTPConnection(address, timeout=300)
    headers = {} if body is None else {"Content-Type": "application/json"}
    line.request(method, path, None if body is None else json.dumps(body), headers)
    answer = line.getresponse()
    found = answer.read()
    line.close()
    return answer.status, json.loads(found)


def complete(address: str, prompt: str, count: int, session: str | None = None) -> str:
    """Greedy text."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "session_id": session}
    status, found = request(address, "POST", "/v1/completions", body)
    assert status == 200, found
    return found["choices"][0]["text"]


def serve(model: Path, log: Path, *options: str) -> Server:
    """``overspill serve`` of SmolLM2."""
    command = [sys.executable, "-m", "overspill", "serve", str(model), "--bind", "127.0.0.1:0", *options]
    return Server(command, log)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of all lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# ---- overhead ----------------------------------------------------------------------------------------


def overhead(model: Path, scratch: Path) -> list[dict[str, Any]]:
    """Time between two tokens at the client, less the model's own call for the second, in the same run."""
    calls_path, count = scratch / "calls.json", 80
    server = Server(
        [sys.executable, __file__, str(model), "--timed-server", str(calls_path)], scratch / "log"
    )
    gaps: list[float] = []
    for turn in range(3):
        print(f"answer {turn}", file=sys.stderr, flush=True)
        line = http.client.HTTPConnection(server.address, timeout=300)
        body = {"prompt": f"Once upon a time, {turn} ", "max_tokens": count, "temperature": 0, "stream": True}
        line.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer, times = line.getresponse(), []
        for event in answer:
            # Every token of English is text, and so an event.
            if event.startswith(b"data: {") and b'"finish_reason":null' in event:
                times.append(time.perf_counter())
        line.close()
        assert len(times) == count, len(times)
        if turn:  # the first warms everything up
            gaps += [after - before for before, after in itertools.pairwise(times)]
    server.end()
    calls: list[float] = []
    for one in json.loads(calls_path.read_text())[1:]:
        calls += one[1:]  # the gap before a token is the call that made it
    assert len(calls) == len(gaps), (len(calls), len(gaps))
    added = [1e3 * (gap - call) for gap, call in zip(gaps, calls, strict=True)]
    load, threads = os.getloadavg()[0], os.environ.get("OMP_NUM_THREADS", "all")
    note = (
        f"{len(added)} tokens, one stream, fp32, {threads} compute threads; median {percentile(added, 0.5):.3f} ms over a call of "
        f"{1e3 * percentile(calls, 0.5):.1f} ms; gap between tokens at the client less session.run of the same token; "
        f"load average {load:.1f}; trained weights (4 bit, dequantized)"
    )
    return [row("server.overhead_ms_p99", round(percentile(added, 0.99), 3), "ms", note=note)]


def timed_server(model: Path, calls_path: Path) -> None:
    """A server that notes how long the model's own calls take, by answer."""
    from overspill import serve as package
    from overspill.djinn import Session, SessionPool
    from overspill.serve.executor import SessionExecutor
    from overspill.serve.model import load_model, load_tokenizer

    import torch  # isort: skip

    calls: list[list[float]] = []
    plain = Session.run

    def run(session: Session, ids: Any, *rest: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        found = plain(session, ids, *rest, **options)
        if session.tokens == len(ids):
            calls.append([])
        calls[-1].append(time.perf_counter() - begin)
        return found

    Session.run = run  # type: ignore[method-assign]
    loaded = load_model(model, torch.device("cpu"), None)
    pool = SessionPool(loaded, arena_budget="128MiB", session_tokens=256)
    package.run(
        SessionExecutor(pool, load_tokenizer(model)),
        "smollm2",
        {"bind": "127.0.0.1:0", "keys": [], "state_dir": None},
    )
    calls_path.write_text(json.dumps(calls))


# ---- 1,000 sessions ----------------------------------------------------------------------------------


WORDS = [
    "river",
    "stone",
    "apple",
    "horse",
    "winter",
    "garden",
    "silver",
    "music",
    "paper",
    "window",
    "coffee",
    "market",
    "island",
    "bridge",
    "candle",
    "forest",
    "doctor",
    "engine",
    "farmer",
    "guitar",
    "hammer",
    "jacket",
    "kitchen",
    "ladder",
    "mirror",
    "needle",
    "ocean",
    "pencil",
    "queen",
    "rabbit",
    "salad",
    "tiger",
    "yellow",
]


def prompts(number: int) -> tuple[str, str]:
    """What a session is told in its two turns: a pair of words like no other's, which the model goes on repeating."""
    first, second = divmod(number, len(WORDS) - 1)
    one = WORDS[first]
    two = [word for word in WORDS if word != one][second]
    return f"{one} {two} {one} {two} {one}", f" {one} {two} {one}"


TURN_TOKENS = (2, 1)


def reference(model: Path, path: Path) -> None:
    """What every session says in a pool of its own that never swaps; kept in a file."""
    import torch

    from overspill.djinn import SessionPool
    from overspill.serve.executor import SessionExecutor
    from overspill.serve.model import load_model, load_tokenizer

    executor = SessionExecutor(
        SessionPool(
            load_model(model, torch.device("cpu"), None),
            arena_budget=2 * SLAB_BYTES,
            session_tokens=SESSION_TOKENS,
        ),
        load_tokenizer(model),
    )
    texts: list[list[str]] = json.loads(path.read_text()) if path.exists() else []
    for number in range(len(texts), SESSIONS):
        session, said = executor.pool.session(str(number)), []
        for prompt, count in zip(prompts(number), TURN_TOKENS, strict=True):
            made: Any = session.generate(executor.tokenizer.encode(prompt), count)
            said.append(executor.tokenizer.decode(made.tokens, skip_special_tokens=True))
        session.close()
        texts.append(said)
        if number % 50 == 49:
            path.write_text(json.dumps(texts))
    path.write_text(json.dumps(texts))


def sessions(model: Path, scratch: Path) -> list[dict[str, Any]]:
    """1,000 open sessions over room for 20: each takes two turns, all first turns before any second. Where there is
    no whole reference of SmolLM2's texts (``--reference``) it is a tiny random model, and the rows say so.
    """
    path = scratch / "reference.json"
    expected = json.loads(path.read_text()) if path.exists() else []
    if len(expected) < SESSIONS:
        return tiny_sessions(scratch)
    spill = scratch / "spill"
    spill.mkdir(exist_ok=True)
    server = serve(
        model, scratch / "log", "--session-tokens", str(SESSION_TOKENS), "--arena-budget", str(ROOM * SLAB_BYTES),
        "--host-budget", "512MiB", "--spill-dir", str(spill),
    )  # fmt: skip
    rows = take_turns(server.address, TURN_TOKENS, expected, "SmolLM2, trained weights (4 bit, dequantized)")
    server.end()
    return rows


def tiny_sessions(scratch: Path) -> list[dict[str, Any]]:
    """The same of a tiny random model, whose reference is made here; host memory for a quarter, the rest on disk."""
    sys.path.insert(0, str(TESTS))
    from server_harness import Servers
    from server_worker import tiny_executor

    executor, counts = tiny_executor(), (3, 3)
    expected = []
    for number in range(SESSIONS):
        session, said = executor.pool.session(str(number)), []
        for prompt, count in zip(prompts(number), counts, strict=True):
            ends: Any = {"eos_token_id": 256}
            made: Any = session.generate(executor.tokenizer.encode(prompt), count, **ends)
            text = executor.tokenizer.decode(made.tokens, skip_special_tokens=True)
            said.append(text.rstrip("\ufffd"))
        session.close()
        expected.append(said)
    spill = scratch / "spill"
    spill.mkdir(exist_ok=True)
    servers = Servers.make()
    model = {"slabs": ROOM, "host_budget": "8MiB", "spill_dir": str(spill)}
    server = servers.start(model, log=str(scratch / "tiny.log"))
    rows = take_turns(server.address, counts, expected, "a tiny random model of 4 layers, not SmolLM2")
    servers.close()
    return rows


def take_turns(
    address: str, counts: tuple[int, int], expected: list[list[str]], what: str
) -> list[dict[str, Any]]:
    """The turns of all sessions, and what came of them."""
    begin = time.perf_counter()
    for number in range(SESSIONS):
        status, found = request(address, "POST", "/v1/sessions", {"id": f"s{number}", "exact": True})
        assert status == 200, found
    said: list[list[str]] = [[] for _ in range(SESSIONS)]
    for turn, count in enumerate(counts):

        def ask(number: int, turn: int = turn, count: int = count) -> None:
            said[number].append(
                complete(address, prompts(number)[turn], count, f"s{number}").rstrip("\ufffd")
            )

        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(ask, range(SESSIONS)))
    elapsed_s = time.perf_counter() - begin
    _, listed = request(address, "GET", "/v1/sessions")
    lost = SESSIONS - sum(one["state"] == "idle" for one in listed["data"])
    line = http.client.HTTPConnection(address, timeout=60)
    line.request("GET", "/metrics")
    text = line.getresponse().read().decode()
    evictions = int(re.search(r"overspill_pool_pool_evictions (\d+)", text)[1])  # type: ignore[index]
    wrong = sum(one != other for one, other in zip(said, expected, strict=True))
    distinct = len({tuple(one) for one in expected})
    note = (
        f"{what}; {CLIENTS} clients, {SESSIONS} sessions open at once, two turns each, room for {ROOM} on the device, "
        f"{evictions} evictions, {elapsed_s:.0f} s, {distinct} different texts; exact sessions, every text against a "
        "pool that never swaps"
    )
    return [
        row("server.sessions_1000.lost", lost, "sessions", note=note),
        row("server.sessions_1000.mixed_up", wrong, "sessions", note=note),
        row("server.sessions_1000.s", round(elapsed_s, 1), "s", note=note),
    ]


# ---- idle streams ------------------------------------------------------------------------------------


def idle(model: Path, scratch: Path) -> list[dict[str, Any]]:
    """Memory of the server before and with 1,000 connections that watch, each of which has had its report. The model
    is a tiny random one: connections are not its business.
    """
    sys.path.insert(0, str(TESTS))
    from server_harness import Servers

    servers = Servers.make()
    server = servers.start()
    server.complete("warm", 4)
    host, port = server.address.split(":")
    before = resident_bytes(server.pid)
    lines = []
    for _ in range(1000):
        line = socket.create_connection((host, int(port)), timeout=60)
        line.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        lines.append(line)
    for line in lines:
        found = b""
        while b"data: " not in found:
            found += line.recv(65_536)
    time.sleep(3)
    after = resident_bytes(server.pid)
    for line in lines:
        line.close()
    servers.close()
    note = (
        f"resident memory of the server's process, {before / 1e6:.0f} MB before; each has had reports twice a second for "
        "3 s; tiny random model"
    )
    return [row("server.idle_sse_1000_mb", round((after - before) / 1e6, 1), "MB", note=note)]


# ---- garbage -----------------------------------------------------------------------------------------

GOOD = [
    (
        "POST",
        "/v1/completions",
        '{"prompt": "a", "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "seed": 3}',
    ),
    (
        "POST",
        "/v1/chat/completions",
        '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": true}',
    ),
    ("POST", "/v1/completions", '{"prompt": [1, 2, 3], "max_tokens": 2, "stream": true, "session_id": "s"}'),
    ("POST", "/v1/sessions", '{"id": "s", "exact": false}'),
    ("POST", "/v1/sessions/s/pause", '{"layer": 1}'),
    ("POST", "/v1/sessions/s/resume", '{"stream": false}'),
    ("POST", "/v1/sessions/s/fork", '{"id": "t"}'),
    ("POST", "/v1/sessions/s/steer", '{"layer": 1, "toward": "a", "away": "b", "strength": 1e5}'),
    ("POST", "/v1/sessions/s/io_wait", '{"eta_ms": 5}'),
    ("POST", "/v1/sessions/s/save", "{}"),
    ("PUT", "/v1/sessions/s/hidden", "\x40\x00\x00\x00\x00\x00\x00\x00{}"),
    ("GET", "/v1/sessions/s/hidden", ""),
    ("GET", "/v1/sessions", ""),
    ("DELETE", "/v1/sessions/t", ""),
    ("GET", "/metrics", ""),
]
ODD = [
    "null",
    "-1",
    "1e999",
    '"\\ud800"',
    "[]",
    "{}",
    "18446744073709551616",
    '"\\u0000"',
    "true",
    "[[[[1]]]]",
    "NaN",
    "0.0",
]


def garbage(chance: random.Random) -> tuple[bytes, bool]:
    """A request that is wrong in some way, mostly, and whether it is whole, so that an answer is due."""
    kind = chance.random()
    if kind < 0.1:
        return chance.randbytes(chance.randint(1, 300)) + b"\r\n\r\n", False
    method, path, body = chance.choice(GOOD)
    data = bytearray(body.encode("latin-1"))
    if kind < 0.45 and data:
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
    elif kind < 0.75:
        values = list(re.finditer(rb'(?<=: )("[^"]*"|[\d.e]+|true|false|\[[^]]*\]|\{[^}]*\})', bytes(data)))
        if values:
            found = chance.choice(values)
            data[found.start() : found.end()] = chance.choice(ODD).encode()
    kinds = ["application/octet-stream" if method == "PUT" else "application/json"] * 9 + ["text/plain"]
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {chance.choice(kinds)}\r\n"
    request = bytearray(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    if kind > 0.85:
        for _ in range(chance.randint(1, 6)):
            request[chance.randrange(min(len(request), 120))] = chance.randrange(256)
    return bytes(request), kind <= 0.85


def throw(address: str, seed: int, count: int) -> collections.Counter[str]:
    """Sends ``count`` of them; statuses, and ``dead`` where nobody listens any more."""
    chance, found = random.Random(seed), collections.Counter[str]()
    host, port = address.split(":")
    for _ in range(count):
        try:
            with socket.create_connection((host, int(port)), timeout=30) as line:
                try:
                    request, is_whole = garbage(chance)
                    line.sendall(request)
                    if not is_whole:
                        line.shutdown(socket.SHUT_WR)
                    answer = line.recv(65_536)
                    while b"\r\n\r\n" not in answer and (more := line.recv(65_536)):
                        answer += more
                except (ConnectionResetError, BrokenPipeError):
                    answer = b""
                except TimeoutError:
                    answer = b"HTTP/1.1 hang"
        except OSError:
            found["dead"] += 1
            continue
        found[answer[9:13].decode("latin-1").strip() if answer.startswith(b"HTTP/1.") else "hung up"] += 1
    return found


def malformed(model: Path, scratch: Path) -> list[dict[str, Any]]:
    """Raw garbage and what schemathesis makes of the description; whatever is a 5xx but a 503, or no answer."""
    sys.path.insert(0, str(TESTS))
    from server_harness import Servers

    log, total = scratch / "malformed.log", 100_000
    log.unlink(missing_ok=True)
    servers = Servers.make()
    limits = {"max_tokens": 4, "sessions_per_key": 64, "header_s": 5, "body_s": 5}
    server = servers.start(limits=limits, log=str(log))
    made = subprocess.run(
        ["schemathesis", "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "20",
         "--phases", "examples,coverage,fuzzing", "--exclude-path", "/v1/events", "--suppress-health-check", "all",
         "--generation-database", "none", "--no-color", "--request-timeout", "20"],
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    (scratch / "schemathesis.log").write_text(made.stdout + made.stderr)
    text = server.get("/metrics").body.decode()
    described = sum(
        int(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("overspill_requests_total")
    )
    failures = len(re.findall(r"^- Server error", made.stdout, flags=re.MULTILINE))
    seed = random.SystemRandom().randrange(2**32)
    raw, found = max(0, total - described), collections.Counter[str]()
    with concurrent.futures.ProcessPoolExecutor(4) as throwers:
        chunk = -(-raw // 400)
        jobs = [throwers.submit(throw, server.address, seed + number, chunk) for number in range(400)]
        begin = time.monotonic()
        for job in jobs:
            if time.monotonic() - begin > RAW_S:
                job.cancel()
            if not job.cancelled():
                found += job.result()
    alive = server.get("/healthz").status == 200 and server.complete("still here", 2).status == 200
    text = server.get("/metrics").body.decode()
    bad = {
        int(status): int(count)
        for status, count in re.findall(r'status="(5\d\d)"\} (\d+)', text)
        if status != "503"
    }
    panics = log.read_text().count("panicked")
    dead = found["dead"] + found["hang"] + (0 if alive else 1)
    servers.close()
    sent = described + sum(found.values())
    note = (
        f"{described} by schemathesis on /openapi.json, {sum(found.values())} raw (seed {seed}): {dict(found.most_common(12))}; "
        f"5xx but 503: {bad}; panics {panics}; tiny random model"
    )
    print(made.stdout[-1500:])
    return [
        row("server.malformed.failures", failures + sum(bad.values()) + panics + dead, "requests", note=note),
        row("server.malformed.requests", sent, "requests", note=note),
    ]


# ---- kill -9 -----------------------------------------------------------------------------------------


def kill(model: Path, scratch: Path) -> list[dict[str, Any]]:
    """30 sessions under load, 20 of them saved; SIGKILL; what is there again."""
    with tempfile.TemporaryDirectory(dir=scratch) as state:
        options = ["--session-tokens", "64", "--arena-budget", str(8 * SLAB_BYTES), "--state-dir", state]
        server = serve(model, scratch / "log", *options)
        names = [f"s{number}" for number in range(30)]
        for number, name in enumerate(names):
            server.request("POST", "/v1/sessions", {"id": name, "exact": True})
            server.complete(prompts(number)[0], 2, name)
        for name in names[:20]:
            status, found = server.request("POST", f"/v1/sessions/{name}/save", {})
            assert status == 200, found
        expected = []
        for name in names[:20]:
            fork = server.request("POST", f"/v1/sessions/{name}/fork", {})[1]["id"]
            expected.append(server.complete(" then", 2, fork))
            server.request("DELETE", f"/v1/sessions/{fork}")
        with concurrent.futures.ThreadPoolExecutor(10) as clients:
            jobs = [clients.submit(server.complete, " and", 30, name) for name in names[10:]]
            time.sleep(1)
            server.end(signal.SIGKILL)
            cut = sum(job.exception() is not None for job in jobs)
        again = serve(model, scratch / "log", *options)
        found = {one["id"]: one for one in again.request("GET", "/v1/sessions")[1]["data"]}
        back = sum(
            again.complete(" then", 2, name) == text for name, text in zip(names, expected, strict=False)
        )
        named = sum(found[name]["state"] == "lost" for name in names[20:])
        rolled = sum(found[name]["rolled_back"] for name in names[10:20])
        again.end()
    note = (
        f"{cut} requests cut off by the kill; 20 saved sessions, of which the texts are as before the kill, {rolled} of them "
        "rolled back and said so; 10 never saved"
    )
    return [
        row("server.kill.saved_and_back", back, "of 20", note=note),
        row("server.kill.unsaved_and_named", named, "of 10", note=note),
    ]


PARTS = {"overhead": overhead, "sessions": sessions, "idle": idle, "malformed": malformed, "kill": kill}


def main() -> None:
    """Measures one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--scratch", type=Path, default=Path("target/server"))
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--timed-server", type=Path)
    options = parser.parse_args()
    if options.timed_server:
        return timed_server(options.model, options.timed_server)
    options.scratch.mkdir(parents=True, exist_ok=True)
    if options.reference:
        return reference(options.model, options.reference)
    rows = PARTS[options.part](options.model, options.scratch.resolve())
    path = (Path(os.environ.get("OUT", RESULTS))) / "server.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    ids = {one["id"] for one in rows}
    write_results("server", [one for one in kept if one["id"] not in ids] + rows)
    document = json.loads(path.read_text())
    document["versions"] |= {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "overspill")
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    for one in rows:
        print(f"{one['id']:<36}{one['value']:>12} {one['unit']}\n    {one['note']}")
    return None


if __name__ == "__main__":
    main()
