// Modes W and D (and Z and raw of segments without mode S): one warp a chunk; eight chunks of a segment a block, in
// mode D twenty-four, which share the slot tables in dynamic shared memory. Symbol n is word n, so a warp's step makes 32
// words. What bounds these kernels is how many instructions they issue, so eight steps at a time leave their symbols
// in shared memory, and each lane then takes eight words that stand side by side through everything else.

#define DENSE_THREADS 768u
#define DENSE_WARPS (DENSE_THREADS / 32)

// Words between the entries of two classes; odd, as the same symbol is frequent in all of them.
#define ENTRY_STRIDE 261u
#define GROUP_STEPS 8u
#define GROUP_WORDS (32 * GROUP_STEPS)

template <typename W> struct alignas(2 * RING_WORDS) PlanesShared { u16 rings[WARPS][sizeof(W)][RING_WORDS]; u8 symbols[WARPS][sizeof(W)][GROUP_WORDS]; };
struct alignas(2 * RING_WORDS) DenseShared { u16 rings[DENSE_WARPS][RING_WORDS]; u8 symbols[DENSE_WARPS][GROUP_WORDS]; u8 class_of[256]; };

// Opens an entropy-coded part: 32 states, then words. False if it is too short or a state is out of range.
template <typename S>
static __device__ bool open_lanes(u32& state, S& words, u16* ring, const u8* from, const u8* end, u32 lane) {
    bool fits = end - from >= 128;
    state = fits ? load32(from + 4 * lane, end) : 0;
    words.open(ring, fits ? from + 128 : end, end, lane);
    return __all_sync(ALL, state >= 65536);
}

static __device__ u32 step_lane(u32& state, Words& words, u32 entry, bool active, u32 lane, u32 below) {
    u32 x = ((entry >> 8 & 4095) + 1) * (state >> 12) + (state & 4095) - (entry >> 20);
    if (active) state = x;
    state = words.pull(active && x < 65536, state, lane, below);
    return entry & 255;
}

// Length of a part, then its bytes; moves `at` behind them. False if it is not there.
static __device__ bool take_part(const u8*& at, const u8* end, const u8*& from, const u8*& to) {
    u64 bytes = 0;
    for (u32 shift = 0; shift < 35; shift += 7) {
        if (at >= end) return false;
        u32 byte = *at++;
        bytes |= (u64)(byte & 127) << shift;
        if (byte < 128) {
            if ((byte == 0 && shift) || bytes > (u64)(end - at)) return false;
            from = at;
            at += bytes;
            to = at;
            return true;
        }
    }
    return false;
}

// What a warp works on.
struct Work {
    const Segment* segment;
    Payload payload;
    u32 chunk, first, words, number, mode;
    bool mine;
};

static __device__ Work work_of(const Segment* segments, u32 count, u32 first_unit, u32 mode, u32 warps) {
    u32 unit = first_unit + blockIdx.x, warp = threadIdx.x >> 5;
    Work work;
    work.segment = &segment_of(segments, count, unit);
    const Segment& segment = *work.segment;
    u32 chunk = work.chunk = (unit - segment.first) * warps + warp;
    work.mine = false;
    if (chunk >= segment.chunks) return work;
    work.payload = payload_of(segment, chunk);
    work.first = chunk << segment.chunk_log2;
    work.words = min(1u << segment.chunk_log2, segment.words - work.first);
    work.number = segment.bit + chunk;
    work.mode = work.payload.start < work.payload.end ? *work.payload.start : 0;
    work.mine = work.mode == mode;
    return work;
}

template <typename W>
static __device__ void other_modes(const Work& work, Status* status, u32* bitmap, u32 lane) {
    const Segment& segment = *work.segment;
    if (work.mode <= 1 && !QUANT(segment.flags)) {
        if (segment.flags & COPIES) {
            copy_chunk<W>(segment, work.payload, work.first, work.words, lane, 32, status, work.number);
        }
    } else if (lane == 0) {
        not_here(segment, work.mode, status, bitmap, work.number);
    }
}

