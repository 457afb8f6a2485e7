"""What TPDE is compared with, and the bounds it is held against. Every peer gets the same bytes and must give
them back: `round_trip` refuses one that does not.

A workload is `base` and `final`, flat arrays of unsigned words; `base` is None where there is none.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import blosc2
import numpy as np
import pcodec.standalone
import zipnn
import zstandard

CHUNK_WORDS = 1 << 16
Encoded = list[bytes]


def compress(data: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data)


def decompress(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def ordered(words: np.ndarray) -> np.ndarray:
    """Float bit patterns as signed integers in the order of their values (the format's order map)."""
    signed = words.view(words.dtype.str.replace("u", "i"))
    return np.where(signed < 0, signed ^ np.iinfo(signed.dtype).max, signed)


def steps(base: np.ndarray, final: np.ndarray) -> np.ndarray:
    return ordered(final) - ordered(base)


def unordered(mapped: np.ndarray) -> np.ndarray:
    return np.where(mapped < 0, mapped ^ np.iinfo(mapped.dtype).max, mapped).view(
        mapped.dtype.str.replace("i", "u")
    )


# ---- peers: encode to byte strings, decode back to the final's words ------------------------------


def zstd_final(level: int):
    def encode(_base: np.ndarray | None, final: np.ndarray) -> Encoded:
        return [compress(final.tobytes(), level)]

    def decode(_base: np.ndarray | None, packed: Encoded, like: np.ndarray) -> np.ndarray:
        return np.frombuffer(decompress(packed[0]), like.dtype)

    return encode, decode


def xor_zstd():
    def encode(base: np.ndarray, final: np.ndarray) -> Encoded:
        return [compress((base ^ final).tobytes(), 1)]

    def decode(base: np.ndarray, packed: Encoded, like: np.ndarray) -> np.ndarray:
        return base ^ np.frombuffer(decompress(packed[0]), like.dtype)

    return encode, decode


def gaps_values():
    """16-bit gaps (65535: none yet, go on) and ULP steps of what changed, each with zstd-1."""

    def encode(base: np.ndarray, final: np.ndarray) -> Encoded:
        where = np.flatnonzero(base != final)
        gaps = np.diff(where, prepend=-1) - 1
        escapes = gaps // 65535
        stream = np.full(len(gaps) + int(escapes.sum()), 65535, np.uint16)
        stream[np.cumsum(escapes + 1) - 1] = (gaps % 65535).astype(np.uint16)
        return [compress(stream.tobytes(), 1), compress(steps(base[where], final[where]).tobytes(), 1)]

    def decode(base: np.ndarray, packed: Encoded, like: np.ndarray) -> np.ndarray:
        stream = np.frombuffer(decompress(packed[0]), np.uint16)
        at = np.cumsum(stream.astype(np.int64) + (stream != 65535))[stream != 65535] - 1
        final = base.copy()
        moved = np.frombuffer(decompress(packed[1]), like.dtype.str.replace("u", "i"))
        final[at] = unordered(ordered(base[at]) + moved)
        return final

    return encode, decode


def npz_chunks():
    """The first prototype as far as its description goes: an .npz of indices and values a chunk, then zstd-3."""

    def encode(base: np.ndarray, final: np.ndarray) -> Encoded:
        packed = []
        for start in range(0, len(final), CHUNK_WORDS):
            old, new = base[start : start + CHUNK_WORDS], final[start : start + CHUNK_WORDS]
            where = np.flatnonzero(old != new)
            file = io.BytesIO()
            np.savez(file, indices=where.astype(np.uint16), values=new[where])
            packed.append(compress(file.getvalue(), 3))
        return packed

    def decode(base: np.ndarray, packed: Encoded, _like: np.ndarray) -> np.ndarray:
        final = base.copy()
        for number, chunk in enumerate(packed):
            file = np.load(io.BytesIO(decompress(chunk)))
            final[number * CHUNK_WORDS + file["indices"].astype(np.int64)] = file["values"]
        return final

    return encode, decode


def pco_steps():
    def encode(base: np.ndarray, final: np.ndarray) -> Encoded:
        return [pcodec.standalone.simple_compress(steps(base, final), pcodec.ChunkConfig())]

    def decode(base: np.ndarray, packed: Encoded, _like: np.ndarray) -> np.ndarray:
        return unordered(ordered(base) + pcodec.standalone.simple_decompress(packed[0]))

    return encode, decode


def pco_final():
    def encode(_base: np.ndarray | None, final: np.ndarray) -> Encoded:
        return [pcodec.standalone.simple_compress(final, pcodec.ChunkConfig())]

    def decode(_base: np.ndarray | None, packed: Encoded, _like: np.ndarray) -> np.ndarray:
        return pcodec.standalone.simple_decompress(packed[0])

    return encode, decode


BLOSC_PIECE_BYTES = 1 << 30


def blosc(of_xor: bool):
    def encode(base: np.ndarray | None, final: np.ndarray) -> Encoded:
        data = (base ^ final if of_xor else final).tobytes()
        size = final.dtype.itemsize
        options = {
            "typesize": size,
            "clevel": 5,
            "filter": blosc2.Filter.BITSHUFFLE,
            "codec": blosc2.Codec.ZSTD,
        }
        return [
            blosc2.compress(data[i : i + BLOSC_PIECE_BYTES], **options)
            for i in range(0, len(data), BLOSC_PIECE_BYTES)
        ]

    def decode(base: np.ndarray | None, packed: Encoded, like: np.ndarray) -> np.ndarray:
        data = np.frombuffer(b"".join(blosc2.decompress(piece) for piece in packed), like.dtype)
        return base ^ data if of_xor else data

    return encode, decode


def zipnn_codec(word_bytes: int) -> zipnn.ZipNN:
    kind = {2: "bfloat16", 4: "float32"}[word_bytes]
    return zipnn.ZipNN(input_format="byte", bytearray_dtype=kind, threads=2)


def zipnn_final():
    def encode(_base: np.ndarray | None, final: np.ndarray) -> Encoded:
        return [bytes(zipnn_codec(final.dtype.itemsize).compress(final.tobytes()))]

    def decode(_base: np.ndarray | None, packed: Encoded, like: np.ndarray) -> np.ndarray:
        return np.frombuffer(zipnn_codec(like.dtype.itemsize).decompress(packed[0]), like.dtype)

    return encode, decode


STANDALONE: dict[str, Callable] = {
    "zstd-1": lambda: zstd_final(1),
    "zstd-3": lambda: zstd_final(3),
    "zipnn": zipnn_final,
    "pcodec": pco_final,
    "blosc2 bitshuffle zstd": lambda: blosc(False),
}
SLOW_STANDALONE: dict[str, Callable] = {"zstd-19": lambda: zstd_final(19)}
DELTA: dict[str, Callable] = {
    "xor + zstd-1": xor_zstd,
    "16-bit gaps + values + zstd-1": gaps_values,
    "npz per chunk + zstd": npz_chunks,
    "pcodec on steps": pco_steps,
    "blosc2 bitshuffle zstd on xor": lambda: blosc(True),
}


def packed_bytes(peer: Callable, base: np.ndarray | None, final: np.ndarray) -> int:
    """Size of what the peer makes of the workload; raises unless the final comes back exactly."""
    encode, decode = peer()
    packed = encode(base, final)
    if not np.array_equal(decode(base, packed, final), final):
        raise AssertionError("the peer does not give the final back")
    return sum(len(piece) for piece in packed)


# ---- bounds -----------------------------------------------------------------------------------------


def entropy_bits(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def step_bound_bytes(base: np.ndarray, final: np.ndarray) -> float:
    """Of one bf16 tensor: entropy of changed-or-not and of the ULP step, given the base's exponent."""
    moved_by, exponent = steps(base, final), (base >> 7) & 0xFF
    bits = 0.0
    for e in np.flatnonzero(np.bincount(exponent, minlength=256)):
        own = moved_by[exponent == e]
        moved = own[own != 0]
        bits += own.size * entropy_bits(np.array([own.size - moved.size, moved.size]))
        if moved.size:
            bits += moved.size * entropy_bits(np.unique(moved, return_counts=True)[1])
    return bits / 8


def seed_workload(seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """fp32 768x2304 N(0, 0.14), 10% changed by N(0, 0.01): base, final and the bound in bytes."""
    rng = np.random.default_rng(seed)
    shape, share, sigma = (768, 2304), 0.1, 0.01
    base = (rng.standard_normal(shape) * 0.14).astype(np.float32)
    mask = rng.random(shape) < share
    final = np.where(mask, base + (rng.standard_normal(shape) * sigma).astype(np.float32), base)
    value_bits = np.log2(sigma * np.sqrt(2 * np.pi * np.e) / np.spacing(np.abs(final[mask]))).sum()
    bits = base.size * entropy_bits(np.array([share, 1 - share])) + value_bits
    return base, final, float(bits) / 8
