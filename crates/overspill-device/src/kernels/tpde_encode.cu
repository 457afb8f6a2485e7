// Encoders of mode S: what changed between a base and final words that both lie on the device. docs/tpde-format.md is
// the specification; the reference decodes what comes out, and packs the same bytes where no class is clustered.
//
// `tpde_count` takes the first look at a segment, a block 2^15 words; `tpde_list` gathers what it counted. The host makes
// the heads of it. `tpde_encode` then packs a chunk a block:
//
// 1. It goes through base and final words in windows, finds every changed word's class and its rank there, and sorts the
//    changes by class.
// 2. One warp a class makes symbols and raw bits of them.
// 3. The first warp codes the symbols, last one first.
// 4. All write the payload where there is room in the scratch memory, and `tpde_gather` puts payloads in order.
//
// A chunk that does not fit is noted in the bitmap; the host packs its segment.

#define COUNT_THREADS 256u
#define GRAIN_LOG2 15u
#define NEAR_SYMBOLS 16u                  // counted in shared memory; the others are rare
#define CELLS (65536u + 256u + 4u)        // counts by key and symbol, words by key; raw bits (two), rows
#define LIST_HEAD (4u + 256u)
#define FRONT_WORDS 96u

struct Split { u32 symbol, width; };

// A magnitude's symbol and how many raw bits follow.
static __device__ Split split(u32 magnitude) {
    u32 octave = 31 - __clz(magnitude | 32), width = octave - 3;
    Split made = { magnitude, 0 };
    if (magnitude >= 32) {
        made.symbol = 32 + (octave - 5) * 8 + (magnitude >> width & 7);
        made.width = width;
    }
    return made;
}

template <typename W> static __device__ u32 size_of(W step) {
    return step >> (sizeof(W) * 8 - 1) ? (u32)(W)(0u - (u32)step) : (u32)step;
}

template <typename W>
static __device__ void count_changes(const Segment* segments, u32 count, u32* grains, u32* cells) {
    __shared__ u32 values[256][NEAR_SYMBOLS], population[256], rows[32], changed, raw;
    u32 thread = threadIdx.x, unit = blockIdx.x;
    const Segment& segment = segment_of(segments, count, unit);
    cells += (u64)CELLS * (&segment - segments);
    for (u32 i = thread; i < 256 * NEAR_SYMBOLS; i += COUNT_THREADS) values[i / NEAR_SYMBOLS][i % NEAR_SYMBOLS] = 0;
    population[thread] = 0;
    if (thread < 32) rows[thread] = 0;
    if (thread == 0) changed = raw = 0;
    __syncthreads();
    u32 first = (unit - segment.first) << GRAIN_LOG2, words = min(1u << GRAIN_LOG2, segment.words - first);
    const W *base = (const W*)segment.base + first, *made = (const W*)segment.out + first;
    bool aligned = ((segment.base | segment.out) & 15) == 0, is_float = segment.flags & IS_FLOAT;
    u32 shift = segment.key_shift, mask = segment.key_mask, one_in = segment.unused, row_words = segment.row_words;
    u32 row_offset = row_words ? (segment.row_offset + first) % row_words : 0, own_changed = 0, own_raw = 0;
    for (u32 at = thread * 8; at < words; at += COUNT_THREADS * 8) {
        Eight<W> olds = load_eight<W>(base, at, words, aligned), news = load_eight<W>(made, at, words, aligned);
        u32 differ = 0;
#pragma unroll
        for (u32 i = 0; i < 8; i++) differ |= (olds.word(i) != news.word(i) ? 1u : 0u) << i;
        for (; differ; differ &= differ - 1) {
            // Read again, as registers have no numbers.
            u32 place = at + __ffs(differ) - 1;
            W old = base[place], fresh = made[place];
            u32 key = (u32)old >> shift & mask;
            Split value = split(size_of<W>((W)(flip<W>(fresh, is_float) - flip<W>(old, is_float))));
            if (value.symbol < NEAR_SYMBOLS) atomicAdd(&values[key][value.symbol], 1u);
            else atomicAdd(&cells[256 * key + value.symbol], 1u);
            own_changed++;
            own_raw += value.width;
            if (row_words) {
                u32 row = (row_offset + place) / row_words;
                atomicOr(&rows[row >> 5], 1u << (row & 31));
            }
        }
    }
    // Of every so many blocks of 64 words one.
    for (u32 n = thread; n < (1u << GRAIN_LOG2) / one_in; n += COUNT_THREADS) {
        u32 place = n / 64 * 64 * one_in + n % 64;
        if (place < words) atomicAdd(&population[(u32)base[place] >> shift & mask], 1u);
    }
    if (own_changed) { atomicAdd(&changed, own_changed); atomicAdd(&raw, own_raw); }
    __syncthreads();
    for (u32 i = thread; i < 256 * NEAR_SYMBOLS; i += COUNT_THREADS) {
        u32 found = values[i / NEAR_SYMBOLS][i % NEAR_SYMBOLS];
        if (found) atomicAdd(&cells[256 * (i / NEAR_SYMBOLS) + i % NEAR_SYMBOLS], found);
    }
    if (population[thread]) atomicAdd(&cells[65536 + thread], population[thread]);
    if (thread < 32 && rows[thread]) atomicAdd(&cells[65536 + 256 + 2], (u32)__popc(rows[thread]));
    if (thread == 0) {
        grains[unit] = changed;
        atomicAdd((u64*)&cells[65536 + 256], (u64)raw);
    }
}

