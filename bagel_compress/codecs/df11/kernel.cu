// DF11 decoding for Hopper and Ada. Design, limits and what was checked: cuda_kernel.py beside this file.
//
// A thread block decodes blocks of 4096 code bytes, one 64-bit window per thread:
//   count    entries of a shared-memory table (up to six exponents for 11 bits) are looked up and kept in registers
//   scan     warp shuffles, then one warp over the warps' sums: every thread's first weight
//   write    the kept entries' exponents go to shared memory
//   merge    exponents and sign-mantissa bytes, eight weights per thread, 16-byte coalesced stores
// The same functions compile for a CPU (-DDF11_HOST), where a test runs them thread by thread.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define THREADS 512
#define WINDOW 64
#define LOOKUP_BITS 11
#define KEPT 8  // entries kept in registers; a window needs about seven, the rest is looked up again

#ifdef DF11_HOST
#define DEVICE static inline
#define UNROLL
DEVICE int ones(u32 x) { return __builtin_popcount(x); }
DEVICE u64 big_endian(u64 x) { return __builtin_bswap64(x); }
#else
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
DEVICE int ones(u32 x) { return __popc(x); }
DEVICE u64 big_endian(u64 x) {
    return ((u64)__byte_perm((u32)x, 0, 0x0123) << 32) | __byte_perm((u32)(x >> 32), 0, 0x0123);
}
#endif

struct Unit {
    const u64 *table;      // 2^11 entries: 6 exponents of 8 bits, 12 bits of code ends, 4 bits of total length
    const u8 *luts;        // stored tables, the row of lengths last
    int tables;
    const u8 *stream;      // 8-byte aligned
    int stream_bytes;
    const u8 *rest;        // sign-mantissa bytes, 8-byte aligned
    const u32 *positions;  // first weight of every block, then the number of weights
    const u8 *gaps;
    int gap_bytes;
    u16 *out;              // 16-byte aligned
    int weights;
};

struct Window {
    u64 high, low;      // the window's bits and the next 64
    u64 kept[KEPT];     // exponents below, number of symbols in the top byte
    int gap, used, count;
};

DEVICE u64 load_word(const u8 *stream, long long at, int bytes) {
    if (at + 8 <= bytes) return big_endian(*(const u64 *)(stream + at));
    u64 word = 0;
    for (int k = 0; k < 8; ++k) word = word << 8 | (at + k < bytes ? stream[at + k] : 0);
    return word;
}

DEVICE int load_gap(const u8 *gaps, long long window, int gap_bytes) {
    long long bit = window * 5, at = bit >> 3;
    int pair = gaps[at] << 8 | (at + 1 < gap_bytes ? gaps[at + 1] : 0);
    return pair >> (11 - (int)(bit & 7)) & 31;
}

// One code by the stored tables. A slot below the padding's code may lead nowhere: it must not loop.
DEVICE u32 walk(const u8 *luts, int tables, u64 bits, int *length) {
    u32 value = luts[bits >> 56];
    UNROLL
    for (int level = 1; level < 4; ++level) {
        int row = 256 - (int)value;
        if (value >= 240 && row < tables) value = luts[row * 256 + (bits >> (56 - 8 * level) & 255)];
    }
    int found = luts[tables * 256 + value];
    *length = found ? found : 1;
    return value;
}

// The entry at bit `used` of a window: exponents in the low 48 bits, symbols that start in the window in the top byte.
DEVICE u64 look_up(const u64 *table, const u8 *luts, int tables, u64 high, u64 low, int *used) {
    u64 bits = high << *used | low >> 1 >> (63 - *used);
    u64 entry = table[bits >> (64 - LOOKUP_BITS)];
    int length = (int)(entry >> 60), room = WINDOW - *used;
    u32 ends = (u32)(entry >> 48) & 0xFFF;
    int symbols = ones(length < room ? ends : ends & ((1u << (room < 13 ? room - 1 : 12)) - 1)) + (length >= room);
    if (length == 0) {
        entry = walk(luts, tables, bits, &length);
        symbols = 1;
    }
    *used += length;
    return (entry & 0xFFFFFFFFFFFFull) | (u64)symbols << 56;
}

DEVICE void count_window(struct Window *w, const struct Unit *u, const u64 *table, const u8 *luts, long long window) {
    w->high = load_word(u->stream, window * 8, u->stream_bytes);
    w->low = load_word(u->stream, window * 8 + 8, u->stream_bytes);
    w->gap = load_gap(u->gaps, window, u->gap_bytes);
    int used = w->gap, count = 0;
    UNROLL
    for (int k = 0; k < KEPT; ++k) {
        w->kept[k] = used < WINDOW ? look_up(table, luts, u->tables, w->high, w->low, &used) : 0;
        count += (int)(w->kept[k] >> 56);
    }
    w->used = used;
    while (used < WINDOW) count += (int)(look_up(table, luts, u->tables, w->high, w->low, &used) >> 56);
    w->count = count;
}

