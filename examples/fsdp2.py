"""FSDP2 under STORM: two ranks shard a small model, each keeps its own activations within a budget; the same bits.

    torchrun --standalone --nproc-per-node=2 examples/fsdp2.py [--vram-budget 12GiB] [--width 4096 --tokens 16384]

On GPUs with NCCL where there is one for every rank, else on the CPU with gloo. Weights and data are random: this
shows where the context goes, not a speed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from overspill import Storm


def train(
    device: torch.device, shape: argparse.Namespace, options: dict[str, Any] | None
) -> tuple[list[torch.Tensor], dict[str, Any] | None]:
    """Shards of this rank after five steps, and STORM's report; ``options`` None trains without."""
    torch.manual_seed(0)
    width, inner = shape.width, 4 * shape.width
    blocks = [
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        for _ in range(shape.layers)
    ]
    model = nn.Sequential(*blocks).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After sharding, and around the whole loop: what is saved is this rank's own.
    context: Any = contextlib.nullcontext() if options is None else Storm(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.Generator().manual_seed(dist.get_rank())
    with context as storm:
        for _ in range(5):
            optimizer.zero_grad()
            x = torch.randn(shape.tokens, width, generator=batches)
            model(x.to(device)).square().mean().backward()
            optimizer.step()
    shards = [p.to_local().detach().clone() for p in model.parameters()]
    return shards, None if storm is None else storm.report()


def main() -> None:
    """Compares this rank's shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--vram-budget", default=None, help="of each rank; default: what is free, less a tenth"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="of each rank's batch")
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    rank = int(os.environ["LOCAL_RANK"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    plain, _ = train(device, options, None)
    under, report = train(device, options, {"vram_budget": options.vram_budget, "min_bytes": 4096})
    same = all(map(torch.equal, plain, under))
    print(
        f"rank {rank} on {device}: {'the same' if same else 'other'} bits; {report and report['units']}",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
