// Encoder of mode F: a warp packs a chunk, from its last group to its first, and writes words from the end of a piece of the
// scratch memory down; eight chunks of a segment a block, which share what there is to know of a flag of each key. Heads are
// made of what `tpde_count` found. A chunk whose payload does not fit into its piece, or that its head does not provide
// for, is noted in the bitmap; the host packs its segment.

#define FLAG_GROUP 1024u
#define PIECE_BYTES(CHANGES) (2 * (CHANGES) + 1024)
#define FRONT_BYTES 160u  // mode and states take at most 141

// How a flag is pushed on a state X: words go out until X is below f << 20, with f the flag's frequency; then X grows by
// (q + s) * d, where q is X / f rounded down, d is 4096 - f, and s is 1 for the flag of no change, which starts where that of
// a change ends, else 0. q + s is what stands from bit 32 + n on, n the place of f's highest bit, in X * z plus the number of
// 64 bits whose halves are x and y: they hold s and what makes the quotient exact for every X. w has d in its top 12 bits and
// n in its low 5. All zeros push nothing.
typedef uint4 Push;

struct FlagPacking {
    Push pushes[256][2];  // of each key's flags of no change and of a change
    u32 lists[256];       // where its list of magnitudes lies or 0
    u16 changed[WARPS][FLAG_GROUP];
    u32 front[WARPS][FRONT_BYTES / 4];
};

// `frequency` is 1 to 4095. A divisor's reciprocal of 32 bits, rounded up or down, divides exactly: rounded down, the dividend has
// one added to it (A. D. Robison, N-bit unsigned division via N-bit multiply-add).
static __device__ Push push_of(u32 frequency, bool is_set) {
    u32 bits = 31 - __clz(frequency);
    u64 power = 1ull << (32 + bits), down = (power - 1) / frequency;
    bool up = (down + 1) * frequency - power <= 1u << bits && down + 1 < 1ull << 32;
    u32 factor = (u32)(up ? down + 1 : down);
    return { up ? 0 : factor, is_set ? 0 : 1u << bits, factor, (4096 - frequency) << 20 | bits };
}

// States of the lanes, and where their words go.
struct Pushed {
    u8* piece;
    u32 at;  // the last word written; nothing is written below FRONT_BYTES
    u32 x;
    bool full;
    // Makes room in the states of the lanes that have none.
    __device__ void spill(bool spills, u32 below) {
        if (__any_sync(ALL, spills)) {
            u32 who = __ballot_sync(ALL, spills);
            u32 bytes = 2 * __popc(who);
            if (at < bytes + FRONT_BYTES) full = true;
            else at -= bytes;
            if (spills) {
                if (!full) *(u16*)(piece + at + 2 * __popc(who & below)) = (u16)x;
                x >>= 16;
            }
        }
    }
    __device__ void push(const Push& flag, u32 below) {
        spill((~x | 31) < flag.w, below);
        u64 product = (u64)x * flag.z + ((u64)flag.y << 32 | flag.x);
        x += __funnelshift_r((u32)(product >> 32), 0, flag.w) * (flag.w >> 20);
    }
    // A symbol of `frequency` of 4096.
    __device__ void push(bool active, u32 start, u32 frequency, u32 below) {
        spill(active && x >> 20 >= frequency, below);
        if (active) x = (x / frequency << 12) + x % frequency + start;
    }
    __device__ void push_bits(u32 value, u32 width, u32 below) {
        spill(width != 0 && x >> (32 - width) != 0, below);
        x = x << width | value;
    }
};

// Words of a chunk that a lane looks at: 8 neighbours, as often as there are steps.
template <typename W> struct Pair { Eight<W> old, fresh; };

template <typename W>
static __device__ Pair<W> load_pair(const W* base, const W* made, u32 at, u32 words, bool aligned) {
    return { load_eight<W>(base, at, words, aligned), load_eight<W>(made, at, words, aligned) };
}

