"""One of two ranks of a sharded run, started by torchrun from ``test_chain``: saves into chains and takes it up again.

Prints the state after five steps under FSDP2 of three runs: a, which commits steps 1 to 3; b, a new model that is taken
up from step 3; c, one that is not (the comparison can fail).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from overspill import tpde
from overspill.chain_dcp import ChainReader, ChainWriter

FOLDER = Path(sys.argv[1])


def run(name: str, seed: int, first: int) -> None:
    """Trains steps ``first`` to 5."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def state() -> dict[str, object]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optim": moments}

    if name == "b":
        loaded = state()
        dcp.load(loaded, storage_reader=ChainReader(FOLDER, step=first - 1))
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    for step in range(first, 6):
        batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))  # the same on every rank
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if name == "a" and step <= 3:
            dcp.save(state(), storage_writer=ChainWriter(FOLDER, step=step))
    whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in model.state_dict().items()}
    if dist.get_rank() == 0:
        print("state", name, tpde.state_id(whole), flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run("a", seed=0, first=1)
    run("b", seed=1, first=4)
    run("c", seed=1, first=4)
    dist.destroy_process_group()
