"""The page in headless Chromium, over its debugging protocol: create, pause, resume, by keyboard too."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server_harness import Server, Servers

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not tested")


class Page:
    """A page of a browser. The protocol is JSON over a websocket, of which this is the client's half."""

    def __init__(self, port: int) -> None:
        listed = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        listed.request("GET", "/json")
        found = json.loads(listed.getresponse().read())
        url = next(one for one in found if one["type"] == "page")["webSocketDebuggerUrl"]
        self.line = socket.create_connection(("127.0.0.1", port), timeout=60)
        path = url.split(str(port), 1)[1]
        key = base64.b64encode(b"0123456789abcdef").decode()
        head = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        )
        self.line.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self.input = self.line.makefile("rb")
        while self.input.readline() != b"\r\n":
            pass
        self.numbers = itertools.count(1)
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self.numbers)
        data = json.dumps({"id": number, "method": method, "params": params}).encode()
        size = struct.pack(">BBH", 0x81, 0x80 | 126, len(data))
        # A mask of zeros leaves the data as it is.
        self.line.sendall(size + bytes(4) + data)
        while True:
            message = json.loads(self._frame())
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _frame(self) -> bytes:
        whole, last = b"", False
        while not last:
            first, length = self.input.read(2)
            last = bool(first & 0x80)
            if length == 126:
                (length,) = struct.unpack(">H", self.input.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self.input.read(8))
            whole += self.input.read(length)
        return whole

    def run(self, source: str) -> Any:
        done = self.call("Runtime.evaluate", expression=source, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        until(lambda: self.run("document.readyState") == "complete")

    def key(self, name: str, text: str = "") -> None:
        code = {"Enter": 13, "Tab": 9}.get(name, 0)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, text=text, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, dark: bool) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))


def until(true: Callable[[], Any]) -> None:
    while not true():
        time.sleep(0.05)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    folder = tmp_path_factory.mktemp("chromium")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1400",
    ]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run", "about:blank"]
    process = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    port_file = folder / "DevToolsActivePort"
    until(lambda: (port_file.exists() and "\n" in port_file.read_text()) or process.poll() is not None)
    yield Page(int(port_file.read_text().splitlines()[0]))
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def server(server_processes: Servers) -> Iterator[Server]:
    yield server_processes.start({"slabs": 3, "host_budget": "256KiB"})
    server_processes.end_all()


def state(page: Page, name: str) -> str:
    """The session's state as the page has it."""
    source = f"document.querySelector('tr[data-name=\"{name}\"]')?.cells[1].textContent ?? ''"
    return page.run(source)


def press(page: Page, name: str, kind: str) -> None:
    page.run(f"document.querySelector('tr[data-name=\"{name}\"] .{kind}').click()")


def test_create_pause_resume_from_the_page(page: Page, server: Server) -> None:
    expected = server.complete("once", 12).text
    page.open(server.url)
    until(lambda: "tiny" in page.run("document.getElementById('model').textContent"))
    # By keyboard: into the field, a name, Enter.
    page.run("document.getElementById('name').focus()")
    page.type("alice")
    page.key("Enter", "\r")
    until(lambda: state(page, "alice") == "idle")
    assert server.session("alice")["state"] == "idle"
    press(page, "alice", "pause")
    until(lambda: server.session("alice")["pause_at"] == 2)
    until(lambda: page.run("document.activeElement.id") == "prompt")
    page.type("once")
    page.run("document.getElementById('count').value = 12")
    page.key("Tab")
    page.key("Tab")
    assert page.run("document.activeElement.textContent") == "Generate"
    page.key("Enter", "\r")
    until(lambda: state(page, "alice") == "paused after layer 2")
    assert server.session("alice")["layer"] == 2
    press(page, "alice", "resume")
    until(lambda: state(page, "alice") == "idle")
    until(lambda: page.run("document.getElementById('answer').textContent") == expected)
    for name, value in (("toward", "yes"), ("away", "no")):
        page.run(f"document.getElementById('{name}').value = '{value}'")
    page.run("document.getElementById('steer').requestSubmit()")
    until(lambda: server.session("alice")["steering"])
    until(lambda: page.run("document.querySelectorAll('#sessions td label[data-name]').length") == 1)
    page.run(
        "const s = document.querySelector('td label[data-name] input'); s.value = 4; s.dispatchEvent(new Event('change'))"
    )
    until(lambda: server.session("alice")["steering"][0]["strength"] == 4)
    press(page, "alice", "delete")
    until(lambda: server.get("/v1/sessions/alice").status == 404)
    until(lambda: state(page, "alice") == "")
    assert page.errors == []


def test_every_control_has_a_name_and_colours_follow_the_system(
    page: Page, server: Server, tmp_path: Path
) -> None:
    names = [f"agent-{number}" for number in range(5)]
    for name in names:
        server.post("/v1/sessions", {"id": name})
        server.complete(name, 20, session_id=name)
    page.open(server.url)
    until(lambda: state(page, names[-1]) == "idle")
    nameless = page.run("""[...document.querySelectorAll('button, input, textarea')].filter((one) =>
        !(one.labels?.length || one.ariaLabel || one.textContent.trim())).length""")
    assert nameless == 0
    if folder := os.environ.get("OVERSPILL_SCREENSHOTS"):
        busy(server, names)
        page.run("document.querySelector('tr[data-name=\"agent-1\"] th button').click()")
    grounds = []
    for dark in (False, True):
        page.picture(tmp_path / f"{dark}.png", dark)
        grounds.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
    if folder:
        for dark in (False, True):
            shutil.copy(tmp_path / f"{dark}.png", Path(folder) / f"page-{'dark' if dark else 'light'}.png")
    assert page.errors == []


def busy(server: Server, names: list[str]) -> None:
    """Something to see on a picture: forks that come and go, sessions that wait, stand after a layer, are steered."""
    server.post("/v1/sessions/agent-2/pause", {"layer": 2})
    server.complete("x", session_id="agent-2")
    server.post("/v1/sessions/agent-3/steer", {"layer": 1, "toward": "yes", "away": "no", "strength": 4})
    for round_ in range(60):
        fork = server.post(f"/v1/sessions/{names[round_ % 2]}/fork").json["id"]
        server.complete("go on", 4 + 20 * (round_ % 5), session_id=fork)
        server.request("DELETE", f"/v1/sessions/{fork}")
        time.sleep(0.3)
    server.post("/v1/sessions/agent-4/io_wait", {"eta_ms": 3_600_000})
    time.sleep(1)
