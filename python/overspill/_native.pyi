"""
The native half of overspill; use it through the `overspill` package.
"""

from _typeshed import SupportsGetItem
from os import PathLike
from pathlib import Path
from typing import Any, Final, SupportsFloat, SupportsIndex, final

__all__ = [
    "__version__",
    "Again",
    "DjinnPool",
    "Engine",
    "HostMemory",
    "LinkCodec",
    "Mark",
    "Onboarding",
    "Planner",
    "Slot",
    "TpdeChain",
    "TpdeDevicePatch",
    "TpdePatch",
    "TpdePlaced",
    "TpdeStreamedPatch",
    "process_memory",
    "resident_peak_bytes",
    "return_freed_tensors",
    "run_cli",
    "serve",
    "tpde_device_state_id",
    "tpde_encode",
    "tpde_pack",
    "tpde_quantize",
    "tpde_state_id",
]

__version__: Final[str]

@final
class Again:
    """
    Makes again what a root-mean-square norm or a gate in bf16 saved, on a CUDA device.
    """
    def __new__(cls, /, ordinal: SupportsIndex) -> Again:
        """
        For CUDA device `ordinal`, its kernels compiled.
        """
    def gate(
        self,
        /,
        count: SupportsIndex,
        gate: SupportsIndex,
        up: SupportsIndex,
        silu: SupportsIndex,
        product: SupportsIndex,
        stream: SupportsIndex,
    ) -> None:
        """
        Of `count` values, a multiple of 8, in bf16 at `gate` and `up`: `silu` and the `product` of that and `up`, behind
        what `stream` has been given. Addresses are multiples of 16.
        """
    def norm(
        self,
        /,
        rows: SupportsIndex,
        columns: SupportsIndex,
        narrow: SupportsIndex,
        scale: SupportsIndex,
        weight: SupportsIndex,
        wide: SupportsIndex,
        normal: SupportsIndex,
        weighted: SupportsIndex,
        stream: SupportsIndex,
    ) -> None:
        """
        Of `rows` rows of `columns`, a multiple of 8, in bf16 at `narrow`, the 32-bit `scale` of each and a bf16
        `weight` of each column: `wide` in 32 bit, and `normal` and `weighted` in bf16, behind what `stream` has been
        given. A `narrow` of 0 says that `wide` is there. Addresses are multiples of 16.
        """

