// Mode S (and Z and raw of the same segments): one block a chunk.
//
// 1. The first warp reads the payload's counts and decodes every symbol, 32 lanes in lockstep, into shared
//    memory; all warps build its slot tables, four at a time.
// 2. One warp a class turns symbols and raw bits into ascending ranks and values.
// 3. The block goes through the base in windows of 16 KiB. Every thread counts the classes of its 64 bytes in
//    4-bit counters of two registers, warps form prefix sums, and every event of the window looks its word up:
//    subtile of 256 words, group of 64 bytes, word. Only changed words are written, out of place
//    after the window's copy.
//
// A chunk with more symbols than `capacity`, rows or modes that this kernel does not hold is left untouched and
// noted in the bitmap.

#define CLASSES_MAX 16u
#define RUNS_MAX (1 + 2 * CLASSES_MAX)
#define ROWS_MAX 8192u
#define TABLES 4u

enum Kind { GAPS, DENSE, CLUSTERED, ROWS };

struct Class {
    u32 low, high, kind, k;
    u32 gap_table, value_table;
    u32 symbols;  // gap symbols, or words of a dense class
    u32 slot;     // of its first symbol in `ranks` and `values`
    u32 events, fixed_bits, raw_bits;
    u32 fixed, raw;  // first bit in the two streams
};

struct Shared {
    uint2 counters[256];  // of each key: the counter of its class, one in 4 bits, or nothing
    Class classes[CLASSES_MAX + 1];  // the rows come last
    u32 live, capacity_needed, verdict, chunk_words;
    u32 first_words[16];  // of the raw bits: what the lanes end in
    const u8 *raw_rest, *raw_end;
    u32 seed_bytes, fixed_bits, raw_bits, row_events;
    u16 ring[128];
    u32 cursor[CLASSES_MAX], window_rank[CLASSES_MAX], window_start[CLASSES_MAX + 1], window_events[CLASSES_MAX];
    u32 rows[ROWS_MAX / 32];
    uint4 window[1024];       // and before that the slot tables
    uint4 before[256];        // classes in front of each group in its subtile; and before that the entries
    u32 totals[64][17];       // classes in front of each subtile in the window
};

// Counter of class q among the 4-bit fields of two registers, so that widening puts it at byte q.
static __device__ uint2 counter_of(u32 q) {
    u32 one = 1u << (4 * ((q & 3) * 2 + (q >> 2 & 1)));
    return q < 8 ? make_uint2(one, 0) : make_uint2(0, one);
}

// ---- 1: symbols --------------------------------------------------------------------------------

struct Lanes {
    u32 state, count, next;  // lanes K; the next symbol's number
};

// Decodes `symbols` symbols with one table into `ranks` (gap symbols) or `values`.
template <typename W>
static __device__ void decode_run(Lanes& lanes, Words& words, const u8* slots, const u32* entries, u32 symbols,
                                  u32* ranks, W* values, u32 lane, u32 below) {
    u32 end = lanes.next + symbols;
    for (u32 step = lanes.next & ~(lanes.count - 1); step < end; step += lanes.count) {
        u32 n = step + lane;
        bool active = lane < lanes.count && n >= lanes.next && n < end;
        u32 slot = lanes.state & 4095, entry = entries[slots[slot]];
        u32 x = ((entry >> 8 & 4095) + 1) * (lanes.state >> 12) + slot - (entry >> 20);
        bool needs = active && x < 65536;
        if (active) {
            lanes.state = x;
            if (ranks) ranks[n - lanes.next] = entry & 255; else values[n - lanes.next] = (W)(entry & 255);
        }
        lanes.state = words.pull(needs, lanes.state, lane, below);
    }
    lanes.next = end;
}

