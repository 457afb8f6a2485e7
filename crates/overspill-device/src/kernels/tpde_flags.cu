// Mode F: one warp a chunk, eight chunks of a segment a block. Every word has a symbol, whether it changed, so a warp
// goes through base and payload once and keeps nothing but 32 states: no ranks, no tables but the classes' frequencies,
// no barriers. A lane has four times eight words that stand side by side; what changed among its 32 words is looked at
// afterwards.

#define FLAG_STEPS 4u                     // of eight words a lane
#define FLAG_BUCKETS 128u
#define FLAG_WORDS (256 * FLAG_STEPS)     // of a group

struct FlagsShared {
    uint2 flags[256];  // of each key: the frequency, of 4096, of a change; and less than nothing by as much
    u32 values[256];   // of each key: 1 + its class | its first entry << 8, 0 if all magnitudes are 1
    u8 buckets[32][FLAG_BUCKETS];    // of each class: the entry of every so manieth slot, counted from its first
    u16 changed[WARPS][FLAG_WORDS];  // places in a group
};

// Where the states' words come from: 64 of them at a time, two a lane.
struct Pulled {
    const u8 *at, *end;  // of the words that are held
    u32 held, used;      // a lane's two; how many of them all are taken
    __device__ void open(const u8* from, const u8* to, u32 lane) {
        at = from; end = to; used = 0;
        held = load32(at + 4 * lane, end);
    }
    // Words for the states that have fallen too low, in order of lanes. A stream that ends early gives zeros.
    __device__ void refill(u32& x, u32 lane) {
        bool needs = x < 65536;
        if (__any_sync(ALL, needs)) {
            u32 who = __ballot_sync(ALL, needs), place = used + __popc(who & ((1u << lane) - 1));
            u32 two = __shfl_sync(ALL, held, place >> 1);
            u32 taken = __byte_perm(two, x, 0x5410 + 0x22 * (place & 1));
            x = needs ? taken : x;
            used += __popc(who);
            if (used > 32) {
                at += 2 * used;
                used = 0;
                held = load32(at + 4 * lane, end);
            }
        }
    }
    __device__ bool ended() const { return at + 2 * used == end; }
    // Bits that a lane's state holds as they are, at most 16.
    __device__ u32 pop(u32& x, u32 width, u32 lane) {
        u32 bits = x & ((1u << width) - 1);
        x >>= width;
        refill(x, lane);
        return bits;
    }
};

// Which of a lane's eight words changed.
template <typename W, bool TAIL>
static __device__ u32 eight_flags(const FlagsShared& shared, const Eight<W>& own, u32& x, Pulled& stream, u32 key_shift,
                                  u32 key_mask, u32 there, u32 lane) {
    u32 found = 0;
    const u8* flags = (const u8*)shared.flags;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        u32 key = own.parts[i * sizeof(W) / 4] >> (key_shift + 8 * (i * sizeof(W) % 4)) & key_mask;
        uint2 g = *(const uint2*)(flags + (sizeof(W) == 1 ? 8 * key : key));
        // A word that never changes takes nothing from the state, so words that are not there are such.
        if (TAIL && i >= there) g = make_uint2(0, 0);
        u32 slot = x & 4095, high = x >> 12;
        bool changed = slot < g.x;
        x = changed ? g.x * high + slot : g.y * high + x + g.y;
        if (changed) found |= 1u << i;
        stream.refill(x, lane);
    }
    return found;
}

// The entry of a slot: at its bucket's, or a little behind it.
static __device__ u32 entry_at(const FlagsShared& shared, const u32* entries, u32 values, u32 slot) {
    u32 at = (values >> 8) + shared.buckets[(values & 255) - 1][slot / (4096 / FLAG_BUCKETS)], entry = entries[at];
    // An entry ends where its last slot does; the last one of a list ends with the slots.
    while ((entry >> 20) + (entry >> 8 & 4095) < slot) entry = entries[++at];
    return entry;
}

