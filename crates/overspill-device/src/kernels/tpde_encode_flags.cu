// Encoder of mode F: a block of one warp packs a chunk, from its last group to its first, and writes words from the end of a
// piece of the scratch memory down. Heads are made of what `tpde_count` found. A chunk whose payload does not fit into
// its piece, or that its head does not provide for, is noted in the bitmap; the host packs its segment.

#define FLAG_GROUP 1024u
#define PIECE_BYTES(CHANGES) (2 * (CHANGES) + 1024)
#define FRONT_BYTES 160u  // mode and states take at most 141

struct FlagPacking {
    uint2 flags[256];         // of each key: the frequency of a change, and where its list of magnitudes lies or 0
    float2 reciprocals[256];  // of the frequencies of a change and of none
    u16 changed[FLAG_GROUP];
    u32 front[FRONT_BYTES / 4];
};

// States of the lanes, and where their words go.
struct Pushed {
    u8 *at, *least;  // the last word written; what lies below `least` is not to be written to
    u32 x;
    bool full;
    // Makes room in the states of the lanes that have none for a symbol of `frequency` of 2^bits.
    __device__ void spill(bool active, u32 frequency, u32 bits, u32 below) {
        bool spills = active && x >> (32 - bits) >= frequency;
        u32 who = __ballot_sync(ALL, spills);
        if (who) {
            u32 bytes = 2 * __popc(who);
            if ((u64)(at - least) < bytes) full = true;
            else at -= bytes;
            if (spills) {
                if (!full) *(u16*)(at + 2 * __popc(who & below)) = (u16)x;
                x >>= 16;
            }
        }
    }
    __device__ void push(bool active, u32 start, u32 frequency, float reciprocal, u32 below) {
        spill(active, frequency, 12, below);
        if (!active) return;
        // The quotient is below 2^20; rounded down throughout, this is it or one less.
        u32 quotient = __float2uint_rz(__fmul_rz(__uint2float_rz(x), reciprocal)), rest = x - quotient * frequency;
        if (rest >= frequency) { quotient++; rest -= frequency; }
        x = (quotient << 12) + rest + start;
    }
    __device__ void push_bits(u32 value, u32 width, u32 below) {
        spill(width != 0, 1, width, below);
        x = x << width | value;
    }
};

// Words of a chunk that a lane looks at: 8 neighbours, as often as there are steps.
template <typename W> struct Pair { Eight<W> old, fresh; };

template <typename W>
static __device__ Pair<W> load_pair(const W* base, const W* made, u32 at, u32 words, bool aligned) {
    return { load_eight<W>(base, at, words, aligned), load_eight<W>(made, at, words, aligned) };
}

// Where a list has a symbol; 0 if it has not.
static __device__ u32 find_symbol(const u32* list, u32 symbol) {
    u32 low = 0, high = __ldg(list) - 1;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if ((__ldg(list + 1 + middle) & 255) < symbol) low = middle + 1; else high = middle;
    }
    u32 entry = __ldg(list + 1 + low);
    return (entry & 255) == symbol ? entry + 1 : 0;
}

