// The way back of a mixture to its kernels and weights, on matrix tiles.
//
//   G_n = dY_n * X_n,    dW_k = sum over images of a_nk G_n,    da_nk = <G_n, W_k>
//
// A product sums over 32 places of one image. The gradients of a few images' own kernels are made 16 outputs, 32
// channels and three taps at a time and shared out at once, so that they never leave the nearest cache. Each thread has
// outputs and channels of its own, of all images, and packs the maps for itself alone: to fetch what another thread has
// written takes longer than to pack it again.
//
// Letters: N images, H W map, C channels in, O channels out, K kernels.

#include "places.h"

#ifdef MATRIX_TILES

static const int64_t MOST_SLAB = (int64_t)3 << 19;  // bytes of packed maps that a thread works on, or four images' maps
enum {
    MOST_KERNELS = 8,              // whose shares are added up at once
    TOGETHER = 4,                  // images that are shared out at once
    GROUP = 3 * 2 * MATRIX_PAIRS,  // numbers of three taps: of 16 outputs and 32 channels
    BLOCK_NUMBERS = 3 * GROUP,
};

// How an image is packed in pairs of places, of which a product sums over 16. If the map's rows are whole tiles, a pair
// is a place and the one below it. Maps lie there once, in lines of 16 channels with zeros to the left and right of a
// row, and gradients twice: in pairs from even rows on, for the kernel's middle row, and from odd ones, for the others.
// Else a pair is two places of a row, gradients lie there once, and maps three times, moved by one place each, with
// zeros where a row ends.
typedef struct {
    int64_t upright, moves, lines;  // pairs of rows; times that maps lie there; lines of 16 channels each time
    int64_t right[3], step;         // lines to each of three groups of taps, and from tap to tap in a group
    int64_t left[3], tiles;         // tiles of gradients to each group, and all of 16 outputs
    int64_t rows, across, row;      // of products, and lines from row to row
    int64_t places;                 // that a row of maps continues to, with the zeros beside it
} Pairs;

static Pairs pairs_of(const Shape *s) {
    int64_t height = s->height, width = s->width, rows = (height + 1) / 2, across = width / MATRIX_ROWS;
    if (width % MATRIX_ROWS == 0) {
        int64_t row = width + 2, even = rows * across;
        return (Pairs){1, 1, rows * row, {0}, 1, {even + across, 0, even}, 2 * even + across, rows, across, row, row};
    }
    int64_t lines = (height + 2) * width / 2 + MATRIX_ROWS, products = up(height * width, MATRIX_DEPTH) / MATRIX_DEPTH;
    return (Pairs){0, 3, lines, {0, 2 * lines, 4 * lines}, width / 2, {0}, products, products, 1, MATRIX_ROWS, width};
}

// Maps of one image, which were not pooled, `blocks` times 32 channels, to (blocks, moves, 2 halves, lines) pairs.
static void pack_pairs(const Maps *maps, int64_t image, const Pairs *p, int64_t first_block, int64_t blocks,
                       uint32_t *to) {
    int64_t half = p->lines * LANES, down = p->upright, step = 2 - down, first = down - 1;
    for (int64_t y = first; y < maps->height + 1 - down; y += 1 + down) {
        const bf16 *row = row_or_none(maps, image, y), *other = down ? row_or_none(maps, image, y + 1) : row;
        uint32_t *plane = to, *low = NULL;
        for (int64_t c = first_block * MATRIX_DEPTH; c < (first_block + blocks) * MATRIX_DEPTH; c += MATRIX_DEPTH)
            for (int64_t move = 0; move < p->moves; move++, plane += 2 * half) {
                low = plane + (y - first) / (1 + down) * (p->places / step) * LANES;
                for (int64_t i = 0, x = down ? -1 : move - 1; i < p->places; i += step, x += step, low += LANES) {
                    __m512i a = read_in_row(maps, row, x, c), b = read_in_row(maps, other, x + 1 - down, c);
                    _mm512_store_si512(low, pair_low(a, b));
                    _mm512_store_si512(low + half, pair_high(a, b));
                }
                if (y + 1 + down < maps->height + 1 - down) continue;
                memset(low, 0, (plane + half - low) * 4);
                memset(low + half, 0, (plane + half - low) * 4);
            }
    }
}

// Lines of 16 pairs of places, 16 outputs each, to a left tile.
ALWAYS void store_tile(__m512i pairs[LANES], uint32_t *to) {
    transpose(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) _mm512_store_si512(to + i * LANES, pairs[i]);
}