static __device__ void set_classes(Shared& shared, const Segment& segment, const u32* arena, u32 thread) {
    const u32* tables = arena + segment.sparse;
    u32 live = __ldg(tables);
    for (u32 q = thread; q < live; q += BLOCK_THREADS) {
        Class& own = shared.classes[q];
        u32 packed = __ldg(tables + 2 + 3 * q);
        own.low = packed & 255;
        own.high = packed >> 8 & 255;
        own.kind = packed >> 16 & 255;
        own.k = packed >> 24;
        own.gap_table = __ldg(tables + 3 + 3 * q);
        own.value_table = __ldg(tables + 4 + 3 * q);
        own.events = own.fixed_bits = own.raw_bits = 0;
    }
    u32 row_table = __ldg(tables + 1);
    if (thread == 0) {
        Class& rows = shared.classes[CLASSES_MAX];
        rows.kind = ROWS;
        rows.k = row_table >> 24;
        rows.gap_table = row_table & 0xffffff;
        rows.events = rows.fixed_bits = rows.fixed = 0;
        shared.live = live;
        shared.verdict = OK;
    }
    for (u32 i = thread; i < ROWS_MAX / 32; i += BLOCK_THREADS) shared.rows[i] = 0;
    __syncthreads();
    if (thread < 256) {
        uint2 counter = make_uint2(0, 0);
        for (u32 q = 0; q < live; q++) {
            if (thread >= shared.classes[q].low && thread <= shared.classes[q].high) counter = counter_of(q);
        }
        shared.counters[thread] = counter;
    }
}

// The counts of a payload's header, by one warp whose lanes all do the same. False if it is malformed.
static __device__ bool read_counts(Shared& shared, Header& header, u32& lanes, u32 words, u32 lane) {
    u32 log2 = header.take(3), order = header.take(4);
    lanes = 1u << log2;
    bool bad = false;
    u64 total = 0;
    Class& rows = shared.classes[CLASSES_MAX];
    u64 row_symbols = rows.gap_table ? header.golomb(order, bad) : 0;
    total += row_symbols;
    long long count = 0;
    for (u32 q = 0; q < shared.live && !bad; q++) {
        u64 folded = header.golomb(order, bad);
        count += (long long)(folded >> 1) ^ -(long long)(folded & 1);
        if (count < 0) bad = true;
        total += (u64)count;
        if (lane == 0) {
            shared.classes[q].symbols = (u32)count;
            shared.classes[q].slot = (u32)(total - (u64)count);
        }
    }
    if (lane == 0) {
        rows.symbols = (u32)row_symbols;
        rows.slot = 0;
        shared.capacity_needed = (u32)total;
        if (log2 > 5) shared.verdict = LANES;
        else if (bad || header.late()) shared.verdict = NEGATIVE;
        else if (total > 2ull * words) shared.verdict = TOO_MANY_SYMBOLS;
    }
    __syncwarp();
    bool good = shared.verdict == OK;
    __syncwarp();
    return good;
}

// Events and raw bits of a class whose symbols have been decoded; clustered and dense ones vary in width.
template <typename W>
static __device__ void measure_symbols(Class& own, const u32* ranks, const W* values, u32 is_step, bool of_values,
                                       u32 lane) {
    u32 events = 0, bits = 0;
    u32 count = of_values && own.kind != DENSE ? own.events : own.symbols;
    for (u32 i = lane; i < count; i += 32) {
        u32 least, width;
        if (!of_values) {
            u32 symbol = ranks[i];
            if (own.kind == CLUSTERED) {
                magnitude(symbol, 32, least, width);
                events++;
                bits += width + is_step;
            } else if (symbol != 63) {
                events++;
                bits += own.k + (own.kind == ROWS ? 0 : is_step);
            }
        } else if (!is_step) {
            bits += sizeof(W) * 8 - 8;
        } else {
            u32 symbol = own.kind == DENSE ? ranks[i] : (u32)values[i];
            magnitude(symbol, sizeof(W) * 8, least, width);
            bool changed = own.kind != DENSE || symbol != 0;
            events += changed;
            bits += changed ? width + (own.kind == DENSE) : 0;
        }
    }
    events = sum(events);
    bits = sum(bits);
    if (lane == 0) {
        if (!of_values || own.kind == DENSE) own.events = events;
        if (of_values) own.raw_bits = bits; else own.fixed_bits = bits;
    }
    __syncwarp();
}

