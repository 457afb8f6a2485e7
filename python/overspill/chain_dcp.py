"""Chains for ``torch.distributed.checkpoint``: sharded states, a chain a rank.

::

    import torch.distributed.checkpoint as dcp
    from overspill.chain_dcp import ChainReader, ChainWriter

    dcp.save(state_dict, storage_writer=ChainWriter("run.chain", step=100))
    dcp.load(state_dict, storage_reader=ChainReader("run.chain", step=100))

The folder holds a chain for every rank's own shards and one for the metadata, which the coordinator commits last: a step
whose metadata is there is complete. DCP's metadata is a pickle, as in DCP's own files: load chains that you trust.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ._chain import MOMENTS, PARAMS, Chain
from ._checkpoint import PathType

_METADATA = "metadata"
_OPTIMIZERS = ("optim", "optimizer", "optimizers")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an item lies: the rank whose chain holds it, the part, and its name there."""

    rank: int
    part: str
    name: str


def _part_of(fqn: str) -> str:
    return MOMENTS if fqn.split(".")[0] in _OPTIMIZERS else PARAMS


def _name_of(index: MetadataIndex) -> str:
    offset = ",".join(map(str, index.offset)) if index.offset is not None else ""
    return f"{index.fqn}@{offset}"


def _chain(folder: Path, name: str, *, create: bool) -> Chain:
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    return Chain(folder / name, create=create)


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05}"


def _done(value: Any) -> Any:
    future: Any = Future()
    future.set_result(value)
    return future


class ChainWriter(StorageWriter):
    """Commits what DCP saves as ``step`` of the chains in ``folder``, which every rank reaches."""

    def __init__(self, folder: PathType, step: int) -> None:
        self.folder, self.step = Path(folder), step
        self.rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is for one step; nothing to forget."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Every rank writes its own chain."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As planned."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Commits this rank's items; durable when the future, already done, is returned."""
        parts: dict[str, dict[str, torch.Tensor]] = {PARAMS: {}, MOMENTS: {}}
        results = []
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                content = cast(io.BytesIO, data).getvalue()
                tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            else:
                tensor = cast(torch.Tensor, data).detach()
            place = _Place(self.rank, _part_of(item.index.fqn), _name_of(item.index))
            parts[place.part][place.name] = tensor
            results.append(WriteResult(index=item.index, size_in_bytes=tensor.nbytes, storage_data=place))
        filled = {name: state for name, state in parts.items() if state}
        if filled:
            chain = _chain(self.folder, _rank_name(self.rank), create=True)
            chain.commit(self.step, filled.pop(PARAMS, {}), others=filled)
        return cast("Future[list[WriteResult]]", _done(results))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits the metadata: from here on the step is there."""
        places = {written.index: written.storage_data for rank in results for written in rank}
        content = pickle.dumps(dataclasses.replace(metadata, storage_data=places))
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        _chain(self.folder, _METADATA, create=True).commit(self.step, {_METADATA: tensor})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Steps are named by the constructor, not by an id."""
        return False


class ChainReader(StorageReader):
    """Loads ``step`` (the newest if None) from the chains in ``folder``; any number of ranks may.

    Raises:
        FormatError: the folder holds no chains.
        ValueError: the step is not complete.
    """

    def __init__(self, folder: PathType, step: int | None = None) -> None:
        self.folder = Path(folder)
        complete = [found.step for found in _chain(self.folder, _METADATA, create=False).log()]
        if not complete or (step is not None and step not in complete):
            asked = "the newest step" if step is None else f"step {step}"
            raise ValueError(f"{self.folder}: {asked} is asked for, complete are {complete}")
        self.step = complete[-1] if step is None else step
        self._places: dict[MetadataIndex, _Place] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forgets the places of the last load."""
        self._places = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the step."""
        tensor = _chain(self.folder, _METADATA, create=False).restore(self.step)[_METADATA]
        return cast(Metadata, pickle.loads(bytes(tensor.numpy())))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Learns where the items lie."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Restores every part that the plan needs once, one at a time, and copies from it."""
        wanted: dict[tuple[int, str], list[Any]] = {}
        for item in plan.items:
            place = self._places[item.storage_index]
            wanted.setdefault((place.rank, place.part), []).append((item, place.name))
        for (rank, part), items in wanted.items():
            state = _chain(self.folder, _rank_name(rank), create=False).restore(self.step, part=part)
            for item, name in items:
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(bytes(state[name].numpy())))
                    continue
                found = state[name]
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    found = found.narrow(dim, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(found)
                planner.commit_tensor(item, target)
        return cast("Future[None]", _done(None))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Steps are named by the constructor, not by an id."""
        return False