// Two left tiles, of 32 outputs from `o`: 16 places from (y, x) on, each with the one below. Where no tile before
// has had these rows, those after the next are fetched from memory meanwhile.
ALWAYS void pack_below(const Maps *maps, int64_t image, int64_t y, int64_t x, int64_t o, int fresh, uint32_t *low_to,
                       uint32_t *high_to) {
    const bf16 *at = maps->numbers + ((image * maps->height + y) * maps->width + x) * maps->channels + o;
    int64_t below = maps->width * maps->channels;
    __mmask32 mask = numbers_left(maps->channels - o), upper = y >= 0 && y < maps->height ? mask : 0;
    __mmask32 lower = y + 1 < maps->height ? mask : 0;
    __m512i low[LANES], high[LANES];
#pragma GCC unroll 16
    for (int pair = 0; pair < MATRIX_ROWS; pair++, at += maps->channels) {
        if (fresh) {
            _mm_prefetch((const char *)(at + 2 * below), _MM_HINT_T0);
            _mm_prefetch((const char *)(at + 3 * below), _MM_HINT_T0);
        }
        __m512i a = _mm512_maskz_loadu_epi16(upper, at), b = _mm512_maskz_loadu_epi16(lower, at + below);
        low[pair] = pair_low(a, b), high[pair] = pair_high(a, b);
    }
    store_tile(low, low_to);
    store_tile(high, high_to);
}

// Gradients of one image, 32 outputs from `o`, to two times `tiles` left tiles: places side by side, zeros around.
static void pack_beside(const Maps *maps, int64_t image, const Pairs *p, int64_t o, uint32_t *to) {
    int64_t even = p->rows * p->across, second = p->tiles * MATRIX_PAIRS;
    for (int64_t tile = 0; tile < p->tiles; tile++, to += MATRIX_PAIRS) {
        int64_t row = tile < even ? tile / p->across * 2 : (tile - even) / p->across * 2 - 1;
        int64_t column = tile % p->across * MATRIX_ROWS;
        if (p->upright && !maps->places) {
            pack_below(maps, image, row, column, o, tile < even, to, to + second);
            continue;
        }
        __m512i low[LANES], high[LANES];
        for (int64_t pair = 0; pair < MATRIX_ROWS; pair++) {
            int64_t place = tile * MATRIX_DEPTH + 2 * pair;
            int64_t y = p->upright ? row : place / maps->width, x = p->upright ? column + pair : place % maps->width;
            __m512i a = read_around(maps, image, y, x, o);
            __m512i b = read_around(maps, image, y + p->upright, x + !p->upright, o);
            low[pair] = pair_low(a, b), high[pair] = pair_high(a, b);
        }
        store_tile(low, to);
        store_tile(high, to + second);
    }
}

// Three taps of an image's gradient, `GROUP` numbers.
static void multiply_group(const uint32_t *left, const uint32_t *right, const Pairs *p, float *to) {
    zero_six();
    for (int64_t row = 0; row < p->rows; row++, right += p->row * LANES)
        for (int64_t product = 0; product < p->across; product++, left += MATRIX_PAIRS) {
            const uint32_t *from = right + product * MATRIX_PAIRS;
            _tile_loadd(6, left, MATRIX_STRIDE);
#define MULTIPLY(sum)                                                                             \
    _tile_loadd(7, from + ((sum) % 2 * p->lines + (sum) / 2 * p->step) * LANES, MATRIX_STRIDE);   \
    _tile_dpbf16ps(sum, 6, 7);
            MULTIPLY(0)
            MULTIPLY(1)
            MULTIPLY(2)
            MULTIPLY(3)
            MULTIPLY(4)
            MULTIPLY(5)
#undef MULTIPLY
        }
    store_six(to);
    WRITTEN;
}

// Adds the gradients of `images` images, times their weights, to those of `count` kernels, and their inner products
// with the kernels, which lie in pairs, to `shares`, a vector for each image and kernel.
ALWAYS void share_out(const float *gradients, const uint32_t *kernels, const float *weights, float *sums, float *shares,
                      const int images, const int count) {
    __m512 share[TOGETHER * MOST_KERNELS];
    for (int i = 0; i < images * count; i++) share[i] = _mm512_load_ps(shares + i * LANES);
    for (int64_t i = 0; i < GROUP; i += LANES) {
        __m512 g[TOGETHER];
#pragma GCC unroll 4
        for (int n = 0; n < images; n++) g[n] = _mm512_load_ps(gradients + n * GROUP + i);
#pragma GCC unroll 8
        for (int k = 0; k < count; k++) {
            __m512i pair = _mm512_load_si512(kernels + k / 2 * BLOCK_NUMBERS + i);
            __m512 kernel = k % 2 ? second_of(pair) : first_of(pair);
            __m512 sum = _mm512_load_ps(sums + k * BLOCK_NUMBERS + i);
#pragma GCC unroll 4
            for (int n = 0; n < images; n++) {
                sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[n * count + k]), g[n], sum);
                share[n * count + k] = _mm512_fmadd_ps(g[n], kernel, share[n * count + k]);
            }
            _mm512_store_ps(sums + k * BLOCK_NUMBERS + i, sum);
        }
    }
    for (int i = 0; i < images * count; i++) _mm512_store_ps(shares + i * LANES, share[i]);
}