@final
class DjinnPool:
    """
    Keeps the keys and values of many sessions on a device, in host memory and on disk; see the crate
    `overspill-djinn`. The arena is memory of the caller's, at `address`, kept alive by `owner`.
    """
    def __new__(
        cls,
        /,
        device: str,
        address: SupportsIndex,
        arena_bytes: SupportsIndex,
        owner: Any,
        *,
        layers: SupportsIndex,
        tokens: SupportsIndex,
        token_bytes: SupportsIndex,
        host_budget_bytes: SupportsIndex,
        slab_bytes: SupportsIndex,
        spill_dir: str | PathLike[str] | None = None,
        spill_limit_bytes: SupportsIndex = 0,
        write_through: bool = True,
        flush_bytes: SupportsIndex = 1048576,
        lag_tokens: SupportsIndex = 8,
        tail_tokens: SupportsIndex = 64,
        seed: SupportsIndex | None = None,
    ) -> DjinnPool: ...
    def abandon(self, /, id: SupportsIndex, stream: SupportsIndex) -> None:
        """
        Gives up a forward: the session is what it was when it began.
        """
    def ask(self, /, id: SupportsIndex, due_us: SupportsIndex) -> None:
        """
        The session has something to compute, and should start `due_us` from now.
        """
    def begin(self, /, id: SupportsIndex) -> tuple[int, int | None, bool]:
        """
        Starts or resumes a forward: the slab, the layer after which it was paused, and whether any
        layer has to be touched first.
        """
    def counters_json(self, /) -> str:
        """
        Counters as JSON: `slabs`, `slabs_free`, `host`, `disk_bytes` and those of the pool.
        """
    def create(self, /, id: SupportsIndex) -> None:
        """
        Adds an empty session.
        """
    def drain(self, /) -> None:
        """
        Blocks until no copy is under way.
        """
    def drop_host_copy(self, /, id: SupportsIndex) -> None:
        """
        Gives up the host copy of a resident session.
        """
    def end_turn(self, /, id: SupportsIndex) -> None:
        """
        The session computes no more for now, or asks no more.
        """
    def evict(self, /, id: SupportsIndex) -> None:
        """
        Sends a session off the device.
        """
    def expect(self, /, id: SupportsIndex, eta_us: SupportsFloat | SupportsIndex) -> None:
        """
        The session will be needed `eta_us` from now.
        """
    def fork(self, /, parent: SupportsIndex, child: SupportsIndex) -> None:
        """
        A second session with the same tokens and pause.
        """
    def load(self, /, id: SupportsIndex, path: str | PathLike[str]) -> str:
        """
        Adds a session from a file; the record that was saved with it.
        """
    def log_swaps(self, /, open: bool) -> None:
        """
        Begins or ends a log of every swap.
        """
    def park(self, /, id: SupportsIndex, pause: SupportsIndex | None, stream: SupportsIndex) -> None:
        """
        Ends the forward, or stands still after layer `pause`.
        """
    def place(self, /, id: SupportsIndex) -> tuple[bool, int, int]:
        """
        Whether the session is on the device, and its host copy's bytes in host memory and on disk.
        """
    def remove(self, /, id: SupportsIndex) -> None:
        """
        Ends a session.
        """
    def reserve_host(self, /) -> None:
        """
        Takes the whole host budget now.
        """
    def restore(self, /, id: SupportsIndex) -> None:
        """
        Starts bringing a session back.
        """
    @property
    def run_bytes(self, /) -> int:
        """
        Bytes from the start of one part of a layer to the start of the next.
        """
    def save(self, /, id: SupportsIndex, path: str | PathLike[str], record: str) -> None:
        """
        Writes a session and the caller's record to a file.
        """
    @staticmethod
    def slab_bytes(layers: SupportsIndex, tokens: SupportsIndex, token_bytes: SupportsIndex) -> int:
        """
        Bytes of one session's slab.
        """
    def spill(self, /, id: SupportsIndex) -> None:
        """
        Writes the host copy to disk.
        """
    def swaps_json(self, /) -> str:
        """
        What the log has since it was last asked for, as a JSON list; waits for copies that still run.
        """
    def tick(self, /, lead_us: SupportsFloat | SupportsIndex) -> int:
        """
        Does what is due now, and brings back who is due within `lead_us` more than its way takes; how many came.
        """
    def tokens(self, /, id: SupportsIndex) -> list[int]:
        """
        Tokens of each layer.
        """
    def touch(self, /, id: SupportsIndex, layer: SupportsIndex, stream: SupportsIndex) -> None:
        """
        Makes `stream` wait for what still happens to a layer; call it before the layer is used.
        """
    def turns(self, /) -> list[int]:
        """
        The sessions that asked and whose turn it is since the last call.
        """
    def unspill(self, /, id: SupportsIndex) -> None:
        """
        Reads the host copy back from disk.
        """
    def wake_us(self, /) -> int | None:
        """
        How long until `tick` has something to do.
        """
    def wrote(
        self, /, id: SupportsIndex, layer: SupportsIndex, tokens: SupportsIndex, stream: SupportsIndex
    ) -> None:
        """
        The layer has `tokens` from this point of `stream` on.
        """
    def wrote_all(self, /, id: SupportsIndex, tokens: SupportsIndex, stream: SupportsIndex) -> None:
        """
        As `wrote`, of every layer.
        """