// ---- mode W ------------------------------------------------------------------------------------

// What decodes a plane: for each slot symbol | (frequency - 1) << 8 | (slot - first slot) << 20.
struct PlaneCoder {
    u32 state;
    const u32* slots;
    Stream stream;
};

// The entries of a list for all slots, 16 slots a thread.
static __device__ void fill_full(u32* full, const u32* list, u32 thread) {
    u32 count = __ldg(list), slot = 4096 / BLOCK_THREADS * thread, low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (__ldg(list + 1 + middle) >> 20 <= slot) low = middle; else high = middle;
    }
    u32 entry = __ldg(list + 1 + low), ends = (entry >> 20) + (entry >> 8 & 4095) + 1;
    for (u32 i = 0; i < 4096 / BLOCK_THREADS; i++, slot++) {
        if (slot >= ends) {
            entry = __ldg(list + 1 + ++low);
            ends = (entry >> 20) + (entry >> 8 & 4095) + 1;
        }
        full[slot] = (entry & 0xfffff) | (slot - (entry >> 20)) << 20;
    }
}

// A group's symbols of one plane; with FULL there are 256 of them, else `left`.
template <bool FULL>
static __device__ void decode_group(PlaneCoder& coder, u8* symbols, u32 left, u32 lane, u32 below) {
#pragma unroll
    for (u32 step = 0; step < GROUP_STEPS; step++) {
        if (step % 4 == 0) coder.stream.keep(lane);
        bool active = FULL || 32 * step + lane < left;
        u32 entry = coder.slots[coder.state & 4095], high = coder.state >> 12;
        u32 x = (entry >> 8 & 4095) * high + high + (entry >> 20);
        x = active ? x : coder.state;
        symbols[32 * step + lane] = (u8)entry;
        coder.state = coder.stream.pull(active && x < 65536, x, below);
    }
}

// Eight bytes of a plane as it is, of which `left` are there.
static __device__ uint2 raw_bytes(const u8* at, u32 left) {
    const u8* end = at + (left < 8 ? left : 8);
    return make_uint2(load32(at, end), load32(at + 4, end));
}

// Puts the planes of eight words together; `planes` has eight bytes of each.
template <typename W>
static __device__ Eight<W> join_planes(const uint2* planes, bool is_float) {
    Eight<W> made;
    if (sizeof(W) == 1) {
        made.parts[0] = planes[0].x;
        made.parts[1] = planes[0].y;
    } else if (sizeof(W) == 2) {
        made.parts[0] = __byte_perm(planes[1].x, planes[0].x, 0x5140);
        made.parts[1] = __byte_perm(planes[1].x, planes[0].x, 0x7362);
        made.parts[2] = __byte_perm(planes[1].y, planes[0].y, 0x5140);
        made.parts[3] = __byte_perm(planes[1].y, planes[0].y, 0x7362);
    } else {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 parts[4];
#pragma unroll
            for (u32 p = 0; p < 4; p++) parts[p] = half ? planes[p % sizeof(W)].y : planes[p % sizeof(W)].x;
#pragma unroll
            for (u32 two = 0; two < 2; two++) {
                u32 take = two ? 0x7362 : 0x5140;
                u32 low = __byte_perm(parts[3], parts[2], take), high = __byte_perm(parts[1], parts[0], take);
                made.parts[(4 * half + 2 * two) % (2 * sizeof(W))] = __byte_perm(low, high, 0x5410);
                made.parts[(4 * half + 2 * two + 1) % (2 * sizeof(W))] = __byte_perm(low, high, 0x7632);
            }
        }
    }
    if (is_float) {
        const u32 ones = sizeof(W) == 1 ? 0x01010101 : sizeof(W) == 2 ? 0x00010001 : 1, top = sizeof(W) * 8 - 1;
#pragma unroll
        for (u32 i = 0; i < 2 * sizeof(W); i++) {
            u32 part = made.parts[i];
            made.parts[i] = (part >> 1 & ~(ones << top)) | (part & ones) << top;
        }
    }
    return made;
}

