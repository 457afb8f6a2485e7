"""Sessions of SmolLM2 over a budget for two: paused in the middle of the stack, steered, compared bit by bit.

``python -m overspill.demo.sessions`` runs it on its own. Each of several sessions generates from a prompt
of its own and stops at the middle layer of its first forward and of two decode steps; at each stop the next
session takes its turn, so that every session leaves the device while it stands within a forward. One more
is steered there. The reference is the same session in a pool of its own that is never paused, and
transformers' own ``generate`` with its own cache. ``--every-layer`` proves the model instead: after every
layer of a prefill and of decode steps a session is paused, evicted, overwritten by another and resumed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from overspill._units import format_bytes
from overspill.djinn import Break, Generated, Output, Paused, SessionPool

from .data import TOKENS, prepare

SESSIONS = 5
RESIDENT = 2
PROMPT_TOKENS = 48
NEW_TOKENS = 12
STOP_STEPS = (0, 4, 8)


def run(model_dir: Path, tokens: torch.Tensor, device: str) -> dict[str, Any]:
    """Runs the demo; what was compared and what moved. ``tokens`` are cut into prompts."""
    torch.use_deterministic_algorithms(True)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.to(device).eval()
    layers = model.config.num_hidden_layers
    prompts = [tokens[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS].tolist() for i in range(SESSIONS)]
    pool = _pool(model, RESIDENT)
    begin = time.perf_counter()
    breaks = [Break(layers // 2, step) for step in STOP_STEPS]
    names = [f"session {i + 1}" for i in range(SESSIONS)]
    found: list[Any] = [
        pool.session(name).generate(ids, NEW_TOKENS, breaks) for name, ids in zip(names, prompts, strict=True)
    ]
    pauses = 0
    while any(isinstance(one, Paused) for one in found):
        for i, one in enumerate(found):
            if isinstance(one, Paused):
                pauses += 1
                found[i] = one.resume()
                print(f"  {names[i]} went on after layer {one.layer} of step {one.step}", flush=True)
    elapsed_s = time.perf_counter() - begin
    never = [_never(model, ids) for ids in prompts]
    steered = _steered(model, pool, prompts[0], layers // 2)
    plain = [_transformers(model, ids) for ids in prompts]
    report = pool.report()
    logits = all(torch.equal(one.logits, other.logits) for one, other in zip(found, never, strict=True))
    same = all(one.tokens == other for one, other in zip(found, plain, strict=True))
    return {
        "djinn.sessions": SESSIONS,
        "djinn.arena_bytes": report["arena_bytes"],
        "djinn.slabs": report["slabs"],
        "djinn.pauses": pauses,
        "djinn.evictions": report["pool"]["evictions"],
        "djinn.offloaded_bytes": report["pool"]["offloaded_bytes"],
        "djinn.onboarded_bytes": report["pool"]["onboarded_bytes"],
        "djinn.s": elapsed_s,
        "djinn.logits_identical": logits,
        "djinn.tokens_identical_to_transformers": same,
        "djinn.steered_identical_to_hook": steered["identical"],
        "djinn.steer_changed_tokens": steered["changed"],
        "djinn.ok": logits and same and steered["identical"] and report["pool"]["evictions"] >= pauses,
        "device": device,
    }


def print_table(report: dict[str, Any]) -> None:
    """The report for people."""
    yes = lambda key: "identical" if report[f"djinn.{key}"] else "DIFFERENT"  # noqa: E731
    size = lambda key: format_bytes(report[f"djinn.{key}"])  # noqa: E731
    count, slabs = report["djinn.sessions"], report["djinn.slabs"]
    rows = [
        ("sessions / room on the device for", f"{count} / {slabs} ({size('arena_bytes')})"),
        ("pauses in the middle of the stack", str(report["djinn.pauses"])),
        ("evictions", str(report["djinn.evictions"])),
        ("copied out / back", f"{size('offloaded_bytes')} / {size('onboarded_bytes')}"),
        ("logits, paused against never paused", yes("logits_identical")),
        ("tokens, against transformers' generate", yes("tokens_identical_to_transformers")),
        ("steered tokens, against a forward hook", yes("steered_identical_to_hook")),
    ]
    print()
    for name, value in rows:
        print(f"{name:<40}{value:>24}")


def _pool(model: PreTrainedModel, resident: int) -> SessionPool:
    """Room on the device for ``resident`` sessions."""
    options: dict[str, Any] = {"session_tokens": PROMPT_TOKENS + NEW_TOKENS, "host_budget": "256MiB"}
    slab_bytes = SessionPool(model, arena_budget="64MiB", **options).report()["slab_bytes"]
    return SessionPool(model, arena_budget=resident * slab_bytes, **options)


def _never(model: PreTrainedModel, ids: list[int]) -> Generated:
    outcome = _pool(model, 1).session("never paused").generate(ids, NEW_TOKENS)
    assert isinstance(outcome, Generated)
    return outcome


def _transformers(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids], device=model.device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, **options
    )
    return generated[0, len(ids) :].tolist()


def _steered(model: PreTrainedModel, pool: SessionPool, ids: list[int], layer: int) -> dict[str, bool]:
    """A session steered at a layer and evicted there, against transformers with a forward hook."""
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(
        model.device
    )
    session = pool.session("steered")
    session.steer(layer, direction)
    outcome: Any = session.generate(ids, NEW_TOKENS, [Break(layer, 0), Break(layer, 5)])
    while isinstance(outcome, Paused):
        session.evict()
        outcome = session.resume()
    assert isinstance(outcome, Generated)
    hook = pool.shape.layers[layer].register_forward_hook(lambda module, inputs, output: output + direction)
    try:
        expected = _transformers(model, ids)
    finally:
        hook.remove()
    return {"identical": outcome.tokens == expected, "changed": expected != _transformers(model, ids)}


def every_layer(model_dir: Path, ids: list[int], device: str, steps: int) -> tuple[int, int]:
    """How many pauses give the logits of transformers with its own cache, bit for bit, and of how many."""
    torch.use_deterministic_algorithms(True)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.to(device).eval()
    pool, cache = _pool(model, 1), DynamicCache(config=model.config)
    base, other = pool.session("base"), pool.session("other")
    feed, same, tried = ids, 0, 0
    for _ in range(1 + steps):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([feed], device=device), past_key_values=cache).logits
        for layer in range(model.config.num_hidden_layers):
            session = base.fork("paused")
            outcome: Any = session.run(feed, [Break(layer)])
            session.evict()
            other.run([layer])  # takes the only slab
            outcome = outcome.resume()
            assert isinstance(outcome, Output)
            same += torch.equal(outcome.logits, expected)
            tried += 1
            session.close()
        base.run(feed)
        feed = [int(expected[0, -1].argmax())]
        other.close()
        other = pool.session("other")
    return same, tried


def main() -> int:
    """Runs this part of the demo alone; 0 when everything was identical."""
    parser = argparse.ArgumentParser(prog="python -m overspill.demo.sessions", description=__doc__)
    parser.add_argument("--out", default="target/demo", help="folder for the report and the model")
    parser.add_argument("--every-layer", action="store_true", help="prove every layer of the model instead")
    options = parser.parse_args()
    out = Path(options.out)
    prepare(out / "smollm2-135m")
    tokens = torch.load(out / "smollm2-135m" / f"tokens-{TOKENS}.pt")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if options.every_layer:
        same, tried = every_layer(out / "smollm2-135m", tokens[:PROMPT_TOKENS].tolist(), device, steps=3)
        print(f"{same} of {tried} pauses gave the logits of transformers with its own cache")
        return 0 if same == tried else 1
    report = run(out / "smollm2-135m", tokens, device)
    (out / "sessions.json").write_text(json.dumps(report, indent=2) + "\n")
    print_table(report)
    return 0 if report["djinn.ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
