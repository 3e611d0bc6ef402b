// The way back to the kernels and to the weights that mix them.

#include "winograd.h"

// B' x B as `transform_rows`, of pairs of neighbouring tiles: to (F, pairs, channels) pairs.
static void transform_pairs(const Maps *maps, int64_t image, int64_t padded, int64_t tile_row, int64_t pairs,
                            int64_t chunk, uint32_t *to, int64_t stride) {
    int64_t across = (maps->width + 1) / 2;
    for (int64_t c = 0; c < padded; c += LANES, to += LANES * chunk) {
        __mmask16 mask = lanes_left(maps->channels - c);
        __m512 column[4][4], v[2][F];
        read_column(maps, image, 2 * tile_row - 1, -1, c, mask, column[2]);
        read_column(maps, image, 2 * tile_row - 1, 0, c, mask, column[3]);
        for (int64_t pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 16
            for (int second = 0; second < 2; second++) {
                int64_t tile = 2 * pair + second;
#pragma GCC unroll 16
                for (int i = 0; i < 4; i++) column[0][i] = column[2][i], column[1][i] = column[3][i];
                read_column(maps, image, 2 * tile_row - 1, 2 * tile + 1, c, mask, column[2]);
                read_column(maps, image, 2 * tile_row - 1, 2 * tile + 2, c, mask, column[3]);
                if (tile < across)
                    finish_tile(column, v[second]);
                else
#pragma GCC unroll 16
                    for (int f = 0; f < F; f++) v[second][f] = _mm512_setzero_ps();
            }
#pragma GCC unroll 16
            for (int f = 0; f < F; f++)
                _mm512_storeu_si512(to + f * stride + pair * LANES, interleave(v[0][f], v[1][f]));
        }
    }
}

// A y A' of pairs of neighbouring tiles: the gradient towards the products, to (F, pairs, outputs) pairs.
static void spread_pairs(const Maps *maps, int64_t image, int64_t padded, int64_t tile_row, int64_t pairs,
                         int64_t chunk, float scale, uint32_t *to, int64_t stride) {
    __m512 factor = _mm512_set1_ps(scale);
    for (int64_t o = 0; o < padded; o += LANES, to += LANES * chunk) {
        __mmask16 mask = lanes_left(maps->channels - o);
        for (int64_t pair = 0; pair < pairs; pair++) {
            __m512 v[2][F];
#pragma GCC unroll 16
            for (int second = 0; second < 2; second++) {
                __m512 t[4][2];
#pragma GCC unroll 16
                for (int j = 0; j < 2; j++) {
                    int64_t x = 4 * pair + 2 * second + j, y = 2 * tile_row;
                    __m512 d0 = _mm512_mul_ps(factor, read_place(maps, image, y, x, o, mask));
                    __m512 d1 = _mm512_mul_ps(factor, read_place(maps, image, y + 1, x, o, mask));
                    t[0][j] = d0, t[1][j] = _mm512_add_ps(d0, d1), t[2][j] = _mm512_sub_ps(d0, d1);
                    t[3][j] = _mm512_sub_ps(_mm512_setzero_ps(), d1);
                }
#pragma GCC unroll 16
                for (int i = 0; i < 4; i++) {
                    v[second][4 * i + 0] = t[i][0];
                    v[second][4 * i + 1] = _mm512_add_ps(t[i][0], t[i][1]);
                    v[second][4 * i + 2] = _mm512_sub_ps(t[i][0], t[i][1]);
                    v[second][4 * i + 3] = _mm512_sub_ps(_mm512_setzero_ps(), t[i][1]);
                }
            }
#pragma GCC unroll 16
            for (int f = 0; f < F; f++)
                _mm512_storeu_si512(to + f * stride + pair * LANES, interleave(v[0][f], v[1][f]));
        }
    }
}

