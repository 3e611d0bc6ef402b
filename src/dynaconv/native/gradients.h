// The way back to the kernels and to the weights that mix them: a part of tile2.c, tile3.c and tile4.c.

#pragma once

#include "winograd.h"

// One tile row of a chunk, or two, whose tiles are taken in pairs one after the other: of an odd number across, one
// pair has the last tile of the first row and the first one of the second. A single such row lacks a tile.
typedef struct {
    const Maps *maps;
    int64_t first, rows;   // the first one among those of all images; 1 or 2
    int64_t down, across;  // tile rows of an image, tiles of a row
} Rows;

static inline int64_t pairs_of(const Rows *r) { return (r->rows * r->across + 1) / 2; }

// Where a tile begins. A missing one begins behind the map: it has no outputs there.
static inline void find_tile(const Rows *r, int64_t tile, int64_t *image, int64_t *y, int64_t *x) {
    int64_t below = r->rows == 2 && tile >= r->across, row = r->first + below;
    *image = row / r->down, *y = TILE * (row % r->down), *x = TILE * (tile - below * r->across);
}

// B' x B as `transform_rows`, of pairs of tiles: to (F, pairs, channels) pairs. What a missing tile holds here has no
// gradient to be multiplied with.
static void transform_pairs(const Rows *r, int64_t padded, int64_t chunk, uint32_t *to, int64_t stride) {
    for (int64_t pair = 0; pair < pairs_of(r); pair++, to += LANES) {
        Square squares[2];
        for (int i = 0; i < 2; i++) {
            int64_t image, y, x;
            find_tile(r, 2 * pair + i, &image, &y, &x);
            find_square(r->maps, image, y - 1, x - 1, POINTS, squares + i);
        }
        for (int64_t c = 0; c < padded; c += LANES) {
            __mmask16 mask = lanes_left(r->maps->channels - c);
            __m512 v[2][F];
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) transform_inputs(squares + i, c, mask, v[i], 0);
#pragma GCC unroll 36
            for (int f = 0; f < F; f++) _mm512_storeu_si512(to + c * chunk + f * stride, interleave(v[0][f], v[1][f]));
        }
    }
}

// The gradient of a tile, 16 outputs of it, to points.
ALWAYS void spread_gradients(const Square *from, int64_t output, __mmask16 mask, __m512 factor, __m512 to[F],
                             const int pooled) {
    __m512 column[TILE][POINTS];
#pragma GCC unroll 16
    for (int j = 0; j < TILE; j++) {
        __m512 d[TILE];
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++)
            d[i] = _mm512_mul_ps(factor, read_square(from, TILE * i + j, output, mask, pooled));
        spread(d, column[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < POINTS; i++) {
        __m512 row[TILE];
#pragma GCC unroll 16
        for (int j = 0; j < TILE; j++) row[j] = column[j][i];
        spread(row, to + POINTS * i);
    }
}

// The same of a pair of tiles, of all outputs.
ALWAYS void spread_pair(const Square from[2], int64_t outputs, int64_t padded, int64_t chunk, const float factors[2],
                        uint32_t *to, int64_t stride, const int pooled) {
    for (int64_t o = 0; o < padded; o += LANES) {
        __mmask16 mask = lanes_left(outputs - o);
        __m512 v[2][F];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) spread_gradients(from + i, o, mask, _mm512_set1_ps(factors[i]), v[i], pooled);
#pragma GCC unroll 36
        for (int f = 0; f < F; f++) _mm512_storeu_si512(to + o * chunk + f * stride, interleave(v[0][f], v[1][f]));
    }
}

// A y A' of pairs of tiles: the gradient towards the products, to (F, pairs, outputs) pairs. Each image has its factor.
static void spread_pairs(const Rows *r, int64_t padded, int64_t chunk, const float *scales, uint32_t *to,
                         int64_t stride) {
    for (int64_t pair = 0; pair < pairs_of(r); pair++, to += LANES) {
        Square squares[2];
        float factors[2];
        for (int i = 0; i < 2; i++) {
            int64_t image, y, x;
            find_tile(r, 2 * pair + i, &image, &y, &x);
            find_square(r->maps, image, y, x, TILE, squares + i);
            factors[i] = scales ? scales[image] : 1;
        }
        if (r->maps->places)
            spread_pair(squares, r->maps->channels, padded, chunk, factors, to, stride, 1);
        else
            spread_pair(squares, r->maps->channels, padded, chunk, factors, to, stride, 0);
    }
}

