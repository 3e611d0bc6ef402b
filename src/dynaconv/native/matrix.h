// The matrix tiles of a processor with AMX: eight registers of 16 rows of 64 bytes, of which one instruction multiplies
// two and adds the product to a third.
//
//   sums[16 rows][16 columns] += left[16 rows][16 pairs] * right[16 pairs][16 columns]
//
// Left rows are 32 numbers side by side; the right one holds pairs of its rows side by side, as AVX-512's products do,
// so that these can take the same tiles, a line at a time, where the processor has no such registers.

#pragma once

#include "finish.h"

enum {
    MATRIX_ROWS = 16,      // of a tile
    MATRIX_DEPTH = 32,     // numbers of a row: what one instruction sums over
    MATRIX_PAIRS = 256,    // pairs of numbers in a tile
    MATRIX_STRIDE = 64,    // bytes from row to row: tiles lie densely in packed memory
};

// To be said between writing memory and loading tiles from it, which the compiler does not know to read it.
#define WRITTEN __asm__ volatile("" ::: "memory")

#ifdef __AMX_BF16__
#define MATRIX_TILES 1

#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} MatrixConfig;

// What the thread had set, which torch's routines rely on to find again, and tiles for ours.
ALWAYS void take_tiles(MatrixConfig *before) {
    MatrixConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = MATRIX_STRIDE, config.rows[i] = MATRIX_ROWS;
    _tile_storeconfig(before);
    // GCC 12 takes the instructions to read and write a pointer's worth of these.
    __asm__ volatile("" : : "r"(&config), "r"(before) : "memory");
    _tile_loadconfig(&config);
}

ALWAYS void give_tiles_back(const MatrixConfig *before) { _tile_loadconfig(before); }

// The tiles of sums: four of a window, six of a gradient.
ALWAYS void zero_four(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
ALWAYS void zero_six(void) {
    zero_four();
    _tile_zero(4);
    _tile_zero(5);
}
// Adds the products of left tiles, those that are there, `there` numbers further on, and one right tile.
ALWAYS void multiply_four(const bf16 *const at[4], int64_t there, const uint32_t *right) {
    _tile_loadd(4, right, MATRIX_STRIDE);
#define MULTIPLY(i, left)                                \
    if (at[i]) {                                         \
        _tile_loadd(left, at[i] + there, MATRIX_STRIDE); \
        _tile_dpbf16ps(i, left, 4);                      \
    }
    MULTIPLY(0, 5)
    MULTIPLY(1, 6)
    MULTIPLY(2, 7)
    MULTIPLY(3, 5)
#undef MULTIPLY
}
ALWAYS void store_four(float *to) {
    _tile_stored(0, to, MATRIX_STRIDE);
    _tile_stored(1, to + MATRIX_PAIRS, MATRIX_STRIDE);
    _tile_stored(2, to + 2 * MATRIX_PAIRS, MATRIX_STRIDE);
    _tile_stored(3, to + 3 * MATRIX_PAIRS, MATRIX_STRIDE);
}
ALWAYS void store_six(float *to) {
    store_four(to);
    _tile_stored(4, to + 4 * MATRIX_PAIRS, MATRIX_STRIDE);
    _tile_stored(5, to + 5 * MATRIX_PAIRS, MATRIX_STRIDE);
}

#else
// Without such registers there is nothing to take.
typedef struct {
    char none;
} MatrixConfig;

ALWAYS void take_tiles(MatrixConfig *before) { before->none = 0; }
ALWAYS void give_tiles_back(const MatrixConfig *before) { (void)before; }
#endif

static inline int64_t blocks_of(int64_t channels) { return (channels + MATRIX_DEPTH - 1) / MATRIX_DEPTH; }

ALWAYS __mmask32 numbers_left(int64_t left) {
    return left >= MATRIX_DEPTH ? 0xffffffff : ((__mmask32)1 << left) - 1;
}

// 32 channels from `channel` at a place inside the map.
ALWAYS __m512i read_numbers(const Maps *maps, int64_t image, int64_t y, int64_t x, int64_t channel) {
    __mmask32 mask = numbers_left(maps->channels - channel);
    if (!maps->places)
        return _mm512_maskz_loadu_epi16(
            mask, maps->numbers + ((image * maps->height + y) * maps->width + x) * maps->channels + channel);
    int64_t height = maps->height / 2, width = maps->width / 2;
    if (y / 2 >= height || x / 2 >= width) return _mm512_setzero_si512();
    int64_t place = ((image * height + y / 2) * width + x / 2) * maps->channels + channel;
    __m256i here = _mm256_set1_epi8((char)(y % 2 * 2 + x % 2));
    mask = _mm256_mask_cmpeq_epi8_mask(mask, _mm256_maskz_loadu_epi8(mask, maps->places + place), here);
    return _mm512_maskz_loadu_epi16(mask, maps->numbers + place);
}

// 32 channels at a place, zeros outside the map.
ALWAYS __m512i read_around(const Maps *maps, int64_t image, int64_t y, int64_t x, int64_t channel) {
    if (y < 0 || y >= maps->height || x < 0 || x >= maps->width) return _mm512_setzero_si512();
    return read_numbers(maps, image, y, x, channel);
}

// A row of maps that were not pooled, or none outside the map. The row after the next is fetched from memory meanwhile,
// which takes several times as long as to use it.
ALWAYS const bf16 *row_or_none(const Maps *maps, int64_t image, int64_t y) {
    int64_t numbers = maps->width * maps->channels;
    const bf16 *row = maps->numbers + (image * maps->height + y) * numbers;
    for (int64_t i = 0; i < numbers; i += MATRIX_DEPTH)
        _mm_prefetch((const char *)(row + 2 * numbers + i), _MM_HINT_T0);
    return y >= 0 && y < maps->height ? row : NULL;
}

// 32 channels of it, zeros outside.
ALWAYS __m512i read_in_row(const Maps *maps, const bf16 *row, int64_t x, int64_t channel) {
    if (!row || x < 0 || x >= maps->width) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(numbers_left(maps->channels - channel), row + x * maps->channels + channel);
}

ALWAYS __m512 low_half(__m512i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(numbers)), 16));
}
ALWAYS __m512 high_half(__m512i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(numbers, 1)), 16));
}

