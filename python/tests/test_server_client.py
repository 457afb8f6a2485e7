"""``overspill.Client`` and ``AsyncClient`` against a server, and docs/server.md as it stands there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_harness import Server, Servers
from server_worker import HIDDEN

from overspill import AsyncClient, Client
from overspill.errors import RequestError


@pytest.fixture(scope="module")
def server(server_processes: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield server_processes.start(keys=["k"], state_dir=str(tmp_path_factory.mktemp("state")))
    server_processes.end_all()


def test_every_call(server: Server) -> None:
    client = Client(server.url, api_key="k")
    assert client.models()["data"][0]["id"] == "tiny"
    expected = client.complete("a tale", max_tokens=9, temperature=0)["choices"][0]["text"]
    assert "".join(client.stream("a tale", max_tokens=9, temperature=0)) == expected
    client.create("tale", exact=True)
    client.pause("tale", layer=2)
    begun = client.complete("a tale", session="tale", max_tokens=9, temperature=0)
    assert begun["choices"][0]["finish_reason"] == "paused"
    assert client.get("tale")["layer"] == 2
    client.fork("tale", "copy")
    client.set_hidden("tale", client.hidden("tale"))
    assert "".join(client.stream_resume("tale")) == client.resume("copy")["choices"][0]["text"] == expected
    client.steer("copy", 1, vector=[0.5] * HIDDEN, name="up")
    assert client.io_wait("copy", eta_ms=3_600_000)["state"] == "waiting"
    assert client.save("tale")["saved"]
    message = client.chat([{"role": "user", "content": "hi"}], session="copy", max_tokens=2)
    assert message["choices"][0]["message"]["role"] == "assistant"
    assert [one["id"] for one in client.sessions()["data"]] == ["tale", "copy"]
    assert all(client.delete(name)["deleted"] for name in ("tale", "copy"))


def test_a_refusal_says_why(server: Server) -> None:
    with pytest.raises(RequestError) as missing:
        Client(server.url, api_key="k").get("nobody")
    assert (missing.value.status, missing.value.code) == (404, "session_not_found")
    with pytest.raises(RequestError) as wrong:
        Client(server.url, api_key="k").complete("a", temperature=9)
    assert (wrong.value.status, wrong.value.param) == (400, "temperature")
    with pytest.raises(RequestError, match="key"):
        Client(server.url).models()
    with pytest.raises(RequestError, match="refused"):
        Client("http://127.0.0.1:1").models()


def test_the_same_when_awaited(server: Server) -> None:
    async def talk() -> tuple[list[Any], str]:
        client = AsyncClient(server.url, api_key="k")
        made = await asyncio.gather(*(client.complete("x", max_tokens=4, temperature=0) for _ in range(3)))
        pieces = [piece async for piece in client.stream("x", max_tokens=4, temperature=0)]
        return made, "".join(pieces)

    made, streamed = asyncio.run(talk())
    assert {one["choices"][0]["text"] for one in made} == {streamed}


def test_the_documents_examples_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    scope: dict[str, Any] = {}
    for block in blocks:
        here = block.replace("http://127.0.0.1:8321", server.url).replace('"none"', '"k"')
        here = here.replace('model="smollm2-135m"', 'model="tiny"').replace("layer=15", "layer=2")
        exec(compile(here.replace("Client()", f"Client({server.url!r}, 'k')"), "server.md", "exec"), scope)