@final
class Engine:
    """
    Moves bytes between a device, host memory and a spill file.

    `device` is "cpu" (device memory is the process's own RAM), "sim" (the same under a schedule
    drawn from `seed`; tests may have a bug `planted` in it, to see it found), or "cuda" / "cuda:N".
    Sizes are in bytes.
    """
    def __new__(
        cls,
        /,
        device: str,
        *,
        host_budget_bytes: SupportsIndex,
        slab_bytes: SupportsIndex,
        segment_bytes: SupportsIndex,
        spill_dir: str | PathLike[str] | None = None,
        spill_limit_bytes: SupportsIndex = 0,
        eager_spill: bool = True,
        seed: SupportsIndex | None = None,
        planted: str | None = None,
        trace: bool = False,
    ) -> Engine: ...
    @property
    def capacity_bytes(self, /) -> int:
        """
        Most bytes that can be away at once, on the host and in the spill file.
        """
    def counters_json(self, /) -> str:
        """
        Counters as JSON: `pool`, `disk_bytes`, and per cause `count`, `bytes`, `busy_us`.
        """
    @property
    def device_name(self, /) -> str:
        """
        Name of the device.
        """
    def drain(self, /) -> None:
        """
        Blocks until nothing is under way.
        """
    def mark(self, /, stream: SupportsIndex) -> Mark:
        """
        The end of what `stream` has been given so far.
        """
    def offload(
        self, /, address: SupportsIndex, bytes: SupportsIndex, owner: Any, stream: SupportsIndex | Mark | None
    ) -> Slot:
        """
        Copies `bytes` at `address` away, behind what `stream` has been given so far, or behind a mark. With None at
        once: then whatever wrote them must have passed. `owner` keeps the memory alive and is let go when the copy has
        passed or after `release_source`.
        """
    def onboard(
        self,
        /,
        slot: Slot,
        address: SupportsIndex,
        bytes: SupportsIndex,
        owner: Any,
        stream: SupportsIndex,
        *,
        prefetch: bool,
    ) -> Onboarding:
        """
        Starts bringing `slot` back to `address`, which `stream` may overwrite from now on.
        """
    def release_source(self, /, slot: Slot, stream: SupportsIndex) -> None:
        """
        Makes `stream` wait for the copy of `slot` (and of all before it) and lets their owners go.
        """
    def reserve_host(self, /) -> None:
        """
        Takes the whole host budget now.
        """
    def trace_json(self, /) -> str:
        """
        The timeline of transfers as Perfetto JSON; empty unless made with `trace=True`.
        """

@final
class HostMemory:
    """
    Zeroed host memory that a CUDA device's copy engines reach directly, given back with this object.
    """
    def __new__(cls, /, ordinal: SupportsIndex, bytes: SupportsIndex) -> HostMemory: ...
    @property
    def address(self, /) -> int:
        """
        Address of its first byte.
        """
    @property
    def nbytes(self, /) -> int:
        """
        Length in bytes.
        """
    @staticmethod
    def of_patches(ordinal: SupportsIndex, bytes: SupportsIndex) -> HostMemory:
        """
        The same, not zeroed, of memory that is kept for the next patch when this object goes.
        """

@final
class LinkCodec:
    """
    Packs 16-bit floats for a copy over a link and back, without loss.
    """
    def __new__(cls, /, ordinal: SupportsIndex | None = None) -> LinkCodec:
        """
        The codec of CUDA device `ordinal`, its kernels compiled; without one, the reference codec of the host.
        """
    @staticmethod
    def bound_bytes(nbytes: SupportsIndex) -> int:
        """
        Most bytes of a code of `nbytes`.
        """
    @staticmethod
    def code_bytes(nbytes: SupportsIndex, units: SupportsIndex) -> int:
        """
        Bytes of a code of `nbytes` whose counter says `units`.
        """
    def decode(
        self,
        /,
        words: SupportsIndex,
        nbytes: SupportsIndex,
        is_half: bool,
        code: SupportsIndex,
        code_bytes: SupportsIndex,
        status: SupportsIndex,
        stream: SupportsIndex,
    ) -> None:
        """
        Makes `nbytes` at `words` of the `code_bytes` at `code`, behind what `stream` has been given. The 32-bit
        `status` becomes other than 0 if this is no code.
        """
    def encode(
        self,
        /,
        words: SupportsIndex,
        nbytes: SupportsIndex,
        is_half: bool,
        code: SupportsIndex,
        counter: SupportsIndex,
        length: SupportsIndex,
        stream: SupportsIndex,
    ) -> None:
        """
        Codes `nbytes` at `words` into `bound_bytes` at `code`, both on 16 bytes, and adds the payload's length
        in 16 bytes to the 32-bit `counter`, behind what `stream` has been given; what the counter says then goes to
        `length` in (page-locked) host memory. `is_half`: fp16, not bf16.
        """

