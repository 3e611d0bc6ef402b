// The matrix tiles of a processor with AMX: eight registers of 16 rows of 64 bytes, of which one instruction multiplies
// two and adds the product to a third.
//
//   sums[16 rows][16 columns] += left[16 rows][16 pairs] * right[16 pairs][16 columns]
//
// Left rows are 32 numbers side by side; the right one holds pairs of its rows side by side, as AVX-512's products do.
// A place is 16 rows here: so many images at the same place of their maps, which share its kernels. What would have to
// be multiplied with the zeros around a map is left out, a third of all products on a map of 4x4.

#pragma once

#include "maps.h"

#ifdef __AMX_BF16__
#define MATRIX_TILES 1

#include <sys/syscall.h>
#include <unistd.h>

enum {
    MATRIX_ROWS = 16,      // of a tile
    MATRIX_DEPTH = 32,     // numbers of a row: what one instruction sums over
    MATRIX_PAIRS = 256,    // pairs of numbers in a tile
    MATRIX_STRIDE = 64,    // bytes from row to row: tiles lie densely in packed memory
};

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
    _tile_loadconfig(&config);
}

ALWAYS void give_tiles_back(const MatrixConfig *before) { _tile_loadconfig(before); }

// The compiler does not know that tiles are loaded from memory.
#define WRITTEN __asm__ volatile("" ::: "memory")

static inline int64_t blocks_of(int64_t channels) { return (channels + MATRIX_DEPTH - 1) / MATRIX_DEPTH; }

// 32 channels from `channel` at a place inside the map.
ALWAYS __m512i read_numbers(const Maps *maps, int64_t image, int64_t y, int64_t x, int64_t channel) {
    int64_t left = maps->channels - channel;
    __mmask32 mask = left >= MATRIX_DEPTH ? 0xffffffff : ((__mmask32)1 << left) - 1;
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

ALWAYS __m512 low_half(__m512i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(numbers)), 16));
}
ALWAYS __m512 high_half(__m512i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(numbers, 1)), 16));
}

#endif