// Where a list has a symbol; 0 if it has not.
static __device__ u32 find_symbol(const u32* list, u32 symbol) {
    u32 low = 0, high = __ldg(list) - 1;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if ((__ldg(list + 1 + middle) & 255) < symbol) low = middle + 1; else high = middle;
    }
    u32 entry = __ldg(list + 1 + low);
    return (entry & 255) == symbol ? entry + 1 : 0;
}

// Packs the changed words of a group, the last ones first. False if a class has no symbol for one.
template <typename W>
static __device__ bool push_changes(const FlagPacking& shared, u16* all_places, const u32* arena, Pushed& to, u32 changed,
                                    const W* base, const W* made, u32 shift, u32 mask, bool is_float, u32 lane, u32 below) {
    u32 count = __popc(changed), ends = scan(count, lane), total = __shfl_sync(ALL, ends, 31);
    u16* places = all_places + ends - count;
    while (changed) {
        u32 i = __ffs(changed) - 1;
        *places++ = (u16)(256 * (i >> 3) + 8 * lane + (i & 7));
        changed &= changed - 1;
    }
    __syncwarp();
    bool good = true;
    for (u32 from = (total + 31) & ~31u; from > 0;) {
        from -= 32;
        bool mine = from + lane < total;
        u32 at = mine ? all_places[from + lane] : 0, entry = 0, width = 0, bits = 0, list = 0;
        if (mine) {
            W old = base[at], step = (W)(flip<W>(made[at], is_float) - flip<W>(old, is_float));
            u32 size = size_of<W>(step);
            Split magnitude = split(size);
            u32 key = (u32)old >> shift & mask;
            good = good && shared.pushes[key][1].w;
            list = shared.lists[key];
            width = 1;
            bits = step >> (sizeof(W) * 8 - 1);
            if (list) {
                entry = find_symbol(arena + list, magnitude.symbol);
                good = good && entry;
                width += magnitude.width;
                bits |= low_bits(size, magnitude.width) << 1;
            }
        }
        if (sizeof(W) == 4) to.push_bits(width > 16 ? bits >> 16 : 0, width > 16 ? width - 16 : 0, below);
        to.push_bits(width < 16 ? bits : bits & 0xffff, min(width, 16), below);
        // An entry that was found has one added to it, which its symbol takes.
        to.push(entry != 0, (entry - 1) >> 20, ((entry - 1) >> 8 & 4095) + 1, below);
    }
    __syncwarp();
    return good;
}

// Packs the flags of a lane's eight words, the last one first. A key's shift and mask make its place among the pushes.
template <typename W, bool TAIL>
static __device__ void push_flags(Near pushes, Pushed& to, const Eight<W>& old, u32 changed, u32 there, u32 shift, u32 mask,
                                  u32 below) {
    const u32 each = 2 * sizeof(Push), log2 = 4;
#pragma unroll
    for (u32 k = 0; k < 8; k++) {
        u32 i = 7 - k, key = old.parts[i * sizeof(W) / 4] >> (shift + 8 * (i * sizeof(W) % 4)) & mask;
        u32 flag = (i < log2 ? changed << (log2 - i) : changed >> (i - log2)) & sizeof(Push);
        Push push = *(const Push*)at_near(pushes + ((sizeof(W) == 1 ? each * key : key) | flag));
        if (TAIL && i >= there) push = make_uint4(0, 0, 0, 0);
        to.push(push, below);
    }
}