// Brings in the lists of magnitudes and finds their buckets' entries.
static __device__ void load_lists(FlagsShared& shared, u32* entries, const u32* arena, const u32* tables, u32 live,
                                  u32 thread) {
    u32 used = 0;
    for (u32 q = 0; q < live; q++) {
        u32 packed = __ldg(tables + 2 + 3 * q), list = __ldg(tables + 4 + 3 * q), count = list ? __ldg(arena + list) : 0;
        if (thread >= (packed & 255) && thread <= (packed >> 8 & 255)) {
            u32 flags = __ldg(tables + 3 + 3 * q);
            shared.flags[thread] = make_uint2(flags, 0u - flags);
            shared.values[thread] = list ? (q + 1) | used << 8 : 0;
        }
        for (u32 e = thread; e < count; e += BLOCK_THREADS) {
            u32 entry = __ldg(arena + list + 1 + e);
            entries[used + e] = entry;
            // The buckets that start in its slots.
            const u32 width = 4096 / FLAG_BUCKETS;
            u32 first = entry >> 20, last = first + (entry >> 8 & 4095);
            for (u32 b = (first + width - 1) / width; b * width <= last; b++) shared.buckets[q][b] = (u8)e;
        }
        used += count;
    }
}

// Signs and magnitudes of a group's changed words, and the words: 32 at a time, each lane's behind those of the lane
// before it. False if a magnitude is beyond the word.
template <typename W>
static __device__ bool apply_flags(const FlagsShared& shared, u16* places, const u32* entries, u32 changed, u32& x,
                                   Pulled& stream, const W* base, W* out, u32 key_shift, u32 key_mask, bool is_float,
                                   u32 lane) {
    bool good = true;
    u32 count = __popc(changed), ends = scan(count, lane), total = __shfl_sync(ALL, ends, 31);
    u16* to = places + ends - count;
    while (__any_sync(ALL, changed != 0)) {
        u32 i = __ffs(changed) - 1;
        if (changed) *to++ = (u16)(256 * (i >> 3) + 8 * lane + (i & 7));
        changed &= changed - 1;
    }
    __syncwarp();
    for (u32 from = 0; from < total; from += 32) {
        bool mine = from + lane < total;
        u32 at = mine ? places[from + lane] : 0, size = 1, width = 0;
        W word = mine ? base[at] : (W)0;
        u32 values = mine ? shared.values[(u32)word >> key_shift & key_mask] : 0;
        if (__any_sync(ALL, values != 0)) {
            if (values) {
                u32 slot = x & 4095, entry = entry_at(shared, entries, values, slot);
                x = ((entry >> 8 & 4095) + 1) * (x >> 12) + slot - (entry >> 20);
                good = magnitude(entry & 255, sizeof(W) * 8, size, width) && good;
            }
            stream.refill(x, lane);
        }
        // The sign, then what the magnitude's symbol leaves open.
        width = mine ? width + 1 : 0;
        u32 some = min(width, 16), bits = stream.pop(x, some, lane);
        if (sizeof(W) == 4) bits |= stream.pop(x, width - some, lane) << 16;
        size += bits >> 1;
        if (mine) out[at] = stepped<W>(word, (W)(bits & 1 ? 0u - size : size), is_float);
    }
    __syncwarp();
    return good;
}

template <typename W>
static __device__ void flagged_words(const FlagsShared& shared, u16* places, const Work& work, const u32* entries, u32 x, Pulled& stream,
                                     Status* status, u32 lane) {
    const Segment& segment = *work.segment;
    const W* base = (const W*)segment.base + work.first;
    W* out = (W*)segment.out + work.first;
    bool in_place = (const W*)out == base, good = true, aligned = (((u64)base | (u64)out) & 15) == 0;
    u32 words = work.words, segment_mask = segment.key_mask, segment_shift = segment.key_shift;
    u32 key_mask = segment_mask, key_shift = segment_shift;
    bool is_float = segment.flags & IS_FLOAT;
    // Words of 16 and 32 bits have their key at bit 3 or above (or none), which makes it an offset.
    if (sizeof(W) > 1) { key_shift = key_shift < 3 ? 0 : key_shift - 3; key_mask *= 8; }
    Eight<W> next = load_eight<W>(base, 8 * lane, words, aligned);
    for (u32 first = 0; first < words; first += FLAG_WORDS) {
        u32 changed = 0;
        if (first + FLAG_WORDS <= words) {
#pragma unroll 1
            for (u32 q = 0; q < FLAG_STEPS; q++) {
                u32 at = first + 256 * q + 8 * lane;
                Eight<W> own = next;
                next = load_eight<W>(base, at + 256, words, aligned);
                if (!in_place) store_eight<W>(out, at, words, aligned, own);
                changed |= eight_flags<W, false>(shared, own, x, stream, key_shift, key_mask, 8, lane) << (8 * q);
            }
        } else {
#pragma unroll 1
            for (u32 q = 0; q < FLAG_STEPS; q++) {
                u32 at = first + 256 * q + 8 * lane, there = at < words ? words - at : 0;
                Eight<W> own = next;
                next = load_eight<W>(base, at + 256, words, aligned);
                if (!in_place && there) store_eight<W>(out, at, words, aligned, own);
                changed |= eight_flags<W, true>(shared, own, x, stream, key_shift, key_mask, there, lane) << (8 * q);
            }
        }
        good = apply_flags<W>(shared, places, entries, changed, x, stream, base + first, out + first, segment_shift,
                              segment_mask, is_float, lane) && good;
    }
    bool ended = __all_sync(ALL, x == 65536) && stream.ended();
    good = __all_sync(ALL, good);
    if (lane == 0) {
        if (!good) fail(status, MAGNITUDE, work.number);
        else if (!ended) fail(status, LEFT_OVER, work.number);
    }
}

