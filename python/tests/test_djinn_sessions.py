"""Pausing, changing, steering, forking, saving: what a session's owner can do, bit by bit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from djinn_models import model, prompt

from overspill._edge import CpuEdge
from overspill.djinn import Break, Generated, Output, Paused, Session, SessionCache, SessionPool
from overspill.errors import BudgetError, FormatError, SessionError

LAYERS = 4


def pool(slabs: int = 2, name: str = "llama", **options: Any) -> SessionPool:
    made = model(name, "sdpa")
    slab = 2 * LAYERS * 32 * 64  # 2 heads of 8 fp32 numbers, 32 tokens
    return SessionPool(
        made, **({"arena_budget": slabs * slab, "host_budget": "64MiB", "session_tokens": 32} | options)
    )


def logits(outcome: Any) -> torch.Tensor:
    assert isinstance(outcome, Output | Generated), outcome
    return outcome.logits


def through(session: Session, outcome: Any, evict: bool = True) -> Any:
    """Resumes until the end, from off the device each time."""
    while isinstance(outcome, Paused):
        if evict:
            session.evict()
        outcome = outcome.resume()
    return outcome


def test_several_breaks_in_one_forward_in_prefill_and_in_decode() -> None:
    sessions, ids = pool(), prompt(9)
    never = sessions.session("never").generate(ids, 6)
    session = sessions.session("paused")
    outcome = session.generate(ids, 6, [Break(layer, step) for step in (0, 2, 3) for layer in (0, 1, 3)])
    seen = []
    while isinstance(outcome, Paused):
        seen.append((outcome.step, outcome.layer))
        assert outcome.hidden.shape == (1, 9 if outcome.step == 0 else 1, 32)
        session.evict()
        outcome = outcome.resume()
    assert seen == [(step, layer) for step in (0, 2, 3) for layer in (0, 1, 3)]
    assert outcome.tokens == never.tokens and torch.equal(logits(outcome), logits(never))


def test_a_changed_hidden_state_is_a_forward_hooks() -> None:
    ids, layer = prompt(9), 2
    change = torch.randn(32, generator=torch.Generator().manual_seed(3))
    made = model("llama", "sdpa")
    handle = made.model.layers[layer].register_forward_hook(lambda module, inputs, output: output + change)
    try:
        expected = made(torch.tensor([ids])).logits
    finally:
        handle.remove()
    for how in ("set", "in place", "vector", "callable", "callable in place"):
        session = pool().session(how)
        if how == "vector":
            session.steer(layer, change)
        elif how == "callable":
            session.steer(layer, lambda hidden: hidden + change)
        elif how == "callable in place":
            session.steer(layer, lambda hidden: hidden.add_(change))
        outcome = session.run(ids, breaks=[Break(layer)] if how in ("set", "in place") else [])
        if isinstance(outcome, Paused):
            session.evict()
            if how == "set":
                outcome.hidden = outcome.hidden + change
            else:
                outcome.hidden.add_(change)
            outcome = outcome.resume()
        assert torch.equal(logits(outcome), expected), how
        assert session.steering.hash, how


def test_the_hash_tells_interventions_apart() -> None:
    sessions, ids = pool(), prompt(5)
    hashes = set()
    for name in ("none", "a", "b", "set"):
        session = sessions.session(name)
        if name in ("a", "b"):
            session.steer(1, torch.full((32,), 1.0 if name == "a" else 2.0))
        outcome = session.run(ids, [Break(1)])
        assert isinstance(outcome, Paused)
        if name == "set":
            outcome.hidden.mul_(2)
        outcome.resume()
        hashes.add(session.steering.hash)
    assert len(hashes) == 4


def test_steering_ends() -> None:
    sessions, ids = pool(3), prompt(5)
    plain, steered = sessions.session("plain"), sessions.session("steered")
    steered.steer(1, torch.full((32,), 0.5), name="up")
    assert not torch.equal(logits(plain.run(ids)), logits(steered.run(ids)))
    with pytest.raises(SessionError, match="down"):
        steered.unsteer("down")
    steered.unsteer("up")
    assert not steered.steering.interventions


def test_forks_go_their_own_ways() -> None:
    sessions, ids = pool(), prompt(6)
    parent = sessions.session("parent")
    outcome = parent.run(ids, [Break(1)])
    assert isinstance(outcome, Paused)
    children = [parent.fork(f"child {i}") for i in range(3)]
    for i, child in enumerate(children):
        assert child.paused is not None
        child.paused.hidden.add_(i)
    mine = logits(outcome.resume())
    found = [logits(child.resume()) for child in children]
    assert torch.equal(mine, found[0])
    assert not torch.equal(found[1], found[2])
    alone = pool().session("alone")
    paused = alone.run(ids, [Break(1)])
    assert isinstance(paused, Paused)
    paused.hidden.add_(2)
    assert torch.equal(logits(paused.resume()), found[2])
    # What one writes after the fork, the others do not see.
    ways = [session.generate([5 + i], 4).tokens for i, session in enumerate([parent, *children])]  # type: ignore[union-attr]
    again = pool().session("again")
    again.run(ids)
    assert again.generate([5], 4).tokens == ways[0]  # type: ignore[union-attr]


def test_sampling_goes_on_where_it_was() -> None:
    sessions, ids = pool(), prompt(6)
    never = sessions.session("never").generate(ids, 12, temperature=1.5, seed=4)
    session = sessions.session("paused")
    found = through(
        session, session.generate(ids, 12, [Break(2, step) for step in (3, 8)], temperature=1.5, seed=4)
    )
    assert found.tokens == never.tokens
    assert found.tokens != sessions.session("other seed").generate(ids, 12, temperature=1.5, seed=5).tokens  # type: ignore[union-attr]


SECOND_PROCESS = """
import sys
import torch
from djinn_models import prompt
from test_djinn_sessions import pool
torch.set_num_threads(1)
folder = sys.argv[1]
session = pool().load(folder + "/session", "loaded", steering={"shift": lambda hidden: hidden + 0.25})
found = session.resume()
torch.save((found.tokens, found.logits, session.steering.hash), folder + "/result")
sessions = pool(4, host_budget="8MiB", spill_dir=folder, spill_limit="8MiB")
first = sessions.session("first")
first.run(prompt(9))
first.save(folder + "/first")
print("saved", flush=True)
while True:
    for name in "abcd":
        session = sessions.session(name)
        session.run([5])
        session.spill()
        session.save(folder + "/" + name)
        if session.tokens == 32:
            session.close()
