// The way back to the kernel of a convolution, on matrix tiles.
//
//   dW[o, c, tap] = sum over images and places of dY[n, place, o] * X[n, place + tap, c]
//
// A product sums over 32 images at one place: dY lies with images side by side on the left, X in pairs of images on the
// right. Three taps of a row and 32 channels are summed at once, in six tiles.
//
// Letters: N images, H W map, C channels in, O channels out.

#include "matrix.h"

#ifdef MATRIX_TILES

static const int64_t MOST_SUMS = (int64_t)256 << 20;   // bytes of gradients that all threads add up
static const int64_t MOST_PACKED = (int64_t)3 << 18;  // bytes of packed maps that a thread works on at once, or
static const int64_t MOST_MORE = (int64_t)2 << 20;    // so many more where its sums, which pass by each time, are large

// 32 channels of a place of an image, or zeros behind the last image.
ALWAYS __m512i read_image(const Maps *maps, int64_t image, int64_t images, int64_t y, int64_t x, int64_t c) {
    return image < images ? read_numbers(maps, image, y, x, c) : _mm512_setzero_si512();
}

// One row of the maps of 32 images to (W, up to C / 16) right tiles of pairs of images.
static void pack_pairs(const Maps *maps, int64_t first, int64_t images, int64_t y, uint32_t *to) {
    for (int64_t x = 0; x < maps->width; x++)
        for (int64_t c = 0; c < maps->channels; c += MATRIX_DEPTH, to += 2 * MATRIX_PAIRS)
            for (int64_t pair = 0; pair < MATRIX_ROWS; pair++) {
                __m512i a = read_image(maps, first + 2 * pair, images, y, x, c);
                __m512i b = read_image(maps, first + 2 * pair + 1, images, y, x, c);
                _mm512_store_si512(to + pair * LANES, pair_low(a, b));
                _mm512_store_si512(to + MATRIX_PAIRS + pair * LANES, pair_high(a, b));
            }
}

// The same row, times each image's factor, to (W, up to C / 16) left tiles: images side by side, a row for a channel.
static void pack_beside(const Maps *maps, int64_t first, int64_t images, int64_t y, const float *scales, uint32_t *to) {
    for (int64_t x = 0; x < maps->width; x++)
        for (int64_t c = 0; c < maps->channels; c += MATRIX_DEPTH, to += 2 * MATRIX_PAIRS) {
            __m512i low[LANES], high[LANES];
#pragma GCC unroll 16
            for (int64_t pair = 0; pair < MATRIX_ROWS; pair++) {
                int64_t image = first + 2 * pair;
                __m512i a = read_image(maps, image, images, y, x, c), b = read_image(maps, image + 1, images, y, x, c);
                __m512 of_a = _mm512_set1_ps(scales && image < images ? scales[image] : 1);
                __m512 of_b = _mm512_set1_ps(scales && image + 1 < images ? scales[image + 1] : 1);
                low[pair] = interleave(_mm512_mul_ps(of_a, low_half(a)), _mm512_mul_ps(of_b, low_half(b)));
                high[pair] = interleave(_mm512_mul_ps(of_a, high_half(a)), _mm512_mul_ps(of_b, high_half(b)));
            }
            transpose(low);
            transpose(high);
            for (int64_t o = 0; o < LANES; o++) {
                _mm512_store_si512(to + o * LANES, low[o]);
                _mm512_store_si512(to + MATRIX_PAIRS + o * LANES, high[o]);
            }
        }
}

// Packed rows of x and dy of some groups of 32 images: row y of x lies at y modulo `held`, of dy at y modulo `strip`.
typedef struct {
    int64_t groups, held, strip, x_step, dy_step;  // numbers from place to place
    int64_t x_row, dy_row, x_group, dy_group;      // from row to row, from group to group
    uint32_t *x, *dy;
} Packed;

// Adds to six sums of 16 outputs and 16 channels: of the three taps in the kernel's row that looks `down` by -1, 0 or
// 1, and of 32 channels. Of a 1x1 kernel it is the middle two alone. `o` and `c` are where the outputs and the channels
// begin in a place.
static void add_products(const Packed *p, const Shape *s, int64_t start, int64_t stop, int64_t down, int64_t side,
                         int64_t o, int64_t c, float *sums, int fresh) {
    if (fresh) {
        zero_six();
    } else {
        _tile_loadd(0, sums, MATRIX_STRIDE);
        _tile_loadd(1, sums + MATRIX_PAIRS, MATRIX_STRIDE);
        _tile_loadd(2, sums + 2 * MATRIX_PAIRS, MATRIX_STRIDE);
        _tile_loadd(3, sums + 3 * MATRIX_PAIRS, MATRIX_STRIDE);
        _tile_loadd(4, sums + 4 * MATRIX_PAIRS, MATRIX_STRIDE);
        _tile_loadd(5, sums + 5 * MATRIX_PAIRS, MATRIX_STRIDE);
    }
    for (int64_t group = 0; group < p->groups; group++)
        for (int64_t y = start; y < stop; y++) {
            if (y + down < 0 || y + down >= s->height) continue;
            const uint32_t *left = p->dy + group * p->dy_group + y % p->strip * p->dy_row + o;
            const uint32_t *right = p->x + group * p->x_group + (y + down) % p->held * p->x_row + c;
            for (int64_t x = 0; x < s->width; x++, left += p->dy_step, right += p->x_step) {
                _tile_loadd(6, left, MATRIX_STRIDE);
#define MULTIPLY(sum, from)                     \
    _tile_loadd(7, from, MATRIX_STRIDE);        \
    _tile_dpbf16ps(sum, 6, 7);
                if (x > 0 && side == 3) {
                    MULTIPLY(0, right - p->x_step)
                    MULTIPLY(1, right - p->x_step + MATRIX_PAIRS)
                }
                MULTIPLY(2, right)
                MULTIPLY(3, right + MATRIX_PAIRS)
                if (x + 1 < s->width && side == 3) {
                    MULTIPLY(4, right + p->x_step)
                    MULTIPLY(5, right + p->x_step + MATRIX_PAIRS)
                }
#undef MULTIPLY
            }
        }
    store_six(sums);
}

