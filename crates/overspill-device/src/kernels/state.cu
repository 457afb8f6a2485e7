// State ids of words in device memory: the 128-bit XXH3 (seed 0) of each segment, up to its last step, which the host
// does of eight sums. `overspill-codec-cuda/src/state.rs` launches it and is compared with the reference on the host.
//
// XXH3 takes blocks of 1024 bytes: it adds up a product for each of their words, in any order, and scrambles the eight
// sums between blocks, in order. So sixteen warps of a block of threads sum ahead, and one more follows through what
// they summed: two batches of blocks lie in shared memory, one is written while the other is used.

typedef unsigned long long u64;

static const unsigned LANES = 8;         // sums of XXH3
static const unsigned BLOCK_BYTES = 1024;
static const unsigned STRIPE_BYTES = 64;
static const unsigned SUMMING_WARPS = 16;
static const unsigned AHEAD = 2;         // blocks that a warp loads at once
static const unsigned BATCH = SUMMING_WARPS * AHEAD;

struct StateSegment {
    const unsigned char* bytes;
    u64 length;  // above 240: shorter ones are hashed otherwise
};

struct Pair {
    u64 low, high;
};

// XXH3's own secret, of which a stripe uses eight words, the next one a word further on.
__constant__ u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull
};
// The same from byte 121 on, for the last stripe.
__constant__ u64 LAST_SECRET[LANES] = {
    0xea647378d9c97e9full, 0xc5c3ebd33483acc5ull, 0x17eb6313faffa081ull, 0xd349daf0b751dd0dull,
    0x2b9e68d429265516ull, 0x8ffca1477d58be16ull, 0x45ce31d07ad1b8f8ull, 0xaf280416958f3acbull
};
__constant__ u64 START[LANES] = {
    0x00000000c2b2ae3dull, 0x9e3779b185ebca87ull, 0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull,
    0x85ebca77c2b2ae63ull, 0x0000000085ebca77ull, 0x27d4eb2f165667c5ull, 0x000000009e3779b1ull
};

static __device__ __forceinline__ u64 product(u64 word, u64 secret) {
    u64 key = word ^ secret;
    return (key & 0xffffffffu) * (key >> 32);
}

// A word at any address; of memory around it no more than the aligned words that hold it.
static __device__ __forceinline__ u64 load_word(const unsigned char* at) {
    const u64* words = (const u64*)((u64)at & ~7ull);
    unsigned shift = 8 * ((u64)at & 7);
    u64 low = words[0];
    return shift == 0 ? low : low >> shift | words[1] << (64 - shift);
}

template <bool ALIGNED> static __device__ __forceinline__ Pair load_pair(const unsigned char* at) {
    if (ALIGNED) {
        uint4 four = __ldcs((const uint4*)at);
        return { four.x | (u64)four.y << 32, four.z | (u64)four.w << 32 };
    }
    return { load_word(at), load_word(at + 8) };
}

// What a lane holds of the blocks of its warp: two pairs of each, pairs lane and lane + 32.
template <bool ALIGNED>
static __device__ __forceinline__ void load_blocks(Pair* held, const StateSegment& segment, u64 first, u64 blocks) {
    unsigned lane = threadIdx.x & 31;
    for (unsigned j = 0; j < AHEAD; j++) {
        const unsigned char* at = segment.bytes + (first + j) * BLOCK_BYTES + 16 * lane;
        if (first + j < blocks) {
            held[2 * j] = load_pair<ALIGNED>(at);
            held[2 * j + 1] = load_pair<ALIGNED>(at + BLOCK_BYTES / 2);
        }
    }
}

