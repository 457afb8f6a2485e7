"""A trainer's step to an inference worker: time and bytes as a patch, and as a broadcast of all weights.

    python bench/tpde_sync.py [--layers 32] [--rates 1e-6 1e-5]

Llama-2-7B's shape in bf16 on one GPU, random weights N(0, 0.02); a step moves fp32 masters by lr times a uniform number
in [-1, 1], as Adam's first steps do. The trainer encodes on the GPU from the bf16 weights of the step before, which it
keeps there; the patch lies in page-locked host memory, where the worker's side opens, authenticates and applies it. That memory
stands for the way between two processes of one host; nothing else is sent. The broadcast goes the same way, all weights
down and up through page-locked memory, once tensor after tensor and once with both directions at the same time; the faster
one is the peer. GPUs that reach each other over NVLink copy faster than that: ``pays_below_gbps`` is the rate of a link
below which patches win. Afterwards the worker's state is hashed on the GPU and every weight is compared. Writes
``bench/results/tpde_sync.json``.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from common import median, row, write_results
from overspill import tpde

ROWS: list[dict[str, Any]] = []
State = dict[str, torch.Tensor]


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, 4096),
        "lm_head.weight": (32000, 4096),
    }
    for i in range(layers):
        for name in "qkvo":
            found[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (4096, 4096)
        for name, shape in {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}.items():
            found[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    return found


def timed_ms(work: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    made = work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin), made


class Broadcast:
    """All weights down and up again through two page-locked buffers."""

    def __init__(self, trainer: State, worker: State) -> None:
        self.pairs = [(tensor, worker[name]) for name, tensor in trainer.items()]
        largest = max(tensor.numel() for tensor in trainer.values())
        self.slots = [torch.empty(largest, dtype=torch.bfloat16, pin_memory=True) for _ in range(2)]
        self.down, self.up = torch.cuda.Stream(), torch.cuda.Stream()

    def in_turn(self) -> None:
        for i, (ours, theirs) in enumerate(self.pairs):
            slot = self.slots[i % 2][: ours.numel()].view(ours.shape)
            slot.copy_(ours, non_blocking=True)
            theirs.copy_(slot, non_blocking=True)

    def both_ways(self) -> None:
        free = [torch.cuda.Event(), torch.cuda.Event()]
        for i, (ours, theirs) in enumerate(self.pairs):
            slot, landed = self.slots[i % 2][: ours.numel()].view(ours.shape), torch.cuda.Event()
            with torch.cuda.stream(self.down):
                if i > 1:
                    self.down.wait_event(free[i % 2])
                slot.copy_(ours, non_blocking=True)
                landed.record()
            with torch.cuda.stream(self.up):
                self.up.wait_event(landed)
                theirs.copy_(slot, non_blocking=True)
                free[i % 2].record()

    def measured_ms(self) -> dict[str, float]:
        ways = {"in turn": self.in_turn, "both ways at once": self.both_ways}
        return {name: median([timed_ms(way)[0] for _ in range(3)]) for name, way in ways.items()}


def link_gbps(nbytes: int) -> dict[str, float]:
    """A copy of as many bytes through page-locked memory, each way alone."""
    host = torch.frombuffer(tpde.host_buffer(nbytes), dtype=torch.uint8)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    copies = {
        "down": lambda: host.copy_(device, non_blocking=True),
        "up": lambda: device.copy_(host, non_blocking=True),
    }
    return {
        name: nbytes / 1e6 / median([timed_ms(copy)[0] for _ in range(5)]) for name, copy in copies.items()
    }


def over_socket_ms(patch: memoryview) -> float:
    """The patch through a Unix socket into page-locked memory, where no memory is shared."""
    received = tpde.host_buffer(len(patch))
    begin = time.perf_counter()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=ours.sendall, args=(patch,))
        sender.start()
        at = 0
        while at < len(received):
            at += theirs.recv_into(received[at:])
        sender.join()
    return 1e3 * (time.perf_counter() - begin)


class Pair:
    """A trainer and a worker on one GPU; the trainer casts into the memory of the step before the last one."""

    def __init__(self, masters: State) -> None:
        self.trainer = {name: tensor.bfloat16() for name, tensor in masters.items()}
        self.last = {name: tensor.clone() for name, tensor in self.trainer.items()}
        self.worker = {name: tensor.clone() for name, tensor in self.trainer.items()}
        self.hash_ms, self.state = timed_ms(lambda: tpde.state_id(self.last))

    def step(self) -> tuple[dict[str, float], tpde.Packed]:
        """Milliseconds of each part, and what was sent."""
        spent = {}
        spent["encode"], packed = timed_ms(lambda: tpde.encode(self.last, self.trainer, base_id=self.state))
        spent["open"], patch = timed_ms(lambda: tpde.open(packed.data))
        spent["up"], _ = timed_ms(lambda: patch.to("cuda"))
        spent["apply"], state = timed_ms(lambda: patch.apply_(self.worker, base_id=self.state))
        assert state == packed.final_id
        self.state = state
        self.last, self.trainer = self.trainer, self.last
        return spent, packed

    def is_same(self) -> bool:
        """Whether the worker holds the trainer's weights, by its state's id and bit by bit."""
        self.hash_ms, found = timed_ms(lambda: tpde.state_id(self.worker))
        bits = ((self.worker[n].view(torch.int16), t.view(torch.int16)) for n, t in self.last.items())
        return found == self.state and all(torch.equal(a, b) for a, b in bits)


def measure(lr: float, masters: State, pair: Pair, layers: int, steps: int) -> None:
    """A few steps, of which the first does not count: kernels are compiled, memory is made."""
    found = []
    for i in range(steps + 1):
        for name, tensor in masters.items():
            tensor.add_(2 * torch.rand_like(tensor) - 1, alpha=lr)
            pair.trainer[name].copy_(tensor)
        spent, packed = pair.step()
        print({part: round(ms, 2) for part, ms in spent.items()}, f"{packed.ratio:.1f}", flush=True)
        found += [spent] if i else []
    same = pair.is_same()
    spent = {part: median([step[part] for step in found]) for part in found[0]}
    ways = Broadcast(pair.last, pair.worker).measured_ms()
    link = link_gbps(packed.packed_bytes)
    socket_ms = median([over_socket_ms(packed.data) for _ in range(3)])
    raw_bytes = sum(tensor.nbytes for tensor in pair.worker.values())
    crossing_ms = packed.packed_bytes / 1e6 * (1 / link["down"] + 1 / link["up"])
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in spent.items())
    others = ", ".join(f"{name} {ms:.1f}" for name, ms in ways.items())
    note = (
        f"Llama-2-7B's shape, {layers} layers, {raw_bytes / 1e9:.2f} GB of bf16, random weights and steps, lr {lr:g}, median of "
        f"{steps} steps; {packed.packed_bytes / 1e6:.1f} MB, ratio {packed.ratio:.1f}; ms: {parts}; broadcast: {others}; all "
        f"weights have the trainer's bits and the state its id: {same}; a Unix socket in place of shared memory adds "
        f"{socket_ms:.1f} ms; hashing the whole state on the GPU, which finds a "
        f"worker that is somewhere else: {pair.hash_ms:.1f} ms"
    )
    limit = (
        f"the patch over the link, {link['down']:.1f} GB/s down and {link['up']:.1f} up in this run: {crossing_ms:.1f} ms; "
        f"all weights both ways at once: {raw_bytes / 1e6 / min(link.values()):.1f}"
    )
    whole = {
        "peer": "all weights through page-locked memory, the faster way, ms",
        "peer_value": min(ways.values()),
    }
    receive_ms = spent["open"] + spent["up"] + spent["apply"] if same else None
    end_to_end_ms = sum(spent.values()) if same else None
    sent = {"peer": "all weights in bf16", "peer_value": raw_bytes}
    ROWS.append(row(f"tpde_sync.receive_ms.lr{lr:g}", receive_ms, "ms", limit=limit, note=note, **whole))
    ROWS.append(
        row(f"tpde_sync.end_to_end_ms.lr{lr:g}", end_to_end_ms, "ms", limit=limit, note=note, **whole)
    )
    ROWS.append(row(f"tpde_sync.bytes.lr{lr:g}", packed.packed_bytes, "B", note=note, **sent))
    # Both ends' work, over a link of this rate, takes as long as sending everything over it.
    pays_below = (raw_bytes - packed.packed_bytes) / 1e6 / end_to_end_ms if end_to_end_ms else None
    ROWS.append(row(f"tpde_sync.pays_below_gbps.lr{lr:g}", pays_below, "GB/s", note=note))
    ROWS.append(row(f"tpde_sync.hash_ms.lr{lr:g}", pair.hash_ms, "ms", note=note))
    print(*ROWS[-5:], sep="\n", flush=True)
    write_results("tpde_sync", ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5])
    args = parser.parse_args()
    torch.manual_seed(0)
    masters = {name: 0.02 * torch.randn(shape, device="cuda") for name, shape in shapes(args.layers).items()}
    pair = Pair(masters)
    for lr in args.rates:
        measure(lr, masters, pair, args.layers, args.steps)


if __name__ == "__main__":
    main()
