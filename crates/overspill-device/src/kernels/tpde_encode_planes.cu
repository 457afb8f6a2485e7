// Encoder of mode W. `tpde_count_planes` counts the bytes of every plane, all of them and those of a sample, a block 2^15 words;
// `tpde_probe` brings the words in front of which the reference looks for repetitions. The host makes the heads of it.
// A warp then codes a chunk, twice: first to know how long its payload is (`tpde_size_planes`), then to write it where it
// belongs (`tpde_encode_planes`), so that nothing is copied and no other memory is taken; a place of all ones is none. A chunk that is shorter as it is, or
// that its head does not provide for, is noted in the bitmap; the host packs its segment.

#define NEAR_COPIES 8u
#define SAMPLE_RUN 1024u  // words; of every sixteen such runs the first is in the sample
#define PROBE_WORDS 4096u
#define PLANES_GROUP 256u

// The byte at `shift` of a word, rotated if it is a float's.
template <typename W> static __device__ u32 plane_byte(W word, u32 shift, bool is_float) {
    return (u32)(is_float ? rotated_left<W>(word) : word) >> shift & 255;
}

// Counts a lane's eight words; how many are not zero.
template <typename W>
static __device__ u32 count_eight(u32 (*near)[256][NEAR_COPIES], const W* made, u32 at, u32 words, bool aligned, bool is_float) {
    Eight<W> own = load_eight<W>(made, at, words, aligned);
    u32 found = 0, copy = threadIdx.x % NEAR_COPIES;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        if (at + i >= words) continue;
        W word = own.word(i);
        found += word != 0;
#pragma unroll
        for (u32 p = 0; p < sizeof(W); p++) {
            atomicAdd(&near[p][plane_byte<W>(word, 8 * ((u32)sizeof(W) - 1 - p), is_float)][copy], 1u);
        }
    }
    return found;
}

template <typename W>
static __device__ void count_planes(const Segment* segments, u32 count, u32* grains, u32* cells) {
    const u32 planes = sizeof(W);
    __shared__ u32 near[planes][256][NEAR_COPIES], changed;
    u32 thread = threadIdx.x, unit = blockIdx.x;
    const Segment& segment = segment_of(segments, count, unit);
    cells += (u64)2 * planes * 256 * (&segment - segments);
    for (u32 i = thread; i < planes * 256 * NEAR_COPIES; i += COUNT_THREADS) (&near[0][0][0])[i] = 0;
    if (thread == 0) changed = 0;
    __syncthreads();
    u32 first = (unit - segment.first) << GRAIN_LOG2, words = min(1u << GRAIN_LOG2, segment.words - first);
    const W* made = (const W*)segment.out + first;
    bool aligned = (segment.out & 15) == 0, is_float = segment.flags & IS_FLOAT;
    u32 found = 0;
    for (u32 sampled = 1;; sampled = 0) {
        for (u32 at = thread * 8; at < words; at += COUNT_THREADS * 8) {
            if ((at / SAMPLE_RUN % 16 == 0) == sampled) found += count_eight<W>(near, made, at, words, aligned, is_float);
        }
        __syncthreads();
        for (u32 cell = thread; cell < planes * 256; cell += COUNT_THREADS) {
            u32 sum = 0;
            for (u32 copy = 0; copy < NEAR_COPIES; copy++) sum += near[cell / 256][cell % 256][copy];
            if (sum) atomicAdd(&cells[sampled ? planes * 256 + cell : cell], sum);
        }
        if (!sampled) break;
        __syncthreads();
    }
    if (found) atomicAdd(&changed, found);
    __syncthreads();
    if (thread == 0) grains[unit] = changed;
}

// The first words of the first chunk that has any but zeros, as bytes; a block a segment.
template <typename W>
static __device__ void probe(const Segment* segments, const u32* grains, u8* probes) {
    __shared__ u32 least;
    const Segment& segment = segments[blockIdx.x];
    u32 thread = threadIdx.x, count = (segment.words + (1u << GRAIN_LOG2) - 1) >> GRAIN_LOG2;
    if (thread == 0) least = count;
    __syncthreads();
    for (u32 i = thread; i < count; i += COUNT_THREADS) {
        if (!grains[segment.first + i]) continue;
        atomicMin(&least, i);
    }
    __syncthreads();
    u32 first = least << GRAIN_LOG2;
    if (least == count) return;
    W* to = (W*)(probes + (u64)PROBE_WORDS * sizeof(W) * blockIdx.x);
    for (u32 i = thread; i < PROBE_WORDS && first + i < segment.words; i += COUNT_THREADS) {
        to[i] = ((const W*)segment.out)[first + i];
    }
}

