"""Whole models whose weights live packed in host memory or on disk: a layer's weights exist around its forward only.

The unit is a module with large weights of its own (a linear layer, the fused experts of a block). On CUDA its packed
bytes cross the link ahead of time, in the order of the modules, into a ring on the device, and are decoded ahead of
time into another, several units at once. So there is nothing to wait for but the link, and the bytes that cross it
are the packed ones. What of the budget is left after the rings holds packed units, spread over the pass, that need
not cross at all. On the CPU the next unit is decoded on another thread while one computes, and the budget keeps
decoded weights.

A unit that is called out of order is brought at once: slower, counted in ``on_demand``, and the same bits.

Not here: training, weights that two modules share and embeddings (they stay on the device), several devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from . import _native, tpde
from ._checkpoint import PathType
from ._patch import PatchBytes, ordinal
from ._stream_cpu import OnCpu
from ._stream_cuda import OnCuda, pin
from ._stream_units import Task, Unit, Weight, units_of
from ._units import parse_bytes
from .errors import FormatError

GROUP_BYTES = 1 << 30
"""Weights are packed in groups of about this size, so that packing a model does not take it twice."""


class Streamed:
    """A model whose weights are streamed; see :func:`overspill.tpde.stream`."""

    def __init__(
        self,
        model: torch.nn.Module,
        vram_budget: int | str,
        *,
        patch: PathType | PatchBytes | tpde.Patch | None,
        base: Mapping[str, Any] | None,
        device: Any,
        packed: bool,
        reserve: int | str | None,
        on_disk: bool,
    ) -> None:
        self.model = model
        fallback = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(fallback if device is None else device)
        if on_disk and not isinstance(patch, (str, os.PathLike)):
            raise ValueError("on_disk=True needs the path of a patch")
        self.budget_bytes = parse_bytes(vram_budget, "vram_budget")
        left = self.budget_bytes // 16 if reserve is None else parse_bytes(reserve, "reserve")
        self._units = units_of(model)
        self._task = Task(model, self._units, self.device, self.budget_bytes, left, on_disk)
        self._hooks: list[Any] = []
        self._host_bytes = 0
        self._tables: _native.TpdeStreamedPatch | None = None
        opened = patch if isinstance(patch, tpde.Patch) or patch is None else tpde.Patch(patch)
        if opened is not None:
            _check(opened, base)
            self._host_bytes = opened.packed_bytes
        self._keep_rest(opened, base or {})
        self._pack(opened, base, packed)
        self._way: OnCpu | OnCuda = (OnCuda if self.device.type == "cuda" else OnCpu)(self._task)
        for unit in self._units:
            self._hooks.append(unit.module.register_forward_pre_hook(self._before(unit)))
            self._hooks.append(unit.module.register_forward_hook(self._after(unit), always_call=True))

    def _keep_rest(self, patch: tpde.Patch | None, base: Mapping[str, Any]) -> None:
        """Brings everything that is not streamed to the device."""
        streamed = {weight.key for unit in self._units for weight in unit.weights}
        entries = {} if patch is None else {name: i for i, name in enumerate(patch.tensors)}
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(False)
            if key in streamed:
                continue
            if parameter.device.type == "meta" and (patch is None or key not in entries):
                raise ValueError(f"{key!r} is on the meta device and in no patch")
            if patch is not None and key in entries:
                made = patch.decode(key, base.get(key)).to(self.device)
                owner = self.model.get_submodule(key.rpartition(".")[0])
                self._replace(parameter, torch.nn.Parameter(made, requires_grad=False), owner)
            else:
                parameter.data = parameter.data.to(self.device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def _replace(self, old: torch.nn.Parameter, new: torch.nn.Parameter, owner: torch.nn.Module) -> None:
        """Puts one parameter in the place of another, wherever it is."""
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new
        assert all(parameter is not old for parameter in owner._parameters.values())

    def _pack(self, patch: tpde.Patch | None, base: Mapping[str, Any] | None, packed: bool) -> None:
        group: list[Weight] = []
        for unit in self._units:
            for weight in unit.weights:
                parameter = unit.module._parameters[weight.attribute]
                assert parameter is not None
                shell = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                unit.hollow[weight.attribute] = torch.nn.Parameter(shell, requires_grad=False)
                weight.base = None if base is None else base.get(weight.key)
                unit.fill({weight.attribute: unit.hollow[weight.attribute]})
                if patch is None:
                    if parameter.device.type == "meta":
                        raise ValueError(f"{weight.key!r} is on the meta device and there is no patch")
                    weight.host = parameter.data.contiguous()
                group.append(weight)
                if sum(one.nbytes for one in group) >= GROUP_BYTES:
                    self._pack_group(group, patch, packed)
                    group = []
        if group:
            self._pack_group(group, patch, packed)

    def _pack_group(self, group: list[Weight], patch: tpde.Patch | None, packed: bool) -> None:
        """Turns raw words into a patch, or finds them in the one that was given."""
        if patch is None and not packed:
            for weight in group:
                assert weight.host is not None
                weight.host = weight.host.reshape(-1).view(torch.uint8)
                weight.packed_bytes = weight.nbytes
                self._host_bytes += weight.nbytes
            if self.device.type == "cuda":
                pin([(weight, None) for weight in group], self.device)
            return
        own = patch
        if own is None:
            final = {weight.key: weight.host for weight in group}
            start = {weight.key: weight.base for weight in group if weight.base is not None}
            # What a GPU decodes soonest.
            codec: Literal["auto", "gpu"] = "gpu" if self.device.type == "cuda" else "auto"
            data = tpde.pack(start or None, final, codec=codec).data
            assert data is not None
            own = tpde.Patch(data)
            self._host_bytes += own.packed_bytes
        entries = {name: i for i, name in enumerate(own.tensors)}
        kinds = own.bases
        streamed = self._tables
        if self.device.type == "cuda" and streamed is None:
            streamed = _native.TpdeStreamedPatch(own._native, ordinal(self.device))
        # One patch for all weights has one set of tables.
        self._tables = None if patch is None else streamed
        for weight in group:
            if weight.key not in entries or own.tensors[weight.key].bytes != weight.nbytes:
                raise ValueError(f"the patch makes no {weight.key!r} of {weight.nbytes} bytes")
            if kinds[weight.key] != "none" and weight.base is None:
                raise ValueError(f"{weight.key!r} starts from a base of {kinds[weight.key]}, none was given")
            weight.patch, weight.entry, weight.streamed = own, entries[weight.key], streamed
            weight.host = None
            if streamed is not None:
                weight.start, weight.packed_bytes = streamed.payload(weight.entry)
            if kinds[weight.key] == "none":
                weight.base = None
            elif weight.base is not None:
                weight.base = weight.base.to(self.device)
        if streamed is not None and not self._task.on_disk:
            pin([(weight, own) for weight in group], self.device)
            for weight in group:
                weight.patch = None  # its bytes are in page-locked memory now

    def _before(self, unit: Unit) -> Any:
        def fill(_module: torch.nn.Module, _args: Any) -> None:
            unit.fill(self._way.bring(unit))

        return fill

    def _after(self, unit: Unit) -> Any:
        def empty(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
            unit.fill(unit.hollow)
            self._way.used(unit)

        return empty

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every streamed weight in turn, on the device, valid until the next."""
        for unit in self._units:
            made = self._way.bring(unit)
            for weight in unit.weights:
                yield weight.key, made[weight.attribute].data
            self._way.used(unit)

    def report(self) -> dict[str, int]:
        """Bytes: raw and packed, resident, in the ring, in the buffer; bytes that crossed; units out of order."""
        return {
            "raw_bytes": sum(unit.raw_bytes for unit in self._units),
            "packed_bytes": self._host_bytes,
            "units": len(self._units),
            **self._way.report(),
            **self._task.counts,
        }

    def close(self) -> torch.nn.Module:
        """Gives the model its weights back, on the CPU, and ends the streaming."""
        whole = {key: tensor.cpu().clone() for key, tensor in self.weights()}
        for hook in self._hooks:
            hook.remove()
        self._way.close()
        for unit in self._units:
            back = {w.attribute: torch.nn.Parameter(whole[w.key], requires_grad=False) for w in unit.weights}
            unit.fill(back)
        self._units = []
        return self.model.cpu()


def _check(patch: tpde.Patch, base: Mapping[str, Any] | None) -> None:
    """That a patch is what was packed, and that the base is the one it starts from."""
    patch.authenticate()
    if patch.kind == "standalone":
        return
    found = tpde.state_id(base) if base else None
    if found != patch.base_id:
        raise FormatError("wrong base for a patch", expected_state=patch.base_id, found_state=found)
