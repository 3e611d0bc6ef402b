// Convolutions of one image with a kernel of its own, on matrix tiles or without: a product's 16 rows are 16 places of
// the image, one after the other along its rows.

#pragma once

#include "pack.h"

// How the maps of an image are packed: in planes of 32 channels, with zeros around. If the map's rows are whole tiles,
// the places to the left of 16 are 16 lines of the same plane. Else there are three planes, moved by one place each, in
// which zeros stand where a row ends.
typedef struct {
    int64_t moves, row, numbers;  // planes of the same channels, lines in a row, numbers in a plane
} Planes;

static Planes planes_of(const Shape *s) {
    if (s->width % MATRIX_ROWS == 0) return (Planes){1, s->width + 2, (s->height + 2) * (s->width + 2) * MATRIX_DEPTH};
    int64_t places = up(s->height * s->width, MATRIX_ROWS);  // the last tile may go on behind the map
    return (Planes){3, s->width, (places + 2 * s->width) * MATRIX_DEPTH};
}

// An image's maps to (C / 32, moves) planes.
static void pack_planes(const Maps *maps, int64_t image, const Planes *planes, bf16 *to) {
    for (int64_t y = -1; y <= maps->height; y++) {
        const bf16 *row = maps->places ? NULL : row_or_none(maps, image, y);
        bf16 *plane = to;
        for (int64_t c = 0; c < maps->channels; c += MATRIX_DEPTH)
            for (int64_t left = -1; left < planes->moves - 1; left++, plane += planes->numbers) {
                bf16 *line = plane + (y + 1) * planes->row * MATRIX_DEPTH, *end = plane + planes->numbers;
                for (int64_t x = left; x < left + planes->row; x++, line += MATRIX_DEPTH)
                    _mm512_store_si512(line, maps->places ? read_around(maps, image, y, x, c)
                                                          : read_in_row(maps, row, x, c));
                if (y == maps->height && line < end) memset(line, 0, (end - line) * 2);
            }
    }
}

#ifdef MATRIX_TILES
// The sums of 64 places of an image from `place` on for 16 outputs, from its packed maps and its kernel: (64, 16).
static void multiply_places(const bf16 *maps, const Planes *planes, const Shape *s, const uint32_t *kernel,
                            int64_t place, float *sums) {
    int64_t places = s->height * s->width, blocks = blocks_of(s->channels), of_block = planes->moves * planes->numbers;
    const bf16 *at[4];
    for (int64_t i = 0; i < 4; i++) {
        int64_t first = place + i * MATRIX_ROWS;
        at[i] = first < places ? maps + (first / s->width * planes->row + first % s->width) * MATRIX_DEPTH : NULL;
    }
    zero_four();
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tap = 0; tap < TAPS; tap++, kernel += MATRIX_PAIRS) {
            int64_t right = planes->moves == 1 ? tap % 3 * MATRIX_DEPTH : tap % 3 * planes->numbers;
            multiply_four(at, block * of_block + tap / 3 * planes->row * MATRIX_DEPTH + right, kernel);
        }
    store_four(sums);
}
#else
// The sums of 16 places of an image for 16 outputs, which are held in registers: (16, 16).
static void multiply_row(const bf16 *maps, const Planes *planes, int64_t blocks, const uint32_t *kernel, float *sums) {
    __m512 sum[MATRIX_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < MATRIX_ROWS; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; block++, maps += planes->moves * planes->numbers)
        for (int64_t tap = 0; tap < TAPS; tap++) {
            int64_t right = planes->moves == 1 ? tap % 3 * MATRIX_DEPTH : tap % 3 * planes->numbers;
            const uint32_t *lines = (const uint32_t *)(maps + tap / 3 * planes->row * MATRIX_DEPTH + right);
            for (int64_t pair = 0; pair < MATRIX_DEPTH / 2; pair++, kernel += LANES) {
                __m512i outputs = held(_mm512_load_si512(kernel));
#pragma GCC unroll 16
                for (int i = 0; i < MATRIX_ROWS; i++)
                    sum[i] = dot(sum[i], outputs, _mm512_set1_epi32((int)lines[i * MATRIX_DEPTH / 2 + pair]));
            }
        }
#pragma GCC unroll 16
    for (int i = 0; i < MATRIX_ROWS; i++) _mm512_store_ps(sums + i * LANES, sum[i]);
}

// The same of 64 places from `place` on: (64, 16).
static void multiply_places(const bf16 *maps, const Planes *planes, const Shape *s, const uint32_t *kernel,
                            int64_t place, float *sums) {
    int64_t last = least(s->height * s->width, place + 64);
    for (; place < last; place += MATRIX_ROWS, sums += MATRIX_ROWS * LANES)
        multiply_row(maps + (place / s->width * planes->row + place % s->width) * MATRIX_DEPTH, planes,
                     blocks_of(s->channels), kernel, sums);
}
#endif

// What is done with the sums of two rows of an image for 32 outputs from `o`: (2, places, 16), and so many more that
// 2x2 places can be read from the last one on.
ALWAYS void finish_rows(const float *sums, int64_t places, const Shape *s, int64_t image, int64_t y, int64_t o,
                        const Finish *finish, const int pooled, const int added) {
    for (int64_t x = 0; x < s->width; x += 2) {
        __m512 low[4], high[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {  // behind the map lie places that nothing is made of
            const float *sum = sums + ((y + j / 2) * s->width + x + j % 2) * LANES;
            low[j] = _mm512_load_ps(sum), high[j] = _mm512_load_ps(sum + places * LANES);
        }
        finish_outputs(low, high, s, image, y, x, o, _mm512_set1_ps(1), NULL, 0, finish, pooled, added, 0);
    }
}

// The outputs of an image from `o` on, 32 or the 16 that there are, with `halves` kernels that were just written, one
// after the other. Rows are finished as soon as their sums are there, which are in the nearest cache then, and while
// what is written goes its way the next are computed.
static void convolve_image(const bf16 *maps, const Planes *planes, const Shape *s, const uint32_t *kernels,
                           int64_t halves, float *sums, int64_t image, int64_t o, const Finish *finish) {
    int64_t places = up(s->height * s->width, 64), of_kernel = blocks_of(s->channels) * TAPS * MATRIX_PAIRS, y = 0;
    int added = finish->residual && o < finish->residual->channels;
    WRITTEN;
    for (int64_t place = 0; place < places; place += 64) {
        for (int64_t half = 0; half < halves; half++)
            multiply_places(maps, planes, s, kernels + half * of_kernel, place,
                            sums + (half * places + place) * LANES);
        WRITTEN;
        for (; y < s->height && least(y + 2, s->height) * s->width <= place + 64; y += 2) {
#define FINISH(pooled, added) finish_rows(sums, places, s, image, y, o, finish, pooled, added)
            if (finish->places && added)
                FINISH(1, 1);
            else if (finish->places)
                FINISH(1, 0);
            else if (added)
                FINISH(0, 1);
            else
                FINISH(0, 0);
#undef FINISH
        }
    }
}