// As for flags, but with a symbol's first slot above the five bits; all zeros where there is no symbol.
static __device__ Push push_symbol(u32 entry) {
    Push push = push_of((entry >> 8 & 4095) + 1, true);
    push.w |= (entry >> 20) << 5;
    return push;
}

// Codes a plane backwards, with WRITES into what lies in front of `end`: states and words. How many bytes that takes.
template <typename W, bool WRITES>
static __device__ u32 code_plane(const Push* pushes, const W* made, u32 words, u32 shift, bool is_float, u8* end, bool& good,
                                 u32 lane) {
    u32 x = 65536, bytes = 0, below = (1u << lane) - 1;
    for (u32 first = (words - 1) / PLANES_GROUP * PLANES_GROUP;; first -= PLANES_GROUP) {
        u32 symbols[8];
#pragma unroll
        for (u32 k = 0; k < 8; k++) {
            u32 n = first + 32 * k + lane;
            // What is not there is no symbol, which does nothing.
            symbols[k] = n < words ? plane_byte<W>(made[n], shift, is_float) : 256;
        }
#pragma unroll
        for (u32 k = 8; k-- > 0;) {
            Push push = pushes[symbols[k]];
            good = good && (push.w || symbols[k] == 256);
            bool spills = (~x | 0xfffff) < push.w;
            u32 who = __ballot_sync(ALL, spills);
            bytes += 2 * __popc(who);
            if (WRITES && spills) {
                u8* to = end - bytes + 2 * __popc(who & below);
                to[0] = (u8)x;
                to[1] = (u8)(x >> 8);
            }
            if (spills) x >>= 16;
            u64 product = (u64)x * push.z + push.x;
            x += __funnelshift_r((u32)(product >> 32), 0, push.w) * (push.w >> 20) + (push.w >> 5 & 4095);
        }
        if (first == 0) break;
    }
    bytes += 128;
    if (WRITES) {
        for (u32 b = 0; b < 4; b++) (end - bytes)[4 * lane + b] = (u8)(x >> (8 * b));
    }
    return bytes;
}

