// What the TPDE decoders share. docs/tpde-format.md is the specification; `overspill-codec` is the reference
// that every kernel is compared with, bit for bit. Lengths and offsets of segments and records were checked on
// the host; everything inside a payload is checked here. A warp is always used whole: no collective is called
// with lanes missing. Nothing reads past the aligned 32-bit word that holds a payload's last byte.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef EMULATED
extern __shared__ uint4 dynamic_shared[];
#endif

#define ALL 0xffffffffu
#define BLOCK_THREADS 256u
#define WARPS (BLOCK_THREADS / 32)

// One segment, as `overspill-codec-cuda` lays it out: 96 bytes, no padding.
struct Segment {
    u64 base;   // first word (or quantized block) of the base
    u64 out;    // first final word
    u64 blob;   // first payload byte
    u64 index;  // first record
    u64 seed;   // of the checks, times D
    u32 words, chunk_log2, chunks;
    u32 first;  // units (chunks or groups of chunks) of the launch before this segment
    u32 bit;    // chunks of all segments before this one
    u32 sparse, dense, planes;  // where its tables lie in the arena, 0 if it has none
    u32 row_words, row_offset;
    u32 key_shift, key_mask;
    u32 flags, unused;
};
#define IS_FLOAT 1u
#define IS_STEP 2u
#define HAS_BASE 4u
#define COPIES 8u            // this launch also handles modes Z and raw of the segment
#define QUANT(flags) ((flags) >> 4 & 3)  // 0 words, 1 Q4_0, 2 Q4_1, 3 Q8_0

// What a launch reports. `left` counts chunks that are for another launch, whose bits are set in the bitmap.
struct Status { u32 error, chunk, left, unused; };
enum Error {
    OK, RESERVED_MODE, NO_TABLES, RAW_LENGTH, LANES, TOO_MANY_SYMBOLS, ENDS_EARLY, GAP, POSITION, ESCAPE_LAST,
    MAGNITUDE, NOT_SEED, LEFT_OVER, BEYOND_CLASS, CHECK, NEGATIVE, VARINT, STATE
};

static __device__ void fail(Status* status, u32 error, u32 chunk) {
    if (atomicCAS(&status->error, 0u, error) == 0u) status->chunk = chunk;
}

static __device__ void leave(Status* status, u32* bitmap, u32 chunk) {
    atomicOr(&bitmap[chunk >> 5], 1u << (chunk & 31));
    atomicAdd(&status->left, 1u);
}

static __device__ const Segment& segment_of(const Segment* segments, u32 count, u32 unit) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (segments[middle].first <= unit) low = middle; else high = middle;
    }
    return segments[low];
}

// ---- bytes and bits ----------------------------------------------------------------------------

// Bytes p..p+3, zeros from `end` on.
static __device__ u32 load32(const u8* p, const u8* end) {
    const u32* aligned = (const u32*)((u64)p & ~3ull);
    u32 shift = ((u32)(u64)p & 3) * 8;
    u32 low = p < end ? __ldg(aligned) : 0;
    u32 high = shift && (const u8*)(aligned + 1) < end ? __ldg(aligned + 1) : 0;
    u32 value = __funnelshift_r(low, high, shift);
    long long left = end - p;
    return left >= 4 ? value : left <= 0 ? 0 : value & ((1u << (8 * (u32)left)) - 1);
}

static __device__ u32 low_bits(u32 value, u32 width) { return width < 32 ? value & ((1u << width) - 1) : value; }

// Bits of a payload's header, whose first words stand in shared memory. Past the end there are zeros, and `late` tells.
#define STAGED_WORDS 128u
struct Header {
    const u32* staged;
    const u8 *start, *end;
    u32 bit;
    __device__ u32 peek() const {
        u32 word = bit >> 5;
        if (word + 1 < STAGED_WORDS) return __funnelshift_r(staged[word], staged[word + 1], bit & 31);
        const u8* p = start + (bit >> 3);
        u32 shift = bit & 7;
        return __funnelshift_r(load32(p, end), load32(p + 4, end), shift);
    }
    __device__ u32 take(u32 width) {
        u32 value = low_bits(peek(), width);
        bit += width;
        return value;
    }
    __device__ u64 golomb(u32 order, bool& bad) {
        u32 zeros = 0, ahead = peek();
        while (ahead == 0 && zeros < 64) { zeros += 32; bit += 32; ahead = peek(); }
        u32 run = __ffs(ahead) - 1;
        zeros += run;
        u32 width = order + zeros;
        if (ahead == 0 || width > 40) { bad = true; return 0; }
        bit += run + 1;
        u64 value = take(width > 32 ? 32 : width);
        if (width > 32) value |= (u64)take(width - 32) << 32;
        return (value | 1ull << width) - (1ull << order);
    }
    __device__ bool late() const { return start + (bit + 7) / 8 > end; }
    __device__ const u8* rest() const { return start + (bit + 7) / 8; }
};

