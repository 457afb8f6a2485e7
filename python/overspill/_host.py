"""The engine of a context: how much host memory and disk it takes where the user does not say."""

from __future__ import annotations

import os
import tempfile

from ._edge import CpuEdge, Edge
from ._native import Engine
from ._units import parse_bytes

_MIB = 2**20


def open_engine(
    edge: Edge,
    host_budget: int | str | None,
    spill_dir: str | None,
    spill_limit: int | str | None,
    seed: int | None,
    trace: bool,
) -> Engine:
    """The engine for ``edge``; sizes are those of :class:`overspill.Storm`."""
    on_gpu = edge.device.type != "cpu"
    if host_budget is not None:
        host_bytes = parse_bytes(host_budget, "host_budget")
    else:
        host_bytes = CpuEdge().free_bytes() // 2 if on_gpu else 64 * _MIB
    if spill_dir is None and not on_gpu:
        spill_dir = tempfile.gettempdir()
    limit = 0
    if spill_dir is not None:
        limit = (
            _half_of_free_disk(spill_dir) if spill_limit is None else parse_bytes(spill_limit, "spill_limit")
        )
    return Engine(
        edge.engine_name if seed is None else "sim",
        host_budget_bytes=host_bytes,
        slab_bytes=min(host_bytes, (4096 if on_gpu else 1024) * _MIB),
        # One copy a tensor where the copy engine reads it at once; small pieces for the disk.
        segment_bytes=max(min((1024 if on_gpu else 8) * _MIB, host_bytes // 8), 4096),
        spill_dir=spill_dir,
        spill_limit_bytes=limit,
        eager_spill=not on_gpu,
        seed=seed,
        trace=trace,
    )


def _half_of_free_disk(folder: str) -> int:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return _MIB  # the engine says what is wrong with the folder
    return max(stat.f_bavail * stat.f_frsize // 2, 4096)
