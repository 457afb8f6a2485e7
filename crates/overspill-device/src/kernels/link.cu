// The link codec: 16-bit floats packed for a copy over the link, a chunk of 8192 words a block.
//
// Seven exponents in a row, or six and 0, get codes of 3 bits; code 7 is an exception whose exponent follows as a
// byte. Sign and mantissa are kept as they are: bf16 8 bits, f16 11. `overspill-codec/src/link.rs` is the
// reference and describes the layout. Which seven is a guess from one word in eight; a chunk that would not
// shrink is stored raw. Payloads are laid in the order in which blocks ask for room.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define ALL 0xffffffffu
#define THREADS 256u
#define CHUNK 8192u
#define UNIT 16u

enum Mode { RAW, SEVEN, SIX_AND_ZERO };

static __device__ u32 scan(u32 value, u32 lane) {
    for (u32 step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// Sum of the values of the threads before, and of all. One barrier; `warps` is written once a call.
static __device__ u32 block_before(u32 value, u32* warps, u32& total) {
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 sums = scan(value, lane);
    if (lane == 31) warps[warp] = sums;
    __syncthreads();
    u32 before = sums - value;
    total = 0;
    for (u32 i = 0; i < THREADS / 32; i++) {
        u32 own = warps[i];
        before += i < warp ? own : 0;
        total += own;
    }
    return before;
}

// Thread t holds words 8 (t + 256 i) + j, i < 4, j < 8; its word number 8 i + j.
static __device__ void load_words(u32* pairs, const u16* words, u32 first, u32 count) {
    bool aligned = ((u64)words & 15) == 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 at = first + 8 * (threadIdx.x + THREADS * i);
        if (aligned && at + 8 <= count) {
            uint4 four = *(const uint4*)(words + at);
            pairs[4 * i] = four.x; pairs[4 * i + 1] = four.y; pairs[4 * i + 2] = four.z; pairs[4 * i + 3] = four.w;
        } else {
#pragma unroll
            for (u32 p = 0; p < 4; p++) {
                u32 low = at + 2 * p < count ? words[at + 2 * p] : 0, high = at + 2 * p + 1 < count ? words[at + 2 * p + 1] : 0;
                pairs[4 * i + p] = low | high << 16;
            }
        }
    }
}

template <bool HALF> struct Layout {
    static const u32 shift = HALF ? 10 : 7, mask = HALF ? 31 : 255;
    static const u32 code_bytes = 3 * 4 * THREADS;
    static const u32 fixed_bytes = CHUNK + (HALF ? 2 : 1) * code_bytes;
};

// Appends 3 bits as number `i` of 32 to 96 bits; `i` is a constant.
static __device__ void put3(u32* bits, u32 i, u32 value) {
    u32 at = 3 * i;
    bits[at / 32] |= value << (at % 32);
    if (at % 32 > 29) bits[at / 32 + 1] |= value >> (32 - at % 32);
}

static __device__ u32 get3(const u32* bits, u32 i) {
    u32 at = 3 * i, value = bits[at / 32] >> (at % 32);
    if (at % 32 > 29) value |= bits[at / 32 + 1] << (32 - at % 32);
    return value & 7;
}

// What the chunk's codes mean: first exponent, how many, and whether code 6 is exponent 0.
struct Codes {
    u32 low, width;
    bool zero;
};

template <bool HALF>
static __device__ Codes choose(const u32* pairs, u32* counts, u32* best) {
    const u32 shift = Layout<HALF>::shift, mask = Layout<HALF>::mask;
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    counts[thread] = 0;
    if (thread < 8) counts[256 + thread] = 0;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 4; i++) atomicAdd(&counts[pairs[4 * i] >> shift & mask], 1u);
    __syncthreads();
    u32 six = 0;
#pragma unroll
    for (u32 e = 0; e < 6; e++) six += counts[thread + e];
    u32 zeros = counts[0], seven = six + counts[thread + 6];
    // A window of six and zero stands above exponent 0, one of seven anywhere: the better of them, and its place.
    u32 key = (thread && six + zeros > seven) ? (six + zeros) << 9 | thread << 1 | 1 : seven << 9 | thread << 1;
    for (u32 step = 16; step; step /= 2) key = max(key, __shfl_xor_sync(ALL, key, step));
    if (lane == 0) best[warp] = key;
    __syncthreads();
    for (u32 i = 0; i < THREADS / 32; i++) key = max(key, best[i]);
    Codes codes;
    codes.zero = key & 1;
    codes.low = key >> 1 & 255;
    codes.width = codes.zero ? 6 : 7;
    return codes;
}

