"""A server in a process of its own, and requests of it: what the parts of ``bench/server.py`` share."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "python" / "tests"


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
