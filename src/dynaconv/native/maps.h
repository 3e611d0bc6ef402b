// Vectors of 16 numbers, and maps of (N, H, W, channels) bfloat16 that they are read from and stored to.

#pragma once

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16 };  // numbers in a vector

#define ALWAYS static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef struct {
    int64_t images, height, width, channels, outputs;
    int64_t kernels;  // K where kernels are mixed; 0 where there is one, the same for all images
} Shape;

static inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static inline __mmask16 lanes_left(int64_t left) { return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1); }

static inline __m512 load(const bf16 *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

static inline void store(bf16 *to, __m512 values, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// Lane i becomes the pair (low_i, high_i), the order in which a product of pairs reads its factors.
static inline __m512i interleave(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

static inline __m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
static inline __m512 second_of(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}
static inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// A vector that stays in its register: the compiler would rather load it again for each product, more often than the
// processor can.
ALWAYS __m512i held(__m512i vector) {
    __asm__("" : "+v"(vector));
    return vector;
}

// Aligned to a line of the cache: a vector across two lines costs twice as much.
static inline float *zeros(int64_t count) {
    float *space = aligned_alloc(64, up(most(1, count) * 4, 64));
    return space ? memset(space, 0, count * 4) : NULL;
}

// Maps of (N, H, W, channels): all of them, or what max-pooling by 2x2 left, (N, H / 2, W / 2, channels), with the
// place in its window, 0 to 3, that each number was taken from; all other places are zero.
typedef struct {
    const bf16 *numbers;
    const uint8_t *places;  // or none
    int64_t height, width, channels;
} Maps;
