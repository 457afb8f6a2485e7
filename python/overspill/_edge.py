"""What the engine has to ask PyTorch about a device: streams, bytes in use, room."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _native
from .errors import DeviceError


class _Known:
    """A number that the host knows."""

    def __init__(self, number: int) -> None:
        self._number = number

    def is_known(self) -> bool:
        return True

    def value(self) -> int:
        return self._number


class _Coming:
    """A number on its way from the device; ``host`` goes back to ``spare`` when it has been read."""

    def __init__(self, tensor: torch.Tensor, spare: list[torch.Tensor]) -> None:
        self._spare = spare
        self._host: torch.Tensor | None = (
            spare.pop() if spare else torch.empty(1, dtype=tensor.dtype).pin_memory()
        )
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))
        self._value = 0

    def is_known(self) -> bool:
        return self._host is None or self._event.query()

    def value(self) -> int:
        if self._host is not None:
            self._event.synchronize()
            self._value = int(self._host.item())
            self._spare.append(self._host)
            self._host = None
        return self._value


@dataclass
class CpuEdge:
    """The device tier is the process's own RAM; there is one stream, the calling thread."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    engine_name: str = "cpu"

    peak_before_bytes: int = 0
    highest_bytes: int = 0

    def __post_init__(self) -> None:
        _native.return_freed_tensors()

    def allocated_bytes(self) -> int:
        """Anonymous memory of the process that is resident: tensors, heap, staging for the disk."""
        return _native.process_memory()[0]

    def sample(self) -> tuple[int, int]:
        """Bytes allocated now, and at most since the sample before: seen if it is more than ever."""
        anonymous, resident = _native.process_memory()
        peak = _native.resident_peak_bytes()
        if peak <= self.highest_bytes:
            return anonymous, anonymous
        self.highest_bytes = peak
        return anonymous, max(peak - (resident - anonymous), anonymous)

    def forget_peak(self) -> None:
        """Makes the next sample's peak that of what follows. The system shows only what exceeds all before."""

    def has_room(self, nbytes: int, budget_bytes: int) -> bool:
        """Whether a proof may take ``nbytes`` for a moment. The process's memory is no hard limit."""
        return True

    def mark(self) -> Any:
        """A point in time of the device."""
        return time.perf_counter()

    def between_us(self, begin: Any, end: Any) -> float:
        """Microseconds between two marks that the device has passed."""
        return float(end - begin) * 1e6

    def synchronize(self) -> None:
        """Waits until the device has passed every mark."""

    def to_host(self, number: torch.Tensor) -> _Known | _Coming:
        """The value of a tensor of one number, once the current stream has come here."""
        return _Known(int(number.item()))

    def free_bytes(self) -> int:
        """Bytes that a process can still take."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def stream(self) -> int:
        """Handle of the current stream."""
        return 0

    def join(self, stream: int) -> None:
        """Makes the current stream wait for what ``stream`` has been given."""

    def reset_peak(self) -> None:
        """Begins a new measurement of the peak."""
        self.peak_before_bytes = self.highest_bytes = _native.resident_peak_bytes()

    def peak_bytes(self) -> int | None:
        """Most bytes since ``reset_peak``, or None if an earlier peak of the process hides it."""
        peak = _native.resident_peak_bytes()
        if peak <= self.peak_before_bytes:
            return None
        anonymous, resident = _native.process_memory()
        return peak - (resident - anonymous)


@dataclass
class CudaEdge:
    """A CUDA device, through torch's caching allocator and streams."""

    device: torch.device
    # Page-locked numbers that nobody waits for: making one takes longer than copying to it.
    spare: list[torch.Tensor] = field(default_factory=list)

    @property
    def engine_name(self) -> str:
        """Name of the device for the engine."""
        return f"cuda:{self.device.index}"

    def allocated_bytes(self) -> int:
        """Bytes in live tensors."""
        return torch.cuda.memory_allocated(self.device)

    def sample(self) -> tuple[int, int]:
        """Bytes in live tensors now, and at most since the sample before; torch's peak begins anew."""
        live = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]
        torch.cuda.reset_peak_memory_stats(self.device)
        return live["current"], live["peak"]

    def forget_peak(self) -> None:
        """Makes the next sample's peak that of what follows."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def has_room(self, nbytes: int, budget_bytes: int) -> bool:
        """Whether a proof may take ``nbytes`` for a moment."""
        return self.allocated_bytes() + nbytes <= budget_bytes

    def mark(self) -> Any:
        """A point in time of the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between_us(self, begin: Any, end: Any) -> float:
        """Microseconds between two marks that the device has passed."""
        return float(begin.elapsed_time(end)) * 1e3

    def synchronize(self) -> None:
        """Waits until the device has passed every mark."""
        torch.cuda.synchronize(self.device)

    def to_host(self, number: torch.Tensor) -> _Known | _Coming:
        """The value of a tensor of one number, once the current stream has come here."""
        return _Coming(number, self.spare)

    def free_bytes(self) -> int:
        """Bytes that the driver says are free, with those that torch has cached."""
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached

    def stream(self) -> int:
        """Handle of the current stream; asked for inside every hook, since threads differ."""
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def join(self, stream: int) -> None:
        """Makes the current stream wait for what ``stream`` has been given."""
        other = torch.cuda.ExternalStream(stream, device=self.device)
        torch.cuda.current_stream(self.device).wait_stream(other)

    def reset_peak(self) -> None:
        """Begins a new measurement of the peak."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Most bytes in live tensors since ``reset_peak``."""
        return torch.cuda.max_memory_allocated(self.device)


Edge = CpuEdge | CudaEdge


def edge_for(device: torch.device) -> Edge:
    """The edge of ``device``.

    Raises:
        DeviceError: overspill does not run on this kind of device.
    """
    if device.type == "cpu":
        return CpuEdge()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return CudaEdge(torch.device("cuda", index))
    raise DeviceError(f"device {device} is not supported; move the model to cpu or cuda")
