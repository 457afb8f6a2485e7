"""Chains for ``transformers.Trainer``: checkpoints every few steps, while training goes on.

::

    from overspill.chain_callback import ChainCallback

    saver = ChainCallback("run.chain", every=50)
    Trainer(..., callbacks=[saver]).train()

    Trainer(...).train(resume_from_checkpoint=saver.checkpoint(step=150, folder="resume"))

A step holds what Trainer's own checkpoint holds: weights, optimizer, scheduler, random state, trainer state; so a
resumed run continues bit for bit where a run resumed from Trainer's checkpoint would.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback

from ._chain import MOMENTS, Chain
from ._checkpoint import PathType

REST = "rest"
_TENSOR = "overspill tensor "


class ChainCallback(TrainerCallback):
    """Commits a step every ``every`` optimizer steps, and the last one, to the chain in ``folder``.

    The tensors are copied to host memory (pinned, from a GPU); encoding and writing overlap the steps that follow.
    One process only: sharded states have other savers.
    """

    def __init__(self, folder: PathType, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"every {every}th step is none")
        self.chain = Chain(folder)
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commits the step if it is its turn."""
        if args.world_size > 1:
            raise ValueError(f"ChainCallback saves one process's state, this run has {args.world_size}")
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._commit(state, kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits until the last step is durable."""
        self.chain.wait()

    def _commit(self, state: Any, model: torch.nn.Module, optimizer: Any, scheduler: Any) -> None:
        tensors: dict[str, torch.Tensor] = {}
        skeleton = _take_tensors(optimizer.state_dict(), "", tensors)
        rng = {
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.random.get_rng_state()
        rest = {
            "optimizer.skeleton": _saved(skeleton),
            "scheduler.pt": _saved(scheduler.state_dict()),
            "rng_state.pth": _saved(rng),
            "trainer_state.json": _bytes(_state_json(state).encode()),
        }
        self.chain.commit_later(state.global_step, model.state_dict(), tensors, others={REST: rest})

    def checkpoint(self, folder: PathType, step: int | None = None) -> str:
        """Writes the checkpoint of ``step`` (the newest if None) as Trainer would have, into ``folder``; returns it."""
        self.chain.wait()
        log = self.chain.log()
        if not log:
            raise ValueError("the chain is empty")
        step = log[-1].step if step is None else step
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self.chain.restore(step, place / "model.safetensors")
        rest = self.chain.restore(step, part=REST)
        skeleton = torch.load(io.BytesIO(_raw(rest.pop("optimizer.skeleton"))), weights_only=True)
        tensors = self.chain.restore(step, part=MOMENTS)
        torch.save(_put_tensors(skeleton, tensors), place / "optimizer.pt")
        for name, content in rest.items():
            (place / name).write_bytes(_raw(content))
        return str(place)


def _state_json(state: Any) -> str:
    """What ``TrainerState.save_to_json`` writes."""
    return json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"


def _take_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` with a name in the place of every tensor, which goes to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return _TENSOR + path
    if isinstance(value, Mapping):
        return {key: _take_tensors(item, f"{path}.{key}".strip("."), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take_tensors(item, f"{path}.{n}", tensors) for n, item in enumerate(value))
    return value


def _put_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of :func:`_take_tensors`."""
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, Mapping):
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_put_tensors(item, tensors) for item in value)
    return value


def _saved(value: Any) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(value, file)
    return _bytes(file.getvalue())


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy())
