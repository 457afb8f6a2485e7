"""The cache of one session, for transformers: keys and values in the session's slab.

Layer ``i`` writes its new tokens into the slab and hands out views of it. Between forwards the slab
may be anybody's, so the first layer of a forward asks the pool for it; the last one cannot give it back
(its attention has yet to read), so the pool closes the forward when it is next used, at a point of the
stream by which everything of it has been enqueued.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import SessionError

if TYPE_CHECKING:
    from .session import Session


class SlabLayer(CacheLayerMixin):
    """One layer of a session."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: SessionCache, index: int, window: int | None) -> None:
        super().__init__()
        self.cache = cache
        self.index = index
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether shapes are fixed, which they are in a step at fixed length."""
        return self.cache.fixed is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the arena exists."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the new tokens; all that attention is to see."""
        cache, count = self.cache, key_states.shape[-2]
        cache.ready(self.index, key_states)
        keys, values = 2 * self.index, 2 * self.index + 1
        if cache.fixed is not None:
            position, length = cache.fixed
            seen = cache.rows(0, length)
            seen[keys].index_copy_(2, position, key_states)
            seen[values].index_copy_(2, position, value_states)
            return seen[keys], seen[values]
        start = cache.start
        new = cache.rows(start, count)
        # One kernel for both where torch has one.
        torch._foreach_copy_(new[keys : keys + 2], (key_states, value_states))
        first = self._first(start)
        seen = cache.rows(first, start + count - first)
        if cache.announces:
            cache.session._wrote(self.index, start + count)
        return seen[keys], seen[values]

    def _first(self, start: int) -> int:
        """The first token that a forward from ``start`` on sees, as ``DynamicSlidingWindowLayer`` has it."""
        return 0 if self.window is None else max(start - self.window + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that attention is to see, and the first of them."""
        if self.cache.fixed is not None:
            return self.cache.fixed[1], 0
        start = self.cache.start
        first = self._first(start)
        return start + query_length - first, first

    def get_seq_length(self) -> int:
        """Tokens before the forward that is running or comes next."""
        return self.cache.fixed[0] if self.cache.fixed is not None else self.cache.start  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Tokens that a slab holds."""
        return self.cache.session.pool.session_tokens


class SessionCache(Cache):
    """See the module. ``session.cache`` is one; it is not made by hand."""

    def __init__(self, session: Session) -> None:
        windows = session.pool.shape.windows
        super().__init__(layers=[SlabLayer(self, i, window) for i, window in enumerate(windows)])
        self.session = session
        # Tokens that every layer has: where the running forward starts.
        self.start = 0
        # In a step at fixed length: where it writes, on the device, and the length of what it sees.
        self.fixed: tuple[torch.Tensor, int] | None = None
        self.slab_view: torch.Tensor | None = None
        # Cuts of the slab that this forward has asked for, by first token and count.
        self.cuts: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        self.pending = False
        self.slab = -1
        # Per layer, the token up to which the slab holds nothing of anybody else's.
        self.cleared = [0] * len(windows)
        # Whether layers tell the session what they have written: not where a forward's end does.
        self.announces = False

    def entered(self, slab: int, view: torch.Tensor, pending: bool) -> None:
        """A forward begins on ``slab``, some layers of which may have to be waited for."""
        if slab != self.slab or pending:
            self.forget()
        self.slab, self.slab_view, self.pending = slab, view, pending

    def left(self) -> None:
        """The forward is over: all of it has been enqueued."""
        self.slab_view = None
        self.cuts.clear()

    def forget(self) -> None:
        """Anything may lie behind the tokens of the slab."""
        self.cleared = [0] * len(self.cleared)

    def clear(self, layer: int, length: int) -> None:
        """Zeroes what lies behind the tokens of a layer, up to ``length``. The token that is being written
        next is left alone: after a pause layers have it already.
        """
        first = max(self.start + 1, self.cleared[layer])
        if first < length:
            assert self.slab_view is not None
            self.slab_view[2 * layer : 2 * layer + 2, :, :, first:length].zero_()
            self.cleared[layer] = length

    def rows(self, first: int, count: int) -> tuple[torch.Tensor, ...]:
        """Tokens ``first`` on of the keys and values of every layer. Cut for all layers at once: eager
        decode is as fast as its Python, and layers ask for the same.
        """
        found = self.cuts.get((first, count))
        if found is None:
            assert self.slab_view is not None
            found = self.cuts[first, count] = self.slab_view.narrow(3, first, count).unbind(0)
        return found

    def ready(self, layer: int, key_states: torch.Tensor) -> None:
        """Makes a layer's slab usable from here on, behind what still happens to it."""
        if key_states.shape[0] != 1:
            raise SessionError(
                f"a session is one sequence, not {key_states.shape[0]}", session=self.session.id
            )
        if self.slab_view is None:
            self.session._enter_from_outside(key_states.shape[-2])
        if self.pending:
            self.session.pool._native.touch(self.session._key, layer, self.session.pool._stream())
        if self.fixed is not None:
            self.clear(layer, self.fixed[1])

    def reset(self) -> None:
        """Refused: a session only grows."""
        raise SessionError("a session cannot be reset; make a new one", session=self.session.id)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, as :meth:`reset`."""
        raise SessionError("a session cannot be cropped; fork it before it grows", session=self.session.id)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: beams are forks."""
        raise SessionError("a session has one beam; fork it instead", session=self.session.id)