// ---- words -------------------------------------------------------------------------------------

template <typename W> static __device__ W flip(W x, u32 is_float) {
    const u32 bits = sizeof(W) * 8, below_sign = (u32)(W)~(W)0 >> 1;
    return (W)(x ^ (is_float ? (0u - ((u32)x >> (bits - 1))) & below_sign : 0u));
}

template <typename W> static __device__ W stepped(W base, W step, u32 is_float) {
    return flip<W>((W)(flip<W>(base, is_float) + step), is_float);
}

template <typename W> static __device__ W rotated_right(W x) {
    return (W)(((u32)x >> 1) | ((u32)x << (sizeof(W) * 8 - 1)));
}

template <typename W> static __device__ W rotated_left(W x) {
    return (W)(((u32)x << 1) | ((u32)x >> (sizeof(W) * 8 - 1)));
}

// Four bytes of eight, selected by nibbles; from 8 on they select a byte's sign.
static __device__ u32 permute(u32 low, u32 high, u32 take) {
#ifdef EMULATED
    return emulated::permute(low, high, take);
#else
    u32 made;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(made) : "r"(low), "r"(high), "r"(take));
    return made;
#endif
}

// Words that fill a register: their top bits, and what selects their signs.
template <typename W> struct Parts {
    static const u32 top = sizeof(W) == 1 ? 0x80808080 : sizeof(W) == 2 ? 0x80008000 : 0x80000000;
    static const u32 signs = sizeof(W) == 1 ? 0xba98 : sizeof(W) == 2 ? 0xbb99 : 0xbbbb;
};

// Words to and from the order map; `flip` has the bits that floats change where they are negative.
template <typename W> static __device__ u32 flipped(u32 part, u32 flip) {
    return part ^ (permute(part, 0, Parts<W>::signs) & flip);
}

// Sums of words, none of which carries into the next one.
template <typename W> static __device__ u32 sums(u32 a, u32 b) {
    const u32 top = Parts<W>::top;
    return sizeof(W) == 4 ? a + b : ((a & ~top) + (b & ~top)) ^ ((a ^ b) & top);
}

// Least magnitude and raw bits of a magnitude symbol of words of `bits` <= 32 bits.
static __device__ bool magnitude(u32 symbol, u32 bits, u32& least, u32& width) {
    u32 above = symbol - 32, octave = 5 + (above >> 3);
    bool direct = symbol < 32;
    width = direct ? 0 : octave - 3;
    least = direct ? symbol : (8 | (above & 7)) << ((octave - 3) & 31);
    return direct || octave < bits;
}

// ---- rANS --------------------------------------------------------------------------------------

// The words of a stream, pulled in by a whole warp: 128 of them stand in shared memory.
struct Words {
    u16* ring;
    const u8 *start, *end;
    u32 pulled;  // words taken out
    u32 blocks;  // blocks of 64 words brought in
    // This lane's part of the next block, on its way: two aligned words that nothing looks at before their turn, so
    // that nothing waits for them.
    u32 low, high;
    __device__ void fetch(u32 lane) {
        const u8* p = start + 128ull * blocks + 4 * lane;
        const u32* aligned = (const u32*)((u64)p & ~3ull);
        low = p < end ? __ldg(aligned) : 0;
        high = (const u8*)(aligned + 1) < end ? __ldg(aligned + 1) : 0;
    }
    __device__ void bring(u32 lane) {
        const u8* p = start + 128ull * blocks + 4 * lane;
        u32 value = __funnelshift_r(low, high, ((u32)(u64)p & 3) * 8);
        long long left = end - p;
        ((u32*)ring)[(blocks & 1) * 32 + lane] =
            left >= 4 ? value : left <= 0 ? 0 : low_bits(value, 8 * (u32)left);
        blocks++;
        fetch(lane);
        __syncwarp();
    }
    __device__ void open(u16* to, const u8* from, const u8* to_end, u32 lane) {
        ring = to; start = from; end = to_end; pulled = 0; blocks = 0;
        fetch(lane);
        __syncwarp();
        bring(lane);
        bring(lane);
    }
    // Words for the lanes that need one, in their order.
    __device__ u32 pull(bool needs, u32 state, u32 lane, u32 below) {
        u32 who = __ballot_sync(ALL, needs);
        if (needs) state = state << 16 | ring[(pulled + __popc(who & below)) & 127];
        u32 before = pulled >> 6;
        pulled += __popc(who);
        if (pulled >> 6 != before) {
            __syncwarp();
            bring(lane);
        }
        return state;
    }
    __device__ const u8* rest() const { return start + 2ull * pulled; }
};