template <bool HALF>
static __device__ void encode(const u16* words, u64 count, u8* payload, u32* records, u32* units) {
    const u32 shift = Layout<HALF>::shift, mask = Layout<HALF>::mask;
    __shared__ u32 counts[264], best[8], warps[8], place;
    u32 thread = threadIdx.x, chunk = blockIdx.x, first = 0;
    const u16* own = words + (u64)chunk * CHUNK;
    u32 there = (u32)min((u32)CHUNK, (u32)(count - (u64)chunk * CHUNK));
    u32 pairs[16];
    load_words(pairs, own, first, there);
    Codes codes = choose<HALF>(pairs, counts, best);
    u32 code_bits[3] = { 0, 0, 0 }, top_bits[3] = { 0, 0, 0 }, exceptions = 0;
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
        u32 word = i & 1 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff;
        u32 exponent = word >> shift & mask, code = exponent - codes.low;
        code = code < codes.width ? code : 7;
        if (codes.zero && exponent == 0) code = 6;
        u32 at = 8 * (thread + THREADS * (i / 8)) + i % 8;
        if (at >= there) code = 0;
        put3(code_bits, i, code);
        exceptions |= (u32)(code == 7) << i;
        if (HALF) put3(top_bits, i, (word >> 13 & 4) | (word >> 8 & 3));
    }
    u32 total, before = block_before(__popc(exceptions), warps, total);
    u32 bytes = Layout<HALF>::fixed_bytes + (total + UNIT - 1) / UNIT * UNIT;
    bool raw = bytes >= 2 * there;
    if (raw) bytes = (2 * there + UNIT - 1) / UNIT * UNIT;
    if (thread == 0) {
        place = atomicAdd(units, bytes / UNIT);
        records[2 * chunk] = place;
        records[2 * chunk + 1] = raw ? (u32)RAW << 24 : total | codes.low << 16 | (u32)(codes.zero ? SIX_AND_ZERO : SEVEN) << 24;
    }
    __syncthreads();
    u8* to = payload + (u64)place * UNIT;
    if (raw) {
        for (u32 i = thread; i < (2 * there + UNIT - 1) / UNIT * UNIT / 2; i += THREADS) {
            ((u16*)to)[i] = i < there ? own[i] : 0;
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        uint2 eight = make_uint2(0, 0);
#pragma unroll
        for (u32 p = 0; p < 4; p++) {
            u32 pair = pairs[4 * i + p];
            u32 low = HALF ? pair & 0x00ff00ff : (pair & 0x007f007f) | (pair >> 8 & 0x00800080);
            low = (low | low >> 8) & 0xffff;
            if (p < 2) eight.x |= low << (16 * (p & 1)); else eight.y |= low << (16 * (p & 1));
        }
        ((uint2*)to)[thread + THREADS * i] = eight;
    }
    u32* code_words = (u32*)(to + CHUNK);
#pragma unroll
    for (u32 i = 0; i < 3; i++) {
        code_words[thread + THREADS * i] = code_bits[i];
        if (HALF) code_words[thread + THREADS * (3 + i)] = top_bits[i];
    }
    u8* exponents = to + Layout<HALF>::fixed_bytes + before;
    // Few: read again rather than kept in registers.
    for (; exceptions; exceptions &= exceptions - 1) {
        u32 i = __ffs(exceptions) - 1;
        *exponents++ = (u8)(own[8 * (thread + THREADS * (i / 8)) + i % 8] >> shift & mask);
    }
    u8* end = to + Layout<HALF>::fixed_bytes;
    if (thread >= total && thread < (total + UNIT - 1) / UNIT * UNIT) end[thread] = 0;
    if (total >= THREADS && thread < UNIT && total + thread < (total + UNIT - 1) / UNIT * UNIT) end[total + thread] = 0;
}

