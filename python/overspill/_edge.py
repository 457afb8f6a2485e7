"""What the engine has to ask PyTorch about a device: streams, bytes in use, room."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _native
from .errors import DeviceError

_NUMBERS = 256


class _Known:
    """A number that is there as soon as it was written."""

    def __init__(self) -> None:
        self._host = torch.zeros(1, dtype=torch.int32)
        self.address = self._host.data_ptr()

    def sent(self) -> None:
        """The device was told to write it."""

    def is_known(self) -> bool:
        """Whether :meth:`value` would not wait."""
        return True

    def value(self) -> int:
        """The number."""
        return int(self._host.item())


class _Coming:
    """A number that the device writes to page-locked host memory; ``host`` goes back to ``spare`` once it was read."""

    def __init__(self, device: torch.device, spare: list[torch.Tensor]) -> None:
        if not spare:
            # Page-locking takes long, however little.
            spare.extend(torch.zeros(_NUMBERS, dtype=torch.int32).pin_memory().split(1))
        self._device, self._spare = device, spare
        self._host: torch.Tensor | None = spare.pop()
        self.address = self._host.data_ptr()
        self._event = torch.cuda.Event()
        self._value = 0

    def sent(self) -> None:
        """The current stream was told to write it."""
        self._event.record(torch.cuda.current_stream(self._device))

    def is_known(self) -> bool:
        """Whether :meth:`value` would not wait."""
        return self._host is None or self._event.query()

    def value(self) -> int:
        """The number, once the stream has come to where it was sent."""
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

    def number(self) -> _Known:
        """Host memory for a 32-bit number that the device will write."""
        return _Known()

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

    def number(self) -> _Coming:
        """Host memory for a 32-bit number that the device will write."""
        return _Coming(self.device, self.spare)

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