// The words of a chunk. MASK says which planes are coded (bit 0: the first), or with 0 `mask` does.
template <typename W, u32 MASK>
static __device__ void make_words(W* out, u32 words, bool is_float, PlaneCoder* coders, u8 (*symbols)[GROUP_WORDS],
                                  const u8* const* bytes, u32 mask, u32 lane, u32 below) {
    const u32 planes = sizeof(W);
    bool aligned = ((u64)out & 15) == 0;
    mask = MASK ? MASK : mask;
    for (u32 first = 0; first < words; first += GROUP_WORDS) {
        u32 left = words - first, own = first + 8 * lane;
        uint2 parts[planes];
        // On their way while the others are decoded.
#pragma unroll
        for (u32 p = 0; p < planes; p++) {
            parts[p] = make_uint2(0, 0);
            if (!(mask >> p & 1) && own < words) parts[p] = raw_bytes(bytes[p] + own, words - own);
        }
#pragma unroll
        for (u32 p = 0; p < planes; p++) {
            if (!(mask >> p & 1)) continue;
            if (left >= GROUP_WORDS) decode_group<true>(coders[p], symbols[p], left, lane, below);
            else decode_group<false>(coders[p], symbols[p], left, lane, below);
        }
        __syncwarp();
#pragma unroll
        for (u32 p = 0; p < planes; p++) {
            if (mask >> p & 1) parts[p] = *(const uint2*)(symbols[p] + 8 * lane);
        }
        Eight<W> made = join_planes<W>(parts, is_float);
        if (own < words) store_eight<W>(out, own, words, aligned, made);
        __syncwarp();
    }
}

template <typename W>
static __device__ void decode_planes(const Segment* segments, u32 count, const u32* arena, u32 first_unit,
                                     Status* status, u32* bitmap, u32* slots) {
    const u32 planes = sizeof(W);
    __shared__ PlanesShared<W> shared;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, below = (1u << lane) - 1;
    Work work = work_of(segments, count, first_unit, 4, WARPS);
    const Segment& segment = *work.segment;
    u32 coded = 0, coded_planes = 0;
#pragma unroll
    for (u32 p = 0; p < planes; p++) {
        u32 table = segment.planes ? __ldg(arena + segment.planes + p) : 0;
        if (!table) continue;
        coded_planes |= 1u << p;
        fill_full(slots + 4096 * coded++, arena + table, thread);
    }
    __syncthreads();
    u32 chunk = (first_unit + blockIdx.x - segment.first) * WARPS + warp;
    if (chunk >= segment.chunks) return;
    if (!work.mine) {
        other_modes<W>(work, status, bitmap, lane);
        return;
    }
    const u8 *at = work.payload.start + 1, *end = work.payload.end, *bytes[planes];
    PlaneCoder coders[planes];
    bool good = true;
    coded = 0;
#pragma unroll
    for (u32 p = 0; p < planes; p++) {
        coders[p].state = 65536;
        bytes[p] = at;
        if (!(coded_planes >> p & 1)) {
            good = good && (u64)(end - at) >= work.words;
            at = good ? at + work.words : at;
        } else {
            const u8 *from = at, *to = at;
            good = good && take_part(at, end, from, to);
            if (!good) from = to = at;
            coders[p].slots = slots + 4096 * coded++;
            good = open_lanes(coders[p].state, coders[p].stream, shared.rings[warp][p], from, to, lane) && good;
        }
    }
    if (!good || at != end) {
        if (lane == 0) fail(status, good ? LEFT_OVER : ENDS_EARLY, work.number);
        return;
    }
    W* out = (W*)segment.out + work.first;
    bool is_float = segment.flags & IS_FLOAT;
    u8 (*symbols)[GROUP_WORDS] = shared.symbols[warp];
    if (coded_planes == 1) {
        make_words<W, 1>(out, work.words, is_float, coders, symbols, bytes, coded_planes, lane, below);
    } else {
        make_words<W, 0>(out, work.words, is_float, coders, symbols, bytes, coded_planes, lane, below);
    }
#pragma unroll
    for (u32 p = 0; p < planes; p++) {
        if (!(coded_planes >> p & 1)) continue;
        const PlaneCoder& coder = coders[p];
        if (!__all_sync(ALL, coder.state == 65536) || !coder.stream.ended()) good = false;
    }
    if (!good && lane == 0) fail(status, LEFT_OVER, work.number);
}

