"""What decodes weights on a GPU, on the same data in the same run: TPDE, nvCOMP, DFloat11, the first design, index_put_.

    python bench/tpde_gpu_peers.py [--words 134217728]

Writes ``bench/results/tpde_gpu_peers.json``. Weights are random, N(0, 0.02) in bf16 (exponents as in trained weights);
the step is random too: fp32 masters moved by lr 1e-6 times a uniform number in [-1, 1], as Adam's first steps are.
Every peer has to give the final's bits back. Two figures each: words written a second with the packed bytes on the
device (events), and from page-locked host memory to ready weights (copy, then decode; wall clock).

nvCOMP 6 (``nvidia-nvcomp-cu13``, for the benchmark only) is used through its Python API with configurations made
beforehand; DFloat11's kernel is ``decode.ptx`` of the package ``dfloat11``, in the folder ``DFLOAT11`` names.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dfloat11
import torch

from common import median, row, write_results
from overspill import _native, tpde

ROWS: list[dict[str, Any]] = []
REPEATS = 5


class Peer:
    """Parts that lie packed in device memory, a copy of them in host memory, and what decodes them."""

    def __init__(self, parts: list[torch.Tensor], decode: Callable[[], None], out: torch.Tensor) -> None:
        self.parts, self.decode, self.out = parts, decode, out
        self.host = [part.cpu().pin_memory() for part in parts]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def fetch(self) -> None:
        for part, host in zip(self.parts, self.host, strict=True):
            part.copy_(host, non_blocking=True)


def event_ms(work: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def wall_ms(work: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return median(times)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16).flatten()


def ours(base: torch.Tensor | None, final: torch.Tensor, codec: Any = "gpu") -> Peer:
    """The decoder of streamed weights: everything planned, payloads at a fixed address."""
    packed = tpde.pack(None if base is None else {"w": base}, {"w": final}, codec=codec)
    assert packed.data is not None
    patch = tpde.Patch(packed.data)
    streamed = _native.TpdeStreamedPatch(patch._native, torch.cuda.current_device())
    start, count = streamed.payload(0)
    payload = torch.empty(count, dtype=torch.uint8)
    patch._native.read_payloads(start, (payload.data_ptr(), count))
    payload, out = payload.cuda(), torch.empty_like(final)
    old = None if base is None else base
    place = streamed.place(
        0, payload.data_ptr(), 0 if old is None else old.data_ptr(), (out.data_ptr(), out.nbytes)
    )
    assert place is not None

    def decode() -> None:
        place.enqueue(torch.cuda.current_stream().cuda_stream)

    decode()
    assert place.left(torch.cuda.current_stream().cuda_stream) == 0, "chunks that kernels left"
    return Peer([payload], decode, out)


def nvcomp_codec(
    name: str, **options: Any
) -> Callable[[torch.Tensor], tuple[torch.Tensor, Callable[[torch.Tensor], None]]]:
    """Packs bytes; gives the packed bytes, and what decodes them into a tensor."""
    from nvidia import nvcomp

    def pack(data: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
        stream = torch.cuda.current_stream().cuda_stream
        codec = nvcomp.Codec(algorithm=name, cuda_stream=stream, **options)
        flat = data.view(torch.uint8).flatten()
        encoded = codec.encode(nvcomp.as_array(flat, cuda_stream=stream))
        torch.cuda.synchronize()
        packed = torch.as_tensor(encoded, device="cuda").view(torch.uint8).flatten().clone()
        source = nvcomp.as_array(packed, cuda_stream=stream)
        config = codec.decompression_config(source)

        def decode(out: torch.Tensor) -> None:
            there = nvcomp.as_array(out.view(torch.uint8).flatten(), cuda_stream=stream)
            codec.decode(source, out=there, decompression_config=config)

        return packed, decode

    return pack


def nvcomp_final(name: str, **options: Any) -> Callable[[torch.Tensor | None, torch.Tensor], Peer]:
    def make(_base: torch.Tensor | None, final: torch.Tensor) -> Peer:
        packed, decode = nvcomp_codec(name, **options)(final)
        out = torch.empty_like(final)
        return Peer([packed], lambda: decode(out), out)

    return make


def nvcomp_planes(name: str, **options: Any) -> Callable[[torch.Tensor | None, torch.Tensor], Peer]:
    """The exponents' bytes by nvCOMP, sign and mantissa raw: the split that serves it best."""

    def make(_base: torch.Tensor | None, final: torch.Tensor) -> Peer:
        words = bits(final).to(torch.int32) & 0xFFFF
        packed, decode = nvcomp_codec(name, **options)((words >> 7 & 0xFF).to(torch.uint8))
        rest = ((words >> 8 & 0x80) | (words & 0x7F)).to(torch.uint8)
        exponents, out = torch.empty_like(rest), torch.empty_like(final)

        def join() -> None:
            decode(exponents)
            low = rest.to(torch.int16)
            torch.bitwise_or((low & 0x80) << 8 | low & 0x7F, exponents.to(torch.int16) << 7, out=bits(out))

        return Peer([packed, rest], join, out)

    return make