@final
class Mark:
    """
    A point of a stream.
    """

@final
class Onboarding:
    """
    A slot on its way back.
    """
    def wait(self, /, stream: SupportsIndex) -> float:
        """
        Makes `stream` wait for the bytes; returns the microseconds for which the host was blocked.
        """

@final
class Planner:
    """
    Decides for each saved piece of storage; see `overspill_storm::Planner`.

    `allocated_bytes` and `peak_bytes` are what is allocated on the device now and was at most since
    the call before. An action is 0 to keep, 1 to offload, 2 to rebuild, 3 to compress and offload.
    """
    def __new__(
        cls,
        /,
        *,
        budget_bytes: SupportsIndex,
        fixed_bytes: SupportsIndex,
        lookahead_bytes: SupportsIndex,
        slack_bytes: SupportsIndex,
        host_bytes: SupportsIndex,
        offload_gbps: SupportsFloat | SupportsIndex,
        onboard_gbps: SupportsFloat | SupportsIndex,
    ) -> Planner:
        """
        A planner for `budget_bytes`, of which `fixed_bytes` are taken whatever happens. What it sends away takes at
        most `host_bytes` where there is another choice.
        """
    def arrived(self, /, unit: SupportsIndex, stalled_us: SupportsFloat | SupportsIndex) -> None:
        """
        `unit` is back; compute waited `stalled_us` for it.
        """
    def deviate(self, /) -> None:
        """
        The step is not the one that was planned.
        """
    def due(
        self, /, unit: SupportsIndex | None, allocated_bytes: SupportsIndex
    ) -> tuple[list[int], list[int]]:
        """
        What to do by now, `unit` having been needed if it is given: `(releases, fetches)`.
        """
    def evicted(self, /, unit: SupportsIndex) -> None:
        """
        The buffer of a unit that was brought back or rebuilt is gone, the unit is not.
        """
    def free(
        self,
        /,
        unit: SupportsIndex,
        allocated_bytes: SupportsIndex,
        peak_bytes: SupportsIndex,
        step_peak_bytes: SupportsIndex | None,
    ) -> bool:
        """
        The last saved tensor of `unit` is gone; `step_peak_bytes` is the most allocated in this step.
        True if that was an event.
        """
    @property
    def has_plan(self, /) -> bool:
        """
        Whether a plan is being followed.
        """
    @property
    def held_bytes(self, /) -> int:
        """
        Bytes of units held on the device now.
        """
    @property
    def is_exploring(self, /) -> bool:
        """
        Whether the step looks for recipes.
        """
    @property
    def is_recording(self, /) -> bool:
        """
        Whether the planner wants to know what is allocated at every event.
        """
    @property
    def is_timing(self, /) -> bool:
        """
        Whether device times of events are wanted.
        """
    def left(self, /, unit: SupportsIndex) -> None:
        """
        The source of an offloaded unit was given up.
        """
    def need(self, /, unit: SupportsIndex, allocated_bytes: SupportsIndex, peak_bytes: SupportsIndex) -> None:
        """
        Backward asks for `unit`.
        """
    def pack(
        self, /, nbytes: SupportsIndex, allocated_bytes: SupportsIndex, peak_bytes: SupportsIndex
    ) -> tuple[int, int]:
        """
        A tensor was saved: `(unit, action)`.
        """
    def pack_narrow(
        self, /, nbytes: SupportsIndex, allocated_bytes: SupportsIndex, peak_bytes: SupportsIndex
    ) -> tuple[int, int]:
        """
        A narrow copy of the unit packed last was made: `(unit, action)`.
        """
    @property
    def peak_bytes(self, /) -> int:
        """
        Most bytes allocated on the device at any time.
        """
    def plan_json(self, /) -> str | None:
        """
        The plan in force as JSON (`actions`, `schedule`, `predicted`), or None before the second step.
        """
    def prefetched(self, /, unit: SupportsIndex) -> None:
        """
        A buffer for `unit` was allocated ahead of need.
        """
    def record_json(self, /) -> str | None:
        """
        The recorded step that the plan was made from, as JSON, or None before the second step.
        """
    def set_recipe(self, /, unit: SupportsIndex, inputs: SupportsGetItem[int, SupportsIndex]) -> None:
        """
        `unit` was proved to be rebuilt from `inputs`, and is from now on.
        """
    def settle(
        self,
        /,
        times_us: SupportsGetItem[int, SupportsFloat | SupportsIndex],
        costs_us: SupportsGetItem[int, tuple[SupportsIndex, SupportsFloat | SupportsIndex]],
        coded: SupportsGetItem[
            int,
            tuple[SupportsIndex, SupportsIndex, SupportsFloat | SupportsIndex, SupportsFloat | SupportsIndex],
        ],
        offload_gbps: SupportsFloat | SupportsIndex,
        onboard_gbps: SupportsFloat | SupportsIndex,
    ) -> None:
        """
        Device times of the recorded step that has just ended, one an event, in microseconds; of the
        rebuilds in it, `(unit, microseconds)`; of the link codec, `(unit, bytes, microseconds to encode, to
        decode)`; and the speed of the link in 1e9 bytes a second.
        """