// Decodes all symbols. Ends with a barrier; false if the chunk is bad or left, the same for all threads.
template <typename W>
static __device__ bool decode_symbols(Shared& shared, const Segment& segment, Payload payload, const u32* arena,
                                      u32* ranks, u32 capacity, u32 words) {
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, below = (1u << lane) - 1;
    bool is_step = segment.flags & IS_STEP;
    set_classes(shared, segment, arena, thread);
    __syncthreads();
    Lanes lanes = { 65536, 1, 0 };
    Words stream;
    if (warp == 0) {
        Header header = { payload.start + 1, payload.end, 0 };
        bool good = read_counts(shared, header, lanes.count, words, lane);
        if (good && shared.capacity_needed <= capacity) {
            Header states = { header.rest(), payload.end, 0 };
            u32 own = 0;
            for (u32 i = 0; i < lanes.count; i++) {
                if (i == lane) own = states.bit;
                states.bit += 20 + low_bits(states.peek(), 4);
            }
            bool late = states.late();
            const u8* from = states.rest();
            states.bit = own;
            u32 width = states.take(4) + 16;
            u32 low = states.take(width);
            lanes.state = lane < lanes.count ? 1u << width | low : 65536;
            if (late && lane == 0) shared.verdict = ENDS_EARLY;
            stream.open(shared.ring, late ? payload.end : from, payload.end, lane);
        }
    }
    __syncthreads();
    W* values = (W*)(ranks + capacity);
    if (shared.verdict != OK || shared.capacity_needed > capacity) return false;

    // Runs: rows, gaps of each class, values of each class. Four tables at a time lie in the window.
    u32 live = shared.live, runs = 1 + 2 * live;
    u8* slots = (u8*)shared.window;
    u32* entries = (u32*)shared.before;
    for (u32 run = 0; run < runs;) {
        // Which of the runs from here on have symbols: the next four, the same for all threads.
        u32 chosen[TABLES], many = 0, next = run;
        for (; next < runs && many < TABLES; next++) {
            // Values of a class need its events counted, which the rounds before have done.
            if (next == 1 + live && many) break;
            const Class& own = shared.classes[next == 0 ? CLASSES_MAX : (next - 1) % live];
            bool of_values = next > live;
            u32 table = of_values ? own.value_table : own.gap_table;
            if (!of_values && own.kind == DENSE) continue;
            u32 symbols = of_values && own.kind != DENSE ? own.events : own.symbols;
            if (symbols && table) {
#pragma unroll
                for (u32 i = 0; i < TABLES; i++) if (i == many) chosen[i] = next;
                many++;
            }
        }
#pragma unroll
        for (u32 i = 0; i < TABLES; i++) {
            if (i >= many) break;
            const Class& own = shared.classes[chosen[i] == 0 ? CLASSES_MAX : (chosen[i] - 1) % live];
            const u32* list = arena + (chosen[i] > live ? own.value_table : own.gap_table);
            u32 share = thread - 64 * i;
            if (share < 64) {
                fill_slots(slots + 4096 * i, list, share, 64);
                for (u32 e = share; e < __ldg(list); e += 64) entries[256 * i + e] = __ldg(list + 1 + e);
            }
        }
        __syncthreads();
        if (warp == 0) {
#pragma unroll
            for (u32 i = 0; i < TABLES; i++) {
                if (i >= many) break;
                bool of_values = chosen[i] > live;
                Class& own = shared.classes[chosen[i] == 0 ? CLASSES_MAX : (chosen[i] - 1) % live];
                bool in_ranks = !of_values || own.kind == DENSE;
                u32 symbols = of_values && own.kind != DENSE ? own.events : own.symbols;
                decode_run<W>(lanes, stream, slots + 4096 * i, entries + 256 * i, symbols,
                              in_ranks ? ranks + own.slot : nullptr, values + own.slot, lane, below);
                __syncwarp();
                measure_symbols<W>(own, ranks + own.slot, values + own.slot, is_step, of_values, lane);
            }
        }
        run = next;
        __syncthreads();
    }
    if (warp == 0) {
        bool seeded = lane >= lanes.count || lanes.state >> 16 == 1;
        if (!__all_sync(ALL, seeded) && lane == 0) shared.verdict = NOT_SEED;
        if (lane < lanes.count) ((u16*)shared.first_words)[lane] = (u16)lanes.state;
        __syncwarp();
        if (lane == 0) {
            if (stream.rest() > payload.end) shared.verdict = ENDS_EARLY;
            shared.seed_bytes = 2 * lanes.count;
            shared.raw_rest = stream.rest();
            shared.raw_end = payload.end;
            u32 fixed = shared.classes[CLASSES_MAX].fixed_bits, raw = 0;
            for (u32 q = 0; q < live; q++) {
                Class& own = shared.classes[q];
                own.fixed = fixed;
                own.raw = raw;
                fixed += own.fixed_bits;
                raw += own.raw_bits;
            }
            u32 first_bytes = (fixed + 7) / 8, used = first_bytes + (raw + 7) / 8;
            for (u32 q = 0; q < live; q++) shared.classes[q].raw += 8 * first_bytes;
            // A stream of 64 Ki events and more of 40 bits would still fit into 32 bits.
            if (shared.verdict == OK) {
                u64 there = shared.seed_bytes + (u64)(shared.raw_end - shared.raw_rest);
                if ((used > shared.seed_bytes ? used : shared.seed_bytes) != there) shared.verdict = LEFT_OVER;
                for (u32 i = used; i < shared.seed_bytes; i++) {
                    if (((const u8*)shared.first_words)[i]) shared.verdict = LEFT_OVER;
                }
            }
        }
    }
    __syncthreads();
    return shared.verdict == OK;
}

