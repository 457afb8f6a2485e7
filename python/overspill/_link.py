"""The link codec at the edge: a 16-bit tensor as a code, and when its length is known.

A code is made on the compute stream, so that the tensor's own memory is free from then on in the order of that
stream. How long it came out is known on the device; the host reads it later, and only then can the code leave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._edge import Edge
from ._native import LinkCodec
from .errors import TransferError

_IS_HALF = {torch.bfloat16: False, torch.float16: True}


class Code:
    """A unit's bytes, coded."""

    __slots__ = ("_length", "buffer", "is_back", "is_half", "unit_bytes")

    def __init__(self, buffer: torch.UntypedStorage, length: Any, unit_bytes: int, is_half: bool) -> None:
        self.buffer: torch.UntypedStorage | None = buffer
        """The code, where it is on the device."""
        self.is_back = False
        """Whether ``buffer`` was brought back, and nobody else holds these bytes on the device."""
        self.is_half = is_half
        self.unit_bytes = unit_bytes
        self._length = length

    def is_known(self) -> bool:
        """Whether :meth:`length` would not wait."""
        return bool(self._length.is_known())

    def length(self) -> int:
        """Bytes of the code."""
        return LinkCodec.code_bytes(self.unit_bytes, self._length.value())


class Link:
    """Codes and decodes on one device."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._codec = LinkCodec(edge.device.index if edge.device.type == "cuda" else None)
        # Kernels say here that what they were given is no code.
        self._status = torch.zeros(1, dtype=torch.int32, device=edge.device)

    @staticmethod
    def takes(storage: torch.UntypedStorage, start: int, nbytes: int, dtype: torch.dtype) -> bool:
        """Whether a unit is a whole storage of 16-bit floats."""
        return dtype in _IS_HALF and start == 0 and nbytes == storage.nbytes() and nbytes % 2 == 0

    def encode(self, storage: torch.UntypedStorage, dtype: torch.dtype, stream: int) -> Code:
        """The code of ``storage``, behind what ``stream`` has been given."""
        return self._encode(storage, dtype, stream, lambda _: None)

    def _encode(
        self, storage: torch.UntypedStorage, dtype: torch.dtype, stream: int, marks: Callable[[str], None]
    ) -> Code:
        nbytes, is_half = storage.nbytes(), _IS_HALF[dtype]
        buffer = self._room(LinkCodec.bound_bytes(nbytes))
        counter = torch.zeros(1, dtype=torch.int32, device=self._edge.device)
        length = self._edge.number()
        marks("room")
        self._codec.encode(
            storage.data_ptr(), nbytes, is_half, buffer.data_ptr(), counter.data_ptr(), length.address, stream
        )
        length.sent()
        marks("encode")
        return Code(buffer, length, nbytes, is_half)

    def decode(self, code: Code, code_bytes: int, stream: int) -> torch.UntypedStorage:
        """What ``code`` was made of."""
        assert code.buffer is not None
        storage = self._room(code.unit_bytes)
        self._codec.decode(
            storage.data_ptr(), code.unit_bytes, code.is_half, code.buffer.data_ptr(), code_bytes,
            self._status.data_ptr(), stream,
        )  # fmt: skip
        return storage

    def repeats(
        self, storage: torch.UntypedStorage, dtype: torch.dtype, stream: int, marks: Callable[[str], None]
    ) -> Code | None:
        """The code of ``storage`` if it decodes to the same bytes; ``marks`` is told when each half ends."""
        code = self._encode(storage, dtype, stream, marks)
        marks("room")
        assert code.buffer is not None
        again = self.decode(code, code.buffer.nbytes(), stream)
        marks("decode")
        words = [torch.empty(0, dtype=torch.int16, device=storage.device).set_(s) for s in (storage, again)]
        code.buffer = None
        return code if torch.equal(*words) else None

    def check(self) -> None:
        """Raises if anything decoded so far was no code. Waits for the device."""
        if int(self._status.item()):
            raise TransferError(
                "a compressed tensor came back damaged: gradients since the last check are wrong"
            )

    def _room(self, nbytes: int) -> torch.UntypedStorage:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._edge.device).untyped_storage()
