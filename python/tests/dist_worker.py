"""One rank of the distributed part of the matrix, started by torchrun from ``test_storm_distributed``.

Trains each workload named on the command line twice without and once with offloading, on gloo and CPU,
and exits non-zero where two runs are not the same bits. Each rank sees its own batches, so that the gradient
exchange has something to do. ``--naive`` puts the slow exact twin in STORM's place.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from storm_harness import NaiveStorm, first_difference, offload_everything, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from workloads import Batch, Block, Workload, workload


class Stacked(nn.Module):
    """Two blocks between two layers, as one module, so that DDP and FSDP can wrap its forward."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), Block(), Block(), nn.Linear(32, 4)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x).tanh()
        for block in self.layers[1:3]:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.layers[3](x)


def ranked(model: nn.Module) -> Workload:
    """Every rank its own batch."""

    def step(n: int) -> Tensor:
        b = Batch(100 * n + dist.get_rank(), "cpu")
        loss = F.cross_entropy(model(b.normal(8, 16)), b.ints(4, 8))
        loss.backward()
        return loss.detach()

    return Workload(model, step)


def sharded(*, checkpointed: bool) -> Workload:
    """FSDP2, each block its own group, resharded after forward: saved weights are views of freed storage."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Stacked(checkpointed=checkpointed)
    for block in model.layers[1:3]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return ranked(fully_shard(model, mesh=mesh))


@workload
def ddp(_device: str) -> Workload:
    """DistributedDataParallel with small buckets."""
    return ranked(nn.parallel.DistributedDataParallel(Stacked(), bucket_cap_mb=1))


@workload
def fsdp2(_device: str) -> Workload:
    """fully_shard on each block and the whole."""
    return sharded(checkpointed=False)


@workload
def fsdp2_checkpoint(_device: str) -> Workload:
    """The same with checkpointed blocks."""
    return sharded(checkpointed=True)


def main() -> int:
    """Runs the named workloads; says which came out the same, and fails if one did not."""
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wrap = NaiveStorm if "--naive" in sys.argv else offload_everything
    failed = 0
    for name in names:
        baseline = train(name)
        again, offloaded = train(name), train(name, wrap)
        for what, run in (("baseline again", again), ("offloaded", offloaded)):
            difference = first_difference(baseline, run)
            failed += difference is not None
            verdict = "same bits" if difference is None else difference
            print(f"{name}, rank {dist.get_rank()}, {what}: {verdict}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
