"""What the operating system, or the driver, says this process has used at most."""

from __future__ import annotations

import threading
from pathlib import Path

import torch


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMeter:
    """Peak use of the device's memory from now on, from outside of PyTorch.

    Without a GPU: the resident set (VmHWM). With one: the driver's own figure for the device
    (``cudaMemGetInfo``), sampled every 5 ms.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._peak = 0
        self._stop = threading.Event()
        self.start_bytes = self._now()
        self._sampler: threading.Thread | None = None
        if self._cuda is not None:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    def _now(self) -> int:
        if self._cuda is None:
            return _status_bytes("VmRSS")
        free, total = torch.cuda.mem_get_info(self._cuda)
        return total - free

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._now())

    def peak_bytes(self) -> int:
        """Most bytes in use since the meter was made; ends the measurement."""
        self._stop.set()
        if self._sampler is not None:
            self._sampler.join()
        return _status_bytes("VmHWM") if self._cuda is None else max(self._peak, self._now())
