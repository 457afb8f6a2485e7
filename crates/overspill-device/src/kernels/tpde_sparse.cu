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
// A chunk with more symbols than fit into `capacity_bytes`, rows or modes that this kernel does not hold is left untouched and
// noted in the bitmap.

#define NEGATIVE_ONE 0x80000000u

struct Shared : Counting {
    u32 symbols, near_table;
    u64 bytes_needed;  // of `ranks`, `values` and `rows`
    u32 *rows, row_words;  // a bit for each row: whether it changed; and how many words that takes
    u32 first_words[16];  // of the raw bits: what the lanes end in
    const u8 *raw_rest, *raw_end;
    u32 seed_bytes, raw_bytes, raw_staged;
    alignas(2 * RING_WORDS) u16 ring[RING_WORDS];
};

// ---- 1: symbols --------------------------------------------------------------------------------

struct Lanes {
    u32 state, count, next;  // lanes K; the next symbol's number
};

// Which entries the symbols of a run come from, and for every 64 slots the entry that holds the first of them.
struct Table { const u32* entries; const u8* buckets; u32 count; };

// A table of gaps, which all segments share: a byte for every slot, its symbol, which is also its entry.
struct GapTable { const u32* entries; const u8* slots; };

static __device__ u32 table_number(const Class& own) { return (own.gap_table - 1) / (GAP_SYMBOLS + 1); }

// Most classes' rates are a multiple of four apart, so the first one's table, which is near, is often theirs too.
static __device__ GapTable gap_table_of(const Shared& shared, const u32* arena, const Class& own) {
    u32 number = table_number(own);
    GapTable table = { arena + own.gap_table + 1, (const u8*)(arena + GAP_SLOTS) + 4096 * number };
    if (number == shared.near_table) {
        table.entries = (const u32*)shared.totals;
        table.slots = (const u8*)shared.units;
    }
    return table;
}

// Brings the first class's table near.
static __device__ void bring_gap_table(Shared& shared, const u32* arena, u32 thread) {
    u32 number = ~0u, list = 0;
    for (u32 q = 0; q < shared.live && number == ~0u; q++) {
        const Class& own = shared.classes[q];
        if (own.kind == GAPS) { number = table_number(own); list = own.gap_table; }
    }
    if (thread == 0) shared.near_table = number;
    if (number == ~0u) return;
    const u32* slots = arena + GAP_SLOTS + 1024 * number;
#pragma unroll
    for (u32 i = 0; i < 1024; i += SPARSE_THREADS) ((u32*)shared.units)[i + thread] = __ldg(slots + i + thread);
    if (thread < GAP_SYMBOLS) ((u32*)shared.totals)[thread] = __ldg(arena + list + 1 + thread);
}

