"""Attention that adds in the same order every time.

cuDNN's forward splits long keys over thread blocks when there are few queries, and what it adds then comes in
no fixed order: a decode step differs from itself from about 500 tokens on. Torch's other kernels repeat
their bits, and torch leaves cuDNN out by itself under ``use_deterministic_algorithms(True)``; sessions do
without it wherever a forward sees earlier tokens.

Of what is left, only the memory-efficient kernel takes a mask, and it gives a head of one query to one
thread block: four times as slow as cuDNN over 2304 tokens. A step at fixed length is two batched products
and a softmax instead, as fast as cuDNN, with scores in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def repeatable_attention(start: int) -> Iterator[None]:
    """Within it, a forward over tokens from ``start`` on. The switch is the process's: other threads lose
    cuDNN's attention meanwhile.
    """
    cuda = torch.backends.cuda
    if start == 0 or not cuda.cudnn_sdp_enabled():
        yield
        return
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(True)


class StepAttention(TorchFunctionMode):
    """Within it, attention of one token under a mask is :func:`step_attention`; all other is torch's."""

    def __init__(self) -> None:
        super().__init__()
        # Masks come again in every layer.
        self._biases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is F.scaled_dot_product_attention and mask is not None:
            query, keys, values = args[:3]
            if is_step(query, keys, mask):
                return step_attention(query, keys, values, self._bias(mask), kwargs.get("scale"))
        return func(*args, **kwargs)

    def _bias(self, mask: torch.Tensor) -> torch.Tensor:
        if id(mask) not in self._biases:
            self._biases[id(mask)] = (mask, to_bias(mask))
        return self._biases[id(mask)][1]


def is_step(query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether this is one token of one sequence, under a mask of truths that all heads share."""
    one = query.shape[0] == query.shape[2] == 1
    return one and mask.dtype == torch.bool and mask.shape == (1, 1, 1, keys.shape[2])


def to_bias(mask: torch.Tensor) -> torch.Tensor:
    """What is added to the scores, in fp32."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))


def step_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attention of ``query`` (1, heads, 1, dim) over ``keys`` and ``values`` (1, heads or a divisor, tokens,
    dim) with ``bias`` (1, 1, 1, tokens). Tokens that it hides must be finite.
    """
    heads, tokens = keys.shape[1:3]
    # Heads that share keys are rows of one.
    rows = query.reshape(heads, query.shape[1] // heads, -1)
    added = bias.view(1, 1, tokens).expand(heads, rows.shape[1], tokens)
    columns, alpha = keys[0].transpose(1, 2), rows.shape[2] ** -0.5 if scale is None else scale
    if query.dtype == torch.float32:
        scores = torch.baddbmm(added, rows, columns, alpha=alpha)
    else:
        scores = torch.baddbmm(added, rows, columns, alpha=alpha, out_dtype=torch.float32)
    weights = torch.softmax(scores, -1).to(values.dtype)
    return torch.bmm(weights, values[0]).view(query.shape)
