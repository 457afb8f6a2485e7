"""What a turn of a session ends in: logits, tokens, or a pause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import SessionError
from .steering import check_hidden
from .turn import Turn

if TYPE_CHECKING:
    from .session import Session


@dataclass(frozen=True)
class Output:
    """A forward that has ended: ``logits`` of shape (1, tokens, vocabulary)."""

    logits: torch.Tensor


@dataclass(frozen=True)
class Generated:
    """Tokens that were generated, and the logits that the last of them was chosen from."""

    tokens: list[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Ongoing:
    """A session between two tokens: so far it generated ``tokens``, the last of them chosen from ``logits``."""

    tokens: list[int]
    logits: torch.Tensor


class Paused:
    """A session that stands within a forward, after a layer of it."""

    def __init__(self, session: Session, turn: Turn) -> None:
        self.session = session
        self._turn = turn
        self.layer = turn.layer
        self.step = turn.step

    @property
    def generated(self) -> list[int]:
        """The tokens that the turn it stands in generated so far."""
        sampling = self._valid().sampling
        return [] if sampling is None else list(sampling.tokens)

    @property
    def hidden(self) -> torch.Tensor:
        """What the layer put out, of shape (1, tokens, hidden size). May be changed in place."""
        turn = self._valid()
        assert turn.hidden is not None
        turn.hidden = turn.hidden.to(self.session.pool.shape.device)
        return turn.hidden

    @hidden.setter
    def hidden(self, value: torch.Tensor) -> None:
        turn = self._valid()
        check_hidden(value, self.hidden, self.layer, self.session.id, "the hidden state that was set")
        turn.hidden = value.detach()
        turn.hidden_changed = True

    def resume(self) -> Paused | Output | Generated:
        """Goes on; see :meth:`Session.resume`."""
        self._valid()
        return self.session.resume()

    def _valid(self) -> Turn:
        if (
            self.session._turn is not self._turn
            or self._turn.layer != self.layer
            or self._turn.step != self.step
        ):
            message = f"session {self.session.id!r} does not stand after layer {self.layer} any more"
            raise SessionError(message, session=self.session.id, layer=self.layer)
        return self._turn
