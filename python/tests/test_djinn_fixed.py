"""Decode at fixed length: the same tokens, and the same bits paused or not."""

from __future__ import annotations

import copy

import pytest
import torch
from djinn_models import CONFIGS, model, prompt

from overspill.djinn import Break, Generated, Paused, SessionPool
from overspill.djinn import fixed as fixed_module


def pool(name: str, **options: object) -> SessionPool:
    made = model(name, "sdpa")
    return SessionPool(made, arena_budget="2MiB", host_budget="64MiB", session_tokens=48, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_paused_after_every_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_module, "BUCKET_TOKENS", 16)  # a bucket ends in the middle
    sessions, ids = pool(name, fixed_decode=True), prompt(12)
    sessions._arena.fill_(0xFF)  # NaN wherever nothing was written
    never = sessions.session("never").generate(ids, 9)
    assert isinstance(never, Generated)
    plain = pool(name).session("plain").generate(ids, 9)
    assert isinstance(plain, Generated) and plain.tokens == never.tokens
    for layer in range(4):
        session = sessions.session(f"paused {layer}")
        outcome = session.generate(ids, 9, breaks=[Break(layer, step) for step in (2, 3, 5)])
        stops = []
        while isinstance(outcome, Paused):
            stops.append(outcome.step)
            session.evict()
            sessions.session("other").run([7] * 3) if sessions.session("other").tokens < 40 else None
            outcome = outcome.resume()
        assert isinstance(outcome, Generated) and stops == [2, 3, 5]
        assert outcome.tokens == never.tokens and torch.equal(outcome.logits, never.logits), layer
        session.close()


def test_an_end_token_ends_a_burst() -> None:
    sessions, ids = pool("llama", fixed_decode=True), prompt(12)
    never = sessions.session("never").generate(ids, 9)
    assert isinstance(never, Generated)
    end = never.tokens[4]
    session = sessions.session("ends")
    found = session.generate(ids, 9, eos_token_id=end)
    assert isinstance(found, Generated) and found.tokens == never.tokens[: never.tokens.index(end) + 1]
    assert session.tokens == len(ids) + len(found.tokens) - 1
    # The next turn goes on from the token that was chosen last.
    rest = session.generate([], 3)
    assert isinstance(rest, Generated)
    assert rest.tokens == never.tokens[len(found.tokens) :][:3]


def test_forwards_that_see_earlier_tokens_do_without_cudnns_attention() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    made, seen = model("llama", "sdpa"), []
    hook = made.register_forward_pre_hook(lambda module, inputs: seen.append(enabled()))
    try:
        session = pool("llama", fixed_decode=True).session("s")
        session.run(prompt(5))
        paused = session.run([5, 6], [Break(1)])  # stops by an exception
        assert enabled()
        assert isinstance(paused, Paused)
        paused.resume()
        session.generate([7], 2)
    finally:
        hook.remove()
    assert enabled()
    assert seen == [True, False, False, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_are_captured_again_after_all_of_them_are_gone() -> None:
    sessions = SessionPool(
        copy.deepcopy(model("llama", "sdpa")).cuda(), arena_budget="2MiB", host_budget="64MiB",
        session_tokens=48, fixed_decode=True,
    )  # fmt: skip
    found = []
    for name in "ab":
        found.append(sessions.session(name).generate(prompt(12), 9))
        assert sessions._fixed is not None and sessions._fixed._graphs
        sessions._fixed._graphs.clear()
        sessions.session(name).close()
    assert isinstance(found[0], Generated) and isinstance(found[1], Generated)
    assert found[0].tokens == found[1].tokens and torch.equal(found[0].logits, found[1].logits)
