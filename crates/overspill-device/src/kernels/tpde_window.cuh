// What the kernels of mode S share: the classes of a segment, and windows of a chunk's words in which they are counted.
//
// A window has 64 bytes a thread (32 of words of 8 bits). Every thread counts the classes of its bytes in 4-bit counters of
// two registers; sums of them lead to a word by subtile of 256 words, group of a thread's, unit of eight or four words.

#define CLASSES_MAX 16u
#define SPARSE_THREADS 128u
#define SPARSE_WARPS (SPARSE_THREADS / 32)
#define WINDOW_WORDS (16 * SPARSE_THREADS)          // 32-bit words of a window
// Where the arena has the tables of gaps: lists of so many symbols one behind the other, then 4096 slots each.
#define GAP_SYMBOLS 64u
#define GAP_SLOTS 652u
#define CLASS_LANES (SPARSE_THREADS / CLASSES_MAX)  // that look for a class's events
#define WARP_CLASSES (32 / CLASS_LANES)             // whose events a warp looks up


enum Kind { GAPS, DENSE, CLUSTERED, ROWS };

struct Class {
    u32 low, high, kind, k;
    u32 gap_table, value_table;    // lists of the arena, 0 for none
    u32 gap_entries, value_entries;  // how long they are
    u32 symbols;  // gap symbols, or words of a dense class
    u32 slot;     // of its first symbol in `ranks`
    u32 valued, value_slot;  // whether its events have values in `values`, and the first one's slot
    u32 events, fixed_bits, raw_bits;
    u32 fixed, raw;  // first bit in the two streams
};

struct Counting {
    Segment segment;
    uint2 counters[256];  // of each key: the counter of its class, one in 4 bits, or nothing
    Class classes[CLASSES_MAX + 1];  // the rows come last
    u32 live, verdict;
    uint2 units[4][SPARSE_THREADS];       // of each thread's units the counters of the classes
    uint4 window[4 * SPARSE_THREADS];     // the words
    uint4 before[SPARSE_THREADS];         // classes in front of each group in its subtile
    uint4 totals[SPARSE_THREADS / 8][2];  // classes in front of each subtile in the window, 16 bits each
};

// Counter of class q among the 4-bit fields of two registers, so that widening puts it at byte q.
static __device__ uint2 counter_of(u32 q) {
    u32 one = 1u << (4 * ((q & 3) * 2 + (q >> 2 & 1)));
    return q < 8 ? make_uint2(one, 0) : make_uint2(0, one);
}

static __device__ void set_classes(Counting& shared, const Segment& segment, const u32* arena, u32 thread) {
    const u32* tables = arena + segment.sparse;
    u32 live = __ldg(tables);
    for (u32 q = thread; q < live; q += SPARSE_THREADS) {
        Class& own = shared.classes[q];
        u32 packed = __ldg(tables + 2 + 3 * q);
        own.low = packed & 255;
        own.high = packed >> 8 & 255;
        own.kind = packed >> 16 & 255;
        own.k = packed >> 24;
        own.gap_table = __ldg(tables + 3 + 3 * q);
        own.value_table = __ldg(tables + 4 + 3 * q);
        own.gap_entries = own.gap_table ? __ldg(arena + own.gap_table) : 0;
        own.value_entries = own.value_table ? __ldg(arena + own.value_table) : 0;
        own.valued = own.value_table || !(segment.flags & IS_STEP);
        own.events = own.fixed_bits = own.raw_bits = 0;
    }
    u32 row_table = __ldg(tables + 1);
    if (thread == 0) {
        Class& rows = shared.classes[CLASSES_MAX];
        rows.kind = ROWS;
        rows.k = row_table >> 24;
        rows.gap_table = row_table & 0xffffff;
        rows.gap_entries = rows.gap_table ? __ldg(arena + rows.gap_table) : 0;
        rows.events = rows.fixed_bits = rows.fixed = 0;
        shared.live = live;
        shared.verdict = OK;
    }
    __syncthreads();
    for (u32 key = thread; key < 256; key += SPARSE_THREADS) {
        uint2 counter = make_uint2(0, 0);
        for (u32 q = 0; q < live; q++) {
            if (key >= shared.classes[q].low && key <= shared.classes[q].high) counter = counter_of(q);
        }
        shared.counters[key] = counter;
    }
}

