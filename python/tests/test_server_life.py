"""Whose a session is, what nobody may exceed, and what is left of sessions when a server ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server_harness import Server, Servers
from server_worker import TOKENS


@pytest.fixture
def servers(server_processes: Servers) -> Iterator[Servers]:
    yield server_processes
    server_processes.end_all()


def until(true: Callable[[], Any]) -> None:
    """Waits for what has to come; a test that waits in vain is ended by its runner."""
    while not true():
        time.sleep(0.02)


def raw(server: Server, request: bytes) -> bytes:
    """All that comes back before the server hangs up."""
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as line:
        line.sendall(request)
        found = b""
        while more := line.recv(65_536):
            found += more
        return found


# ---- keys --------------------------------------------------------------------------------------------


def test_a_session_belongs_to_its_key(servers: Servers) -> None:
    server = servers.start(keys=["alpha", "beta"])
    for key in (None, "alph", "alphaa"):
        refused = server.get("/v1/sessions", key=key)
        assert (refused.status, refused.code) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    server.post("/v1/sessions", {"id": "mine"}, key="alpha")
    server.post("/v1/sessions/mine/pause", {"layer": 1}, key="alpha")
    secret = server.complete("my secret", session_id="mine", key="alpha")
    assert secret.finish == "paused"
    assert server.get("/v1/sessions", key="beta").json["data"] == []
    one = "/v1/sessions/mine"
    for method, path in [("GET", one), ("DELETE", one), ("GET", f"{one}/hidden")]:
        assert server.request(method, path, key="beta").code == "session_not_found"
    for deed in ("pause", "resume", "fork", "save"):
        assert server.post(f"{one}/{deed}", key="beta").code == "session_not_found"
    assert server.complete("x", session_id="mine", key="beta").code == "session_not_found"
    # The same name is another session, and neither shows in what the other sees.
    assert server.post("/v1/sessions", {"id": "mine"}, key="beta").status == 200
    assert server.get(one, key="beta").json["tokens"] == 0
    connection = server.connect()
    connection.request("GET", "/v1/events", headers={"Authorization": "Bearer beta"})
    seen = json.loads(connection.getresponse().readline().removeprefix(b"data: "))
    assert [session.get("id") for session in seen["sessions"]] == [None, "mine"]
    assert "state" not in seen["sessions"][0]
    connection.close()


def test_pages_of_other_sites_are_refused(servers: Servers) -> None:
    server = servers.start()
    assert server.get("/v1/models", host="evil.example").code == "foreign_site"
    assert server.get("/v1/models", origin="http://evil.example").code == "foreign_site"
    assert server.get("/v1/models", origin=server.url).status == 200
    form = server.request("POST", "/v1/sessions", b"{}", content_type="text/plain")
    assert (form.status, form.code) == (415, "media_type")


def test_others_reach_no_server_without_keys(servers: Servers) -> None:
    assert "needs API keys" in servers.refused(bind="0.0.0.0:0")


def test_two_servers_do_not_share_a_folder(servers: Servers, tmp_path: Path) -> None:
    servers.start(state_dir=str(tmp_path))
    assert "another server" in servers.refused(state_dir=str(tmp_path))


# ---- limits ------------------------------------------------------------------------------------------


def test_limits(servers: Servers) -> None:
    server = servers.start(
        limits={"body_bytes": 1000, "sessions_per_key": 2, "max_tokens": 20, "header_s": 0.3}
    )
    assert server.complete("a" * 2000).code == "body_too_large"
    assert server.complete("a", 21).status == 400
    names = [server.post("/v1/sessions").json["id"] for _ in range(2)]
    full = server.post("/v1/sessions")
    assert (full.status, full.code) == (429, "rate_limit_exceeded") and int(full.headers["retry-after"]) > 0
    assert server.post(f"/v1/sessions/{names[0]}/fork").status == 429
    server.request("DELETE", f"/v1/sessions/{names[0]}")
    assert server.post("/v1/sessions").status == 200
    host = b"Host: localhost\r\n"
    assert b" 431 " in raw(server, b"GET / HTTP/1.1\r\n" + host + b"X: " + b"a" * 40_000 + b"\r\n\r\n")
    # A head that does not end is hung up on; so is a connection that says nothing.
    assert raw(server, b"GET / HTTP/1.1\r\n" + host) in (b"", raw(server, b"GET / HT"))
    assert b" 400 " in raw(server, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    assert server.get("/healthz").status == 200


def test_a_full_queue_says_so(servers: Servers) -> None:
    for limits in ({"queue_per_key": 0}, {"queue": 0}):
        server = servers.start(limits=limits)
        full = server.complete("x")
        assert (full.status, full.code) == (429, "rate_limit_exceeded") and int(
            full.headers["retry-after"]
        ) > 0


def test_more_requests_than_seats_all_get_their_own_answer(servers: Servers) -> None:
    server = servers.start(model={"slabs": 2}, limits={"turn_tokens": 3})
    prompts = [f"number {number}" for number in range(12)]
    expected = [server.complete(prompt, 10).text for prompt in prompts]
    for number in range(12):
        server.post("/v1/sessions", {"id": f"s{number}", "exact": number % 2 == 0})
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = server.complete(prompts[number], 10, session_id=f"s{number}").text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(12)] == expected


def test_a_request_whose_client_is_gone_is_given_up(servers: Servers) -> None:
    server = servers.start()
    server.post("/v1/sessions", {"id": "left"})
    connection = server.connect()
    body = {"prompt": "x", "max_tokens": TOKENS - 10, "stream": True, "session_id": "left"}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.readline()
    answer.close()
    connection.close()
    until(lambda: server.session("left")["state"] == "idle")
    assert server.complete("y", 3, session_id="left").status == 200


# ---- ends and starts ---------------------------------------------------------------------------------


def test_sessions_outlive_a_server_bit_for_bit(servers: Servers, tmp_path: Path) -> None:
    """Between tokens, after a layer, sampled, steered, in a chat: the same texts as from one that never ended."""

    def begin(server: Server) -> None:
        for name in ("talk", "chat", "deep", "led"):
            server.post("/v1/sessions", {"id": name})
        server.post("/v1/sessions/led/steer", {"layer": 1, "toward": "a", "away": "b", "strength": 3})
        server.complete("one", 5, session_id="talk")
        server.complete("one", 5, session_id="led")
        chat = {
            "messages": [{"role": "user", "content": "a"}],
            "session_id": "chat",
            "max_tokens": 4,
            "seed": 5,
        }
        server.post("/v1/chat/completions", chat)
        server.post("/v1/sessions/deep/pause", {"layer": 2})
        server.complete("deep", 12, session_id="deep", temperature=1.3, seed=11, stop=["never"])

    def go_on(server: Server) -> list[str]:
        texts = [server.complete("two", 8, session_id=name).text for name in ("talk", "led")]
        chat = {
            "messages": [{"role": "user", "content": "b"}],
            "session_id": "chat",
            "max_tokens": 8,
            "seed": 6,
        }
        texts.append(server.post("/v1/chat/completions", chat).text)
        texts.append(server.post("/v1/sessions/deep/resume").text)
        return texts

    never = servers.start()
    begin(never)
    expected = go_on(never)
    first = servers.start(state_dir=str(tmp_path))
    begin(first)
    assert first.end() == 0
    second = servers.start(state_dir=str(tmp_path))
    states = {one["id"]: (one["state"], one["saved"]) for one in second.get("/v1/sessions").json["data"]}
    assert states == {
        name: ("paused" if name == "deep" else "idle", True) for name in ("talk", "chat", "deep", "led")
    }
    assert go_on(second) == expected


def test_a_generation_that_runs_when_the_server_ends_is_taken_up(servers: Servers, tmp_path: Path) -> None:
    count = TOKENS - 10
    plain = servers.start()
    expected = plain.complete("long", count).text
    server = servers.start(state_dir=str(tmp_path))
    server.post("/v1/sessions", {"id": "long"})
    connection = server.connect()
    body = {"prompt": "long", "max_tokens": count, "temperature": 0, "stream": True, "session_id": "long"}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    head = answer.readline()
    assert server.end() == 0
    lines = [line for line in (head + answer.read()).split(b"\n") if line.startswith(b"data: {")]
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    begun = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    again = servers.start(state_dir=str(tmp_path))
    finish = chunks[-1]["choices"][0]["finish_reason"]
    # It may have been over before the signal came.
    rest = again.post("/v1/sessions/long/resume").text if finish == "paused" else ""
    assert begun + rest == expected


def test_a_killed_server_brings_back_what_was_saved_and_names_what_was_not(
    servers: Servers, tmp_path: Path
) -> None:
    server = servers.start(state_dir=str(tmp_path), keys=["k", "other"])
    server.key = "k"
    for name in ("saved", "went on", "unsaved", "gone"):
        server.post("/v1/sessions", {"id": name.replace(" ", "-")})
    server.complete("one", 5, session_id="saved")
    server.complete("one", 5, session_id="went-on")
    for name in ("saved", "went-on", "gone"):
        assert server.post(f"/v1/sessions/{name}/save").json["saved"]
    expected = server.complete("two", 5, session_id=server.post("/v1/sessions/saved/fork").json["id"]).text
    server.complete("two", 5, session_id="went-on")
    server.request("DELETE", "/v1/sessions/gone")
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    again = servers.start(state_dir=str(tmp_path), keys=["k", "other"])
    assert again.get("/v1/sessions", key="other").json["data"] == []
    again.key = "k"
    found = {one["id"]: one for one in again.get("/v1/sessions").json["data"]}
    fork = next(name for name in found if name.startswith("sess-"))
    states = {name: (one["state"], one["rolled_back"]) for name, one in found.items()}
    assert states == {
        "saved": ("idle", False), "went-on": ("idle", True), "unsaved": ("lost", False), fork: ("lost", False),
    }  # fmt: skip
    lost = again.complete("x", session_id="unsaved")
    assert (lost.status, lost.code) == (410, "session_lost")
    for name in ("saved", "went-on"):
        assert again.complete("two", 5, session_id=name).text == expected
    assert again.request("DELETE", "/v1/sessions/unsaved").json["deleted"]
    assert again.get("/v1/sessions/unsaved").status == 404


def test_a_damaged_file_is_a_lost_session_and_the_others_are_there(servers: Servers, tmp_path: Path) -> None:
    server = servers.start(state_dir=str(tmp_path))
    for name in ("a", "b"):
        server.post("/v1/sessions", {"id": name})
        server.complete("one", 5, session_id=name)
    assert server.end() == 0
    file = sorted(tmp_path.glob("*.session"))[0]
    bytes_ = bytearray(file.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    file.write_bytes(bytes_)
    again = servers.start(state_dir=str(tmp_path), log=str(tmp_path / "log"))
    assert [one["state"] for one in again.get("/v1/sessions").json["data"]] == ["lost", "idle"]
    assert "checksum" in (tmp_path / "log").read_text()