// `status` becomes the number of a bad chunk + 1: a record or a count that no encoder writes.
template <bool HALF>
static __device__ void decode(u16* words, u64 count, const u8* payload, u64 payload_bytes, const u32* records,
                              u32* status) {
    const u32 shift = Layout<HALF>::shift;
    __shared__ u32 warps[8];
    __shared__ u8 exponents[CHUNK];
    u32 thread = threadIdx.x, chunk = blockIdx.x;
    u32 there = (u32)min((u32)CHUNK, (u32)(count - (u64)chunk * CHUNK));
    u32 place = records[2 * chunk], meta = records[2 * chunk + 1], mode = meta >> 24;
    u32 total = meta & 0xffff, low = meta >> 16 & 255;
    u32 bytes = mode == RAW ? 2 * there : Layout<HALF>::fixed_bytes + total;
    if (mode > SIX_AND_ZERO || total > CHUNK || (u64)place * UNIT + bytes > payload_bytes) {
        if (thread == 0) *status = chunk + 1;
        return;
    }
    const u8* from = payload + (u64)place * UNIT;
    u16* own = words + (u64)chunk * CHUNK;
    if (mode == RAW) {
        for (u32 i = thread; i < there; i += THREADS) own[i] = ((const u16*)from)[i];
        return;
    }
    uint2 eights[4];
    u32 code_bits[3], top_bits[3] = { 0, 0, 0 };
#pragma unroll
    for (u32 i = 0; i < 4; i++) eights[i] = ((const uint2*)from)[thread + THREADS * i];
    const u32* code_words = (const u32*)(from + CHUNK);
#pragma unroll
    for (u32 i = 0; i < 3; i++) {
        code_bits[i] = code_words[thread + THREADS * i];
        if (HALF) top_bits[i] = code_words[thread + THREADS * (3 + i)];
    }
    for (u32 i = thread; i < total; i += THREADS) exponents[i] = from[Layout<HALF>::fixed_bytes + i];
    u32 sevens = 0;
#pragma unroll
    for (u32 i = 0; i < 32; i++) sevens |= (u32)(get3(code_bits, i) == 7) << i;
    u32 found, at = block_before(__popc(sevens), warps, found);
    if (found != total) {
        if (thread == 0) *status = chunk + 1;
        return;
    }
    bool zero = mode == SIX_AND_ZERO, aligned = ((u64)own & 15) == 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 pairs[4] = { 0, 0, 0, 0 };
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            u32 n = 8 * i + j, code = get3(code_bits, n), exponent = low + code;
            if (zero && code == 6) exponent = 0;
            if (code == 7) exponent = exponents[at++];
            u32 byte = (j < 4 ? eights[i].x : eights[i].y) >> (8 * (j % 4)) & 255;
            u32 word;
            if (HALF) {
                u32 top = get3(top_bits, n);
                word = (top & 4) << 13 | exponent << shift | (top & 3) << 8 | byte;
            } else {
                word = (byte & 128) << 8 | exponent << shift | (byte & 127);
            }
            pairs[j / 2] |= (word & 0xffff) << (16 * (j % 2));
        }
        u32 first = 8 * (thread + THREADS * i);
        if (aligned && first + 8 <= there) {
            *(uint4*)(own + first) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        } else {
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                if (first + j < there) own[first + j] = (u16)(pairs[j / 2] >> (16 * (j % 2)));
            }
        }
    }
}

// Registers that keep four blocks on a multiprocessor; an A100's compiler spills with so few.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
#define ENCODE_BLOCKS 3
#else
#define ENCODE_BLOCKS 4
#endif

#define LINK(NAME, HALF)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, ENCODE_BLOCKS)                                             \
    link_encode_##NAME(const u16* words, u64 count, u8* payload, u32* records, u32* units) {                         \
        encode<HALF>(words, count, payload, records, units);                                                         \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                         \
    link_decode_##NAME(u16* words, u64 count, const u8* payload, u64 bytes, const u32* records, u32* status) {       \
        decode<HALF>(words, count, payload, bytes, records, status);                                                 \
    }
LINK(bf16, false)
LINK(f16, true)

// Writes a number where the host reads it. A copy of these four bytes would queue behind every tensor that is on its
// way out, and the stream that computes behind the copy.
extern "C" __global__ void link_publish(const u32* number, u32* host) { *host = *number; }
