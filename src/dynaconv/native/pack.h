// Kernels, (O, C, taps) float32 with 9 taps or one, to right tiles: 16 outputs and 32 channels at a time, by way of
// columns of 16 outputs for each channel and tap. Squares of 16 by 16 are transposed in registers; to gather a column's
// numbers one by one would take three times as long.

#pragma once

#include "matrix.h"

enum { TAPS = 9, COLUMNS = MATRIX_DEPTH * TAPS * LANES };  // numbers of columns, at most

// (32, taps, 16) columns of the rows of 16 outputs, or of those that are left: each row `numbers` long, or longer, and
// `step` numbers from the next.
static void columns_of_rows(const float *rows, int64_t step, int64_t outputs, int64_t numbers, int64_t taps,
                            float *columns) {
    for (int64_t first = 0; first < MATRIX_DEPTH * taps; first += LANES) {
        __mmask16 mask = numbers > first ? lanes_left(numbers - first) : 0;
        __m512i square[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            square[i] = _mm512_maskz_loadu_epi32(i < outputs ? mask : 0, rows + i * step + first);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) _mm512_store_si512(columns + (first + i) * LANES, square[i]);
    }
}

// The same of a kernel whose channels are rows and whose outputs lie side by side, turned by half a turn.
static void columns_turned(const float *rows, int64_t step, int64_t outputs, int64_t channels, int64_t taps,
                           float *columns) {
    for (int64_t channel = 0; channel < MATRIX_DEPTH; channel++, rows += step, columns += taps * LANES) {
        __m512i square[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            __mmask16 mask = i < outputs && channel < channels ? lanes_left(taps) : 0;
            square[i] = _mm512_maskz_loadu_epi32(mask, rows + i * taps);
        }
        transpose(square);
        for (int64_t tap = 0; tap < taps; tap++) _mm512_store_si512(columns + (taps - 1 - tap) * LANES, square[tap]);
    }
}

// Columns to `taps` tiles of 16 pairs of channels and 16 outputs, whose lines are `apart` numbers from each other.
static void pair_columns(const float *columns, int64_t taps, int64_t apart, uint32_t *to) {
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t pair = 0; pair < MATRIX_ROWS; pair++, to += apart) {
            const float *even = columns + (2 * pair * taps + tap) * LANES;
            _mm512_store_si512(to, interleave(_mm512_load_ps(even), _mm512_load_ps(even + taps * LANES)));
        }
}

// Outputs from `o` and channels from `channel` of a kernel; `turned`, for the backward pass, of the kernel that has C and
// O exchanged and is turned by half a turn.
static void pack_kernel(const float *kernel, int64_t taps, const Shape *s, int turned, int64_t o, int64_t channel,
                        int64_t apart, uint32_t *to) {
    float columns[COLUMNS] __attribute__((aligned(64)));
    int64_t step = s->channels * taps;
    if (turned)
        columns_turned(kernel + channel * step + o * taps, step, s->channels - o, s->outputs - channel, taps, columns);
    else
        columns_of_rows(kernel + o * step + channel * taps, step, s->outputs - o, (s->channels - channel) * taps, taps,
                        columns);
    pair_columns(columns, taps, apart, to);
}
