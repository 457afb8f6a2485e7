"""One training run of a chain of layers, in a process of its own: ``budget_worker.py OUT [ROOM_MIB]``.

A process of its own because the device tier is this process's memory: what an earlier test left behind would be
counted. Every layer saves 8 MiB and computes next to nothing.
"""

from __future__ import annotations

import gc
import sys

import torch
from torch import nn

from overspill import Storm, _native

MIB = 2**20
LAYERS = 16
STEPS = 3


def main(out: str, room_mib: int | None) -> None:
    """Trains keep-all, or with room for ``room_mib`` more than a process holds that has trained before."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    _native.return_freed_tensors()
    model, _ = step(None, None, 0)  # libraries, threads and workspaces that a first step leaves behind
    del model
    gc.collect()
    base = _native.process_memory()[0]
    peaks = [0]
    result: dict[str, object] = {"losses": [], "gradients": []}
    storm = None
    model = chain()
    if room_mib is not None:
        storm = Storm(model, vram_budget=base + room_mib * MIB, min_bytes=1, host_budget=4 * MIB)
    for layer in model:
        layer.register_forward_hook(lambda *_: peaks.append(_native.process_memory()[0]))
        layer[0].weight.register_hook(lambda _: peaks.append(_native.process_memory()[0]))
    for n in range(STEPS):
        _, loss = step(model, storm, n)
        result["losses"].append(loss)
        result["gradients"].append([p.grad.clone() for p in model.parameters()])
    result["growth_bytes"] = max(peaks) - base
    result["report"] = None if storm is None else storm.report()
    torch.save(result, out)


def chain() -> nn.Sequential:
    """Small weights: the gradients that are compared are in memory too."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(LAYERS)))


def step(model: nn.Sequential | None, storm: Storm | None, n: int) -> tuple[nn.Sequential, torch.Tensor]:
    """Forward and backward of batch ``n``."""
    model = chain() if model is None else model
    model.zero_grad()
    x = torch.randn(131072, 16, generator=torch.Generator().manual_seed(n))
    if storm is None:
        loss = model(x).square().mean()
        loss.backward()
    else:
        with storm:
            loss = model(x).square().mean()
            loss.backward()
    return model, loss.detach()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