// G' p G of 16 outputs' gradients, product f at from[f * step], added up over the teams' spaces: to 3x3 rows of 16.
static void restore_kernels(const float *from, int64_t step, int64_t space, int64_t teams, float to[9][LANES]) {
    __m512 half[POINTS][3];
    for (int j = 0; j < POINTS; j++) {
        __m512 p[POINTS];
        for (int i = 0; i < POINTS; i++) {
            p[i] = _mm512_loadu_ps(from + (POINTS * i + j) * step);
            for (int64_t team = 1; team < teams; team++)
                p[i] = _mm512_add_ps(p[i], _mm512_loadu_ps(from + team * space + (POINTS * i + j) * step));
        }
        kernel_from_points(p, half[j]);
    }
    for (int i = 0; i < 3; i++) {
        __m512 p[POINTS], row[3];
        for (int j = 0; j < POINTS; j++) p[j] = half[j][i];
        kernel_from_points(p, row);
        for (int j = 0; j < 3; j++) _mm512_storeu_ps(to[3 * i + j], row[j]);
    }
}

// Bytes of a thread's own gradients at most. Those of two threads have to stay in the last cache beside all that passes
// by: at 9 MB it took a fifth longer than one set for both, at 6.5 MB a fifth less (docs/log.md).
static const int64_t MOST_SUMS = (int64_t)8 << 20;

// The gradients of `dynaconv_mix` with x from that of its result, dy, (N, H, W, O): towards the kernels,
// (O, C, side, side) float32 each, and where kernels are mixed towards the weights, (N, K) float32 with K rounded up
// to a pair. Scales are those of the sums; places, if any, those that max-pooling took the result from.
// Returns 0, or 1 where memory is short.
int OF_TILE(dynaconv_mix_gradients)(const bf16 *x, const bf16 *dy, const uint8_t *places, const uint32_t *kernels,
                                    const uint32_t *weights, const float *scales, const Shape *s, const int64_t *sides,
                                    float *const *to_kernels, float *to_weights, int threads) {
    int64_t channels = up(s->channels, LANES), outputs = up(s->outputs, LANES);
    int64_t pairs = (s->kernels + 1) / 2, slots = most(1, 2 * pairs), shares = s->images * 2 * pairs;
    int64_t panels = (outputs + PANEL * LANES - 1) / (PANEL * LANES), space = F * slots * channels * outputs;
    // Threads take chunks of their own, into sums of their own, which are added up afterwards; where those would be
    // larger than the caches, all threads share each chunk, and each takes some of the only sums.
    int64_t teams = space * 4 < MOST_SUMS ? threads : 1, running = 1;
    Plan p = plan(s, F * 2 * (channels + outputs), space * 4, (int)teams);
    // Pairs of a mixed kernel stay in their image, of which a chunk may have a part alone.
    int64_t most_places = pairs ? p.rows_at_once * ((p.tiles_across + 1) / 2)
                                : (p.rows_at_once * p.tiles_across + 1) / 2;
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
                running = omp_get_num_threads();  // which may be fewer than were asked for
                teams = least(teams, running);
            }
            int64_t members = teams > 1 ? 1 : running;
            int64_t team = omp_get_thread_num() / members, member = omp_get_thread_num() % members, chunk = team;
            uint32_t *tiles = maps + team * F * (tile_step + product_step), *products = tiles + F * tile_step;
            float *sums = spaces + team * space, *share = all_shares + omp_get_thread_num() * shares * LANES;
            Segment *segments = all_segments + omp_get_thread_num() * p.rows_at_once;
            for (; chunk < p.chunks; chunk += teams) {
                int64_t first = chunk * p.rows_at_once, last = least(s->images * p.tile_rows, first + p.rows_at_once);
                int64_t count = 0, start = 0, turn = 0;
                for (int64_t row = first, stop; row < last; row = stop) {
                    int64_t image = row / p.tile_rows;
                    stop = pairs ? least(last, (image + 1) * p.tile_rows) : last;
                    Segment *segment = segments + count++;
                    *segment = (Segment){tiles + start * LANES, products + start * LANES, weights + image * pairs,
                                         share + image * 2 * pairs * LANES, 0};
                    for (int64_t r = row; r < stop; r += 2, turn++) {
                        Rows rows = {&inputs, r, least(2, stop - r), p.tile_rows, p.tiles_across};
                        if (turn % members == member) {
                            transform_pairs(&rows, channels, most_places, tiles + start * LANES, tile_step);
                            rows.maps = &back;
                            spread_pairs(&rows, outputs, most_places, scales, products + start * LANES, product_step);
                        }
                        segment->places += pairs_of(&rows), start += pairs_of(&rows);
                    }
                }
                if (members > 1) {
#pragma omp barrier
                }
                for (int64_t part = member; part < F * panels; part += members) {
                    int64_t f = part / panels, o = part % panels * PANEL * LANES;
                    int vectors = (int)least(PANEL, (outputs - o) / LANES);
                    for (int64_t c = 0; c < s->channels; c += FEW) {
                        int64_t place = (f * outputs + o) * channels + c * vectors * LANES;
                        float *to = sums + place * slots;
                        if (chunk == team) memset(to, 0, FEW * slots * vectors * LANES * 4);
                        Offsets there = {f * tile_step + c / LANES * LANES * most_places + c % LANES,
                                         f * product_step + o * most_places, most_places * LANES};
                        add_gradients(segments, count, &there, kernels + place * pairs, s->kernels, pairs, to, vectors);
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