// ---- mode D ------------------------------------------------------------------------------------

static __device__ float half_to_float(u32 half) {
    u32 sign = (half & 0x8000) << 16, size = half & 0x7fff;
    u32 bits = size == 0 ? 0
             : size >= 0x7c00 ? 0x7f800000 | (size & 0x3ff) << 13
             : size >= 0x400 ? (size << 13) + (112u << 23)
             : __float_as_uint(__fmul_rn((float)size, __uint_as_float((127u - 24) << 23)));
    return __uint_as_float(sign | bits);
}

static __device__ u32 float_to_half(u32 bits) {
    u32 sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff, half;
    if (size > 0x7f800000) half = 0x7e00;
    else if (size >= 0x477ff000) half = 0x7c00;
    else if (size >= 113u << 23) half = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
    else half = __float_as_uint(__fadd_rn(__uint_as_float(size), 0.5f)) - 0x3f000000;
    return sign | half;
}

static __device__ u32 float_to_bf16(u32 bits) {
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16 & 0x8000) | 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// F16 is the only 16-bit float whose exponent starts at bit 10.
template <typename W> static __device__ W round_to(u32 bits, const Segment& segment) {
    if (sizeof(W) == 4) return (W)bits;
    return (W)(segment.key_shift == 10 ? float_to_half(bits) : float_to_bf16(bits));
}

// What a quantized block stores for its weight `lane`: loaded well before it is looked at.
struct Stored {
    u32 scale, least, level;
    __device__ void fetch(const Segment& segment, u32 block, u32 lane) {
        u32 kind = QUANT(segment.flags), bytes = kind == 1 ? 18 : kind == 2 ? 20 : 34;
        const u8* at = (const u8*)segment.base + (u64)block * bytes;
        scale = __ldg(at) | (u32)__ldg(at + 1) << 8;
        least = kind == 2 ? __ldg(at + 2) | (u32)__ldg(at + 3) << 8 : 0;
        level = __ldg(at + (kind == 3 ? 2 + lane : (kind == 1 ? 2 : 4) + lane % 16));
    }
};

// What it says about that weight.
template <typename W> struct Predicted { W word, pivot; u32 key; };

template <typename W>
static __device__ Predicted<W> predict(const Segment& segment, const Stored& own, u32 lane) {
    u32 kind = QUANT(segment.flags), stored = own.scale;
    float scale = half_to_float(stored);
    int level = kind == 3 ? (signed char)own.level
                          : (int)(lane < 16 ? own.level & 15 : own.level >> 4) - (kind == 1 ? 8 : 0);
    float value = __fmul_rn(scale, (float)level);
    if (kind == 2) value = __fadd_rn(value, half_to_float(own.least));
    u32 bits = __float_as_uint(value), scale_bits = __float_as_uint(scale);
    if ((bits & 0x7fffffff) > 0x7f800000) bits = 0x7fc00000;
    int above = (int)(bits >> 23 & 255) - (int)(scale_bits >> 23 & 255) + 1;
    Predicted<W> made;
    made.word = round_to<W>(bits, segment);
    made.pivot = rotated_left<W>(round_to<W>(scale_bits & 0x7fffffff, segment));
    made.key = (u32)(above < 0 ? 0 : above > 8 ? 8 : above) * 4 + (stored >> 8 & 3);
    return made;
}

