// Work on plain bytes, in the order of a stream: what the conformance suite computes with and what a
// doctor checks a card with. One thread a byte, grid-stride; speed is not their job.

typedef unsigned char u8;
typedef unsigned long long u64;

static __device__ u64 first() { return blockIdx.x * (u64)blockDim.x + threadIdx.x; }
static __device__ u64 step() { return gridDim.x * (u64)blockDim.x; }

// bytes[i] = value
extern "C" __global__ void fill(u8* bytes, u64 length, unsigned value) {
    for (u64 i = first(); i < length; i += step()) bytes[i] = (u8)value;
}

// bytes[i] = bytes[i] * 31 + value: two of these in the wrong order give other bytes.
extern "C" __global__ void fold(u8* bytes, u64 length, unsigned value) {
    for (u64 i = first(); i < length; i += step()) bytes[i] = (u8)(bytes[i] * 31 + value);
}

// to[i] = from[i]
extern "C" __global__ void copy(u8* to, const u8* from, u64 length) {
    for (u64 i = first(); i < length; i += step()) to[i] = from[i];
}

// Adds to *count the positions at which the two differ. The caller zeroes it.
extern "C" __global__ void count_differing(const u8* left, const u8* right, u64 length, u64* count) {
    u64 here = 0;
    for (u64 i = first(); i < length; i += step()) here += left[i] != right[i];
    if (here) atomicAdd(count, here);
}

// Keeps the stream busy. One thread is enough.
extern "C" __global__ void spin(u64 duration_ns) {
    u64 start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < duration_ns);
}
