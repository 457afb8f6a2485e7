"""Running part of a model: its own forward, with some of its layers passed over.

Nothing of the model is written down again here. To stop after a layer, that layer's forward raises; to
go on from there, the model's forward is called again and the layers that have run hand their input
through, the last of them handing out the hidden state that was kept. Embedding, masks and rotary tables
are made again, from the same tokens and positions, by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stop(Exception):
    """A breakpoint was reached."""

    def __init__(self, layer: int, hidden: torch.Tensor) -> None:
        super().__init__(f"stopped after layer {layer}")
        self.layer = layer
        self.hidden = hidden


@contextmanager
def armed(
    layers: torch.nn.ModuleList,
    done: int,
    hidden: torch.Tensor | None,
    steer: Callable[[int, torch.Tensor], torch.Tensor] | None,
    breaks: Collection[int],
) -> Iterator[None]:
    """Within it, layers up to ``done`` (-1: none) are passed over and the model stops after ``breaks``."""
    for index, layer in enumerate(layers):
        layer.forward = _Replaced(layer.forward, index, done, hidden, steer, index in breaks)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Replaced:
    """Stands in for a layer's forward."""

    def __init__(
        self,
        original: Callable[..., torch.Tensor],
        index: int,
        done: int,
        hidden: torch.Tensor | None,
        steer: Callable[[int, torch.Tensor], torch.Tensor] | None,
        stops: bool,
    ) -> None:
        self.original = original
        self.index = index
        self.done = done
        self.hidden = hidden
        self.steer = steer
        self.stops = stops

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.index <= self.done:
            return self.hidden if self.index == self.done and self.hidden is not None else hidden_states
        hidden = self.original(hidden_states, *args, **kwargs)
        if self.steer is not None:
            hidden = self.steer(self.index, hidden)
        if self.stops:
            raise Stop(self.index, hidden)
        return hidden
