"""Weight sync from a trainer to inference workers: what a step changed crosses, and lands in weights of any layout.

A worker seldom holds a checkpoint's tensors as they are: query, key and value are one matrix, a rank has a part of
each, rows are padded. Where that is so is learnt from the worker's own loader (:func:`learn_layout`): it is given
numbers in place of weights once, and where they land is the layout. A patch then goes to the pieces: in place, by the
decoder, where pieces are whole and contiguous; else, from an absolute patch, by the positions and words that it holds.

The engines have the shape of vLLM's weight transfer interface (a trainer side that drives a client through init,
start, update and finish; a worker side with ``receive_weights``). They import nothing of it.

Ordering: a worker must not compute while it receives; :meth:`Receiver.apply` returns when the weights are written. A
patch that does not start from the state that the worker is in is refused before the first write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from . import tpde
from ._checkpoint import PathType, cuda_device, tensors_of
from ._patch import PatchBytes, resident_id, written
from .errors import FormatError

__all__ = [
    "Client",
    "InitInfo",
    "PatchTrainerEngine",
    "PatchWeightTransferEngine",
    "Piece",
    "Receiver",
    "UpdateInfo",
    "learn_layout",
]

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
"""What inference models load checkpoints with: (name, tensor) pairs in, parameters written."""
Box = tuple[tuple[int, int], ...]
"""First and last + 1 along each dimension."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Piece:
    """A box of a checkpoint's tensor, and the box of a parameter that holds it."""

    parameter: str
    held: Box
    of: Box


Layout = dict[str, list[Piece]]
"""Where each tensor of a checkpoint is, in a model."""


def learn_layout(
    model: torch.nn.Module, load_weights: LoadWeights, shapes: Mapping[str, Iterable[int]]
) -> Layout:
    """Where ``load_weights`` puts the tensors of a checkpoint, of these shapes, in the model's parameters.

    Takes 8 bytes a parameter of the model and of the checkpoint for as long as it runs; the weights are untouched.
    Raises ValueError where a tensor lands in no box (interleaved or transposed heads, for one).
    """
    parameters = dict(model.named_parameters())
    kept = {name: (p.data, p.requires_grad) for name, p in parameters.items()}
    sizes = {name: tuple(shape) for name, shape in shapes.items()}
    counts = torch.tensor([0] + [math.prod(shape) for shape in sizes.values()])
    starts = counts.cumsum(0)

    def numbers() -> Iterator[tuple[str, torch.Tensor]]:
        for start, (name, shape) in zip(starts.tolist(), sizes.items(), strict=False):
            yield name, torch.arange(start, start + math.prod(shape)).view(shape)

    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.data = torch.full_like(parameter.data, -1, dtype=torch.int64)
        load_weights(numbers())
        landed = {name: parameter.data.cpu() for name, parameter in parameters.items()}
    finally:
        for name, (data, requires_grad) in kept.items():
            parameters[name].data = data
            parameters[name].requires_grad_(requires_grad)
    layout: Layout = {name: [] for name in sizes}
    names = list(sizes)
    for holder, ids in landed.items():
        owners = torch.bucketize(ids, starts, right=True) - 1
        for owner in torch.unique(owners[ids >= 0]).tolist():
            name = names[owner]
            piece = _piece(holder, ids, owners == owner, int(starts[owner]), sizes[name])
            if piece is None:
                raise ValueError(f"{holder!r} holds {name!r} in another order than the checkpoint")
            layout[name].append(piece)
    return layout


def _piece(
    parameter: str, ids: torch.Tensor, mine: torch.Tensor, start: int, shape: tuple[int, ...]
) -> Piece | None:
    mine = mine & (ids >= 0)
    where = mine.nonzero()
    held = tuple((int(c.min()), int(c.max()) + 1) for c in where.unbind(1))
    first = int(ids[tuple(low for low, _ in held)]) - start
    if len(held) != len(shape):
        return None
    origin = [int(c) for c in torch.unravel_index(torch.tensor(first), shape)]
    of = tuple((at, at + high - low) for at, (low, high) in zip(origin, held, strict=True))
    if any(high > size for (_, high), size in zip(of, shape, strict=True)):
        return None
    expected = torch.arange(math.prod(shape)).view(shape)[_slices(of)] + start
    return Piece(parameter, held, of) if torch.equal(ids[_slices(held)], expected) else None


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in box)