// Raw bits of a chunk that a warp reads in order: 96 aligned words, three a lane, the last of them on its way.
struct RawBits {
    const u32 *start, *end;
    u32 skipped, first, held, ahead, far;
    __device__ u32 word(u32 i) const { return start + i < end ? __ldg(start + i) : 0; }
    __device__ void open(const u8* from, const u8* to, u32 lane) {
        start = (const u32*)((u64)from & ~3ull);
        end = (const u32*)(((u64)to + 3) & ~3ull);
        skipped = ((u32)(u64)from & 3) * 8;
        first = 0;
        held = word(lane);
        ahead = word(lane + 32);
        far = word(lane + 64);
    }
    // Goes on to `bit`, the same for all lanes, which never goes back.
    __device__ void reach(u32 bit, u32 lane) {
        while ((bit + skipped) / 32 - first >= 32) {
            first += 32;
            held = ahead;
            ahead = far;
            far = word(first + 64 + lane);
        }
    }
    // The 32 bits from a lane's own `bit` on, at most 31 words behind what was reached; what lies behind the end is not
    // bits of the chunk.
    __device__ u32 from(u32 bit) const {
        bit += skipped;
        u32 i = bit / 32 - first;
        u32 a = __shfl_sync(ALL, held, i & 31), b = __shfl_sync(ALL, ahead, i & 31);
        u32 c = __shfl_sync(ALL, held, (i + 1) & 31), d = __shfl_sync(ALL, ahead, (i + 1) & 31);
        return __funnelshift_r(i < 32 ? a : b, i < 31 ? c : d, bit & 31);
    }
};

// A block's tables of mode D.
struct DenseTables { const u8* slots; const u32* entries; const u8* class_of; };

// The words of a chunk against a quantized base; its raw bits start at `at`, its word stream ends at `to`.
template <typename W>
static __device__ void quantized_words(const Work& work, const DenseTables& tables, u32 state, Words words,
                                       const u8* at, const u8* to, W* out, Status* status, u32 lane) {
    const u32 bits = sizeof(W) * 8, below = (1u << lane) - 1;
    const Segment& segment = *work.segment;
    const u8* end = work.payload.end;
    bool is_float = segment.flags & IS_FLOAT, fits = true;
    u32 raw = 0, block = work.first / 32, last = block + (work.words - 1) / 32;
    RawBits raw_bits;
    raw_bits.open(at, end, lane);
    Stored next, after;
    next.fetch(segment, block, lane);
    after.fetch(segment, min(block + 1, last), lane);
    for (u32 step = 0; step < work.words; step += 32) {
        u32 n = step + lane;
        bool active = n < work.words;
        Predicted<W> predicted = predict<W>(segment, next, lane);
        next = after;
        after.fetch(segment, min(++block + 1, last), lane);
        u32 c = tables.class_of[predicted.key];
        u32 entry = tables.entries[ENTRY_STRIDE * c + tables.slots[4096 * c + (state & 4095)]];
        u32 symbol = step_lane(state, words, entry, active, lane, below), least, width;
        bool changed = active && symbol != 0;
        fits = (magnitude(symbol, bits, least, width) || !changed) && fits;
        u32 who = __ballot_sync(ALL, changed), prefix = __popc(who & below), all = __popc(who), sign;
        raw_bits.reach(raw, lane);
        if (!__any_sync(ALL, changed && width)) {
            sign = raw_bits.from(raw) >> prefix & 1;
        } else {
            // A sign and at most 28 bits a lane: 29 words.
            u32 own = changed ? width + 1 : 0, sums = scan(own, lane);
            u32 bits_here = raw_bits.from(raw + sums - own);
            sign = bits_here & 1;
            least += low_bits(bits_here >> 1, width);
            all = __shfl_sync(ALL, sums, 31);
        }
        u32 change = !changed ? 0 : sign ? 0u - least : least;
        raw += all;
        if (!active) continue;
        out[n] = predicted.key < 4 ? rotated_right<W>((W)(change + predicted.pivot))
                                   : stepped<W>(predicted.word, (W)change, is_float);
    }
    bool ended = __all_sync(ALL, state == 65536) && words.rest() == to, good = __all_sync(ALL, fits);
    if (lane == 0) {
        if (!good) fail(status, MAGNITUDE, work.number);
        else if (!ended || at + (raw + 7) / 8 != end) fail(status, LEFT_OVER, work.number);
    }
}