template <typename W> struct Window {
    static const u32 pieces = sizeof(W) == 1 ? 2 : 4;      // of 16 bytes, that a thread counts
    static const u32 group = pieces * 16 / sizeof(W);      // their words
    static const u32 unit = sizeof(W) == 4 ? 4 : 8;        // words that are counted in 4 bits
    static const u32 units = group / unit;                 // four
    static const u32 lanes = 256 / group;                  // groups of a subtile
    static const u32 subtiles = SPARSE_THREADS / lanes;
    static const u32 words = SPARSE_THREADS * group;
    // Where a piece stands, so that neither rows nor groups of pieces meet in a bank.
    static __device__ u32 place(u32 group, u32 piece) {
        return pieces == 4 ? group * 4 + (piece ^ (group >> 1 & 3)) : group * 2 + (piece ^ (group >> 2 & 1));
    }
};

// Sixteen bytes of the base, zeros beyond the chunk.
template <typename W>
static __device__ uint4 load_piece(const W* base, u32 first, u32 words, bool aligned) {
    const u32 each = 16 / sizeof(W);
    if (!base) return make_uint4(0, 0, 0, 0);
    if (aligned && first + each <= words) return *(const uint4*)(base + first);
    u32 part[4] = { 0, 0, 0, 0 };
#pragma unroll
    for (u32 i = 0; i < each; i++) {
        if (first + i < words) part[i * sizeof(W) / 4] |= (u32)base[first + i] << (8 * (i * sizeof(W) % 4));
    }
    return make_uint4(part[0], part[1], part[2], part[3]);
}

// A thread's part of the window from `first` on.
template <typename W>
static __device__ void load_window(uint4* pieces, const W* base, u32 first, u32 words, bool aligned) {
    typedef Window<W> Win;
    if (base && aligned && first + Win::words <= words) {
        const uint4* from = (const uint4*)(base + first) + threadIdx.x;
#pragma unroll
        for (u32 i = 0; i < Win::pieces; i++) pieces[i] = __ldcs(from + SPARSE_THREADS * i);
    } else {
#pragma unroll
        for (u32 i = 0; i < Win::pieces; i++) {
            pieces[i] = load_piece<W>(base, first + (threadIdx.x + SPARSE_THREADS * i) * (16 / sizeof(W)), words, aligned);
        }
    }
}

// Counts a word's class. Words of 16 and 32 bits have their key at bit 3 or above (or none), which makes it an offset.
template <typename W>
static __device__ void count_word(const Counting& shared, u32 part, u32 shift, u32 mask, bool counts, u32& low,
                                  u32& high) {
    const u8* counters = (const u8*)shared.counters;
    u32 offset = sizeof(W) == 1 ? (part >> shift & mask) * 8 : part >> shift & mask;
    uint2 counter = *(const uint2*)(counters + offset);
    low += counts ? counter.x : 0;
    high += counts ? counter.y : 0;
}

// Counts the classes of a thread's group: four registers of bytes, class q at byte q; and of each unit, 4 bits a class.
template <typename W, bool MASKED>
static __device__ uint4 count_group(Counting& shared, u32 group, u32 shift, u32 key_mask, u32 mask) {
    typedef Window<W> Win;
    const u32 per_part = 4 / sizeof(W), unit_parts = Win::unit / per_part;
    if (sizeof(W) > 1) { shift = shift < 3 ? 0 : shift - 3; key_mask *= 8; }
    uint4 bytes = make_uint4(0, 0, 0, 0);
#pragma unroll (sizeof(W) == 1 ? 1 : 4)
    for (u32 piece = 0; piece < Win::pieces; piece++) {
        uint4 four = shared.window[Win::place(group, piece)];
        u32 parts[4] = { four.x, four.y, four.z, four.w };
#pragma unroll
        for (u32 first = 0; first < 4; first += unit_parts) {
            u32 low = 0, high = 0;
#pragma unroll
            for (u32 j = 0; j < Win::unit; j++) {
                u32 i = (piece * 4 + first) * per_part + j;
                count_word<W>(shared, parts[first + j / per_part], shift + 8 * sizeof(W) * (j % per_part), key_mask,
                              !MASKED || (mask >> i & 1), low, high);
            }
            shared.units[(piece * 4 + first) / unit_parts][group] = make_uint2(low, high);
            bytes.x += low & 0x0f0f0f0f;
            bytes.y += low >> 4 & 0x0f0f0f0f;
            bytes.z += high & 0x0f0f0f0f;
            bytes.w += high >> 4 & 0x0f0f0f0f;
        }
    }
    return bytes;
}

// Where the total of class q stands among sixteen: bytes 0 and 2 of a register lie side by side, 1 and 3 behind them.
static __device__ u32 total_of(u32 q) { return (q & ~3u) | (q & 1) << 1 | (q >> 1 & 1); }