// What a segment counted: how many (cell, count) follow, raw bits, rows, words by key.
extern "C" __global__ void __launch_bounds__(COUNT_THREADS)
tpde_list(u32* cells, u32* lists, u32 limit) {
    __shared__ u32 found;
    u32 thread = threadIdx.x;
    cells += (u64)CELLS * blockIdx.x;
    lists += (u64)(LIST_HEAD + 2 * limit) * blockIdx.x;
    if (thread == 0) found = 0;
    __syncthreads();
    // Four cells at a time, and several of these on their way: one block goes through all of them.
#pragma unroll 8
    for (u32 four = thread; four < 65536 / 4; four += COUNT_THREADS) {
        uint4 counts = ((const uint4*)cells)[four];
        if (!(counts.x | counts.y | counts.z | counts.w)) continue;
        for (u32 i = 0; i < 4; i++) {
            u32 count = i == 0 ? counts.x : i == 1 ? counts.y : i == 2 ? counts.z : counts.w;
            u32 slot = count ? atomicAdd(&found, 1u) : limit;
            if (slot < limit) {
                lists[LIST_HEAD + 2 * slot] = 4 * four + i;
                lists[LIST_HEAD + 2 * slot + 1] = count;
            }
        }
    }
    lists[4 + thread] = cells[65536 + thread];
    if (thread < 3) lists[1 + thread] = cells[65536 + 256 + thread];
    __syncthreads();
    if (thread == 0) lists[0] = found;
}

extern "C" __global__ void __launch_bounds__(COUNT_THREADS) tpde_clear(u32* words, u64 count) {
    for (u64 i = blockIdx.x * (u64)COUNT_THREADS + threadIdx.x; i < count; i += gridDim.x * (u64)COUNT_THREADS) words[i] = 0;
}

// ---- chunks ------------------------------------------------------------------------------------

struct Packing : Counting {
    uint4 fresh[4 * SPARSE_THREADS];  // the window's final words
    u8 class_of[256];
    u32 window_rank[CLASSES_MAX], events[CLASSES_MAX], first_event[CLASSES_MAX + 1];
    u32 warp_events[SPARSE_WARPS];
    u32 table[256];  // of a class's values: entry of each symbol, or 0 for none
    u32 front[FRONT_WORDS];  // mode, header and states
    u32 symbols, raw_bytes, front_bits, lanes, words_at, place;
    u64 sum;
};

