"""DFloat11's published kernel, on weights packed here in its layout; only the benchmark uses it.

``decode.ptx`` comes in the package ``dfloat11`` 0.5.0 (Apache-2.0). Its packer is a Python loop over weights; this one
makes the same parts with torch: the exponents' Huffman code as a bit stream, sign and mantissa as bytes, for each
thread (64 bits of the stream) where its first code starts, for each block (512 threads) its first weight, and byte-wise
decoding tables.
"""

from __future__ import annotations

import ctypes
import heapq
from pathlib import Path

import numpy as np
import torch

THREADS, THREAD_BITS = 512, 64
END = 256


def code_lengths(counts: dict[int, int]) -> dict[int, int]:
    """Lengths of a Huffman code."""
    heap = [(count, i, [symbol]) for i, (symbol, count) in enumerate(counts.items())]
    lengths = dict.fromkeys(counts, 0)
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, i, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, i, left + right))
    return lengths


def canonical(lengths: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Symbol to (bits, code)."""
    code, last, table = 0, 0, {}
    for bits, symbol in sorted((bits, symbol) for symbol, bits in lengths.items()):
        code <<= bits - last
        table[symbol] = (bits, code)
        code, last = code + 1, bits
    return table


def decoding_tables(table: dict[int, tuple[int, int]]) -> np.ndarray:
    """A table of 256 for each prefix of whole bytes, then the lengths; 256 - n leads on to table n."""
    codes = {symbol: format(code, f"0{bits}b") for symbol, (bits, code) in table.items() if symbol != END}
    prefixes = sorted(
        {text[: (len(text) - 1) // 8 * 8] for text in codes.values()} | {""}, key=lambda p: (len(p), p)
    )
    rows = []
    for prefix in prefixes:
        known: dict[int, int] = {}
        for symbol, text in codes.items():
            if text.startswith(prefix):
                rest = text[len(prefix) :]
                byte = int(rest[:8].ljust(8, "0"), 2)
                known[byte] = symbol if len(rest) <= 8 else 256 - prefixes.index(text[: len(prefix) + 8])
        row, current = [], 0
        for byte in range(256):
            current = known.get(byte, current)
            row.append(current)
        rows.append(row)
    lengths = [table.get(symbol, (0, 0))[0] for symbol in range(256)]
    return np.array([*rows, lengths], dtype=np.uint8)


class Packed:
    """bf16 weights on the device, in DFloat11's layout."""

    def __init__(self, weights: torch.Tensor) -> None:
        device = weights.device
        words = weights.view(torch.int16).flatten().to(torch.int32) & 0xFFFF
        exponents = words >> 7 & 0xFF
        counts = torch.bincount(exponents, minlength=256)
        table = canonical(code_lengths({i: n for i, n in enumerate(counts.tolist()) if n} | {END: 1}))
        assert max(bits for bits, _ in table.values()) <= 32
        bits = torch.tensor([table.get(i, (0, 0))[0] for i in range(257)], device=device)
        codes = torch.tensor([table.get(i, (0, 0))[1] for i in range(257)], device=device)
        symbols = torch.cat([exponents, torch.tensor([END], device=device, dtype=exponents.dtype)])
        ends = bits[symbols].cumsum(0)
        starts = ends - bits[symbols]
        total_bits = int(starts[-1])
        # A code spans at most two words of 32 bits; no two codes share a bit, so adding is setting.
        shifted = codes[symbols] << (64 - starts % 32 - bits[symbols])
        stream = torch.zeros(int(ends[-1]) // 32 + 3, dtype=torch.int64, device=device)
        stream.index_add_(0, starts // 32, shifted >> 32 & 0xFFFFFFFF)
        stream.index_add_(0, starts // 32 + 1, shifted & 0xFFFFFFFF)
        big_endian = torch.stack([stream >> shift & 0xFF for shift in (24, 16, 8, 0)], 1)
        self.encoded = big_endian.flatten().to(torch.uint8)[: (total_bits + 7) // 8].contiguous()
        self.blocks = -(-self.encoded.numel() * 8 // (THREADS * THREAD_BITS))
        windows = torch.arange(self.blocks * THREADS, device=device) * THREAD_BITS
        first = torch.searchsorted(starts[:-1].contiguous(), windows).clamp_(max=starts.numel() - 1)
        gaps = (starts[first] - windows).clamp_(0, 31).cpu().numpy()
        as_bits = (gaps[:, None] >> np.arange(4, -1, -1) & 1).astype(np.uint8)
        self.gaps = torch.from_numpy(np.packbits(as_bits.flatten())).to(device)
        positions = [*first[::THREADS].clamp(max=words.numel()).tolist(), words.numel()]
        self.shared_bytes = THREADS * 4 + 4 + 2 * max(np.diff(positions).tolist())
        self.positions = torch.from_numpy(np.array(positions, dtype=np.uint32).view(np.int32)).to(device)
        self.rest = ((words >> 8 & 0x80) | (words & 0x7F)).to(torch.uint8)
        self.tables = torch.from_numpy(decoding_tables(table)).to(device)

    @property
    def parts(self) -> list[torch.Tensor]:
        """Everything that decoding reads, in the kernel's order."""
        return [self.tables, self.encoded, self.rest, self.positions, self.gaps]

    @property
    def nbytes(self) -> int:
        """Size of it all."""
        return sum(part.nbytes for part in self.parts)


class Kernel:
    """``decode`` of ``decode.ptx``, launched through the driver."""

    def __init__(self, ptx: Path) -> None:
        torch.cuda.current_stream().synchronize()  # the context exists
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        text = ptx.read_bytes() + b"\0"
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(self._module), text))
        name = ctypes.c_char_p(b"decode")
        self._check(self._cuda.cuModuleGetFunction(ctypes.byref(self._function), self._module, name))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA driver: error {code}")

    def decode(self, packed: Packed, out: torch.Tensor) -> None:
        """Enqueues the decoding of all weights into ``out``."""
        pointers = [ctypes.c_uint64(part.data_ptr()) for part in [*packed.parts, out]]
        counts = [
            ctypes.c_int32(n) for n in (packed.tables.shape[0], packed.encoded.numel(), packed.rest.numel())
        ]
        values = pointers + counts
        arguments = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        if packed.shared_bytes > 48 << 10:
            self._check(self._cuda.cuFuncSetAttribute(self._function, 8, packed.shared_bytes))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        grid, block = (packed.blocks, 1, 1), (THREADS, 1, 1)
        self._check(
            self._cuda.cuLaunchKernel(
                self._function, *grid, *block, packed.shared_bytes, stream, arguments, None
            )
        )