class Receiver:
    """Weights that patches are applied to, in the layout of a worker.

    Args:
        model: the worker's.
        layout: from :func:`learn_layout`; None where the model holds a checkpoint's tensors under their own names.
        state: id of the state that the weights are in, in the checkpoint's coordinates; hashed if None, which a
            worker that holds only parts cannot.
    """

    def __init__(
        self, model: torch.nn.Module, layout: Layout | None = None, state: str | None = None
    ) -> None:
        self.model, self._layout = model, layout
        if state is None and layout is not None:
            raise ValueError(
                "a model in a layout of its own needs the id of the state that it was loaded with"
            )
        self.state: str | None = state or resident_id(model)

    def apply(self, patch: PathType | PatchBytes | tpde.Patch) -> str:
        """Turns the weights into those that a patch makes and returns their state's id.

        A failure after the first write leaves weights that are neither; they must be loaded anew then, and every
        later patch says so.
        """
        opened = patch if isinstance(patch, tpde.Patch) else tpde.Patch(patch)
        if self.state is None:
            raise FormatError("a patch failed half way: load the weights anew")
        if opened.kind == "standalone":
            raise FormatError("a patch that stands alone is no step", found_state=self.state)
        again = opened.kind == "absolute" and self.state == opened.final_id
        if self.state != opened.base_id and not again:
            text = f"the weights are in state {self.state}, the patch starts from {opened.base_id}"
            raise FormatError(text, expected_state=opened.base_id, found_state=self.state)
        whole = self._whole(opened)
        if whole is None and opened.kind != "absolute":
            raise FormatError("weights in parts, or missing, take absolute patches only")
        state, self.state = self.state, None
        if whole is not None:
            self.state = opened.apply_(whole, base_id=state)
        else:
            opened.authenticate()
            self._scatter(opened)
            self.state = opened.final_id
        return self.state

    def _whole(self, patch: tpde.Patch) -> dict[str, torch.Tensor] | None:
        """The patch's tensors as contiguous views of parameters, if that is what they all are."""
        if self._layout is None:
            return dict(tensors_of(self.model))
        parameters, found = dict(self.model.named_parameters()), {}
        for name, info in patch.tensors.items():
            pieces = self._layout.get(name, [])
            if len(pieces) != 1 or pieces[0].of != tuple((0, size) for size in info.shape):
                return None
            view = parameters[pieces[0].parameter].data[_slices(pieces[0].held)]
            if not view.is_contiguous():
                return None
            found[name] = view
        return found

    def _scatter(self, patch: tpde.Patch) -> None:
        assert self._layout is not None
        parameters = dict(self.model.named_parameters())
        held = {name for name, pieces in self._layout.items() if pieces}
        device = next(iter(parameters.values())).device
        for name, positions, words in patch.changes(device, held):
            shape = patch.tensors[name].shape
            coordinates = torch.unravel_index(positions, shape)
            for piece in self._layout[name]:
                inside = torch.ones_like(positions, dtype=torch.bool)
                for axis, (low, high) in zip(coordinates, piece.of, strict=True):
                    inside &= (axis >= low) & (axis < high)
                local = tuple(
                    axis[inside] - of[0] + at[0]
                    for axis, of, at in zip(coordinates, piece.of, piece.held, strict=True)
                )
                data = parameters[piece.parameter].data
                data.view(_WORDS[data.element_size()])[local] = words[inside]
                written(parameters[piece.parameter])


@dataclass
class InitInfo:
    """What a worker is told once: the checkpoint's tensors, and the id of the state that it was loaded with."""

    shapes: dict[str, list[int]]
    state: str


@dataclass
class UpdateInfo:
    """One patch: as bytes, or as the path of a file that the worker can read."""

    data: bytes | None = None
    path: str | None = None


