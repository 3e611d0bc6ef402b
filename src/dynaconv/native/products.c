// The innermost loops: maps with kernels, and maps with gradients towards kernels.

#include "products.h"

// Mixes the kernels of two channels, (2, K / 2, outputs) pairs of kernels, for 16 outputs: 16 pairs of channels.
ALWAYS __m512i mix_channels(const uint32_t *kernels, const uint32_t *weights, int64_t pairs, int v, const int vectors) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        const uint32_t *from = kernels + (k * vectors + v) * LANES;
        __m512i a = _mm512_set1_epi32((int)weights[k]);
        low = dot(low, _mm512_loadu_si512(from), a);
        high = dot(high, _mm512_loadu_si512(from + pairs * vectors * LANES), a);
    }
    return interleave(low, high);
}

// Mixes the kernels of one product for 16 * `vectors` outputs: from (C, K / 2, outputs) to (C / 2, outputs).
void mix_panel(const uint32_t *kernels, const uint32_t *weights, int64_t pairs, int64_t channels, int vectors,
               uint32_t *panel) {
    for (int64_t c = 0; c < channels; c += 2, kernels += 2 * pairs * vectors * LANES)
        for (int v = 0; v < vectors; v++, panel += LANES)
            _mm512_store_si512(panel, mix_channels(kernels, weights, pairs, v, vectors));
}

// sums[row][output] = sum over pairs of channels of tiles[row][pair] . panel[pair][output], for `rows` x 16 * `vectors`
// of them. `mixed` pairs of kernels, if any, are mixed on the way instead: a panel for few rows is not worth writing.
ALWAYS void multiply_rows(const uint32_t *tiles, int64_t tile_stride, const uint32_t *panel, const uint32_t *weights,
                          int64_t mixed, int64_t pairs, float *sums, int64_t sum_stride, const int rows,
                          const int vectors) {
    __m512 sum[ROWS][PANEL];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 6
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512i factor[PANEL];
#pragma GCC unroll 6
        for (int v = 0; v < vectors; v++)
            factor[v] = mixed ? mix_channels(panel + 2 * p * mixed * vectors * LANES, weights, mixed, v, vectors)
                              : _mm512_loadu_si512(panel + (p * vectors + v) * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512i tile = _mm512_set1_epi32((int)tiles[i * tile_stride + p]);
#pragma GCC unroll 6
            for (int v = 0; v < vectors; v++) sum[i][v] = dot(sum[i][v], factor[v], tile);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 6
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sums + i * sum_stride + v * LANES, sum[i][v]);
}

#define FOR_ROWS(rows, call, vectors)    \
    switch (rows) {                      \
        case 1: call(1, vectors); break; \
        case 2: call(2, vectors); break; \
        case 3: call(3, vectors); break; \
        case 4: call(4, vectors); break; \
        case 5: call(5, vectors); break; \
        default: call(6, vectors);       \
    }
#define FOR_SIZES(rows, vectors, call)         \
    switch (vectors) {                         \
        case 1: FOR_ROWS(rows, call, 1) break; \
        case 2: FOR_ROWS(rows, call, 2) break; \
        case 3: FOR_ROWS(rows, call, 3) break; \
        default: FOR_ROWS(rows, call, 4)       \
    }

// The same for any number of rows; `panel` holds kernels to be mixed where `weights` are given.
void multiply(const uint32_t *tiles, int64_t tile_stride, int64_t pairs, const uint32_t *panel, const uint32_t *weights,
              int64_t mixed, float *sums, int64_t sum_stride, int64_t rows, int vectors) {
    for (int64_t row = 0; row < rows; row += ROWS) {
        const uint32_t *from = tiles + row * tile_stride;
        float *to = sums + row * sum_stride;
#define MIXED(r, v) multiply_rows(from, tile_stride, panel, weights, mixed, pairs, to, sum_stride, r, v)
#define PLAIN(r, v) multiply_rows(from, tile_stride, panel, NULL, 0, pairs, to, sum_stride, r, v)
        if (weights) {
            FOR_SIZES(least(ROWS, rows - row), vectors, MIXED)
        } else {
            FOR_SIZES(least(ROWS, rows - row), vectors, PLAIN)
        }
    }
}

