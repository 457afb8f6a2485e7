// Mode G: one warp a chunk, twenty chunks of a segment a block, which share the slot tables in dynamic shared memory. A
// lane has eight words that stand side by side: it takes them through the symbols one by one, then through signs, raw bits
// and all else several words a register. What bounds this kernel is how many instructions it issues.

#define GROUPS_THREADS 640u
#define GROUPS_WARPS (GROUPS_THREADS / 32)
#define NEAR_LOG2 (sizeof(Near) == 8 ? 3 : 2)

// A class's tables: the symbol of each slot, then of each symbol its frequency and, less than nothing, its first slot. An odd
// number of entries, as the same symbol is frequent in all classes.
template <typename W> struct ClassTables {
    static const u32 entries = (32 + 8 * (sizeof(W) * 8 - 5)) | 1, bytes = 4096 + 8 * entries;
};

struct alignas(2 * RING_WORDS) GroupsShared {
    u16 rings[GROUPS_WARPS][RING_WORDS];
    Near rows[256];  // of each key: where its class's tables lie
};

// Symbols of a lane's eight words: a byte each, those of words 0, 2, 4, 6 in x and of the others in y. Words that are not
// there have symbol 0.
template <typename W, bool TAIL>
static __device__ uint2 eight_symbols(Near rows, const Eight<W>& own, u32& x,
                                      Stream& stream, u32 key_shift, u32 key_mask, u32 there, u32 lane, u32 below) {
    u32 symbols[2] = { 0, 0 };
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        if (i % 4 == 0) stream.keep(lane);
        u32 key = own.parts[i * sizeof(W) / 4] >> (key_shift + 8 * (i * sizeof(W) % 4)) & key_mask;
        Near row = *(const Near*)at_near(rows + (sizeof(W) == 1 ? sizeof(Near) * key : key));
        u32 slot = x & 4095, symbol = *at_near(row + slot);
        uint2 entry = *(const uint2*)at_near(row + 8 * symbol + 4096);
        u32 next = entry.x * (x >> 12) + (slot + entry.y);
        bool active = !TAIL || i < there;
        if (active) x = next;
        symbols[i % 2] |= (active ? symbol : 0) << (8 * (i / 2));
        x = stream.pull(x < 65536, x, below);
    }
    return make_uint2(symbols[0], symbols[1]);
}

// Takes bits, at most 16, out of a lane's state.
static __device__ void drop(u32& x, u32 width, Stream& stream, u32 below) {
    x >>= width;
    x = stream.pull(x < 65536, x, below);
}

// Bit 7 of every byte that is not 0.
template <typename W> static __device__ u32 bytes_set(u32 four) {
    // Only words of 32 bits have symbols from 128 on.
    return (sizeof(W) == 4 ? ((four & 0x7f7f7f7f) + 0x7f7f7f7f) | four : four + 0x7f7f7f7f) & 0x80808080;
}

// Adds raw bits to the magnitudes of words whose symbols have some: those of each lane's next such word at a time.
template <typename W>
static __device__ void add_raw_bits(uint2 symbols, u32& x, Stream& stream, u32* sizes, u32 lane, u32 below) {
    u32 even = symbols.x & 0xe0e0e0e0, odd = symbols.y & 0xe0e0e0e0;
    even |= even << 1 | even << 2;
    odd |= odd << 1 | odd << 2;
    // A nibble a word, in order.
    u32 wide = (even >> 7 & 0x01010101) | (odd >> 3 & 0x10101010);
    do {
        stream.keep(lane);
        u32 i = __ffs(wide) - 1, symbol = permute(symbols.x, symbols.y, (i >> 3 & 3) | (i & 4)) & 255;
        symbol = wide ? symbol : 0;
        u32 width = width_of(symbol), some = sizeof(W) == 4 ? min(width, 16) : width, mask = (1u << some) - 1;
        u32 more = ((8 | (symbol & 7)) << width) - symbol + (x & mask);
        drop(x, some, stream, below);
        if (sizeof(W) == 4) {
            more += (x & ((1u << (width - some)) - 1)) << 16;
            drop(x, width - some, stream, below);
        }
        u32 byte = i / 4 * (u32)sizeof(W), part = byte / 4;
        more = wide ? more << (8 * (byte % 4)) : 0;
#pragma unroll
        for (u32 p = 0; p < 2 * sizeof(W); p++) {
            sizes[p] += p == part ? more : 0;
        }
        wide &= wide - 1;
    } while (__any_sync(ALL, wide != 0));
}