// Packs the changed words of a group, the last ones first. False if a class has no symbol for one.
template <typename W>
static __device__ bool push_changes(FlagPacking& shared, const u32* arena, Pushed& to, u32 changed, const W* base,
                                    const W* made, u32 shift, u32 mask, bool is_float, u32 lane, u32 below) {
    u32 count = __popc(changed), ends = scan(count, lane), total = __shfl_sync(ALL, ends, 31);
    u16* places = shared.changed + ends - count;
    while (changed) {
        u32 i = __ffs(changed) - 1;
        *places++ = (u16)(256 * (i >> 3) + 8 * lane + (i & 7));
        changed &= changed - 1;
    }
    __syncwarp();
    bool good = true;
    for (u32 from = (total + 31) & ~31u; from > 0;) {
        from -= 32;
        bool mine = from + lane < total;
        u32 at = mine ? shared.changed[from + lane] : 0, entry = 0, width = 0, bits = 0, list = 0;
        if (mine) {
            W old = base[at], step = (W)(flip<W>(made[at], is_float) - flip<W>(old, is_float));
            u32 size = size_of<W>(step);
            Split magnitude = split(size);
            uint2 known = shared.flags[(u32)old >> shift & mask];
            good = good && known.x;
            list = known.y;
            width = 1;
            bits = step >> (sizeof(W) * 8 - 1);
            if (list) {
                entry = find_symbol(arena + list, magnitude.symbol);
                good = good && entry;
                width += magnitude.width;
                bits |= low_bits(size, magnitude.width) << 1;
            }
        }
        if (sizeof(W) == 4) to.push_bits(width > 16 ? bits >> 16 : 0, width > 16 ? width - 16 : 0, below);
        to.push_bits(width < 16 ? bits : bits & 0xffff, min(width, 16), below);
        // An entry that was found has one added to it, which its symbol takes.
        u32 frequency = ((entry - 1) >> 8 & 4095) + 1, start = (entry - 1) >> 20;
        to.push(entry != 0, start, frequency, __frcp_rd((float)frequency), below);
    }
    __syncwarp();
    return good;
}

// Packs the flags of a lane's eight words, the last one first.
template <typename W>
static __device__ void push_flags(const FlagPacking& shared, Pushed& to, const Eight<W>& old, u32 changed, u32 there,
                                  u32 shift, u32 mask, u32 below) {
#pragma unroll
    for (u32 k = 0; k < 8; k++) {
        u32 i = 7 - k, key = (u32)old.word(i) >> shift & mask, g = shared.flags[key].x;
        float2 reciprocals = shared.reciprocals[key];
        bool is_set = changed >> i & 1;
        to.push(i < there && g, is_set ? 0 : g, is_set ? g : 4096 - g, is_set ? reciprocals.x : reciprocals.y, below);
    }
}

