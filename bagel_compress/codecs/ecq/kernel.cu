// ecq decoding, a thread per run. Design, limits and what was checked: cuda_kernel.py beside this file.
//
// The same functions compile for a CPU (-DECQ_HOST), where a test runs them thread by thread.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define THREADS 128
#define RUN 2048
#define STATES 4096
#define ESCAPE 255
#define CENTRE 127

#ifdef ECQ_HOST
#include <string.h>
#define DEVICE static inline
#define UNROLL
DEVICE u32 float_bits(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
#else
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
#endif

struct Weight {
    const u8 *stream;  // 4-byte aligned
    long long bytes;
    const long long *offsets;  // first byte of every run, then the end of the last
    int low_bits;
    float step;
    const float *column_steps;  // of `width` columns, instead of `step`; or 0
    int width;
    long long weights;
};

struct Bits {
    u64 held;
    int count;       // of bits in `held`
    long long next;  // 4-byte word of the stream that comes next
};

// A 4-byte word of the stream; zeros behind its end, so that no damage leads out of it.
DEVICE u32 load_word(const struct Weight *w, long long word) {
    if (4 * word + 4 <= w->bytes) return ((const u32 *)w->stream)[word];
    u32 value = 0;
    for (int k = 0; k < 4; ++k)
        if (4 * word + k < w->bytes) value |= (u32)w->stream[4 * word + k] << (8 * k);
    return value;
}

DEVICE void open_bits(struct Bits *b, const struct Weight *w, long long at) {
    b->next = (at >> 5) + 1;
    b->held = load_word(w, at >> 5) >> (at & 31);
    b->count = 32 - (int)(at & 31);
}

// Room for two steps of the coder: at most 24 bits.
DEVICE void refill(struct Bits *b, const struct Weight *w) {
    if (b->count >= 32) return;
    b->held |= (u64)load_word(w, b->next++) << b->count;
    b->count += 32;
}

DEVICE u32 take_step(struct Bits *b, const u32 *table, u32 *state) {
    u32 entry = table[*state];
    int bits = (int)(entry >> 8 & 255);
    *state = (entry >> 16) + ((u32)b->held & ((1u << bits) - 1));
    b->held >>= bits;
    b->count -= bits;
    return entry & 255;
}

DEVICE u32 low_bits_of(const struct Weight *w, long long run_start, int plane, int i) {
    u32 low = 0;
    for (int bit = 0; bit < w->low_bits; ++bit) {
        long long at = run_start + 2 + (long long)bit * plane + (i >> 3);
        low |= (u32)(w->stream[at < w->bytes ? at : 0] >> (i & 7) & 1) << bit;
    }
    return low;
}

DEVICE u32 rounded(float value) {
    u32 bits = float_bits(value);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// The j-th escape of a run that ends at byte `end`.
DEVICE u32 escaped(const struct Weight *w, long long end, int j) {
    long long at = end - 2 * (j + 1);
    if (at < 0) at = 0;
    return at + 1 < w->bytes ? w->stream[at] | (u32)w->stream[at + 1] << 8 : 0;
}

// The weights of one run to `out`, which is 16-byte aligned.
DEVICE void decode_run(const struct Weight *w, const u32 *table, long long run, u16 *out) {
    long long start = w->offsets[run], end = w->offsets[run + 1], left = w->weights - run * RUN;
    int size = left < RUN ? (int)left : RUN, plane = (size + 7) >> 3, escapes = 0;
    u32 header = w->stream[start] | (u32)w->stream[start + 1] << 8, state = header & (STATES - 1);
    int column = w->column_steps ? (int)(run * RUN % w->width) : 0;
    struct Bits bits;
    open_bits(&bits, w, 8 * (start + 2 + (long long)w->low_bits * plane) + (header >> 12));
    for (int i = 0; i < size; i += 8) {
        u32 pairs[4] = {0, 0, 0, 0};
        UNROLL
        for (int k = 0; k < 8; ++k) {
            if (i + k >= size) break;
            if ((k & 1) == 0) refill(&bits, w);
            u32 symbol = take_step(&bits, table, &state), word;
            if (symbol == ESCAPE) {
                word = escaped(w, end, escapes++);
            } else {
                int code = ((int)symbol - CENTRE) * (1 << w->low_bits);
                if (w->low_bits) code += (int)low_bits_of(w, start, plane, i + k);
                word = rounded((float)code * (w->column_steps ? w->column_steps[column] : w->step));
            }
            pairs[k >> 1] |= word << (16 * (k & 1));
            if (w->column_steps && ++column == w->width) column = 0;
        }
        if (i + 8 <= size) {
#ifdef ECQ_HOST
            memcpy(out + i, pairs, 16);
#else
            *(uint4 *)(out + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#endif
        } else {
            for (int k = 0; i + k < size; ++k) out[i + k] = (u16)(pairs[k >> 1] >> (16 * (k & 1)));
        }
    }
}

#ifndef ECQ_HOST
extern "C" __global__ void __launch_bounds__(THREADS)
ecq_decode(const u32 *table, const u8 *stream, long long bytes, const long long *offsets, int low_bits, float step,
           const float *column_steps, int width, long long weights, int first, int last, u16 *out) {
    __shared__ u32 near_table[STATES];
    for (int i = threadIdx.x; i < STATES; i += THREADS) near_table[i] = table[i];
    __syncthreads();
    struct Weight w = {stream, bytes, offsets, low_bits, step, width ? column_steps : 0, width, weights};
    int run = first + blockIdx.x * THREADS + threadIdx.x;
    if (run < last) decode_run(&w, near_table, run, out + (long long)(run - first) * RUN);
}
#endif