// The sum that a payload's check is of, of what this warp wrote.
static __device__ u64 written_sum(const u8* start, u32 bytes, u32 lane) {
    __threadfence_block();
    __syncwarp();
    const u32* aligned = (const u32*)((u64)start & ~3ull);
    u32 shift = 8 * ((u32)(u64)start & 3);
    u64 sum = 0;
    for (u32 i = lane; 4 * i < bytes; i += 32) {
        u32 left = bytes - 4 * i, low = aligned[i], high = shift && 8 * left > 32 - shift ? aligned[i + 1] : 0;
        sum += (u64)low_bits(__funnelshift_r(low, high, shift), 8 * min(left, 4)) * (2 * i + 1);
    }
    for (u32 step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    return sum;
}

// A chunk's payload in front of `end`, or only how long it is. False if the head does not provide for it.
template <typename W, bool WRITES>
static __device__ bool code_planes(const Push (*pushes)[257], u32 coded, const W* made, u32 words, bool is_float, u8* end,
                                   u32& bytes, u32 lane) {
    bool good = true;
    bytes = 0;
#pragma unroll 1
    for (u32 p = sizeof(W); p-- > 0;) {
        u32 shift = 8 * ((u32)sizeof(W) - 1 - p);
        if (!(coded >> p & 1)) {
            bytes += words;
            for (u32 n = lane; WRITES && n < words; n += 32) (end - bytes)[n] = (u8)plane_byte<W>(made[n], shift, is_float);
            continue;
        }
        u32 part = code_plane<W, WRITES>(pushes[p], made, words, shift, is_float, end - bytes, good, lane);
        bytes += part;
        u32 digits = (31 - __clz(part)) / 7 + 1;
        bytes += digits;
        if (WRITES && lane < digits) (end - bytes)[lane] = (u8)((part >> (7 * lane) & 127) | (lane + 1 < digits ? 128 : 0));
    }
    bytes++;
    if (WRITES && lane == 0) *(end - bytes) = 4;
    return __all_sync(ALL, good);
}

template <typename W, bool WRITES>
static __device__ void encode_planes(const Segment* segments, u32 count, const u32* arena, u32* outcomes, const u64* places,
                                     u8* blob, Status* status, u32* bitmap) {
    const u32 planes = sizeof(W);
    __shared__ Push pushes[planes][257];
    u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, unit = blockIdx.x, coded = 0;
    const Segment& segment = segment_of(segments, count, unit);
    for (u32 i = thread; i < planes * 257; i += BLOCK_THREADS) pushes[i / 257][i % 257] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (u32 p = 0; p < planes; p++) {
        u32 table = __ldg(arena + segment.planes + p), entries = table ? __ldg(arena + table) : 0;
        coded |= (table ? 1u : 0u) << p;
        for (u32 e = thread; e < entries; e += BLOCK_THREADS) {
            u32 entry = __ldg(arena + table + 1 + e);
            pushes[p][entry & 255] = push_symbol(entry);
        }
    }
    __syncthreads();
    u32 chunk = (unit - segment.first) * WARPS + warp;
    // Collectives tell the compiler what is the same for all lanes.
    if (!__any_sync(ALL, chunk < segment.chunks)) return;
    u32 number = segment.bit + chunk, first = chunk << segment.chunk_log2, bytes = 0;
    u32 words = __shfl_sync(ALL, min(1u << segment.chunk_log2, segment.words - first), 0);
    const W* made = (const W*)segment.out + first;
    bool is_float = segment.flags & IS_FLOAT, any = ((const u32*)segment.blob)[first >> GRAIN_LOG2] != 0;
    u32* outcome = outcomes + 3 * number;
    if (WRITES && __any_sync(ALL, places[number] == ~0ull)) return;
    u8* end = WRITES ? blob + places[number] + outcome[1] : 0;
    if (__any_sync(ALL, any)) {
        bool good = code_planes<W, WRITES>(pushes, __shfl_sync(ALL, coded, 0), made, words, is_float, end, bytes, lane);
        if (!WRITES && (!good || bytes > words * sizeof(W))) {
            if (lane == 0) leave(status, bitmap, number);
            bytes = 0;
        }
    }
    if (!WRITES) {
        if (lane == 0) outcome[1] = bytes;
        return;
    }
    u64 sum = bytes ? written_sum(end - bytes, bytes, lane) : 0;
    sum += bytes * 0xd6e8feb86659fd93ull + chunk * 0xa0761d6478bd642full + segment.seed;
    if (lane == 0) outcome[2] = (u32)(sum * 0x9e3779b97f4a7c15ull >> 32);
}

#define ENCODE_PLANES(BITS, W)                                                                                       \
    extern "C" __global__ void __launch_bounds__(COUNT_THREADS)                                                      \
    tpde_count_planes_##BITS(const Segment* segments, u32 count, u32* grains, u32* cells) {                          \
        count_planes<W>(segments, count, grains, cells);                                                             \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(COUNT_THREADS)                                                      \
    tpde_probe_##BITS(const Segment* segments, const u32* grains, u8* probes) {                                      \
        probe<W>(segments, grains, probes);                                                                          \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 4)                                                   \
    tpde_size_planes_##BITS(const Segment* segments, u32 count, const u32* arena, u32* outcomes, const u64* places,  \
                            u8* blob, Status* status, u32* bitmap) {                                                 \
        encode_planes<W, false>(segments, count, arena, outcomes, places, blob, status, bitmap);                     \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 4)                                                   \
    tpde_encode_planes_##BITS(const Segment* segments, u32 count, const u32* arena, u32* outcomes,                   \
                              const u64* places, u8* blob, Status* status, u32* bitmap) {                            \
        encode_planes<W, true>(segments, count, arena, outcomes, places, blob, status, bitmap);                      \
    }
ENCODE_PLANES(8, u8)
ENCODE_PLANES(16, u16)
ENCODE_PLANES(32, u32)
