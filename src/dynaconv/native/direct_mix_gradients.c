// The way back of a mixture to its kernels and weights, on matrix tiles.
//
//   G_n = dY_n * X_n,    dW_k = sum over images of a_nk G_n,    da_nk = <G_n, W_k>
//
// A product sums over 32 places of one image. The gradients of a few images' own kernels are made 16 outputs, 32
// channels and a column of taps at a time and shared out at once, so that they never leave the nearest cache. Each
// thread has outputs and channels of its own, of all images.
//
// Letters: N images, H W map, C channels in, O channels out, K kernels.

#include "matrix.h"

#ifdef MATRIX_TILES

static const int64_t MOST_SLAB = (int64_t)96 << 20;  // bytes of packed maps at once
enum {
    MOST_KERNELS = 8,               // whose shares are added up at once
    TOGETHER = 4,                   // images that are shared out at once
    COLUMN = 3 * 2 * MATRIX_PAIRS,  // numbers in a column of taps: of 16 outputs and 32 channels
    BLOCK_NUMBERS = 3 * COLUMN,
};

// Maps of one image to (C / 32, 3 moves, 2 halves, pairs of places) lines of 16 pairs: H + 2 rows and 32 places more.
// A row has an even number of places, so that a pair never lies in two.
static void pack_place_pairs(const Maps *maps, int64_t image, int64_t lines, uint32_t *to) {
    for (int64_t c = 0; c < maps->channels; c += MATRIX_DEPTH)
        for (int64_t move = -1; move <= 1; move++, to += 2 * lines * LANES) {
            uint32_t *low = to, *high = to + lines * LANES;
            for (int64_t y = -1; y <= maps->height; y++)
                for (int64_t x = move; x < maps->width + move; x += 2, low += LANES, high += LANES) {
                    __m512i a = read_around(maps, image, y, x, c), b = read_around(maps, image, y, x + 1, c);
                    _mm512_store_si512(low, pair_low(a, b));
                    _mm512_store_si512(high, pair_high(a, b));
                }
            memset(low, 0, MATRIX_ROWS * LANES * 4);
            memset(high, 0, MATRIX_ROWS * LANES * 4);
        }
}

// Gradients of one image to (O / 16, places / 32) left tiles: places side by side, zeros behind the last.
static void pack_places_beside(const Maps *maps, int64_t image, int64_t chunks, uint32_t *to) {
    for (int64_t o = 0; o < maps->channels; o += MATRIX_DEPTH, to += 2 * chunks * MATRIX_PAIRS)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            __m512i low[LANES], high[LANES];
            for (int64_t pair = 0; pair < MATRIX_ROWS; pair++) {
                int64_t place = chunk * MATRIX_DEPTH + 2 * pair, y = place / maps->width, x = place % maps->width;
                __m512i a = read_around(maps, image, y, x, o), b = read_around(maps, image, y, x + 1, o);
                low[pair] = pair_low(a, b), high[pair] = pair_high(a, b);
            }
            transpose(low);
            transpose(high);
            for (int64_t i = 0; i < LANES; i++) {
                _mm512_store_si512(to + chunk * MATRIX_PAIRS + i * LANES, low[i]);
                _mm512_store_si512(to + (chunks + chunk) * MATRIX_PAIRS + i * LANES, high[i]);
            }
        }
}

