"""What the driver says is in use, sampled beside the run; without a GPU, what the process has resident."""

from __future__ import annotations

import ctypes
import threading
import time

import torch

from .._native import process_memory
from ..errors import DeviceError

INTERVAL_S = 0.01


class _Memory(ctypes.Structure):
    """``nvmlMemory_v2_t``: what the driver keeps for itself (reserved) is not in ``used``."""

    _fields_ = (
        ("version", ctypes.c_uint), ("total", ctypes.c_ulonglong), ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong),
    )  # fmt: skip


class Nvml:
    """Bytes in use on one GPU, by all processes: the figure of nvidia-smi."""

    source = "NVML"

    def __init__(self, index: int) -> None:
        try:
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise DeviceError(f"NVML cannot be loaded: {error}") from error
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        name = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
        self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self._device))

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status != 0:
            raise DeviceError(f"{name} answers {status}")

    def used_bytes(self) -> int:
        """Now."""
        memory = _Memory()
        memory.version = ctypes.sizeof(_Memory) | 2 << 24
        self._call("nvmlDeviceGetMemoryInfo_v2", self._device, ctypes.byref(memory))
        return memory.used


class Rss:
    """Resident bytes of this process beyond those that it had before: device tier, host copies and all else are one
    memory here, and an interpreter with its libraries is larger than a small experiment.
    """

    source = "RSS, less what the process had before the model"

    def __init__(self) -> None:
        self._before = process_memory()[1]

    def used_bytes(self) -> int:
        """Now."""
        return max(process_memory()[1] - self._before, 0)


class Meter:
    """Samples every 10 ms from :meth:`start` to :meth:`stop`."""

    def __init__(self, device: torch.device) -> None:
        self.gauge: Nvml | Rss = Nvml(device.index or 0) if device.type == "cuda" else Rss()
        self.samples: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.begun_s = 0.0

    def start(self) -> None:
        """Begins; times count from here."""
        self.begun_s = time.perf_counter()
        self._take()
        self._thread.start()

    def stop(self) -> list[tuple[float, int]]:
        """Ends; seconds and bytes."""
        self._over.set()
        self._thread.join()
        self._take()
        return self.samples

    def _take(self) -> None:
        self.samples.append((time.perf_counter() - self.begun_s, self.gauge.used_bytes()))

    def _sample(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self._take()