// Where 16 channels of an output, both counted from a part's first, and a tap lie among the part's `BLOCK_NUMBERS`.
ALWAYS int64_t line_of(const Pairs *p, int64_t tap, int64_t output, int64_t channel) {
    int64_t row = tap / 3, column = tap % 3, group = p->upright ? row : column, of_group = p->upright ? column : row;
    return group * GROUP + (of_group * 2 + channel / LANES) * MATRIX_PAIRS + output * LANES;
}

// 16 outputs and 32 channels of K kernels, (O, C, side, side), to the order of gradients in pairs of kernels, K / 2
// rounded up times BLOCK_NUMBERS. A kernel of 1x1 is the middle tap. What lies behind the last output or channel is not
// written, and has to be zero.
static void pair_kernels(const float *const *kernels, const int64_t *sides, const Shape *s, const Pairs *p,
                         int64_t first, int64_t channel, uint32_t *to) {
    for (int64_t k = 0; k < s->kernels; k += 2, to += BLOCK_NUMBERS)
        for (int64_t o = first; o < least(first + LANES, s->outputs); o++)
            for (int64_t c = channel; c < least(channel + MATRIX_DEPTH, s->channels); c += LANES) {
                __m512i taps[2][LANES] = {0};
                for (int64_t j = 0; j < 2 && k + j < s->kernels; j++) {
                    int64_t step = sides[k + j] * sides[k + j], middle = step == 1 ? TAPS / 2 : 0;
                    const float *kernel = kernels[k + j] + (o * s->channels + c) * step;
                    __m512i square[LANES];
                    for (int i = 0; i < LANES; i++)
                        square[i] =
                            _mm512_maskz_loadu_epi32(c + i < s->channels ? lanes_left(step) : 0, kernel + i * step);
                    transpose(square);
                    for (int64_t i = 0; i < step; i++) taps[j][middle + i] = square[i];
                }
                for (int64_t tap = 0; tap < TAPS; tap++)
                    _mm512_store_si512(
                        to + line_of(p, tap, o - first, c - channel),
                        interleave(_mm512_castsi512_ps(taps[0][tap]), _mm512_castsi512_ps(taps[1][tap])));
            }
}

// The gradients of 16 outputs and 32 channels, (K, BLOCK_NUMBERS), to those of K kernels, (O, C, side, side).
static void write_gradients(const float *gradients, const int64_t *sides, const Shape *s, const Pairs *p, int64_t first,
                            int64_t channel, float *const *to) {
    for (int64_t k = 0; k < s->kernels; k++, gradients += BLOCK_NUMBERS)
        for (int64_t o = first; o < least(first + LANES, s->outputs); o++)
            for (int64_t c = channel; c < least(channel + MATRIX_DEPTH, s->channels); c += LANES) {
                int64_t step = sides[k] * sides[k], middle = step == 1 ? TAPS / 2 : 0;
                float *kernel = to[k] + (o * s->channels + c) * step;
                __m512i square[LANES] = {0};
                for (int64_t i = 0; i < step; i++)
                    square[i] = _mm512_load_si512(gradients + line_of(p, middle + i, o - first, c - channel));
                transpose(square);
                for (int64_t i = 0; i < least(s->channels - c, LANES); i++)
                    _mm512_mask_storeu_epi32(kernel + i * step, lanes_left(step), square[i]);
            }
}

// Which 16 outputs and 32 channels a part is: neighbours share what lies packed most often.
#define OUTPUT_OF(part) (pairs.upright ? (part) / blocks : (part) % groups)
#define BLOCK_OF(part) (pairs.upright ? (part) % blocks : (part) / groups)