// Parts of the dynamic shared memory. When symbols are coded the first three have been used, and words take their place
// from `end_bytes` down.
template <typename W> struct Room {
    u32* ranks;     // class << 24 | rank
    W* steps;
    u16* order;     // of the changes, by class
    u8* symbols;
    u32* bits;      // raw bits
    u32 bits_words, end_bytes;
};

// Bits that are 0 so far.
static __device__ void put_bits(u32* to, u32 bit, u32 width, u32 value) {
    if (!width) return;
    u32 shift = bit & 31;
    atomicOr(&to[bit >> 5], value << shift);
    if (shift + width > 32) atomicOr(&to[(bit >> 5) + 1], value >> (32 - shift));
}

// Which of a thread's words changed.
template <typename W>
static __device__ u32 changed_words(const Packing& shared, u32 group) {
    typedef Window<W> Win;
    u32 changed = 0;
#pragma unroll
    for (u32 piece = 0; piece < Win::pieces; piece++) {
        uint4 olds = shared.window[Win::place(group, piece)], news = shared.fresh[Win::place(group, piece)];
        u32 parts[4] = { olds.x ^ news.x, olds.y ^ news.y, olds.z ^ news.z, olds.w ^ news.w };
#pragma unroll
        for (u32 i = 0; i < 16 / sizeof(W); i++) {
            W apart = (W)(parts[i * sizeof(W) / 4] >> (8 * (i * sizeof(W) % 4)));
            changed |= (u32)(apart != 0) << (piece * (16 / sizeof(W)) + i);
        }
    }
    return changed;
}

// Rank of a thread's word within the chunk.
template <typename W>
static __device__ u32 rank_of(const Packing& shared, u32 group, u32 at, u32 q) {
    typedef Window<W> Win;
    u32 rank = shared.window_rank[q] + ((const u16*)shared.totals)[16 * (group / Win::lanes) + total_of(q)];
    rank += ((const u8*)shared.before)[16 * group + q];
    u32 unit = at / Win::unit, nibble = 4 * ((q & 3) * 2 + (q >> 2 & 1));
    const u32* counts = (const u32*)&shared.units[0][group] + (q >> 3);
    for (u32 i = 0; i < unit; i++) rank += counts[2 * SPARSE_THREADS * i] >> nibble & 15;
    u32 byte = unit * Win::unit * sizeof(W);
    const u32* words = (const u32*)((const u8*)&shared.window[Win::place(group, byte / 16)] + byte % 16);
    u32 parts[4];
#pragma unroll
    for (u32 i = 0; i < Win::unit * sizeof(W) / 4; i++) parts[i] = words[i];
    const Class& own = shared.classes[q];
    u32 mask = find_words<W>(parts, shared.segment.key_shift, shared.segment.key_mask, own.low,
                             min(own.high, shared.segment.key_mask));
    return rank + __popc(mask & ((1u << at % Win::unit) - 1));
}