static __device__ u32 entry_of(const GapTable& table, u32 slot) {
    return table.entries[table.slots[slot]];
}

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
    if (!of_values) {
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

// One step of up to 32 symbols; the lane's entry. `n` is its symbol's number.
template <typename T>
static __device__ u32 step_run(Lanes& lanes, Stream& stream, const T& table, bool active, u32 lane, u32 below) {
    stream.keep(lane);
    u32 slot = lanes.state & 4095, entry = entry_of(table, slot), high = lanes.state >> 12;
    u32 x = (entry >> 8 & 4095) * high + high + slot - (entry >> 20);
    x = active ? x : lanes.state;
    lanes.state = stream.pull(active && x < 65536, x, below);
    return entry & 255;
}

// Decodes quotients of gaps into `ranks`. By one warp.
static __device__ void decode_quotients(Lanes& lanes, Stream& stream, const GapTable& table, Class& own, u32 is_step,
                                        u32* ranks, u32 lane, u32 below) {
    u32 end = lanes.next + own.symbols, escapes = 0;
    u32* to = ranks + lane - lanes.next;
    for (u32 step = lanes.next & ~(lanes.count - 1); step < end; step += lanes.count) {
        u32 n = step + lane;
        bool active = lane < lanes.count && n >= lanes.next && n < end;
        u32 symbol = step_run(lanes, stream, table, active, lane, below);
        if (active) to[step] = symbol;
        escapes += __popc(__ballot_sync(ALL, active && symbol == 63));
    }
    lanes.next = end;
    if (lane == 0) {
        own.events = own.symbols - escapes;
        own.fixed_bits = own.events * (own.k + (own.kind == ROWS ? 0 : is_step));
    }
    __syncwarp();
}

// Decodes the other symbols of a run: clustered gaps and dense classes into `ranks`, values into `values`. By one warp.
template <typename W>
static __device__ void decode_run(Lanes& lanes, Stream& stream, const Table& table, Class& own, bool of_values,
                                  u32 is_step, u32* ranks, W* values, u32 lane, u32 below) {
    u32 kind = own.kind, symbols = of_values && kind != DENSE ? own.events : own.symbols;
    u32 end = lanes.next + symbols;
    bool in_ranks = !of_values || kind == DENSE;
    Tally tally = { 0, 0 };
    for (u32 step = lanes.next & ~(lanes.count - 1); step < end; step += lanes.count) {
        u32 n = step + lane;
        bool active = lane < lanes.count && n >= lanes.next && n < end;
        u32 symbol = step_run(lanes, stream, table, active, lane, below);
        if (active) {
            if (in_ranks) ranks[n - lanes.next] = symbol; else values[n - lanes.next] = (W)symbol;
            count_symbol<W>(tally, kind, of_values, is_step, symbol);
        }
    }
    lanes.next = end;
    u32 events = sum(tally.events), bits = sum(tally.bits);
    if (lane == 0) {
        if (!of_values || kind == DENSE) own.events = events;
        if (of_values) own.raw_bits = bits; else own.fixed_bits = bits;
    }
    __syncwarp();
}

// How long the table is that a run (from 1 on: gaps of each class, then values of each class) needs brought in; 0 if it
// has no symbols of its own or a table that is there.
static __device__ u32 entries_of_run(const Shared& shared, u32 run) {
    u32 live = shared.live;
    if (run > 2 * live) return 0;
    const Class& own = shared.classes[(run > live ? run - live : run) - 1];
    if (own.symbols == 0) return 0;
    return run > live ? own.value_entries : own.kind == CLUSTERED ? own.gap_entries : 0;
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

// The counts of a payload's header, by one warp whose lanes all do the same. False if it is malformed.
template <typename W>
static __device__ bool read_counts(Shared& shared, Header& header, u32& lanes, u32 words, u32* ranks, u32 lane) {
    u32 log2 = header.take(3), order = header.take(4);
    lanes = 1u << log2;
    bool bad = false;
    u64 total = 0, values = 0;
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
            Class& own = shared.classes[q];
            own.symbols = (u32)count;
            own.slot = (u32)(total - (u64)count);
            own.value_slot = (u32)values;
        }
        if (shared.classes[q].valued) values += (u64)count;
    }
    if (lane == 0) {
        rows.symbols = (u32)row_symbols;
        rows.slot = 0;
        shared.symbols = (u32)total;
        u64 value_words = (sizeof(W) * values + 3) / 4;
        shared.bytes_needed = 4 * (total + value_words + shared.row_words);
        shared.rows = ranks + (u32)(total + value_words);
        if (log2 > 5) shared.verdict = LANES;
        else if (bad || header.late()) shared.verdict = NEGATIVE;
        else if (total > 2ull * words) shared.verdict = TOO_MANY_SYMBOLS;
    }
    __syncwarp();
    bool good = shared.verdict == OK;
    __syncwarp();
    return good;
}

// The i-th word of the raw bits, from what the lanes ended in and the payload.
static __device__ u32 raw_word(const Shared& shared, u32 i) {
    if (4 * i + 4 <= shared.seed_bytes) return shared.first_words[i];
    if (4 * i >= shared.seed_bytes) return load32(shared.raw_rest + 4 * i - shared.seed_bytes, shared.raw_end);
    return (shared.first_words[i] & 0xffff) | load32(shared.raw_rest, shared.raw_end) << 16;
}

