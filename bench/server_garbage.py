"""Requests that are wrong in some way, by the ten thousand: the part ``malformed`` of ``bench/server.py``."""

from __future__ import annotations

import collections
import concurrent.futures
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from server_load import TESTS

from common import row

# Raw requests are sent for this long at most; how many they were is in the result.
RAW_S = 110

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
