"""The server under load from a second process on loopback: overhead, 1,000 sessions, idle streams, garbage, kill -9.

``python bench/server.py MODEL_DIR --part NAME`` measures one part and keeps the rows of the others. MODEL_DIR is
SmolLM2-135M with its tokenizer, as ``overspill serve`` prepares it. The part ``malformed`` needs schemathesis, and
uses a tiny random model: it is about requests, not tokens.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import itertools
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from server_garbage import malformed
from server_load import TESTS, Server, percentile, resident_bytes, serve
from server_sessions import SESSIONS, SLAB_BYTES, prompts, reference, sessions

from common import commit, row, update_results

HERE = Path(__file__).parent


# ---- overhead ----------------------------------------------------------------------------------------


def overhead(model: Path, scratch: Path) -> list[dict[str, Any]]:
    """Time between two tokens at the client, less the model's own call for the second, in the same run."""
    calls_path, count = scratch / "calls.json", 128
    server = Server(
        [sys.executable, __file__, str(model), "--timed-server", str(calls_path)], scratch / "log"
    )
    gaps: list[float] = []
    for turn in range(4):
        print(f"answer {turn}", file=sys.stderr, flush=True)
        line = http.client.HTTPConnection(server.address, timeout=300)
        # It goes on counting, and so does not end.
        body = {
            "prompt": ", ".join(str(turn + number) for number in range(9)) + ",",
            "max_tokens": count,
            "temperature": 0,
            "stream": True,
        }
        line.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer, times = line.getresponse(), []
        for event in answer:
            # Every token is text, and so an event.
            if event.startswith(b"data: {") and b'"finish_reason":null' in event:
                times.append(time.perf_counter())
        line.close()
        assert len(times) == count, len(times)
        if turn:  # the first warms everything up
            gaps += [after - before for before, after in itertools.pairwise(times)]
    server.end()
    calls: list[float] = []
    between: list[float] = []
    for one in json.loads(calls_path.read_text())[1:]:
        calls += [end - begin for begin, end in one[1:]]  # the gap before a token is the call that made it
        between += [begin - end for (_, end), (begin, _) in itertools.pairwise(one)]
    assert len(calls) == len(gaps), (len(calls), len(gaps))
    added = [1e3 * (gap - call) for gap, call in zip(gaps, calls, strict=True)]
    load, threads = os.getloadavg()[0], os.environ.get("OMP_NUM_THREADS", "all")
    note = (
        f"{len(added)} tokens, one stream, fp32, {threads} compute threads; median {percentile(added, 0.5):.3f} ms over a call of "
        f"{1e3 * percentile(calls, 0.5):.1f} ms; gap between tokens at the client less session.run of the same token; from one call "
        f"to the next the server takes {1e3 * percentile(between, 0.5):.3f} ms, p99 {1e3 * percentile(between, 0.99):.3f}; "
        f"load average {load:.1f}; trained weights (4 bit, dequantized)"
    )
    return [row("server.overhead_ms_p99", round(percentile(added, 0.99), 3), "ms", note=note)]


def timed_server(model: Path, calls_path: Path) -> None:
    """A server that notes when the model's own calls begin and end, by answer."""
    from overspill import serve as package
    from overspill.djinn import Session, SessionPool
    from overspill.serve.executor import SessionExecutor
    from overspill.serve.model import load_model, load_tokenizer

    import torch  # isort: skip

    calls: list[list[tuple[float, float]]] = []
    plain = Session.run

    def run(session: Session, ids: Any, *rest: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        found = plain(session, ids, *rest, **options)
        end = time.perf_counter()
        if session.tokens == len(ids):
            calls.append([])
        calls[-1].append((begin, end))
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
    parser.add_argument(
        "--reference",
        type=float,
        metavar="S",
        help="goes on with the reference of the sessions for S seconds",
    )
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="fewer than all, to try")
    parser.add_argument("--timed-server", type=Path)
    options = parser.parse_args()
    if options.timed_server:
        return timed_server(options.model, options.timed_server)
    options.scratch.mkdir(parents=True, exist_ok=True)
    scratch = options.scratch.resolve()
    if options.reference:
        return print(reference(options.model, scratch / "reference.json", options.reference), "of", SESSIONS)
    if options.sessions < SESSIONS:
        return print(json.dumps(sessions(options.model, scratch, options.sessions), indent=1))
    rows = PARTS[options.part](options.model, scratch)
    for one in rows:
        one["note"] += f"; at commit {commit()[:8]}"
    update_results("server", rows)
    for one in rows:
        print(f"{one['id']:<36}{one['value']:>12} {one['unit']}\n    {one['note']}")
    return None


if __name__ == "__main__":
    main()
