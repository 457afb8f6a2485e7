"""Choosing a token, reproducibly for a seed, and saying how likely it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..djinn.turn import Turn
from ..errors import SessionError

# Colder than this, softmax of 32-bit logits overflows; the likeliest token is all that is left long before.
COLDEST = 1e-4
# As OpenAI writes minus infinity.
LEAST_LOGPROB = -9999.0


def likeliest(logits: torch.Tensor) -> tuple[int, float]:
    """The token with the highest logit, the first of several, and that logit; one that is no number comes before all.

    Between two forwards nothing of this is in the processor's caches, and each of torch's operations takes a tenth of
    a millisecond then: where logits can be looked at as they are, it is done without.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        listed = logits.numpy()
        best = int(listed.argmax())
        return best, float(listed[best])
    value, index = logits.max(-1)
    return int(index), float(value)


@dataclass
class Sampler:
    """How the tokens of one answer are chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: share of the probability that is sampled from, the likeliest tokens first.
        logprobs: how many alternatives are told; None: no probabilities at all.
        generator: random numbers of its own.
    """

    temperature: float
    top_p: float
    logprobs: int | None
    generator: torch.Generator

    @classmethod
    def make(cls, temperature: float, top_p: float, seed: int, logprobs: int | None) -> Sampler:
        """A sampler that begins at ``seed``."""
        return cls(temperature, top_p, logprobs, torch.Generator().manual_seed(seed))

    def choose(self, logits: torch.Tensor) -> int:
        """The next token after the one that ``logits`` (vocabulary) are of.

        Raises:
            SessionError: the model gave no numbers to choose by, as it does when it is steered too far.
        """
        best, most = likeliest(logits)
        if not math.isfinite(most):
            raise SessionError("the logits are not finite")
        if self.temperature == 0:
            return best
        scaled = logits.float().cpu() / max(self.temperature, COLDEST)
        probabilities = torch.softmax(scaled, dim=-1)
        if self.top_p >= 1:
            return int(torch.multinomial(probabilities, 1, generator=self.generator))
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(0) - ordered > self.top_p] = 0
        return int(tokens[torch.multinomial(ordered, 1, generator=self.generator)])

    def explain(self, tokenizer: Any, logits: torch.Tensor, token: int) -> dict[str, Any] | None:
        """How likely ``token`` and its alternatives were, where that was asked for."""
        if self.logprobs is None:
            return None
        logprobs = torch.log_softmax(logits.float().cpu(), dim=-1)
        values, tokens = logprobs.topk(min(self.logprobs, len(logprobs)))
        entry = [
            [tokenizer.decode([one]), value]
            for one, value in zip(tokens.tolist(), values.tolist(), strict=True)
        ]
        return {
            "token": tokenizer.decode([token]),
            "logprob": max(float(logprobs[token]), LEAST_LOGPROB),
            "top": [[text, max(value, LEAST_LOGPROB)] for text, value in entry],
        }

    def to_record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        state = Turn.pack(self.generator.get_state())
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.logprobs,
            "state": state,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Sampler:
        """The sampler that :meth:`to_record` wrote."""
        state = Turn.unpack(record["state"], torch.device("cpu"))
        assert state is not None
        generator = torch.Generator()
        generator.set_state(state)
        return cls(record["temperature"], record["top_p"], record["logprobs"], generator)
