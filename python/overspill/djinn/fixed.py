"""Decode steps at fixed length: the same shapes and addresses every step, so that a CUDA graph can hold them.

A step sees the slab up to a bucket of tokens, masked beyond its position; the position and the token are
on the device. What lies beyond the position is zeroed once a session has come to a slab: masked it weighs
nothing, unless it is NaN.
Paused and steered steps run the same kernels eagerly. Without a GPU, or with eager attention, all steps do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .pool import SessionPool
    from .session import Session

BUCKET_TOKENS = 256
# Eager steps before a capture: libraries set themselves up in the first ones.
WARM_STEPS = 2


class FixedDecoder:
    """The fixed-length steps of one pool. Every use is under the pool's lock."""

    def __init__(self, pool: SessionPool) -> None:
        self.pool = pool
        device = pool.shape.device
        self.ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        # Eager attention makes its mask from a tensor of the CPU's, which a graph cannot hold.
        self._captures = device.type == "cuda" and pool.model.config._attn_implementation == "sdpa"

    def length(self, tokens: int) -> int:
        """The bucket for a session of ``tokens``, the step's own included."""
        return min(-(-tokens // BUCKET_TOKENS) * BUCKET_TOKENS, self.pool.session_tokens)

    @contextmanager
    def step(self, session: Session) -> Iterator[None]:
        """Within it, a forward of one token runs at fixed length."""
        cache = session.cache
        length = self.length(cache.start + 1)
        self.position.fill_(cache.start)
        cache.fixed = (self.position, length)
        try:
            yield
        finally:
            cache.fixed = None

    def burst(
        self, session: Session, slab: int, token: int, count: int, ends: list[int]
    ) -> tuple[list[int], torch.Tensor]:
        """``count`` greedy steps from ``token`` on, fewer if one of ``ends`` comes; their tokens, and the
        logits of the last. The session is running and none of its layers is awaited.
        """
        start, done = session.cache.start, 0
        self.ids.fill_(token)
        chosen = torch.empty(count, dtype=torch.long, device=self.ids.device)
        while done < count:
            # Until the bucket is full.
            length = self.length(start + done + 1)
            until = min(count, length - start)
            session.cache.start = start + done
            for layer in range(len(session.cache.layers)):
                session.cache.clear(layer, length)
            with self.step(session):
                while done < until:
                    logits = self._run(session, slab, length)
                    following = logits[0, -1].argmax()
                    chosen[done] = following
                    self.ids.copy_(following.view(1, 1))
                    self.position.add_(1)
                    done += 1
                    if ends and int(following) in ends:
                        count = until = done
        session.cache.start = start + done
        return chosen[:done].tolist(), logits.clone()

    def _run(self, session: Session, slab: int, length: int) -> torch.Tensor:
        if not self._captures:
            return self._call(session)
        key = (slab, length)
        if key not in self._graphs:
            self._graphs[key] = self._capture(session)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _capture(self, session: Session) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of one step; what it writes while it is made is what its replay writes."""
        side = torch.cuda.Stream(self.ids.device)
        side.wait_stream(torch.cuda.current_stream(self.ids.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self._call(session)
        torch.cuda.current_stream(self.ids.device).wait_stream(side)
        # Steps never run at once, so their graphs share what memory they need beside the slabs. The memory is
        # the graphs': torch refuses a handle of which every graph, the one that failed included, is gone.
        memory = next((graph.pool() for graph, _ in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        # Other threads may bring sessions back meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits = self._call(session)
        return graph, logits

    def _call(self, session: Session) -> torch.Tensor:
        with torch.no_grad():
            return self.pool._call(session.cache, self.ids, 1)