DEVICE int put(u8 *staging, int at, int end, u64 entry) {
    for (int left = (int)(entry >> 56); left > 0; --left, entry >>= 8, ++at)
        if (at < end) staging[at] = (u8)entry;
    return at;
}

// `at`: this window's first place in `staging`; nothing is written from `end` on.
DEVICE void write_window(const struct Window *w, const struct Unit *u, const u64 *table, const u8 *luts, u8 *staging,
                         int at, int end) {
    UNROLL
    for (int k = 0; k < KEPT; ++k) at = put(staging, at, end, w->kept[k]);
    int used = w->used;
    while (used < WINDOW) at = put(staging, at, end, look_up(table, luts, u->tables, w->high, w->low, &used));
}

DEVICE u32 merge_one(u32 exponent, u32 byte) { return (byte & 0x80) << 8 | exponent << 7 | (byte & 0x7F); }

// Weights [first, stop) of a block whose exponents begin at staging[first % 8], by one of THREADS threads.
DEVICE void merge_block(const struct Unit *u, const u8 *staging, int first, int stop, int thread) {
    int base = first & ~7;
    for (long long i = base + 8ll * thread; i < stop; i += 8ll * THREADS) {
        if (i >= first && i + 8 <= stop) {
            u64 exponents = *(const u64 *)(staging + (i - base)), bytes = *(const u64 *)(u->rest + i);
            u32 pairs[4];
            UNROLL
            for (int k = 0; k < 4; ++k) {
                u32 e = (u32)(exponents >> (16 * k)), b = (u32)(bytes >> (16 * k));
                pairs[k] = merge_one(e & 255, b & 255) | merge_one(e >> 8 & 255, b >> 8 & 255) << 16;
            }
#ifdef DF11_HOST
            __builtin_memcpy(u->out + i, pairs, 16);
#else
            *(uint4 *)(u->out + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#endif
        } else {
            for (long long k = i < first ? first : i; k < i + 8 && k < stop; ++k)
                u->out[k] = (u16)merge_one(staging[k - base], u->rest[k]);
        }
    }
}

#ifndef DF11_HOST
// Exclusive prefix sum over the THREADS threads of a block; `sums` holds THREADS / 32 + 1 ints.
DEVICE int scan(int value, int *sums) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, total = value;
    UNROLL
    for (int step = 1; step < 32; step <<= 1) {
        int other = __shfl_up_sync(0xFFFFFFFF, total, step);
        if (lane >= step) total += other;
    }
    if (lane == 31) sums[warp] = total;
    __syncthreads();
    if (warp == 0) {
        int sum = lane < THREADS / 32 ? sums[lane] : 0;
        UNROLL
        for (int step = 1; step < THREADS / 32; step <<= 1) {
            int other = __shfl_up_sync(0xFFFFFFFF, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane < THREADS / 32) sums[lane] = sum;
    }
    __syncthreads();
    return total - value + (warp ? sums[warp - 1] : 0);
}

extern "C" __global__ void __launch_bounds__(THREADS)
df11_decode(const u64 *table, const u8 *luts, int tables, const u8 *stream, int stream_bytes, const u8 *rest,
            const u32 *positions, const u8 *gaps, int gap_bytes, u16 *out, int weights, int blocks, int staging_bytes) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ int sums[THREADS / 32 + 1];
    u64 *near_table = (u64 *)shared;
    u8 *near_luts = shared + 8 * (1 << LOOKUP_BITS);
    u8 *staging = near_luts + 256 * (tables + 1);
    struct Unit u = {table, luts, tables, stream, stream_bytes, rest, positions, gaps, gap_bytes, out, weights};

    for (int i = threadIdx.x; i < 1 << LOOKUP_BITS; i += THREADS) near_table[i] = table[i];
    for (int i = threadIdx.x; i < 64 * (tables + 1); i += THREADS) ((u32 *)near_luts)[i] = ((const u32 *)luts)[i];
    __syncthreads();

    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        struct Window w;
        count_window(&w, &u, near_table, near_luts, (long long)block * THREADS + threadIdx.x);
        int first = (int)positions[block], stop = min((int)positions[block + 1], weights);
        int shift = first & 7, end = min(shift + stop - first, staging_bytes);
        write_window(&w, &u, near_table, near_luts, staging, shift + scan(w.count, sums), end);
        __syncthreads();
        merge_block(&u, staging, first, stop, threadIdx.x);
        __syncthreads();
    }
}
#endif