// Decodes all symbols. Ends with a barrier; false if the chunk is bad or left, the same for all threads.
template <typename W>
static __device__ bool decode_symbols(Shared& shared, const Segment& segment, Payload payload, const u32* arena,
                                      u32* ranks, u32 capacity_bytes, u32 words) {
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, below = (1u << lane) - 1;
    bool is_step = segment.flags & IS_STEP;
    u32* staged = (u32*)shared.window;
    for (u32 i = thread; i < STAGED_WORDS; i += SPARSE_THREADS) {
        staged[i] = load32(payload.start + 1 + 4 * i, payload.end);
    }
    set_classes(shared, segment, arena, thread);
    bring_gap_table(shared, arena, thread);
    __syncthreads();
    Lanes lanes = { 65536, 1, 0 };
    Stream stream;
    const u8* stream_start = payload.end;
    if (warp == 0) {
        Header header = { staged, payload.start + 1, payload.end, 0 };
        bool good = read_counts<W>(shared, header, lanes.count, words, ranks, lane);
        if (good && shared.bytes_needed <= capacity_bytes) {
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
            stream_start = late ? payload.end : from;
            stream.open(shared.ring, stream_start, payload.end, lane);
        }
    }
    __syncthreads();
    W* values = (W*)(ranks + shared.symbols);
    if (shared.verdict != OK || shared.bytes_needed > capacity_bytes) return false;
    for (u32 i = thread; i < shared.row_words; i += SPARSE_THREADS) shared.rows[i] = 0;

    // As many runs at a time as their tables fit into the window; one warp brings a table in. Lane r knows run r + 1.
    u32 live = shared.live, own_entries = entries_of_run(shared, lane + 1);
    u32* entries = (u32*)shared.window;
    u8* buckets = (u8*)shared.before;
    for (u32 run = 0; run < 2 * live || run == 0;) {
        u32 count = lane >= run ? own_entries : 0, sums = scan(count, lane), loaded = __ballot_sync(ALL, count != 0);
        u32 next = __ffs(~__ballot_sync(ALL, sums <= WINDOW_WORDS)) - 1;
        next = min(next, 2 * live);
        for (u32 rest = low_bits(loaded, next), table = 0; rest; rest &= rest - 1, table++) {
            u32 at = __ffs(rest) - 1, length = __shfl_sync(ALL, count, at), used = __shfl_sync(ALL, sums, at) - length;
            if (table % SPARSE_WARPS != warp) continue;
            const Class& own = shared.classes[at >= live ? at - live : at];
            load_table(entries + used, buckets + 64 * table, arena + (at >= live ? own.value_table : own.gap_table),
                       length, lane);
        }
        __syncthreads();
        if (warp == 0) {
            if (run == 0 && shared.classes[CLASSES_MAX].gap_table) {
                Class& own = shared.classes[CLASSES_MAX];
                decode_quotients(lanes, stream, gap_table_of(shared, arena, own), own, is_step, ranks, lane, below);
            }
            for (; run < next; run++) {
                bool of_values = run >= live;
                Class& own = shared.classes[of_values ? run - live : run];
                u32 length = __shfl_sync(ALL, count, run), used = __shfl_sync(ALL, sums, run) - length;
                if (length) {
                    Table table = { entries + used, buckets + 64 * __popc(loaded & ((1u << run) - 1)), length };
                    decode_run<W>(lanes, stream, table, own, of_values, is_step, ranks + own.slot,
                                  values + own.value_slot, lane, below);
                } else if (!of_values && own.kind == GAPS) {
                    decode_quotients(lanes, stream, gap_table_of(shared, arena, own), own, is_step, ranks + own.slot, lane,
                                     below);
                }
            }
        }
        run = next;
        __syncthreads();
        if (live == 0) break;
    }
    if (warp == 0) {
        bool seeded = lane >= lanes.count || lanes.state >> 16 == 1;
        if (!__all_sync(ALL, seeded) && lane == 0) shared.verdict = NOT_SEED;
        if (lane < lanes.count) ((u16*)shared.first_words)[lane] = (u16)lanes.state;
        __syncwarp();
        if (lane == 0) {
            const u8* rest = stream_start + stream.taken;
            if (rest > payload.end) shared.verdict = ENDS_EARLY;
            shared.seed_bytes = 2 * lanes.count;
            shared.raw_rest = rest;
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
    u32 i = bit >> 5, low, high;
    if (shared.raw_staged) {
        // The word behind the last bit may be any.
        low = ((const u32*)shared.window)[i];
        high = ((const u32*)shared.window)[i + 1];
    } else {
        low = width ? raw_word(shared, i) : 0;
        high = (bit & 31) + width > 32 ? raw_word(shared, i + 1) : 0;
    }
    return low_bits(__funnelshift_r(low, high, bit & 31), width);
}

// Ranks of rows, or of a class of gaps without values, in place and in order, by one warp. `limit` bounds the ranks. Steps
// are 1 or -1, the top bit of their rank.
static __device__ u32 make_ones(const Shared& shared, const Class& own, u32* ranks, u32 is_step, u32 limit, u32 lane,
                                u32 below) {
    u32 events = 0, next = 0, escapes = 0, verdict = OK, symbols = own.symbols, k = own.k, fixed = own.fixed;
    u32 each = k + is_step;
    for (u32 at = 0; at < symbols; at += 32) {
        u32 symbol = at + lane < symbols ? ranks[at + lane] : 63, quotient = symbol;
        bool event = symbol != 63;
        u32 who = __ballot_sync(ALL, event), index = events + __popc(who & below);
        if (who != ALL || escapes) {
            u32 previous = who & below, taken = min(32, symbols - at);
            quotient += 63 * (previous ? lane - (32 - __clz(previous)) : lane + escapes);
            escapes = who ? taken - (32 - __clz(who)) : escapes + taken;
        }
        u32 low = event ? raw_bits(shared, fixed + index * each, each) : 0;
        u32 gap = quotient > 0x1ffffffu >> k ? 0x1ffffff : quotient << k | low_bits(low, k);
        u32 sums = scan(event ? gap + 1 : 0, lane), rank = next + sums - 1;
        if (event && rank >= limit) verdict = POSITION;
        next = min(next + __shfl_sync(ALL, sums, 31), limit + 1);
        __syncwarp();
        if (event) ranks[index] = rank | (is_step && low >> k ? NEGATIVE_ONE : 0);
        __syncwarp();
        events += __popc(who);
    }
    return escapes ? ESCAPE_LAST : verdict;
}

// Ranks and values of one class, in place and in order, by one warp. `limit` bounds the ranks.
template <typename W>
static __device__ u32 make_events(Shared& shared, Class& own, u32* ranks, W* values, u32 flags, u32 limit, u32 lane,
                                  u32 below) {
    const u32 bits = sizeof(W) * 8;
    bool is_step = flags & IS_STEP, is_float = flags & IS_FLOAT;
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
        W value = 0;
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
        __syncwarp();
        if (event) {
            ranks[index] = rank;
            if (own.valued) values[index] = value;
            else if (sign) ranks[index] |= NEGATIVE_ONE;
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

// Which of `count` (at most 32) words from `first` on (counted in the chunk, `offset` its place in its first row) count.
static __device__ u32 row_mask(const Shared& shared, u32 first, u32 count, u32 offset, u32 row_words) {
    u32 mask = 0;
    u32 at = offset + first, row = at / row_words, done = 0;
    u32 row_end = (row + 1) * row_words - at;
    while (done < count) {
        u32 to = min(row_end, count);
        u32 ones = low_bits(~0u, to - done) << done;
        if (shared.rows[row >> 5] >> (row & 31) & 1) mask |= ones;
        done = to;
        row++;
        row_end += row_words;
    }
    return mask;
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

// Place of the `rank`-th one of eight bits, which exists.
static __device__ u32 select(u32 mask, u32 rank) {
    u32 at = 0;
#pragma unroll
    for (u32 width = 4; width; width /= 2) {
        u32 ones = __popc(mask & ((1u << width) - 1));
        if (rank >= ones) { rank -= ones; mask >>= width; at += width; }
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
    // Its unit: the nibble that widening puts at byte q.
    u32 unit = 0, nibble = 4 * ((q & 3) * 2 + (q >> 2 & 1));
    const u32* counts = (const u32*)&shared.units[0][group] + (q >> 3);
    bool inside = false;
#pragma unroll
    for (u32 i = 0; i + 1 < Win::units; i++) {
        u32 count = counts[2 * SPARSE_THREADS * i] >> nibble & 15;
        inside = inside || rank < count;
        rank -= inside ? 0 : count;
        unit += !inside;
    }
    const Class& own = shared.classes[q];
    u32 byte = unit * Win::unit * sizeof(W);
    const u8* words_at = (const u8*)&shared.window[Win::place(group, byte / 16)] + byte % 16;
    u32 parts[4];
    if (sizeof(W) == 1) {
        uint2 two = *(const uint2*)words_at;
        parts[0] = two.x; parts[1] = two.y;
    } else {
        uint4 four = *(const uint4*)words_at;
        parts[0] = four.x; parts[1] = four.y; parts[2] = four.z; parts[3] = four.w;
    }
    u32 mask = find_words<W>(parts, segment.key_shift, segment.key_mask, own.low, min(own.high, segment.key_mask));
    if (rows) {
        u32 unit_first = window_first + group * Win::group + unit * Win::unit;
        mask &= row_mask(shared, unit_first, min(Win::unit, words - unit_first), offset, segment.row_words);
    }
    u32 at = unit * Win::unit + select(mask, rank);
    byte = at * sizeof(W);
    const W* word = (const W*)((const u8*)&shared.window[Win::place(group, byte / 16)] + byte % 16);
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
            bool below = at < events && (ranks[at] & ~NEGATIVE_ONE) < limit;
            ones = __popc(__ballot_sync(ALL, below) >> shift & field);
            count += stride * ones;
        } while (__any_sync(ALL, ones == CLASS_LANES));
    }
    return count;
}

template <typename W>
static __device__ bool apply_events(Shared& shared, const Segment& segment, u32 chunk_first, u32 words, u32* ranks,
                                    const W* values, bool in_place) {
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
    uint4 pieces[Win::pieces];
    load_window<W>(pieces, base, 0, words, aligned);
    for (u32 first = 0; first < words; first += Win::words) {
#pragma unroll
        for (u32 i = 0; i < Win::pieces; i++) {
            u32 piece = thread + SPARSE_THREADS * i;
            shared.window[Win::place(piece / Win::pieces, piece % Win::pieces)] = pieces[i];
        }
        if (!in_place && aligned && first + Win::words <= words) {
            uint4* to = (uint4*)(out + first) + thread;
#pragma unroll
            for (u32 i = 0; i < Win::pieces; i++) __stcs(to + SPARSE_THREADS * i, pieces[i]);
        } else if (!in_place) {
            for (u32 i = 0; i < Win::pieces; i++) {
                store_piece<W>(out, first + (thread + SPARSE_THREADS * i) * each, words, aligned,
                               shared.window[Win::place((thread + SPARSE_THREADS * i) / Win::pieces,
                                                        (thread + SPARSE_THREADS * i) % Win::pieces)]);
            }
        }
        __syncthreads();
        u32 next = first + Win::words;
        if (next < words) load_window<W>(pieces, base, next, words, aligned);
        // Every group's classes, in front of it in its subtile.
        u32 group_first = first + thread * Win::group;
        u32 there = group_first >= words ? 0 : words - group_first < Win::group ? words - group_first : Win::group;
        u32 mask = low_bits(~0u, there);
        if (rows && there) mask &= row_mask(shared, group_first, there, offset, segment.row_words);
        count_window<W>(shared, mask);
        __syncthreads();
        u32 through = sum_subtiles<W>(shared, own_class, part);
        u32 begun = reached;
        reached += through;
        u32 found = events_below(ranks + own_slot, cursor, own_events, reached, part, lane);
        // A warp looks up the events of its own classes, in order of class.
        u32 ends[WARP_CLASSES], events = 0, before_own = 0;
#pragma unroll
        for (u32 c = 0; c < WARP_CLASSES; c++) {
            if (c == lane / CLASS_LANES) before_own = events;
            events += __shfl_sync(ALL, found, c * CLASS_LANES);
            ends[c] = events;
        }
        u32 own_first = cursor - before_own;
        cursor += found;
        __syncwarp();
        for (u32 from = 0; from < events; from += 32) {
            u32 event = from + lane, c = 0;
#pragma unroll
            for (u32 i = 0; i + 1 < WARP_CLASSES; i++) c += event >= ends[i];
            u32 at = event + __shfl_sync(ALL, own_first, c * CLASS_LANES);
            u32 window_rank = __shfl_sync(ALL, begun, c * CLASS_LANES), q = warp * WARP_CLASSES + c;
            if (event < events) {
                const Class& own = shared.classes[q];
                u32 rank = ranks[own.slot + at];
                W value = own.valued ? values[own.value_slot + at] : (W)(rank & NEGATIVE_ONE ? ~0u : 1u);
                apply_event<W>(shared, segment, q, (rank & ~NEGATIVE_ONE) - window_rank, value, first, chunk_first, words,
                               offset, rows);
            }
        }
        __syncthreads();
    }
    return cursor == own_events;
}

template <typename W>
static __device__ void decode_sparse(const Segment* segments, u32 count, const u32* arena, u32 first_unit,
                                     u32 capacity_bytes, const u32* only, Status* status, u32* bitmap, u32* ranks) {
    __shared__ Shared shared;
    u32 thread = threadIdx.x, unit = first_unit + blockIdx.x;
    const u32* found = (const u32*)&segment_of(segments, count, unit);
    if (thread < sizeof(Segment) / 4) ((u32*)&shared.segment)[thread] = found[thread];
    __syncthreads();
    const Segment& segment = shared.segment;
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
    if (thread == 0) shared.row_words = (row_count + 31) / 32;
    bool in_place = segment.flags & HAS_BASE && segment.base == segment.out;
    if (!decode_symbols<W>(shared, segment, payload, arena, ranks, capacity_bytes, words)) {
        if (thread == 0 && shared.verdict == OK) leave(status, bitmap, number);
        if (thread == 0 && shared.verdict != OK) fail(status, shared.verdict, number);
        return;
    }
    W* values = (W*)(ranks + shared.symbols);
    u32 lane = thread & 31, warp = thread >> 5, verdict = OK;
    for (u32 q = warp; q < shared.live + 1; q += SPARSE_WARPS) {
        bool of_rows = q == shared.live;
        Class& own = shared.classes[of_rows ? CLASSES_MAX : q];
        u32 below = (1u << lane) - 1, is_step = !of_rows && segment.flags & IS_STEP ? 1 : 0, found;
        if (of_rows || (own.kind == GAPS && !own.valued)) {
            found = make_ones(shared, own, ranks + own.slot, is_step, of_rows ? row_count : words, lane, below);
        } else {
            found = make_events<W>(shared, own, ranks + own.slot, values + own.value_slot, segment.flags, words, lane,
                                   below);
        }
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
#define SPARSE_BLOCKS (768 / SPARSE_THREADS)
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define SPARSE_BLOCKS (384 / SPARSE_THREADS)
#else
#define SPARSE_BLOCKS (512 / SPARSE_THREADS)
#endif

#define SPARSE(NAME, W, BLOCKS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(SPARSE_THREADS, BLOCKS)                                             \
    NAME(const Segment* segments, u32 count, const u32* arena, u32 first_unit, u32 capacity_bytes, const u32* only,  \
         Status* status, u32* bitmap) {                                                                              \
        decode_sparse<W>(segments, count, arena, first_unit, capacity_bytes, only, status, bitmap,                   \
                         (u32*)dynamic_shared);                                                                      \
    }
SPARSE(tpde_sparse_8, u8, SPARSE_BLOCKS)
SPARSE(tpde_sparse_16, u16, SPARSE_BLOCKS)
SPARSE(tpde_sparse_32, u32, SPARSE_BLOCKS)