// The gradient of a mixed kernel, 4 channels x 16 * `vectors` outputs of one product, over `places` pairs of tiles. As
// many numbers are fetched from `next` meanwhile, if any, to be written to, a line for each pair: they are far away.
ALWAYS void sum_products(const Segment *rows, const Offsets *at, const float *next, __m512 sum[FEW][PANEL],
                         const int vectors) {
    const uint32_t *tiles = rows->tiles + at->tiles, *products = rows->products + at->products;
#pragma GCC unroll 4
    for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < rows->places; p++) {
        __m512i factor[PANEL];
        if (next && p < FEW * vectors) __builtin_prefetch(next + p * LANES, 1);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) factor[v] = held(_mm512_load_si512(products + v * at->step + p * LANES));
#pragma GCC unroll 4
        for (int i = 0; i < FEW; i++) {
            __m512i tile = _mm512_set1_epi32((int)tiles[p * LANES + i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[i][v] = dot(sum[i][v], factor[v], tile);
        }
    }
}

// The inner products of one image's gradient with each kernel: to_weights_k += them.
ALWAYS void share_with_weights(__m512 sum[FEW][PANEL], const uint32_t *kernels, int64_t count, int64_t pairs,
                               float *to_weights, const int vectors) {
    for (int64_t k = 0; k < count; k += 2) {
        __m512 to_first[2], to_second[2];  // two of each, since a sum waits for the one before
#pragma GCC unroll 4
        for (int i = 0; i < 2; i++) to_first[i] = to_second[i] = _mm512_setzero_ps();
        const uint32_t *from = kernels + k / 2 * vectors * LANES;
#pragma GCC unroll 4
        for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                __m512i kernel = _mm512_loadu_si512(from + (i * pairs * vectors + v) * LANES);
                to_first[v % 2] = _mm512_fmadd_ps(sum[i][v], first_of(kernel), to_first[v % 2]);
                to_second[v % 2] = _mm512_fmadd_ps(sum[i][v], second_of(kernel), to_second[v % 2]);
            }
        float *to = to_weights + k * LANES, *next = to + LANES;  // the second of an odd number is there as well
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_add_ps(to_first[0], to_first[1]), _mm512_loadu_ps(to)));
        _mm512_storeu_ps(next, _mm512_add_ps(_mm512_add_ps(to_second[0], to_second[1]), _mm512_loadu_ps(next)));
    }
}

// Of a convolution the gradient goes to the one kernel as it is.
ALWAYS void add_whole(const Segment *rows, const Offsets *at, float *to_kernel, const int vectors) {
    __m512 sum[FEW][PANEL];
    sum_products(rows, at, to_kernel, sum, vectors);
#pragma GCC unroll 4
    for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *to = to_kernel + (i * vectors + v) * LANES;
            _mm512_storeu_ps(to, _mm512_add_ps(sum[i][v], _mm512_loadu_ps(to)));
        }
}

// The gradient of one image's mixed kernel, shared out among the K kernels and weights: to_kernels_k += a_k times it,
// to_weights_k += its inner product with kernel k.
ALWAYS void share_out(const Segment *image, const Offsets *at, const uint32_t *kernels, int64_t count, int64_t pairs,
                      float *to_kernels, const int vectors) {
    const uint32_t *weights = image->weights;
    __m512 sum[FEW][PANEL];
    sum_products(image, at, NULL, sum, vectors);
    for (int64_t k = 0; k < count; k += 2, weights++) {
        __m512i both = _mm512_set1_epi32((int)*weights);
        __m512 first = first_of(both), second = second_of(both);
        __m512 to_first[2], to_second[2];  // two of each, since a sum waits for the one before
#pragma GCC unroll 4
        for (int i = 0; i < 2; i++) to_first[i] = to_second[i] = _mm512_setzero_ps();
        float *into = to_kernels + k * vectors * LANES, *next = into + vectors * LANES;
        const uint32_t *from = kernels + k / 2 * vectors * LANES;
        if (k + 1 < count)
#pragma GCC unroll 4
            for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    int64_t place = (2 * i * pairs * vectors + v) * LANES;
                    __m512i kernel = _mm512_loadu_si512(from + (i * pairs * vectors + v) * LANES);
                    to_first[v % 2] = _mm512_fmadd_ps(sum[i][v], first_of(kernel), to_first[v % 2]);
                    to_second[v % 2] = _mm512_fmadd_ps(sum[i][v], second_of(kernel), to_second[v % 2]);
                    _mm512_storeu_ps(into + place, _mm512_fmadd_ps(sum[i][v], first, _mm512_loadu_ps(into + place)));
                    _mm512_storeu_ps(next + place, _mm512_fmadd_ps(sum[i][v], second, _mm512_loadu_ps(next + place)));
                }
        else
#pragma GCC unroll 4
            for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    int64_t place = (2 * i * pairs * vectors + v) * LANES;
                    __m512i kernel = _mm512_loadu_si512(from + (i * pairs * vectors + v) * LANES);
                    to_first[v % 2] = _mm512_fmadd_ps(sum[i][v], first_of(kernel), to_first[v % 2]);
                    _mm512_storeu_ps(into + place, _mm512_fmadd_ps(sum[i][v], first, _mm512_loadu_ps(into + place)));
                }
        to_first[0] = _mm512_add_ps(to_first[0], to_first[1]);
        to_second[0] = _mm512_add_ps(to_second[0], to_second[1]);
        float *to = image->to_weights + k * LANES;
        _mm512_storeu_ps(to, _mm512_add_ps(to_first[0], _mm512_loadu_ps(to)));
        if (k + 1 < count) _mm512_storeu_ps(to + LANES, _mm512_add_ps(to_second[0], _mm512_loadu_ps(to + LANES)));
    }
}