// Eight words after their steps.
template <typename W>
static __device__ Eight<W> eight_steps(const Eight<W>& own, uint2 symbols, u32& x, Stream& stream, u32 flip, u32 lane,
                                           u32 below) {
    const u32 parts = 2 * sizeof(W);
    // A nibble a word that changed; how many words before did; the sign of which byte is its step's.
    u32 some = bytes_set<W>(symbols.x) >> 7 | bytes_set<W>(symbols.y) >> 3, before = some * 0x11111110 + 0x88888888;
    // The sign of byte k is bit k of the state.
    u32 low = (x & 0x0f) * 0x10204080, high = (x & 0xf0) * 0x01020408;
    u32 signs[2] = { permute(low, high, before), permute(low, high, before >> 16) };
    stream.keep(lane);
    drop(x, some * 0x11111111 >> 28, stream, below);
    u32 sizes[parts];
#pragma unroll
    for (u32 p = 0; p < parts; p++) {
        sizes[p] = sizeof(W) == 1 ? permute(symbols.x, symbols.y, p ? 0x7362 : 0x5140)
                 : sizeof(W) == 2 ? permute(symbols.x, symbols.y, 0xc480 + 0x1111 * p)
                                  : (p % 2 ? symbols.y : symbols.x) >> (8 * (p / 2)) & 255;
    }
    if (__any_sync(ALL, ((symbols.x | symbols.y) & 0xe0e0e0e0) != 0)) {
        add_raw_bits<W>(symbols, x, stream, sizes, lane, below);
    }
    Eight<W> made;
#pragma unroll
    for (u32 p = 0; p < parts; p++) {
        u32 down = sizeof(W) == 1 ? signs[p % 2]
                 : sizeof(W) == 2 ? permute(signs[p / 2 % 2], 0, p % 2 ? 0x3322 : 0x1100)
                                  : permute(signs[p / 4], 0, p % 4 * 0x1111);
        // a - b = ~(~a + b)
        u32 ordered = flipped<W>(own.parts[p], flip) ^ down;
        made.parts[p] = flipped<W>(sums<W>(ordered, sizes[p]) ^ down, flip);
    }
    return made;
}

template <typename W>
static __device__ void grouped_words(Near rows, const Work& work, u32 x, Stream& stream,
                                     Status* status, u32 lane) {
    const Segment& segment = *work.segment;
    const W* base = (const W*)segment.base + work.first;
    W* out = (W*)segment.out + work.first;
    bool aligned = (((u64)base | (u64)out) & 15) == 0;
    u32 words = work.words, key_mask = segment.key_mask, key_shift = segment.key_shift, below = (1u << lane) - 1;
    u32 flip = segment.flags & IS_FLOAT ? ~Parts<W>::top : 0, at = 8 * lane;
    // Words of 16 and 32 bits have their key at bit 3 or above (or none), which makes it an offset.
    if (sizeof(W) > 1) { key_shift = key_shift < 3 ? 0 : key_shift - NEAR_LOG2; key_mask *= sizeof(Near); }
    // Told to the compiler: neither divergent nor worth working out again.
    key_shift = __shfl_sync(ALL, key_shift, 0);
    key_mask = __shfl_sync(ALL, key_mask, 0);
    Eight<W> next = load_eight<W>(base, at, words, aligned);
    u32 first = 0;
    for (; first + 256 <= words; first += 256, at += 256) {
        Eight<W> own = next;
        next = load_eight<W>(base, at + 256, words, aligned);
        uint2 symbols = eight_symbols<W, false>(rows, own, x, stream, key_shift, key_mask, 8, lane, below);
        Eight<W> made = eight_steps<W>(own, symbols, x, stream, flip, lane, below);
        store_eight<W>(out, at, words, aligned, made);
    }
    if (first < words) {
        u32 there = at < words ? words - at : 0;
        uint2 symbols = eight_symbols<W, true>(rows, next, x, stream, key_shift, key_mask, there, lane, below);
        Eight<W> made = eight_steps<W>(next, symbols, x, stream, flip, lane, below);
        if (there) store_eight<W>(out, at, words, aligned, made);
    }
    bool ended = __all_sync(ALL, x == 65536) && stream.ended();
    if (lane == 0 && !ended) fail(status, LEFT_OVER, work.number);
}

