"""Servers of a tiny model for tests, each a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Reply:
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        choice = self.json["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]

    @property
    def finish(self) -> str:
        return self.json["choices"][0]["finish_reason"]

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


@dataclass
class Server:
    """One server, and requests of it."""

    pid: int
    address: str
    factory: Servers
    key: str | None = None
    ended: bool = False

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=60)

    def request(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, **headers: str
    ) -> Reply:
        connection = self.connect()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if (key or self.key) is not None:
            sent["Authorization"] = f"Bearer {key or self.key}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        reply = Reply(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()
        return reply

    def get(self, path: str, **options: Any) -> Reply:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Reply:
        return self.request("POST", path, {} if body is None else body, **options)

    def complete(self, prompt: str, count: int = 8, *, key: str | None = None, **options: Any) -> Reply:
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, **options}
        return self.post("/v1/completions", body, key=key)

    def session(self, name: str) -> dict[str, Any]:
        return self.get(f"/v1/sessions/{name}").json

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code, or the negative number of the signal that killed it."""
        if self.ended:
            return 0
        self.ended = True
        os.kill(self.pid, number)
        return self.factory.ask({"wait": self.pid})["status"]


@dataclass
class Servers:
    """Starts servers."""

    process: subprocess.Popen[str]
    running: list[Server] = field(default_factory=list)

    @classmethod
    def make(cls) -> Servers:
        worker = Path(__file__).parent / "server_worker.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, str(worker)], env=environment, **pipes)
        assert process.stdout is not None
        process.stdout.readline()
        return cls(process)

    def ask(self, what: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, model: dict[str, Any] | None = None, **config: Any) -> Server:
        """A server that listens."""
        pid, line = self._fork(model, config)
        assert "http://" in line, line
        server = Server(pid, line.split("http://")[1].split(",")[0], self)
        self.running.append(server)
        return server

    def refused(self, **config: Any) -> str:
        """Why a server does not start."""
        pid, line = self._fork(None, config)
        assert self.ask({"wait": pid})["status"] == 1
        return line

    def _fork(self, model: dict[str, Any] | None, config: dict[str, Any]) -> tuple[int, str]:
        what: dict[str, Any] = {"model": model or {}, "config": config}
        for name in ("script", "log"):
            if name in config:
                what[name] = config.pop(name)
        pid = self.ask(what)["pid"]
        assert self.process.stdout is not None
        return pid, self.process.stdout.readline()

    def end_all(self) -> None:
        for server in self.running:
            server.end(signal.SIGKILL)
        self.running.clear()

    def close(self) -> None:
        self.end_all()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
