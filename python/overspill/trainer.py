"""STORM in ``transformers.Trainer`` (and what is built on it: TRL, peft), as a callback.

    Trainer(model, args, train_dataset=data, callbacks=[StormCallback(vram_budget="12GiB")])

The context is open from the first step to the last. This module needs transformers, the rest of
overspill does not. A loop of one's own, with accelerate or without, needs no more than ``with Storm(model)``
around it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .storm import Storm


class StormCallback(TrainerCallback):
    """Trains under a memory budget; takes what :class:`overspill.Storm` takes after the model.

    If training ends by an exception, ``close()`` ends the context; a new training run does so too.
    """

    def __init__(self, vram_budget: int | str | None = None, **options: Any) -> None:
        self._options = {"vram_budget": vram_budget, **options}
        self._is_open = False
        self.storm: Storm | None = None
        """The context of the last training run, for its report; None before the first."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Opens the context: the model is where it is trained by now."""
        self.close()
        assert model is not None
        self.storm = Storm(model, **self._options)
        self.storm.__enter__()
        self._is_open = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Ends the context if it is open."""
        if self._is_open and self.storm is not None:
            self._is_open = False
            self.storm.__exit__(None, None, None)
            self.storm.close()