// Pairs (a_i, b_i) of the first 16 numbers of two lines, and of the last 16.
static inline __m512i pair_low(__m512i a, __m512i b) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(a, order, b);
}
static inline __m512i pair_high(__m512i a, __m512i b) {
    const __m512i order = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                                           22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    return _mm512_permutex2var_epi16(a, order, b);
}

// 16 rows of 16 to 16 columns.
static inline void transpose(__m512i r[LANES]) {
    __m512i t[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Multiplies 2x2 sums of 32 outputs from `o`, a whole line of the cache, by the scale, adds the residual, and stores
// them or the largest of each window. The residual lies at `beside`, for each place, if it is known to. Returns the
// inner product of the probe and the sums before that.
ALWAYS __m512 finish_outputs(__m512 low[4], __m512 high[4], const Shape *s, int64_t image, int64_t y, int64_t x,
                             int64_t o, __m512 scale, const bf16 *const *beside, int64_t there, const Finish *finish,
                             const int pooled, const int added, const int probed) {
    __mmask32 mask = numbers_left(s->outputs - o);
    __m512 product = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        int64_t down = y + j / 2, right = x + j % 2, place = (image * s->height + down) * s->width + right;
        int inside = down < s->height && right < s->width;
        if (probed && inside) {
            __m512i other = read_numbers(finish->probe, image, down, right, o);
            _mm_prefetch((const char *)(finish->probe->numbers + (place + 2) * s->outputs + o), _MM_HINT_T0);
            product = _mm512_fmadd_ps(low[j], low_half(other), product);
            product = _mm512_fmadd_ps(high[j], high_half(other), product);
        }
        if (added && inside) {
            __m512i other = beside ? _mm512_load_si512(beside[j] + there)
                                   : read_numbers(finish->residual, image, down, right, o);
            low[j] = _mm512_fmadd_ps(low[j], scale, low_half(other));
            high[j] = _mm512_fmadd_ps(high[j], scale, high_half(other));
        } else {
            low[j] = _mm512_mul_ps(low[j], scale), high[j] = _mm512_mul_ps(high[j], scale);
        }
        if (!pooled && inside && finish->to)
            _mm512_mask_storeu_epi16(finish->to + place * s->outputs + o, mask,
                                     (__m512i)_mm512_cvtne2ps_pbh(high[j], low[j]));
    }
    if (!pooled || y + 1 >= s->height || x + 1 >= s->width) return product;
    __m128i from[2];
    __m512 first = largest_of(low, from), second = largest_of(high, from + 1);
    int64_t place = ((image * (s->height / 2) + y / 2) * (s->width / 2) + x / 2) * s->outputs + o;
    _mm512_mask_storeu_epi16(finish->to + place, mask, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    _mm256_mask_storeu_epi8(finish->places + place, mask, _mm256_set_m128i(from[1], from[0]));
    return product;
}
