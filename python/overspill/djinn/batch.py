"""One forward of one token for each of several sessions: rows of a batch, keys and values each in its own slab.

Weights are read once for all rows. A row's attention is over its own slab, at its own length: nothing is padded and
nothing is gathered. On a GPU, in 16 bit, it is one kernel for all rows (flash attention over the arena as one long
sequence, in which a row begins where its slab does); elsewhere a row at a time, as that session alone would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import SessionError

if TYPE_CHECKING:
    from .pool import SessionPool
    from .session import Session

# Rotary tables that depend on the longest row: a row would get other bits beside a longer one, and other values.
SHARED_ROPES = ("dynamic", "longrope")


def can_batch(pool: SessionPool) -> bool:
    """Whether sessions of this model may share a forward; else they run one after the other."""
    config = pool.model.config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes, *(one for one in ropes.values() if isinstance(one, dict))]
    shared = any(one.get("rope_type") in SHARED_ROPES for one in kinds)
    return config._attn_implementation == "sdpa" and not shared


class ArenaTokens:
    """A pool's arena as tokens: what a kernel needs to find any row of any layer by one number."""

    def __init__(self, pool: SessionPool) -> None:
        shape = pool.shape
        self.arena = pool._arena.view(shape.dtype)
        self.size = (shape.heads, shape.head_dim)
        self.run_tokens = pool._native.run_bytes // shape.token_bytes
        self.slab_tokens = pool._slab_bytes // shape.token_bytes
        slabs = pool._arena.numel() // pool._slab_bytes
        self.count = (slabs - 1) * self.slab_tokens + pool.session_tokens
        self.longest = pool.session_tokens
        # Runs are aligned: of some shapes they are no whole number of tokens.
        whole = pool._native.run_bytes % shape.token_bytes == 0
        fits = shape.dtype.itemsize == 2 and shape.head_dim % 8 == 0 and shape.head_dim <= 256
        self.has_kernel = whole and fits and shape.device.type == "cuda" and not any(shape.windows)

    def part(self, layer: int, part: int) -> torch.Tensor:
        """Keys (0) or values (1) of a layer, (tokens, heads, head_dim): token ``slab * slab_tokens + t`` is token
        ``t`` of that slab; what lies between is other layers'.
        """
        heads, dim = self.size
        first = (2 * layer + part) * self.run_tokens * heads * dim
        return self.arena.as_strided((self.count, heads, dim), (heads * dim, dim, 1), first)


@dataclass(frozen=True)
class Numbers:
    """What a step has on the device: per row its token, its position and its slab's first token (3, rows), and
    where each row's query begins.
    """

    of_rows: torch.Tensor
    queries: torch.Tensor

    @classmethod
    def make(cls, of_rows: list[list[int]], device: torch.device) -> Numbers:
        """Without waiting for what the device does."""
        count = len(of_rows[0])
        host = torch.tensor(of_rows, dtype=torch.long, pin_memory=device.type == "cuda")
        queries = torch.arange(count + 1, dtype=torch.int32, device=device)
        return cls(host.to(device, non_blocking=True), queries)


class Rows:
    """The rows of a batch: sessions that run, each on its slab. ``lengths`` are their tokens before the step."""

    def __init__(self, pool: SessionPool, sessions: Sequence[Session], slabs: Sequence[int]) -> None:
        self.pool, self.sessions = pool, list(sessions)
        self.views = [pool._slab_view(slab) for slab in slabs]
        self.lengths = [session.cache.start for session in sessions]
        self.tokens = pool._batches.tokens
        self.layer = 0
        self.cache = BatchCache(self)
        ids = [session._the_turn().ids[0] for session in self.sessions]
        firsts = [slab * self.tokens.slab_tokens for slab in slabs]
        self.numbers = Numbers.make([ids, self.lengths, firsts], pool.shape.device)

    def move_to(self, numbers: Numbers) -> None:
        """Takes other memory for its numbers, which a graph knows."""
        if numbers is not self.numbers:
            numbers.of_rows.copy_(self.numbers.of_rows)
            self.numbers = numbers

    def follow(self, tokens: torch.Tensor) -> None:
        """Goes on to the step over ``tokens``, one a row."""
        ids, positions, _ = self.numbers.of_rows
        ids.copy_(tokens)
        positions.add_(1)
        self.lengths = [length + 1 for length in self.lengths]

    def forward(self) -> torch.Tensor:
        """The logits of the step, (rows, 1, vocabulary)."""
        ids, positions, firsts = self.numbers.of_rows
        if self.tokens.has_kernel:
            self.at = firsts + positions
            self.used = (positions + 1).to(torch.int32)
            # Where each row begins; the end of the last is not read, the lengths are `used`.
            self.begins = torch.cat([firsts, firsts[-1:]]).to(torch.int32)
        # A mask of four dimensions is handed through: the rows' attention needs none.
        mask = torch.ones((len(self.sessions), 1, 1, 1), dtype=torch.bool, device=ids.device)
        return self.pool.model(
            input_ids=ids.view(-1, 1), position_ids=positions.view(-1, 1), attention_mask=mask,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Puts the new token of each row, (rows, heads, 1, head_dim), behind its tokens."""
        self.layer = layer
        stream = self.pool._stream()
        for session in self.sessions:
            if session.cache.pending:
                self.pool._native.touch(session._key, layer, stream)
        for part, new in enumerate((keys, values)):
            if self.tokens.has_kernel:
                self.tokens.part(layer, part).index_copy_(0, self.at, new.squeeze(2))
            else:
                for row, (view, length) in enumerate(zip(self.views, self.lengths, strict=True)):
                    view[2 * layer + part, 0, :, length] = new[row, :, 0]

    def attend(
        self, plain: Any, module: torch.nn.Module, query: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Attention of the layer that was written last, for ``query`` (rows, heads, 1, head_dim): (rows, 1, heads,
        head_dim). ``plain`` is transformers' own.
        """
        if self.tokens.has_kernel:
            keys, values = self.tokens.part(self.layer, 0), self.tokens.part(self.layer, 1)
            out = torch.ops.aten._flash_attention_forward(
                query.squeeze(2), keys, values, self.numbers.queries, self.begins, 1, self.tokens.longest, 0.0, False, False,
                scale=options.get("scaling"), seqused_k=self.used,
            )[0]  # fmt: skip
            return out.unsqueeze(1)
        window, found = self.pool.shape.windows[self.layer], []
        for row, (view, length) in enumerate(zip(self.views, self.lengths, strict=True)):
            first = 0 if window is None else max(length - window + 1, 0)
            seen = view[2 * self.layer : 2 * self.layer + 2, :, :, first : length + 1]
            found.append(plain(module, query[row : row + 1], seen[0], seen[1], None, **options)[0])
        return torch.cat(found)


class BatchLayer(CacheLayerMixin):
    """One layer of all rows."""

    is_sliding = False
    is_compileable = False

    def __init__(self, rows: Rows, index: int) -> None:
        super().__init__()
        self.rows, self.index, self.is_initialized = rows, index, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the arena exists."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the new tokens. Attention finds the others by itself: see :meth:`Rows.attend`."""
        self.rows.write(self.index, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never of use: rows need no mask."""
        raise SessionError("rows of a batch have no mask")

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.rows.lengths)

    def get_max_length(self) -> int:
        """Tokens that a slab holds."""
        return self.rows.pool.session_tokens


class BatchCache(Cache):
    """What the model takes for its cache."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(layers=[BatchLayer(rows, index) for index in range(len(rows.pool.shape.layers))])
