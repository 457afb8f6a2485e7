"""Fine-tunes over one resident base, switched.

    python bench/tpde_variants.py [--layers N] [--tiny]

Llama-2-7B's layers in bf16 on the device, random weights N(0, 0.02). Two fine-tunes of them: ``full``, every weight of
which was moved in fp32 by up to 2e-6 before it was rounded (few words change), and ``merged``, whose query and value
matrices took a LoRA of rank 16 into them (there most words change, nothing else does). Switching from one to the next,
both ways, against copying the changed matrices up from page-locked memory; every result is compared bit for bit. Writes
``bench/results/tpde_variants.json`` row by row.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from stream_setup import DEVICE, HIDDEN_7B, HIDDEN_TINY, link_gbps, say, seconds, shell

from common import median, row, update_results
from overspill import tpde

RANK = 16
SWITCHES = 5
Tensors = dict[str, torch.Tensor]


def add(*args: Any, **facts: Any) -> None:
    made = row(*args, **facts)
    say(made["id"], made["value"], made["unit"], made["note"])
    update_results("tpde_variants", [made])


def same_bits(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in other)


def full(base: Tensors) -> Tensors:
    made = {}
    for name, tensor in base.items():
        # Masters lie anywhere between two words of 16 bits.
        master = tensor.float()
        master *= 1 + (torch.rand_like(master) - 0.5) / 256
        moved = (master + 2e-6 * (2 * torch.rand_like(master) - 1)).bfloat16()
        made[name] = torch.where(master.bfloat16() == moved, tensor, moved)
    return made


def merged(base: Tensors) -> Tensors:
    made = {}
    for name, tensor in base.items():
        if ".q_proj." in name or ".v_proj." in name:
            rows, columns = tensor.shape
            low = torch.randn(rows, RANK, device=DEVICE) @ torch.randn(RANK, columns, device=DEVICE)
            tensor = (tensor.float() + 1e-4 * low).bfloat16()
        made[name] = tensor
    return made


def measure(shape: dict[str, int], link: float) -> None:
    torch.manual_seed(0)
    names = [
        (n, tuple(p.shape)) for n, p in shell(shape, torch.bfloat16).named_parameters() if ".layers." in n
    ]
    model = {name: (0.02 * torch.randn(size, device=DEVICE)).bfloat16() for name, size in names}
    base = {name: tensor.clone() for name, tensor in model.items()}
    tuned = {"full": full(base), "merged": merged(base)}
    patches = {name: tpde.encode(model, weights) for name, weights in tuned.items()}
    say(
        {
            name: f"{patch.packed_bytes / 1e6:.1f} MB, ratio {patch.ratio:.1f}"
            for name, patch in patches.items()
        }
    )
    begin = time.perf_counter()
    tunes = tpde.variants(model, {name: patch.data for name, patch in patches.items() if patch.data})
    added = time.perf_counter() - begin
    raw_bytes = sum(tensor.nbytes for tensor in base.values())
    for name in patches:
        changed = [key for key in base if not torch.equal(base[key], tuned[name][key])]
        there, back, right = [], [], True
        for _ in range(SWITCHES):
            there.append(seconds(lambda name=name: tunes.switch(name)))
            right &= same_bits(model, tuned[name])
            back.append(seconds(lambda: tunes.switch(None)))
            right &= same_bits(model, base)
        pinned = {key: tuned[name][key].cpu() for key in changed}
        if DEVICE == "cuda":
            pinned = {key: tensor.pin_memory() for key, tensor in pinned.items()}
        copied = median([seconds(lambda p=pinned: copy(p, model)) for _ in range(3)])
        copy({key: base[key] for key in changed}, model)
        words = sum(tensor.numel() for tensor in base.values())
        share = sum(int((base[key] != tuned[name][key]).sum()) for key in changed) / words
        moved_bytes = sum(tensor.nbytes for tensor in pinned.values())
        note = (
            f"{shape['num_hidden_layers']} layers of Llama-2-7B's shape, bf16, {raw_bytes / 1e9:.2f} GB resident, random "
            f"weights; {name}: {len(changed)} of {len(base)} tensors and {100 * share:.2f}% of the words differ, patch {patches[name].packed_bytes / 1e6:.1f} "
            f"MB; base to variant, the patch on the device since the first switch, which checked it and brought it up: "
            f"{1e3 * there[0]:.1f} ms; medians of {SWITCHES - 1}, back {1e3 * median(back[1:]):.2f} ms; both ways bit "
            f"for bit: {right}; the ways back of both packed in {added:.2f} s"
        )
        peer = {
            "peer": f"the {len(changed)} tensors that differ, from page-locked memory, ms",
            "peer_value": 1e3 * copied,
        }
        limit = f"link {link:.1f} GB/s: {1e3 * patches[name].packed_bytes / link / 1e9:.2f} ms packed, {1e3 * moved_bytes / link / 1e9:.1f} ms raw"
        value = 1e3 * median(there[1:]) if right else None
        add(f"tpde_variants.switch_ms.{name}", value, "ms", limit=limit, note=note, **peer)
    say("both, there and back:", f"{tunes.packed_bytes / 1e6:.1f} MB, ways back packed in {added:.2f} s")


def copy(source: Tensors, target: Tensors) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor, non_blocking=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a few MB, to try the benchmark itself")
    args = parser.parse_args()
    hidden = HIDDEN_TINY if args.tiny else HIDDEN_7B
    measure({**hidden, "num_hidden_layers": args.layers}, link_gbps())


if __name__ == "__main__":
    main()