// The gradients of `dynaconv_direct_mix` with x from that of its result, dy, or what max-pooling left of it, with its
// places: towards the kernels, (O, C, side, side) float32 each, and towards the weights, (N, K) float32.
// At most `MOST_KERNELS` kernels; W is even. Returns 0, or 1 where memory is short.
int dynaconv_direct_mix_gradients(const bf16 *x, const bf16 *dy, const uint8_t *places, const float *const *kernels,
                                  const int64_t *sides, const float *weights, const Shape *s, float *const *to_kernels,
                                  float *to_weights, int threads) {
    int64_t blocks = blocks_of(s->channels), groups = (s->outputs + LANES - 1) / LANES, parts = groups * blocks;
    int64_t count = s->kernels;
    int64_t block = count * BLOCK_NUMBERS, of_paired = (count + 1) / 2 * BLOCK_NUMBERS;
    int64_t shared = s->images * count * LANES;
    Pairs pairs = pairs_of(s);
    int64_t of_block = pairs.moves * 2 * pairs.lines * LANES, of_outputs = pairs.tiles * MATRIX_PAIRS;
    Maps inputs = {x, NULL, s->height, s->width, s->channels}, outer = {dy, places, s->height, s->width, s->outputs};
    float *all_shares = zeros(threads * shared);
    int failed = !all_shares;
    if (failed) return failed;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        // From this part to that one: all channels of some outputs or, where maps lie there three times, all outputs of
        // some channels.
        int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
        int64_t from = parts * self / team, to = parts * (self + 1) / team, inner = pairs.upright ? blocks : groups;
        int64_t first_outer = from / inner, outer_count = to > from ? (to - 1) / inner + 1 - first_outer : 0;
        int64_t first_block = pairs.upright ? 0 : first_outer, first_pair = pairs.upright ? first_outer / 2 : 0;
        int64_t own_blocks = pairs.upright ? blocks : outer_count;
        int64_t own_pairs = pairs.upright ? (first_outer + outer_count + 1) / 2 - first_pair : (groups + 1) / 2;
        int64_t of_x = own_blocks * of_block, of_image = of_x + own_pairs * 2 * of_outputs;
        int64_t slab = least(s->images, most(1, MOST_SLAB / (of_image * 4) / TOGETHER) * TOGETHER);
        uint32_t *maps = aligned_alloc(64, most(1, slab) * of_image * 4);
        float *sums = zeros((to - from) * block);
        uint32_t *paired = (uint32_t *)zeros((to - from) * of_paired);
        float *shares = all_shares + self * shared, gradients[TOGETHER * GROUP] __attribute__((aligned(64)));
        MatrixConfig before;
        int ready = maps && sums && paired;
        failed = !ready;
        take_tiles(&before);
        for (int64_t part = from; ready && part < to; part++)
            pair_kernels(kernels, sides, s, &pairs, OUTPUT_OF(part) * LANES, BLOCK_OF(part) * MATRIX_DEPTH,
                         paired + (part - from) * of_paired);
        for (int64_t first = 0; ready && from < to && first < s->images; first += slab) {
            int64_t images = least(slab, s->images - first);
            for (int64_t i = 0; i < images; i++) {
                pack_pairs(&inputs, first + i, &pairs, first_block, own_blocks, maps + i * of_image);
                for (int64_t o = 0; o < own_pairs; o++)
                    pack_beside(&outer, first + i, &pairs, (first_pair + o) * MATRIX_DEPTH,
                                maps + i * of_image + of_x + o * 2 * of_outputs);
            }
            WRITTEN;
            for (int64_t part = from; part < to; part++)
                for (int64_t i = 0; i < images; i += TOGETHER)
                    for (int64_t group = 0; group < 3; group++) {
                        int64_t o = OUTPUT_OF(part) - 2 * first_pair, c = BLOCK_OF(part) - first_block;
                        int64_t here = least(TOGETHER, images - i);
                        float *to_sums = sums + (part - from) * block + group * GROUP;
                        const uint32_t *of_group = paired + (part - from) * of_paired + group * GROUP;
                        for (int64_t n = 0; n < here; n++) {
                            const uint32_t *image = maps + (i + n) * of_image;
                            multiply_group(image + of_x + o * of_outputs + pairs.left[group] * MATRIX_PAIRS,
                                           image + c * of_block + pairs.right[group] * LANES, &pairs,
                                           gradients + n * GROUP);
                        }
                        const float *factors = weights + (first + i) * count;
                        float *share = shares + (first + i) * count * LANES;
#define SHARE(images, count) share_out(gradients, of_group, factors, to_sums, share, images, count)
                        if (here == TOGETHER && count == 2)
                            SHARE(TOGETHER, 2);
                        else if (here == TOGETHER && count == 3)
                            SHARE(TOGETHER, 3);
                        else if (here == TOGETHER && count == 4)
                            SHARE(TOGETHER, 4);
                        else
                            SHARE((int)here, (int)count);
#undef SHARE
                    }
        }
        give_tiles_back(&before);
        for (int64_t part = from; ready && part < to; part++)
            write_gradients(sums + (part - from) * block, sides, s, &pairs, OUTPUT_OF(part) * LANES,
                            BLOCK_OF(part) * MATRIX_DEPTH, to_kernels);
        free(maps);
        free(sums);
        free(paired);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s->images * count; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t t = 0; t < team; t++)
                sum = _mm512_add_ps(sum, _mm512_load_ps(all_shares + t * shared + i * LANES));
            to_weights[i] = _mm512_reduce_add_ps(sum);
        }
    }
    free(all_shares);
    return failed;
}

#endif