#define RING_WORDS 256u

// Where something lies in shared memory, as a number.
#ifdef EMULATED
typedef u64 Near;
static __device__ Near near_of(const void* p) { return (Near)p; }
static __device__ u8* at_near(Near at) { return (u8*)at; }
#else
typedef u32 Near;
static __device__ Near near_of(const void* p) { return (Near)__cvta_generic_to_shared(p); }
static __device__ u8* at_near(Near at) { return (u8*)__cvta_shared_to_generic(at); }
#endif

// As `Words`, with 256 words in shared memory, so that four steps go by between two looks at what is left.
struct Stream {
    Near ring;        // lies at a multiple of its size
    const u32* from;  // this lane's next three aligned words
    u32 left;         // aligned words from there to the end, or 0
    u32 shift;        // of a lane's bytes in them
    u32 bytes;        // of the stream
    u32 taken;        // bytes taken out
    u32 soon;         // with so many bytes taken out a block of 128 words has room
    u32 ahead[3];
    __device__ void fetch() {
#pragma unroll
        for (u32 i = 0; i < 3; i++) ahead[i] = i < left ? __ldg(from + i) : 0;
        from += 64;
        left = left > 64 ? left - 64 : 0;
    }
    __device__ void bring(u32 lane) {
        u32* to = (u32*)at_near(ring | (~soon & RING_WORDS) | 8 * lane);
        // What lies behind the end is never taken by a stream that ends where it should.
        to[0] = __funnelshift_r(ahead[0], ahead[1], shift);
        to[1] = __funnelshift_r(ahead[1], ahead[2], shift);
        soon += RING_WORDS;
        fetch();
        __syncwarp();
    }
    __device__ void open(u16* to, const u8* start, const u8* end, u32 lane) {
        ring = near_of(to); bytes = (u32)(end - start); taken = 0; soon = 0u - RING_WORDS;
        const u32* aligned = (const u32*)((u64)start & ~3ull);
        u32 all = (u32)((u64)(end - (const u8*)aligned + 3) / 4);
        shift = ((u32)(u64)start & 3) * 8;
        from = aligned + 2 * lane;
        left = all > 2 * lane ? all - 2 * lane : 0;
        fetch();
        __syncwarp();
        bring(lane);
        bring(lane);
    }
    // Before four steps.
    __device__ void keep(u32 lane) {
        if (__any_sync(ALL, taken >= soon)) {
            __syncwarp();
            bring(lane);
        }
    }
    __device__ u32 pull(bool needs, u32 state, u32 below) {
        u32 who = __ballot_sync(ALL, needs);
        u32 word = *(const u16*)at_near(((taken + 2 * __popc(who & below)) & (2 * RING_WORDS - 2)) | ring);
        taken += 2 * __popc(who);
        return needs ? state << 16 | word : state;
    }
    __device__ bool ended() const { return taken == bytes; }
};

// A frequency list of the arena: count, then symbol | (frequency - 1) << 8 | first slot << 20, by first slot.
// `slots` gets for each of 4096 slots the number of its entry, or its symbol; `share` of `shares` threads.
template <bool SYMBOLS>
static __device__ void fill_slots(u8* slots, const u32* list, u32 share, u32 shares) {
    u32 count = __ldg(list), each = 4096 / shares, slot = share * each;
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (__ldg(list + 1 + middle) >> 20 <= slot) low = middle; else high = middle;
    }
    u32 ends = low + 1 < count ? __ldg(list + 2 + low) >> 20 : 4096, told = SYMBOLS ? __ldg(list + 1 + low) & 255 : low;
    for (u32 to = slot + each; slot < to; slot += 4) {
        u32 four = told * 0x01010101;
        for (u32 i = 0; slot + 4 > ends && i < 4; i++) {
            // Everything from here on is of the next entry, until its end is seen to be near too.
            while (slot + i >= ends) {
                low++;
                ends = low + 1 < count ? __ldg(list + 2 + low) >> 20 : 4096;
                told = SYMBOLS ? __ldg(list + 1 + low) & 255 : low;
                four = low_bits(four, 8 * i) | (told * 0x01010101) << (8 * i);
            }
        }
        *(u32*)(slots + slot) = four;
    }
}

// Eight words of a lane.
template <typename W> struct Eight {
    u32 parts[2 * sizeof(W)];
    __device__ W word(u32 i) const { return (W)(parts[i * sizeof(W) / 4] >> (8 * (i * sizeof(W) % 4))); }
};