// ---- 2: events ---------------------------------------------------------------------------------

static __device__ u32 raw_word(const Shared& shared, u32 i) {
    if (4 * i + 4 <= shared.seed_bytes) return shared.first_words[i];
    if (4 * i >= shared.seed_bytes) return load32(shared.raw_rest + 4 * i - shared.seed_bytes, shared.raw_end);
    return (shared.first_words[i] & 0xffff) | load32(shared.raw_rest, shared.raw_end) << 16;
}

static __device__ u32 raw_bits(const Shared& shared, u32 bit, u32 width) {
    u32 i = bit >> 5, shift = bit & 31;
    u32 low = width ? raw_word(shared, i) : 0, high = shift + width > 32 ? raw_word(shared, i + 1) : 0;
    return low_bits(__funnelshift_r(low, high, shift), width);
}

// Ranks and values of one class, in place and in order, by one warp. `limit` bounds the ranks.
template <typename W>
static __device__ u32 make_events(Shared& shared, Class& own, u32* ranks, W* values, u32 flags, u32 limit, u32 lane,
                                  u32 below) {
    const u32 bits = sizeof(W) * 8;
    bool is_step = (flags & IS_STEP) && own.kind != ROWS, is_float = flags & IS_FLOAT;
    u32 events = 0, next = 0, escapes = 0, fixed = own.fixed, raw = own.raw, verdict = OK;
    for (u32 at = 0; at < own.symbols; at += 32) {
        bool active = at + lane < own.symbols;
        u32 symbol = active ? ranks[at + lane] : 0;
        bool event = active && (own.kind == DENSE ? symbol != 0 : own.kind == CLUSTERED || symbol != 63);
        u32 who = __ballot_sync(ALL, event), index = events + __popc(who & below);
        // The gap's width in the fixed stream, its prefix, and the gap.
        u32 least, width, gap = 0, sign = 0;
        bool good = true;
        if (own.kind == CLUSTERED) {
            good = magnitude(symbol, 32, least, width);
            u32 all = scan(event ? width + is_step : 0, lane);
            u32 bit = fixed + all - (event ? width + is_step : 0);
            if (event && good) {
                u64 wide = (u64)least + raw_bits(shared, bit, width);
                gap = wide > 0x1ffffff ? 0x1ffffff : (u32)wide;
                if (is_step) sign = raw_bits(shared, bit + width, 1);
            }
            fixed += __shfl_sync(ALL, all, 31);
        } else if (own.kind != DENSE) {
            u32 previous = who & below;
            u32 run = previous ? lane - (32 - __clz(previous)) : lane + escapes;
            u32 quotient = 63 * run + symbol;
            u32 taken = __popc(__ballot_sync(ALL, active));
            escapes = who ? taken - (32 - __clz(who)) : escapes + taken;
            if (event) {
                u32 each = own.k + is_step, bit = fixed + index * each;
                gap = quotient > 0x1ffffffu >> own.k ? 0x1ffffff : quotient << own.k | raw_bits(shared, bit, own.k);
                if (is_step) sign = raw_bits(shared, bit + own.k, 1);
            }
        }
        u32 rank = at + lane;
        if (own.kind != DENSE) {
            u32 sums = scan(event ? gap + 1 : 0, lane);
            rank = next + sums - 1;
            if (event && (!good || rank >= limit)) verdict = good ? POSITION : GAP;
            next += __shfl_sync(ALL, sums, 31);
            if (next > limit) next = limit + 1;
        }
        // The value.
        W value = 0;
        if (own.kind != ROWS) {
            u32 code = own.kind == DENSE ? symbol : !event ? 0 : own.value_table ? (u32)values[index] : 1;
            if (is_step) {
                bool fits = magnitude(code, bits, least, width);
                u32 wide = event ? width + (own.kind == DENSE) : 0, prefix = 0, all = 0;
                if (__any_sync(ALL, wide)) {
                    all = scan(wide, lane);
                    prefix = all - wide;
                    all = __shfl_sync(ALL, all, 31);
                }
                if (event) {
                    u32 bit = raw + prefix;
                    if (own.kind == DENSE) sign = raw_bits(shared, bit++, 1);
                    u32 size = least + raw_bits(shared, bit, width);
                    value = (W)(sign ? 0u - size : size);
                    if (!fits) verdict = MAGNITUDE;
                }
                raw += all;
            } else if (event) {
                u32 word = code << (bits - 8) | raw_bits(shared, raw + index * (bits - 8), bits - 8);
                value = is_float ? rotated_right<W>((W)word) : (W)word;
            }
        }
        __syncwarp();
        if (event) {
            ranks[index] = rank;
            if (own.kind != ROWS) values[index] = value;
        }
        __syncwarp();
        events += __popc(who);
    }
    if (escapes && own.kind != DENSE && own.kind != CLUSTERED) verdict = ESCAPE_LAST;
    return verdict;
}