"""


def test_another_process_resumes_what_was_saved_and_is_killed_while_it_spills(tmp_path: Path) -> None:
    sessions, ids = pool(), prompt(6)
    session = sessions.session("saved")
    session.steer(1, torch.full((32,), 0.5), name="vector")
    session.steer(2, lambda hidden: hidden + 0.25, name="shift")
    outcome = session.generate(ids, 8, [Break(2, 4)], temperature=0.7, seed=2)
    assert isinstance(outcome, Paused)
    outcome.hidden.mul_(1.5)
    session.save(tmp_path / "session")
    found = outcome.resume()
    assert isinstance(found, Generated)

    command = [sys.executable, "-c", SECOND_PROCESS, str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"saved\n"
    tokens, last, steering = torch.load(tmp_path / "result")
    assert tokens == found.tokens and torch.equal(last, found.logits) and steering == session.steering.hash
    time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    # What was saved is whole; what was being saved is whole or absent; the spill file has no name.
    expected = sessions.session("expected")
    expected.run(prompt(9))
    assert torch.equal(logits(sessions.load(tmp_path / "first", "first").run([7])), logits(expected.run([7])))
    for name in "abcd":
        if (tmp_path / name).exists():
            sessions.load(tmp_path / name, name).close()
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".overspill")]

    before = [one.id for one in sessions.sessions()]
    with pytest.raises(SessionError, match="shift"):
        sessions.load(tmp_path / "session", "without the callable")
    with pytest.raises(FormatError, match="another model"):
        pool(name="llama_other").load(tmp_path / "session", "other model")
    assert [one.id for one in sessions.sessions()] == before


# ---- faults: typed, and every other session unharmed -----------------------------------------------


@pytest.fixture
def unharmed() -> Any:
    """A pool, and after the test a session of it that must go on as if nothing had been."""
    sessions, ids = pool(2), prompt(8)
    witness = sessions.session("witness")
    witness.run(ids)
    yield sessions
    twin = pool().session("twin")
    twin.run(ids)
    assert torch.equal(logits(witness.run([9])), logits(twin.run([9])))


def test_calls_out_of_order(unharmed: SessionPool) -> None:
    session = unharmed.session("s")
    outcome = session.run(prompt(4), [Break(1)])
    assert isinstance(outcome, Paused)
    with pytest.raises(SessionError, match="resume it first") as refused:
        session.run([5])
    assert refused.value.session == "s" and refused.value.layer == 1
    outcome.resume()
    for second in (outcome.resume, session.resume, lambda: outcome.hidden):
        with pytest.raises(SessionError, match=r"paused|stand"):
            second()
    with pytest.raises(SessionError, match="not a layer"):
        session.run([5], [Break(LAYERS)])
    with pytest.raises(SessionError, match="no tokens"):
        session.run([])
    session.close()
    session.close()
    for call in (lambda: session.run([5]), session.resume, session.evict, lambda: session.fork("f")):
        with pytest.raises(SessionError, match="closed"):
            call()
    with pytest.raises(SessionError, match="already"):
        unharmed.session("witness").fork("witness")


def test_a_hidden_state_that_does_not_fit(unharmed: SessionPool) -> None:
    session, ids = unharmed.session("s"), prompt(4)
    expected = logits(unharmed.session("expected").run(ids))
    outcome = session.run(ids, [Break(2)])
    assert isinstance(outcome, Paused)
    for wrong in (
        torch.zeros(1, 5, 32),
        torch.zeros(1, 4, 32).double(),
        [0.0],
        torch.full((1, 4, 32), float("nan")),
    ):
        with pytest.raises(SessionError) as refused:
            outcome.hidden = wrong  # type: ignore[assignment]
        assert refused.value.layer == 2
    kept = outcome.hidden.clone()
    outcome.hidden[0, 1, 3] = float("nan")
    with pytest.raises(SessionError, match="NaN"):
        outcome.resume()
    outcome.hidden = kept
    assert torch.equal(logits(outcome.resume()), expected)


@pytest.mark.parametrize("fault", ["nan", "raises", "shape", "dtype", "type"])
def test_a_steering_function_that_fails(unharmed: SessionPool, fault: str) -> None:
    """In the first layers of a forward and after a pause: the session is where it was."""
    functions: dict[str, Any] = {
        "nan": lambda hidden: hidden * float("nan"),
        "raises": lambda hidden: 1 / 0,
        "shape": lambda hidden: hidden[:, :1],
        "dtype": lambda hidden: hidden.double(),
        "type": lambda hidden: 3,
    }
    error = ZeroDivisionError if fault == "raises" else SessionError
    session, expected = unharmed.session("s"), unharmed.session("expected")
    for one in (session, expected):
        one.run(prompt(6))
    session.steer(2, functions[fault])
    with pytest.raises(error):
        session.run([5, 6, 7])
    assert session.tokens == 6 and session.paused is None
    session.unsteer()
    outcome = session.run([5, 6, 7], [Break(0)])
    assert isinstance(outcome, Paused)
    session.steer(2, functions[fault])
    session.evict()
    for _ in range(2):
        with pytest.raises(error):
            session.resume()
    session.unsteer()
    session.evict()
    assert torch.equal(logits(session.resume()), logits(expected.run([5, 6, 7])))


def test_longer_than_a_slab(unharmed: SessionPool) -> None:
    session = unharmed.session("s")
    with pytest.raises(SessionError) as refused:
        session.run(prompt(33))
    assert (refused.value.tokens, refused.value.limit_tokens) == (33, 32)
    made, options = unharmed.model, {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with pytest.raises(SessionError, match="33 tokens"):
        made.generate(torch.tensor([prompt(30)]), past_key_values=session.cache, max_new_tokens=9, **options)
    assert session.tokens == 32
    with pytest.raises(BudgetError):
        pool(arena_budget=1000)


def test_a_full_host_pool_and_a_full_disk(tmp_path: Path) -> None:
    def filled(**options: Any) -> tuple[SessionPool, list[Session], BudgetError | None]:
        sessions, made = pool(1, **options), []
        for i in range(12):
            try:
                session = sessions.session(str(i))
                session.run([i + 5, i + 6, i + 7])
                made.append(session)
            except BudgetError as error:
                session.close()
                return sessions, made, error
        return sessions, made, None

    # Every session has 8 runs, of a page each.
    host: dict[str, Any] = {"host_budget": 3 * 8 * 4096}
    for options in (host, host | {"spill_dir": tmp_path, "spill_limit": 2 * 8 * 4096}):
        _, made, error = filled(**options)
        assert (
            error is not None and error.tier in ("host", "disk") and error.requested_bytes and len(made) >= 3
        )
        # The one on the device first: with every tier full there is no room to change places.
        for i, session in reversed(list(enumerate(made))):
            twin = pool().session("twin")
            twin.run([i + 5, i + 6, i + 7])
            assert torch.equal(logits(session.run([5])), logits(twin.run([5]))), f"session {i} of {len(made)}"
            session.close()
    assert filled(**host, spill_dir=tmp_path, spill_limit="1MiB")[2] is None


def test_host_copies_of_resident_sessions_give_way() -> None:
    sessions = pool(2, host_budget=2 * 8 * 4096)
    first, second, third = (sessions.session(name) for name in "abc")
    first.run([5, 6])
    second.run([6, 6])
    first.evict()
    first.restore()
    second.evict()
    third.run([7, 6])
    third.evict()
    assert first.place == {"resident": True, "host_bytes": 0, "disk_bytes": 0}
    for i, session in enumerate((first, second, third)):
        twin = pool().session("twin")
        twin.run([5 + i, 6])
        assert torch.equal(logits(session.run([7])), logits(twin.run([7])))
    assert sessions.report()["pool"]["host_copies_dropped"] > 0


def test_an_evicted_clean_session_is_not_copied_again() -> None:
    sessions = pool(1)
    session = sessions.session("s")
    session.run(prompt(9))
    for _ in range(3):
        before = sessions.report()["pool"]["offloaded_bytes"]
        session.evict()
        assert sessions.report()["pool"]["offloaded_bytes"] == before
        session.restore()
    session.run([5])
    session.evict()
    assert sessions.report()["pool"]["offloaded_bytes"] - before == 2 * LAYERS * 64, "one token"


def test_io_wait_leaves_and_comes_back() -> None:
    sessions = pool(1)
    session = sessions.session("s")
    session.run(prompt(9))
    session.io_wait(eta_ms=3600e3)
    assert not session.place["resident"] and sessions.tick() == 0
    assert sessions.tick(lead_ms=3601e3) == 1
    assert session.place["resident"]


def test_io_wait_stays_while_there_is_room_and_gives_way_by_what_it_said() -> None:
    sessions = pool(3)
    soon, late, other = (sessions.session(name) for name in ("soon", "late", "other"))
    for session in (late, soon):
        session.run(prompt(9))
    late.io_wait(eta_ms=7200e3)
    soon.io_wait(eta_ms=3600e3)
    assert late.place["resident"] and soon.place["resident"]
    other.run(prompt(9))
    sessions.session("another").run(prompt(9))
    assert soon.place["resident"] and not late.place["resident"]


def test_budgets_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuEdge, "allocated_bytes", lambda edge: 2**30)
    options: dict[str, Any] = {"workspace": "64MiB", "host_budget": "1MiB", "session_tokens": 32}
    with pytest.raises(BudgetError, match="leaves nothing"):
        SessionPool(model("llama", "sdpa"), vram_budget="1.0625GiB", **options)
    report = SessionPool(model("llama", "sdpa"), vram_budget="1.09375GiB", **options).report()
    assert report["arena_bytes"] == report["slabs"] * report["slab_bytes"] == 2**25


def schedule(seed: int) -> bool:
    """Turns of several sessions in a random order, on a device whose copies are late; whether all is right."""
    rng = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=rng))

    fixed = seed % 2 == 0
    sessions = pool(1 + draw(2), seed=seed, write_through=draw(3) > 0, fixed_decode=fixed)
    expected = [pool(1, fixed_decode=fixed).session("never").generate(prompt(5, i), 6) for i in range(3)]
    found: list[Any] = []
    for i in range(3):
        breaks = [Break(draw(LAYERS), draw(6)) for _ in range(4)]
        found.append(sessions.session(str(i)).generate(prompt(5, i), 6, breaks))
    while any(isinstance(one, Paused) for one in found):
        i = draw(3)
        session = sessions.session(str(i))
        if draw(2):
            session.evict()
        if isinstance(found[i], Paused):
            found[i] = session.resume()
    pairs = zip(found, expected, strict=True)
    return all(one.tokens == other.tokens and torch.equal(one.logits, logits(other)) for one, other in pairs)  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(16))
def test_schedules_of_a_simulated_device(seed: int) -> None:
    assert schedule(seed), f"seed {seed}"


def test_a_layer_that_is_not_waited_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SessionCache, "pending", property(lambda cache: False, lambda cache, value: None), raising=False
    )
    wrong = 0
    for seed in range(5):
        try:
            wrong += not schedule(seed)
        except SessionError:  # NaN where nothing had arrived
            wrong += 1
    assert wrong > 0, "none of 5 schedules noticed"