// The same for two images in one product of pairs, so that K gradients are read and written once for both: where an
// image has few tiles, that is most of what this costs. It pays from three kernels on.
ALWAYS void share_out_two(const Segment images[2], const Offsets *at, const uint32_t *kernels, int64_t count,
                          int64_t pairs, float *to_kernels, const int vectors) {
    __m512 sum[FEW][PANEL];
    __m512i both[FEW][PANEL];
    float kept[FEW * PANEL * LANES] __attribute__((aligned(64)));
    sum_products(images, at, NULL, sum, vectors);
    share_with_weights(sum, kernels, count, pairs, images[0].to_weights, vectors);
#pragma GCC unroll 4
    for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_store_ps(kept + (i * vectors + v) * LANES, sum[i][v]);
    sum_products(images + 1, at, NULL, sum, vectors);
    share_with_weights(sum, kernels, count, pairs, images[1].to_weights, vectors);
#pragma GCC unroll 4
    for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            both[i][v] = interleave(_mm512_load_ps(kept + (i * vectors + v) * LANES), sum[i][v]);
    for (int64_t k = 0; k < count; k++) {
        // Weight k of both images, where each has its weights k and k + 1 side by side.
        uint32_t first = images[0].weights[k / 2], second = images[1].weights[k / 2];
        uint32_t weights = k % 2 ? first >> 16 | (second & 0xffff0000) : (first & 0xffff) | second << 16;
        __m512i weight = _mm512_set1_epi32((int)weights);
#pragma GCC unroll 4
        for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                float *to = to_kernels + ((2 * i * pairs + k) * vectors + v) * LANES;
                _mm512_storeu_ps(to, dot(_mm512_loadu_ps(to), both[i][v], weight));
            }
    }
}

// Adds up the gradients of `rows` segments towards 4 channels and the outputs of a panel.
ALWAYS void add_to_panel(const Segment *segments, int64_t rows, const Offsets *at, const uint32_t *kernels,
                         int64_t count, int64_t pairs, float *to, const int vectors) {
    int64_t row = 0;
    if (!pairs)
        for (; row < rows; row++) add_whole(segments + row, at, to, vectors);
    if (count > 2)
        for (; row + 1 < rows; row += 2)
            share_out_two(segments + row, at, kernels, count, pairs, to, vectors);
    for (; row < rows; row++) share_out(segments + row, at, kernels, count, pairs, to, vectors);
}

// The same for a number of vectors that is not known before.
void add_gradients(const Segment *segments, int64_t rows, const Offsets *at, const uint32_t *kernels, int64_t count,
                   int64_t pairs, float *to, int vectors) {
#define CALL(v) add_to_panel(segments, rows, at, kernels, count, pairs, to, v)
    switch (vectors) {
        case 1: CALL(1); break;
        case 2: CALL(2); break;
        case 3: CALL(3); break;
        default: CALL(4);
    }
#undef CALL
}