// Raw bits of a magnitude symbol.
static __device__ u32 width_of(u32 symbol) { return symbol < 32 ? 0 : (symbol >> 3) - 2; }

// Raw bits of a chunk that lanes read where they like.
struct FarBits {
    const u32 *start, *end;
    u32 skipped;
    __device__ FarBits(const u8* from, const u8* to) {
        start = (const u32*)((u64)from & ~3ull);
        end = (const u32*)(((u64)to + 3) & ~3ull);
        skipped = ((u32)(u64)from & 3) * 8;
    }
    // The 64 bits from `bit` on; what lies behind the end is not bits of the chunk.
    __device__ uint2 from(u32 bit) const {
        bit += skipped;
        const u32* at = start + (bit >> 5);
        u32 words[3];
#pragma unroll
        for (u32 i = 0; i < 3; i++) words[i] = at + i < end ? __ldg(at + i) : 0;
        return make_uint2(__funnelshift_r(words[0], words[1], bit & 31), __funnelshift_r(words[1], words[2], bit & 31));
    }
};

// The words of a chunk; its raw bits start at `at`. `buffer` has a byte for every word of a group: its class, then its symbol.
template <typename W>
static __device__ void dense_words(const Work& work, const DenseTables& tables, u32 state, Stream& stream, u8* buffer,
                                   const u8* at, W* out, const W* base, Status* status, u32 lane) {
    const u32 bits = sizeof(W) * 8, below = (1u << lane) - 1;
    // How many words' bits are sure to fit into 64.
    const u32 at_once = sizeof(W) == 4 ? 2 : sizeof(W) == 2 ? 4 : 8;
    const Segment& segment = *work.segment;
    u32 words = work.words, key_shift = segment.key_shift, key_mask = segment.key_mask, raw = 0, largest = 0;
    bool is_float = segment.flags & IS_FLOAT, aligned = (((u64)base | (u64)out) & 15) == 0;
    FarBits far_bits(at, work.payload.end);
    // Words of 32 bits are not brought in ahead: registers.
    const bool looks_ahead = sizeof(W) < 4;
    Eight<W> next;
    if (looks_ahead) next = load_eight<W>(base, 8 * lane, words, aligned);
    for (u32 first = 0; first < words; first += GROUP_WORDS) {
        Eight<W> own = looks_ahead ? next : load_eight<W>(base, first + 8 * lane, words, aligned);
        u32 classes[2] = { 0, 0 };
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            classes[i / 4] |= (u32)tables.class_of[(u32)own.word(i) >> key_shift & key_mask] << (8 * (i % 4));
        }
        ((uint2*)buffer)[lane] = make_uint2(classes[0], classes[1]);
        __syncwarp();
        if (looks_ahead) next = load_eight<W>(base, first + GROUP_WORDS + 8 * lane, words, aligned);
        u32 left = words - first;
#pragma unroll
        for (u32 step = 0; step < GROUP_STEPS; step++) {
            if (step % 4 == 0) stream.keep(lane);
            u32 n = 32 * step + lane, c = buffer[n], slot = state & 4095, high = state >> 12;
            bool active = n < left;
            u32 entry = tables.entries[ENTRY_STRIDE * c + tables.slots[4096 * c + slot]];
            u32 x = (entry >> 8 & 4095) * high + high + slot - (entry >> 20);
            x = active ? x : state;
            buffer[n] = active ? (u8)entry : 0;
            state = stream.pull(active && x < 65536, x, below);
        }
        __syncwarp();
        uint2 symbols = ((const uint2*)buffer)[lane];
        __syncwarp();
        // How many raw bits each lane's words have.
        u32 sum = 0;
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 symbol = (i < 4 ? symbols.x : symbols.y) >> (8 * (i % 4)) & 255;
            sum += symbol ? 1 + width_of(symbol) : 0;
            largest = max(largest, symbol);
        }
        u32 sums = scan(sum, lane), bit = raw + sums - sum;
        raw += __shfl_sync(ALL, sums, 31);
        uint2 held = make_uint2(0, 0);
        Eight<W> made;
