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

// The gradient of a mixed kernel, 4 channels x 16 * `vectors` outputs of one product, over `places` pairs of tiles.
ALWAYS void sum_products(const uint32_t *tiles, const uint32_t *products, int64_t product_step, int64_t places,
                         __m512 sum[FEW][PANEL], const int vectors) {
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

// The rows of one image in a chunk: `places` pairs of its tiles, and what its gradient is shared out by.
typedef struct {
    const uint32_t *tiles, *products, *weights;
    float *to_weights;
    int64_t places;
} Segment;

// Of a convolution the gradient goes to the one kernel as it is.
ALWAYS void add_whole(const Segment *rows, int64_t offset, int64_t product_step, float *to_kernel, const int vectors) {
    __m512 sum[FEW][PANEL];
    sum_products(rows->tiles + offset, rows->products, product_step, rows->places, sum, vectors);
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
ALWAYS void share_out(const Segment *image, int64_t offset, int64_t product_step, const uint32_t *kernels,
                      int64_t count, int64_t pairs, float *to_kernels, const int vectors) {
    const uint32_t *weights = image->weights;
    __m512 sum[FEW][PANEL];
    sum_products(image->tiles + offset, image->products, product_step, image->places, sum, vectors);
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
ALWAYS void share_out_two(const Segment images[2], int64_t offset, int64_t product_step, const uint32_t *kernels,
                          int64_t count, int64_t pairs, float *to_kernels, const int vectors) {
    __m512 sum[FEW][PANEL];
    __m512i both[FEW][PANEL];
    float kept[FEW * PANEL * LANES] __attribute__((aligned(64)));
    sum_products(images[0].tiles + offset, images[0].products, product_step, images[0].places, sum, vectors);
    share_with_weights(sum, kernels, count, pairs, images[0].to_weights, vectors);
#pragma GCC unroll 4
    for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_store_ps(kept + (i * vectors + v) * LANES, sum[i][v]);
    sum_products(images[1].tiles + offset, images[1].products, product_step, images[1].places, sum, vectors);
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

// Adds up the gradients of `rows` segments towards 4 channels, whose tiles lie `offset` further on.
ALWAYS void add_gradients(const Segment *segments, int64_t rows, int64_t offset, int64_t product_step,
                          const uint32_t *kernels, int64_t count, int64_t pairs, float *to, const int vectors) {
    int64_t row = 0;
    if (!pairs)
        for (; row < rows; row++) add_whole(segments + row, offset, product_step, to, vectors);
    if (count > 2)
        for (; row + 1 < rows; row += 2)
            share_out_two(segments + row, offset, product_step, kernels, count, pairs, to, vectors);
    for (; row < rows; row++) share_out(segments + row, offset, product_step, kernels, count, pairs, to, vectors);
}

// The same for a number of vectors that is not known before. Not inlined, so that the sums stay in registers.
static __attribute__((noinline)) void add_any_gradients(const Segment *segments, int64_t rows, int64_t offset,
                                                        int64_t product_step, const uint32_t *kernels, int64_t count,
                                                        int64_t pairs, float *to, int vectors) {
#define CALL(v) add_gradients(segments, rows, offset, product_step, kernels, count, pairs, to, v)
    switch (vectors) {
        case 1: CALL(1); break;
        case 2: CALL(2); break;
        case 3: CALL(3); break;
        default: CALL(4);
    }
#undef CALL
}

// G' p G of 16 outputs' gradients, product f at from[f * step], added up over the teams' spaces: to 3x3 rows of 16.
static void restore_kernels(const float *from, int64_t step, int64_t space, int64_t teams, float to[9][LANES]) {
    __m512 half[3][4];
    for (int j = 0; j < 4; j++) {
        __m512 p[4];
        for (int i = 0; i < 4; i++) {
            p[i] = _mm512_loadu_ps(from + (4 * i + j) * step);
            for (int64_t team = 1; team < teams; team++)
                p[i] = _mm512_add_ps(p[i], _mm512_loadu_ps(from + team * space + (4 * i + j) * step));
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
    int64_t panels = (outputs + PANEL * LANES - 1) / (PANEL * LANES), space = F * slots * channels * outputs;
    // Threads take chunks of their own, into sums of their own, which are added up afterwards; where those would be
    // larger than the caches, all threads share each chunk, and each takes some of the only sums.
    int64_t teams = space * 4 < MOST_SUMS ? threads : 1, there = 1;
    Plan p = plan(s, F * 2 * (channels + outputs), space * 4, (int)teams);
    int64_t across = (p.tiles_across + 1) / 2, most_places = p.rows_at_once * across;
    int64_t tile_step = most_places * channels + 16, product_step = most_places * outputs + 16;
    float *spaces = aligned_alloc(64, teams * space * 4), *all_shares = zeros(threads * shares * LANES);
    uint32_t *maps = aligned_alloc(64, up(teams * F * (tile_step + product_step) * 4, 64));
    Segment *all_segments = malloc(threads * p.rows_at_once * sizeof(Segment));
    Maps inputs = {x, NULL, s->height, s->width, s->channels}, back = {dy, places, s->height, s->width, s->outputs};
    int failed = !spaces || !all_shares || !maps || !all_segments;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            {
                there = omp_get_num_threads();  // which may be fewer than were asked for
                teams = least(teams, there);
            }
            int64_t members = teams > 1 ? 1 : there;
            int64_t team = omp_get_thread_num() / members, member = omp_get_thread_num() % members, chunk = team;
            uint32_t *tiles = maps + team * F * (tile_step + product_step), *products = tiles + F * tile_step;
            float *sums = spaces + team * space, *share = all_shares + omp_get_thread_num() * shares * LANES;
            Segment *segments = all_segments + omp_get_thread_num() * p.rows_at_once;
            for (; chunk < p.chunks; chunk += teams) {
                int64_t first = chunk * p.rows_at_once, last = least(s->images * p.tile_rows, first + p.rows_at_once);
                for (int64_t row = first + member; row < last; row += members) {
                    int64_t image = row / p.tile_rows, place = (row - first) * across * LANES;
                    transform_pairs(&inputs, image, channels, row % p.tile_rows, across,
                                    most_places, tiles + place, tile_step);
                    spread_pairs(&back, image, outputs, row % p.tile_rows, across,
                                 most_places, scales ? scales[image] : 1, products + place, product_step);
                }
                if (members > 1) {
#pragma omp barrier
                }
                for (int64_t part = member; part < F * panels; part += members) {
                    int64_t f = part / panels, o = part % panels * PANEL * LANES, count = 0;
                    int vectors = (int)least(PANEL, (outputs - o) / LANES);
                    for (int64_t row = first, stop; row < last; row = stop) {
                        int64_t image = row / p.tile_rows, place = (row - first) * across * LANES;
                        stop = pairs ? least(last, (image + 1) * p.tile_rows) : last;
                        segments[count++] = (Segment){
                            tiles + f * tile_step + place,
                            products + f * product_step + o * most_places + place,
                            weights + image * pairs,
                            share + image * 2 * pairs * LANES,
                            (stop - row) * across,
                        };
                    }
                    for (int64_t c = 0; c < channels; c += FEW) {
                        int64_t place = (f * outputs + o) * channels + c * vectors * LANES;
                        float *to = sums + place * slots;
                        if (chunk == team) memset(to, 0, FEW * slots * vectors * LANES * 4);
                        add_any_gradients(segments, count, c / LANES * LANES * most_places + c % LANES,
                                          most_places * LANES, kernels + place * pairs, s->kernels, pairs, to,
                                          vectors);
                    }
                }
                if (members > 1) {
#pragma omp barrier
                }
            }
            if (chunk == team && !member) memset(sums, 0, space * 4);  // there was none for this team
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t o = 0; o < s->outputs; o += LANES)
                for (int64_t k = 0; k < most(1, s->kernels); k++)
                    for (int64_t c = 0; c < s->channels; c++) {
                        float rows[9][LANES], *to = to_kernels[k];
                        restore_kernels(spaces + at(0, c, k, o, channels, slots, outputs), slots * channels * outputs,
                                        space, teams, rows);
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
    free(all_segments);
    return failed;
}