// A class's slots and entries. By one warp.
template <typename W> static __device__ void fill_class(u8* to, const u32* list, u32 lane) {
    u32 count = __ldg(list);
    fill_slots<true>(to, list, lane, 32);
    for (u32 e = lane; e < count; e += 32) {
        u32 entry = __ldg(list + 1 + e);
        ((uint2*)(to + 4096))[entry & 255] = make_uint2((entry >> 8 & 4095) + 1, 0u - (entry >> 20));
    }
}

template <typename W>
static __device__ void decode_groups(const Segment* segments, u32 count, const u32* arena, u32 first_unit, Status* status,
                                     u32* bitmap, u8* near) {
    __shared__ GroupsShared shared;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    Work work = work_of(segments, count, first_unit, 7, GROUPS_WARPS);
    work.words = __shfl_sync(ALL, work.words, 0);
    const Segment& segment = *work.segment;
    bool there = __any_sync(ALL, work.chunk < segment.chunks), mine = __any_sync(ALL, work.mine && segment.dense);
    const u32* tables = arena + segment.dense;
    u32 classes = __ldg(tables);
    bool needed = __syncthreads_or(mine);
    const u32 bytes = ClassTables<W>::bytes;
    if (thread < 256) shared.rows[thread] = near_of(near) + bytes * (__ldg(tables + 1 + thread / 4) >> (8 * (thread % 4)) & 255);
    for (u32 c = needed ? warp : classes; c < classes; c += GROUPS_WARPS) {
        fill_class<W>(near + bytes * c, arena + __ldg(tables + 65 + c), lane);
    }
    __syncthreads();
    if (!there) return;
    if (!mine) {
        other_modes<W>(work, status, bitmap, lane);
        return;
    }
    u32 x;
    const u8* words = packed_states(x, work.payload.start + 1, work.payload.end, lane);
    if (words) {
        Stream stream;
        stream.open(shared.rings[__shfl_sync(ALL, warp, 0)], words, work.payload.end, lane);
        grouped_words<W>(near_of(shared.rows), work, x, stream, status, lane);
    } else if (lane == 0) {
        fail(status, ENDS_EARLY, work.number);
    }
}

#define GROUPS_KERNEL(NAME, W, BLOCKS)                                                                               \
    extern "C" __global__ void __launch_bounds__(GROUPS_THREADS, BLOCKS)                                             \
    NAME(const Segment* segments, u32 count, const u32* arena, u32 first_unit, Status* status, u32* bitmap) {        \
        decode_groups<W>(segments, count, arena, first_unit, status, bitmap, (u8*)dynamic_shared);                   \
    }
GROUPS_KERNEL(tpde_groups_8, u8, 2)
GROUPS_KERNEL(tpde_groups_16, u16, 2)
GROUPS_KERNEL(tpde_groups_32, u32, 1)
