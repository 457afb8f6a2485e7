"""``docs/tpde-format.md`` is enough to read a patch: a decoder written from it alone, slow and without overspill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

GOLDEN = Path(__file__).parents[2] / "crates/overspill-tpde/tests/golden"
WORD_BYTES = [1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 1, 1, 1, 1, 1, 1, 1, 1, 4]
FLOATS = {
    9: (5, 10),
    10: (8, 7),
    11: (8, 23),
    12: (11, 52),
    13: (4, 3),
    14: (5, 2),
    16: (4, 3),
    17: (5, 2),
    21: (8, 23),
}
QUOTIENTS = dict(
    zip(range(6, 16), [42366, 46052, 49152, 51759, 53951, 55794, 57835, 58997, 59992, 60842], strict=True)
)


class Bits:
    def __init__(self, data: bytes) -> None:
        self.value, self.at, self.end = int.from_bytes(data, "little"), 0, 8 * len(data)

    def get(self, width: int) -> int:
        self.at += width
        assert self.at <= self.end
        return self.value >> (self.at - width) & ((1 << width) - 1)

    def golomb(self, order: int) -> int:
        low = order
        while not self.get(1):
            low += 1
        return (1 << low | self.get(low)) - (1 << order)

    def signed(self, order: int) -> int:
        folded = self.golomb(order)
        return -(folded + 1) // 2 if folded & 1 else folded // 2

    def bytes_read(self) -> int:
        return (self.at + 7) // 8

    def frequencies(self) -> list[int]:
        precision, first, more, order = self.get(4), self.golomb(1), self.golomb(1), self.get(3)
        used = [self.golomb(order) for _ in range(more)]
        return [0] * first + [f << 12 - precision for f in [*used, (1 << precision) - sum(used)]]

    def ranges(self) -> list[int]:
        """The class of every key."""
        lasts, first = [], 0
        for i in range(self.golomb(3)):
            lasts.append(first + self.golomb(6 if i == 0 else 0))
            first = lasts[-1] + 1
        return [sum(last < key for last in lasts) for key in range(256)]


class Rans:
    def __init__(self, states: list[int], data: bytes) -> None:
        self.states, self.data, self.at, self.next = states, data, 0, 0

    def symbol(self, frequencies: list[int]) -> int:
        lane, self.next = self.next % len(self.states), self.next + 1
        x, symbol, start = self.states[lane], 0, 0
        while start + frequencies[symbol] <= x % 4096:
            start += frequencies[symbol]
            symbol += 1
        x = frequencies[symbol] * (x >> 12) + x % 4096 - start
        if x < 1 << 16:
            x = x << 16 | int.from_bytes(self.data[self.at : self.at + 2], "little")
            self.at += 2
        self.states[lane] = x
        return symbol


def lanes_of_32(data: bytes, tables: list[list[int]]) -> list[int]:
    """A symbol of each table from 32 plain states and a word stream that ends with them."""
    rans = Rans([int.from_bytes(data[i : i + 4], "little") for i in range(0, 128, 4)], data[128:])
    symbols = [rans.symbol(table) for table in tables]
    assert set(rans.states) == {1 << 16} and rans.at == len(data) - 128
    return symbols


def varint(data: bytes) -> tuple[int, bytes]:
    value = shift = at = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, data[at:]


def gap_code(rate: int) -> tuple[int, list[int]]:
    """Low bits and quotient table of a rate."""
    low, table = (0, rate) if rate <= 15 else ((rate - 12) // 4, 12 + rate % 4)
    c = QUOTIENTS[table]
    t = [(65536 - c) << 16]
    while len(t) < 64:
        t.append(t[-1] * c >> 16)
    f = [0, *(max(1, t[q] >> 20) for q in range(1, 63)), max(1, t[63] // (65536 - c) >> 4)]
    return low, [4096 - sum(f), *f[1:]]


def magnitude(symbol: int, bits: int) -> tuple[int, int]:
    """The least magnitude of a symbol and how many raw bits follow."""
    if symbol < 32:
        return symbol, 0
    p, octave, part = 3, 5 + (symbol - 32) // 8, (symbol - 32) % 8
    if bits == 64:
        p, octave, part = 2, 5 + (symbol - 32) // 4, (symbol - 32) % 4
        if octave >= 32:
            p, octave, part = 1, 32 + (symbol - 140) // 2, (symbol - 140) % 2
    return (1 << octave) + (part << octave - p), octave - p


class Segment:
    """One segment: its head, then its chunks."""

    def __init__(self, dtype: int, words: int, row_words: int, is_step: bool, heads: bytes) -> None:
        self.bits, self.float, self.row_words = 8 * WORD_BYTES[dtype], FLOATS.get(dtype), row_words
        self.words, self.is_step, self.row_rate = words, is_step, None
        bits = Bits(heads)
        self.chunk_words = 1 << bits.get(5)
        has_sparse, has_dense, has_planes = bits.get(1), bits.get(1), bits.get(1)
        self.chunks = -(-words // self.chunk_words) if heads[0] else 0
        if has_sparse:
            self.sparse_tables(bits)
        if has_dense:
            self.dense_class_of = bits.ranges()
            self.dense_tables = [bits.frequencies() for _ in range(max(self.dense_class_of) + 1)]
        self.planes = [
            bits.frequencies() if bits.get(1) else None for _ in range(self.bits // 8 if has_planes else 0)
        ]
        self.head_bytes = bits.bytes_read()

    def sparse_tables(self, bits: Bits) -> None:
        self.row_rate = bits.get(7) if bits.get(1) else None
        self.class_of, self.classes, expected = bits.ranges(), [], 8
        for _ in range(max(self.class_of) + 1):
            kind, gaps = "gaps", None
            if bits.get(1):
                rate = expected + bits.signed(1)
                expected, gaps = rate + 4, gap_code(rate)
            else:
                kind = ["still", "dense", "clustered"][bits.get(2)]
                gaps = (0, bits.frequencies()) if kind == "clustered" else None
            values = None if kind == "still" or bits.get(1) else bits.frequencies()
            self.classes.append((kind, gaps, values))

    def step(self, word: int, step: int) -> int:
        half, mask = 1 << self.bits - 1, (1 << self.bits) - 1
        flip = lambda x: x ^ (half - 1) if self.float and x >= half else x  # noqa: E731
        return flip((flip(word) + step) & mask)

    def rotated_back(self, word: int) -> int:
        return word >> 1 | (word & 1) << self.bits - 1 if self.float else word

    def key(self, word: int) -> int:
        if not (self.float and self.is_step):
            return 0
        exponent, mantissa = self.float
        return word >> mantissa + max(exponent - 8, 0) & (1 << min(exponent, 8)) - 1

    def chunk(self, number: int, payload: bytes, words: list[int]) -> list[int]:
        mode, body, size = payload[0] if payload else 0, payload[1:], self.bits // 8
        if mode == 0:
            return words
        if mode == 1:
            return [int.from_bytes(body[i : i + size], "little") for i in range(0, len(body), size)]
        return {2: self.mode_s, 3: self.mode_d, 4: self.mode_w, 5: self.mode_elias}[mode](number, body, words)

    def mode_w(self, _number: int, body: bytes, words: list[int]) -> list[int]:
        made = [0] * len(words)
        for table in self.planes:
            if table is None:
                plane, body = body[: len(words)], body[len(words) :]
            else:
                coded, body = varint(body)
                plane, body = bytes(lanes_of_32(body[:coded], [table] * len(words))), body[coded:]
            made = [word << 8 | byte for word, byte in zip(made, plane, strict=True)]
        assert not body
        return [self.rotated_back(word) for word in made]

    def mode_d(self, _number: int, body: bytes, words: list[int]) -> list[int]:
        coded, body = varint(body)
        tables = [self.dense_tables[self.dense_class_of[self.key(word)]] for word in words]
        raw, made = Bits(body[coded:]), []
        for word, symbol in zip(words, lanes_of_32(body[:coded], tables), strict=True):
            sign = -1 if symbol and raw.get(1) else 1
            least, low = magnitude(symbol, self.bits)
            made.append(self.step(word, sign * (least + raw.get(low))))
        return made

    def mode_elias(self, _number: int, body: bytes, words: list[int]) -> list[int]:
        count, body = varint(body)
        distances = Bits(b"")
        if count < len(words):
            size, body = varint(body)
            distances, body = Bits(body[:size]), body[size:]
        values, at, words = zstandard.ZstdDecompressor().decompress(body), -1, words.copy()
        for i in range(0, len(values), self.bits // 8):
            length = distances.golomb(0) if count < len(words) else 0
            at += 1 << length | distances.get(length)
            value = int.from_bytes(values[i : i + self.bits // 8], "little")
            words[at] = self.step(words[at], value) if self.is_step else value
        return words

    def mode_s(self, number: int, body: bytes, words: list[int]) -> list[int]:
        counts, row_symbols, before = Bits(body), 0, 0
        lanes, order = 1 << counts.get(3), counts.get(4)
        if self.row_rate is not None:
            row_symbols = counts.golomb(order)
        symbols_of = []
        for kind, _, _ in self.classes:
            before += counts.signed(order) if kind != "still" else 0
            symbols_of.append(before if kind != "still" else 0)
        packed = Bits(body[counts.bytes_read() :])
        states = [(1 << (width := 16 + packed.get(4))) | packed.get(width) for _ in range(lanes)]
        rans = Rans(states, body[counts.bytes_read() + packed.bytes_read() :])

        def quotients(count: int, code: tuple[int, list[int]], clustered: bool = False) -> list[int]:
            found, carry = [], 0
            for _ in range(count):
                symbol = rans.symbol(code[1])
                if symbol == 63 and not clustered:
                    carry += 63
                else:
                    found.append(carry + symbol)
                    carry = 0
            return found

        rows = quotients(row_symbols, gap_code(self.row_rate)) if self.row_rate is not None else []
        gaps = [
            quotients(count, gaps, kind == "clustered") if gaps else []
            for count, (kind, gaps, _) in zip(symbols_of, self.classes, strict=True)
        ]
        changed = [
            count if kind == "dense" else len(own)
            for count, own, (kind, _, _) in zip(symbols_of, gaps, self.classes, strict=True)
        ]
        symbols = [
            [rans.symbol(table) for _ in range(count)] if table else [1] * count
            for count, (_, _, table) in zip(changed, self.classes, strict=True)
        ]
        assert all(state >> 16 == 1 for state in rans.states)
        raw = b"".join((state & 0xFFFF).to_bytes(2, "little") for state in rans.states) + rans.data[rans.at :]
        first, rows_changed, row = Bits(raw), set(), -1
        for quotient in rows:
            low = gap_code(self.row_rate)[0]
            row += (quotient << low | first.get(low)) + 1
            rows_changed.add(row)
        ranks, signs = [], []
        for own, (kind, code, _) in zip(gaps, self.classes, strict=True):
            rank, found, negative = -1, [], []
            for quotient in own:
                if kind == "clustered":
                    least, low = magnitude(quotient, 32)
                    gap = least + first.get(low)
                else:
                    gap = quotient << code[0] | first.get(code[0])
                rank += gap + 1
                found.append(rank)
                negative.append(first.get(1) if self.is_step else 0)
            ranks.append(found)
            signs.append(negative)
        second, values = Bits(raw[first.bytes_read() :]), []
        for i, (own, (kind, _, table)) in enumerate(zip(symbols, self.classes, strict=True)):
            if kind == "dense":
                ranks[i], signs[i] = list(range(len(own))), [0] * len(own)
            found = []
            for n, symbol in enumerate(own):
                if kind == "dense" and symbol and self.is_step:
                    signs[i][n] = second.get(1)
                if self.is_step:
                    least, low = magnitude(symbol, self.bits)
                    found.append((least + second.get(low)) * (-1 if signs[i][n] else 1))
                else:
                    assert table and kind != "dense"
                    low = self.bits - 8
                    found.append(self.rotated_back(symbol << low | second.get(low)))
            values.append(dict(zip(ranks[i], found, strict=True)))
        made, seen, start = words.copy(), [0] * len(values), number * self.chunk_words
        for at, word in enumerate(words):
            if (
                self.row_rate is not None
                and (start + at) // self.row_words - start // self.row_words not in rows_changed
            ):
                continue
            own = self.class_of[self.key(word)]
            if seen[own] in values[own]:
                value = values[own][seen[own]]
                made[at] = self.step(word, value) if self.is_step else value
            seen[own] += 1
        return made


def check(payload: bytes, chunk: int, seed_bytes: bytes) -> int:
    a, b = 0xD6E8FEB86659FD93, 0xA0761D6478BD642F
    c, d = 0x9E3779B97F4A7C15, 0xE7037ED1A0B428DB

    def keyed(data: bytes) -> int:
        padded = data + bytes(4 - len(data) % 4)
        words = (int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4))
        return sum(word * (2 * i + 1) for i, word in enumerate(words)) + len(data) * a

    return (keyed(payload) + chunk * b + keyed(seed_bytes) * d) * c % 2**64 >> 32


def safetensors(data: bytes) -> tuple[dict, dict[str, tuple[str, list[int], bytes]]]:
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    place = lambda entry: slice(start + entry["data_offsets"][0], start + entry["data_offsets"][1])  # noqa: E731
    return metadata, {n: (e["dtype"], e["shape"], data[place(e)]) for n, e in header.items()}


def decode(patch: bytes, base: dict[str, tuple[str, list[int], bytes]]) -> dict[str, bytes]:
    metadata, sections = safetensors(patch)
    assert metadata["tpde"] == "1" and list(sections) == ["blob", "index", "heads", "manifest"]
    blob, index, heads, manifest = (data for _, _, data in sections.values())
    columns = json.loads(zstandard.ZstdDecompressor().decompressobj().decompress(manifest))
    entries = zip(columns["names"], columns["dtypes"], columns["shapes"], columns["bases"], strict=True)
    absolute, made = metadata["kind"] == "absolute", {}
    for name, dtype, shape, base_kind in sorted(entries, key=lambda entry: entry[0].encode()):
        size, count, rows = WORD_BYTES[dtype], 1, 1
        for dim in shape:
            rows, count = count, count * dim
        old = base[name][2] if base_kind else bytes(count * size)
        words = [int.from_bytes(old[i : i + size], "little") for i in range(0, len(old), size)]
        if count:  # the goldens' tensors are of one segment each
            segment = Segment(dtype, count, count // rows, base_kind == 1 and not absolute, heads)
            seed = (
                heads[: segment.head_bytes]
                + bytes([dtype, base_kind, absolute])
                + count.to_bytes(4, "little")
            )
            start = 0
            for chunk in range(segment.chunks):
                end, expected = (int.from_bytes(index[i : i + 4], "little") for i in (0, 4))
                index, payload = index[8:], blob[start:end]
                assert check(payload, chunk, seed) == expected
                part = slice(chunk * segment.chunk_words, (chunk + 1) * segment.chunk_words)
                words[part] = segment.chunk(chunk, payload, words[part])
                start = end
            blob, heads = blob[start:], heads[segment.head_bytes :]
        made[name] = b"".join(word.to_bytes(size, "little") for word in words)
    assert not (index or heads or blob.strip(b"\0"))
    return made


@pytest.mark.parametrize("name", ["standalone", "relative", "absolute", "elias-zstd"])
def test_a_decoder_written_from_the_document_reads_the_golden_patches(name: str) -> None:
    base, final = (safetensors((GOLDEN / f"v1-{n}.safetensors").read_bytes())[1] for n in ("base", "final"))
    found = decode((GOLDEN / f"v1-{name}.tpde").read_bytes(), base)
    assert found == {name: data for name, (_, _, data) in final.items()}