static __device__ __forceinline__ void sum_blocks(const Pair* held, u64 (*sums)[LANES], u64 first, u64 blocks) {
    unsigned lane = threadIdx.x & 31, pair = lane & 3, stripe = lane >> 2;
    u64 secrets[4];
    for (unsigned i = 0; i < 4; i++) secrets[i] = SECRET[stripe + 8 * (i >> 1) + 2 * pair + (i & 1)];
    for (unsigned j = 0; j < AHEAD; j++) {
        if (first + j >= blocks) return;
        Pair one = held[2 * j], two = held[2 * j + 1];
        u64 low = one.high + product(one.low, secrets[0]) + two.high + product(two.low, secrets[2]);
        u64 high = one.low + product(one.high, secrets[1]) + two.low + product(two.high, secrets[3]);
        for (unsigned by = 4; by < 32; by *= 2) {
            low += __shfl_xor_sync(0xffffffffu, low, by);
            high += __shfl_xor_sync(0xffffffffu, high, by);
        }
        if (lane < 4) {
            sums[j][2 * pair] = low;
            sums[j][2 * pair + 1] = high;
        }
    }
}

// A warp's turns: batch after batch, the next one on its way before the block has met.
template <bool ALIGNED>
static __device__ __forceinline__ void
sum_segment(u64 (*sums)[BATCH][LANES], const StateSegment& segment, u64 blocks, unsigned batches) {
    Pair held[2 * AHEAD];
    unsigned own = threadIdx.x / 32 * AHEAD;
    load_blocks<ALIGNED>(held, segment, own, blocks);
    for (unsigned batch = 0; batch <= batches; batch++) {
        u64 first = (u64)batch * BATCH + own;
        sum_blocks(held, &sums[batch & 1][own], first, blocks);
        load_blocks<ALIGNED>(held, segment, first + BATCH, blocks);
        __syncthreads();
    }
}

static __device__ __forceinline__ u64 add_stripe(u64 sum, const unsigned char* stripe, unsigned lane, u64 secret) {
    return sum + load_word(stripe + 8 * (lane ^ 1)) + product(load_word(stripe + 8 * lane), secret);
}

// Eight sums a segment. One block of threads each, of SUMMING_WARPS + 1 warps.
extern "C" __global__ void __launch_bounds__(32 * (SUMMING_WARPS + 1), 2)
state_sums(const StateSegment* segments, u64* made) {
    __shared__ u64 sums[2][BATCH][LANES];
    StateSegment segment = segments[blockIdx.x];
    u64 blocks = (segment.length - 1) / BLOCK_BYTES;
    unsigned batches = (unsigned)((blocks + BATCH - 1) / BATCH);
    if (threadIdx.x < 32 * SUMMING_WARPS) {
        if (((u64)segment.bytes & 15) == 0) sum_segment<true>(sums, segment, blocks, batches);
        else sum_segment<false>(sums, segment, blocks, batches);
        return;
    }
    unsigned lane = threadIdx.x & (LANES - 1);
    u64 sum = START[lane], key = SECRET[16 + lane];
    for (unsigned batch = 0; batch <= batches; batch++) {
        if (batch > 0) {
            u64 left = blocks - (u64)(batch - 1) * BATCH;
            unsigned count = left < BATCH ? (unsigned)left : BATCH;
            const u64(*summed)[LANES] = sums[(batch - 1) & 1];
#pragma unroll 8
            for (unsigned i = 0; i < count; i++) {
                sum += summed[i][lane];
                sum = (sum ^ sum >> 47 ^ key) * 0x9e3779b1u;
            }
        }
        __syncthreads();
    }
    const unsigned char* rest = segment.bytes + blocks * BLOCK_BYTES;
    unsigned stripes = (unsigned)((segment.length - 1 - blocks * BLOCK_BYTES) / STRIPE_BYTES);
    for (unsigned i = 0; i < stripes; i++) {
        sum = add_stripe(sum, rest + i * STRIPE_BYTES, lane, SECRET[i + lane]);
    }
    sum = add_stripe(sum, segment.bytes + segment.length - STRIPE_BYTES, lane, LAST_SECRET[lane]);
    if ((threadIdx.x & 31) < LANES) made[(u64)blockIdx.x * LANES + lane] = sum;
}
