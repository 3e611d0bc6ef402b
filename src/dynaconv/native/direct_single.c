// The mixture for a single image, the way forward alone, on matrix tiles or without.
//
// Where one image is all there is, reading K kernels from memory takes longer than all that is done with them. They are
// read as they lie, once, for 32 outputs at a time. Their sum is transposed into tiles, convolved with and forgotten
// within the caches.
//
// Letters: H W map, C channels in, O channels out, K kernels.

#include "places.h"

enum { BLOCK = MATRIX_DEPTH * TAPS };  // numbers of 32 channels of one output's kernel

// The mixed kernel of 16 outputs from `o`: (16, `length`), of which C * 9 are written, or all zeros behind the last.
static void mix_rows(const float *const *kernels, const int64_t *sides, const float *weights, const Shape *s, int64_t o,
                     int64_t length, float *to) {
    int64_t numbers = s->channels * TAPS;
    for (int64_t row = 0; row < LANES; row++, to += length) {
        if (o + row >= s->outputs) {
            memset(to, 0, length * 4);
            continue;
        }
        for (int64_t i = 0; i < numbers; i += LANES) {
            __mmask16 mask = lanes_left(numbers - i);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = 0; k < s->kernels; k++)
                if (sides[k] == 3)
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[k]),
                                          _mm512_maskz_loadu_ps(mask, kernels[k] + (o + row) * numbers + i), sum);
            _mm512_mask_storeu_ps(to + i, mask, sum);
        }
        for (int64_t k = 0; k < s->kernels; k++)
            for (int64_t c = 0; sides[k] == 1 && c < s->channels; c++)
                to[c * TAPS + TAPS / 2] += weights[k] * kernels[k][(o + row) * s->channels + c];
    }
}

// The mixture of x, (H, W, C), into y, (H, W, O).
//   kernels   (O, C, side, side) each, side 3 or 1
//   weights   (K,)
//   residual  (H, W, residual_channels), added to the first outputs, or none
//   y_places  where max-pooling by 2x2 took the numbers of y from; or none, and there is no pooling
// Returns 1 without memory.
int dynaconv_direct_single(const bf16 *x, const float *const *kernels, const int64_t *sides, const float *weights,
                           const bf16 *residual, int64_t residual_channels, bf16 *y, uint8_t *y_places, const Shape *s,
                           int threads) {
    int64_t blocks = blocks_of(s->channels), length = blocks * BLOCK, places = up(s->height * s->width, 64);
    int64_t spare = 2 * s->width + 2;
    Planes planes = planes_of(s);
    Maps inputs = {x, NULL, s->height, s->width, s->channels};
    Maps added = {residual, NULL, s->height, s->width, residual_channels};
    int tasks = (int)((s->outputs + 2 * LANES - 1) / (2 * LANES)), failed = 0;
#pragma omp parallel num_threads(threads < tasks ? threads : tasks) reduction(| : failed)
    {
        bf16 *maps = aligned_alloc(64, blocks * planes.moves * planes.numbers * 2);
        float *sums = zeros((2 * places + spare) * LANES), *rows = zeros(LANES * length);
        float *columns = aligned_alloc(64, COLUMNS * 4);
        uint32_t *mixed = aligned_alloc(64, 2 * blocks * TAPS * MATRIX_PAIRS * 4);
        Finish finish = {1, residual ? &added : NULL, NULL, y, y_places};
        MatrixConfig before;
        int ready = maps && sums && rows && columns && mixed;
        failed = !ready;
        take_tiles(&before);
        // Each thread has its own: to fetch what another one has packed takes longer than to pack it.
        if (ready) pack_planes(&inputs, 0, &planes, maps);
#pragma omp for schedule(dynamic, 1)
        for (int64_t o = 0; o < s->outputs; o += 2 * LANES) {
            if (!ready) continue;
            int64_t halves = o + LANES < s->outputs ? 2 : 1;
            for (int64_t half = 0; half < halves; half++) {
                mix_rows(kernels, sides, weights, s, o + half * LANES, length, rows);
                for (int64_t block = 0; block < blocks; block++) {
                    columns_of_rows(rows + block * BLOCK, length, LANES, BLOCK, TAPS, columns);
                    pair_columns(columns, TAPS, LANES, mixed + (half * blocks + block) * TAPS * MATRIX_PAIRS);
                }
            }
            convolve_image(maps, &planes, s, mixed, halves, sums, 0, o, &finish);
        }
        give_tiles_back(&before);
        free(maps);
        free(sums);
        free(rows);
        free(columns);
        free(mixed);
    }
    return failed;
}