#pragma unroll
        for (u32 i = 0; i < 2 * sizeof(W); i++) made.parts[i] = 0;
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            if (i % at_once == 0) held = far_bits.from(bit);
            u32 symbol = (i < 4 ? symbols.x : symbols.y) >> (8 * (i % 4)) & 255, width = width_of(symbol);
            u32 least = symbol < 32 ? symbol : (8 | (symbol & 7)) << (width & 31);
            u32 size = least + low_bits(held.x >> 1, width), used = symbol ? 1 + width : 0;
            W step = (W)(held.x & 1 ? 0u - size : size);
            made.parts[i * sizeof(W) / 4] |= (u32)stepped<W>(own.word(i), step, is_float) << (8 * (i * sizeof(W) % 4));
            held.x = __funnelshift_r(held.x, held.y, used);
            held.y >>= used & 31;
            bit += used;
        }
        if (8 * lane < left) store_eight<W>(out, first + 8 * lane, words, aligned, made);
    }
    bool ended = __all_sync(ALL, state == 65536) && stream.ended();
    // The least magnitude that a word does not hold has this symbol.
    bool good = __all_sync(ALL, largest < 32 + 8 * (bits - 5));
    if (lane == 0) {
        if (!good) fail(status, MAGNITUDE, work.number);
        else if (!ended || at + (raw + 7) / 8 != work.payload.end) fail(status, LEFT_OVER, work.number);
    }
}

template <typename W>
static __device__ void decode_dense(const Segment* segments, u32 count, const u32* arena, u32 first_unit,
                                    Status* status, u32* bitmap, u8* slots) {
    __shared__ DenseShared shared;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    Work work = work_of(segments, count, first_unit, 3, DENSE_WARPS);
    const Segment& segment = *work.segment;
    const u32* tables = arena + segment.dense;
    u32 classes = __ldg(tables);
    if (!segment.dense) work.mine = false;
    u32* entries = (u32*)(slots + 4096 * classes);
    if (__syncthreads_or(work.mine)) {
        if (thread < 256) shared.class_of[thread] = (u8)(__ldg(tables + 1 + thread / 4) >> (8 * (thread % 4)));
        for (u32 c = warp; c < classes; c += DENSE_WARPS) {
            const u32* list = arena + __ldg(tables + 65 + c);
            fill_slots<false>(slots + 4096 * c, list, lane, 32);
            for (u32 e = lane; e < __ldg(list); e += 32) entries[ENTRY_STRIDE * c + e] = __ldg(list + 1 + e);
        }
    }
    __syncthreads();
    u32 chunk = (first_unit + blockIdx.x - segment.first) * DENSE_WARPS + warp;
    if (chunk >= segment.chunks) return;
    u32 quant = QUANT(segment.flags);
    W* out = (W*)segment.out + work.first;
    const W* base = (const W*)segment.base + work.first;
    if (!work.mine) {
        if (work.mode == 0 && quant) {
            for (u32 n = lane; n < work.words; n += 32) {
                Stored own;
                own.fetch(segment, (work.first + n) / 32, lane);
                out[n] = predict<W>(segment, own, lane).word;
            }
        } else if (work.mode == 1 && quant) {
            copy_chunk<W>(segment, work.payload, work.first, work.words, lane, 32, status, work.number);
        } else {
            other_modes<W>(work, status, bitmap, lane);
        }
        return;
    }
    const u8 *at = work.payload.start + 1, *end = work.payload.end, *from = at, *to = at;
    bool good = take_part(at, end, from, to);
    if (!good) from = to = at = end;
    DenseTables tables_here = { slots, entries, shared.class_of };
    u32 state;
    if (quant) {
        Words words;
        good = open_lanes(state, words, shared.rings[warp], from, to, lane) && good;
        if (good) quantized_words<W>(work, tables_here, state, words, at, to, out, status, lane);
    } else {
        Stream stream;
        good = open_lanes(state, stream, shared.rings[warp], from, to, lane) && good;
        if (good) {
            dense_words<W>(work, tables_here, state, stream, shared.symbols[warp], at, out, base, status, lane);
        }
    }
    if (!good && lane == 0) fail(status, ENDS_EARLY, work.number);
}