// Mode and states in front of the words, and the payload's check. By one warp, at the end.
static __device__ void finish_flags(u32* to_front, Pushed& to, u8* end, u8* scratch, u64 term, u32* outcome, u32 lane) {
    u32 top = 31 - __clz(to.x), own = 4 + top, ends = scan(own, lane), bit = 8 + ends - own;
    for (u32 i = lane; i < FRONT_BYTES / 4; i += 32) to_front[i] = 0;
    __syncwarp();
    if (lane == 0) atomicOr(to_front, 6u);
    put_bits(to_front, bit, 4, top - 16);
    put_bits(to_front, bit + 4, top, low_bits(to.x, top));
    u32 front = (8 + __shfl_sync(ALL, ends, 31) + 7) / 8;
    __syncwarp();
    u8* start = to.piece + to.at - front;
    for (u32 i = lane; i < front; i += 32) start[i] = ((const u8*)to_front)[i];
    __threadfence_block();
    __syncwarp();
    u32 bytes = (u32)(end - start);
    u64 sum = 0;
    for (u32 i = lane; 4 * i < bytes; i += 32) {
        u32 word = 0;
        for (u32 b = 0; b < 4 && 4 * i + b < bytes; b++) word |= (u32)start[4 * i + b] << (8 * b);
        sum += (u64)word * (2 * i + 1);
    }
    for (u32 step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    if (lane == 0) {
        u64 place = (u64)(start - scratch);
        outcome[0] = (u32)(place / 4);
        outcome[1] = bytes | (u32)(place & 3) << 30;
        outcome[2] = (u32)((sum + bytes * 0xd6e8feb86659fd93ull + term) * 0x9e3779b97f4a7c15ull >> 32);
    }
}

// What there is to know of each key, a thread a key.
static __device__ void fill_pushes(FlagPacking& shared, const u32* tables, u32 key) {
    u32 frequency = 0, list = 0;
    for (u32 q = 0, live = __ldg(tables); q < live; q++) {
        u32 packed = __ldg(tables + 2 + 3 * q);
        if (key >= (packed & 255) && key <= (packed >> 8 & 255)) {
            frequency = __ldg(tables + 3 + 3 * q);
            list = __ldg(tables + 4 + 3 * q);
        }
    }
    shared.lists[key] = list;
    for (u32 is_set = 0; is_set < 2; is_set++) {
        shared.pushes[key][is_set] =
            frequency ? push_of(is_set ? frequency : 4096 - frequency, is_set) : make_uint4(0, 0, 0, 0);
    }
}

// Which of eight words changed.
template <typename W> static __device__ u32 pair_changes(const Pair<W>& own) {
    u32 changed = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        if (own.old.word(i) != own.fresh.word(i)) changed |= 1u << i;
    }
    return changed;
}

// Packs the chunk's words; false if its head does not provide for them.
template <typename W>
static __device__ bool push_words(FlagPacking& shared, const Segment& segment, u32 chunk_first, u32 words, const u32* arena,
                                  Pushed& to, u32 warp, u32 lane) {
    const W *base = (const W*)segment.base + chunk_first, *made = (const W*)segment.out + chunk_first;
    bool aligned = (((u64)base | (u64)made) & 15) == 0, is_float = segment.flags & IS_FLOAT, good = true;
    u32 shift = segment.key_shift, mask = segment.key_mask, below = (1u << lane) - 1, flag_shift = shift, flag_mask = mask;
    // Words of 16 and 32 bits have their key at bit 5 or above (or none), which makes it an offset.
    if (sizeof(W) > 1) { flag_shift = shift < 5 ? 0 : shift - 5; flag_mask = 32 * mask; }
    // Told to the compiler: neither divergent nor worth working out again.
    flag_shift = __shfl_sync(ALL, flag_shift, 0);
    flag_mask = __shfl_sync(ALL, flag_mask, 0);
    words = __shfl_sync(ALL, words, 0);
    Near pushes = near_of(shared.pushes);
    u32 first = (words - 1) / FLAG_GROUP * FLAG_GROUP, changed = 0;
    for (u32 q = 0; q < 4; q++) {
        changed |= pair_changes<W>(load_pair<W>(base, made, first + 256 * q + 8 * lane, words, aligned)) << (8 * q);
    }
    for (;; first -= FLAG_GROUP) {
        good = push_changes<W>(shared, shared.changed[warp], arena, to, changed, base + first, made + first, shift, mask,
                               is_float, lane, below) && good;
        u32 changed_before = 0;
#pragma unroll 1
        for (u32 q = 4; q-- > 0;) {
            u32 at = first + 256 * q + 8 * lane;
            Eight<W> old = load_eight<W>(base, at, words, aligned);
            // The group in front of this one, on its way meanwhile.
            Pair<W> before = load_pair<W>(base, made, first ? at - FLAG_GROUP : 0, first ? words : 0, aligned);
            if (first + FLAG_GROUP <= words) {
                push_flags<W, false>(pushes, to, old, changed >> (8 * q), 8, flag_shift, flag_mask, below);
            } else {
                u32 there = at < words ? words - at : 0;
                push_flags<W, true>(pushes, to, old, changed >> (8 * q), there, flag_shift, flag_mask, below);
            }
            changed_before |= pair_changes<W>(before) << (8 * q);
        }
        if (first == 0) return __all_sync(ALL, good) && !to.full;
        changed = changed_before;
    }
}

