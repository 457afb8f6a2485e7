"""Other ways to save activation memory that come with PyTorch and transformers, as ``Blocks.checkpoint`` takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Run = Callable[[torch.Tensor], torch.Tensor]

# Outputs of matmuls and attention are kept, all else is computed again: the policy of PyTorch's own example.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(_context: object, operation: object, *_args: object, **_options: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective(run: Run, hidden: torch.Tensor) -> torch.Tensor:
    """Selective activation checkpointing of one layer."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(run, hidden, use_reentrant=False, context_fn=contexts)


def checkpointing_offload(run: Run, hidden: torch.Tensor) -> torch.Tensor:
    """What ``gradient_checkpointing_enable(offload=True)`` of transformers 5.17 does to a layer."""
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return checkpoint(run, hidden, use_reentrant=False)