def nvcomp_xor(name: str, **options: Any) -> Callable[[torch.Tensor | None, torch.Tensor], Peer]:
    def make(base: torch.Tensor | None, final: torch.Tensor) -> Peer:
        assert base is not None
        mask = bits(final) ^ bits(base)
        packed, decode = nvcomp_codec(name, **options)(mask)
        out = torch.empty_like(final)

        def join() -> None:
            decode(mask)
            torch.bitwise_xor(bits(base), mask, out=bits(out))

        return Peer([packed], join, out)

    return make


def positions_of(base: torch.Tensor, final: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    where = (bits(base) != bits(final)).nonzero().flatten()
    return where, bits(final)[where]


def first_design(base: torch.Tensor | None, final: torch.Tensor) -> Peer:
    """NvCOMP zstd of 32-bit positions and of the words' steps, then scatter-add on a copy of the base."""
    assert base is not None
    where, new = positions_of(base, final)
    index, step = where.to(torch.int32), new - bits(base)[where]
    packed_index, decode_index = nvcomp_codec("Zstd")(index)
    packed_step, decode_step = nvcomp_codec("Zstd")(step)
    out = torch.empty_like(final)

    def join() -> None:
        decode_index(index)
        decode_step(step)
        out.copy_(base)
        bits(out).index_add_(0, index, step)

    return Peer([packed_index, packed_step], join, out)


def dense_index_put(base: torch.Tensor | None, final: torch.Tensor) -> Peer:
    assert base is not None
    where, new = positions_of(base, final)
    out = torch.empty_like(final)

    def join() -> None:
        out.copy_(base)
        bits(out).index_put_((where,), new)

    return Peer([where, new], join, out)


def dfloat(_base: torch.Tensor | None, final: torch.Tensor) -> Peer:
    kernel = dfloat11.Kernel(Path(os.environ["DFLOAT11"]) / "decode.ptx")
    packed, out = dfloat11.Packed(final), torch.empty_like(final)
    return Peer(packed.parts, lambda: kernel.decode(packed, out), out)


def measure(
    workload: str, name: str, make: Callable[..., Peer], base: Any, final: torch.Tensor, link: float
) -> None:
    goal = f"tpde_gpu_peers.{workload}.{name}"
    raw_ms = final.nbytes / link / 1e6
    limit = f"link {link:.1f} GB/s in the same run"
    try:
        peer = make(base, final)
        peer.out.zero_()
        peer.decode()
        same = torch.equal(bits(peer.out), bits(final))
        decode_ms = event_ms(peer.decode)
        ready_ms = wall_ms(lambda: (peer.fetch(), peer.decode()))
    except Exception as error:
        traceback.print_exc()
        ROWS.append(
            row(goal, None, "TB/s", limit=limit, note=f"did not run: {type(error).__name__}: {error}"[:300])
        )
        write_results("tpde_gpu_peers", ROWS)
        return
    note = (
        f"{final.numel()} bf16 words, random; ratio {final.nbytes / peer.nbytes:.3f}; {decode_ms:.3f} ms, out of place; "
        f"host to ready {ready_ms:.3f} ms, raw copy {raw_ms:.3f} ms, so {raw_ms / ready_ms:.3f}x; same bits: {same}"
    )
    ROWS.append(row(goal, final.nbytes / decode_ms / 1e9 if same else None, "TB/s", limit=limit, note=note))
    print(goal, ROWS[-1]["value"], note, flush=True)
    write_results("tpde_gpu_peers", ROWS)


STANDALONE: dict[str, Callable[..., Peer]] = {
    "tpde": ours,
    "dfloat11": dfloat,
    "nvcomp_ans": nvcomp_final("ANS"),
    "nvcomp_ans_16bit": nvcomp_final("ANS", data_type="<f2"),
    "nvcomp_ans_exponents": nvcomp_planes("ANS"),
    "nvcomp_zstd": nvcomp_final("Zstd"),
    "nvcomp_bitcomp": nvcomp_final("Bitcomp", data_type="<u2"),
    "nvcomp_cascaded": nvcomp_final("Cascaded", data_type="<u2"),
}
STEP: dict[str, Callable[..., Peer]] = {
    "tpde": ours,
    "tpde_smallest": functools.partial(ours, codec="auto"),
    "nvcomp_ans_xor": nvcomp_xor("ANS"),
    "nvcomp_zstd_xor": nvcomp_xor("Zstd"),
    "nvcomp_bitcomp_xor": nvcomp_xor("Bitcomp", data_type="<u2"),
    "nvcomp_cascaded_xor": nvcomp_xor("Cascaded", data_type="<u2"),
    "first_design": first_design,
    "index_put": dense_index_put,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--words", type=int, default=1 << 27)
    args = parser.parse_args()
    torch.manual_seed(0)
    memory = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(memory, device="cuda")
    link = memory.numel() / wall_ms(lambda: there.copy_(memory, non_blocking=True)) / 1e6
    masters = 0.02 * torch.randn(args.words, device="cuda")
    base = masters.bfloat16()
    final = (masters + 1e-6 * (2 * torch.rand_like(masters) - 1)).bfloat16()
    changed = float((bits(base) != bits(final)).float().mean())
    print(f"link {link:.1f} GB/s; {changed:.2%} of words changed", flush=True)
    # A stream of one's own: what nvCOMP is given must not be the default one.
    with torch.cuda.stream(torch.cuda.Stream()):
        for name, make in STANDALONE.items():
            measure("standalone", name, make, None, base, link)
        for name, make in STEP.items():
            measure("step", name, make, base, final, link)


if __name__ == "__main__":
    main()
