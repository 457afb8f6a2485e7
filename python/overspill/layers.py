"""One layer that offloads what it saves: the mechanism of STORM in the open.

:class:`Storm` does this for a whole model and by a plan; here it is for one ``torch.nn.Linear``, with
every step in sight.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ._edge import edge_for
from ._native import Engine

_HOST_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}


@functools.cache
def _engine_for(name: str) -> Engine:
    host_bytes = _HOST_BYTES[name.split(":")[0]]
    on_cpu = name == "cpu"
    return Engine(
        name,
        host_budget_bytes=host_bytes,
        slab_bytes=min(host_bytes, 1 << 30),
        segment_bytes=8 << 20,
        spill_dir=tempfile.gettempdir() if on_cpu else None,
        spill_limit_bytes=(4 << 30) if on_cpu else 0,
        eager_spill=on_cpu,
    )


class StormFunction(torch.autograd.Function):
    """``x @ weight.T + bias`` whose input ``x`` spends the time until backward off the device.

    Forward copies ``x`` away on the offload stream and keeps the slot in ``ctx``; the copy's event is
    in the slot, and the compute stream waits for it before ``x``'s memory is reused. Backward brings
    it back on the onboard stream and makes the compute stream wait for that. Shapes: ``x`` is
    ``(..., in)``, ``weight`` ``(out, in)``, ``bias`` ``(out,)`` or None; one floating dtype for all.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer's output, ``(..., out)``."""
        edge = edge_for(x.device)
        engine = _engine_for(edge.engine_name)
        saved = x.detach().contiguous()
        nbytes = saved.numel() * saved.element_size()
        ctx.engine, ctx.slot, ctx.shape, ctx.has_bias = engine, None, x.shape, bias is not None
        if weight.requires_grad and nbytes > 0:
            ctx.slot = engine.offload(saved.data_ptr(), nbytes, saved, edge.stream())
        ctx.save_for_backward(weight)
        out = torch.nn.functional.linear(x, weight, bias)
        if ctx.slot is not None:
            engine.release_source(ctx.slot, edge.stream())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the input, the weight and the bias."""
        (weight,) = ctx.saved_tensors
        edge = edge_for(grad.device)
        x, onboarding = None, None
        if ctx.slot is not None:
            x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device)
            stream = edge.stream()
            onboarding = ctx.engine.onboard(
                ctx.slot, x.data_ptr(), ctx.slot.nbytes, x, stream, prefetch=False
            )
        grad_x = grad.matmul(weight) if ctx.needs_input_grad[0] else None  # while the copy runs
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = None
        if ctx.needs_input_grad[1] and x is not None and onboarding is not None:
            onboarding.wait(edge.stream())
            grad_weight = rows.t().mm(x.reshape(-1, x.shape[-1]))
        elif ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        grad_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class StormLinear(torch.nn.Linear):
    """``torch.nn.Linear`` that offloads its input until backward; same parameters, same bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output, ``(..., out_features)``."""
        out: torch.Tensor = StormFunction.apply(input, self.weight, self.bias)
        return out