// Finds the changes, in the words' order. Every class's `slot` becomes how many words it has.
template <typename W>
static __device__ void find_changes(Packing& shared, const Room<W>& room, u32 chunk_first, u32 words) {
    typedef Window<W> Win;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, part = thread % CLASS_LANES;
    u32 own_class = thread / CLASS_LANES, reached = 0, done = 0;
    const Segment& segment = shared.segment;
    const W *base = (const W*)segment.base + chunk_first, *made = (const W*)segment.out + chunk_first;
    bool aligned = (((u64)base | (u64)made) & 15) == 0, is_float = segment.flags & IS_FLOAT;
    for (u32 first = 0; first < words; first += Win::words) {
        uint4 olds[Win::pieces], news[Win::pieces];
        load_window<W>(olds, base, first, words, aligned);
        load_window<W>(news, made, first, words, aligned);
#pragma unroll
        for (u32 i = 0; i < Win::pieces; i++) {
            u32 piece = thread + SPARSE_THREADS * i, at = Win::place(piece / Win::pieces, piece % Win::pieces);
            shared.window[at] = olds[i];
            shared.fresh[at] = news[i];
        }
        __syncthreads();
        u32 group_first = first + thread * Win::group;
        u32 there = group_first >= words ? 0 : min(words - group_first, Win::group);
        count_window<W>(shared, low_bits(~0u, there));
        u32 changed = changed_words<W>(shared, thread), through = scan(__popc(changed), lane);
        if (lane == 31) shared.warp_events[warp] = through;
        __syncthreads();
        u32 words_of_class = sum_subtiles<W>(shared, own_class, part);
        if (part == 0) shared.window_rank[own_class] = reached;
        reached += words_of_class;
        __syncthreads();
        u32 index = done + through - __popc(changed);
        for (u32 w = 0; w < SPARSE_WARPS; w++) {
            if (w < warp) index += shared.warp_events[w];
            done += shared.warp_events[w];
        }
        for (; changed; changed &= changed - 1, index++) {
            u32 at = __ffs(changed) - 1, byte = at * sizeof(W), place = Win::place(thread, byte / 16);
            W old = *(const W*)((const u8*)&shared.window[place] + byte % 16);
            W fresh = *(const W*)((const u8*)&shared.fresh[place] + byte % 16);
            u32 q = shared.class_of[(u32)old >> segment.key_shift & segment.key_mask];
            if (q >= CLASSES_MAX) { shared.verdict = BEYOND_CLASS; q = 0; }
            room.ranks[index] = q << 24 | rank_of<W>(shared, thread, at, q);
            room.steps[index] = (W)(flip<W>(fresh, is_float) - flip<W>(old, is_float));
            atomicAdd(&shared.events[q], 1u);
        }
        __syncthreads();
    }
    if (part == 0) shared.classes[own_class].slot = reached;
}

// The changes of a class in order: one warp goes through all of them.
template <typename W>
static __device__ void sort_class(Packing& shared, const Room<W>& room, u32 q, u32 changes, u32 lane, u32 below) {
    u32 to = shared.first_event[q];
    for (u32 at = 0; at < changes; at += 32) {
        bool own = at + lane < changes && room.ranks[at + lane] >> 24 == q;
        u32 who = __ballot_sync(ALL, own);
        if (own) room.order[to + __popc(who & below)] = (u16)(at + lane);
        to += __popc(who);
    }
}

// One class's symbols and raw bits: counted, or with WRITES put where the counts say.
template <typename W, bool WRITES>
static __device__ void pack_class(Packing& shared, const Room<W>& room, u32 q, u32 lane) {
    Class& own = shared.classes[q];
    u32 events = shared.events[q], from = shared.first_event[q], k = own.k, next = 0, symbols = 0, raw = 0;
    bool dense = own.kind == DENSE;
    u8 *gaps = room.symbols + own.gap_entries, *values = room.symbols + own.value_slot;
    for (u32 at = 0; at < events; at += 32) {
        bool active = at + lane < events;
        u32 index = active ? room.order[from + at + lane] : 0, rank = active ? room.ranks[index] & 0xffffff : 0;
        u32 before = __shfl_up_sync(ALL, rank, 1), gap = rank - (lane ? before + 1 : next);
        next = __shfl_sync(ALL, rank, 31) + 1;
        W step = active ? room.steps[index] : (W)0;
        u32 sign = step >> (sizeof(W) * 8 - 1), size = size_of<W>(step);
        Split value = split(size);
        if (!dense) {
            u32 quotient = gap >> k, escapes = quotient / 63, own_symbols = active ? 1 + escapes : 0;
            u32 sums = scan(own_symbols, lane);
            if (WRITES && active) {
                u8* to = gaps + symbols + sums - own_symbols;
                for (u32 i = 0; i < escapes; i++) to[i] = 63;
                to[escapes] = (u8)(quotient - 63 * escapes);
                put_bits(room.bits, own.fixed + (at + lane) * (k + 1), k + 1, low_bits(gap, k) | sign << k);
            }
            symbols += __shfl_sync(ALL, sums, 31);
        }
        if (own.valued) {
            u32 width = active ? value.width + dense : 0, sums = scan(width, lane);
            if (WRITES && active) {
                u32 bit = own.raw + raw + sums - width;
                values[dense ? rank : at + lane] = (u8)value.symbol;
                if (dense) put_bits(room.bits, bit++, 1, sign);
                put_bits(room.bits, bit, value.width, low_bits(size, value.width));
            }
            raw += __shfl_sync(ALL, sums, 31);
        }
    }
    if (!WRITES && lane == 0) {
        own.symbols = dense ? own.slot : symbols;
        own.events = events;
        own.fixed_bits = dense ? 0 : events * (k + 1);
        own.raw_bits = raw;
    }
}

