"""Layers whose weight exists only around its matmul.

The base of a weight, if it has one, stays on the device; what it lacks to the exact weight lies packed in host
memory. A forward rebuilds the weight, multiplies and lets it go; a backward rebuilds it again. While a layer
computes, a thread of the process's own prepares the next one of its chain: on the CPU its weight, on CUDA its packed
bytes in device memory, of which kernels then make the weight.

Not here: gradients of the weight (it is frozen), weights that several layers share, and more than one layer ahead.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import tpde
from ._patch import DevicePatch
from .errors import FormatError

__all__ = ["JITCompressedLinear"]


@functools.cache
def _preparer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="overspill-jit")


class _Multiply(torch.autograd.Function):
    """``x @ weight.T + bias`` that saves neither ``x`` nor the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: JITCompressedLinear
    ) -> torch.Tensor:
        ctx.layer = layer
        weight = layer.weight(x.device)
        layer._prepare_next(x.device)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x = grad.matmul(ctx.layer.weight(grad.device)) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class JITCompressedLinear(torch.nn.Module):
    """``torch.nn.Linear`` with a packed, frozen weight; the same outputs bit for bit.

    Args:
        patch: of one tensor, ``weight``, of shape ``(out, in)``.
        base: what the patch starts from, resident where the layer computes: a tensor, or 4- or 8-bit blocks
            (:func:`overspill.tpde.quantize`), from which the exact weight is made all the same; None if it stands alone.
        bias: as in ``torch.nn.Linear``.
    """

    base: torch.Tensor | None

    def __init__(
        self,
        patch: bytes,
        base: torch.Tensor | tpde.Quantized | None = None,
        bias: torch.nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self._blocks = None if not isinstance(base, tpde.Quantized) else (base.layout, base.dtype, base.shape)
        self.register_buffer("base", base.blocks if isinstance(base, tpde.Quantized) else base)
        self.register_parameter("bias", bias)
        self._ahead: list[Future[tuple[torch.device, Any]]] = []
        self._next: list[JITCompressedLinear] = []  # in a list, so that it is no submodule
        self._open(patch)

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, base: torch.Tensor | tpde.Quantized | None = None
    ) -> JITCompressedLinear:
        """Packs a layer's weight against ``base``, of the same shape and dtype, or alone."""
        weight = linear.weight.detach()
        if base is not None and (tuple(base.shape) != tuple(weight.shape) or base.dtype != weight.dtype):
            raise ValueError(
                f"a base of {base.dtype} {tuple(base.shape)} for {weight.dtype} {tuple(weight.shape)}"
            )
        kept = base.detach().contiguous() if isinstance(base, torch.Tensor) else base
        packed = tpde.pack(None if kept is None else {"weight": kept}, {"weight": weight})
        assert isinstance(packed.data, bytes)
        return cls(packed.data, kept, linear.bias)

    @staticmethod
    def chain(model: torch.nn.Module) -> list[JITCompressedLinear]:
        """Makes every such layer of a model prepare the one after it, in the order of ``modules()``."""
        layers = [module for module in model.modules() if isinstance(module, JITCompressedLinear)]
        for layer, following in zip(layers, layers[1:] + layers[:1], strict=True):
            layer._next = [following] if following is not layer else []
        return layers

    @property
    def packed_bytes(self) -> int:
        """Host memory of the packed weight."""
        return len(self._bytes)

    def weight(self, device: torch.device) -> torch.Tensor:
        """The weight, rebuilt; ``device`` is where the base is."""
        ahead = self._ahead.pop().result() if self._ahead else None
        if ahead is None or ahead[0] != device:
            ahead = self._prepare(device)
        made: torch.Tensor = ahead[1] if device.type == "cpu" else self._decode(ahead[1], device)
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output, ``(..., out)``."""
        out: torch.Tensor = _Multiply.apply(input, self.bias, self)
        return out

    def get_extra_state(self) -> torch.Tensor:
        """The packed weight, for ``state_dict``."""
        return torch.frombuffer(bytearray(self._bytes), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Takes a packed weight from a ``state_dict``."""
        self._open(bytes(state.cpu().numpy()))

    def extra_repr(self) -> str:
        """Shape and sizes."""
        rows, columns = self._info.shape
        return f"in_features={columns}, out_features={rows}, packed_bytes={self.packed_bytes}"

    def _open(self, patch: bytes) -> None:
        opened = tpde.Patch(patch)
        if list(opened.tensors) != ["weight"]:
            raise ValueError(f"a patch of {list(opened.tensors)}, not of a weight alone")
        self._bytes, self._patch, self._info = patch, opened, opened.tensors["weight"]
        self._ahead.clear()
        self._known_base: tuple[int, int, torch.dtype] | None = None

    def _prepare(self, device: torch.device) -> tuple[torch.device, Any]:
        """The weight on the CPU, or the patch on CUDA, without a look at anything that may change meanwhile."""
        if device.type == "cuda":
            return device, DevicePatch(self._patch, device)
        base = self._checked_base(device)
        state = None if base is None else {"weight": self._described(base)}
        return device, self._patch.apply(state, base_id=self._patch.base_id, threads=1)["weight"]

    def _described(self, base: torch.Tensor) -> Any:
        return base if self._blocks is None else tpde.Quantized(*self._blocks, base)

    def _prepare_next(self, device: torch.device) -> None:
        for layer in self._next:
            if not layer._ahead:
                layer._ahead.append(_preparer().submit(layer._prepare, device))

    def _decode(self, prepared: Any, device: torch.device) -> torch.Tensor:
        base = self._checked_base(device)
        made: torch.Tensor = prepared.apply({} if base is None else {"weight": base})["weight"]
        return made

    def _checked_base(self, device: torch.device) -> torch.Tensor | None:
        """The base; hashed when it is first used and after every write that autograd sees."""
        if self.base is None:
            return None
        if self.base.device != device:
            raise ValueError(f"the base is on {self.base.device}, the input on {device}")
        found = (self.base.data_ptr(), self.base._version, self.base.dtype)
        if found != self._known_base:
            state = tpde.state_id({"weight": self._described(self.base)})
            if state != self._patch.base_id:
                raise FormatError(
                    "wrong base for a packed weight", expected_state=self._patch.base_id, found_state=state
                )
            self._known_base = found
        return self.base
