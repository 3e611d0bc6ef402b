// Convolutions with 3x3 kernels, zeros around the map, stride one, by Winograd's F(2x2, 3x3) in bfloat16, and the
// mixture of K of them, for x86 processors with AVX-512 and its products of bfloat16. `native/__init__.py` builds it.
//
//   Y_n = A' [ sum_k a_nk (G w_k G') * (B' x_n B) ] A + R_n
//
// The kernels of one image are mixed between the transforms, a panel at a time, and the panel is used up before it
// leaves the nearest cache: K convolutions cost one, and no mixed kernel is ever written to memory. Every thread takes
// chunks of tile rows of its own, transformed, multiplied and transformed back within its cache; only where gradients
// are larger than the caches, threads share the chunks.
//
// Letters: N images, H W map, C channels in, O channels out, K kernels, F = 16 products of a tile of 2x2 outputs.
// Maps are (N, H, W, channels) bfloat16. Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks
// (arXiv:1509.09308).

#pragma once

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    F = 16,
    LANES = 16,      // numbers in a vector
    PANEL = 4,       // vectors of outputs side by side, for which sums are held in registers
    ROWS = 6,        // tiles of the same
    FEW = 4,         // channels of the same, in the backward pass
};

static const int64_t MOST_SUMS = (int64_t)12 << 20;  // bytes of a thread's own gradients

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

// Aligned to a line of the cache: a vector across two lines costs twice as much.
static inline float *zeros(int64_t count) {
    float *space = aligned_alloc(64, up(most(1, count) * 4, 64));
    return space ? memset(space, 0, count * 4) : NULL;
}

// How the tile rows of all images, one image after the other, are cut into chunks.
typedef struct {
    int64_t tile_rows, tiles_across, rows_at_once, chunks;
} Plan;

// A chunk is as large as the transformed kernels that it goes through, so that those are read about as often as the
// chunk is, within what the caches of one core and of all cores hold: measured, and flat around that.
static inline Plan plan(const Shape *s, int64_t bytes_per_tile, int64_t kernel_bytes, int threads) {
    int64_t chunk_bytes = most((int64_t)1 << 20, least(kernel_bytes, (int64_t)1 << 23));
    Plan p = {(s->height + 1) / 2, (s->width + 1) / 2, 0, 0};
    int64_t rows = s->images * p.tile_rows;
    int64_t wanted = most(1, least(chunk_bytes / (bytes_per_tile * p.tiles_across), rows / (2 * threads)));
    if (wanted >= p.tile_rows) {
        wanted = wanted / p.tile_rows * p.tile_rows;
    } else {  // parts of one image, as equal as can be
        int64_t parts = (p.tile_rows + wanted - 1) / wanted;
        wanted = (p.tile_rows + parts - 1) / parts;
    }
    p.rows_at_once = wanted;
    p.chunks = (rows + wanted - 1) / wanted;
    return p;
}

// Where number (f, row, slot, column) of transformed kernels lies: in panels of 64 columns, the last as wide as is
// left, each (rows, slots, columns of the panel).
static inline int64_t at(int64_t f, int64_t row, int64_t slot, int64_t column, int64_t rows, int64_t slots,
                         int64_t columns) {
    int64_t panel = column / (PANEL * LANES) * (PANEL * LANES), width = least(PANEL * LANES, columns - panel);
    return rows * slots * (f * columns + panel) + (row * slots + slot) * width + column - panel;
}

// Maps of (N, H, W, channels): all of them, or what max-pooling by 2x2 left, (N, H / 2, W / 2, channels), with the
// place in its window, 0 to 3, that each number was taken from; all other places are zero.
typedef struct {
    const bf16 *numbers;
    const uint8_t *places;  // or none
    int64_t height, width, channels;
} Maps;

// 16 channels from `channel` at one place of one image; zeros outside the map and where `mask` is zero.
static inline __m512 read_place(const Maps *maps, int64_t image, int64_t y, int64_t x, int64_t channel,
                                __mmask16 mask) {
    if (y < 0 || y >= maps->height || x < 0 || x >= maps->width) return _mm512_setzero_ps();
    if (!maps->places)
        return load(maps->numbers + ((image * maps->height + y) * maps->width + x) * maps->channels + channel, mask);
    int64_t height = maps->height / 2, width = maps->width / 2;
    if (y / 2 >= height || x / 2 >= width) return _mm512_setzero_ps();
    int64_t place = ((image * height + y / 2) * width + x / 2) * maps->channels + channel;
    __m128i taken = _mm_maskz_loadu_epi8(mask, maps->places + place), here = _mm_set1_epi8((char)(y % 2 * 2 + x % 2));
    return load(maps->numbers + place, _mm_mask_cmpeq_epi8_mask(mask, taken, here));
}

// One column of a tile row, four places high from y, through B'.
static inline void read_column(const Maps *maps, int64_t image, int64_t y, int64_t x, int64_t channel, __mmask16 mask,
                               __m512 t[4]) {
    __m512 d[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) d[i] = read_place(maps, image, y + i, x, channel, mask);
    t[0] = _mm512_sub_ps(d[0], d[2]);
    t[1] = _mm512_add_ps(d[1], d[2]);
    t[2] = _mm512_sub_ps(d[2], d[1]);
    t[3] = _mm512_sub_ps(d[1], d[3]);
}

static inline void finish_tile(__m512 column[4][4], __m512 v[F]) {
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        v[4 * i + 0] = _mm512_sub_ps(column[0][i], column[2][i]);
        v[4 * i + 1] = _mm512_add_ps(column[1][i], column[2][i]);
        v[4 * i + 2] = _mm512_sub_ps(column[2][i], column[1][i]);
        v[4 * i + 3] = _mm512_sub_ps(column[1][i], column[3][i]);
    }
}