// Where every class's symbols and raw bits go. By one thread; false if there is no room.
template <typename W>
static __device__ bool lay_out(Packing& shared, Room<W>& room, u32 used_bytes, u32 capacity_bytes) {
    u32 symbols = 0, fixed = 0, raw = 0, live = shared.live;
    for (u32 q = 0; q < live; q++) {
        Class& own = shared.classes[q];
        own.gap_entries = symbols;
        if (own.kind != DENSE) symbols += own.symbols;
        own.fixed = fixed;
        own.raw = raw;
        fixed += own.fixed_bits;
        raw += own.raw_bits;
    }
    for (u32 q = 0; q < live; q++) {
        Class& own = shared.classes[q];
        own.value_slot = symbols;
        if (own.valued) symbols += own.kind == DENSE ? own.symbols : own.events;
        own.raw += (fixed + 7) / 8 * 8;
    }
    shared.symbols = symbols;
    shared.raw_bytes = (fixed + 7) / 8 + (raw + 7) / 8;
    u64 bits_at = ((u64)used_bytes + symbols + 3) / 4 * 4, bits_words = (shared.raw_bytes + 3) / 4 + 18;
    return bits_at + 4 * bits_words <= capacity_bytes;
}

// Codes the symbols of one run backwards; where the words are then. By one warp.
static __device__ u32 code_run(Packing& shared, const u8* symbols, const u32* list, bool of_gaps, u32 first, u32 count,
                               u16* words, u32 at, u32& state, u32 lanes, u32 lane, u32 below) {
    u32 end = first + count;
    if (!of_gaps) {
        for (u32 i = lane; i < 256; i += 32) shared.table[i] = 0;
        __syncwarp();
        // No entry of a list is 0: symbol 0 with frequency 1 and first slot 0 would be, and is kept apart by a bit.
        for (u32 e = lane; e < __ldg(list); e += 32) {
            u32 entry = __ldg(list + 1 + e);
            shared.table[entry & 255] = (entry & ~255u) | 1;
        }
        __syncwarp();
    }
    for (u32 step = (end - 1) & ~(lanes - 1); count; step -= lanes) {
        u32 n = step + lane;
        bool active = lane < lanes && n >= first && n < end;
        u32 symbol = active ? symbols[n] : 0, entry = of_gaps ? __ldg(list + 1 + symbol) | 1 : shared.table[symbol];
        if (active && !entry) shared.verdict = MAGNITUDE;
        u32 frequency = (entry >> 8 & 4095) + 1;
        bool needs = active && state >> 20 >= frequency;
        u32 who = __ballot_sync(ALL, needs);
        if (at < (u32)__popc(who)) {
            at = 32;
            shared.verdict = TOO_MANY_SYMBOLS;
        }
        at -= __popc(who);
        if (needs) {
            words[at + __popc(who & below)] = (u16)state;
            state >>= 16;
        }
        if (active) state = (state / frequency << 12) + state % frequency + (entry >> 20);
        if (step <= first) break;
    }
    return at;
}

static __device__ u32 golomb_bits(u32 value, u32 order) {
    u32 top = 31 - __clz(value + (1u << order));
    return 2 * top - order + 1;
}

