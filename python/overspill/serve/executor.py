"""Runs the model for the server: sessions by number, one forward at a time.

Called from one thread. Every call answers JSON, ``{"ok": ...}`` or ``{"error": ...}``; one that fails leaves
the session as it was.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..djinn import Break, Output, Paused, Session, SessionPool
from ..djinn.turn import Turn
from ..errors import BudgetError, FormatError, SessionError
from .sampling import Sampler
from .text import PromptError, Transcript


@dataclass
class Steered:
    """A direction that a session is steered in at a layer, before it is multiplied with ``strength``."""

    layer: int
    direction: torch.Tensor
    strength: float


@dataclass
class Seat:
    """A session, and what of its answer is not the model's.

    Attributes:
        session: keys, values, and where it stands.
        pending: tokens that it has been given or has chosen and that have not been run.
        sampler: how the answer that is under way is chosen.
        transcript: its text.
        steered: what it is steered by, by name.
        before: tokens and text before a prompt of which nothing has been run yet.
        exact: whether its steps are never batched with others'.
    """

    session: Session
    exact: bool
    pending: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    transcript: Transcript = field(default_factory=Transcript)
    steered: dict[str, Steered] = field(default_factory=dict)
    before: tuple[list[int], Transcript] | None = None


class SessionExecutor:
    """See the module.

    Args:
        pool: the sessions.
        tokenizer: of transformers, or anything with its ``encode``, ``decode`` and ``apply_chat_template``.
    """

    def __init__(self, pool: SessionPool, tokenizer: Any) -> None:
        self.pool = pool
        self.tokenizer = tokenizer
        self.ends = _ends(pool, tokenizer)
        self.vocabulary = int(pool.model.config.get_text_config(decoder=True).vocab_size)
        self.seats: dict[int, Seat] = {}

    # ---- the server's calls ----------------------------------------------------------------------

    def command(self, text: str) -> str:
        """Does one command."""
        asked: dict[str, Any] = json.loads(text)
        method = getattr(self, f"_{asked.pop('op')}")
        return _answer(lambda: method(**asked))

    def step(self, steps: list[tuple[int, int | None]]) -> str:
        """One forward of each session, which stops after the layer if one is named."""

        def run() -> list[dict[str, Any]]:
            shared = self._together([self.seats[key] for key, layer in steps if layer is None])
            return [shared.get(key) or self._step(self.seats[key], layer) for key, layer in steps]

        return _answer(run)

    def hidden(self, key: int, into: dict[str, bytes]) -> str:
        """Puts the hidden state of a paused session into ``into["file"]``, as a safetensors file."""

        def read() -> None:
            paused = self._paused(key)
            facts = {"layer": str(paused.layer), "step": str(paused.step)}
            hidden = paused.hidden.detach().cpu().contiguous()
            into["file"] = safetensors.torch.save({"hidden": hidden}, metadata=facts)

        return _answer(read)

    def set_hidden(self, key: int, file: bytes) -> str:
        """Replaces it by what such a file has."""

        def write() -> None:
            paused = self._paused(key)
            try:
                found = safetensors.torch.load(file)["hidden"]
                paused.hidden = found.to(self.pool.shape.device)
            except (SafetensorError, KeyError, SessionError) as error:
                raise PromptError(f"the file has no hidden state for this session: {error}") from error

        return _answer(write)

    # ---- sessions --------------------------------------------------------------------------------

    def _open(self, key: int, exact: bool) -> None:
        self.seats[key] = Seat(self.pool.session(str(key)), exact)

    def _close(self, key: int) -> None:
        self.seats[key].session.close()
        del self.seats[key]

    def _fork(self, key: int, child: int) -> None:
        seat = self.seats[key]
        # Through its record, so that nothing of the two is shared.
        record = json.loads(json.dumps(self._to_record(seat)))
        self.seats[child] = self._from_record(seat.session.fork(str(child)), record)

    def _save(self, key: int, path: str) -> dict[str, Any]:
        seat = self.seats[key]
        seat.session.save(path)
        return self._to_record(seat)

    def _load(self, key: int, path: str, record: dict[str, Any]) -> None:
        self.seats[key] = self._from_record(self.pool.load(path, str(key)), record)

    def _io_wait(self, key: int, eta_ms: float) -> None:
        self.seats[key].session.io_wait(eta_ms)

    def _report(self) -> dict[str, Any]:
        report = self.pool.report()
        return {
            "sessions": {str(key): self._place(seat, report) for key, seat in self.seats.items()},
            "pool": report,
        }

    def _place(self, seat: Seat, report: dict[str, Any]) -> dict[str, Any]:
        place = seat.session.place
        steered = [
            {"name": name, "layer": one.layer, "strength": one.strength} for name, one in seat.steered.items()
        ]
        device_bytes = report["slab_bytes"] if place["resident"] else 0
        return {"tokens": seat.session.tokens, "device_bytes": device_bytes, "steering": steered, **place}

    # ---- generating ------------------------------------------------------------------------------

    def _begin(
        self,
        key: int,
        prompt: dict[str, Any],
        max_tokens: int,
        open_ended: bool,
        temperature: float,
        top_p: float,
        seed: int,
        logprobs: int | None,
    ) -> dict[str, int]:
        seat = self.seats[key]
        told = Transcript(**json.loads(json.dumps(seat.transcript.to_record())))
        pending = seat.pending + self._encode(
            told, prompt, is_first=not seat.session.tokens and not seat.pending
        )
        if not pending:
            raise PromptError("there are no tokens to run")
        seen, limit = seat.session.tokens, self.pool.session_tokens
        # The last token of an answer is not run.
        room = limit + 1 - seen - len(pending)
        if open_ended:
            max_tokens = max(1, min(max_tokens, room))
        if max_tokens > room:
            tokens = seen + len(pending) + max_tokens - 1
            raise SessionError("longer than a session", tokens=tokens, limit_tokens=limit)
        told.begin()
        seat.before = (seat.pending, seat.transcript)
        seat.transcript, seat.pending = told, pending
        seat.sampler = Sampler.make(temperature, top_p, seed, logprobs)
        return {"prompt_tokens": seen + len(pending), "cached_tokens": seen, "max_tokens": max_tokens}

    def _ask(self, key: int) -> None:
        self.seats[key].session.ask()

    def _turns(self) -> list[int]:
        return [int(session.id) for session in self.pool.turns()]

    def _end_turn(self, key: int) -> None:
        self.seats[key].session.end_turn()

    def _finish(self, key: int) -> None:
        seat = self.seats[key]
        if seat.before is not None:
            # Nothing of the prompt was run: it is as if it had not come.
            seat.pending, seat.transcript = seat.before
        elif seat.sampler is not None:
            seat.transcript.end(self.tokenizer)
        seat.before = seat.sampler = None
        seat.session.end_turn()

    def _encode(self, told: Transcript, prompt: dict[str, Any], is_first: bool) -> list[int]:
        (kind, value), *_ = prompt.items()
        if kind == "tokens":
            if max(value) >= self.vocabulary:
                raise PromptError(f"prompt has a token {max(value)}; the model has {self.vocabulary}")
            return list(value)
        if kind == "chat":
            text = told.chat(self.tokenizer, value["messages"], value["tools"])
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return list(self.tokenizer.encode(value, add_special_tokens=is_first))

    def _together(self, seats: list[Seat]) -> dict[int, dict[str, Any]]:
        """One forward for all that stand between two tokens and do not mind; by key. If it fails, each will tell by
        itself why.
        """
        if len(seats) < 2:
            return {}

        def shares(seat: Seat) -> bool:
            return (
                not seat.exact
                and len(seat.pending) == 1
                and seat.session.tokens > 0
                and seat.session.paused is None
            )

        group = [seat for seat in seats if shares(seat)]
        if len(group) < 2:
            return {}
        try:
            found = self.pool.run_together(
                [seat.session for seat in group], [seat.pending[0] for seat in group]
            )
        except (BudgetError, SessionError):
            return {}
        return {
            int(seat.session.id): self._after(seat, logits) for seat, logits in zip(group, found, strict=True)
        }

    def _after(self, seat: Seat, logits: torch.Tensor) -> dict[str, Any]:
        """What comes of the logits of a forward."""
        seat.pending, seat.before = [], None
        try:
            assert seat.sampler is not None
            return {"token": self._choose(seat, seat.sampler, logits)}
        except Exception as error:
            return {"failed": _problem(error)}

    def _step(self, seat: Seat, layer: int | None) -> dict[str, Any]:
        try:
            if seat.session.paused is not None:
                outcome = seat.session.resume()
            else:
                breaks = [] if layer is None else [Break(layer)]
                outcome = seat.session.run(seat.pending, breaks, logits_to_keep=1)
        except Exception as error:
            return {"failed": _problem(error)}
        if isinstance(outcome, Paused):
            seat.pending, seat.before = [], None
            return {"paused": outcome.layer}
        assert isinstance(outcome, Output)
        return self._after(seat, outcome.logits.reshape(-1))

    def _choose(self, seat: Seat, sampler: Sampler, logits: torch.Tensor) -> dict[str, Any]:
        token = sampler.choose(logits)
        seat.pending = [token]
        text = seat.transcript.push(self.tokenizer, token)
        logprob = sampler.explain(self.tokenizer, logits, token)
        return {"text": text, "logprob": logprob, "end": token in self.ends}

    # ---- steering --------------------------------------------------------------------------------

    def _steer(
        self,
        key: int,
        layer: int,
        name: str,
        vector: list[float] | None,
        toward: str | None,
        away: str | None,
        strength: float,
    ) -> None:
        seat, old = self.seats[key], self.seats[key].steered.get(name)
        if vector is not None:
            direction = torch.tensor(vector)
        elif toward is not None and away is not None:
            direction = self._at(toward, layer) - self._at(away, layer)
        elif toward is None and away is None and old is not None:
            layer, direction = old.layer, old.direction
        else:
            raise PromptError(f"{name!r} needs a vector, or texts toward and away")
        shape = self.pool.shape
        scaled = (direction.to(shape.device) * strength).to(shape.dtype)
        if not bool(scaled.isfinite().all()):
            raise PromptError("vector times strength is not finite")
        if old is not None and old.strength != 0:
            seat.session.unsteer(name)
        if strength != 0:
            seat.session.steer(layer, scaled, name)
        seat.steered[name] = Steered(layer, direction.float().cpu(), strength)

    def _at(self, text: str, layer: int) -> torch.Tensor:
        """What ``layer`` puts out at the last token of ``text``."""
        tokens = self.tokenizer.encode(text, add_special_tokens=True)
        if not tokens:
            raise PromptError("a text to steer by has no tokens")
        session = self.pool.session("to steer by")
        try:
            paused = session.run(tokens, [Break(layer)])
            assert isinstance(paused, Paused)
            return paused.hidden[0, -1].clone()
        finally:
            session.close()

    def _paused(self, key: int) -> Paused:
        paused = self.seats[key].session.paused
        if paused is None:
            raise SessionError("the session does not stand after a layer")
        return paused

    # ---- records ---------------------------------------------------------------------------------

    def _to_record(self, seat: Seat) -> dict[str, Any]:
        return {
            "exact": seat.exact,
            "pending": seat.pending,
            "sampler": None if seat.sampler is None else seat.sampler.to_record(),
            "transcript": seat.transcript.to_record(),
            "steered": {
                name: [one.layer, Turn.pack(one.direction), one.strength]
                for name, one in seat.steered.items()
            },
        }

    def _from_record(self, session: Session, record: dict[str, Any]) -> Seat:
        steered = {}
        for name, (layer, packed, strength) in record["steered"].items():
            direction = Turn.unpack(packed, torch.device("cpu"))
            assert direction is not None
            steered[name] = Steered(layer, direction, strength)
        sampler = None if record["sampler"] is None else Sampler.from_record(record["sampler"])
        transcript = Transcript(**record["transcript"])
        return Seat(session, record["exact"], record["pending"], sampler, transcript, steered)


def _ends(pool: SessionPool, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the model's, and the one that ends a message."""
    found = getattr(pool.model.generation_config, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found, getattr(tokenizer, "eos_token_id", None)]
    return {one for one in listed if one is not None}


def _answer(call: Callable[[], Any]) -> str:
    try:
        return json.dumps({"ok": call()})
    except Exception as error:
        return json.dumps({"error": _problem(error)})


def _problem(error: Exception) -> dict[str, Any]:
    """What went wrong, for the server."""
    if isinstance(error, SessionError) and error.limit_tokens is not None:
        return {
            "kind": "too_long", "message": str(error), "tokens": error.tokens, "limit_tokens": error.limit_tokens,
        }  # fmt: skip
    kinds = (
        (PromptError, "invalid"),
        (SessionError, "conflict"),
        (BudgetError, "no_room"),
        (FormatError, "invalid"),
    )
    for kind, name in kinds:
        if isinstance(error, kind):
            return {"kind": name, "message": str(error)}
    traceback.print_exception(error)
    return {"kind": "internal", "message": f"{type(error).__name__}: {error}"}
