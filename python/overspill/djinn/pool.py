"""The pool: one model, one arena, many sessions."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .._edge import edge_for
from .._native import DjinnPool
from .._units import format_bytes, parse_bytes
from ..errors import BudgetError, FormatError, SessionError
from .attention import repeatable_attention
from .decode import BatchDecoder
from .families import fingerprint, shape_of
from .fixed import FixedDecoder
from .outcome import Generated, Ongoing, Paused
from .session import Session
from .steering import Steer

# A pool grows its host memory by this much at a time.
SLAB_BYTES = 1 << 30
# A layer's new tokens are copied out while later layers compute if they are at least this many bytes;
# copies much smaller than that do not fill the link.
FLUSH_BYTES = 1 << 20
DEFAULT_SESSION_TOKENS = 4096
# Hidden states of at least this many bytes leave into page-locked memory: from ordinary memory they come
# back at a sixth of the link.
PINNED_BYTES = 1 << 20


class SessionPool:
    """Keeps many sessions of ``model`` within ``vram_budget``.

    Args:
        model: a causal language model of transformers, of a proved family, in eval mode, on one device.
        vram_budget: all that the process may hold on the device; what the model does not take, less
            ``workspace``, becomes the arena.
        host_budget: most host memory for the sessions' copies.
        spill_dir: where sessions go when host memory is full; None: nowhere.
        session_tokens: the longest session; every slab is that long.
        arena_budget: bytes of the arena, instead of what ``vram_budget`` leaves.
        workspace: what forwards need beside weights and sessions.
        spill_limit: most bytes on disk.
        write_through: whether host copies follow as sessions grow.
        fixed_decode: whether steps of one token run at fixed length, on a GPU as CUDA graphs: several times
            as fast, and other bits than at exact length (the kernels differ), the same paused or not.
        seed: on a machine without a GPU, interleaves copies and compute at random; for tests.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vram_budget: int | str | None = None,
        host_budget: int | str = "1GiB",
        spill_dir: str | os.PathLike[str] | None = None,
        *,
        session_tokens: int | None = None,
        arena_budget: int | str | None = None,
        workspace: int | str = "1GiB",
        spill_limit: int | str = "16GiB",
        write_through: bool = True,
        fixed_decode: bool = False,
        seed: int | None = None,
    ) -> None:
        self.model = model
        self.shape = shape_of(model)
        self.fingerprint = fingerprint(model)
        self._edge = edge_for(self.shape.device)
        positions = getattr(model.config, "max_position_embeddings", DEFAULT_SESSION_TOKENS)
        self.session_tokens = session_tokens or min(positions, DEFAULT_SESSION_TOKENS)
        slab_bytes = DjinnPool.slab_bytes(len(self.shape.layers), self.session_tokens, self.shape.token_bytes)
        arena_bytes = self._arena_bytes(vram_budget, arena_budget, workspace) // slab_bytes * slab_bytes
        if arena_bytes == 0:
            needs = f"one session of {self.session_tokens} tokens takes {format_bytes(slab_bytes)}"
            raise BudgetError(f"no room for a session on the device: {needs}", requested_bytes=slab_bytes)
        self._arena = torch.zeros(arena_bytes, dtype=torch.uint8, device=self.shape.device)
        host_bytes = parse_bytes(host_budget, "host_budget")
        self._native = DjinnPool(
            self._edge.engine_name, self._arena.data_ptr(), arena_bytes, self._arena,
            layers=len(self.shape.layers), tokens=self.session_tokens, token_bytes=self.shape.token_bytes,
            host_budget_bytes=host_bytes, slab_bytes=min(SLAB_BYTES, host_bytes),
            spill_dir=None if spill_dir is None else os.fspath(spill_dir),
            spill_limit_bytes=0 if spill_dir is None else parse_bytes(spill_limit, "spill_limit"),
            write_through=write_through, flush_bytes=FLUSH_BYTES, seed=seed,
        )  # fmt: skip
        self._slab_bytes = slab_bytes
        spill_bytes = 0 if spill_dir is None else parse_bytes(spill_limit, "spill_limit")
        self._limits = {"host_budget_bytes": host_bytes, "spill_limit_bytes": spill_bytes}
        self._views: dict[int, torch.Tensor] = {}
        self._sessions: dict[str, Session] = {}
        self._next_key = 0
        self._lock = threading.RLock()
        self._fixed = FixedDecoder(self) if fixed_decode else None
        self._batches = BatchDecoder(self, captures=self._fixed is not None and self._fixed._captures)
        self._lingering: tuple[Session, int] | None = None
        self._timer: threading.Timer | None = None

    def session(self, name: str) -> Session:
        """The session called ``name``, made if there is none."""
        with self._lock:
            found = self._sessions.get(name)
            return found if found is not None else self._new(name, self._native.create)

    def load(
        self, path: str | os.PathLike[str], name: str, steering: Mapping[str, Steer] | None = None
    ) -> Session:
        """Adds a session that :meth:`Session.save` wrote, under ``name``.

        Args:
            path: the file.
            name: what the session is called here.
            steering: the callables that it was steered with, by name.
        """
        with self._lock:
            records: list[str] = []
            session = self._new(name, lambda key: records.append(self._native.load(key, os.fspath(path))))
            try:
                record: dict[str, Any] = json.loads(records[0])
                if record["model"] != self.fingerprint:
                    raise FormatError(f"{os.fspath(path)} is of another model", path=os.fspath(path))
                session._restore_record(record, steering or {})
            except BaseException:
                session._turn = None
                session.close()
                raise
            return session

    def decode(
        self, sessions: Sequence[Session], steps: int = 1, bring: Sequence[Session] = ()
    ) -> list[Paused | Generated | Ongoing]:
        """Generates ``steps`` tokens more for each of ``sessions``, together: weights are read once a step for all.

        Each of them generates already (:meth:`Session.start`, or paused in :meth:`Session.generate`), each as far as it
        was started for, with its own breakpoints, sampler and steering. All have to fit on the device at once.
        Meanwhile sessions of ``bring`` start to come back, one every few steps, as :meth:`Session.restore` has it.

        Returns:
            What became of each, in their order: it stopped at a breakpoint, is at its end, or goes on.

        Raises:
            SessionError: a session is not generating, is there twice, or has no room; nothing was done.
            BudgetError: they do not fit; those that went on before stand where they got to.
        """
        with self._lock:
            return self._batches.decode(sessions, steps, bring)

    def run_together(self, sessions: Sequence[Session], tokens: Sequence[int]) -> list[torch.Tensor]:
        """One forward of one token for each of ``sessions``, none of which is paused or generating; the logits of
        each, (vocabulary). Which sessions share the forward may change their last bits: see :meth:`decode`.

        Raises:
            SessionError: a session is paused, empty, there twice, or has no room; nothing was done.
            BudgetError: they do not fit on the device at once; nothing was done.
        """
        with self._lock:
            return self._batches.together(sessions, tokens)

    def sessions(self) -> list[Session]:
        """All sessions."""
        return list(self._sessions.values())

    def report(self) -> dict[str, Any]:
        """What the pool holds and has done, in bytes and counts."""
        with self._lock:
            self._settle()
            counters: dict[str, Any] = json.loads(self._native.counters_json())
            return {
                "arena_bytes": self._arena.numel(),
                "slab_bytes": self._slab_bytes,
                **self._limits,
                **counters,
            }

    def synchronize(self) -> None:
        """Blocks until no copy is under way."""
        with self._lock:
            self._settle()
            self._native.drain()

    def tick(self, lead_ms: float = 0.0) -> int:
        """Does what the scheduler has to do by now: brings sessions back before they are due, as far as there is
        room, and sends sessions away before room is needed. It calls itself for sessions in ``io_wait``.

        Args:
            lead_ms: who is due within this much more than its way takes comes back as well.

        Returns:
            How many sessions came back.
        """
        with self._lock:
            self._settle()
            restored = self._native.tick(lead_ms * 1e3)
            self._follow()
            self._arm()
            return restored

    def turns(self) -> list[Session]:
        """Does what the scheduler has to do by now; those that asked (:meth:`Session.ask`) and whose turn it is since
        the last call.
        """
        with self._lock:
            self._settle()
            keys = set(self._native.turns())
            self._follow()
            return [session for session in self._sessions.values() if session._key in keys] if keys else []

    # ---- for sessions ----------------------------------------------------------------------------

    def _arena_bytes(
        self, vram_budget: int | str | None, arena_budget: int | str | None, workspace: int | str
    ) -> int:
        if arena_budget is not None:
            return parse_bytes(arena_budget, "arena_budget")
        held = self._edge.allocated_bytes()
        total = (
            held + self._edge.free_bytes() if vram_budget is None else parse_bytes(vram_budget, "vram_budget")
        )
        room = total - held - parse_bytes(workspace, "workspace")
        if room <= 0:
            message = (
                f"vram_budget of {format_bytes(total)} leaves nothing for sessions: {format_bytes(held)} are"
            )
            facts = {"requested_bytes": held, "budget_bytes": total, "tier": "device"}
            raise BudgetError(f"{message} held already, workspace is {workspace}", **facts)
        return room

    def _new(self, name: str, make: Callable[[int], None]) -> Session:
        if name in self._sessions:
            raise SessionError(f"there is a session {name!r} already", session=name)
        self._next_key += 1
        make(self._next_key)
        session = Session(self, name, self._next_key)
        self._sessions[name] = session
        return session

    def _forget(self, session: Session) -> None:
        self._sessions.pop(session.id, None)

    def _call(self, cache: Any, ids: torch.Tensor, keep: int) -> torch.Tensor:
        step = self.shape.device.type == "cuda" and cache.fixed is not None
        with repeatable_attention(cache.start, step):
            return self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep
            ).logits

    def _ids(self, ids: list[int]) -> torch.Tensor:
        """Token ids on the device, without waiting for what it does."""
        device = self.shape.device
        if len(ids) == 1:
            return torch.full((1, 1), ids[0], device=device)
        return torch.tensor([ids], pin_memory=device.type == "cuda").to(device, non_blocking=True)

    def _stream(self) -> int:
        return self._edge.stream()

    def _touch_all(self, session: Session) -> None:
        """Makes the current stream wait for all of a session's slab."""
        stream = self._stream()
        for layer in range(len(self.shape.layers)):
            self._native.touch(session._key, layer, stream)
        session.cache.pending = False

    def _is_large(self, count: int) -> bool:
        return 2 * count * self.shape.token_bytes >= FLUSH_BYTES

    def _slab_view(self, slab: int) -> torch.Tensor:
        """A slab as one tensor: (keys and values of each layer in turn, 1, heads, tokens, head_dim)."""
        if slab not in self._views:
            shape, itemsize = self.shape, self.shape.dtype.itemsize
            run = self._native.run_bytes // itemsize
            size = (2 * len(shape.layers), 1, shape.heads, self.session_tokens, shape.head_dim)
            stride = (run, run, shape.head_dim, shape.heads * shape.head_dim, 1)
            flat = self._arena.view(shape.dtype)
            self._views[slab] = flat.as_strided(size, stride, slab * self._slab_bytes // itemsize)
        return self._views[slab]

    def _linger(self, session: Session) -> None:
        self._lingering = (session, self._stream())

    def _is_lingering(self, session: Session) -> bool:
        return self._lingering is not None and self._lingering[0] is session

    def _settle(self) -> None:
        """Closes a forward that transformers ran, now that all of it has been enqueued."""
        if self._lingering is not None:
            (session, stream), self._lingering = self._lingering, None
            session._leave(session.cache.start, None, stream)

    def _follow(self) -> None:
        """The hidden state of a paused session leaves the device with its keys and values."""
        if self.shape.device.type == "cpu":
            return
        for session in self._sessions.values():
            turn = session._turn
            if turn is None or turn.hidden is None or turn.hidden.device.type == "cpu":
                continue
            if not self._native.place(session._key)[0]:
                changed = turn.hidden_changed or turn.hidden._version != turn.hidden_version
                turn.hidden = _host_copy(turn.hidden)
                turn.hidden_changed, turn.hidden_version = changed, turn.hidden._version

    def _arm(self) -> None:
        """Looks again when the scheduler has something to do."""
        wake_us = self._native.wake_us()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if wake_us is not None:
            self._timer = threading.Timer(
                min(wake_us / 1e6, threading.TIMEOUT_MAX), _tick, [weakref.ref(self)]
            )
            self._timer.daemon = True
            self._timer.start()


def _host_copy(hidden: torch.Tensor) -> torch.Tensor:
    pinned = hidden.numel() * hidden.itemsize >= PINNED_BYTES
    return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=pinned).copy_(hidden)


def _tick(reference: weakref.ref[SessionPool]) -> None:
    """Brings back what is due. Without room it stays where it is: its next forward makes room, or says why not."""
    pool = reference()
    if pool is not None:
        with contextlib.suppress(BudgetError):
            pool.tick()