// Thirty-two states, each in as few bits as it needs: what follows them, or nothing if they end early.
static __device__ const u8* packed_states(u32& x, const u8* at, const u8* end, u32 lane) {
    u32 bit = 0, own = 0;
    for (u32 i = 0; i < 32; i++) {
        if (i == lane) own = bit;
        const u8* p = at + (bit >> 3);
        bit += 20 + (load32(p, end) >> (bit & 7) & 15);
    }
    const u8* p = at + (own >> 3);
    u32 low = load32(p, end), high = load32(p + 4, end), shift = own & 7;
    u32 width = 16 + (low >> shift & 15);
    x = 1u << width | low_bits(__funnelshift_r(__funnelshift_r(low, high, shift), high >> shift, 4), width);
    const u8* rest = at + (bit + 7) / 8;
    return __all_sync(ALL, rest <= end) ? rest : 0;
}

template <typename W>
static __device__ void decode_flags(const Segment* segments, u32 count, const u32* arena, u32 first_unit, Status* status,
                                    u32* bitmap, u32* entries) {
    __shared__ FlagsShared shared;
    u32 thread = threadIdx.x, lane = thread & 31;
    Work work = work_of(segments, count, first_unit, 6, WARPS);
    // Told to the compiler: the same for all lanes, so that it need not see to lanes that are elsewhere.
    work.words = __shfl_sync(ALL, work.words, 0);
    bool there = __any_sync(ALL, work.chunk < work.segment->chunks), mine = __any_sync(ALL, work.mine);
    const Segment& segment = *work.segment;
    const u32* tables = arena + segment.sparse;
    shared.flags[thread] = make_uint2(0, 0);
    shared.values[thread] = 0;
    load_lists(shared, entries, arena, tables, __ldg(tables), thread);
    __syncthreads();
    if (!there) return;
    if (!mine) {
        other_modes<W>(work, status, bitmap, lane);
        return;
    }
    u32 x;
    const u8* words = packed_states(x, work.payload.start + 1, work.payload.end, lane);
    if (words) {
        Pulled stream;
        stream.open(words, work.payload.end, lane);
        flagged_words<W>(shared, shared.changed[thread >> 5], work, entries, x, stream, status, lane);
    } else if (lane == 0) {
        fail(status, ENDS_EARLY, work.number);
    }
}

#define FLAGS_KERNEL(NAME, W, BLOCKS)                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS)                                              \
    NAME(const Segment* segments, u32 count, const u32* arena, u32 first_unit, Status* status, u32* bitmap) {        \
        decode_flags<W>(segments, count, arena, first_unit, status, bitmap, (u32*)dynamic_shared);                                      \
    }
// Only there do five blocks' registers hold what mode F needs.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
#define FLAGS_BLOCKS 5
#else
#define FLAGS_BLOCKS 4
#endif

FLAGS_KERNEL(tpde_flags_8, u8, FLAGS_BLOCKS)
FLAGS_KERNEL(tpde_flags_16, u16, FLAGS_BLOCKS)
FLAGS_KERNEL(tpde_flags_32, u32, 4)