template <typename W>
static __device__ void encode_flags(const Segment* segments, u32 count, const u32* arena, u32* cursor, u8* scratch,
                                    u32 scratch_units, u32* outcomes, Status* status, u32* bitmap) {
    __shared__ FlagPacking shared;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, unit = blockIdx.x;
    const Segment& segment = segment_of(segments, count, unit);
    fill_pushes(shared, arena + segment.sparse, threadIdx.x);
    __syncthreads();
    u32 chunk = (unit - segment.first) * WARPS + warp;
    // Collectives tell the compiler what is the same for all lanes.
    if (!__any_sync(ALL, chunk < segment.chunks)) return;
    u32 number = segment.bit + chunk, chunk_first = chunk << segment.chunk_log2;
    u32 words = min(1u << segment.chunk_log2, segment.words - chunk_first), changes = 0;
    u32* outcome = outcomes + 3 * number;
    u64 term = chunk * 0xa0761d6478bd642full + segment.seed;
    const u32* grains = (const u32*)segment.blob + (chunk_first >> GRAIN_LOG2);
    for (u32 i = 0; i < (words + (1u << GRAIN_LOG2) - 1) >> GRAIN_LOG2; i++) changes += grains[i];
    if (!__any_sync(ALL, changes != 0)) {
        if (lane == 0) {
            outcome[0] = outcome[1] = 0;
            outcome[2] = (u32)(term * 0x9e3779b97f4a7c15ull >> 32);
        }
        return;
    }
    u32 units = (PIECE_BYTES(changes) + 3) / 4, place = lane == 0 ? atomicAdd(cursor, units) : 0;
    place = __shfl_sync(ALL, place, 0);
    if (__any_sync(ALL, (u64)place + units > scratch_units)) {
        if (lane == 0) leave(status, bitmap, number);
        return;
    }
    Pushed to = { scratch + 4ull * place, 4 * units, 65536, false };
    bool good = push_words<W>(shared, segment, chunk_first, words, arena, to, warp, lane);
    // The words as they are would be shorter than this.
    if (!good || (u64)(4 * units - to.at) + FRONT_BYTES > (u64)words * sizeof(W)) {
        if (lane == 0) leave(status, bitmap, number);
        return;
    }
    finish_flags(shared.front[warp], to, to.piece + 4 * units, scratch, term, outcome, lane);
}

#define ENCODE_FLAGS(NAME, W)                                                                                        \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 4)                                                   \
    NAME(const Segment* segments, u32 count, const u32* arena, u32* cursor, u8* scratch, u32 scratch_units,          \
         u32* outcomes, Status* status, u32* bitmap) {                                                               \
        encode_flags<W>(segments, count, arena, cursor, scratch, scratch_units, outcomes, status, bitmap);           \
    }
ENCODE_FLAGS(tpde_encode_flags_8, u8)
ENCODE_FLAGS(tpde_encode_flags_16, u16)
ENCODE_FLAGS(tpde_encode_flags_32, u32)