// ---- 3: words ----------------------------------------------------------------------------------

template <typename W> static __device__ bool rows_matter(const Shared& shared) {
    return shared.classes[CLASSES_MAX].gap_table != 0;
}

// Which of `count` words from `first` on (counted in the chunk, `offset` its place in its first row) count.
static __device__ u64 row_mask(const Shared& shared, u32 first, u32 count, u32 offset, u32 row_words) {
    u64 mask = 0;
    u32 at = offset + first, row = at / row_words, done = 0;
    u32 row_end = (row + 1) * row_words - at;
    while (done < count) {
        u32 to = min(row_end, count);
        u64 ones = (to - done == 64 ? ~0ull : (1ull << (to - done)) - 1) << done;
        if (shared.rows[row >> 5] >> (row & 31) & 1) mask |= ones;
        done = to;
        row++;
        row_end += row_words;
    }
    return mask;
}

template <typename W> struct Window {
    static const u32 group = 64 / sizeof(W);       // words of a thread
    static const u32 lanes = 256 / group;          // groups of a subtile
    static const u32 subtiles = 256 / lanes;
    static const u32 words = 256 * group;
};

static __device__ u32 place(u32 group, u32 piece) { return group * 4 + (piece ^ (group >> 1 & 3)); }

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

template <typename W>
static __device__ void store_piece(W* out, u32 first, u32 words, bool aligned, uint4 piece) {
    const u32 each = 16 / sizeof(W);
    if (aligned && first + each <= words) {
        *(uint4*)(out + first) = piece;
        return;
    }
    u32 parts[4] = { piece.x, piece.y, piece.z, piece.w };
#pragma unroll
    for (u32 i = 0; i < each; i++) {
        if (first + i < words) out[first + i] = (W)(parts[i * sizeof(W) / 4] >> (8 * (i * sizeof(W) % 4)));
    }
}

template <typename W>
static __device__ void count_word(const Shared& shared, u32 part, u32 shift, u32 mask, bool counts, u32& low,
                                  u32& high) {
    uint2 counter = shared.counters[part >> shift & mask];
    low += counts ? counter.x : 0;
    high += counts ? counter.y : 0;
}

// Counts the classes of a thread's group: four registers of bytes, class q at byte q.
template <typename W, bool MASKED>
static __device__ uint4 count_group(const Shared& shared, u32 group, u32 shift, u32 key_mask, u64 mask) {
    const u32 per_part = 4 / sizeof(W);
    uint4 bytes = make_uint4(0, 0, 0, 0);
#pragma unroll (sizeof(W) == 1 ? 1 : 4)
    for (u32 piece = 0; piece < 4; piece++) {
        uint4 four = shared.window[place(group, piece)];
        u32 parts[4] = { four.x, four.y, four.z, four.w };
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 low = 0, high = 0;
#pragma unroll
            for (u32 j = 0; j < 2 * per_part; j++) {
                u32 i = (piece * 4 + half * 2) * per_part + j;
                count_word<W>(shared, parts[half * 2 + j / per_part], shift + 8 * sizeof(W) * (j % per_part),
                              key_mask, !MASKED || (mask >> i & 1), low, high);
            }
            bytes.x += low & 0x0f0f0f0f;
            bytes.y += low >> 4 & 0x0f0f0f0f;
            bytes.z += high & 0x0f0f0f0f;
            bytes.w += high >> 4 & 0x0f0f0f0f;
        }
    }
    return bytes;
}

