// Mixtures of K kernels on matrix tiles: each image has a kernel of its own,
//
//   W_n = a_n1 W_1 + ... + a_nK W_K
//
// mixed 16 outputs at a time into the nearest caches and used up there, and a product's 16 rows are 16 places of one
// image, one after the other along its rows. A tile of places beside those is another 16 rows only if no row of the map
// ends between them: the maps are packed three times, moved by one place each, with zeros where a row ends.
//
// Letters: N images, H W map, C channels in, O channels out, K kernels.

#include "matrix.h"

#ifdef MATRIX_TILES

static const int64_t MOST_MAPS = (int64_t)1 << 20;  // bytes of packed maps that a thread works on at once
enum { TAPS = 9 };

// K kernels, (O, C, side, side) float32, side 3 or 1, to (O / 16, C / 32, 9, 16, K / 2, 2, 16): for each line of a
// right tile, which is of 16 outputs and two channels, pairs of kernels for the one channel and for the other.
// `turned` is as in `dynaconv_pack_kernel`.
void dynaconv_pack_kernels(const float *const *kernels, const int64_t *sides, const Shape *s, int turned, uint32_t *to,
                           int threads) {
    int64_t channels = turned ? s->outputs : s->channels, outputs = turned ? s->channels : s->outputs;
    int64_t blocks = blocks_of(channels), pairs = (s->kernels + 1) / 2;
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o += LANES)
        for (int64_t row = 0; row < blocks * TAPS * MATRIX_DEPTH; row++) {
            int64_t channel = row / (TAPS * MATRIX_DEPTH) * MATRIX_DEPTH + row % MATRIX_DEPTH;
            int64_t tap = row / MATRIX_DEPTH % TAPS, line = (o / LANES * blocks * TAPS * MATRIX_DEPTH + row) / 2;
            __mmask16 mask = channel < channels ? lanes_left(outputs - o) : 0;
            for (int64_t pair = 0; pair < pairs; pair++) {
                __m512 half[2];
                for (int i = 0; i < 2; i++) {
                    int64_t k = 2 * pair + i, side = k < s->kernels ? sides[k] : 0, taps = side * side;
                    int64_t place = side == 3 ? turned ? TAPS - 1 - tap : tap : 0;
                    int64_t row_step = (turned ? s->channels : 1) * taps, step = (turned ? 1 : s->channels) * taps;
                    __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)step));
                    half[i] = _mm512_setzero_ps();
                    if (mask && (side == 3 || (side == 1 && tap == TAPS / 2)))
                        half[i] = _mm512_mask_i32gather_ps(half[i], mask, places,
                                                           kernels[k] + o * step + channel * row_step + place, 4);
                }
                _mm512_storeu_si512(to + ((line * pairs + pair) * 2 + channel % 2) * LANES,
                                    interleave(half[0], half[1]));
            }
        }
}

// `lines` lines of right tiles of one image's kernel.
static void mix_lines(const uint32_t *kernels, const uint32_t *weights, int64_t pairs, int64_t lines, uint32_t *to) {
    for (int64_t line = 0; line < lines; line++, to += LANES) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int64_t pair = 0; pair < pairs; pair++, kernels += 2 * LANES) {
            __m512i weight = _mm512_set1_epi32((int)weights[pair]);
            even = dot(even, weight, _mm512_loadu_si512(kernels));
            odd = dot(odd, weight, _mm512_loadu_si512(kernels + LANES));
        }
        _mm512_store_si512(to, interleave(even, odd));
    }
}

// The maps of an image to (C / 32, 3 moves, places) lines of 32 channels: H + 2 rows and 64 places more.
static void pack_moved(const Maps *maps, int64_t image, bf16 *to) {
    for (int64_t c = 0; c < maps->channels; c += MATRIX_DEPTH)
        for (int64_t move = -1; move <= 1; move++) {
            for (int64_t y = -1; y <= maps->height; y++)
                for (int64_t x = move; x < maps->width + move; x++, to += MATRIX_DEPTH)
                    _mm512_store_si512(to, read_around(maps, image, y, x, c));
            memset(to, 0, 64 * MATRIX_DEPTH * 2);
            to += 64 * MATRIX_DEPTH;
        }
}