// Mode, header and states. By one warp, whose lanes hold what decoding starts in.
static __device__ void write_front(Packing& shared, u32 state, u32 lane) {
    u32 live = shared.live, order = lane & 15, bits = 0, last = 0;
    for (u32 q = 0; q < live; q++) {
        int apart = (int)(shared.classes[q].symbols - last);
        last = shared.classes[q].symbols;
        bits += golomb_bits((u32)(apart << 1) ^ (u32)(apart >> 31), order);
    }
    u32 best = bits << 4 | order;
    for (u32 step = 8; step; step /= 2) best = min(best, __shfl_xor_sync(ALL, best, step));
    order = best & 15;
    u32 bit = 15;
    if (lane == 0) {
        put_bits(shared.front, 0, 15, 2 | (31 - __clz(shared.lanes)) << 8 | order << 11);
        last = 0;
        for (u32 q = 0; q < live; q++) {
            int apart = (int)(shared.classes[q].symbols - last);
            last = shared.classes[q].symbols;
            u32 value = ((u32)(apart << 1) ^ (u32)(apart >> 31)) + (1u << order), top = 31 - __clz(value);
            bit += top - order;
            put_bits(shared.front, bit, 1, 1);
            put_bits(shared.front, bit + 1, top, low_bits(value, top));
            bit += 1 + top;
        }
    }
    bit = (__shfl_sync(ALL, bit, 0) + 7) & ~7u;
    __syncwarp();
    u32 top = 31 - __clz(state), own = lane < shared.lanes ? 4 + top : 0, sums = scan(own, lane);
    if (own) {
        put_bits(shared.front, bit + sums - own, 4, top - 16);
        put_bits(shared.front, bit + sums - own + 4, top, low_bits(state, top));
    }
    bit += __shfl_sync(ALL, sums, 31);
    if (lane == 0) shared.front_bits = (bit + 7) & ~7u;
    __syncwarp();
}

// Codes all symbols; by one warp.
template <typename W>
static __device__ void code_symbols(Packing& shared, const Room<W>& room, const u32* arena, u32 lane, u32 below) {
    u32 estimate = shared.raw_bytes + shared.symbols / 2, lanes = 32, live = shared.live;
    if (estimate < 1536) lanes = 1u << (31 - __clz(max(estimate / 256, 1)));
    u32 own_half = low_bits(room.bits[lane / 2] >> (lane & 1 ? 16 : 0), 16), state = 65536 | own_half;
    u16* words = (u16*)room.ranks;
    u32 at = room.end_bytes / 2;
    for (u32 run = 2 * live; run-- > 0;) {
        bool of_values = run >= live;
        const Class& own = shared.classes[of_values ? run - live : run];
        bool dense = own.kind == DENSE;
        u32 count = of_values ? own.valued ? dense ? own.symbols : own.events : 0 : dense ? 0 : own.symbols;
        if (!count) continue;
        at = code_run(shared, room.symbols, arena + (of_values ? own.value_table : own.gap_table), !of_values,
                      of_values ? own.value_slot : own.gap_entries, count, words, at, state, lanes, lane, below);
        __syncwarp();
    }
    if (lane == 0) {
        shared.lanes = lanes;
        shared.words_at = at;
    }
    __syncwarp();
    write_front(shared, state, lane);
}

