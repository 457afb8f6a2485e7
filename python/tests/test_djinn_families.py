"""Every family, paused after every layer of several steps, evicted, resumed: not a bit differs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from djinn_models import CONFIGS, model, prompt
from transformers import DynamicCache

from overspill.djinn import Break, Generated, Output, Paused, SessionPool
from overspill.errors import UnsupportedModelError

STEPS = 3


def pool_for(name: str, attention: str, slabs: int = 1, **options: Any) -> SessionPool:
    """Room for ``slabs`` sessions of 32 tokens on the device."""
    made = model(name, attention)
    one = SessionPool(made, arena_budget="64MiB", host_budget="64MiB", session_tokens=32)
    return SessionPool(
        made, arena_budget=slabs * one._slab_bytes, host_budget="64MiB", session_tokens=32, **options
    )


def reference(name: str, attention: str, ids: list[int]) -> list[torch.Tensor]:
    """Logits of each step of a greedy decode with transformers' own cache."""
    made, cache = model(name, attention), DynamicCache(config=model(name, attention).config)
    logits, feed = [], torch.tensor([ids])
    with torch.no_grad():
        for _ in range(STEPS + 1):
            logits.append(made(input_ids=feed, past_key_values=cache, use_cache=True).logits)
            feed = logits[-1][:, -1:].argmax(-1)
    return logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_of_every_step(name: str, attention: str) -> None:
    ids = prompt(9)
    expected = reference(name, attention, ids)
    layers = len(model(name, attention).get_submodule("transformer.h" if name == "gpt2" else "model.layers"))
    pool = pool_for(name, attention)
    base, other = pool.session("base"), pool.session("other")
    feed = ids
    for step in range(STEPS + 1):
        for layer in range(layers):
            session = base.fork("paused")
            outcome = session.run(feed, breaks=[Break(layer)])
            assert isinstance(outcome, Paused) and outcome.layer == layer
            session.evict()
            other.run([5] * (1 + layer % 2))  # takes the only slab and writes over it
            outcome = outcome.resume()
            assert isinstance(outcome, Output)
            assert torch.equal(outcome.logits, expected[step]), f"step {step}, paused after layer {layer}"
            session.close()
            other.close()
            other = pool.session("other")
        outcome = base.run(feed)
        assert isinstance(outcome, Output) and torch.equal(outcome.logits, expected[step]), (
            f"step {step}, never paused"
        )
        feed = [int(outcome.logits[0, -1].argmax())]
    report = pool.report()["pool"]
    assert report["restores"] > report["evictions"] > layers * (STEPS + 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_generate_with_a_session_as_its_cache(name: str) -> None:
    made, ids = model(name, "sdpa"), torch.tensor([prompt(7)])
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = made.generate(ids, **options)
    pool = pool_for(name, "sdpa")
    first, second = pool.session("first"), pool.session("second")
    assert torch.equal(made.generate(ids, past_key_values=first.cache, **options), expected)
    first.evict()
    assert torch.equal(made.generate(ids, past_key_values=second.cache, **options), expected)
    # The first one goes on after the second has had its slab.
    more = torch.cat([expected, torch.tensor([[5, 6]])], dim=1)
    assert torch.equal(
        made.generate(more, past_key_values=first.cache, **options), made.generate(more, **options)
    )


def test_what_is_not_proved_is_refused() -> None:
    import transformers

    config = transformers.OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16)  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="opt"):
        SessionPool(transformers.AutoModelForCausalLM.from_config(config).eval(), arena_budget="1MiB")
    training = model("llama", "eager")
    try:
        training.train()
        with pytest.raises(UnsupportedModelError, match=r"eval\(\)"):
            SessionPool(training, arena_budget="1MiB")
    finally:
        training.eval()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_on_a_gpu(name: str, attention: str, fixed: bool) -> None:
    """On a GPU the reference is the session itself, never paused; eager, transformers' own cache as well."""
    made = copy.deepcopy(model(name, attention)).cuda()
    cache = DynamicCache(config=made.config)
    pool = SessionPool(made, arena_budget="1MiB", host_budget="64MiB", session_tokens=32, fixed_decode=fixed)
    base, feed = pool.session("base"), prompt(9)
    for step in range(STEPS + 1):
        never = base.fork("never")
        expected = never.run(feed)
        assert isinstance(expected, Output)
        never.close()
        for layer in range(len(pool.shape.layers)):
            session = base.fork("paused")
            outcome = session.run(feed, breaks=[Break(layer)])
            assert isinstance(outcome, Paused)
            session.evict()
            outcome = outcome.resume()
            assert isinstance(outcome, Output)
            assert torch.equal(outcome.logits, expected.logits), f"step {step}, paused after layer {layer}"
            session.close()
        with torch.no_grad():
            ids = torch.tensor([feed], device="cuda")
            plain = made(input_ids=ids, past_key_values=cache, use_cache=True).logits
        if attention == "eager" and not fixed:
            assert torch.equal(plain, expected.logits), f"step {step} against DynamicCache"
        base.run(feed)
        feed = [int(expected.logits[0, -1].argmax())]
    tokens = [
        pool.session(f"generate {i}").generate(prompt(9), 8, breaks=[Break(1, 3)] * i) for i in range(2)
    ]
    assert isinstance(tokens[1], Paused)
    pool.session("generate 1").evict()
    again = tokens[1].resume()
    assert isinstance(tokens[0], Generated) and isinstance(again, Generated)
    assert again.tokens == tokens[0].tokens and torch.equal(again.logits, tokens[0].logits)
