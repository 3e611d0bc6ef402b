// The way forward: transforms of kernels and maps, products, and the way from products to maps. A part of tile2.c,
// tile3.c and tile4.c.

#pragma once

#include "finish.h"
#include "winograd.h"

// G w G' of one kernel, (O, C, side, side) float32, for 16 columns from `column` of one row. Rows are channels and
// columns outputs; `turned`, for the backward pass, it is the other way round and the kernel is turned by half a turn.
static void transform_kernel(const float *kernel, int64_t side, int64_t outputs, int64_t channels, int turned,
                             int64_t row, int64_t column, __m512 to[F]) {
    int64_t row_step = (turned ? channels : 1) * side * side, step = (turned ? 1 : channels) * side * side;
    int64_t rows = turned ? outputs : channels, columns = turned ? channels : outputs;
    __mmask16 mask = row < rows && column < columns ? lanes_left(columns - column) : 0;
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)step));
    const float *from = kernel + (mask ? row * row_step + column * step : 0);
    __m512 zero = _mm512_setzero_ps(), g[9], columns_done[3][POINTS];
    for (int i = 0; i < 9; i++) {
        int place = side == 3 ? (turned ? 8 - i : i) : 0;
        g[i] = side == 3 || i == 4 ? _mm512_mask_i32gather_ps(zero, mask, places, from + place, 4) : zero;
    }
    for (int j = 0; j < 3; j++) kernel_to_points((__m512[3]){g[j], g[3 + j], g[6 + j]}, columns_done[j]);
    for (int i = 0; i < POINTS; i++)
        kernel_to_points((__m512[3]){columns_done[0][i], columns_done[1][i], columns_done[2][i]}, to + POINTS * i);
}

// Transforms K kernels, (O, C, side, side) float32 with side 3 or 1, in pairs: to (F, C, K / 2, O) pairs of kernels
// that are mixed, or for the one kernel of a convolution (s->kernels = 0) to (F, C / 2, O) pairs of channels. `turned`
// gives those of the backward pass, with C and O exchanged. C and O are continued to a multiple of 16 by zeros.
void OF_TILE(dynaconv_transform_kernels)(const float *const *kernels, const int64_t *sides, const Shape *s, int turned,
                                         uint32_t *to, int threads) {
    int64_t rows = up(turned ? s->outputs : s->channels, LANES);
    int64_t columns = up(turned ? s->channels : s->outputs, LANES);
    int64_t at_once = s->kernels ? 1 : 2, pairs = s->kernels ? (s->kernels + 1) / 2 : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += at_once)
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t column = 0; column < columns; column += LANES) {
                __m512 first[F], second[F];
                int64_t k = 2 * pair, next = s->kernels ? k + 1 : k;
                transform_kernel(kernels[k], sides[k], s->outputs, s->channels, turned, row, column, first);
                if (next < s->kernels || !s->kernels)
                    transform_kernel(kernels[next], sides[next], s->outputs, s->channels, turned, row + at_once - 1,
                                     column, second);
                else
                    for (int f = 0; f < F; f++) second[f] = _mm512_setzero_ps();
                for (int f = 0; f < F; f++)
                    _mm512_storeu_si512(to + at(f, row / at_once, pair, column, rows / at_once, pairs, columns),
                                        interleave(first[f], second[f]));
            }
}

// B' x B of a tile, of all channels, which lie one after the other at each of its places.
ALWAYS void transform_tile(const Square *from, int64_t channels, int64_t padded, bf16 *to, int64_t stride,
                           const int pooled) {
    for (int64_t c = 0; c < padded; c += LANES) {
        __m512 v[F];
        transform_inputs(from, c, lanes_left(channels - c), v, pooled);
#pragma GCC unroll 36
        for (int f = 0; f < F; f++) store(to + f * stride + c, v[f], 0xffff);
    }
}

// B' x B of one tile row: to (F, tiles, channels), `stride` numbers from product to product.
static void transform_rows(const Maps *maps, int64_t image, int64_t padded, int64_t tile_row, int64_t across, bf16 *to,
                           int64_t stride) {
    for (int64_t tile = 0; tile < across; tile++, to += padded) {
        Square inputs;
        find_square(maps, image, TILE * tile_row - 1, TILE * tile - 1, POINTS, &inputs);
        if (maps->places)
            transform_tile(&inputs, maps->channels, padded, to, stride, 1);
        else
            transform_tile(&inputs, maps->channels, padded, to, stride, 0);
    }
}

