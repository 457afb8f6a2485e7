// Mode S (and Z and raw of the same segments): one block a chunk.
//
// 1. The first warp reads the payload's counts and decodes every symbol, 32 lanes in lockstep, into shared
//    memory; all warps bring in its tables.
// 2. One warp a class turns symbols and raw bits into ascending ranks and values.
// 3. The block goes through the base in windows of 64 bytes a thread. Every thread counts the classes of its bytes in
//    4-bit counters of two registers, warps form prefix sums, and every event of the window looks its word up:
//    subtile of 256 words, group of 64 bytes, word. Only changed words are written, out of place
//    after the window's copy.
//
// A chunk with more symbols than `capacity`, rows or modes that this kernel does not hold is left untouched and
// noted in the bitmap.

#define CLASSES_MAX 16u
#define RUNS_MAX (1 + 2 * CLASSES_MAX)
#define ROWS_MAX 8192u
#define SPARSE_THREADS 128u
#define SPARSE_WARPS (SPARSE_THREADS / 32)
#define WINDOW_WORDS (16 * SPARSE_THREADS)          // 32-bit words of a window
#define TABLES_MAX (SPARSE_THREADS / 4)             // whose buckets lie in `before`
#define CLASS_LANES (SPARSE_THREADS / CLASSES_MAX)  // that look for a class's events

enum Kind { GAPS, DENSE, CLUSTERED, ROWS };

struct Class {
    u32 low, high, kind, k;
    u32 gap_table, value_table;    // lists of the arena, 0 for none
    u32 gap_entries, value_entries;  // how long they are
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
    u32 seed_bytes, raw_bytes, raw_staged;
    u16 ring[128];
    // Of each class in the window: words before it, its events, and where the first of them lies.
    u32 window_rank[CLASSES_MAX], window_events[CLASSES_MAX], window_event[CLASSES_MAX];
    u32 rows[ROWS_MAX / 32];
    uint4 window[4 * SPARSE_THREADS];    // and before that the payload's header, tables, raw bits
    uint4 before[SPARSE_THREADS];        // classes in front of each group in its subtile; and before that buckets
    uint4 totals[SPARSE_THREADS / 4][2];  // classes in front of each subtile in the window, 16 bits each
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

// Which entries the symbols of a run come from, and for every 64 slots the entry that holds the first of them.
struct Table { const u32* entries; const u8* buckets; u32 count; };

static __device__ u32 entry_of(const Table& table, u32 slot) {
    u32 bucket = slot / 64, low = table.buckets[bucket];
    u32 high = bucket < 63 ? table.buckets[bucket + 1] : table.count - 1;
    while (low < high) {
        u32 middle = (low + high + 1) / 2;
        if (table.entries[middle] >> 20 <= slot) low = middle; else high = middle - 1;
    }
    return table.entries[low];
}

// What a run's symbols say of a class: events, and raw bits that follow.
struct Tally { u32 events, bits; };

template <typename W>
static __device__ void count_symbol(Tally& tally, u32 kind, bool of_values, u32 is_step, u32 symbol) {
    u32 least, width;
    if (!of_values && kind != CLUSTERED) {
        tally.events += symbol != 63;
    } else if (!of_values) {
        magnitude(symbol, 32, least, width);
        tally.events++;
        tally.bits += width + is_step;
    } else if (!is_step) {
        tally.bits += sizeof(W) * 8 - 8;
    } else if (kind != DENSE || symbol != 0) {
        magnitude(symbol, sizeof(W) * 8, least, width);
        tally.events++;
        tally.bits += width + (kind == DENSE);
    }
}

// Decodes the symbols of one run with its table: gaps and dense classes into `ranks`, others into `values`. By one
// warp.
template <typename W>
static __device__ void decode_run(Lanes& lanes, Words& words, const Table& table, Class& own, bool of_values,
                                  u32 is_step, u32* ranks, W* values, u32 lane, u32 below) {
    u32 kind = own.kind, symbols = of_values && kind != DENSE ? own.events : own.symbols;
    u32 end = lanes.next + symbols;
    bool in_ranks = !of_values || kind == DENSE;
    Tally tally = { 0, 0 };
    for (u32 step = lanes.next & ~(lanes.count - 1); step < end; step += lanes.count) {
        u32 n = step + lane;
        bool active = lane < lanes.count && n >= lanes.next && n < end;
        u32 slot = lanes.state & 4095, entry = entry_of(table, slot);
        u32 x = ((entry >> 8 & 4095) + 1) * (lanes.state >> 12) + slot - (entry >> 20);
        bool needs = active && x < 65536;
        if (active) {
            u32 symbol = entry & 255;
            lanes.state = x;
            if (in_ranks) ranks[n - lanes.next] = symbol; else values[n - lanes.next] = (W)symbol;
            count_symbol<W>(tally, kind, of_values, is_step, symbol);
        }
        lanes.state = words.pull(needs, lanes.state, lane, below);
    }
    lanes.next = end;
    u32 events = sum(tally.events), bits = sum(tally.bits);
    if (!of_values && kind != CLUSTERED) bits = events * (own.k + (kind == ROWS ? 0 : is_step));
    if (lane == 0) {
        if (!of_values || kind == DENSE) own.events = events;
        if (of_values) own.raw_bits = bits; else own.fixed_bits = bits;
    }
    __syncwarp();
}

// The class of a run: rows, gaps of each class, values of each class.
static __device__ Class& class_of_run(Shared& shared, u32 run) {
    return shared.classes[run == 0 ? CLASSES_MAX : (run - 1) % shared.live];
}

// How long a run's table is; 0 if it has no symbols of its own.
static __device__ u32 entries_of_run(const Shared& shared, const Class& own, u32 run) {
    if (own.symbols == 0) return 0;
    return run > shared.live ? own.value_entries : own.kind == DENSE ? 0 : own.gap_entries;
}

// Brings in a table and finds its buckets' entries. By one warp.
static __device__ void load_table(u32* entries, u8* buckets, const u32* list, u32 count, u32 lane) {
    for (u32 e = lane; e < count; e += 32) entries[e] = __ldg(list + 1 + e);
    __syncwarp();
    u32 low[2] = { 0, 0 }, high[2] = { count - 1, count - 1 };
    for (u32 reach = count; reach > 1; reach = (reach + 1) / 2) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 middle = (low[i] + high[i] + 1) / 2;
            bool below = low[i] < high[i] && entries[middle] >> 20 <= 64 * (lane + 32 * i);
            if (below) low[i] = middle; else if (low[i] < high[i]) high[i] = middle - 1;
        }
    }
    buckets[lane] = (u8)low[0];
    buckets[lane + 32] = (u8)low[1];
}

