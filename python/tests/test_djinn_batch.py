"""Sessions that decode together: the tokens of each alone, and the same bits whoever swaps in between."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from djinn_models import CONFIGS, model, prompt

from overspill.djinn import Break, Generated, Ongoing, Paused, Session, SessionPool
from overspill.errors import BudgetError, SessionError

LENGTHS = (12, 5, 17, 9)
NEW = 8


def pool(name: str = "llama", slabs: int = 6, attention: str = "sdpa", **options: object) -> SessionPool:
    made = model(name, attention)
    probe = SessionPool(made, arena_budget="4MiB", host_budget="64MiB", session_tokens=48)
    slab_bytes = probe.report()["slab_bytes"]
    return SessionPool(  # type: ignore[arg-type]
        made, arena_budget=slabs * slab_bytes, host_budget="64MiB", session_tokens=48, **options
    )


def begun(sessions: SessionPool, new: int = NEW, **options: object) -> list[Session]:
    rows = []
    for i, length in enumerate(LENGTHS):
        session = sessions.session(f"s{i}")
        assert isinstance(session.start(prompt(length, i), new, **options), Ongoing | Paused)  # type: ignore[arg-type]
        rows.append(session)
    return rows


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_have_the_tokens_of_each_alone(name: str) -> None:
    rows = begun(pool(name))
    found = rows[0].pool.decode(rows, NEW)
    for i, one in enumerate(found):
        alone = pool(name).session("alone").generate(prompt(LENGTHS[i], i), NEW)
        assert isinstance(one, Generated) and isinstance(alone, Generated)
        assert one.tokens == alone.tokens
        torch.testing.assert_close(one.logits, alone.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3"])
def test_swaps_between_steps_change_no_bit(name: str) -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    never, swapped = begun(pool(name)), begun(pool(name, slabs=4, seed=seed))
    other = swapped[0].pool.session("other")
    for _ in range(NEW - 1):
        expected = never[0].pool.decode(never)
        for session in rng.sample(swapped, rng.randrange(len(swapped) + 1)):
            rng.choice([session.evict, session.restore])()
        if other.tokens < 40:
            other.run([3, 4])
        found = swapped[0].pool.decode(swapped)
        for one, two in zip(found, expected, strict=True):
            assert type(one) is type(two) and not isinstance(one, Paused) and not isinstance(two, Paused)
            assert one.tokens == two.tokens and torch.equal(one.logits, two.logits), f"seed {seed}"
    assert swapped[0].pool.report()["pool"]["restores"] > 0


def test_one_call_of_many_steps_is_many_calls_of_one() -> None:
    one, many = begun(pool()), begun(pool())
    found = one[0].pool.decode(one, NEW - 1)
    for _ in range(NEW - 1):
        steps = many[0].pool.decode(many)
    for a, b in zip(found, steps, strict=True):
        assert isinstance(a, Generated) and isinstance(b, Generated)
        assert a.tokens == b.tokens and torch.equal(a.logits, b.logits)


def test_rows_stop_at_their_layers_and_go_on_together() -> None:
    never = begun(pool())
    expected = never[0].pool.decode(never, NEW)
    rows = begun(pool(slabs=4))
    sessions = rows[0].pool
    for session in rows:
        session._the_turn().breaks = [Break(2, 1), Break(0, 3), Break(3, 3)]
    stops = []
    for _ in range(3):
        for one in sessions.decode(rows, NEW):
            assert isinstance(one, Paused)
            stops.append((one.layer, one.step))
            one.session.evict()
    assert stops == [(2, 1)] * 4 + [(0, 3)] * 4 + [(3, 3)] * 4
    for one, two in zip(sessions.decode(rows, NEW), expected, strict=True):
        assert isinstance(one, Generated) and isinstance(two, Generated)
        assert one.tokens == two.tokens and torch.equal(one.logits, two.logits)


def test_who_stands_within_a_forward_catches_up_first() -> None:
    rows = begun(pool())
    sessions = rows[0].pool
    rows[1]._the_turn().breaks = [Break(1, 2)]
    kinds = [type(one) for one in sessions.decode(rows, 3)]
    assert kinds == [Ongoing, Paused, Ongoing, Ongoing]
    assert [len(s._the_turn().sampling.tokens) for s in rows] == [4, 2, 4, 4]  # type: ignore[union-attr]
    found = sessions.decode(rows, NEW)
    for i, one in enumerate(found):
        alone = pool().session("alone").generate(prompt(LENGTHS[i], i), NEW)
        assert isinstance(one, Generated) and isinstance(alone, Generated) and one.tokens == alone.tokens


def test_others_come_back_meanwhile() -> None:
    rows, plain = begun(pool(slabs=6)), begun(pool())
    sessions = rows[0].pool
    others = [sessions.session("a"), sessions.session("b"), sessions.session("c")]
    for other in others:
        other.run(prompt(6))
        other.evict()
    found = sessions.decode(rows, NEW, bring=[*others, rows[0]])  # two fit, and rows are there already
    assert [other.place["resident"] for other in others].count(True) == 2
    assert all(row.place["resident"] for row in rows)
    for one, two in zip(found, plain[0].pool.decode(plain, NEW), strict=True):
        assert isinstance(one, Generated) and isinstance(two, Generated)
        assert one.tokens == two.tokens and torch.equal(one.logits, two.logits)


def test_each_row_has_its_own_sampler_steering_and_end() -> None:
    generator = torch.Generator().manual_seed(5)
    vector = torch.randn(32, generator=generator)

    def make(sessions: SessionPool, i: int, name: str) -> Session:
        session = sessions.session(name)
        if i == 1:
            session.steer(2, vector)
        options: dict = {"temperature": 0.8, "seed": 11} if i == 2 else {}
        if i == 3:
            options["eos_token_id"] = END
        session.start(prompt(LENGTHS[i], i), NEW, **options)
        return session

    plain = pool().session("plain").generate(prompt(LENGTHS[3], 3), NEW)
    assert isinstance(plain, Generated)
    END = next(t for i, t in enumerate(plain.tokens) if i > 1 and t not in plain.tokens[:i])
    alone = []
    for i in range(4):
        session = make(pool(), i, "alone")
        alone.append(session.resume().tokens)  # type: ignore[union-attr]
    sessions = pool()
    rows = [make(sessions, i, f"s{i}") for i in range(4)]
    found = sessions.decode(rows, NEW)
    assert [one.tokens for one in found] == alone  # type: ignore[union-attr]
    assert len(alone[3]) == plain.tokens.index(END) + 1


def test_a_failed_step_leaves_all_rows_where_they_were() -> None:
    rows, whole = begun(pool()), begun(pool())
    sessions = rows[0].pool

    def fails(hidden: torch.Tensor) -> None:
        raise ValueError("no")

    rows[2].steer(1, fails)
    with pytest.raises(ValueError, match="no"):
        sessions.decode(rows, NEW)
    rows[2].unsteer()
    assert [s.tokens for s in rows] == list(LENGTHS)
    for one, two in zip(sessions.decode(rows, NEW), whole[0].pool.decode(whole, NEW), strict=True):
        assert isinstance(one, Generated) and isinstance(two, Generated) and one.tokens == two.tokens


def test_what_is_refused() -> None:
    rows = begun(pool(slabs=3))
    sessions = rows[0].pool
    with pytest.raises(BudgetError):
        sessions.decode(rows, 2)  # four rows, three slabs
    assert [s.tokens for s in rows] == list(LENGTHS)
    found = sessions.decode(rows[:3], 2)
    assert all(isinstance(one, Ongoing) for one in found)
    with pytest.raises(SessionError, match="twice"):
        sessions.decode([rows[0], rows[0]])
    with pytest.raises(SessionError, match="not generating"):
        sessions.decode([sessions.session("idle")])
    with pytest.raises(SessionError, match="another pool"):
        sessions.decode(begun(pool())[:1])
    with pytest.raises(SessionError, match="generating: resume it first"):
        rows[0].run([5])
    assert rows[0].stop() == found[0].tokens  # type: ignore[union-attr]
    assert isinstance(rows[0].generate([4], 2), Generated)


def test_a_session_between_tokens_is_saved_and_forked(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows = begun(pool())
    sessions = rows[0].pool
    sessions.decode(rows, 3)
    rows[0].save(tmp_path / "s")
    rows += [sessions.load(tmp_path / "s", "loaded"), rows[0].fork("forked")]
    found = sessions.decode(rows, NEW)
    assert found[0].tokens == found[4].tokens == found[5].tokens  # type: ignore[union-attr]


def test_models_whose_rows_cannot_share_run_one_after_the_other() -> None:
    eager = begun(pool(attention="eager"))
    assert not eager[0].pool._batches.can_batch
    for i, one in enumerate(eager[0].pool.decode(eager, NEW)):
        alone = pool(attention="eager").session("alone").generate(prompt(LENGTHS[i], i), NEW)
        assert isinstance(one, Generated) and isinstance(alone, Generated)
        assert one.tokens == alone.tokens and torch.equal(one.logits, alone.logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("fixed_decode", [False, True])
def test_on_a_gpu_one_kernel_takes_all_rows(fixed_decode: bool) -> None:
    made = copy.deepcopy(model("llama", "sdpa")).half().cuda()

    def fresh(slabs: int) -> list[Session]:
        probe = SessionPool(made, arena_budget="4MiB", host_budget="64MiB", session_tokens=48)
        budget = slabs * probe.report()["slab_bytes"]
        return begun(
            SessionPool(
                made, arena_budget=budget, host_budget="64MiB", session_tokens=48, fixed_decode=fixed_decode
            )
        )

    never, swapped = fresh(6), fresh(4)
    assert never[0].pool._batches.tokens.has_kernel
    expected = never[0].pool.decode(never, NEW)
    for _ in range(NEW - 1):
        for session in swapped:
            session.evict()
        found = swapped[0].pool.decode(swapped)
    for one, two in zip(found, expected, strict=True):
        assert isinstance(one, Generated) and isinstance(two, Generated)
        assert one.tokens == two.tokens and torch.equal(one.logits, two.logits)
