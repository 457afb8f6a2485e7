"""Clients of ``overspill serve`` for the routes that OpenAI's client does not have; nothing but the standard library.

Each call is one connection. What comes back is the server's JSON as it is; ``docs/server.md`` says what is in it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from .errors import RequestError

DEFAULT_URL = "http://127.0.0.1:8321"
FILE = "application/octet-stream"


class Routes:
    """The calls of both clients; :class:`Client` answers, :class:`AsyncClient` answers when awaited.

    Args:
        url: where the server is.
        api_key: yours, if it has keys.
        timeout_s: seconds of silence after which a call is given up.
    """

    def __init__(self, url: str = DEFAULT_URL, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self._parts = urlsplit(url)
        self._key = api_key
        self._timeout_s = timeout_s

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        raise NotImplementedError

    def models(self) -> Any:
        """What is served."""
        return self._call("GET", "/v1/models")

    def sessions(self) -> Any:
        """The sessions of this key, in ``data``."""
        return self._call("GET", "/v1/sessions")

    def create(self, session: str | None = None, exact: bool = False) -> Any:
        """A new session; ``exact``: its steps are never batched with others'."""
        return self._call("POST", "/v1/sessions", {"id": session, "exact": exact})

    def get(self, session: str) -> Any:
        """What it is doing, and where it is."""
        return self._call("GET", _path(session))

    def delete(self, session: str) -> Any:
        """Ends it, and what it generates."""
        return self._call("DELETE", _path(session))

    def complete(self, prompt: str | Sequence[int], session: str | None = None, **options: Any) -> Any:
        """Continues text or tokens; ``options`` are those of ``/v1/completions``."""
        return self._call("POST", "/v1/completions", {"prompt": prompt, "session_id": session, **options})

    def chat(self, messages: Sequence[dict[str, Any]], session: str | None = None, **options: Any) -> Any:
        """Answers messages: the new ones, or all; ``options`` are those of ``/v1/chat/completions``."""
        body = {"messages": list(messages), "session_id": session, **options}
        return self._call("POST", "/v1/chat/completions", body)

    def pause(self, session: str, layer: int | None = None) -> Any:
        """Stops it after a layer of its next forward, or before it."""
        return self._call("POST", _path(session, "pause"), {"layer": layer})

    def resume(self, session: str) -> Any:
        """Goes on with what it was generating; the rest of the answer."""
        return self._call("POST", _path(session, "resume"), {})

    def fork(self, session: str, child: str | None = None) -> Any:
        """A second session that goes on from here."""
        return self._call("POST", _path(session, "fork"), {"id": child})

    def io_wait(self, session: str, eta_ms: float) -> Any:
        """It waits for something, and gives way on the device until shortly before."""
        return self._call("POST", _path(session, "io_wait"), {"eta_ms": eta_ms})

    def steer(
        self,
        session: str,
        layer: int,
        *,
        vector: Sequence[float] | None = None,
        toward: str | None = None,
        away: str | None = None,
        strength: float = 1.0,
        name: str = "steer",
    ) -> Any:
        """Steers a layer by a vector, or by the difference of two texts; without either, changes the strength."""
        body: dict[str, Any] = {
            "layer": layer,
            "toward": toward,
            "away": away,
            "strength": strength,
            "name": name,
        }
        body["vector"] = None if vector is None else list(vector)
        return self._call("POST", _path(session, "steer"), body)

    def save(self, session: str) -> Any:
        """Writes it to the server's state folder."""
        return self._call("POST", _path(session, "save"), {})

    def hidden(self, session: str) -> Any:
        """The hidden state where it stands: the bytes of a safetensors file with ``hidden``."""
        return self._call("GET", _path(session, "hidden"))

    def set_hidden(self, session: str, file: bytes) -> Any:
        """Replaces it."""
        return self._call("PUT", _path(session, "hidden"), file)

    def _open(self, method: str, path: str, body: Any) -> tuple[http.client.HTTPConnection, Any]:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout_s)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        if isinstance(body, bytes):
            headers["Content-Type"] = FILE
        elif body is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise _refusal(answer.status, answer.getheader("Retry-After"), answer.read())
        except OSError as error:
            connection.close()
            raise RequestError(f"{self._parts.geturl()}: {error}") from error
        except BaseException:
            connection.close()
            raise
        return connection, answer

    def _once(self, method: str, path: str, body: Any) -> Any:
        connection, answer = self._open(method, path, body)
        try:
            found = answer.read()
            return found if answer.getheader("Content-Type") == FILE else json.loads(found)
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"{self._parts.geturl()}: {error}") from error
        finally:
            connection.close()

    def _pieces(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        connection, answer = self._open("POST", path, {**body, "stream": True})
        try:
            for line in answer:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RequestError(chunk["error"]["message"], code=chunk["error"]["code"])
                for choice in chunk["choices"]:
                    yield choice["text"] if "text" in choice else choice["delta"].get("content", "")
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"{self._parts.geturl()}: {error}") from error
        finally:
            connection.close()


class Client(Routes):
    """Calls that answer. ``with`` is not needed: nothing stays open.

    >>> Client("http://127.0.0.1:1").models()
    Traceback (most recent call last):
    overspill.errors.RequestError: http://127.0.0.1:1: [Errno 111] Connection refused
    """

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        return self._once(method, path, body)

    def stream(
        self, prompt: str | Sequence[int], session: str | None = None, **options: Any
    ) -> Iterator[str]:
        """As :meth:`complete`, piece by piece. Closing the iterator gives the rest up."""
        return self._pieces("/v1/completions", {"prompt": prompt, "session_id": session, **options})

    def stream_resume(self, session: str) -> Iterator[str]:
        """As :meth:`resume`, piece by piece."""
        return self._pieces(_path(session, "resume"), {})


class AsyncClient(Routes):
    """The same calls, to be awaited; each runs on a thread of its own."""

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        return await asyncio.to_thread(self._once, method, path, body)

    def stream(
        self, prompt: str | Sequence[int], session: str | None = None, **options: Any
    ) -> AsyncIterator[str]:
        """As :meth:`complete`, piece by piece."""
        return _awaited(self._pieces("/v1/completions", {"prompt": prompt, "session_id": session, **options}))

    def stream_resume(self, session: str) -> AsyncIterator[str]:
        """As :meth:`resume`, piece by piece."""
        return _awaited(self._pieces(_path(session, "resume"), {}))


async def _awaited(pieces: Iterator[str]) -> AsyncIterator[str]:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def _path(session: str, deed: str = "") -> str:
    return f"/v1/sessions/{quote(session, safe='')}" + (f"/{deed}" if deed else "")


def _refusal(status: int, retry_after: str | None, body: bytes) -> RequestError:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"the server answered {status}"}
    wait = float(retry_after) if retry_after else None
    facts = {"status": status, "code": error.get("code"), "param": error.get("param"), "retry_after_s": wait}
    return RequestError(error["message"], **facts)
