// Runs kernels on the host: the same source, compiled as C++ behind this header. Blocks run one after the other;
// the threads of a block are fibres that switch at barriers and warp collectives only, so what the emulation
// checks is logic, not races. A collective with lanes missing ends the process.
#define EMULATED
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __constant__ static const
#define __restrict__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct dim3 { unsigned x, y, z; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return { x, y }; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return { x, y, z, w }; }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

namespace emulated {

struct Fibre {
    ucontext_t context;
    dim3 thread;
    const unsigned* generation;  // what it waits for to change; null if it can run
    unsigned awaited;
    bool done;
};
struct Meeting {
    unsigned arrived, generation;
    unsigned long long values[32], results[32];
};

static std::vector<Fibre> fibres;
static std::vector<std::vector<char>> stacks;
static Meeting meetings[32];
static unsigned block_arrived, block_generation, block_any, block_result;
static ucontext_t scheduler;
static Fibre* current;
static dim3 block_index, block_size, grid_size;
static void (*body)();

static inline void wait(const unsigned* generation) {
    current->generation = generation;
    current->awaited = *generation;
    Fibre* self = current;
    swapcontext(&self->context, &scheduler);
}

// Every lane's value, once all 32 have come.
static inline const unsigned long long* meet(unsigned long long value) {
    unsigned lane = current->thread.x & 31;
    Meeting& meeting = meetings[current->thread.x >> 5];
    meeting.values[lane] = value;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived == 0xffffffffu) {
        memcpy(meeting.results, meeting.values, sizeof meeting.values);
        meeting.arrived = 0;
        meeting.generation++;
    } else {
        wait(&meeting.generation);
    }
    return meeting.results;
}

static inline int barrier(int value) {
    block_any |= value != 0;
    if (++block_arrived == block_size.x) {
        block_result = block_any;
        block_any = block_arrived = 0;
        block_generation++;
    } else {
        wait(&block_generation);
    }
    return block_result;
}

static void start() {
    body();
    current->done = true;
    setcontext(&scheduler);
}

static void run_block() {
    unsigned count = block_size.x, left = count;
    block_arrived = block_any = 0;
    memset(meetings, 0, sizeof meetings);
    for (unsigned i = 0; i < count; i++) {
        Fibre& fibre = fibres[i];
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = stacks[i].data();
        fibre.context.uc_stack.ss_size = stacks[i].size();
        fibre.context.uc_link = nullptr;
        fibre.thread = { i, 0, 0 };
        fibre.generation = nullptr;
        fibre.done = false;
        makecontext(&fibre.context, start, 0);
    }
    while (left) {
        bool moved = false;
        for (unsigned i = 0; i < count; i++) {
            Fibre& fibre = fibres[i];
            if (fibre.done || (fibre.generation && *fibre.generation == fibre.awaited)) continue;
            fibre.generation = nullptr;
            current = &fibre;
            swapcontext(&scheduler, &fibre.context);
            moved = true;
            left -= fibre.done;
        }
        if (!moved) {
            fprintf(stderr, "emulated block %u: %u threads wait for ever\n", block_index.x, left);
            abort();
        }
    }
}

typedef uint64_t Arg;
typedef void (*Kernel)(Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg);
static Kernel kernel;
static Arg arguments[12];
static void call() {
    Arg* a = arguments;
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
}

// Bytes of eight, or (selectors from 8 on) their signs.
static inline unsigned permute(unsigned low, unsigned high, unsigned take) {
    unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned made = 0;
    for (unsigned i = 0; i < 4; i++) {
        unsigned selector = take >> (4 * i) & 15, byte = both >> (8 * (selector & 7)) & 255;
        made |= (selector < 8 ? byte : byte >> 7 ? 255 : 0) << (8 * i);
    }
    return made;
}

}  // namespace emulated

static uint4 dynamic_shared[(256 << 10) / 16];

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

static inline void __syncwarp(unsigned = 0xffffffffu) { emulated::meet(0); }
static inline void __syncthreads() { emulated::barrier(0); }
static inline int __syncthreads_or(int value) { return emulated::barrier(value); }
static inline unsigned __ballot_sync(unsigned, int value) {
    const unsigned long long* all = emulated::meet(value != 0);
    unsigned mask = 0;
    for (unsigned i = 0; i < 32; i++) mask |= (unsigned)all[i] << i;
    return mask;
}
static inline int __all_sync(unsigned, int value) { return __ballot_sync(0, value) == 0xffffffffu; }
static inline int __any_sync(unsigned, int value) { return __ballot_sync(0, value) != 0; }
template <typename T> static inline T __shfl_sync(unsigned, T value, int lane) { return (T)emulated::meet(value)[lane & 31]; }
template <typename T> static inline T __shfl_xor_sync(unsigned, T value, int mask) {
    unsigned lane = threadIdx.x & 31;
    return (T)emulated::meet(value)[(lane ^ mask) & 31];
}
template <typename T> static inline T __shfl_up_sync(unsigned, T value, unsigned by) {
    unsigned lane = threadIdx.x & 31;
    return (T)emulated::meet(value)[lane >= by ? lane - by : lane];
}
template <typename T> static inline T __shfl_down_sync(unsigned, T value, unsigned by) {
    unsigned lane = threadIdx.x & 31;
    return (T)emulated::meet(value)[lane + by < 32 ? lane + by : lane];
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((((unsigned long long)high << 32) | low) >> (shift & 31));
}
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned take) {
    return emulated::permute(low, high, take & 0x7777);
}
template <typename T> static inline T __ldg(const T* p) { return *p; }
template <typename T> static inline T __ldcs(const T* p) { return *p; }
template <typename T> static inline void __stcs(T* p, T value) { *p = value; }
template <typename T> static inline T atomicCAS(T* p, T expected, T value) {
    T old = *p;
    if (old == expected) *p = value;
    return old;
}
template <typename T> static inline T atomicOr(T* p, T value) { T old = *p; *p = old | value; return old; }
template <typename T> static inline T atomicMin(T* p, T value) { T old = *p; *p = old < value ? old : value; return old; }
template <typename T> static inline T atomicAdd(T* p, T value) { T old = *p; *p = old + value; return old; }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
static inline float __uint2float_rz(unsigned x) { return (float)(x & (x < 1u << 24 ? ~0u : ~0u << (8 - __builtin_clz(x)))); }
static inline void __threadfence_block() {}
static inline float __fmul_rz(float a, float b) {
    float product = a * b;
    return (double)product > (double)a * b ? nextafterf(product, 0) : product;
}
static inline float __frcp_rd(float x) {
    float made = 1 / x;
    return (double)made * x > 1 ? nextafterf(made, 0) : made;
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }

extern "C" void emulate(void* function, unsigned grid, unsigned threads, const uint64_t* arguments, unsigned count) {
    using namespace emulated;
    if (fibres.size() < threads) {
        fibres.resize(threads);
        stacks.resize(threads);
        for (auto& stack : stacks) stack.resize(64 << 10);
    }
    kernel = (Kernel)function;
    memset(emulated::arguments, 0, sizeof emulated::arguments);
    memcpy(emulated::arguments, arguments, count * sizeof(uint64_t));
    body = call;
    grid_size = { grid, 1, 1 };
    block_size = { threads, 1, 1 };
    for (unsigned i = 0; i < grid; i++) {
        block_index = { i, 0, 0 };
        // What a block did not write itself is not there.
        memset(dynamic_shared, 0xa5, sizeof dynamic_shared);
        run_block();
    }
}