// Writes the payload; by all.
template <typename W>
static __device__ void write_payload(Packing& shared, const Room<W>& room, u32 chunk, u32* cursor, u8* scratch,
                                     u32 scratch_units, u32* outcome, u32 words_bytes, Status* status, u32* bitmap, u32 number) {
    u32 thread = threadIdx.x, front = shared.front_bits / 8, seeds = 2 * shared.lanes;
    u32 coded = room.end_bytes - 2 * shared.words_at, raw = shared.raw_bytes > seeds ? shared.raw_bytes - seeds : 0;
    u32 bytes = front + coded + raw, units = (bytes + 3) / 4;
    if (thread == 0) {
        shared.place = bytes > words_bytes ? ~0u : atomicAdd(cursor, units);
        shared.sum = 0;
    }
    __syncthreads();
    u32 place = shared.place;
    // The words as they are would be shorter, or the scratch memory is full.
    if ((u64)place + units > scratch_units) {
        if (thread == 0) leave(status, bitmap, number);
        return;
    }
    const u8 *words = (const u8*)room.ranks + 2 * shared.words_at, *rest = (const u8*)room.bits + seeds;
    u64 sum = 0;
    for (u32 i = thread; i < units; i += SPARSE_THREADS) {
        u32 made = 0;
        for (u32 b = 0; b < 4 && 4 * i + b < bytes; b++) {
            u32 at = 4 * i + b;
            u32 byte = at < front ? ((const u8*)shared.front)[at]
                     : at - front < coded ? words[at - front] : rest[at - front - coded];
            made |= byte << (8 * b);
        }
        ((u32*)scratch)[place + i] = made;
        sum += (u64)made * (2 * i + 1);
    }
    for (u32 step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    if ((thread & 31) == 0) atomicAdd(&shared.sum, sum);
    __syncthreads();
    if (thread == 0) {
        sum = shared.sum + bytes * 0xd6e8feb86659fd93ull + chunk * 0xa0761d6478bd642full + shared.segment.seed;
        outcome[0] = place;
        outcome[1] = bytes;
        outcome[2] = (u32)(sum * 0x9e3779b97f4a7c15ull >> 32);
    }
}

template <typename W>
static __device__ void encode_sparse(const Segment* segments, u32 count, const u32* arena, u32 capacity_bytes, u32* cursor,
                                     u8* scratch, u32 scratch_units, u32* outcomes, Status* status, u32* bitmap,
                                     u32* dynamic) {
    __shared__ Packing shared;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, below = (1u << lane) - 1, unit = blockIdx.x;
    const u32* found = (const u32*)&segment_of(segments, count, unit);
    if (thread < sizeof(Segment) / 4) ((u32*)&shared.segment)[thread] = found[thread];
    __syncthreads();
    const Segment& segment = shared.segment;
    u32 chunk = unit - segment.first, number = segment.bit + chunk, chunk_first = chunk << segment.chunk_log2;
    u32 words = min(1u << segment.chunk_log2, segment.words - chunk_first), changes = 0;
    u32* outcome = outcomes + 3 * number;
    const u32* grains = (const u32*)segment.blob + (chunk_first >> GRAIN_LOG2);
    for (u32 i = 0; i < (words + (1u << GRAIN_LOG2) - 1) >> GRAIN_LOG2; i++) changes += grains[i];
    if (changes == 0) {
        if (thread == 0) {
            u64 sum = chunk * 0xa0761d6478bd642full + segment.seed;
            outcome[0] = outcome[1] = 0;
            outcome[2] = (u32)(sum * 0x9e3779b97f4a7c15ull >> 32);
        }
        return;
    }
    Room<W> room;
    room.ranks = dynamic;
    room.steps = (W*)(dynamic + changes);
    room.order = (u16*)((u8*)dynamic + ((u64)changes * (4 + sizeof(W)) + 1) / 2 * 2);
    u64 used = ((u64)changes * (4 + sizeof(W)) + 1) / 2 * 2 + 2 * (u64)changes;
    if (changes > 65535 || used > capacity_bytes) {
        if (thread == 0) leave(status, bitmap, number);
        return;
    }
    set_classes(shared, segment, arena, thread);
    for (u32 key = thread; key < 256; key += SPARSE_THREADS) {
        u32 own = 255;
        for (u32 q = 0; q < shared.live; q++) {
            if (key >= shared.classes[q].low && key <= shared.classes[q].high) own = q;
        }
        shared.class_of[key] = (u8)own;
    }
    if (thread < CLASSES_MAX) shared.events[thread] = 0;
    for (u32 i = thread; i < FRONT_WORDS; i += SPARSE_THREADS) shared.front[i] = 0;
    __syncthreads();
    find_changes<W>(shared, room, chunk_first, words);
    __syncthreads();
    u32 live = shared.live;
    if (thread == 0) {
        u32 at = 0;
        for (u32 q = 0; q < live; q++) {
            shared.first_event[q] = at;
            at += shared.events[q];
        }
    }
    __syncthreads();
    for (u32 q = warp; q < live; q += SPARSE_WARPS) {
        sort_class<W>(shared, room, q, changes, lane, below);
        __syncwarp();
        pack_class<W, false>(shared, room, q, lane);
    }
    __syncthreads();
    if (thread == 0 && !lay_out<W>(shared, room, (u32)used, capacity_bytes)) shared.verdict = TOO_MANY_SYMBOLS;
    __syncthreads();
    if (shared.verdict != OK) {
        if (thread == 0) leave(status, bitmap, number);
        return;
    }
    room.symbols = (u8*)dynamic + used;
    u64 bits_at = (used + shared.symbols + 3) / 4 * 4;
    room.bits = (u32*)((u8*)dynamic + bits_at);
    room.bits_words = (shared.raw_bytes + 3) / 4 + 18;
    room.end_bytes = (u32)used & ~1u;
    for (u32 i = (u32)used / 4 + thread; i < (u32)bits_at / 4 + room.bits_words; i += SPARSE_THREADS) {
        // Symbols of words that did not change are 0, and bits are or-ed in. The first word may hold the order's end.
        if (4 * i >= used) dynamic[i] = 0;
        else ((u16*)dynamic)[2 * i + 1] = 0;
    }
    __syncthreads();
    for (u32 q = warp; q < live; q += SPARSE_WARPS) pack_class<W, true>(shared, room, q, lane);
    __syncthreads();
    if (warp == 0) code_symbols<W>(shared, room, arena, lane, below);
    __syncthreads();
    if (shared.verdict != OK) {
        if (thread == 0) leave(status, bitmap, number);
        return;
    }
    write_payload<W>(shared, room, chunk, cursor, scratch, scratch_units, outcome, words * sizeof(W), status, bitmap,
                     number);
}

// Puts payloads where they belong: one warp a chunk. `places` has for each the offset in the blob, or all ones if it is not in it.
extern "C" __global__ void __launch_bounds__(COUNT_THREADS)
tpde_gather(const u32* outcomes, const u64* places, u32 chunks, const u8* scratch, u8* blob) {
    u32 number = blockIdx.x * (COUNT_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (number >= chunks || places[number] == ~0ull) return;
    u32 told = outcomes[3 * number + 1], bytes = told & 0x3fffffff;
    // Which byte of its word a payload starts at lies above its length.
    const u8* from = scratch + 4ull * outcomes[3 * number] + (told >> 30);
    u8* to = blob + places[number];
    for (u32 i = lane; i < bytes; i += 32) to[i] = from[i];
}

// Copies units of 16 bytes.
extern "C" __global__ void __launch_bounds__(COUNT_THREADS) tpde_join(uint4* to, const uint4* from, u64 units) {
    for (u64 i = blockIdx.x * (u64)COUNT_THREADS + threadIdx.x; i < units; i += gridDim.x * (u64)COUNT_THREADS) to[i] = from[i];
}

#define ENCODE(BITS, W)                                                                                              \
    extern "C" __global__ void __launch_bounds__(COUNT_THREADS, 6)                                                   \
    tpde_count_##BITS(const Segment* segments, u32 count, u32* grains, u32* cells) {                                 \
        count_changes<W>(segments, count, grains, cells);                                                            \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(SPARSE_THREADS)                                                     \
    tpde_encode_##BITS(const Segment* segments, u32 count, const u32* arena, u32 capacity_bytes, u32* cursor,        \
                       u8* scratch, u32 scratch_units, u32* outcomes, Status* status, u32* bitmap) {                 \
        encode_sparse<W>(segments, count, arena, capacity_bytes, cursor, scratch, scratch_units, outcomes, status,   \
                         bitmap, (u32*)dynamic_shared);                                                              \
    }
ENCODE(8, u8)
ENCODE(16, u16)
ENCODE(32, u32)