// Mode and states in front of the words, and the payload's check. By one warp, at the end.
static __device__ void finish_flags(FlagPacking& shared, Pushed& to, u8* end, u8* scratch, u64 term, u32* outcome,
                                    u32 lane) {
    u32 top = 31 - __clz(to.x), own = 4 + top, ends = scan(own, lane), bit = 8 + ends - own;
    for (u32 i = lane; i < FRONT_BYTES / 4; i += 32) shared.front[i] = 0;
    __syncwarp();
    if (lane == 0) atomicOr(&shared.front[0], 6u);
    put_bits(shared.front, bit, 4, top - 16);
    put_bits(shared.front, bit + 4, top, low_bits(to.x, top));
    u32 front = (8 + __shfl_sync(ALL, ends, 31) + 7) / 8;
    __syncwarp();
    u8* start = to.at - front;
    for (u32 i = lane; i < front; i += 32) start[i] = ((const u8*)shared.front)[i];
    __threadfence_block();
    __syncwarp();
    u32 bytes = (u32)(end - start);
    u64 sum = 0;
    for (u32 i = lane; 4 * i < bytes; i += 32) {
        u32 word = 0;
        for (u32 b = 0; b < 4 && 4 * i + b < bytes; b++) word |= (u32)start[4 * i + b] << (8 * b);
        sum += (u64)word * (2 * i + 1);
    }
    for (u32 step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    if (lane == 0) {
        u64 place = (u64)(start - scratch);
        outcome[0] = (u32)(place / 4);
        outcome[1] = bytes | (u32)(place & 3) << 30;
        outcome[2] = (u32)((sum + bytes * 0xd6e8feb86659fd93ull + term) * 0x9e3779b97f4a7c15ull >> 32);
    }
}

template <typename W>
static __device__ void encode_flags(const Segment* segments, u32 count, const u32* arena, u32* cursor, u8* scratch,
                                    u32 scratch_units, u32* outcomes, Status* status, u32* bitmap) {
    __shared__ FlagPacking shared;
    u32 lane = threadIdx.x, below = (1u << lane) - 1, unit = blockIdx.x;
    const Segment& segment = segment_of(segments, count, unit);
    u32 chunk = unit - segment.first, number = segment.bit + chunk, chunk_first = chunk << segment.chunk_log2;
    u32 words = min(1u << segment.chunk_log2, segment.words - chunk_first), changes = 0;
    u32* outcome = outcomes + 3 * number;
    u64 term = chunk * 0xa0761d6478bd642full + segment.seed;
    const u32* grains = (const u32*)segment.blob + (chunk_first >> GRAIN_LOG2);
    for (u32 i = 0; i < (words + (1u << GRAIN_LOG2) - 1) >> GRAIN_LOG2; i++) changes += grains[i];
    if (changes == 0) {
        if (lane == 0) {
            outcome[0] = outcome[1] = 0;
            outcome[2] = (u32)(term * 0x9e3779b97f4a7c15ull >> 32);
        }
        return;
    }
    u32 units = (PIECE_BYTES(changes) + 3) / 4, place = lane == 0 ? atomicAdd(cursor, units) : 0;
    place = __shfl_sync(ALL, place, 0);
    if ((u64)place + units > scratch_units) {
        if (lane == 0) leave(status, bitmap, number);
        return;
    }
    const u32* tables = arena + segment.sparse;
    u32 live = __ldg(tables);
    for (u32 key = lane; key < 256; key += 32) {
        uint2 own = make_uint2(0, 0);
        for (u32 q = 0; q < live; q++) {
            u32 packed = __ldg(tables + 2 + 3 * q);
            if (key >= (packed & 255) && key <= (packed >> 8 & 255)) {
                own = make_uint2(__ldg(tables + 3 + 3 * q), __ldg(tables + 4 + 3 * q));
            }
        }
        shared.flags[key] = own;
        shared.reciprocals[key] = { own.x ? __frcp_rd((float)own.x) : 0, __frcp_rd((float)(4096 - own.x)) };
    }
    __syncwarp();
    u8 *start = scratch + 4ull * place, *end = start + 4ull * units;
    Pushed to = { end, start + FRONT_BYTES, 65536, false };
    const W *base = (const W*)segment.base + chunk_first, *made = (const W*)segment.out + chunk_first;
    bool aligned = (((u64)base | (u64)made) & 15) == 0, is_float = segment.flags & IS_FLOAT, good = true;
    u32 shift = segment.key_shift, mask = segment.key_mask;
    for (u32 first = (words - 1) / FLAG_GROUP * FLAG_GROUP;; first -= FLAG_GROUP) {
        u32 changed = 0;
#pragma unroll 1
        for (u32 q = 0; q < 4; q++) {
            Pair<W> own = load_pair<W>(base, made, first + 256 * q + 8 * lane, words, aligned);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                if (own.old.word(i) != own.fresh.word(i)) changed |= 1u << (8 * q + i);
            }
        }
        good = push_changes<W>(shared, arena, to, changed, base + first, made + first, shift, mask, is_float, lane, below) && good;
#pragma unroll 1
        for (u32 q = 4; q-- > 0;) {
            u32 at = first + 256 * q + 8 * lane;
            Eight<W> old = load_eight<W>(base, at, words, aligned);
            push_flags<W>(shared, to, old, changed >> (8 * q), at < words ? words - at : 0, shift, mask, below);
        }
        if (first == 0) break;
    }
    good = __all_sync(ALL, good) && !to.full;
    // The words as they are would be shorter than this.
    if (!good || (u64)(end - to.at) + FRONT_BYTES > (u64)words * sizeof(W)) {
        if (lane == 0) leave(status, bitmap, number);
        return;
    }
    finish_flags(shared, to, end, scratch, term, outcome, lane);
}

#define ENCODE_FLAGS(NAME, W)                                                                                        \
    extern "C" __global__ void __launch_bounds__(32)                                                                 \
    NAME(const Segment* segments, u32 count, const u32* arena, u32* cursor, u8* scratch, u32 scratch_units,          \
         u32* outcomes, Status* status, u32* bitmap) {                                                               \
        encode_flags<W>(segments, count, arena, cursor, scratch, scratch_units, outcomes, status, bitmap);           \
    }
ENCODE_FLAGS(tpde_encode_flags_8, u8)
ENCODE_FLAGS(tpde_encode_flags_16, u16)
ENCODE_FLAGS(tpde_encode_flags_32, u32)
