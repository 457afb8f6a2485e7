"""Attention of a step at fixed length: two products and a softmax."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from overspill.djinn.attention import is_step, repeatable_attention, step_attention, to_bias

TOKENS = 512


def inputs(heads: int, seen: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, keys and values as a slab holds them, mask: 4 heads of 16 over ``heads`` heads of keys."""
    generator = torch.Generator().manual_seed(seen)
    query = torch.randn(1, 1, 4, 16, generator=generator).to(dtype).transpose(1, 2)
    keys, values = (
        torch.randn(1, TOKENS, heads, 16, generator=generator).to(dtype).transpose(1, 2) for _ in range(2)
    )
    return query, keys, values, (torch.arange(TOKENS) < seen).view(1, 1, 1, TOKENS)


@pytest.mark.parametrize("seen", [1, 100, 512])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_it_is_attention_and_hidden_tokens_weigh_nothing(heads: int, seen: int) -> None:
    """Another order of the same sums as torch's: as near as fp32 is. Hidden tokens: not a bit."""
    query, keys, values, mask = inputs(heads, seen, torch.float32)
    found = step_attention(query, keys, values, to_bias(mask), 0.3)
    doubles = (query.double(), keys.double(), values.double())
    expected = F.scaled_dot_product_attention(*doubles, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5)
    keys[:, :, seen:] = 3e4
    values[:, :, seen:] = -3e4
    assert torch.equal(step_attention(query, keys, values, to_bias(mask), 0.3), found)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> Any:
    """As a layer of transformers' does."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](
        torch.nn.Module(), query, keys, values, mask, dropout=0.0, scaling=0.3
    )[0]


def test_a_masked_step_of_this_thread_takes_it() -> None:
    query, keys, values, mask = inputs(4, 100, torch.float32)
    before, found = attend(query, keys, values, mask), []
    with repeatable_attention(TOKENS, step=True):
        found.append(attend(query, keys, values, mask))
        other = threading.Thread(target=lambda: found.append(attend(query, keys, values, mask)))
        other.start()
        other.join()
    expected = step_attention(query, keys, values, to_bias(mask), 0.3).transpose(1, 2)
    assert torch.equal(found[0], expected) and found[0].shape == before.shape
    assert torch.equal(found[1], before) and torch.equal(attend(query, keys, values, mask), before)
    assert not torch.equal(expected, before), "other sums, other bits"


@pytest.mark.parametrize("change", ["two tokens", "no mask", "a mask that is added", "masks of heads"])
def test_what_is_not_a_masked_step_is_torchs(change: str) -> None:
    query, keys, values, mask = inputs(4, 100, torch.float32)
    if change == "two tokens":
        query = query.expand(1, 4, 2, 16)
    changed = {
        "no mask": None, "a mask that is added": to_bias(mask), "masks of heads": mask.expand(1, 4, 1, -1)
    }  # fmt: skip
    given = changed.get(change, mask)
    assert given is None or not is_step(query, keys, given)
    expected = attend(query, keys, values, given)
    with repeatable_attention(TOKENS, step=True):
        assert torch.equal(attend(query, keys, values, given), expected)


def test_threads_within_keep_cudnn_off_until_the_last_one_leaves() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before, inside, leave = ALL_ATTENTION_FUNCTIONS["sdpa"], threading.Event(), threading.Event()

    def stay() -> None:
        with repeatable_attention(1, step=False):
            inside.set()
            leave.wait()

    other = threading.Thread(target=stay)
    with repeatable_attention(1, step=True):
        other.start()
        inside.wait()
    assert not enabled()
    leave.set()
    other.join()
    assert enabled() and ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    with repeatable_attention(0, step=False):
        assert enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [4, 2])
def test_on_a_gpu_it_repeats_its_bits(heads: int, dtype: torch.dtype) -> None:
    query, keys, values, mask = (part.cuda() for part in inputs(heads, 400, dtype))
    found = [step_attention(query, keys, values, to_bias(mask), None) for _ in range(50)]
    assert all(torch.equal(one, found[0]) for one in found)
    doubles = (query.double(), keys.double(), values.double())
    expected = F.scaled_dot_product_attention(*doubles, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(found[0].double(), expected, rtol=0, atol=1e-2)