// ---- checks ------------------------------------------------------------------------------------

// Compares every chunk's payload with its record: one warp a chunk, eight a block.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
tpde_check(const Segment* segments, u32 count, u32 first_unit, Status* status) {
    u32 unit = first_unit + blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const Segment& segment = segment_of(segments, count, unit);
    u32 chunk = (unit - segment.first) * WARPS + warp;
    if (chunk >= segment.chunks) return;
    Payload payload = payload_of(segment, chunk);
    u64 bytes = payload.end - payload.start, total = 0;
    for (u64 i = lane; 4 * i < bytes; i += 32) {
        total += (u64)load32(payload.start + 4 * i, payload.end) * (u32)(2 * i + 1);
    }
    for (u32 step = 16; step; step /= 2) total += __shfl_xor_sync(ALL, total, step);
    if (lane == 0) {
        total += bytes * 0xd6e8feb86659fd93ull + chunk * 0xa0761d6478bd642full + segment.seed;
        u32 check = (u32)(total * 0x9e3779b97f4a7c15ull >> 32);
        if (check != __ldg((const u32*)segment.index + 2 * chunk + 1)) fail(status, CHECK, segment.bit + chunk);
    }
}

// A segment without chunks: a copy of the base, or zeros where there is none.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) tpde_whole(u64 to, u64 from, u64 bytes) {
    u64 thread = blockIdx.x * (u64)BLOCK_THREADS + threadIdx.x, threads = gridDim.x * (u64)BLOCK_THREADS, done = 0;
    if (((to | from) & 15) == 0) {
        for (u64 i = thread; i < bytes / 16; i += threads) {
            ((uint4*)to)[i] = from ? ((const uint4*)from)[i] : make_uint4(0, 0, 0, 0);
        }
        done = bytes / 16 * 16;
    }
    for (u64 i = done + thread; i < bytes; i += threads) ((u8*)to)[i] = from ? ((const u8*)from)[i] : 0;
}

#define LANES_KERNEL(NAME, DECODE, W, T, THREADS, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
    NAME(const Segment* segments, u32 count, const u32* arena, u32 first_unit, Status* status, u32* bitmap) {        \
        DECODE<W>(segments, count, arena, first_unit, status, bitmap, (T*)dynamic_shared);                           \
    }
// Only here do four blocks' registers hold what mode W needs for words of 16 bits.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define PLANES_BLOCKS 4
#else
#define PLANES_BLOCKS 3
#endif

LANES_KERNEL(tpde_planes_8, decode_planes, u8, u32, BLOCK_THREADS, 4)
LANES_KERNEL(tpde_planes_16, decode_planes, u16, u32, BLOCK_THREADS, PLANES_BLOCKS)
LANES_KERNEL(tpde_planes_32, decode_planes, u32, u32, BLOCK_THREADS, 2)
LANES_KERNEL(tpde_dense_8, decode_dense, u8, u8, DENSE_THREADS, 1)
LANES_KERNEL(tpde_dense_16, decode_dense, u16, u8, DENSE_THREADS, 1)
LANES_KERNEL(tpde_dense_32, decode_dense, u32, u8, DENSE_THREADS, 1)