// The sums of up to 64 places for 16 outputs, from packed maps and the image's kernel: (64, 16).
static void multiply_places(const bf16 *maps, int64_t plane, int64_t width, int64_t blocks, int64_t tiles,
                            const uint32_t *kernel, float *sums) {
    zero_four();
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tap = 0; tap < TAPS; tap++, kernel += MATRIX_PAIRS) {
            const bf16 *from = maps + (3 * block + tap % 3) * plane + tap / 3 * width * MATRIX_DEPTH;
            _tile_loadd(4, kernel, MATRIX_STRIDE);
            _tile_loadd(5, from, MATRIX_STRIDE);
            _tile_dpbf16ps(0, 5, 4);
            if (tiles > 1) {
                _tile_loadd(6, from + 2 * MATRIX_PAIRS, MATRIX_STRIDE);
                _tile_dpbf16ps(1, 6, 4);
            }
            if (tiles > 2) {
                _tile_loadd(7, from + 4 * MATRIX_PAIRS, MATRIX_STRIDE);
                _tile_dpbf16ps(2, 7, 4);
            }
            if (tiles > 3) {
                _tile_loadd(5, from + 6 * MATRIX_PAIRS, MATRIX_STRIDE);
                _tile_dpbf16ps(3, 5, 4);
            }
        }
    store_four(sums);
    WRITTEN;
}

// What is done with the sums of an image for 32 outputs from `o`: (2, places, 16).
ALWAYS void finish_image(const float *sums, int64_t places, const Shape *s, int64_t image, int64_t o,
                         const Finish *finish, const int pooled, const int added) {
    for (int64_t y = 0; y < s->height; y += 2)
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

// The mixture of x, (N, H, W, C), into y, (N, H, W, O): arguments and result as those of `dynaconv_mix`, but for
//   kernels  as `dynaconv_pack_kernels` leaves them
int dynaconv_direct_mix(const bf16 *x, const uint8_t *x_places, const uint32_t *kernels, const uint32_t *weights,
                        const bf16 *residual, int64_t residual_channels, bf16 *y, uint8_t *y_places, const Shape *s,
                        int threads) {
    int64_t blocks = blocks_of(s->channels), pairs = (s->kernels + 1) / 2, lines = blocks * TAPS * MATRIX_ROWS;
    int64_t places = up(s->height * s->width, 64), plane = ((s->height + 2) * s->width + 64) * MATRIX_DEPTH;
    int64_t packed = 3 * blocks * plane, spare = 2 * s->width + 2;
    // So many images that the kernels, which come from far, are fetched for each few of them only.
    int64_t each = most(1, least((s->images + threads - 1) / threads, MOST_MAPS / (packed * 2)));
    int64_t tasks = (s->images + each - 1) / each;
    Maps inputs = {x, x_places, s->height, s->width, s->channels};
    Maps added = {residual, residual == x ? x_places : NULL, s->height, s->width, residual_channels};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        bf16 *maps = aligned_alloc(64, each * packed * 2);
        float *sums = zeros((2 * places + spare) * LANES);
        uint32_t *mixed = aligned_alloc(64, lines * LANES * 4);
        Finish finish = {1, residual ? &added : NULL, NULL, y, y_places};
        MatrixConfig before;
        int ready = maps && sums && mixed;
        failed = !ready;
        take_tiles(&before);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            if (!ready) continue;
            int64_t first = task * each, last = least(s->images, first + each);
            for (int64_t image = first; image < last; image++)
                pack_moved(&inputs, image, maps + (image - first) * packed);
            for (int64_t o = 0; o < s->outputs; o += 2 * LANES)
                for (int64_t image = first; image < last; image++) {
                    for (int64_t half = 0; half < 2; half++) {
                        float *to = sums + half * places * LANES;
                        if (o + half * LANES >= s->outputs) {
                            memset(to, 0, places * LANES * 4);
                            continue;
                        }
                        mix_lines(kernels + (o / LANES + half) * lines * pairs * 2 * LANES, weights + image * pairs,
                                  pairs, lines, mixed);
                        WRITTEN;
                        for (int64_t place = 0; place < s->height * s->width; place += 64)
                            multiply_places(maps + (image - first) * packed + place * MATRIX_DEPTH, plane, s->width,
                                            blocks, (s->height * s->width - place + 15) / 16, mixed,
                                            to + place * LANES);
                    }
                    int beside = residual && o < residual_channels;
#define FINISH(pooled, added) finish_image(sums, places, s, image, o, &finish, pooled, added)
                    if (y_places && beside)
                        FINISH(1, 1);
                    else if (y_places)
                        FINISH(1, 0);
                    else if (beside)
                        FINISH(0, 1);
                    else
                        FINISH(0, 0);
#undef FINISH
                }
        }
        give_tiles_back(&before);
        free(maps);
        free(sums);
        free(mixed);
    }
    return failed;
}

#endif
