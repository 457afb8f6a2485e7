"""One session: runs, pauses, resumes, generates.

A turn is plain data (:class:`~overspill.djinn.turn.Turn`): the tokens of the forward, the layer after
which it stands, the hidden state there, what is left to generate and how. That, and the keys and values
in the pool, is all that a paused session is.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import SessionError
from .cache import SessionCache
from .outcome import Generated, Ongoing, Output, Paused
from .partial import Stop, armed
from .steering import Intervention, Steer, Steering, check_hidden
from .turn import Break, Sampling, Turn

if TYPE_CHECKING:
    from .pool import SessionPool

__all__ = ["Break", "Generated", "Ongoing", "Output", "Paused", "Session"]


class Session:
    """See the module; made by :meth:`SessionPool.session`."""

    def __init__(self, pool: SessionPool, name: str, key: int) -> None:
        self.pool = pool
        self.id = name
        self._key = key
        self._closed = False
        self._turn: Turn | None = None
        self._token: int | None = None
        self._outside = False
        self._running = False
        self.steering = Steering()
        self.cache = SessionCache(self)

    # ---- turns -----------------------------------------------------------------------------------

    def run(
        self, ids: torch.Tensor | Sequence[int], breaks: Sequence[Break] = (), logits_to_keep: int = 0
    ) -> Paused | Output:
        """One forward over ``ids``, which come after all that the session has seen.

        Returns:
            The logits (of the last ``logits_to_keep`` tokens; 0: of all), or where it stopped.
        """
        turn = Turn(self._ids(ids), self._breaks(breaks), logits_to_keep)
        outcome = self._start(turn)
        assert not isinstance(outcome, Generated | Ongoing)
        return outcome

    def generate(
        self,
        ids: torch.Tensor | Sequence[int],
        max_new_tokens: int,
        breaks: Sequence[Break] = (),
        *,
        temperature: float = 0.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] = (),
    ) -> Paused | Generated:
        """Generates after ``ids``; greedy at ``temperature`` 0. Step 0 is the forward over ``ids``."""
        outcome = self._start(self._generation(ids, max_new_tokens, breaks, temperature, seed, eos_token_id))
        assert not isinstance(outcome, Output | Ongoing)
        return outcome

    def start(
        self,
        ids: torch.Tensor | Sequence[int],
        max_new_tokens: int,
        breaks: Sequence[Break] = (),
        *,
        temperature: float = 0.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] = (),
    ) -> Paused | Generated | Ongoing:
        """As :meth:`generate`, but only up to the first token; :meth:`SessionPool.decode` or :meth:`resume` goes
        on from there.
        """
        turn = self._generation(ids, max_new_tokens, breaks, temperature, seed, eos_token_id)
        outcome = self._start(turn, most=1)
        assert not isinstance(outcome, Output)
        return outcome

    def resume(self) -> Paused | Output | Generated:
        """Goes on from where the session is paused, or to the end of what it is generating. If that fails it stands
        there still.
        """
        with self.pool._lock:
            self._open()
            if self._turn is None:
                raise SessionError(f"session {self.id!r} is not paused", session=self.id)
            outcome = self._drive(self._turn)
            assert not isinstance(outcome, Ongoing)
            return outcome

    def stop(self) -> list[int]:
        """Ends what the session is generating, between two tokens; what it generated."""
        with self.pool._lock:
            self._open()
            turn = self._turn
            if turn is None or turn.sampling is None or turn.layer >= 0:
                raise SessionError(f"session {self.id!r} is not between two tokens", session=self.id)
            self._turn = None
            return list(turn.sampling.tokens)

    @property
    def paused(self) -> Paused | None:
        """Where the session stands, if it is paused."""
        return None if self._turn is None or self._turn.layer < 0 else Paused(self, self._turn)

    @property
    def tokens(self) -> int:
        """Tokens that every layer has."""
        return self.cache.start

    def _generation(
        self, ids: torch.Tensor | Sequence[int], count: int, breaks: Sequence[Break], temperature: float,
        seed: int, eos_token_id: int | Sequence[int],
    ) -> Turn:  # fmt: skip
        if count < 1:
            raise SessionError(f"max_new_tokens is {count}", session=self.id)
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        sampling = Sampling.make(temperature, seed, count, ends)
        return Turn(self._ids(ids), self._breaks(breaks), 1, sampling=sampling)

    def _ids(self, ids: torch.Tensor | Sequence[int]) -> list[int]:
        listed = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if isinstance(ids, torch.Tensor) and ids.numel() != ids.shape[-1]:
            raise SessionError(f"a session is one sequence, not {tuple(ids.shape)}", session=self.id)
        # The token that was generated last has not been through the model yet.
        listed = listed if self._token is None else [self._token, *listed]
        if not listed:
            raise SessionError("there are no tokens to run", session=self.id)
        return listed

    def _breaks(self, breaks: Sequence[Break]) -> list[Break]:
        layers = len(self.pool.shape.layers)
        for one in breaks:
            if not 0 <= one.layer < layers or one.step < 0:
                message = f"{one} is not a layer of 0..{layers - 1} and a step from 0 on"
                raise SessionError(message, session=self.id, layer=one.layer)
        return list(breaks)

    def _start(self, turn: Turn, most: int | None = None) -> Paused | Output | Generated | Ongoing:
        with self.pool._lock:
            self._open()
            if self._turn is not None:
                where = f"paused after layer {self._turn.layer}" if self._turn.layer >= 0 else "generating"
                message = f"session {self.id!r} is {where}: resume it first"
                raise SessionError(message, session=self.id, layer=self._turn.layer)
            return self._drive(turn, most)

    def _drive(self, turn: Turn, most: int | None = None) -> Paused | Output | Generated | Ongoing:
        """Forwards until a breakpoint or the end, or until ``most`` tokens more are there."""
        before = 0 if turn.sampling is None else len(turn.sampling.tokens)
        while True:
            logits = self._burst(turn, most)
            if logits is None:
                outcome = self._forward(turn)
                if isinstance(outcome, Stop):
                    turn.stop(outcome.layer, outcome.hidden)
                    self._turn = turn
                    return Paused(self, turn)
                logits = outcome
                self.cache.start += len(turn.ids)
                self._turn, self._token = None, None
                if turn.sampling is None:
                    return Output(logits)
                turn.follow(turn.sampling.choose(logits[0, -1]))
            stands = self._stand(turn, logits)
            assert turn.sampling is not None
            if isinstance(stands, Generated) or len(turn.sampling.tokens) - before == most:
                return stands

    def _stand(self, turn: Turn, logits: torch.Tensor) -> Generated | Ongoing:
        """Stands between two tokens, the last of which has not been through the model, or is at the end."""
        assert turn.sampling is not None
        self._token = turn.ids[0]
        over = turn.sampling.is_over()
        self._turn = None if over else turn
        return (Generated if over else Ongoing)(list(turn.sampling.tokens), logits)

    def _forward(self, turn: Turn) -> Stop | torch.Tensor:
        """One forward of the model, or the rest of one; the logits, or where it stopped."""
        pool, length = self.pool, self._check_room(len(turn.ids))
        hidden = self._hidden_to_resume(turn)
        stops = {one.layer for one in turn.breaks if one.step == turn.step and one.layer > turn.layer}
        pool._settle()
        self._enter(len(turn.ids))
        try:
            with torch.no_grad(), self._fixed_step(len(turn.ids)):
                ids = pool._ids(turn.ids)
                if turn.layer < 0 and not stops and not self.steering.interventions:
                    logits = pool._call(self.cache, ids, turn.keep)
                else:
                    steer = self._steer if self.steering.interventions else None
                    with armed(pool.shape.layers, turn.layer, hidden, steer, stops):
                        logits = pool._call(self.cache, ids, turn.keep)
        except Stop as stop:
            self._leave(length, stop.layer)
            stop.hidden = stop.hidden.detach()
            return stop
        except BaseException:
            self._abandon()
            raise
        self._leave(length, None)
        return logits

    def _the_turn(self) -> Turn:
        assert self._turn is not None
        return self._turn

    def _check_room(self, count: int) -> int:
        """The session's tokens with ``count`` more."""
        length, limit = self.cache.start + count, self.pool.session_tokens
        if length > limit:
            message = f"session {self.id!r} would have {length} tokens; a slab holds {limit}"
            raise SessionError(message, session=self.id, tokens=length, limit_tokens=limit)
        return length

    def _fixed_step(self, count: int) -> contextlib.AbstractContextManager[None]:
        decoder = self.pool._fixed
        if decoder is None or count != 1 or self.cache.start == 0:
            return contextlib.nullcontext()
        return decoder.step(self)

    def _burst(self, turn: Turn, most: int | None) -> torch.Tensor | None:
        """As many steps at fixed length as come before the next breakpoint, ``most`` at most; the logits of the last."""
        decoder, sampling = self.pool._fixed, turn.sampling
        fits = decoder is not None and sampling is not None and sampling.temperature == 0
        if (
            not fits
            or turn.layer >= 0
            or self.cache.start == 0
            or len(turn.ids) != 1
            or self.steering.interventions
        ):
            return None
        assert decoder is not None and sampling is not None
        room = self.pool.session_tokens - self.cache.start
        count = turn.steps_free(min(sampling.remaining, room, most or room))
        if count < 1:
            return None
        start = self.cache.start
        self.pool._settle()
        slab = self._enter(1)
        try:
            if self.cache.pending:
                self.pool._touch_all(self)
            tokens, logits = decoder.burst(self, slab, turn.ids[0], count, sampling.ends)
        except BaseException:
            self.cache.start = start
            self._abandon()
            raise
        self._leave(self.cache.start, None)
        sampling.took(tokens)
        turn.ids, turn.step = tokens[-1:], turn.step + len(tokens)
        return logits

    def _hidden_to_resume(self, turn: Turn) -> torch.Tensor | None:
        if turn.hidden is None:
            return None
        hidden = turn.hidden.to(self.pool.shape.device, non_blocking=True)
        if turn.hidden_changed or turn.hidden._version != turn.hidden_version:
            check_hidden(hidden, hidden, turn.layer, self.id, "the hidden state that was set")
            self.steering.note("hidden", turn.layer, "", self.cache.start, hidden)
            turn.hidden_changed, turn.hidden_version = False, turn.hidden._version
        return hidden

    def _steer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.steering.apply(layer, hidden, self.id)

    # ---- the pool's side of a forward ------------------------------------------------------------

    def _enter(self, count: int) -> int:
        slab, _, pending = self.pool._native.begin(self._key)
        self.cache.entered(slab, self.pool._slab_view(slab), pending)
        self._large = self.cache.announces = self.pool._is_large(count)
        self._running = True
        self.pool._follow()
        return slab

    def _wrote(self, layer: int, end: int) -> None:
        if self._large:
            self.pool._native.wrote(self._key, layer, end, self.pool._stream())
        if self._outside and layer == len(self.cache.layers) - 1:
            # The forward that transformers runs is over but for its last layer; see `SessionCache`.
            self.cache.start = end
            self.cache.slab_view = None
            self.pool._linger(self)

    def _leave(self, end: int, pause: int | None, stream: int | None = None) -> None:
        native, stream = self.pool._native, self.pool._stream() if stream is None else stream
        self._running = self._outside = False
        self.cache.left()
        if pause is None:
            native.wrote_all(self._key, end, stream)
        else:
            for layer in range(pause + 1):
                native.wrote(self._key, layer, end, stream)
        native.park(self._key, pause, stream)

    def _abandon(self) -> None:
        self.cache.forget()
        self._running = self._outside = False
        self.cache.left()
        self.pool._native.abandon(self._key, self.pool._stream())

    def _enter_from_outside(self, count: int) -> None:
        """The first layer of a forward that transformers runs with this session's cache."""
        with self.pool._lock:
            self._open()
            if self._turn is not None:
                raise SessionError(f"session {self.id!r} is paused: resume it first", session=self.id)
            self._check_room(count)
            self.pool._settle()
            self._enter(count)
            self._outside, self._token = True, None
            self.cache.announces = True

    def _open(self) -> None:
        if self._closed:
            raise SessionError(f"session {self.id!r} is closed", session=self.id)
        if self._running and not self.pool._is_lingering(self):
            if not self._outside:
                raise SessionError(f"session {self.id!r} is running", session=self.id)
            self._abandon()  # a forward of transformers' that ended in an exception

    # ---- steering --------------------------------------------------------------------------------

    def steer(self, layer: int, how: torch.Tensor | Steer, name: str = "steer") -> None:
        """Adds ``how`` to what ``layer`` puts out (a tensor), or replaces it by ``how(hidden)`` (a callable;
        None keeps it, changed in place or not), from the next forward on.
        """
        self._open()
        self._breaks([Break(layer)])
        vector = how.detach() if isinstance(how, torch.Tensor) else None
        function = None if isinstance(how, torch.Tensor) else how
        self.steering.add(Intervention(layer, name, vector, function), self.cache.start)

    def unsteer(self, name: str = "steer") -> None:
        """Ends the interventions of this name."""
        self._open()
        self.steering.remove(name, self.cache.start)

    # ---- placement -------------------------------------------------------------------------------

    def io_wait(self, eta_ms: float) -> None:
        """The session waits for something and will be needed in ``eta_ms``. It leaves the device before memory is
        short, if it is away for long enough to be worth it, and sets out before it is due, as far as there is room.
        """
        with self.pool._lock:
            self._ready()
            self.pool._native.expect(self._key, eta_ms * 1e3)
            self.pool.tick()

    def ask(self, due_ms: float = 0.0) -> None:
        """Asks for a turn, to start in ``due_ms``: the pool's scheduler brings the session while others compute, and
        :meth:`SessionPool.turns` says when. Nobody takes its place then until :meth:`end_turn`.
        """
        with self.pool._lock:
            self._ready()
            self.pool._native.ask(self._key, int(due_ms * 1e3))

    def end_turn(self) -> None:
        """The session computes no more for now; others may take its place."""
        with self.pool._lock:
            self._ready()
            self.pool._native.end_turn(self._key)

    def evict(self) -> None:
        """Sends the session off the device. What is in the host copy already is not copied again."""
        with self.pool._lock:
            self._ready()
            self.pool._native.evict(self._key)
            self.pool._follow()

    def restore(self) -> None:
        """Starts bringing the session back, so that its next forward need not."""
        with self.pool._lock:
            self._ready()
            self.pool._native.restore(self._key)
            self.pool._follow()

    def spill(self) -> None:
        """Moves the session to disk."""
        with self.pool._lock:
            self.evict()
            self.pool._native.spill(self._key)

    @property
    def place(self) -> dict[str, int | bool]:
        """Where its bytes are: ``resident``, ``host_bytes``, ``disk_bytes``."""
        resident, host_bytes, disk_bytes = self.pool._native.place(self._key)
        return {"resident": resident, "host_bytes": host_bytes, "disk_bytes": disk_bytes}

    def fork(self, name: str) -> Session:
        """A second session that goes on from here; bytes are shared until they differ."""
        with self.pool._lock:
            self._ready()
            child = self.pool._new(name, lambda key: self.pool._native.fork(self._key, key))
            child.cache.start, child._token = self.cache.start, self._token
            child.steering = self.steering.copy()
            child._turn = None if self._turn is None else self._turn.copy()
            return child

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session to a file that :meth:`SessionPool.load` reads, in another process too."""
        with self.pool._lock:
            self._ready()
            record = {
                "model": self.pool.fingerprint,
                "tokens": self.cache.start,
                "token": self._token,
                "turn": None if self._turn is None else self._turn.to_record(),
                "steering": self.steering.hash,
                "interventions": [
                    [one.layer, one.name, Turn.pack(one.vector)] for one in self.steering.interventions
                ],
            }
            self.pool._native.save(self._key, os.fspath(path), json.dumps(record))

    def _restore_record(self, record: Mapping, steering: Mapping[str, Steer]) -> None:
        device = self.pool.shape.device
        self.cache.start, self._token = record["tokens"], record["token"]
        self._turn = None if record["turn"] is None else Turn.from_record(record["turn"], device)
        for layer, name, packed in record["interventions"]:
            vector, function = Turn.unpack(packed, device), steering.get(name)
            if vector is None and function is None:
                message = f"the saved session was steered by a callable named {name!r}; pass it in steering="
                raise SessionError(message, session=self.id, layer=layer)
            self.steering.interventions.append(Intervention(layer, name, vector, function))
        self.steering.hash = record["steering"]

    def close(self) -> None:
        """Ends the session; its memory is free for others."""
        with self.pool._lock:
            if not self._closed:
                self._ready()
                self.pool._native.remove(self._key)
                self._closed = True
                self.pool._forget(self)

    def _ready(self) -> None:
        self._open()
        self.pool._settle()

    def __repr__(self) -> str:
        paused = self._turn is not None and self._turn.layer >= 0
        where = f", paused after layer {self._turn.layer}" if paused else ""  # type: ignore[union-attr]
        return f"Session({self.id!r}, {self.cache.start} tokens{where})"
