"""Interventions on the hidden state of a session, and the hash that tells which ones it had."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import SessionError

Steer = Callable[[torch.Tensor], "torch.Tensor | None"]


@dataclass
class Intervention:
    """Something done to what a layer puts out, at every token from when it was added."""

    layer: int
    name: str
    vector: torch.Tensor | None
    function: Steer | None

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the next layer gets instead."""
        if self.vector is not None:
            return hidden + self.vector.to(hidden.device)
        assert self.function is not None
        steered = self.function(hidden)
        return hidden if steered is None else steered


@dataclass
class Steering:
    """The interventions of one session, and the hash over all that it ever had."""

    interventions: list[Intervention] = field(default_factory=list)
    hash: str = ""

    def add(self, intervention: Intervention, tokens: int) -> None:
        """Adds one, from token ``tokens`` on."""
        self.interventions.append(intervention)
        self.note("add", intervention.layer, intervention.name, tokens, intervention.vector)

    def remove(self, name: str, tokens: int) -> None:
        """Ends the ones of this name."""
        kept = [one for one in self.interventions if one.name != name]
        if len(kept) == len(self.interventions):
            raise SessionError(f"there is no intervention called {name!r}")
        self.interventions = kept
        self.note("remove", -1, name, tokens, None)

    def note(self, what: str, layer: int, name: str, tokens: int, values: torch.Tensor | None) -> None:
        """Enters an event into the hash."""
        digest = hashlib.sha256(f"{self.hash}/{what}/{layer}/{name}/{tokens}/".encode())
        if values is not None:
            digest.update(tensor_bytes(values))
        self.hash = digest.hexdigest()

    def apply(self, layer: int, hidden: torch.Tensor, session: Any) -> torch.Tensor:
        """``hidden`` after the interventions at ``layer``."""
        for one in self.interventions:
            if one.layer == layer:
                steered = one.apply(hidden)
                check_hidden(steered, hidden, layer, session, f"intervention {one.name!r}")
                hidden = steered
        return hidden

    def copy(self) -> Steering:
        """The same for a fork."""
        return Steering(list(self.interventions), self.hash)


def check_hidden(found: Any, like: torch.Tensor, layer: int, session: Any, who: str) -> None:
    """Refuses what a layer cannot take.

    Raises:
        SessionError: not a tensor, of another shape, dtype or device, or with a NaN in it.
    """
    facts = {"session": session, "layer": layer}
    if not isinstance(found, torch.Tensor):
        raise SessionError(f"{who} at layer {layer} gave {type(found).__name__}, not a tensor", **facts)
    for what in ("shape", "dtype", "device"):
        is_now, was = getattr(found, what), getattr(like, what)
        if is_now != was:
            message = f"{who} at layer {layer} gave a hidden state of {what} {is_now}; it was {was}"
            raise SessionError(message, **facts)
    if bool(torch.isnan(found).any()):
        raise SessionError(f"{who} at layer {layer} gave NaN", **facts)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Every bit of a tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
