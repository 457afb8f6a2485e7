// What STORM rebuilds in one go: of a root-mean-square norm's input in bf16 that input in 32 bit, its normalised cast
// and the weighted result; of a gate its silu, and that times what is gated. Op by op the norm takes three launches
// and moves four times the bytes. Every value is rounded where the operations round it, so that the bits are theirs.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static __device__ float value_of(u32 bits) {
    union { u32 bits; float value; } both;
    both.bits = bits;
    return both.value;
}

static __device__ float widened(u32 half) { return value_of(half << 16); }

static __device__ u32 narrowed(float value) {
    union { float value; u32 bits; } both;
    both.value = value;
    if ((both.bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (both.bits + 0x7fffu + (both.bits >> 16 & 1)) >> 16;
}

// A block a row of `columns`, a multiple of 8; every address a multiple of 16. Without `narrow` the input is `wide`.
extern "C" __global__ void norm_again_bf16(const u16* narrow, const float* scale, const u16* weight, u32 columns,
                                           u32* wide, u16* normal, u16* weighted) {
    u64 row = (u64)blockIdx.x * columns;
    float factor = scale[blockIdx.x];
    for (u32 at = 8 * threadIdx.x; at < columns; at += 8 * blockDim.x) {
        uint4 by = *(const uint4*)(weight + at), low_half, high_half;
        if (narrow) {
            uint4 from = *(const uint4*)(narrow + row + at);
            low_half = make_uint4(from.x << 16, from.x & 0xffff0000u, from.y << 16, from.y & 0xffff0000u);
            high_half = make_uint4(from.z << 16, from.z & 0xffff0000u, from.w << 16, from.w & 0xffff0000u);
            *(uint4*)(wide + row + at) = low_half;
            *(uint4*)(wide + row + at + 4) = high_half;
        } else {
            low_half = *(const uint4*)(wide + row + at);
            high_half = *(const uint4*)(wide + row + at + 4);
        }
        u32 wides[8] = { low_half.x, low_half.y, low_half.z, low_half.w,
                         high_half.x, high_half.y, high_half.z, high_half.w };
        u32 weights[4] = { by.x, by.y, by.z, by.w }, normals[4], products[4];
#pragma unroll
        for (u32 p = 0; p < 4; p++) {
            u32 low = narrowed(value_of(wides[2 * p]) * factor), high = narrowed(value_of(wides[2 * p + 1]) * factor);
            normals[p] = low | high << 16;
            products[p] = narrowed(widened(weights[p] & 0xffff) * widened(low)) |
                          narrowed(widened(weights[p] >> 16) * widened(high)) << 16;
        }
        *(uint4*)(normal + row + at) = make_uint4(normals[0], normals[1], normals[2], normals[3]);
        *(uint4*)(weighted + row + at) = make_uint4(products[0], products[1], products[2], products[3]);
    }
}

static __device__ u32 gated(u32 gate) {
    float value = widened(gate);
    return narrowed(value / (1.0f + expf(-value)));
}

// A gate's silu and that times `up`; eight values a thread, `count` a multiple of 8.
extern "C" __global__ void gate_again_bf16(const u16* gate, const u16* up, u64 count, u16* silu, u16* product) {
    u64 at = 8 * (blockIdx.x * (u64)blockDim.x + threadIdx.x);
    if (at >= count) return;
    uint4 from = *(const uint4*)(gate + at), by = *(const uint4*)(up + at);
    u32 pairs[4] = { from.x, from.y, from.z, from.w }, ups[4] = { by.x, by.y, by.z, by.w }, silus[4], products[4];
#pragma unroll
    for (u32 p = 0; p < 4; p++) {
        u32 low = gated(pairs[p] & 0xffff), high = gated(pairs[p] >> 16);
        silus[p] = low | high << 16;
        products[p] = narrowed(widened(low) * widened(ups[p] & 0xffff)) |
                      narrowed(widened(high) * widened(ups[p] >> 16)) << 16;
    }
    *(uint4*)(silu + at) = make_uint4(silus[0], silus[1], silus[2], silus[3]);
    *(uint4*)(product + at) = make_uint4(products[0], products[1], products[2], products[3]);
}