// One column of taps of an image's gradient, `COLUMN` numbers. What lies a row of the map below, `step` lines further,
// is what the next tap takes: it comes from the nearest cache by then.
static void multiply_column(const uint32_t *left, const uint32_t *right, int64_t chunks, int64_t lines, int64_t step,
                            float *to) {
    zero_six();
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const uint32_t *from = right + chunk * MATRIX_PAIRS;
        _tile_loadd(6, left + chunk * MATRIX_PAIRS, MATRIX_STRIDE);
#define MULTIPLY(sum)                                               \
    _tile_loadd(7, from + ((sum) % 2 * lines + (sum) / 2 * step) * LANES, MATRIX_STRIDE); \
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
// with the kernels to `shares`, a vector for each image and kernel.
ALWAYS void share_out(const float *gradients, const float *kernels, const float *weights, float *sums, float *shares,
                      const int images, const int count) {
    __m512 share[TOGETHER * MOST_KERNELS];
    for (int i = 0; i < images * count; i++) share[i] = _mm512_load_ps(shares + i * LANES);
    for (int64_t i = 0; i < COLUMN; i += LANES) {
        __m512 g[TOGETHER];
#pragma GCC unroll 4
        for (int n = 0; n < images; n++) g[n] = _mm512_load_ps(gradients + n * COLUMN + i);
#pragma GCC unroll 8
        for (int k = 0; k < count; k++) {
            __m512 sum = _mm512_load_ps(sums + k * BLOCK_NUMBERS + i);
            __m512 kernel = _mm512_load_ps(kernels + k * BLOCK_NUMBERS + i);
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

// Where a tap of a kernel lies among the numbers of its block.
static inline int64_t number_of(int64_t o, int64_t c, int64_t tap) {
    return tap % 3 * COLUMN + (tap / 3 * 2 + c % MATRIX_DEPTH / LANES) * MATRIX_PAIRS + o % LANES * LANES + c % LANES;
}

// Brings K kernels, (O, C, side, side), into the order of gradients, (O / 16, C / 32, K, BLOCK_NUMBERS); or `back`.
static void order_numbers(float *const *kernels, const int64_t *sides, const Shape *s, float *numbers, int back) {
#pragma omp for schedule(static)
    for (int64_t o = 0; o < s->outputs; o++)
        for (int64_t c = 0; c < s->channels; c++)
            for (int64_t k = 0; k < s->kernels; k++) {
                int64_t block = o / LANES * blocks_of(s->channels) + c / MATRIX_DEPTH, taps = sides[k] * sides[k];
                float *kernel = kernels[k] + (o * s->channels + c) * taps;
                float *here = numbers + (block * s->kernels + k) * BLOCK_NUMBERS;
                for (int64_t tap = 0; tap < taps; tap++) {
                    float *number = here + number_of(o, c, taps == 1 ? 4 : tap);  // a kernel of 1x1 is the middle
                    if (back)
                        kernel[tap] = *number;
                    else
                        *number = kernel[tap];
                }
            }
}

// The gradients of `dynaconv_direct_mix` with x from that of its result, dy, or what max-pooling left of it, with its
// places: towards the kernels, (O, C, side, side) float32 each, and towards the weights, (N, K) float32.
// At most `MOST_KERNELS` kernels; W is even. Returns 0, or 1 where memory is short.
int dynaconv_direct_mix_gradients(const bf16 *x, const bf16 *dy, const uint8_t *places, const float *const *kernels,
                                  const int64_t *sides, const float *weights, const Shape *s, float *const *to_kernels,
                                  float *to_weights, int threads) {
    int64_t blocks = blocks_of(s->channels), outputs = up(s->outputs, MATRIX_DEPTH) / LANES, count = s->kernels;
    int64_t chunks = up(s->height * s->width, MATRIX_DEPTH) / MATRIX_DEPTH;
    int64_t lines = (s->height + 2) * s->width / 2 + MATRIX_ROWS;
    int64_t of_x = blocks * 6 * lines * LANES, of_dy = outputs * chunks * MATRIX_PAIRS, block = count * BLOCK_NUMBERS;
    int64_t slab = most(1, least(s->images, MOST_SLAB / ((of_x + of_dy) * 4)));
    uint32_t *maps = aligned_alloc(64, slab * (of_x + of_dy) * 4), *back = maps + slab * of_x;
    float *sums = zeros(outputs * blocks * block), *plain = zeros(outputs * blocks * block);
    float *all_shares = zeros(threads * s->images * count * LANES);
    Maps inputs = {x, NULL, s->height, s->width, s->channels}, outer = {dy, places, s->height, s->width, s->outputs};
    int failed = !maps || !sums || !plain || !all_shares;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
            float *shares = all_shares + omp_get_thread_num() * s->images * count * LANES;
            float gradients[TOGETHER * COLUMN] __attribute__((aligned(64)));
            MatrixConfig before;
            take_tiles(&before);
            order_numbers((float *const *)kernels, sides, s, plain, 0);
            for (int64_t first = 0; first < s->images; first += slab) {
                int64_t images = least(slab, s->images - first);
#pragma omp for schedule(static)
                for (int64_t i = 0; i < images; i++) {
                    pack_place_pairs(&inputs, first + i, lines, maps + i * of_x);
                    pack_places_beside(&outer, first + i, chunks, back + i * of_dy);
                }
                WRITTEN;
#pragma omp for schedule(static)
                for (int64_t part = 0; part < outputs * blocks; part++)
                    for (int64_t i = 0; i < images; i += TOGETHER)
                        for (int64_t column = 0; column < 3; column++) {
                            int64_t o = part / blocks, c = part % blocks, at = part * block + column * COLUMN;
                            int64_t here = least(TOGETHER, images - i);
                            for (int64_t n = 0; n < here; n++)
                                multiply_column(back + (i + n) * of_dy + o * chunks * MATRIX_PAIRS,
                                                maps + (i + n) * of_x + (c * 3 + column) * 2 * lines * LANES, chunks,
                                                lines, s->width / 2, gradients + n * COLUMN);
                            const float *factors = weights + (first + i) * count;
                            float *share = shares + (first + i) * count * LANES;
#define SHARE(images, count) share_out(gradients, plain + at, factors, sums + at, share, images, count)
                            if (here == TOGETHER && count == 2)
                                SHARE(TOGETHER, 2);
                            else if (here == TOGETHER && count == 4)
                                SHARE(TOGETHER, 4);
                            else
                                SHARE((int)here, (int)count);
#undef SHARE
                        }
            }
            give_tiles_back(&before);
            order_numbers(to_kernels, sides, s, sums, 1);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s->images * count; i++) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t t = 0; t < threads; t++)
                    sum = _mm512_add_ps(sum, _mm512_load_ps(all_shares + (t * s->images * count + i) * LANES));
                to_weights[i] = _mm512_reduce_add_ps(sum);
            }
        }
    }
    free(maps);
    free(sums);
    free(plain);
    free(all_shares);
    return failed;
}

#endif