// Which words of a unit have a key of low..high; both at most the mask.
template <typename W>
static __device__ u32 find_words(const u32* parts, u32 shift, u32 key_mask, u32 low, u32 high) {
    const u32 tops = sizeof(W) == 1 ? 0x80808080u : 0x80008000u;
    const u32 copies = sizeof(W) == 1 ? 0x01010101u : 0x00010001u;
    u32 found = 0;
#pragma unroll
    for (u32 j = 0; j < Window<W>::unit * sizeof(W) / 4; j++) {
        if (sizeof(W) == 4) {
            u32 key = parts[j] >> shift & key_mask;
            found |= (u32)(key - low <= high - low) << j;
        } else {
            // Keys lie below their word's top bit, which therefore shows a borrow.
            u32 keys = parts[j] & (key_mask << shift) * copies;
            u32 inside = ((keys | tops) - (low << shift) * copies) & (((high << shift) * copies | tops) - keys) & tops;
            if (sizeof(W) == 2) {
                found = found >> 1 | inside;
            } else {
                found |= ((inside >> 7 & 1) | (inside >> 14 & 2) | (inside >> 21 & 4) | (inside >> 28 & 8)) << (4 * j);
            }
        }
    }
    if (sizeof(W) == 2) {
        // Four even words in the low half, four odd ones in the high half: interleave.
        found = found >> 12 & 0x000f000f;
        found = (found | found << 2) & 0x00330033;
        found = (found | found << 1) & 0x00550055;
        found = (found | found >> 15) & 0xff;
    }
    return found;
}

// Counts the classes of the window: of every group in `before`, of every subtile in `totals`. `mask` says which of a
// thread's words count.
template <typename W>
static __device__ void count_window(Counting& shared, u32 mask) {
    typedef Window<W> Win;
    u32 thread = threadIdx.x, full = low_bits(~0u, Win::group);
    uint4 own = make_uint4(0, 0, 0, 0);
    if (mask == full) own = count_group<W, false>(shared, thread, shared.segment.key_shift, shared.segment.key_mask, mask);
    else if (mask) own = count_group<W, true>(shared, thread, shared.segment.key_shift, shared.segment.key_mask, mask);
    u32 sublane = thread % Win::lanes;
    uint4 sums = own;
#pragma unroll
    for (u32 step = 0; step < Win::lanes; step = step ? 2 * step : 1) {
        // The first round shifts by one lane, so that sums exclude their own group and fit into bytes.
        u32 by = step ? step : 1;
        uint4 other = make_uint4(__shfl_up_sync(ALL, sums.x, by), __shfl_up_sync(ALL, sums.y, by),
                                 __shfl_up_sync(ALL, sums.z, by), __shfl_up_sync(ALL, sums.w, by));
        bool inside = sublane >= by;
        if (step == 0) {
            sums = inside ? other : make_uint4(0, 0, 0, 0);
        } else if (inside) {
            sums.x += other.x; sums.y += other.y; sums.z += other.z; sums.w += other.w;
        }
    }
    shared.before[thread] = sums;
    if (sublane == Win::lanes - 1) {
        const u32 halves = 0x00ff00ff;
        uint4 *to = shared.totals[thread / Win::lanes];
        to[0] = make_uint4((sums.x & halves) + (own.x & halves), (sums.x >> 8 & halves) + (own.x >> 8 & halves),
                           (sums.y & halves) + (own.y & halves), (sums.y >> 8 & halves) + (own.y >> 8 & halves));
        to[1] = make_uint4((sums.z & halves) + (own.z & halves), (sums.z >> 8 & halves) + (own.z >> 8 & halves),
                           (sums.w & halves) + (own.w & halves), (sums.w >> 8 & halves) + (own.w >> 8 & halves));
    }
}

// Makes prefixes of the subtiles' totals of a class, whose lanes are neighbours; its words in the window.
template <typename W>
static __device__ u32 sum_subtiles(Counting& shared, u32 own_class, u32 part) {
    typedef Window<W> Win;
    // Subtiles' prefixes of every class, and how many of its events fall into this window.
    const u32 each_part = Win::subtiles / CLASS_LANES;  // two or one
    u16* totals = (u16*)shared.totals + total_of(own_class);
    u32 counts[each_part], ahead = 0;
#pragma unroll
    for (u32 i = 0; i < each_part; i++) {
        counts[i] = totals[16 * (part * each_part + i)];
        ahead += counts[i];
    }
    u32 through = ahead;
#pragma unroll
    for (u32 step = 1; step < CLASS_LANES; step *= 2) {
        u32 other = __shfl_up_sync(ALL, through, step);
        if (part >= step) through += other;
    }
    ahead = through - ahead;
#pragma unroll
    for (u32 i = 0; i < each_part; i++) {
        totals[16 * (part * each_part + i)] = (u16)ahead;
        ahead += counts[i];
    }
    return __shfl_sync(ALL, through, (threadIdx.x & 31) | (CLASS_LANES - 1));
}

