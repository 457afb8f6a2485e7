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

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from .batch import Rows

# Masks that the layers of a step on this thread share, with what is added for them; None outside a step.
Biases = dict[int, tuple[torch.Tensor, torch.Tensor]]
_thread = threading.local()


class _Switch:
    """Something of the whole process's that is put aside while any thread is within."""

    def __init__(self, put_aside: Callable[[], Any], put_back: Callable[[Any], None]) -> None:
        self.lock = threading.Lock()
        self.within = 0
        self.put_aside = put_aside
        self.put_back = put_back
        self.before: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if self.within == 0:
                self.before = self.put_aside()
            self.within += 1

    def __exit__(self, *raised: object) -> None:
        with self.lock:
            self.within -= 1
            if self.within == 0:
                self.put_back(self.before)


def _without_cudnn() -> bool:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    return before


def _with_step_attention() -> Any:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    return before


_cudnn = _Switch(_without_cudnn, torch.backends.cuda.enable_cudnn_sdp)
_sdpa = _Switch(_with_step_attention, lambda before: ALL_ATTENTION_FUNCTIONS.update(sdpa=before))


@contextmanager
def repeatable_attention(start: int, step: bool) -> Iterator[None]:
    """Within it, a forward over tokens from ``start`` on, or one ``step`` at fixed length: then one token under
    a mask takes :func:`step_attention`. Other threads lose cuDNN's attention meanwhile, and nothing else.
    """
    if start == 0:
        yield
    elif not step:
        with _cudnn:
            yield
    else:
        with _cudnn, _sdpa:
            _thread.biases = {}
            try:
                yield
            finally:
                _thread.biases = None


@contextmanager
def batch_attention(rows: Rows) -> Iterator[None]:
    """Within it, layers of a forward of this thread attend as ``rows`` of a batch do."""
    with _cudnn, _sdpa:
        _thread.rows = rows
        try:
            yield
        finally:
            _thread.rows = None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What layers call for "sdpa" while a thread is in a step."""
    rows: Rows | None = getattr(_thread, "rows", None)
    if rows is not None:
        return rows.attend(_sdpa.before, module, query, scaling=scaling, **others), None
    biases: Biases | None = getattr(_thread, "biases", None)
    plain = not others.get("dropout") and others.get("position_bias") is None
    if biases is None or not plain or attention_mask is None or not is_step(query, key, attention_mask):
        return _sdpa.before(module, query, key, value, attention_mask, scaling=scaling, **others)
    if id(attention_mask) not in biases:
        biases[id(attention_mask)] = (attention_mask, to_bias(attention_mask))
    out = step_attention(query, key, value, biases[id(attention_mask)][1], scaling)
    return out.transpose(1, 2), None


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
