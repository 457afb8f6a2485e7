"""A trainer's step to an inference worker: time and bytes as a patch, and as a broadcast of all weights.

    python bench/tpde_sync.py [--layers 32]

Llama-2-7B's shape in bf16 on one GPU, random weights N(0, 0.02); a step moves fp32 masters by lr times a uniform number
in [-1, 1], as Adam's first steps do, for lr 1e-6 and 1e-5. The broadcast goes through page-locked host memory, down and
up, which is what two processes of one host have without NVLink; the patch is packed by the CPU (after the weights came
down) and applied where the worker's weights lie. Afterwards every weight is compared. Writes
``bench/results/tpde_sync.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from common import median, row, write_results
from overspill import tpde
from overspill.sync import host_copy

ROWS: list[dict[str, Any]] = []
CODEC: Literal["gpu"] = "gpu"


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


def broadcast_ms(trainer: dict[str, torch.Tensor], worker: dict[str, torch.Tensor]) -> float:
    """All weights down and up again through page-locked memory, tensor by tensor."""
    largest = max(tensor.numel() for tensor in trainer.values())
    slots = [torch.empty(largest, dtype=torch.bfloat16, pin_memory=True) for _ in range(2)]

    def all_of_it() -> None:
        for i, (name, tensor) in enumerate(trainer.items()):
            slot = slots[i % 2][: tensor.numel()].view(tensor.shape)
            slot.copy_(tensor, non_blocking=True)
            worker[name].copy_(slot, non_blocking=True)

    return median([timed_ms(all_of_it)[0] for _ in range(3)])


class Pair:
    """A trainer and a worker on one GPU, and the two copies in page-locked memory that the trainer packs from."""

    def __init__(self, masters: dict[str, torch.Tensor]) -> None:
        self.trainer = {name: tensor.bfloat16() for name, tensor in masters.items()}
        self.worker = {name: tensor.clone() for name, tensor in self.trainer.items()}
        self.last = host_copy(self.trainer, {})
        self.spare = host_copy(self.trainer, {})

    def step(self) -> tuple[dict[str, float], tpde.Packed, bool]:
        """Milliseconds of each part, what was sent, and whether the worker has the trainer's bits then."""
        spent = {}
        spent["down"], final = timed_ms(lambda: host_copy(self.trainer, self.spare))
        spent["pack"], packed = timed_ms(lambda: tpde.pack(self.last, final, codec=CODEC))
        spent["open"], patch = timed_ms(lambda: tpde.open(packed.data).to("cuda"))
        spent["apply"], state = timed_ms(lambda: patch.apply_(self.worker, base_id=patch.base_id))
        assert state == packed.final_id
        self.last, self.spare = final, self.last
        bits = ((self.worker[n].view(torch.int16), t.view(torch.int16)) for n, t in self.trainer.items())
        return spent, packed, all(torch.equal(a, b) for a, b in bits)


def measure(lr: float, masters: dict[str, torch.Tensor], pair: Pair, layers: int) -> None:
    """Three steps, of which the last counts: kernels are compiled and memory is there."""
    for _ in range(3):
        for name, tensor in masters.items():
            tensor.add_(2 * torch.rand_like(tensor) - 1, alpha=lr)
            pair.trainer[name].copy_(tensor)
        spent, packed, same = pair.step()
        print({part: round(ms, 1) for part, ms in spent.items()}, packed.ratio, same, flush=True)
    all_ms = broadcast_ms(pair.trainer, pair.worker)
    raw_bytes = sum(tensor.nbytes for tensor in pair.worker.values())
    note = (
        f"Llama-2-7B's shape, {layers} layers, {raw_bytes / 1e9:.2f} GB of bf16, random weights and steps, lr {lr:g}, third "
        f"step; {packed.packed_bytes / 1e6:.1f} MB, ratio {packed.ratio:.1f}; weights down into page-locked memory "
        f"{spent['down']:.0f} ms, packed by the CPU (codec {CODEC}) {spent['pack']:.0f} ms, authenticated and brought up "
        f"{spent['open']:.1f} ms, applied in place {spent['apply']:.1f} ms; all weights have the trainer's bits: {same}"
    )
    whole = {"peer": "all weights down and up again, page-locked, ms", "peer_value": all_ms}
    receive_ms = spent["open"] + spent["apply"] if same else None
    end_to_end_ms = sum(spent.values()) if same else None
    sent = {"peer": "all weights in bf16", "peer_value": raw_bytes}
    ROWS.append(row(f"tpde_sync.receive_ms.lr{lr:g}", receive_ms, "ms", note=note, **whole))
    ROWS.append(row(f"tpde_sync.end_to_end_ms.lr{lr:g}", end_to_end_ms, "ms", note=note, **whole))
    ROWS.append(row(f"tpde_sync.bytes.lr{lr:g}", packed.packed_bytes, "B", note=note, **sent))
    print(*ROWS[-3:], sep="\n", flush=True)
    write_results("tpde_sync", ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    masters = {name: 0.02 * torch.randn(shape, device="cuda") for name, shape in shapes(args.layers).items()}
    pair = Pair(masters)
    for lr in (1e-6, 1e-5):
        measure(lr, masters, pair, args.layers)


if __name__ == "__main__":
    main()