// The gradient towards the kernel, (O, C, side, side) float32, of `dynaconv_direct` with x, from that of its result:
// dy, (N, H, W, O), or what max-pooling left of it, with its places. Scales, (N,), are those of the sums, or none.
// Returns 0, or 1 where memory is short.
int dynaconv_direct_gradients(const bf16 *x, const bf16 *dy, const uint8_t *places, const float *scales, int64_t side,
                              const Shape *s, float *to_kernel, int threads) {
    enum { GROUP = 2 * MATRIX_ROWS };
    int64_t channels = up(s->channels, MATRIX_DEPTH), outputs = up(s->outputs, MATRIX_DEPTH), margin = side / 2;
    Packed sizes = {.x_step = channels * MATRIX_ROWS, .dy_step = outputs * MATRIX_ROWS};
    sizes.x_row = s->width * sizes.x_step, sizes.dy_row = s->width * sizes.dy_step;
    int64_t rows = 3 * 2 * MATRIX_PAIRS, space = outputs / LANES * (channels / MATRIX_DEPTH) * side * rows;
    int64_t most_packed = MOST_PACKED + least(MOST_MORE, space * 4);
    int64_t fitting = (most_packed / 4 - 2 * sizes.x_row) / (sizes.x_row + sizes.dy_row);
    sizes.strip = most(1, least(s->height, fitting)), sizes.held = sizes.strip + 2;
    int64_t groups = (s->images + GROUP - 1) / GROUP, whole = s->height * (sizes.x_row + sizes.dy_row) * 4;
    sizes.groups = most(1, least((groups + threads - 1) / threads, most_packed / whole));
    sizes.x_group = sizes.held * sizes.x_row, sizes.dy_group = sizes.strip * sizes.dy_row;
    // As many chunks for each thread; where there are too few for that, rows are cut instead.
    int64_t chunks = least(groups, up((groups + sizes.groups - 1) / sizes.groups, threads));
    int64_t even = chunks % threads == 0 || chunks >= 4 * threads;
    int64_t cuts = even ? 1 : least(threads, s->height), rows_each = (s->height + cuts - 1) / cuts;
    // Each thread has sums of its own: no more of them than there is work, nor than a few caches hold.
    threads = (int)most(1, least(threads, least(chunks * cuts, MOST_SUMS / (space * 4))));
    float *spaces = aligned_alloc(64, threads * space * 4);
    Maps inputs = {x, NULL, s->height, s->width, s->channels}, back = {dy, places, s->height, s->width, s->outputs};
    int failed = !spaces;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Packed p = sizes;
        MatrixConfig before;
        float *sums = spaces + omp_get_thread_num() * space;
        int fresh = 1;
        p.x = aligned_alloc(64, p.groups * p.x_group * 4), p.dy = aligned_alloc(64, p.groups * p.dy_group * 4);
        failed = !spaces || !p.x || !p.dy;
        take_tiles(&before);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < chunks * cuts; task++) {
            if (!spaces || !p.x || !p.dy) continue;
            int64_t chunk = task / cuts, first = groups * chunk / chunks * GROUP, top = task % cuts * rows_each;
            p.groups = groups * (chunk + 1) / chunks - groups * chunk / chunks;
            int64_t bottom = least(s->height, top + rows_each), packed = most(0, top - margin);
            for (int64_t start = top; start < bottom; start += p.strip) {
                int64_t stop = least(bottom, start + p.strip);
                for (; packed < least(s->height, stop + margin); packed++)
                    for (int64_t group = 0; group < p.groups; group++)
                        pack_pairs(&inputs, first + group * GROUP, s->images, packed,
                                   p.x + group * p.x_group + packed % p.held * p.x_row);
                for (int64_t y = start; y < stop; y++)
                    for (int64_t group = 0; group < p.groups; group++)
                        pack_beside(&back, first + group * GROUP, s->images, y, scales,
                                    p.dy + group * p.dy_group + y % p.strip * p.dy_row);
                WRITTEN;
                float *to = sums;
                for (int64_t o = 0; o < outputs / LANES; o++)
                    for (int64_t c = 0; c < channels / LANES; c += 2)
                        for (int64_t down = -margin; down <= margin; down++, to += rows)
                            add_products(&p, s, start, stop, down, side, o * MATRIX_PAIRS, c * MATRIX_PAIRS, to, fresh);
                WRITTEN;
                fresh = 0;
            }
        }
        give_tiles_back(&before);
        if (fresh && spaces) memset(sums, 0, space * 4);
        free(p.x);
        free(p.dy);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t o = 0; o < s->outputs; o++)
            for (int64_t c = 0; c < s->channels && spaces; c++)
                for (int64_t tap = 0; tap < side * side; tap++) {
                    int64_t row = (o / LANES * (channels / MATRIX_DEPTH) + c / MATRIX_DEPTH) * side + tap / side;
                    int64_t column = tap % side + (side == 1), tile = 2 * column + c % MATRIX_DEPTH / LANES;
                    float sum = 0;
                    for (int64_t t = 0; t < omp_get_num_threads(); t++)
                        sum += spaces[t * space + row * rows + tile * MATRIX_PAIRS + o % LANES * LANES + c % LANES];
                    to_kernel[(o * s->channels + c) * side * side + tap] = sum;
                }
    }
    free(spaces);
    return failed;
}

#endif