// The gradient of one image's mixed kernel, 4 channels x 16 * `vectors` outputs of one product, shared out among the K
// kernels and weights: to_kernels_k += a_k times it, to_weights_k += its inner product with kernel k. Of a convolution,
// K = 0, it goes to the one kernel as it is.
ALWAYS void share_out(const uint32_t *tiles, const uint32_t *products, int64_t product_step, int64_t places,
                      const uint32_t *kernels, const uint32_t *weights, int64_t count, int64_t pairs,
                      float *to_kernels, float *to_weights, const int vectors) {
    __m512 sum[FEW][PANEL];
#pragma GCC unroll 4
    for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < places; p++) {
        __m512i factor[PANEL];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) factor[v] = _mm512_load_si512(products + v * product_step + p * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < FEW; i++) {
            __m512i tile = _mm512_set1_epi32((int)tiles[p * LANES + i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[i][v] = dot(sum[i][v], factor[v], tile);
        }
    }
    if (!count)
#pragma GCC unroll 4
        for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                float *to = to_kernels + (i * vectors + v) * LANES;
                _mm512_storeu_ps(to, _mm512_add_ps(sum[i][v], _mm512_loadu_ps(to)));
            }
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
        float *to = to_weights + k * LANES;
        _mm512_storeu_ps(to, _mm512_add_ps(to_first[0], _mm512_loadu_ps(to)));
        if (k + 1 < count) _mm512_storeu_ps(to + LANES, _mm512_add_ps(to_second[0], _mm512_loadu_ps(to + LANES)));
    }
}

// G' p G of 16 outputs' gradients, product f at from[f * step], summed over the threads' spaces: to 3x3 rows of 16.
static void restore_kernels(const float *from, int64_t step, int64_t space, int threads, float to[9][LANES]) {
    __m512 half[3][4];
    for (int j = 0; j < 4; j++) {
        __m512 p[4];
        for (int i = 0; i < 4; i++) {
            p[i] = _mm512_loadu_ps(from + (4 * i + j) * step);
            for (int t = 1; t < threads; t++)
                p[i] = _mm512_add_ps(p[i], _mm512_loadu_ps(from + t * space + (4 * i + j) * step));
        }
        __m512 even = _mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_add_ps(p[1], p[2]));
        half[0][j] = _mm512_add_ps(p[0], even), half[2][j] = _mm512_add_ps(even, p[3]);
        half[1][j] = _mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_sub_ps(p[1], p[2]));
    }
    for (int i = 0; i < 3; i++) {
        __m512 even = _mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_add_ps(half[i][1], half[i][2]));
        _mm512_storeu_ps(to[3 * i], _mm512_add_ps(half[i][0], even));
        _mm512_storeu_ps(to[3 * i + 1],
                         _mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_sub_ps(half[i][1], half[i][2])));
        _mm512_storeu_ps(to[3 * i + 2], _mm512_add_ps(even, half[i][3]));
    }
}