// A' m A of a tile, 16 outputs of it, from (F, tiles, outputs) sums, to rows of SIDE results.
ALWAYS void transform_sums(const float *sums, int64_t stride, __m512 *to) {
    __m512 half[POINTS][TILE];
#pragma GCC unroll 16
    for (int j = 0; j < POINTS; j++) {
        __m512 m[POINTS];
#pragma GCC unroll 16
        for (int i = 0; i < POINTS; i++) m[i] = _mm512_loadu_ps(sums + (POINTS * i + j) * stride);
        from_points(m, half[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) {
        __m512 m[POINTS];
#pragma GCC unroll 16
        for (int j = 0; j < POINTS; j++) m[j] = half[j][i];
        from_points(m, to + SIDE * i);
    }
}

// The tiles of a block that begins at (y, x), times a scale, plus a residual, to maps. `down` tile rows of it are
// there, and `across` tiles from it to the end of the row; sums of the next tile row lie `below` numbers further on.
// Returns the inner product with the probe before either.
ALWAYS __m512 write_block(const float *sums, const Shape *s, int64_t padded, int64_t image, int64_t y, int64_t x,
                          int64_t down, int64_t across, int64_t below, int64_t stride, const Finish *finish,
                          const int pooled) {
    Square residual, probe;
    if (finish->residual) find_square(finish->residual, image, y, x, SIDE, &residual);
    if (finish->probe) find_square(finish->probe, image, y, x, SIDE, &probe);
    __m512 scale = _mm512_set1_ps(finish->scale), product = _mm512_setzero_ps();
    for (int64_t o = 0; o < padded; o += LANES, sums += LANES) {
        __mmask16 mask = lanes_left(s->outputs - o), shared = 0;
        if (finish->residual) shared = mask & lanes_left(most(0, finish->residual->channels - o));
        __m512 results[SIDE * SIDE];
        if (down < BLOCK || across < BLOCK)
            for (int i = 0; i < SIDE * SIDE; i++) results[i] = _mm512_setzero_ps();
        // Of a block of several tiles nothing is unrolled: it is as fast, and compiled in half the time.
#pragma GCC unroll 1
        for (int i = 0; i < BLOCK; i++)
#pragma GCC unroll 1
            for (int j = 0; j < BLOCK; j++)
                if (i < down && j < across)
                    transform_sums(sums + i * below + j * padded, stride, results + TILE * (SIDE * i + j));
#pragma GCC unroll (BLOCK > 1 ? 1 : 4)
        for (int i = 0; i < SIDE; i += 2)
#pragma GCC unroll (BLOCK > 1 ? 1 : 4)
            for (int j = 0; j < SIDE; j += 2) {
                if (y + i >= s->height || x + j >= s->width) continue;
                __m512 window[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    int place = SIDE * (i + k / 2) + j + k % 2;
                    if (finish->probe)
                        product = _mm512_fmadd_ps(results[place], read_square(&probe, place, o, mask, 0), product);
                    window[k] = _mm512_mul_ps(results[place], scale);
                    if (shared) window[k] = _mm512_add_ps(window[k], read_square(&residual, place, o, shared, pooled));
                }
                store_window(window, s, image, y + i, x + j, o, mask, finish);
            }
    }
    return product;
}

// One row of blocks, to maps: `down` tile rows.
static float write_rows(const float *sums, const Shape *s, int64_t padded, int64_t image, int64_t tile_row,
                        int64_t down, int64_t across, int64_t stride, const Finish *finish) {
    __m512 product = _mm512_setzero_ps();
    int64_t below = across * padded;
    for (int64_t tile = 0; tile < across; tile += BLOCK) {
        const float *from = sums + tile * padded;
        int64_t y = TILE * tile_row, x = TILE * tile;
        __m512 more = finish->residual && finish->residual->places
                          ? write_block(from, s, padded, image, y, x, down, across - tile, below, stride, finish, 1)
                          : write_block(from, s, padded, image, y, x, down, across - tile, below, stride, finish, 0);
        product = _mm512_add_ps(product, more);
    }
    return _mm512_reduce_add_ps(product);
}

// The convolution or mixture of x, (N, H, W, C), into y, (N, H, W, O).
//   x_places   of the numbers in x, (N, H / 2, W / 2, C), if they are what max-pooling left of it
//   kernels    as `dynaconv_transform_kernels` leaves them
//   weights    (N, K / 2) pairs, where kernels are mixed
//   scales     (N,) factors of the sums, or none
//   residual   (N, H, W, residual_channels), added to the scaled sums, or none; as x if it is x
//   probe      (N, H, W, O), or none: to_scales, (N, tile rows), which add up to its inner product with the sums
//   y_places   (N, H / 2, W / 2, O), or none: y is then of this size, after max-pooling by 2x2, and this tells whence
// Returns 0, or 1 where memory is short.
int OF_TILE(dynaconv_mix)(const bf16 *x, const uint8_t *x_places, const uint32_t *kernels, const uint32_t *weights,
                          const float *scales, const bf16 *residual, int64_t residual_channels, const bf16 *probe,
                          float *to_scales, bf16 *y, uint8_t *y_places, const Shape *s, int threads) {
    int64_t channels = up(s->channels, LANES), outputs = up(s->outputs, LANES), pairs = (s->kernels + 1) / 2;
    int64_t slots = s->kernels ? 2 * pairs : 1;  // halves of pairs that a channel takes
    int64_t used = (s->channels + 1) / 2;        // pairs of channels that are not all zeros
    Plan p = plan(s, F * (2 * channels + 4 * outputs), 2 * F * slots * channels * outputs, threads);
    int64_t most_tiles = p.rows_at_once * p.tiles_across;
    // A few numbers more than needed: rows a power of two apart would share one place in the cache.
    int64_t tile_step = most_tiles * channels + 32, sum_step = most_tiles * outputs + 16;
    int64_t tile_bytes = up(F * tile_step * 2, 64), sum_bytes = up(F * sum_step * 4, 64);
    Maps inputs = {x, x_places, s->height, s->width, s->channels};
    Maps added = {residual, residual == x ? x_places : NULL, s->height, s->width, residual_channels};
    Maps probes = {probe, NULL, s->height, s->width, s->outputs};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        char *space = aligned_alloc(64, up(tile_bytes + sum_bytes + channels / 2 * PANEL * 64, 64));
        Finish finish = {1, residual ? &added : NULL, probe ? &probes : NULL, y, y_places};
        failed = !space;
#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < p.chunks; chunk++) {
            if (!space) continue;
            bf16 *tiles = (bf16 *)space;
            float *sums = (float *)(space + tile_bytes);
            uint32_t *panel = (uint32_t *)(space + tile_bytes + sum_bytes);
            int64_t first = chunk * p.rows_at_once, last = least(s->images * p.tile_rows, first + p.rows_at_once);
            for (int64_t row = first; row < last; row++)
                transform_rows(&inputs, row / p.tile_rows, channels, row % p.tile_rows, p.tiles_across,
                               tiles + (row - first) * p.tiles_across * channels, tile_step);
            for (int f = 0; f < F; f++)
                for (int64_t o = 0; o < outputs; o += PANEL * LANES) {
                    int vectors = (int)least(PANEL, (outputs - o) / LANES);
                    const uint32_t *mine = kernels + channels * slots * (f * outputs + o) / 2;
                    for (int64_t row = first, stop; row < last; row = stop) {
                        int64_t image = row / p.tile_rows, start = (row - first) * p.tiles_across;
                        stop = pairs ? least(last, (image + 1) * p.tile_rows) : last;
                        const uint32_t *factors = (uint32_t *)(tiles + f * tile_step + start * channels);
                        const uint32_t *mixing = pairs ? weights + image * pairs : NULL;
                        float *into = sums + f * sum_step + start * outputs + o;
                        int64_t places = (stop - row) * p.tiles_across;
                        int mixes = pairs && places > ROWS;  // a panel for few rows is not worth writing
                        if (mixes) mix_panel(mine, mixing, pairs, 2 * used, vectors, panel);
                        multiply(factors, channels / 2, used, mixes ? panel : mine, mixes ? NULL : mixing, pairs, into,
                                 outputs, places, vectors);
                    }
                }
            for (int64_t row = first, down; row < last; row += down) {
                int64_t image = row / p.tile_rows, tile_row = row % p.tile_rows;
                down = least(BLOCK, p.tile_rows - tile_row);
                finish.scale = scales ? scales[image] : 1;
                float product = write_rows(sums + (row - first) * p.tiles_across * outputs, s, outputs, image, tile_row,
                                           down, p.tiles_across, sum_step, &finish);
                if (!probe) continue;
                for (int64_t i = 0; i < down; i++) to_scales[row + i] = i ? 0 : product;
            }
        }
        free(space);
    }
    return failed;
}