// Which words of a group have a key of low..high.
template <typename W>
static __device__ u64 find_words(const Shared& shared, u32 group, u32 shift, u32 key_mask, u32 low, u32 high) {
    const u32 width = sizeof(W) * 8, tops = sizeof(W) == 1 ? 0x80808080u : 0x80008000u;
    const u32 copies = sizeof(W) == 1 ? 0x01010101u : 0x00010001u;
    if (low > key_mask) return 0;
    high = high > key_mask ? key_mask : high;
    u32 even = 0;
    u64 found = 0;
#pragma unroll (sizeof(W) == 1 ? 1 : 4)
    for (u32 piece = 0; piece < 4; piece++) {
        uint4 four = shared.window[place(group, piece)];
        u32 parts[4] = { four.x, four.y, four.z, four.w };
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 i = piece * 4 + j;
            if (sizeof(W) == 4) {
                u32 key = parts[j] >> shift & key_mask;
                even |= (u32)(key - low <= high - low) << i;
            } else {
                // Keys lie below their word's top bit, which therefore shows a borrow.
                u32 keys = parts[j] & (key_mask << shift) * copies;
                u32 inside = ((keys | tops) - (low << shift) * copies) & (((high << shift) * copies | tops) - keys) & tops;
                if (sizeof(W) == 2) {
                    even = even >> 1 | inside;
                } else {
                    u32 nibble = (inside >> 7 & 1) | (inside >> 14 & 2) | (inside >> 21 & 4) | (inside >> 28 & 8);
                    found |= (u64)nibble << (4 * i);
                }
            }
        }
    }
    if (sizeof(W) == 4) return even;
    if (sizeof(W) == 1) return found;
    // Sixteen even words in the low half, sixteen odd ones in the high half: interleave.
    u32 x = even & 0xffff, y = even >> 16;
    x = (x | x << 8) & 0x00ff00ff; y = (y | y << 8) & 0x00ff00ff;
    x = (x | x << 4) & 0x0f0f0f0f; y = (y | y << 4) & 0x0f0f0f0f;
    x = (x | x << 2) & 0x33333333; y = (y | y << 2) & 0x33333333;
    x = (x | x << 1) & 0x55555555; y = (y | y << 1) & 0x55555555;
    (void)width;
    return x | y << 1;
}

// Place of the `rank`-th one, which exists.
static __device__ u32 select(u64 mask, u32 rank) {
    u32 half = (u32)mask, at = 0, ones = __popc(half);
    if (rank >= ones) { rank -= ones; half = (u32)(mask >> 32); at = 32; }
#pragma unroll
    for (u32 width = 16; width; width /= 2) {
        ones = __popc(half & ((1u << width) - 1));
        if (rank >= ones) { rank -= ones; half >>= width; at += width; }
    }
    return at;
}

template <typename W>
static __device__ void apply_event(Shared& shared, const Segment& segment, u32 q, u32 rank, W value, u32 window_first,
                                   u32 chunk_first, u32 words, u32 offset, bool rows) {
    typedef Window<W> Win;
    u32 low = 0, high = Win::subtiles;
#pragma unroll
    for (u32 i = 1; i < Win::subtiles; i *= 2) {
        u32 middle = (low + high) / 2;
        if (shared.totals[middle][q] <= rank) low = middle; else high = middle;
    }
    rank -= shared.totals[low][q];
    const u8* before = (const u8*)shared.before;
    u32 group = low * Win::lanes, groups_end = group + Win::lanes;
#pragma unroll
    for (u32 i = 1; i < Win::lanes; i *= 2) {
        u32 middle = (group + groups_end) / 2;
        if (before[16 * middle + q] <= rank) group = middle; else groups_end = middle;
    }
    rank -= before[16 * group + q];
    const Class& own = shared.classes[q];
    u64 mask = find_words<W>(shared, group, segment.key_shift, segment.key_mask, own.low, own.high);
    if (rows) {
        u32 group_first = window_first + group * Win::group;
        mask &= row_mask(shared, group_first, min(Win::group, words - group_first), offset, segment.row_words);
    }
    u32 at = select(mask, rank);
    u32 byte = at * sizeof(W);
    const W* word = (const W*)((const u8*)&shared.window[place(group, byte / 16)] + byte % 16);
    bool is_float = segment.flags & IS_FLOAT;
    W made = segment.flags & IS_STEP ? stepped<W>(*word, value, is_float) : value;
    // Not into the window, whose words others are still looking up.
    ((W*)segment.out)[chunk_first + window_first + group * Win::group + at] = made;
}