// The gradients of `dynaconv_mix` with x from that of its result, dy, (N, H, W, O): towards the kernels,
// (O, C, side, side) float32 each, and where kernels are mixed towards the weights, (N, K) float32 with K rounded up
// to a pair. Scales are those of the sums; places, if any, those that max-pooling took the result from.
// Returns 0, or 1 where memory is short.
int dynaconv_mix_gradients(const bf16 *x, const bf16 *dy, const uint8_t *places, const uint32_t *kernels,
                           const uint32_t *weights, const float *scales, const Shape *s, const int64_t *sides,
                           float *const *to_kernels, float *to_weights, int threads) {
    int64_t channels = up(s->channels, LANES), outputs = up(s->outputs, LANES);
    int64_t pairs = (s->kernels + 1) / 2, slots = most(1, 2 * pairs), shares = s->images * 2 * pairs;
    int64_t space = F * slots * channels * outputs;
    threads = (int)most(1, least(threads, MOST_BYTES / (space * 4)));
    Plan p = plan(s, F * 2 * (channels + outputs), space * 4, threads);
    int64_t across = (p.tiles_across + 1) / 2, most_places = p.rows_at_once * across;
    int64_t tile_step = most_places * channels + 16, product_step = most_places * outputs + 16;
    float *spaces = zeros(threads * space), *all_shares = zeros(threads * shares * LANES);
    uint32_t *maps = aligned_alloc(64, up(threads * F * (tile_step + product_step) * 4, 64));
    Maps inputs = {x, NULL, s->height, s->width, s->channels}, back = {dy, places, s->height, s->width, s->outputs};
    int failed = !spaces || !all_shares || !maps;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
            int me = omp_get_thread_num();
            uint32_t *tiles = maps + me * F * (tile_step + product_step), *products = tiles + F * tile_step;
            float *own = spaces + me * space, *share = all_shares + me * shares * LANES;
#pragma omp for schedule(static)
            for (int64_t chunk = 0; chunk < p.chunks; chunk++) {
                int64_t first = chunk * p.rows_at_once, last = least(s->images * p.tile_rows, first + p.rows_at_once);
                for (int64_t row = first; row < last; row++) {
                    int64_t image = row / p.tile_rows, place = (row - first) * across * LANES;
                    transform_pairs(&inputs, image, channels, row % p.tile_rows, across,
                                    most_places, tiles + place, tile_step);
                    spread_pairs(&back, image, outputs, row % p.tile_rows, across,
                                 most_places, scales ? scales[image] : 1, products + place, product_step);
                }
                for (int f = 0; f < F; f++)
                    for (int64_t o = 0; o < outputs; o += PANEL * LANES)
                        for (int64_t c = 0; c < channels; c += FEW)
                            for (int64_t row = first, stop; row < last; row = stop) {
                                int vectors = (int)least(PANEL, (outputs - o) / LANES);
                                int64_t image = row / p.tile_rows, start = (row - first) * across * LANES;
                                stop = pairs ? least(last, (image + 1) * p.tile_rows) : last;
                                int64_t place = (f * outputs + o) * channels + c * vectors * LANES;
                                const uint32_t *from = tiles + f * tile_step + c / LANES * LANES * most_places + start;
                                const uint32_t *product = products + f * product_step + o * most_places + start;
                                float *to_weight = share + image * 2 * pairs * LANES;
#define CALL(v)                                                                                                  \
    share_out(from + c % LANES, product, most_places * LANES, (stop - row) * across, kernels + place * pairs,    \
              weights + image * pairs, s->kernels, pairs, own + place * slots, to_weight, v)
                                switch (vectors) {
                                    case 1: CALL(1); break;
                                    case 2: CALL(2); break;
                                    case 3: CALL(3); break;
                                    default: CALL(4);
                                }
#undef CALL
                            }
            }
#pragma omp for schedule(static)
            for (int64_t o = 0; o < s->outputs; o += LANES)
                for (int64_t k = 0; k < most(1, s->kernels); k++)
                    for (int64_t c = 0; c < s->channels; c++) {
                        float rows[9][LANES], *to = to_kernels[k];
                        restore_kernels(spaces + at(0, c, k, o, channels, slots, outputs), slots * channels * outputs,
                                        space, threads, rows);
                        for (int64_t lane = 0; lane < least(LANES, s->outputs - o); lane++) {
                            int64_t kernel = (o + lane) * s->channels + c;
                            if (sides[k] == 1)
                                to[kernel] = rows[4][lane];
                            else
                                for (int i = 0; i < 9; i++) to[9 * kernel + i] = rows[i][lane];
                        }
                    }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < shares; i++) {
                __m512 sum = _mm512_setzero_ps();
                for (int t = 0; t < threads; t++)
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(all_shares + (t * shares + i) * LANES));
                to_weights[i] = _mm512_reduce_add_ps(sum);
            }
        }
    }
    free(spaces);
    free(all_shares);
    free(maps);
    return failed;
}
