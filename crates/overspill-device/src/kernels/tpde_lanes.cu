// Modes W and D (and Z and raw of segments without mode S): one warp a chunk; eight chunks of a segment a block, in
// mode D sixteen, which share the slot tables in dynamic shared memory. Symbol n is word n, so a warp's step makes 32
// words.

#define AHEAD 4u  // steps that mode D looks ahead
#define DENSE_THREADS 512u
#define DENSE_WARPS (DENSE_THREADS / 32)

struct LaneShared { u16 rings[WARPS][4][128]; };
struct DenseShared { u16 rings[DENSE_WARPS][128]; u8 class_of[256]; };

// Opens an entropy-coded part: 32 states, then words. False if it is too short or a state is out of range.
static __device__ bool open_lanes(u32& state, Words& words, u16* ring, const u8* from, const u8* end, u32 lane) {
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
    u32 first, words, number, mode;
    bool mine;
};

static __device__ Work work_of(const Segment* segments, u32 count, u32 first_unit, u32 mode, u32 warps) {
    u32 unit = first_unit + blockIdx.x, warp = threadIdx.x >> 5;
    Work work;
    work.segment = &segment_of(segments, count, unit);
    const Segment& segment = *work.segment;
    u32 chunk = (unit - segment.first) * warps + warp;
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

template <typename W>
static __device__ void decode_planes(const Segment* segments, u32 count, const u32* arena, u32 first_unit,
                                     Status* status, u32* bitmap, u8* slots) {
    const u32 planes = sizeof(W);
    __shared__ LaneShared shared;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, below = (1u << lane) - 1;
    Work work = work_of(segments, count, first_unit, 4, WARPS);
    const Segment& segment = *work.segment;
    // Per coded plane its entry for each of 4096 slots.
    u32 coded = 0, tables[planes];
#pragma unroll
    for (u32 p = 0; p < planes; p++) {
        tables[p] = segment.planes ? __ldg(arena + segment.planes + p) : 0;
        if (!tables[p]) continue;
        const u32* list = arena + tables[p];
        u32* full = (u32*)slots + 4096 * coded++;
        for (u32 e = thread; e < __ldg(list); e += BLOCK_THREADS) {
            u32 entry = __ldg(list + 1 + e), from = entry >> 20, length = (entry >> 8 & 4095) + 1;
            for (u32 i = 0; i < length; i++) full[from + i] = entry;
        }
    }
    __syncthreads();
    u32 chunk = (first_unit + blockIdx.x - segment.first) * WARPS + warp;
    if (chunk >= segment.chunks) return;
    if (!work.mine) {
        other_modes<W>(work, status, bitmap, lane);
        return;
    }
    const u8 *at = work.payload.start + 1, *end = work.payload.end, *bytes[planes];
    u32 states[planes];
    Words words[planes];
    const u32* slot_words[planes];
    bool good = true;
    coded = 0;
#pragma unroll
    for (u32 p = 0; p < planes; p++) {
        states[p] = 65536;
        slot_words[p] = (const u32*)slots;
        bytes[p] = at;
        if (!tables[p]) {
            good = good && (u64)(end - at) >= work.words;
            at = good ? at + work.words : at;
        } else {
            const u8 *from = at, *to = at;
            good = good && take_part(at, end, from, to);
            if (!good) from = to = at;
            slot_words[p] += 4096 * coded++;
            good = open_lanes(states[p], words[p], shared.rings[warp][p], from, to, lane) && good;
        }
    }
    if (!good || at != end) {
        if (lane == 0) fail(status, good ? LEFT_OVER : ENDS_EARLY, work.number);
        return;
    }
    W* out = (W*)segment.out + work.first;
    bool is_float = segment.flags & IS_FLOAT;
    // Raw bytes are on their way a few steps ahead.
    const u32 ahead = planes == 4 ? 2 : 8;
    u8 next[ahead][planes];
#pragma unroll
    for (u32 i = 0; i < ahead; i++) {
#pragma unroll
        for (u32 p = 0; p < planes; p++) {
            u32 n = 32 * i + lane;
            next[i][p] = !tables[p] && n < work.words ? __ldg(bytes[p] + n) : 0;
        }
    }
    for (u32 from = 0; from < work.words; from += 32 * ahead) {
#pragma unroll
        for (u32 i = 0; i < ahead; i++) {
            if (from + 32 * i >= work.words) break;
            u32 n = from + 32 * i + lane, word = 0;
            bool active = n < work.words;
#pragma unroll
            for (u32 p = 0; p < planes; p++) {
                u32 byte;
                if (tables[p]) {
                    byte = step_lane(states[p], words[p], slot_words[p][states[p] & 4095], active, lane, below);
                } else {
                    u32 later = n + 32 * ahead;
                    byte = next[i][p];
                    next[i][p] = later < work.words ? __ldg(bytes[p] + later) : 0;
                }
                word |= byte << (8 * (planes - 1 - p));
            }
            if (active) out[n] = is_float ? rotated_right<W>((W)word) : (W)word;
        }
    }
#pragma unroll
    for (u32 p = 0; p < planes; p++) {
        if (tables[p] && (!__all_sync(ALL, states[p] == 65536) || words[p].rest() != words[p].end)) good = false;
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

// What a quantized block says about its weight `lane`.
template <typename W> struct Predicted { W word, pivot; u32 key; };

template <typename W>
static __device__ Predicted<W> predict(const Segment& segment, u32 block, u32 lane) {
    u32 kind = QUANT(segment.flags), bytes = kind == 1 ? 18 : kind == 2 ? 20 : 34;
    const u8* at = (const u8*)segment.base + (u64)block * bytes;
    u32 stored = at[0] | (u32)at[1] << 8;
    float scale = half_to_float(stored);
    int level;
    if (kind == 3) {
        level = (signed char)at[2 + lane];
    } else {
        u32 pair = at[(kind == 1 ? 2 : 4) + lane % 16];
        level = (int)(lane < 16 ? pair & 15 : pair >> 4) - (kind == 1 ? 8 : 0);
    }
    float value = __fmul_rn(scale, (float)level);
    if (kind == 2) value = __fadd_rn(value, half_to_float(at[2] | (u32)at[3] << 8));
    u32 bits = __float_as_uint(value), scale_bits = __float_as_uint(scale);
    if ((bits & 0x7fffffff) > 0x7f800000) bits = 0x7fc00000;
    int above = (int)(bits >> 23 & 255) - (int)(scale_bits >> 23 & 255) + 1;
    Predicted<W> made;
    made.word = round_to<W>(bits, segment);
    made.pivot = rotated_left<W>(round_to<W>(scale_bits & 0x7fffffff, segment));
    made.key = (u32)(above < 0 ? 0 : above > 8 ? 8 : above) * 4 + (stored >> 8 & 3);
    return made;
}

// Raw bits of a chunk that a warp reads in order: 64 words, two a lane, the second half on its way.
struct RawBits {
    const u8 *start, *end;
    u32 first, held, ahead;
    __device__ void open(const u8* from, const u8* to, u32 lane) {
        start = from; end = to; first = 0;
        held = load32(start + 4 * lane, end);
        ahead = load32(start + 4 * lane + 128, end);
    }
    // The 32 bits from `bit` on, which never goes back.
    __device__ u32 from(u32 bit, u32 lane) {
        while (bit / 32 - first >= 32) {
            first += 32;
            held = ahead;
            ahead = load32(start + 4ull * (first + 32 + lane), end);
        }
        u32 word = bit / 32 - first;
        u32 low = __shfl_sync(ALL, held, word), high = __shfl_sync(ALL, word < 31 ? held : ahead, (word + 1) & 31);
        return __funnelshift_r(low, high, bit & 31);
    }
};

template <typename W>
static __device__ void decode_dense(const Segment* segments, u32 count, const u32* arena, u32 first_unit,
                                    Status* status, u32* bitmap, u8* slots) {
    const u32 bits = sizeof(W) * 8;
    __shared__ DenseShared shared;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, below = (1u << lane) - 1;
    Work work = work_of(segments, count, first_unit, 3, DENSE_WARPS);
    const Segment& segment = *work.segment;
    const u32* tables = arena + segment.dense;
    u32 classes = __ldg(tables);
    if (!segment.dense) work.mine = false;
    u32* entries = (u32*)(slots + 4096 * classes);
    if (thread < 256) shared.class_of[thread] = (u8)(__ldg(tables + 1 + thread / 4) >> (8 * (thread % 4)));
    for (u32 c = warp; c < classes; c += DENSE_WARPS) {
        const u32* list = arena + __ldg(tables + 65 + c);
        fill_slots(slots + 4096 * c, list, lane, 32);
        for (u32 e = lane; e < __ldg(list); e += 32) entries[256 * c + e] = __ldg(list + 1 + e);
    }
    __syncthreads();
    u32 chunk = (first_unit + blockIdx.x - segment.first) * DENSE_WARPS + warp;
    if (chunk >= segment.chunks) return;
    u32 quant = QUANT(segment.flags);
    W* out = (W*)segment.out + work.first;
    const W* base = (const W*)segment.base + work.first;
    if (!work.mine) {
        if (work.mode == 0 && quant) {
            for (u32 n = lane; n < work.words; n += 32) out[n] = predict<W>(segment, (work.first + n) / 32, lane).word;
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
    u32 state;
    Words words;
    good = open_lanes(state, words, shared.rings[warp], from, to, lane) && good;
    if (!good) {
        if (lane == 0) fail(status, ENDS_EARLY, work.number);
        return;
    }
    bool is_float = segment.flags & IS_FLOAT, fits = true;
    u32 key_shift = segment.key_shift, key_mask = segment.key_mask;
    u32 raw = 0;
    RawBits raw_bits;
    raw_bits.open(at, end, lane);
    // The base's words are on their way a few steps ahead.
    W next[AHEAD];
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) next[i] = !quant && 32 * i + lane < work.words ? base[32 * i + lane] : 0;
    for (u32 from_word = 0; from_word < work.words; from_word += 32 * AHEAD) {
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            u32 step = from_word + 32 * i;
            if (step >= work.words) break;
            u32 n = step + lane, key;
            bool active = n < work.words;
            W old;
            Predicted<W> predicted;
            if (quant) {
                predicted = predict<W>(segment, (work.first + step) / 32, lane);
                key = predicted.key;
                old = predicted.word;
            } else {
                old = next[i];
                next[i] = n + 32 * AHEAD < work.words ? base[n + 32 * AHEAD] : 0;
                key = (u32)old >> key_shift & key_mask;
            }
            u32 c = shared.class_of[key];
            u32 entry = entries[256 * c + slots[4096 * c + (state & 4095)]];
            u32 symbol = step_lane(state, words, entry, active, lane, below), least, width;
            bool changed = active && symbol != 0;
            fits = (magnitude(symbol, bits, least, width) || !changed) && fits;
            u32 who = __ballot_sync(ALL, changed), prefix = __popc(who & below), all = __popc(who), sign;
            if (!__any_sync(ALL, changed && width)) {
                sign = raw_bits.from(raw, lane) >> prefix & 1;
            } else {
                u32 own = changed ? width + 1 : 0, sums = scan(own, lane), bit = raw + sums - own;
                const u8* p = at + (bit >> 3);
                u32 shift = bit & 7, low = load32(p, end), high = load32(p + 4, end);
                sign = low >> shift & 1;
                least += low_bits(__funnelshift_r(low, high, shift + 1), width);
                all = __shfl_sync(ALL, sums, 31);
            }
            W made = old;
            if (changed || quant) {
                u32 change = !changed ? 0 : sign ? 0u - least : least;
                if (quant && predicted.key < 4) made = rotated_right<W>((W)(change + predicted.pivot));
                else made = stepped<W>(old, (W)change, is_float);
            }
            raw += all;
            if (active) out[n] = made;
        }
    }
    bool ended = __all_sync(ALL, state == 65536) && words.rest() == to;
    if (!__all_sync(ALL, fits)) good = false;
    if (lane == 0) {
        if (!good) fail(status, MAGNITUDE, work.number);
        else if (!ended || at + (raw + 7) / 8 != end) fail(status, LEFT_OVER, work.number);
    }
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

#define LANES_KERNEL(NAME, DECODE, W, THREADS, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
    NAME(const Segment* segments, u32 count, const u32* arena, u32 first_unit, Status* status, u32* bitmap) {        \
        DECODE<W>(segments, count, arena, first_unit, status, bitmap, (u8*)dynamic_shared);                          \
    }
// Shared memory for two blocks of mode D, where there is so much.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define DENSE_BLOCKS 1
#else
#define DENSE_BLOCKS 2
#endif

LANES_KERNEL(tpde_planes_8, decode_planes, u8, BLOCK_THREADS, 3)
LANES_KERNEL(tpde_planes_16, decode_planes, u16, BLOCK_THREADS, 3)
LANES_KERNEL(tpde_planes_32, decode_planes, u32, BLOCK_THREADS, 3)
LANES_KERNEL(tpde_dense_8, decode_dense, u8, DENSE_THREADS, DENSE_BLOCKS)
LANES_KERNEL(tpde_dense_16, decode_dense, u16, DENSE_THREADS, DENSE_BLOCKS)
LANES_KERNEL(tpde_dense_32, decode_dense, u32, DENSE_THREADS, DENSE_BLOCKS)
