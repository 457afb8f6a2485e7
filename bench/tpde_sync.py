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
from typing import Any

import torch

from common import median, row, write_results
from overspill import tpde

ROWS: list[dict[str, Any]] = []


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


def measure(
    lr: float,
    trainer: dict[str, torch.Tensor],
    worker: dict[str, torch.Tensor],
    resident: dict[str, torch.Tensor],
    layers: int,
) -> None:
    """One step; ``resident`` is what the worker holds, on the CPU, and holds the final afterwards."""
    down_ms, final = timed_ms(lambda: {name: tensor.cpu() for name, tensor in trainer.items()})
    pack_ms, packed = timed_ms(lambda: tpde.pack(resident, final))
    open_ms, patch = timed_ms(lambda: tpde.open(packed.data).to("cuda"))
    apply_ms, state = timed_ms(lambda: patch.apply_(worker, base_id=patch.base_id))
    assert state == packed.final_id
    same = all(torch.equal(worker[n].view(torch.int16), t.view(torch.int16)) for n, t in trainer.items())
    resident.update(final)
    all_ms = broadcast_ms(trainer, worker)
    raw_bytes = sum(tensor.nbytes for tensor in worker.values())
    note = (
        f"Llama-2-7B's shape, {layers} layers, {raw_bytes / 1e9:.2f} GB of bf16, random weights and steps, lr {lr:g}; "
        f"{packed.packed_bytes / 1e6:.1f} MB, ratio {packed.ratio:.1f}; weights down {down_ms:.0f} ms, packed by the CPU "
        f"{pack_ms:.0f} ms, authenticated and brought up {open_ms:.1f} ms, applied in place {apply_ms:.1f} ms; all "
        f"weights have the trainer's bits: {same}"
    )
    facts = {"peer": "all weights down and up again, page-locked, ms", "peer_value": all_ms}
    ROWS.append(
        row(f"tpde_sync.receive_ms.lr{lr:g}", open_ms + apply_ms if same else None, "ms", note=note, **facts)
    )
    facts = {"peer": "all weights down and up again, page-locked, ms", "peer_value": all_ms}
    total_ms = down_ms + pack_ms + open_ms + apply_ms
    ROWS.append(
        row(f"tpde_sync.end_to_end_ms.lr{lr:g}", total_ms if same else None, "ms", note=note, **facts)
    )
    facts = {"peer": "all weights in bf16", "peer_value": raw_bytes}
    ROWS.append(row(f"tpde_sync.bytes.lr{lr:g}", packed.packed_bytes, "B", note=note, **facts))
    print(*ROWS[-3:], sep="\n", flush=True)
    write_results("tpde_sync", ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    masters = {name: 0.02 * torch.randn(shape, device="cuda") for name, shape in shapes(args.layers).items()}
    worker = {name: tensor.bfloat16() for name, tensor in masters.items()}
    trainer = {name: torch.empty_like(tensor) for name, tensor in worker.items()}
    resident = {name: tensor.cpu() for name, tensor in worker.items()}
    for lr in (1e-6, 1e-5):
        for name, tensor in masters.items():
            tensor.add_(2 * torch.rand_like(tensor) - 1, alpha=lr)
            trainer[name].copy_(tensor)
        measure(lr, trainer, worker, resident, args.layers)


if __name__ == "__main__":
    main()