@final
class Slot:
    """
    Bytes that left the device; given up when this object is.
    """
    @property
    def nbytes(self, /) -> int:
        """
        Length in bytes.
        """

@final
class TpdeChain:
    """
    A chain of checkpoints in a folder.
    """
    def __new__(
        cls,
        /,
        folder: str | PathLike[str],
        *,
        create: bool,
        memory_bytes: SupportsIndex,
        threads: SupportsIndex,
    ) -> TpdeChain:
        """
        Opens the chain in `folder`; with `create`, makes it where there is none.
        """
    def commit(
        self,
        /,
        step: SupportsIndex,
        parts: SupportsGetItem[
            int,
            tuple[
                str,
                str
                | PathLike[str]
                | SupportsGetItem[
                    int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
                ],
            ],
        ],
        *,
        progress: Any | None = None,
    ) -> tuple[int, int, list[tuple[str, str, str, int, int]]]:
        """
        Commits named parts as `step`.
        """
    def gc(
        self, /, *, last: SupportsIndex | None, every: SupportsIndex | None, after: SupportsIndex | None
    ) -> tuple[list[int], int, int]:
        """
        Drops steps and what no step needs.
        """
    def log(self, /) -> list[tuple[int, int, list[tuple[str, str, str, int, int]]]]:
        """
        Every step, in order.
        """
    def restore(
        self, /, step: SupportsIndex, part: str, output: str | PathLike[str], *, progress: Any | None = None
    ) -> None:
        """
        Writes a part of a step to `output`.
        """
    def route(self, /, step: SupportsIndex, part: str) -> tuple[Path, Path | None, Path, str]:
        """
        The files that a part of a step is rebuilt from.
        """
    def verify(self, /, *, decode: bool, progress: Any | None = None) -> tuple[int, int, int]:
        """
        Checks every object and, with `decode`, every step: (steps, objects, bytes).
        """

@final
class TpdeDevicePatch:
    """
    A patch in a CUDA device's memory.
    """
    def __new__(
        cls, /, patch: TpdePatch, ordinal: SupportsIndex, memory_bytes: SupportsIndex, threads: SupportsIndex
    ) -> TpdeDevicePatch:
        """
        Authenticates `patch` and brings it up to device `ordinal`.
        """
    def apply(
        self,
        /,
        places: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, SupportsIndex]],
        stream: SupportsIndex,
        *,
        base_id: str | None,
    ) -> tuple[str, int]:
        """
        Applies it to tensors, (base, final, bytes) of each in the order of `tensors()`, behind `stream`; a final of
        0 leaves one out. Waits until it is done; returns the final state's id and the bytes of device memory that
        it took beside patch and tensors.
        """
    @property
    def device_bytes(self, /) -> int:
        """
        Bytes that it takes on the device.
        """