// `words` words of `from` from `first` on, zeros behind them. `aligned`: the first of eight lies at a multiple of 16.
template <typename W>
static __device__ Eight<W> load_eight(const W* from, u32 first, u32 words, bool aligned) {
    Eight<W> made;
    if (aligned && first + 8 <= words) {
        const u32* at = (const u32*)(from + first);
        if (sizeof(W) == 1) {
            uint2 two = *(const uint2*)at;
            made.parts[0] = two.x; made.parts[1] = two.y;
        } else {
#pragma unroll
            for (u32 i = 0; i < (sizeof(W) + 1) / 2; i++) {
                uint4 four = ((const uint4*)at)[i];
                made.parts[4 * i] = four.x; made.parts[4 * i + 1] = four.y;
                made.parts[4 * i + 2] = four.z; made.parts[4 * i + 3] = four.w;
            }
        }
        return made;
    }
#pragma unroll
    for (u32 i = 0; i < 2 * sizeof(W); i++) made.parts[i] = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        if (first + i < words) made.parts[i * sizeof(W) / 4] |= (u32)from[first + i] << (8 * (i * sizeof(W) % 4));
    }
    return made;
}

template <typename W>
static __device__ void store_eight(W* to, u32 first, u32 words, bool aligned, const Eight<W>& eight) {
    if (aligned && first + 8 <= words) {
        u32* at = (u32*)(to + first);
        if (sizeof(W) == 1) {
            *(uint2*)at = make_uint2(eight.parts[0], eight.parts[1]);
        } else {
#pragma unroll
            for (u32 i = 0; i < (sizeof(W) + 1) / 2; i++) {
                ((uint4*)at)[i] = make_uint4(eight.parts[4 * i], eight.parts[4 * i + 1], eight.parts[4 * i + 2],
                                             eight.parts[4 * i + 3]);
            }
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        if (first + i < words) to[first + i] = eight.word(i);
    }
}

static __device__ u32 scan(u32 value, u32 lane) {
    for (u32 step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

static __device__ u32 sum(u32 value) {
    for (u32 step = 16; step; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// The payload of a chunk.
struct Payload { const u8 *start, *end; };
static __device__ Payload payload_of(const Segment& segment, u32 chunk) {
    const u32* records = (const u32*)segment.index;
    u32 start = chunk ? __ldg(records + 2 * (chunk - 1)) : 0, end = __ldg(records + 2 * chunk);
    return { (const u8*)segment.blob + start, (const u8*)segment.blob + end };
}

// Copies `bytes` with `threads` threads; the source may lie anywhere, the target on a word.
template <typename W>
static __device__ void copy_words(u64 to, u64 from, u32 words, u32 thread, u32 threads) {
    if (((to | from) & 15) == 0) {
        u32 whole = (u32)((u64)words * sizeof(W) / 16);
        for (u32 i = thread; i < whole; i += threads) ((uint4*)to)[i] = ((const uint4*)from)[i];
        for (u32 i = whole * (16 / sizeof(W)) + thread; i < words; i += threads) ((W*)to)[i] = ((const W*)from)[i];
        return;
    }
    bool apart = from % sizeof(W) != 0;
    for (u32 i = thread; i < words; i += threads) {
        W word;
        if (apart) {
            const u8* p = (const u8*)from + (u64)i * sizeof(W);
            u32 value = 0;
            for (u32 b = 0; b < sizeof(W); b++) value |= (u32)p[b] << (8 * b);
            word = (W)value;
        } else {
            word = ((const W*)from)[i];
        }
        ((W*)to)[i] = word;
    }
}

// Modes Z and raw. `words` of the chunk from `first` on.
template <typename W>
static __device__ void copy_chunk(const Segment& segment, Payload payload, u32 first, u32 words, u32 thread,
                                  u32 threads, Status* status, u32 chunk) {
    u64 out = segment.out + (u64)first * sizeof(W), base = segment.base + (u64)first * sizeof(W);
    if (payload.start == payload.end) {
        if (!(segment.flags & HAS_BASE)) {
            for (u32 i = thread; i < words; i += threads) ((W*)out)[i] = 0;
        } else if (out != base) {
            copy_words<W>(out, base, words, thread, threads);
        }
    } else if ((u64)(payload.end - payload.start) != 1 + (u64)words * sizeof(W)) {
        if (thread == 0) fail(status, RAW_LENGTH, chunk);
    } else {
        copy_words<W>(out, (u64)payload.start + 1, words, thread, threads);
    }
}

// A payload whose mode this kernel does not decode: another launch does, or the host.
static __device__ void not_here(const Segment& segment, u32 mode, Status* status, u32* bitmap, u32 chunk) {
    if (mode > 7) fail(status, RESERVED_MODE, chunk);
    else if (!(segment.flags & COPIES)) return;
    else if (!((mode == 3 || (mode == 7 && !QUANT(segment.flags))) && segment.dense) && !(mode == 4 && segment.planes)) leave(status, bitmap, chunk);
}
