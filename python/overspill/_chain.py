"""Chains of checkpoints: every step of a training run in one folder, restored bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from . import _native, tpde
from ._checkpoint import DEFAULT_MEMORY_BYTES, PathType, Progress, Source, StateDict

PARAMS, MOMENTS = "params", "moments"


@dataclass(frozen=True)
class ChainPart:
    """A part of a step: what it is in the chain and what it added to it."""

    role: str
    state_id: str
    raw_bytes: int
    new_bytes: int


@dataclass(frozen=True)
class ChainStep:
    """A committed step."""

    step: int
    committed_s: int
    parts: dict[str, ChainPart]


def _step(fields: tuple[int, int, list[tuple[str, str, str, int, int]]]) -> ChainStep:
    step, committed_s, parts = fields
    return ChainStep(step, committed_s, {part[0]: ChainPart(*part[1:]) for part in parts})


class Chain:
    """The chain in ``folder``, made where there is none (unless ``create`` is False).

    A step is stored as a patch to an anchor, an anchor as a patch to a keyframe; any step is there after two
    applications, and a commit is there whole or not at all, whatever happens to the process::

        chain = tpde.Chain("run.chain")
        chain.commit(100, model.state_dict())
        state = chain.restore(100)

    States are paths or state dicts, as everywhere in :mod:`overspill.tpde`.

    Raises:
        FormatError: the folder holds no chain, or a damaged one.
        TransferError: the disk refuses, or another process writes to the chain.
        ValueError: a step that is out of order, unknown, or there with another state.
    """

    def __init__(
        self,
        folder: PathType,
        *,
        create: bool = True,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        threads: int = 0,
    ) -> None:
        self._limits: dict[str, Any] = {"memory_bytes": memory_bytes, "threads": threads}
        self._native = _native.TpdeChain(os.fspath(folder), create=create, **self._limits)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="overspill-chain")
        self._pending: Future[ChainStep] | None = None
        self._snapshots: dict[tuple[str, str], Any] = {}

    def commit(
        self,
        step: int,
        params: PathType | StateDict,
        moments: PathType | StateDict | None = None,
        *,
        others: Mapping[str, StateDict] | None = None,
        progress: Progress | None = None,
    ) -> ChainStep:
        """Adds a step; when this returns it is durable. ``moments``, and ``others`` by name, are kept and counted apart."""
        self.wait()
        return self._commit(step, {PARAMS: params, MOMENTS: moments, **(others or {})}, progress)

    def commit_later(
        self,
        step: int,
        params: StateDict,
        moments: StateDict | None = None,
        *,
        others: Mapping[str, StateDict] | None = None,
        progress: Progress | None = None,
    ) -> Future[ChainStep]:
        """As :meth:`commit`, but returns once the tensors are copied (to pinned memory from a GPU): the training may go
        on and change them. Encoding and writing follow on a thread; one commit at a time, the next waits for it.
        """
        self.wait()
        parts = {PARAMS: params, MOMENTS: moments, **(others or {})}
        copied = {name: self._snapshot(name, state) for name, state in parts.items() if state is not None}
        _finish_copies(copied)
        self._pending = self._worker.submit(self._commit, step, copied, progress)
        return self._pending

    def wait(self) -> ChainStep | None:
        """Waits for the last :meth:`commit_later` and raises what it raised."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def _commit(self, step: int, parts: Mapping[str, Any], progress: Progress | None) -> ChainStep:
        sources = {name: Source(state) for name, state in parts.items() if state is not None}
        named = [(name, source.native) for name, source in sources.items() if source.native is not None]
        return _step(self._native.commit(step, named, progress=progress))

    def _snapshot(self, part: str, state: StateDict) -> dict[str, Any]:
        """Copies of a state's tensors in host memory of the chain's own, used again by the next commit."""
        import torch

        copies = {}
        for name, value in state.items():
            tensor = torch.as_tensor(value).detach()
            old = self._snapshots.get((part, name))
            if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
                old = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._snapshots[(part, name)] = old
            copies[name] = old.copy_(tensor, non_blocking=True)
        return copies

    def log(self) -> list[ChainStep]:
        """Every step, in order."""
        return [_step(fields) for fields in self._native.log()]

    def restore(
        self,
        step: int | None = None,
        output: PathType | None = None,
        *,
        part: str = PARAMS,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """The state dict of a step (the newest if None), or the checkpoint ``output`` (then the dict is empty)."""
        self.wait()
        if step is None:
            log = self._native.log()
            if not log:
                raise ValueError("the chain is empty")
            step = log[-1][0]
        if output is not None:
            self._native.restore(step, part, os.fspath(output), progress=progress)
            return {}
        keyframe, anchor, patch, base_id = self._native.route(step, part)
        if anchor is None:
            return tpde.apply(patch, keyframe, progress=progress, **self._limits)
        base = tpde.apply(anchor, keyframe, **self._limits)
        return tpde.apply(patch, base, base_id=base_id, progress=progress, **self._limits)

    def verify(self, *, decode: bool = False, progress: Progress | None = None) -> int:
        """Checks every byte (and with ``decode`` every step); returns how many steps there are."""
        return self._native.verify(decode=decode, progress=progress)[0]

    def gc(
        self, *, last: int | None = None, every: int | None = None, after: int | None = None
    ) -> tuple[list[int], int]:
        """Keeps the newest ``last`` steps and multiples of ``every`` (all, if neither is given), nothing after step
        ``after``, and removes what no step needs. Returns the steps dropped and the bytes freed.
        """
        self.wait()
        steps, _, freed = self._native.gc(last=last, every=every, after=after)
        return steps, freed


def _finish_copies(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Waits for the copies to pinned memory."""
    import torch

    if any(tensor.is_pinned() for part in parts.values() for tensor in part.values()):
        torch.cuda.current_stream().synchronize()