@final
class TpdePatch:
    """
    An opened patch.
    """
    def __new__(
        cls, /, source: str | PathLike[str] | bytes | bytearray | tuple[SupportsIndex, SupportsIndex, Any]
    ) -> TpdePatch: ...
    def apply(
        self,
        /,
        base: str
        | PathLike[str]
        | SupportsGetItem[
            int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
        ]
        | None,
        output: str | PathLike[str],
        *,
        memory_bytes: SupportsIndex,
        threads: SupportsIndex,
        progress: Any | None = None,
    ) -> str:
        """
        Writes the state that it makes to `output`; returns its state id.
        """
    def apply_in_place(
        self,
        /,
        tensors: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex]],
        *,
        base_id: str | None,
        memory_bytes: SupportsIndex,
        threads: SupportsIndex,
    ) -> str:
        """
        Turns tensors, (address, bytes) of each in the order of `tensors()`, into the final ones where they lie; an
        address of 0 leaves one out. They are taken to be in the state `base_id`. Returns the final state's id.
        """
    def apply_into(
        self,
        /,
        base: str
        | PathLike[str]
        | SupportsGetItem[
            int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
        ]
        | None,
        outs: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex]],
        *,
        base_id: str | None,
        memory_bytes: SupportsIndex,
        threads: SupportsIndex,
        progress: Any | None = None,
    ) -> str:
        """
        Decodes into buffers, (address, bytes) of each tensor in the order of `tensors()`; returns the state id.

        With `base_id` the base is taken to be that state and is not hashed.
        """
    def authenticate(self, /, memory_bytes: SupportsIndex, threads: SupportsIndex) -> None:
        """
        Compares every byte of it with its hash.
        """
    @property
    def base_id(self, /) -> str | None:
        """
        State that it starts from.
        """
    def bases(self, /) -> list[str]:
        """
        What each of `tensors()` starts from: "none", "words", or the layout of quantized blocks.
        """
    def decode_tensor(
        self,
        /,
        entry: SupportsIndex,
        base: tuple[SupportsIndex, SupportsIndex],
        out: tuple[SupportsIndex, SupportsIndex],
        memory_bytes: SupportsIndex,
        threads: SupportsIndex,
    ) -> None:
        """
        Decodes number `entry` of `tensors()` from `base` into `out`, both (address, bytes); it must have been
        authenticated.
        """
    @property
    def final_id(self, /) -> str:
        """
        State that it makes.
        """
    def inspect(self, /, memory_bytes: SupportsIndex, threads: SupportsIndex) -> str:
        """
        The report of `overspill tpde inspect --json`.
        """
    @property
    def kind(self, /) -> str:
        """
        "standalone", "relative" or "absolute".
        """
    @property
    def packed_bytes(self, /) -> int:
        """
        Size of the patch.
        """
    @property
    def payload_bytes(self, /) -> int:
        """
        Bytes of all payloads.
        """
    def read_payloads(self, /, start: SupportsIndex, out: tuple[SupportsIndex, SupportsIndex]) -> None:
        """
        Copies payloads from byte `start` of their section on to `out`, (address, bytes).
        """
    def tensors(self, /) -> list[tuple[str, str, list[int], int]]:
        """
        (name, dtype, shape, bytes) of every tensor that it makes.
        """
    def verify(
        self,
        /,
        base: str
        | PathLike[str]
        | SupportsGetItem[
            int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
        ]
        | None,
        *,
        memory_bytes: SupportsIndex,
        threads: SupportsIndex,
        progress: Any | None = None,
    ) -> bool:
        """
        Checks every byte and, where the base is given or none is needed, the result; says whether it decoded.
        """

@final
class TpdePlaced:
    """
    A tensor of a streamed patch that is decoded at fixed addresses.
    """
    @property
    def device_bytes(self, /) -> int:
        """
        Bytes that it takes on the device.
        """
    def enqueue(self, /, stream: SupportsIndex) -> None:
        """
        Enqueues its decoding on `stream`, behind which its payloads are in place.
        """
    def left(self, /, stream: SupportsIndex) -> int:
        """
        Waits for `stream`: how many chunks kernels have left undecoded.
        """