class PatchWeightTransferEngine:
    """The worker's side, one for each worker of an inference engine.

    ``model.load_weights`` says how the worker holds a checkpoint. The two configurations are the host's own and are
    kept for it.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False
    defers_processing = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        self.config, self.vllm_config = config, vllm_config
        self.device, self.model = device, model
        self.receiver: Receiver | None = None

    def parse_init_info(self, init_dict: dict[str, Any]) -> InitInfo:
        """Typed information; ValueError for what it does not know."""
        return _parse(InitInfo, init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> UpdateInfo:
        """Typed information; ValueError for what it does not know."""
        return _parse(UpdateInfo, update_dict)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Learns how the model holds the checkpoint."""
        layout = learn_layout(self.model, self.model.load_weights, init_info.shapes)
        self.receiver = Receiver(self.model, layout, init_info.state)

    def start_weight_update(self) -> None:
        """Nothing to prepare: patches are applied in place."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Applies one patch; the weights are written when it returns."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Applies one patch."""
        if self.receiver is None:
            raise RuntimeError("init_transfer_engine() comes first")
        patch = update_info.data if update_info.path is None else update_info.path
        if patch is None:
            raise ValueError("an update is data or a path")
        self.receiver.apply(patch)

    def finish_weight_update(self) -> None:
        """Nothing to finish."""

    def drain_pending(self) -> None:
        """Nothing is ever pending."""

    def shutdown(self) -> None:
        """Forgets the layout."""
        self.receiver = None


def _parse(cls: Any, facts: dict[str, Any]) -> Any:
    try:
        return cls(**facts)
    except TypeError as error:
        raise ValueError(f"not {cls.__name__}: {error}") from error


class Client(Protocol):
    """How a trainer reaches the workers: four calls, each of which returns when every worker is done."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See :meth:`PatchWeightTransferEngine.init_transfer_engine`."""

    def start_weight_update(self) -> None:
        """Before the first update of a round."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One update."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """After the last update of a round."""


@dataclass
class PatchTrainerEngine:
    """The trainer's side: packs what changed since the last round and has the workers apply it.

    Steps (not ``absolute``) of weights on one CUDA device are encoded there, and the last round's weights are kept there
    too; else weights come down and are packed on the CPU.

    Args:
        client: reaches the workers, whose weights are those of ``source()`` when this is made.
        source: gives the weights as they are now, by the checkpoint's names, in the workers' dtype.
        absolute: positions and words instead of steps; what workers that hold parts need.
        folder: where patches are left for the workers to read; None sends their bytes.
    """

    client: Client
    source: Callable[[], Mapping[str, torch.Tensor]]
    absolute: bool = True
    folder: Path | None = None
    _last: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _spare: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _round: int = 0
    _state: str = ""

    def __post_init__(self) -> None:
        first = self.source()
        if self.absolute or cuda_device(first) is None:
            self._last = host_copy(first, {})
        else:
            self._last = {name: tensor.detach().clone() for name, tensor in first.items()}
        shapes = {name: list(tensor.shape) for name, tensor in self._last.items()}
        self._state = tpde.state_id(self._last)
        self.client.init_weight_transfer_engine(asdict(InitInfo(shapes, self._state)))

    @classmethod
    def trainer_init(
        cls, init_info: Mapping[str, Any], *, client: Client, source: Callable[[], Mapping[str, torch.Tensor]]
    ) -> PatchTrainerEngine:
        """As the constructor; ``init_info`` holds its options."""
        return cls(client, source, **init_info)

    def send_weights(self) -> tpde.Packed:
        """One round: pack, start, update, finish. The workers are in state ``final_id`` then."""
        place = None if self.folder is None else Path(self.folder) / f"{self._round:06}.tpde"
        final = self.source()
        on_device = cuda_device(self._last) is not None
        if on_device:
            packed = tpde.encode(self._last, final, base_id=self._state)
            if place is not None:
                place.write_bytes(packed.data or b"")
        else:
            final = host_copy(final, self._spare)
            packed = tpde.pack(self._last, final, place, absolute=self.absolute)
        # What carries an update pickles it, which a view of memory does not allow.
        update = UpdateInfo(data=bytes(packed.data or b"")) if place is None else UpdateInfo(path=str(place))
        self.client.start_weight_update()
        self.client.update_weights(asdict(update))
        self.client.finish_weight_update(packed.final_id)
        self._state, self._round = packed.final_id, self._round + 1
        if on_device:
            for name, tensor in final.items():
                self._last[name].copy_(tensor.detach())
        else:
            self._last, self._spare = dict(final), self._last
        return packed

    def shutdown(self) -> None:
        """Forgets the weights of the last round."""
        self._last, self._spare = {}, {}


def host_copy(state: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory, page-locked for what is on CUDA; ``into`` holds copies of shapes that may be overwritten."""
    made = {}
    for name, tensor in state.items():
        own = into.get(name)
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        made[name] = own.copy_(tensor.detach(), non_blocking=True)
    for device in {tensor.device for tensor in state.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return made
