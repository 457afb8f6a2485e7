"""The server's routes against a tiny model, and against the same sessions without a server."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load, save
from server_harness import Reply, Server, Servers
from server_worker import HIDDEN, LAYERS, TOKENS, tiny_executor

from overspill.djinn import Generated
from overspill.serve.sampling import likeliest


@pytest.fixture(scope="module")
def server(server_processes: Servers) -> Iterator[Server]:
    """One that tests share; each has sessions of its own."""
    yield server_processes.start()
    server_processes.end_all()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def direct(prompt: str, count: int) -> str:
    """What a session without a server says."""
    executor = tiny_executor()
    ids = executor.tokenizer.encode(prompt)
    found = executor.pool.session("direct").generate(ids, count, eos_token_id=256)
    assert isinstance(found, Generated)
    return executor.tokenizer.decode(found.tokens, skip_special_tokens=True)


def rid_of_incomplete(text: str) -> str:
    """Bytes at the end that are no character yet are not said."""
    return text.rstrip("�")


# ---- OpenAI's client, as it is -----------------------------------------------------------------------


def test_openai_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    made = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0)
    assert made.choices[0].text == rid_of_incomplete(direct("hello", 12))
    assert made.usage is not None and (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 12)
    assert made.choices[0].finish_reason == "length"
    chat: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**chat, logprobs=True, top_logprobs=3)
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    for entry in whole.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob <= 0
    stream = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "length"


def test_the_likeliest_token_is_the_one_that_torch_finds() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    chance = torch.Generator().manual_seed(seed)
    for case in range(200):
        # Few values, so that several are the highest.
        logits = torch.randint(-9, 9, (1 + case,), generator=chance).float()
        if case % 4 == 0:
            odd = float("nan") if case % 8 else float("inf")
            logits[torch.randint(0, len(logits), (2,), generator=chance)] = odd
        best, most = likeliest(logits)
        assert best == int(logits.argmax())
        assert torch.equal(torch.tensor(most), logits[best]) or (most != most and bool(logits[best].isnan()))
        assert likeliest(logits.double())[0] == best


def test_sampling_repeats_for_a_seed(client: openai.OpenAI) -> None:
    def say(**options: Any) -> str:
        options = {"temperature": 1.5, "max_tokens": 24, **options}
        return client.completions.create(model="tiny", prompt="once", **options).choices[0].text

    assert say(seed=3) == say(seed=3) != say(seed=4)
    assert say(seed=3, top_p=0) == say(temperature=0)
    assert say(seed=-1, top_p=0.9) == say(seed=-1, top_p=0.9)


def test_openai_errors_have_their_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="another", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt="a", temperature=7)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="a" * TOKENS, max_tokens=3)
    assert long.value.code == "context_length_exceeded"


def test_stop_strings_end_an_answer_and_are_not_in_it(server: Server) -> None:
    whole = server.complete("stop", 24).text
    stop = whole[3:5]
    cut = server.complete("stop", 24, stop=["nowhere", stop])
    assert (cut.text, cut.finish) == (whole[: whole.index(stop)], "stop")


# ---- sessions ----------------------------------------------------------------------------------------


def test_a_session_goes_on_where_it_was(server: Server) -> None:
    server.post("/v1/sessions", {"id": "talk"})
    first = server.complete("one", 6, session_id="talk")
    second = server.complete("two", 6, session_id="talk")
    executor = tiny_executor()
    session = executor.pool.session("s")
    for reply, prompt in ((first, "one"), (second, "two")):
        made = session.generate(executor.tokenizer.encode(prompt), 6)
        assert isinstance(made, Generated)
        assert reply.text == rid_of_incomplete(executor.tokenizer.decode(made.tokens))
    assert second.json["session_id"] == "talk"
    assert second.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 8
    assert server.session("talk")["state"] == "idle"
    assert server.request("DELETE", "/v1/sessions/talk").json["deleted"]
    assert server.get("/v1/sessions/talk").code == "session_not_found"


def test_a_chat_takes_new_messages_or_all_of_them(server: Server) -> None:
    def say(session: str, messages: list[dict[str, str]]) -> Reply:
        body = {"messages": messages, "session_id": session, "max_tokens": 5, "temperature": 0}
        return server.post("/v1/chat/completions", body)

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    for name in ("new", "all"):
        server.post("/v1/sessions", {"id": name})
    answers = [say(name, [user("a")]).text for name in ("new", "all")]
    history = [user("a"), {"role": "assistant", "content": answers[0]}, user("b")]
    second, same = say("new", [user("b")]), say("all", history)
    assert second.text == same.text
    assert second.json["usage"] == same.json["usage"]


def paused_at(server: Server, name: str, layer: int | None, count: int = 10) -> Reply:
    """A session whose generation stands after a layer, or before its first forward."""
    server.post("/v1/sessions", {"id": name})
    server.post(f"/v1/sessions/{name}/pause", {"layer": layer})
    return server.complete("pause", count, session_id=name)


@pytest.mark.parametrize("layer", [None, 0, LAYERS - 1])
def test_a_paused_session_resumes_to_the_same_text(server: Server, layer: int | None) -> None:
    expected = server.complete("pause", 10).text
    name = f"pause-{layer}"
    begun = paused_at(server, name, layer)
    assert (begun.finish, begun.text) == ("paused", "")
    found = server.session(name)
    assert (found["state"], found["layer"]) == ("paused", layer)
    assert server.complete("x", session_id=name).code == "session_conflict"
    rest = server.post(f"/v1/sessions/{name}/resume")
    assert (rest.text, rest.finish) == (expected, "length")
    assert server.post(f"/v1/sessions/{name}/resume").status == 409


def test_hidden_states_are_read_and_set(server: Server) -> None:
    expected = server.complete("pause", 10).text
    paused_at(server, "mind", 2)
    file = server.get("/v1/sessions/mind/hidden").body
    hidden = load(file)["hidden"]
    assert hidden.shape == (1, 5, HIDDEN)
    kind = {"content_type": "application/octet-stream"}
    for wrong in (b"", b"junk", save({"hidden": hidden[:, 1:].clone()}), save({"other": hidden})):
        refused = server.request("PUT", "/v1/sessions/mind/hidden", wrong, **kind)
        assert refused.status == 400, refused.body
    fork = server.post("/v1/sessions/mind/fork", {"id": "other mind"[:5]}).json["id"]
    changed = save({"hidden": torch.flip(hidden, [2]).contiguous()})
    assert server.request("PUT", f"/v1/sessions/{fork}/hidden", changed, **kind).status == 200
    assert server.request("PUT", "/v1/sessions/mind/hidden", file, **kind).status == 200
    other, same = (server.post(f"/v1/sessions/{name}/resume").text for name in (fork, "mind"))
    assert same == expected != other


def test_steering_changes_what_is_said_until_it_ends(server: Server) -> None:
    expected = server.complete("steer", 10).text
    server.post("/v1/sessions", {"id": "led"})
    assert server.post("/v1/sessions/led/steer", {"layer": 1, "strength": 2}).status == 400
    assert server.post("/v1/sessions/led/steer", {"layer": 9, "vector": [0.0] * HIDDEN}).status == 400
    assert server.post("/v1/sessions/led/steer", {"layer": 1, "vector": [0.0]}).status == 400
    led = server.post("/v1/sessions/led/steer", {"layer": 1, "toward": "yes", "away": "no", "strength": 9})
    assert led.json["steering"] == [{"name": "steer", "layer": 1, "strength": 9.0}]
    fork = server.post("/v1/sessions/led/fork").json["id"]
    assert server.complete("steer", 10, session_id="led").text != expected
    server.post(f"/v1/sessions/{fork}/steer", {"layer": 1, "strength": 0})
    assert server.complete("steer", 10, session_id=fork).text == expected


def test_io_wait_sends_a_session_away_and_it_comes_back_the_same(server_processes: Servers) -> None:
    server = server_processes.start({"slabs": 1})
    plain = [server.complete("io", 6, session_id=server.post("/v1/sessions", {"id": "io-a"}).json["id"]).text]
    plain.append(server.complete("go", 6, session_id="io-a").text)
    server.post("/v1/sessions", {"id": "io-b"})
    waited = [server.complete("io", 6, session_id="io-b").text]
    assert server.session("io-b")["resident"]
    away = server.post("/v1/sessions/io-b/io_wait", {"eta_ms": 3_600_000}).json
    assert (away["state"], away["resident"]) == ("waiting", False)
    waited.append(server.complete("go", 6, session_id="io-b").text)
    assert waited == plain
    server.end()


def test_a_tool_call_is_a_call_and_the_session_waits(server_processes: Servers) -> None:
    call = 'Let me see. <tool_call>{"name": "look", "arguments": {"at": "x"}}</tool_call>'
    server = server_processes.start(script=[call, call, "Nice.", "plain"])
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    server.post("/v1/sessions", {"id": "agent"})
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    messages: Any = [{"role": "user", "content": "q"}]
    asked: Any = {"model": "tiny", "messages": messages, "tools": tools, "max_tokens": 100}
    whole = client.chat.completions.create(**asked).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", "Let me see. ")
    extra = {"session_id": "agent", "tool_eta_ms": 3_600_000}
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_body=extra))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(one.function.name, one.function.arguments) for one in calls if one.function] == [
        ("look", '{"at":"x"}')
    ]
    assert server.session("agent")["state"] == "waiting"
    answer = {"role": "tool", "tool_call_id": calls[0].id, "content": "seen"}
    body = {"messages": [answer], "session_id": "agent", "max_tokens": 8}
    assert server.post("/v1/chat/completions", body).text == "Nice."
    assert server.session("agent")["state"] == "idle"
    server.end()


def test_a_prompt_that_was_not_run_leaves_nothing_behind() -> None:
    executor = tiny_executor()

    def do(op: str, **rest: Any) -> Any:
        return json.loads(executor.command(json.dumps({"op": op, "key": 1, **rest})))["ok"]

    def say(prompt: Any, steps: int) -> list[str]:
        options = {"temperature": 1, "top_p": 1, "seed": 5, "logprobs": None, "open_ended": False}
        do("begin", prompt=prompt, max_tokens=max(steps, 1), **options)
        texts = [json.loads(executor.step([(1, None)]))["ok"][0]["token"]["text"] for _ in range(steps)]
        do("finish")
        return texts

    def chat(text: str) -> Any:
        return {"chat": {"messages": [{"role": "user", "content": text}], "tools": None}}

    do("open", exact=False)
    say(chat("a"), 3)
    seat = executor.seats[1]
    before = executor._to_record(seat)
    assert len(seat.pending) == 1
    say(chat("b"), 0)
    assert executor._to_record(seat) == before
    say(chat("c"), 2)
    assert [one["content"] for one in seat.transcript.messages[::2]] == ["a", "c"]


# ---- the live view -----------------------------------------------------------------------------------


def test_events_metrics_and_the_description(server: Server) -> None:
    connection = server.connect()
    connection.request("GET", "/v1/events")
    event = connection.getresponse().readline()
    seen = json.loads(event.removeprefix(b"data: "))
    assert seen["model"]["id"] == "tiny" and seen["pool"]["slabs"] == 2
    connection.close()
    text = server.get("/metrics").body.decode()
    assert 'overspill_requests_total{route="/v1/completions",status="200"}' in text
    assert {line.split()[0].split("{")[0] for line in text.splitlines() if line[0] != "#"} > {
        "overspill_tokens_total", "overspill_step_seconds_count", "overspill_pool_slabs_free", "overspill_sessions",
    }  # fmt: skip
    assert server.get("/healthz").json == {"status": "ok"}
