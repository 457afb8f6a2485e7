// Mode G: one warp a chunk, sixteen chunks of a segment a block, which share the slot tables in dynamic shared memory. A
// lane has eight words that stand side by side; it takes them through the symbols one by one, then through signs, raw bits
// and all else, so nothing but the tables is in shared memory.

#define GROUPS_THREADS 512u
#define GROUPS_WARPS (GROUPS_THREADS / 32)
// Bytes of a class's slots and entries, as in mode D.
#define CLASS_BYTES (4096 + 4 * ENTRY_STRIDE)

// Of each key where its class's slots lie, and its entries.
struct GroupsShared { uint2 rows[256]; };

// Symbols of a lane's eight words, a byte each. Words that are not there have symbol 0.
template <typename W, bool TAIL>
static __device__ uint2 eight_symbols(const GroupsShared& shared, const u8* tables, const Eight<W>& own, u32& x,
                                      Pulled& stream, u32 key_shift, u32 key_mask, u32 there, u32 lane) {
    uint2 symbols = make_uint2(0, 0);
    const u8* rows = (const u8*)shared.rows;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        u32 key = own.parts[i * sizeof(W) / 4] >> (key_shift + 8 * (i * sizeof(W) % 4)) & key_mask;
        uint2 row = *(const uint2*)(rows + (sizeof(W) == 1 ? 8 * key : key));
        u32 slot = x & 4095, high = x >> 12;
        u32 entry = *(const u32*)(tables + row.y + 4 * tables[row.x + slot]);
        u32 next = (entry >> 8 & 4095) * high + high + slot - (entry >> 20);
        bool active = !TAIL || i < there;
        if (active) x = next;
        u32 symbol = active ? entry & 255 : 0;
        if (i < 4) symbols.x |= symbol << (8 * i); else symbols.y |= symbol << (8 * (i - 4));
        stream.refill(x, lane);
    }
    return symbols;
}

// How many of four bytes are not 0.
static __device__ u32 bytes_set(u32 four) {
    return __popc((((four & 0x7f7f7f7f) + 0x7f7f7f7f) | four) & 0x80808080);
}

// Steps of a lane's eight words. False if a magnitude is beyond the word.
template <typename W>
static __device__ bool eight_steps(uint2 symbols, u32& x, Pulled& stream, u32* steps, u32 lane) {
    bool good = true, wide = ((symbols.x | symbols.y) & 0xe0e0e0e0) != 0;
    u32 signs = stream.pop(x, bytes_set(symbols.x) + bytes_set(symbols.y), lane);
#pragma unroll
    for (u32 i = 0; i < 8; i++) steps[i] = (i < 4 ? symbols.x : symbols.y) >> (8 * (i % 4)) & 255;
    if (__any_sync(ALL, wide)) {
        u32 wides = 0;
#pragma unroll
        for (u32 i = 0; i < 8; i++) wides |= (steps[i] >= 32 ? 1u : 0u) << i;
        do {
            u32 i = wides ? __ffs(wides) - 1 : 8, width = 0, size = 0;
            if (wides) {
                u32 symbol = (i < 4 ? symbols.x : symbols.y) >> (8 * (i % 4)) & 255;
                good = magnitude(symbol, sizeof(W) * 8, size, width) && good;
            }
            u32 some = min(width, 16);
            size += stream.pop(x, some, lane);
            if (sizeof(W) == 4) size += stream.pop(x, width - some, lane) << 16;
#pragma unroll
            for (u32 k = 0; k < 8; k++) steps[k] = k == i ? size : steps[k];
            wides &= wides - 1;
        } while (__any_sync(ALL, wides != 0));
    }
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        u32 symbol = (i < 4 ? symbols.x : symbols.y) >> (8 * (i % 4)) & 255;
        if (signs & 1) steps[i] = 0u - steps[i];
        if (symbol) signs >>= 1; else steps[i] = 0;
    }
    return good;
}

