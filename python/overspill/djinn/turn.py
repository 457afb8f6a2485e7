"""A turn of a session as plain data, which can be written down and outlive the process."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .steering import tensor_bytes


@dataclass(frozen=True)
class Break:
    """Stop after layer ``layer`` of forward ``step`` of the call (0: over the ids; k: of the k-th new token)."""

    layer: int
    step: int = 0


@dataclass
class Sampling:
    """How tokens are chosen, and what is left to choose."""

    temperature: float
    generator: torch.Generator
    remaining: int
    ends: list[int]
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def make(cls, temperature: float, seed: int, remaining: int, ends: Sequence[int]) -> Sampling:
        """A sampler with a random state of its own."""
        return cls(temperature, torch.Generator().manual_seed(seed), remaining, list(ends))

    def choose(self, logits: torch.Tensor) -> int:
        """The next token after the one that ``logits`` are of."""
        token = self.pick(logits) if self.temperature > 0 else int(logits.argmax())
        self.took([token])
        return token

    def pick(self, logits: torch.Tensor) -> int:
        """A token at random, which is not counted yet."""
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def took(self, tokens: list[int]) -> None:
        """Counts tokens that were chosen."""
        self.tokens += tokens
        self.remaining -= len(tokens)

    def is_over(self) -> bool:
        """Whether nothing is left to choose."""
        return self.remaining == 0 or (bool(self.tokens) and self.tokens[-1] in self.ends)

    def copy(self) -> Sampling:
        """The same, to go on from here independently."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return replace(self, generator=generator, ends=list(self.ends), tokens=list(self.tokens))


@dataclass
class Turn:
    """A forward that is running or paused, and what comes after it."""

    ids: list[int]
    breaks: list[Break]
    keep: int
    step: int = 0
    layer: int = -1
    hidden: torch.Tensor | None = None
    hidden_version: int = 0
    hidden_changed: bool = False
    sampling: Sampling | None = None

    def stop(self, layer: int, hidden: torch.Tensor) -> None:
        """Stands still after ``layer``."""
        self.layer, self.hidden = layer, hidden
        self.hidden_version, self.hidden_changed = hidden._version, False

    def follow(self, token: int) -> None:
        """Goes on to the forward over ``token``."""
        self.ids, self.layer, self.hidden, self.step = [token], -1, None, self.step + 1

    def next_stop(self) -> int:
        """The layer at which the running forward will stop; -1: at none."""
        return min((one.layer for one in self._ahead() if one.step == self.step), default=-1)

    def steps_free(self, most: int) -> int:
        """Forwards, ``most`` at most, before the one that stops."""
        return min([most, *(one.step - self.step for one in self._ahead())])

    def _ahead(self) -> list[Break]:
        return [
            one for one in self.breaks
            if one.step > self.step or (one.step == self.step and one.layer > self.layer)
        ]  # fmt: skip

    def copy(self) -> Turn:
        """The same for a fork."""
        hidden = None if self.hidden is None else self.hidden.clone()
        changed = self.hidden_changed or (
            self.hidden is not None and self.hidden._version != self.hidden_version
        )
        sampling = None if self.sampling is None else self.sampling.copy()
        return replace(
            self, ids=list(self.ids), breaks=list(self.breaks), sampling=sampling, hidden=hidden,
            hidden_changed=changed, hidden_version=0 if hidden is None else hidden._version,
        )  # fmt: skip

    def to_record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        sampling = None
        if self.sampling is not None:
            sampling = {
                "temperature": self.sampling.temperature,
                "generator": self.pack(self.sampling.generator.get_state()),
                "remaining": self.sampling.remaining,
                "ends": self.sampling.ends,
                "tokens": self.sampling.tokens,
            }
        return {
            "ids": self.ids,
            "breaks": [[one.layer, one.step] for one in self.breaks],
            "keep": self.keep,
            "step": self.step,
            "layer": self.layer,
            "hidden": self.pack(self.hidden),
            "hidden_changed": self.hidden_changed
            or (self.hidden is not None and self.hidden._version != self.hidden_version),
            "sampling": sampling,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any], device: torch.device) -> Turn:
        """The turn that :meth:`to_record` wrote."""
        sampling = None
        if record["sampling"] is not None:
            found = dict(record["sampling"])
            state = cls.unpack(found.pop("generator"), torch.device("cpu"))
            assert state is not None
            generator = torch.Generator()
            generator.set_state(state)
            sampling = Sampling(generator=generator, **found)
        hidden = cls.unpack(record["hidden"], device)
        return cls(
            record["ids"], [Break(*one) for one in record["breaks"]], record["keep"], record["step"],
            record["layer"], hidden, 0 if hidden is None else hidden._version, record["hidden_changed"], sampling,
        )  # fmt: skip

    @staticmethod
    def pack(tensor: torch.Tensor | None) -> list | None:
        """A tensor as JSON can hold it, bit for bit."""
        if tensor is None:
            return None
        dtype = str(tensor.dtype).removeprefix("torch.")
        return [dtype, list(tensor.shape), base64.b64encode(tensor_bytes(tensor)).decode()]

    @staticmethod
    def unpack(packed: list | None, device: torch.device) -> torch.Tensor | None:
        """The tensor that :meth:`pack` packed."""
        if packed is None:
            return None
        dtype, shape, text = packed
        flat = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=getattr(torch, dtype))
        return flat.view(shape).to(device)
