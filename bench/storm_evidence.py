"""What others say of a step: the driver's own memory figure over time, and the profiler's kernels and copies."""

from __future__ import annotations

import ctypes
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

Interval = tuple[float, float]


class _Info(ctypes.Structure):
    _fields_ = [("total", ctypes.c_uint64), ("free", ctypes.c_uint64), ("used", ctypes.c_uint64)]


class Memory:
    """NVML's used bytes of the first GPU, every 50 ms while the context is open."""

    def __init__(self, period_s: float = 0.05) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self._device))
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.seconds: list[float] = []
        self.used_bytes: list[int] = []
        self.total_bytes = self._info().total

    def __enter__(self) -> Memory:
        self._begin = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def log(self) -> dict[str, Any]:
        """The series, as plain data."""
        return {"total_bytes": self.total_bytes, "seconds": self.seconds, "used_bytes": self.used_bytes}

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._nvml, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed with {code}")

    def _info(self) -> _Info:
        info = _Info()
        self._call("nvmlDeviceGetMemoryInfo", self._device, ctypes.byref(info))
        return info

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.seconds.append(round(time.perf_counter() - self._begin, 3))
            self.used_bytes.append(self._info().used)
            self._stop.wait(self._period_s)


def lanes(profile: torch.profiler.profile) -> dict[str, Any]:
    """Merged intervals in which kernels, copies out and copies back ran, in microseconds from the first, and
    the bytes copied.
    """
    found: dict[str, list[Interval]] = {"kernels": [], "offload": [], "onboard": []}
    bytes_moved = {"offload": 0, "onboard": 0}
    # The records themselves do not say how many bytes a copy had; the exported trace does.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name = event["name"]
        lane = "offload" if "DtoH" in name else "onboard" if "HtoD" in name else "kernels"
        found[lane].append((event["ts"], event["ts"] + event["dur"]))
        if lane in bytes_moved:
            bytes_moved[lane] += event["args"].get("bytes", 0)
    first = min(interval[0] for lane in found.values() for interval in lane)
    shifted = {name: merge([(a - first, b - first) for a, b in lane]) for name, lane in found.items()}
    rounded = {name: [(round(a, 1), round(b, 1)) for a, b in lane] for name, lane in shifted.items()}
    return {**rounded, "bytes": bytes_moved}


def merge(intervals: list[Interval]) -> list[Interval]:
    """The union, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def total(intervals: list[Interval]) -> float:
    """Length of disjoint intervals."""
    return sum(end - begin for begin, end in intervals)


def exposed(seen: dict[str, Any]) -> dict[str, float]:
    """How much of a step copies ran while no kernel did, and the shares of each lane."""
    kernels, copies = seen["kernels"], merge([*seen["offload"], *seen["onboard"]])
    both = merge([*kernels, *copies])
    step_us = max(end for _, end in both)
    facts = {
        "step_ms": step_us / 1e3,
        "kernels_pct": total(kernels) / step_us * 100,
        "exposed_pct": (total(both) - total(kernels)) / step_us * 100,
    }
    for lane, moved in seen["bytes"].items():
        busy_us = total(seen[lane])
        facts[f"{lane}_ms"] = busy_us / 1e3
        facts[f"{lane}_gbps"] = moved / busy_us / 1e3 if busy_us else 0.0
    return facts
