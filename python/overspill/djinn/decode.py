"""Decoding several sessions together: who shares a forward, and what each of them has at the end of it.

Sessions that stand alike (between two tokens, or after the same layer with the same layer to stop at next) share
forwards; the one that is behind goes first. Which sessions share which forward depends on nothing but how they
stood and what was asked for. Of a given set of rows a forward gives the same bits wherever the rows' slabs are and
wherever they have been meanwhile; another set of rows may give other last bits, since matrix products choose their
kernels by the number of rows. A session alone takes the steps that it takes in ``Session.generate``.

On a GPU, of a pool with ``fixed_decode``, a step that nobody interrupts is a CUDA graph, one for each number of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import OverspillError, SessionError
from .attention import batch_attention
from .batch import ArenaTokens, Numbers, Rows, can_batch
from .outcome import Generated, Ongoing, Paused
from .partial import Stop, armed
from .turn import Turn

if TYPE_CHECKING:
    from .pool import SessionPool
    from .session import Session

# Eager steps before a capture: libraries set themselves up in the first ones.
WARM_STEPS = 2

Outcome = Paused | Generated | Ongoing


class BatchDecoder:
    """The batched steps of one pool. Every use is under the pool's lock."""

    def __init__(self, pool: SessionPool, captures: bool) -> None:
        self.pool = pool
        self.tokens = ArenaTokens(pool)
        self.can_batch = can_batch(pool)
        self.captures = captures and self.tokens.has_kernel
        self._coming: list[Session] = []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Numbers, torch.Tensor]] = {}

    def decode(self, sessions: Sequence[Session], steps: int, bring: Sequence[Session]) -> list[Outcome]:
        """See :meth:`SessionPool.decode`."""
        self._check(sessions, steps)
        self._coming = [session for session in bring if session not in sessions]
        left = dict.fromkeys(sessions, steps)
        found: dict[Session, Outcome] = {}
        while left:
            most = max(left.values())
            behind = [session for session in left if left[session] == most]
            ahead = max((count for count in left.values() if count < most), default=0)
            for group in self._alike(behind):
                for session, (outcome, took) in self._advance(group, most - ahead).items():
                    left[session] -= took
                    if not isinstance(outcome, Ongoing) or left[session] == 0:
                        found[session] = outcome
                        del left[session]
        while self._coming:
            self._bring()
        self.pool._follow()
        return [found[session] for session in sessions]

    def together(self, sessions: Sequence[Session], tokens: Sequence[int]) -> list[torch.Tensor]:
        """See :meth:`SessionPool.run_together`."""
        group = list(sessions)
        if len(set(group)) != len(group):
            raise SessionError("a session is in the batch twice")
        for session in group:
            session._ready()
            if session._turn is not None or session.cache.start == 0:
                raise SessionError(f"session {session.id!r} is paused or empty", session=session.id)
            session._check_room(1)
        if not self.can_batch:
            return [
                session.run([token]).logits[0, -1]  # type: ignore[union-attr]
                for session, token in zip(group, tokens, strict=True)
            ]
        for session, token in zip(group, tokens, strict=True):
            session._turn = Turn([token], [], 1)
        try:
            rows = self._enter(group)
            try:
                with torch.no_grad(), batch_attention(rows), self._steered(group):
                    logits = rows.forward()
            except BaseException:
                self._abandon(group)
                raise
            self._leave(group, 1)
        finally:
            for session in group:
                session._turn = None
        return list(logits[:, -1])

    def _steered(self, group: list[Session]) -> contextlib.AbstractContextManager[None]:
        if not any(session.steering.interventions for session in group):
            return contextlib.nullcontext()
        return armed(self.pool.shape.layers, -1, None, _Steer(group), ())

    def _check(self, sessions: Sequence[Session], steps: int) -> None:
        if steps < 1:
            raise SessionError(f"steps is {steps}")
        if len(set(sessions)) != len(sessions):
            raise SessionError("a session is in the batch twice")
        for session in sessions:
            if session.pool is not self.pool:
                raise SessionError(f"session {session.id!r} is of another pool", session=session.id)
            session._ready()
            if session._turn is None or session._turn.sampling is None:
                message = f"session {session.id!r} is not generating; start() begins"
                raise SessionError(message, session=session.id)

    def _alike(self, sessions: list[Session]) -> list[list[Session]]:
        """Those that may share a forward; who stands within one comes before who does not."""
        groups: dict[tuple[int, int], list[Session]] = {}
        for index, session in enumerate(sessions):
            turn = session._the_turn()
            alone = not self.can_batch or len(turn.ids) != 1 or session.cache.start == 0
            key = (-2, index) if alone else (turn.layer, turn.next_stop())
            groups.setdefault(key, []).append(session)
        return sorted(groups.values(), key=lambda group: group[0]._the_turn().layer, reverse=True)

    def _advance(self, group: list[Session], most: int) -> dict[Session, tuple[Outcome, int]]:
        """At most ``most`` tokens for each of a group; what became of it and how many tokens that were."""
        turns = [session._the_turn() for session in group]
        if len(group) == 1:
            assert turns[0].sampling is not None
            before = len(turns[0].sampling.tokens)
            # After the forward over a prompt others may be where it is.
            outcome = group[0]._drive(turns[0], 1 if len(turns[0].ids) > 1 else most)
            return {group[0]: (outcome, len(turns[0].sampling.tokens) - before)}  # type: ignore[dict-item]
        for session in group:
            session._check_room(1)
        stands = turns[0].layer >= 0 or turns[0].next_stop() >= 0
        if stands or any(session.steering.interventions for session in group):
            return self._one(group, turns)
        return self._burst(group, turns, most)

    # ---- one forward of some layers --------------------------------------------------------------

    def _one(self, group: list[Session], turns: list[Turn]) -> dict[Session, tuple[Outcome, int]]:
        """One forward, from where the group stands to where it stops."""
        layer, stop = turns[0].layer, turns[0].next_stop()
        kept = [session._hidden_to_resume(turn) for session, turn in zip(group, turns, strict=True)]
        hidden = None if layer < 0 else torch.cat([one for one in kept if one is not None])
        steers = any(session.steering.interventions for session in group)
        rows = self._enter(group)
        try:
            with (
                torch.no_grad(),
                batch_attention(rows),
                armed(self.pool.shape.layers, layer, hidden, _Steer(group) if steers else None, {stop}),
            ):
                logits = rows.forward()
        except Stop as stopped:
            return self._stopped(group, turns, stopped)
        except BaseException:
            self._abandon(group)
            raise
        self._leave(group, 1)
        tokens = [
            turn.sampling.choose(logits[row, -1])  # type: ignore[union-attr]
            for row, turn in enumerate(turns)
        ]
        return self._took(group, turns, [[token] for token in tokens], logits)

    def _stopped(
        self, group: list[Session], turns: list[Turn], stopped: Stop
    ) -> dict[Session, tuple[Outcome, int]]:
        found: dict[Session, tuple[Outcome, int]] = {}
        for row, (session, turn) in enumerate(zip(group, turns, strict=True)):
            session._leave(session.cache.start + 1, stopped.layer)
            turn.stop(stopped.layer, stopped.hidden[row : row + 1].detach().clone())
            session._turn = turn
            found[session] = (Paused(session, turn), 0)
        return found

    # ---- several steps that nobody interrupts ----------------------------------------------------

    def _burst(
        self, group: list[Session], turns: list[Turn], most: int
    ) -> dict[Session, tuple[Outcome, int]]:
        samplings = [turn.sampling for turn in turns if turn.sampling is not None]
        rooms = [self.pool.session_tokens - session.cache.start for session in group]
        count = min([most, *rooms, *(one.remaining for one in samplings)])
        count = min(turn.steps_free(count) for turn in turns)
        # Tokens come to the host only where it has to know them.
        asks = any(one.ends or one.temperature > 0 for one in samplings)
        rows, chosen = self._enter(group), []
        # Spread over the steps: the queue of copies is short, and whoever fills it waits for copies.
        pace = max(1, count // (len(self._coming) + 1))
        try:
            with torch.no_grad(), batch_attention(rows):
                replay = self._replay(rows)
                for step in range(count):
                    if self._coming and step % pace == pace - 1:
                        self._bring()
                    logits = replay()
                    following = logits[:, -1].argmax(-1)
                    if asks:
                        listed = [
                            one.pick(logits[row, -1]) if one.temperature > 0 else token
                            for row, (one, token) in enumerate(
                                zip(samplings, following.tolist(), strict=True)
                            )
                        ]
                        following = torch.tensor(listed, device=following.device)
                    chosen.append(following)
                    rows.follow(following)
                    if asks and any(token in one.ends for token, one in zip(listed, samplings, strict=True)):
                        break
                logits = logits.clone()
        except BaseException:
            self._abandon(group)
            raise
        self._leave(group, len(chosen))
        tokens = torch.stack(chosen, 1).tolist()
        for turn, listed in zip(turns, tokens, strict=True):
            assert turn.sampling is not None
            turn.sampling.took(listed)
        return self._took(group, turns, tokens, logits)

    def _bring(self) -> None:
        """Starts bringing the next one back. What fails here stays where it is: its own forward says why."""
        session = self._coming.pop(0)
        with contextlib.suppress(OverspillError):
            session._open()
            self.pool._native.restore(session._key)

    def _replay(self, rows: Rows) -> Callable[[], torch.Tensor]:
        """A step of ``rows``, as a graph where there can be one."""
        if not self.captures:
            return rows.forward
        for session in rows.sessions:
            if session.cache.pending:
                self.pool._touch_all(session)
        count = len(rows.sessions)
        if count not in self._graphs:
            self._graphs[count] = self._capture(rows)
        graph, numbers, logits = self._graphs[count]
        rows.move_to(numbers)

        def step() -> torch.Tensor:
            graph.replay()
            return logits

        return step

    def _capture(self, rows: Rows) -> tuple[torch.cuda.CUDAGraph, Numbers, torch.Tensor]:
        """A graph of one step of as many rows; what it writes while it is made is what its replay writes."""
        device = self.pool.shape.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                rows.forward()
        torch.cuda.current_stream(device).wait_stream(side)
        # Steps never run at once, so their graphs share what memory they need beside the slabs.
        memory = next((graph.pool() for graph, _, _ in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        # Other threads may bring sessions back meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits = rows.forward()
        return graph, rows.numbers, logits

    # ---- the pool's side of a forward ------------------------------------------------------------

    def _enter(self, group: list[Session]) -> Rows:
        """All of a group on the device at once; none of them if that fails."""
        entered: list[Session] = []
        slabs: dict[Session, int] = {}
        try:
            # Who is there already first: else it might have to make room for the others.
            for session in sorted(group, key=lambda session: not session.place["resident"]):
                slabs[session] = session._enter(1)
                entered.append(session)
            return Rows(self.pool, group, [slabs[session] for session in group])
        except BaseException:
            self._abandon(entered)
            raise

    def _leave(self, group: list[Session], count: int) -> None:
        for session in group:
            session.cache.start += count
            session._leave(session.cache.start, None)

    def _abandon(self, group: list[Session]) -> None:
        for session in group:
            session._abandon()

    def _took(
        self, group: list[Session], turns: list[Turn], tokens: list[list[int]], logits: torch.Tensor
    ) -> dict[Session, tuple[Outcome, int]]:
        """The sessions have ``tokens`` more; the last ones have not been through the model yet."""
        found: dict[Session, tuple[Outcome, int]] = {}
        for row, (session, turn, new) in enumerate(zip(group, turns, tokens, strict=True)):
            turn.step += len(new) - 1
            turn.follow(new[-1])
            found[session] = (session._stand(turn, logits[row : row + 1]), len(new))
        return found


class _Steer:
    """The interventions of each row."""

    def __init__(self, group: list[Session]) -> None:
        self.group = group
        self.layers = {one.layer for session in group for one in session.steering.interventions}

    def __call__(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        if layer not in self.layers:
            return hidden
        # Each its own tensor: functions may change it in place.
        rows = [row.clone() for row in hidden.split(1)]
        return torch.cat([session._steer(layer, row) for session, row in zip(self.group, rows, strict=True)])
