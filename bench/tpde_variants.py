"""Fine-tunes over one resident base, switched; and a model that streams from its file.

    python bench/tpde_variants.py [--parts variants,disk] [--layers N] [--tiny]

``variants``: Llama-2-7B's layers in bf16 on the device, random weights N(0, 0.02). Two fine-tunes of them: ``full``,
every weight of which was moved in fp32 by up to 2e-6 before it was rounded (few words change), and
``merged``, whose query and value matrices took a LoRA of rank 16 into them (there most words change, nothing else does).
Switching from one to the next, both ways, against copying the changed matrices up from page-locked memory. ``disk``:
layers of Llama-2-13B's shape packed alone into a file and streamed from it under 2 GB, against a plain read of the
file. Every result is compared bit for bit. Writes ``bench/results/tpde_variants.json`` row by row.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stream_setup import DEVICE, draw, fill, held_bytes, link_gbps, say, seconds, shell

from common import median, row, update_results
from overspill import tpde

RANK = 16
SWITCHES = 5
HIDDEN_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
HIDDEN_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
HIDDEN_TINY = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
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


def part_variants(shape: dict[str, int], link: float) -> None:
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


def forget(path: Path) -> None:
    """Drops a file from the page cache, where the system lets us."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_gbps(path: Path) -> float:
    """A plain read from front to back, in pieces of 16 MiB, from the disk."""
    forget(path)
    piece = bytearray(16 << 20)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    return path.stat().st_size / (time.perf_counter() - begin) / 1e9


def part_disk(shape: dict[str, int], link: float, budget_bytes: int) -> None:
    model = shell(shape, torch.bfloat16)
    weights = draw(model)
    resident = shell(shape, torch.bfloat16)
    fill(resident, {name: tensor.to(DEVICE) for name, tensor in weights.items()})
    resident.model.rotary_emb.to(DEVICE)
    ids = torch.arange(1, 9, device=DEVICE)[None]
    with torch.no_grad():
        expected = resident(ids).logits
    del resident
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tpde"
        packed = tpde.pack(None, weights, path, codec="gpu")
        say(f"packed {packed.raw_bytes / 1e9:.1f} GB, {packed.ratio:.2f}:1")
        plain_gbps = read_gbps(path)
        forget(path)
        handle = tpde.stream(model, held_bytes() + budget_bytes, patch=path, device=DEVICE, on_disk=True)
        try:
            with torch.no_grad():
                right = torch.equal(model(ids).logits, expected)
                forget(path)
                before = handle.report()["link_bytes"]
                cold = seconds(lambda: model(ids))
                read_gb = (handle.report()["link_bytes"] - before) / 1e9
                warm = median([seconds(lambda: model(ids)) for _ in range(3)])
            report = handle.report()
        finally:
            handle.close()
    note = (
        f"{shape['num_hidden_layers']} layers of Llama-2-13B's shape, bf16, {packed.raw_bytes / 1e9:.1f} GB, random weights, "
        f"packed alone {packed.ratio:.2f}:1 into a file of {packed.packed_bytes / 1e9:.1f} GB, which stays on disk; budget "
        f"{budget_bytes / 1e9:.1f} GB, of which {report['resident_bytes'] / 1e9:.1f} GB keep packed weights on the device; "
        f"a forward of 8 tokens after the file was dropped from the page cache reads {read_gb:.2f} GB; with the file in "
        f"the page cache {warm:.3f} s; logits bit for bit those of the resident model: {right}"
    )
    limit = f"a plain read of the file {plain_gbps:.2f} GB/s, dropped from the cache before: {read_gb / plain_gbps:.2f} s for what is read; link {link:.1f} GB/s"
    add("tpde_variants.stream_from_disk_s", cold if right else None, "s", limit=limit, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="variants,disk")
    parser.add_argument("--layers", type=int, default=0, help="instead of each part's own number (16 and 4)")
    parser.add_argument("--tiny", action="store_true", help="a few MB, to try the benchmark itself")
    args = parser.parse_args()
    link = link_gbps()
    for part in args.parts.split(","):
        hidden, layers = {"variants": (HIDDEN_7B, 16), "disk": (HIDDEN_13B, 4)}[part]
        shape = {**(HIDDEN_TINY if args.tiny else hidden), "num_hidden_layers": args.layers or layers}
        if part == "variants":
            part_variants(shape, link)
        else:
            part_disk(shape, link, (80 << 20) if args.tiny else 2 * 10**9)


if __name__ == "__main__":
    main()