template <typename W>
static __device__ bool apply_events(Shared& shared, const Segment& segment, u32 chunk_first, u32 words, u32* ranks,
                                    W* values, bool in_place) {
    typedef Window<W> Win;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const u32 each = 16 / sizeof(W);
    const W* base = segment.flags & HAS_BASE ? (const W*)segment.base + chunk_first : nullptr;
    W* out = (W*)segment.out + chunk_first;
    bool aligned = (((u64)base | (u64)out) & 15) == 0, rows = rows_matter<W>(shared);
    u32 offset = rows ? (segment.row_offset + chunk_first) % segment.row_words : 0;
    u32 live = shared.live;
    // Every warp keeps the running ranks of its two classes.
    u32 rank0 = 0, rank1 = 0;
    if (thread < CLASSES_MAX) shared.cursor[thread] = 0;
    uint4 pieces[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) pieces[i] = load_piece<W>(base, (thread + 256 * i) * each, words, aligned);
    for (u32 first = 0; first < words; first += Win::words) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 piece = thread + 256 * i;
            shared.window[place(piece >> 2, piece & 3)] = pieces[i];
            if (!in_place) store_piece<W>(out, first + piece * each, words, aligned, pieces[i]);
        }
        __syncthreads();
        u32 next = first + Win::words;
        if (next < words) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) pieces[i] = load_piece<W>(base, next + (thread + 256 * i) * each, words, aligned);
        }
        // Every group's classes, in front of it in its subtile.
        u32 group_first = first + thread * Win::group;
        u32 there = group_first >= words ? 0 : words - group_first < Win::group ? words - group_first : Win::group;
        u64 full = Win::group == 64 ? ~0ull : (1ull << (Win::group & 63)) - 1;
        u64 mask = there == Win::group ? full : (1ull << there) - 1;
        if (rows && there) mask &= row_mask(shared, group_first, there, offset, segment.row_words);
        uint4 own = make_uint4(0, 0, 0, 0);
        if (mask == full) own = count_group<W, false>(shared, thread, segment.key_shift, segment.key_mask, mask);
        else if (mask) own = count_group<W, true>(shared, thread, segment.key_shift, segment.key_mask, mask);
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
            u32 subtile = thread / Win::lanes;
            u32 a[4] = { sums.x, sums.y, sums.z, sums.w }, b[4] = { own.x, own.y, own.z, own.w };
#pragma unroll
            for (u32 q = 0; q < CLASSES_MAX; q++) {
                shared.totals[subtile][q] = (a[q / 4] >> (8 * (q % 4)) & 255) + (b[q / 4] >> (8 * (q % 4)) & 255);
            }
        }
        __syncthreads();
        // Two classes a warp: subtiles' prefixes, and how many events fall into this window.
#pragma unroll
        for (u32 turn = 0; turn < 2; turn++) {
            u32 q = warp + WARPS * turn;
            if (q >= live) break;
            u32 begun = turn ? rank1 : rank0, ahead = 0;
#pragma unroll
            for (u32 from = 0; from < Win::subtiles; from += 32) {
                u32 value = from + lane < Win::subtiles ? shared.totals[from + lane][q] : 0;
                u32 sums = scan(value, lane);
                if (from + lane < Win::subtiles) shared.totals[from + lane][q] = ahead + sums - value;
                ahead += __shfl_sync(ALL, sums, 31);
            }
            u32 ended = begun + ahead, cursor = shared.cursor[q], count = 0;
            if (first) cursor += shared.window_events[q];
            const Class& cls = shared.classes[q];
            while (true) {
                u32 at = cursor + count + lane;
                bool inside = at < cls.events && ranks[cls.slot + at] < ended;
                u32 ones = __popc(__ballot_sync(ALL, inside));
                count += ones;
                if (ones < 32) break;
            }
            __syncwarp();
            if (lane == 0) {
                shared.cursor[q] = cursor;
                shared.window_rank[q] = begun;
                shared.window_events[q] = count;
            }
            if (turn) rank1 = ended; else rank0 = ended;
        }
        __syncthreads();
        if (warp == 0) {
            u32 count = lane < live ? shared.window_events[lane] : 0;
            u32 sums = scan(count, lane);
            if (lane < CLASSES_MAX) shared.window_start[lane] = sums - count;
            if (lane == 31) shared.window_start[CLASSES_MAX] = sums;
        }
        __syncthreads();
        u32 events = shared.window_start[CLASSES_MAX];
        for (u32 event = thread; event < events; event += BLOCK_THREADS) {
            u32 q = 0;
#pragma unroll
            for (u32 width = 8; width; width /= 2) {
                if (shared.window_start[q + width] <= event) q += width;
            }
            u32 at = shared.classes[q].slot + shared.cursor[q] + event - shared.window_start[q];
            apply_event<W>(shared, segment, q, ranks[at] - shared.window_rank[q], values[at], first, chunk_first,
                           words, offset, rows);
        }
        __syncthreads();
    }
    bool done = true;
    for (u32 q = thread; q < live; q += BLOCK_THREADS) {
        done = shared.cursor[q] + shared.window_events[q] == shared.classes[q].events;
    }
    return done;
}