static __device__ void set_classes(Shared& shared, const Segment& segment, const u32* arena, u32 thread) {
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
    for (u32 i = thread; i < ROWS_MAX / 32; i += SPARSE_THREADS) shared.rows[i] = 0;
    __syncthreads();
    for (u32 key = thread; key < 256; key += SPARSE_THREADS) {
        uint2 counter = make_uint2(0, 0);
        for (u32 q = 0; q < live; q++) {
            if (key >= shared.classes[q].low && key <= shared.classes[q].high) counter = counter_of(q);
        }
        shared.counters[key] = counter;
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

// The i-th word of the raw bits: from shared memory where they fit, else from what the lanes ended in and the payload.
static __device__ u32 raw_word(const Shared& shared, u32 i) {
    if (shared.raw_staged) return ((const u32*)shared.window)[i];
    if (4 * i + 4 <= shared.seed_bytes) return shared.first_words[i];
    if (4 * i >= shared.seed_bytes) return load32(shared.raw_rest + 4 * i - shared.seed_bytes, shared.raw_end);
    return (shared.first_words[i] & 0xffff) | load32(shared.raw_rest, shared.raw_end) << 16;
}

// Decodes all symbols. Ends with a barrier; false if the chunk is bad or left, the same for all threads.
template <typename W>
static __device__ bool decode_symbols(Shared& shared, const Segment& segment, Payload payload, const u32* arena,
                                      u32* ranks, u32 capacity, u32 words) {
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, below = (1u << lane) - 1;
    bool is_step = segment.flags & IS_STEP;
    u32* staged = (u32*)shared.window;
    for (u32 i = thread; i < STAGED_WORDS; i += SPARSE_THREADS) {
        staged[i] = load32(payload.start + 1 + 4 * i, payload.end);
    }
    set_classes(shared, segment, arena, thread);
    __syncthreads();
    Lanes lanes = { 65536, 1, 0 };
    Words stream;
    if (warp == 0) {
        Header header = { staged, payload.start + 1, payload.end, 0 };
        bool good = read_counts(shared, header, lanes.count, words, lane);
        if (good && shared.capacity_needed <= capacity) {
            Header states = header;
            states.bit = (states.bit + 7) & ~7u;
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

    // As many runs at a time as their tables fit into the window; one warp brings a table in.
    u32 live = shared.live, runs = 1 + 2 * live;
    u32* entries = (u32*)shared.window;
    u8* buckets = (u8*)shared.before;
    for (u32 run = 0; run < runs;) {
        u32 next = run, used = 0, tables = 0;
        for (; next < runs; next++) {
            const Class& own = class_of_run(shared, next);
            u32 count = entries_of_run(shared, own, next);
            if (used + count > WINDOW_WORDS || tables == TABLES_MAX) break;
            if (count && tables % SPARSE_WARPS == warp) {
                const u32* list = arena + (next > live ? own.value_table : own.gap_table);
                load_table(entries + used, buckets + 64 * tables, list, count, lane);
            }
            tables += count != 0;
            used += count;
        }
        __syncthreads();
        if (warp == 0) {
            used = tables = 0;
            for (; run < next; run++) {
                Class& own = class_of_run(shared, run);
                u32 count = entries_of_run(shared, own, run);
                if (!count) continue;
                Table table = { entries + used, buckets + 64 * tables, count };
                decode_run<W>(lanes, stream, table, own, run > live, is_step, ranks + own.slot, values + own.slot,
                              lane, below);
                tables++;
                used += count;
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
            shared.raw_bytes = used;
            shared.raw_staged = 0;
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
    if (shared.verdict != OK) return false;
    u32 raw_words = (shared.raw_bytes + 3) / 4;
    if (raw_words <= WINDOW_WORDS) {
        for (u32 i = thread; i < raw_words; i += SPARSE_THREADS) ((u32*)shared.window)[i] = raw_word(shared, i);
        __syncthreads();
        if (thread == 0) shared.raw_staged = 1;
        __syncthreads();
    }
    return true;
}

// ---- 2: events ---------------------------------------------------------------------------------

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
                u32 low = raw_bits(shared, bit, each);
                gap = quotient > 0x1ffffffu >> own.k ? 0x1ffffff : quotient << own.k | low_bits(low, own.k);
                if (is_step) sign = low >> own.k & 1;
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
    static const u32 subtiles = SPARSE_THREADS / lanes;
    static const u32 words = SPARSE_THREADS * group;
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

// Counts a word's class. Words of 16 and 32 bits have their key at bit 3 or above (or none), which makes it an offset.
template <typename W>
static __device__ void count_word(const Shared& shared, u32 part, u32 shift, u32 mask, bool counts, u32& low,
                                  u32& high) {
    const u8* counters = (const u8*)shared.counters;
    u32 offset = sizeof(W) == 1 ? (part >> shift & mask) * 8 : part >> shift & mask;
    uint2 counter = *(const uint2*)(counters + offset);
    low += counts ? counter.x : 0;
    high += counts ? counter.y : 0;
}

// Counts the classes of a thread's group: four registers of bytes, class q at byte q.
template <typename W, bool MASKED>
static __device__ uint4 count_group(const Shared& shared, u32 group, u32 shift, u32 key_mask, u64 mask) {
    const u32 per_part = 4 / sizeof(W);
    // A counter of 4 bits holds eight words, not sixteen.
    const u32 parts_at_once = sizeof(W) == 1 ? 2 : 4;
    if (sizeof(W) > 1) { shift = shift < 3 ? 0 : shift - 3; key_mask *= 8; }
    uint4 bytes = make_uint4(0, 0, 0, 0);
#pragma unroll (sizeof(W) == 1 ? 1 : 4)
    for (u32 piece = 0; piece < 4; piece++) {
        uint4 four = shared.window[place(group, piece)];
        u32 parts[4] = { four.x, four.y, four.z, four.w };
#pragma unroll
        for (u32 first = 0; first < 4; first += parts_at_once) {
            u32 low = 0, high = 0;
#pragma unroll
            for (u32 j = 0; j < parts_at_once * per_part; j++) {
                u32 i = (piece * 4 + first) * per_part + j;
                count_word<W>(shared, parts[first + j / per_part], shift + 8 * sizeof(W) * (j % per_part), key_mask,
                              !MASKED || (mask >> i & 1), low, high);
            }
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
    const u16* totals = (const u16*)shared.totals + total_of(q);
    u32 low = 0, high = Win::subtiles;
#pragma unroll
    for (u32 i = 1; i < Win::subtiles; i *= 2) {
        u32 middle = (low + high) / 2;
        if (totals[16 * middle] <= rank) low = middle; else high = middle;
    }
    rank -= totals[16 * low];
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

// How many of a class's events from `cursor` on have a rank below `limit`; its lanes are neighbours.
static __device__ u32 events_below(const u32* ranks, u32 cursor, u32 events, u32 limit, u32 part, u32 lane) {
    const u32 shift = lane & ~(CLASS_LANES - 1), field = (1u << CLASS_LANES) - 1;
    u32 count = 0;
#pragma unroll
    for (u32 stride = CLASS_LANES * CLASS_LANES; stride; stride /= CLASS_LANES) {
        u32 ones;
        do {
            u32 at = cursor + count + stride * (part + 1) - 1;
            bool below = at < events && ranks[at] < limit;
            ones = __popc(__ballot_sync(ALL, below) >> shift & field);
            count += stride * ones;
        } while (__any_sync(ALL, ones == CLASS_LANES));
    }
    return count;
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
    // Eight lanes to a class.
    u32 own_class = thread / CLASS_LANES, part = thread % CLASS_LANES, reached = 0, cursor = 0;
    u32 own_events = own_class < live ? shared.classes[own_class].events : 0;
    u32 own_slot = own_class < live ? shared.classes[own_class].slot : 0;
    uint4 pieces[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) pieces[i] = load_piece<W>(base, (thread + SPARSE_THREADS * i) * each, words, aligned);
    for (u32 first = 0; first < words; first += Win::words) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 piece = thread + SPARSE_THREADS * i;
            shared.window[place(piece >> 2, piece & 3)] = pieces[i];
            if (!in_place) store_piece<W>(out, first + piece * each, words, aligned, pieces[i]);
        }
        __syncthreads();
        u32 next = first + Win::words;
        if (next < words) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) pieces[i] = load_piece<W>(base, next + (thread + SPARSE_THREADS * i) * each, words, aligned);
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
            const u32 halves = 0x00ff00ff;
            uint4 *to = shared.totals[thread / Win::lanes];
            to[0] = make_uint4((sums.x & halves) + (own.x & halves), (sums.x >> 8 & halves) + (own.x >> 8 & halves),
                               (sums.y & halves) + (own.y & halves), (sums.y >> 8 & halves) + (own.y >> 8 & halves));
            to[1] = make_uint4((sums.z & halves) + (own.z & halves), (sums.z >> 8 & halves) + (own.z >> 8 & halves),
                               (sums.w & halves) + (own.w & halves), (sums.w >> 8 & halves) + (own.w >> 8 & halves));
        }
        __syncthreads();
        // Subtiles' prefixes of every class, and how many of its events fall into this window.
        const u32 each_part = Win::subtiles / CLASS_LANES;
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
        u32 begun = reached;
        reached += __shfl_sync(ALL, through, lane | (CLASS_LANES - 1));
        u32 found = events_below(ranks + own_slot, cursor, own_events, reached, part, lane);
        if (part == 0) {
            shared.window_rank[own_class] = begun;
            shared.window_events[own_class] = found;
            shared.window_event[own_class] = own_slot + cursor;
        }
        cursor += found;
        __syncthreads();
        u32 count = lane < CLASSES_MAX ? shared.window_events[lane] : 0, ends = scan(count, lane);
        u32 start = ends - count, events = __shfl_sync(ALL, ends, 31);
        for (u32 from = 32 * warp; from < events; from += SPARSE_THREADS) {
            u32 event = from + lane, q = 0;
#pragma unroll
            for (u32 width = CLASSES_MAX / 2; width; width /= 2) {
                u32 other = __shfl_sync(ALL, start, q + width);
                if (other <= event) q += width;
            }
            u32 at = event - __shfl_sync(ALL, start, q);
            if (event < events) {
                at += shared.window_event[q];
                apply_event<W>(shared, segment, q, ranks[at] - shared.window_rank[q], values[at], first, chunk_first,
                               words, offset, rows);
            }
        }
        __syncthreads();
    }
    return cursor == own_events;
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
            copy_chunk<W>(segment, payload, chunk_first, words, thread, SPARSE_THREADS, status, number);
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
    for (u32 q = warp; q < shared.live + 1; q += SPARSE_WARPS) {
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

// As many blocks a multiprocessor as its shared memory holds.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define SPARSE_BLOCKS (640 / SPARSE_THREADS)
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define SPARSE_BLOCKS (384 / SPARSE_THREADS)
#else
#define SPARSE_BLOCKS (512 / SPARSE_THREADS)
#endif

#define SPARSE(NAME, W, BLOCKS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(SPARSE_THREADS, BLOCKS)                                             \
    NAME(const Segment* segments, u32 count, const u32* arena, u32 first_unit, u32 capacity, const u32* only,        \
         Status* status, u32* bitmap) {                                                                              \
        decode_sparse<W>(segments, count, arena, first_unit, capacity, only, status, bitmap, (u32*)dynamic_shared);  \
    }
SPARSE(tpde_sparse_8, u8, SPARSE_BLOCKS)
SPARSE(tpde_sparse_16, u16, SPARSE_BLOCKS)
SPARSE(tpde_sparse_32, u32, SPARSE_BLOCKS)