@final
class TpdeStreamedPatch:
    """
    A patch whose payloads pass through a CUDA device; its records and tables are there.
    """
    def __new__(cls, /, patch: TpdePatch, ordinal: SupportsIndex) -> TpdeStreamedPatch:
        """
        Brings an authenticated patch's records and tables up to device `ordinal`. The patch is not kept.
        """
    @property
    def device_bytes(self, /) -> int:
        """
        Bytes that it takes on the device.
        """
    def payload(self, /, entry: SupportsIndex) -> tuple[int, int]:
        """
        Which payloads number `entry` of `tensors()` needs: (first byte of the section, bytes).
        """
    def place(
        self,
        /,
        entry: SupportsIndex,
        payload: SupportsIndex,
        base: SupportsIndex,
        out: tuple[SupportsIndex, SupportsIndex],
    ) -> TpdePlaced | None:
        """
        Plans a tensor: its payloads will be at `payload`, what it starts from at `base`, and its (address, bytes) are
        `out`. None where kernels do not decode it.
        """

def process_memory() -> tuple[int, int]:
    """
    Anonymous and all resident bytes of this process; zeros where the system does not say.
    """

def resident_peak_bytes() -> int:
    """
    Most bytes of this process that were ever resident; 0 where the system does not say.
    """

def return_freed_tensors() -> None:
    """
    Makes malloc give freed tensors back to the operating system at once.
    """

def run_cli(args: SupportsGetItem[int, str]) -> int:
    """
    Runs the `overspill` command line, program name first, and returns its exit code.
    """

def serve(config: str, model: str, executor: Any, ready: Any) -> None:
    """
    Serves `model` (JSON) as `config` (JSON) says, until SIGTERM or SIGINT. `executor` has `command(json)`,
    `step(steps)`, `hidden(key)` and `set_hidden(key, file)`; all are called on this thread, and answer JSON
    with `ok` or `error`. `ready` is called with the address once it listens.
    """

def tpde_device_state_id(
    tensors: SupportsGetItem[
        int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
    ],
    ordinal: SupportsIndex,
    stream: SupportsIndex,
) -> str:
    """
    The state id of tensors on device `ordinal`, behind `stream`.
    """

def tpde_encode(
    base: SupportsGetItem[
        int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
    ]
    | None,
    final_state: SupportsGetItem[
        int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
    ],
    ordinal: SupportsIndex,
    stream: SupportsIndex,
    *,
    base_id: str | None,
    final_id: str | None,
) -> tuple[tuple[str | None, str, int, int], HostMemory]:
    """
    Encodes `final_state` relative to `base` (or alone), tensors on device `ordinal`, behind `stream`: what was packed, and
    the patch in page-locked memory. Ids that are given are taken to be right, the others hashed.
    """

def tpde_pack(
    base: str
    | PathLike[str]
    | SupportsGetItem[int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]]
    | None,
    final_state: str
    | PathLike[str]
    | SupportsGetItem[
        int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
    ],
    output: str | PathLike[str] | None,
    *,
    absolute: bool,
    codec: str,
    memory_bytes: SupportsIndex,
    threads: SupportsIndex,
    progress: Any | None = None,
) -> tuple[str, str | None, str, int, int, bytes | None]:
    """
    Packs `final_state` against `base` into the file `output`, or into memory.
    """

def tpde_quantize(
    layout: str,
    dtype: str,
    source: tuple[SupportsIndex, SupportsIndex],
    *,
    back: bool,
    memory_bytes: SupportsIndex,
    threads: SupportsIndex,
) -> bytes:
    """
    Quantizes weights of `dtype` at (address, bytes) to blocks of `layout`, or with `back` the other way round.
    """

def tpde_state_id(
    source: str
    | PathLike[str]
    | SupportsGetItem[
        int, tuple[str, str, SupportsGetItem[int, SupportsIndex], SupportsIndex, SupportsIndex]
    ],
    *,
    memory_bytes: SupportsIndex,
    threads: SupportsIndex,
) -> str:
    """
    The state id of a checkpoint.
    """