template <typename W>
static __device__ void decode_sparse(const Segment* segments, u32 count, const u32* arena, u32 first_unit,
                                     u32 capacity, const u32* only, Status* status, u32* bitmap, u32* ranks) {
    __shared__ Shared shared;
    u32 thread = threadIdx.x, unit = first_unit + blockIdx.x;
    const Segment& segment = segment_of(segments, count, unit);
    u32 chunk = unit - segment.first, number = segment.bit + chunk;
    if (only && !(only[number >> 5] >> (number & 31) & 1)) return;
    Payload payload = payload_of(segment, chunk);
    u32 chunk_first = chunk << segment.chunk_log2;
    u32 words = min(1u << segment.chunk_log2, segment.words - chunk_first);
    u32 mode = payload.start < payload.end ? *payload.start : 0;
    if (mode <= 1) {
        if (segment.flags & COPIES) {
            copy_chunk<W>(segment, payload, chunk_first, words, thread, BLOCK_THREADS, status, number);
        }
        return;
    }
    if (mode != 2 || !segment.sparse) {
        if (thread == 0) not_here(segment, mode, status, bitmap, number);
        return;
    }
    bool rows = segment.row_words && __ldg(arena + segment.sparse + 1);
    u32 offset = rows ? (segment.row_offset + chunk_first) % segment.row_words : 0;
    u32 row_count = rows ? (offset + words + segment.row_words - 1) / segment.row_words : 0;
    if (row_count > ROWS_MAX) {
        if (thread == 0) leave(status, bitmap, number);
        return;
    }
    bool in_place = segment.flags & HAS_BASE && segment.base == segment.out;
    if (!decode_symbols<W>(shared, segment, payload, arena, ranks, capacity, words)) {
        if (thread == 0 && shared.verdict == OK) leave(status, bitmap, number);
        if (thread == 0 && shared.verdict != OK) fail(status, shared.verdict, number);
        return;
    }
    W* values = (W*)(ranks + capacity);
    u32 lane = thread & 31, warp = thread >> 5, verdict = OK;
    for (u32 q = warp; q < shared.live + 1; q += WARPS) {
        bool of_rows = q == shared.live;
        Class& own = shared.classes[of_rows ? CLASSES_MAX : q];
        u32 found = make_events<W>(shared, own, ranks + own.slot, values + own.slot, segment.flags,
                                   of_rows ? row_count : words, lane, (1u << lane) - 1);
        if (found) verdict = found;
        if (of_rows && !found) {
            for (u32 i = lane; i < own.events; i += 32) {
                u32 row = ranks[own.slot + i];
                atomicOr(&shared.rows[row >> 5], 1u << (row & 31));
            }
        }
    }
    if (verdict) fail(status, verdict, number);
    if (__syncthreads_or(verdict != OK)) return;
    if (!apply_events<W>(shared, segment, chunk_first, words, ranks, values, in_place)) {
        fail(status, BEYOND_CLASS, number);
    }
}

// Three blocks a multiprocessor where shared memory holds three; elsewhere registers are not what limits.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define SPARSE_BLOCKS 3
#else
#define SPARSE_BLOCKS 2
#endif

#define SPARSE(NAME, W, BLOCKS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS)                                              \
    NAME(const Segment* segments, u32 count, const u32* arena, u32 first_unit, u32 capacity, const u32* only,        \
         Status* status, u32* bitmap) {                                                                              \
        decode_sparse<W>(segments, count, arena, first_unit, capacity, only, status, bitmap, (u32*)dynamic_shared);  \
    }
SPARSE(tpde_sparse_8, u8, 2)
SPARSE(tpde_sparse_16, u16, SPARSE_BLOCKS)
SPARSE(tpde_sparse_32, u32, SPARSE_BLOCKS)