template <typename W>
static __device__ void grouped_words(const GroupsShared& shared, const u8* tables, const Work& work, u32 x,
                                     Pulled& stream, Status* status, u32 lane) {
    const Segment& segment = *work.segment;
    const W* base = (const W*)segment.base + work.first;
    W* out = (W*)segment.out + work.first;
    bool good = true, aligned = (((u64)base | (u64)out) & 15) == 0, is_float = segment.flags & IS_FLOAT;
    u32 words = work.words, key_mask = segment.key_mask, key_shift = segment.key_shift;
    // Words of 16 and 32 bits have their key at bit 3 or above (or none), which makes it an offset.
    if (sizeof(W) > 1) { key_shift = key_shift < 3 ? 0 : key_shift - 3; key_mask *= 8; }
    Eight<W> next = load_eight<W>(base, 8 * lane, words, aligned);
    for (u32 first = 0; first < words; first += 256) {
        u32 at = first + 8 * lane, there = at < words ? words - at : 0, steps[8];
        Eight<W> own = next;
        next = load_eight<W>(base, at + 256, words, aligned);
        uint2 symbols;
        if (first + 256 <= words) {
            symbols = eight_symbols<W, false>(shared, tables, own, x, stream, key_shift, key_mask, 8, lane);
        } else {
            symbols = eight_symbols<W, true>(shared, tables, own, x, stream, key_shift, key_mask, there, lane);
        }
        good = eight_steps<W>(symbols, x, stream, steps, lane) && good;
        Eight<W> made;
#pragma unroll
        for (u32 i = 0; i < 2 * sizeof(W); i++) made.parts[i] = 0;
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            W word = stepped<W>(own.word(i), (W)steps[i], is_float);
            made.parts[i * sizeof(W) / 4] |= (u32)word << (8 * (i * sizeof(W) % 4));
        }
        if (there) store_eight<W>(out, at, words, aligned, made);
    }
    bool ended = __all_sync(ALL, x == 65536) && stream.ended();
    good = __all_sync(ALL, good);
    if (lane == 0) {
        if (!good) fail(status, MAGNITUDE, work.number);
        else if (!ended) fail(status, LEFT_OVER, work.number);
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
    if (thread < 256) {
        u32 c = __ldg(tables + 1 + thread / 4) >> (8 * (thread % 4)) & 255;
        shared.rows[thread] = make_uint2(CLASS_BYTES * c, CLASS_BYTES * c + 4096);
    }
    for (u32 c = needed ? warp : classes; c < classes; c += GROUPS_WARPS) {
        const u32* list = arena + __ldg(tables + 65 + c);
        fill_slots(near + CLASS_BYTES * c, list, lane, 32);
        u32* entries = (u32*)(near + CLASS_BYTES * c + 4096);
        for (u32 e = lane; e < __ldg(list); e += 32) entries[e] = __ldg(list + 1 + e);
    }
    __syncthreads();
    if (!there) return;
    if (!mine) {
        other_modes<W>(work, status, bitmap, lane);
        return;
    }
    Pulled stream;
    u32 x;
    bool good = packed_states(x, stream, work.payload.start + 1, work.payload.end, lane);
    if (__all_sync(ALL, good)) grouped_words<W>(shared, near, work, x, stream, status, lane);
    else if (lane == 0) fail(status, ENDS_EARLY, work.number);
}

#define GROUPS_KERNEL(NAME, W)                                                                                       \
    extern "C" __global__ void __launch_bounds__(GROUPS_THREADS, 2)                                                  \
    NAME(const Segment* segments, u32 count, const u32* arena, u32 first_unit, Status* status, u32* bitmap) {        \
        decode_groups<W>(segments, count, arena, first_unit, status, bitmap, (u8*)dynamic_shared);                   \
    }
GROUPS_KERNEL(tpde_groups_8, u8)
GROUPS_KERNEL(tpde_groups_16, u16)
GROUPS_KERNEL(tpde_groups_32, u32)
