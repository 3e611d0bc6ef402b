// Convolutions with 3x3 or 1x1 kernels, zeros around the map, stride one, computed directly on matrix tiles.
//
// What `windows.h` leaves out, products with the zeros around a map, is a third of all on a map of 4x4.
//
// Letters: N images, H W map, C channels in, O channels out.

#include "pack.h"
#include "windows.h"

#ifdef MATRIX_TILES

// One kernel, (O, C, side, side) float32, to (O / 16, C / 32, side * side) tiles of 16 pairs of channels and 16
// outputs. `turned`, for the backward pass, C and O are exchanged and the kernel is turned by half a turn.
void dynaconv_pack_kernel(const float *kernel, int64_t side, const Shape *s, int turned, uint32_t *to, int threads) {
    int64_t taps = side * side, channels = turned ? s->outputs : s->channels;
    int64_t outputs = turned ? s->channels : s->outputs, of_outputs = blocks_of(channels) * taps * MATRIX_PAIRS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o += LANES)
        for (int64_t c = 0; c < channels; c += MATRIX_DEPTH)
            pack_kernel(kernel, taps, s, turned, o, c, LANES,
                        to + o / LANES * of_outputs + c / MATRIX_DEPTH * taps * MATRIX_PAIRS);
}

// One row of the maps of 16 images, or fewer, to (W, C / 32) left tiles.
static void pack_row(const Ring *ring, int64_t y, bf16 *to) {
    const Maps *maps = ring->maps;
    for (int64_t x = 0; x < maps->width; x++)
        for (int64_t c = 0; c < maps->channels; c += MATRIX_DEPTH, to += 2 * MATRIX_PAIRS)
            for (int64_t i = 0; i < ring->images; i++)
                _mm512_store_si512(to + i * MATRIX_DEPTH, read_numbers(maps, ring->first + i, y, x, c));
}

// The sums of one window for 16 outputs: (4, 16 images, 16 outputs).
static void multiply_window(const Window *w, int64_t blocks, const uint32_t *kernel, float *sums) {
    zero_four();
    WRITTEN;
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tap = 0; tap < w->taps; tap++, kernel += MATRIX_PAIRS)
            multiply_four(w->at[tap], block * 2 * MATRIX_PAIRS, kernel);
    store_four(sums);
    WRITTEN;
}

enum { SHORTCUT = 2 };  // the residual is the inputs

// What is done with the sums of a window: those of every image, 32 outputs from `o`. The inputs themselves, where they
// are the residual, lie in the window's middle.
ALWAYS void finish_images(const float *sums, const Ring *ring, const Window *w, const Shape *s, int64_t y, int64_t x,
                          int64_t o, const float *scales, const Finish *finish, __m512 *products, const int pooled,
                          const int added, const int probed) {
    for (int64_t i = 0; i < ring->images; i++) {
        __m512 low[4], high[4], scale = _mm512_set1_ps(scales ? scales[ring->first + i] : 1);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            low[j] = _mm512_load_ps(sums + j * MATRIX_PAIRS + i * LANES);
            high[j] = _mm512_load_ps(sums + (4 + j) * MATRIX_PAIRS + i * LANES);
        }
        const bf16 *const *beside = added == SHORTCUT ? w->at[w->taps / 2] : NULL;
        __m512 product = finish_outputs(low, high, s, ring->first + i, y, x, o, scale, beside,
                                        o / MATRIX_DEPTH * 2 * MATRIX_PAIRS + i * MATRIX_DEPTH, finish, pooled,
                                        added, probed);
        if (probed) products[i] = _mm512_add_ps(products[i], product);
    }
}

// The convolution of x, (N, H, W, C), into y, (N, H, W, O): arguments and result as those of `dynaconv_mix`, but for
//   kernel     as `dynaconv_pack_kernel` leaves it
//   side       that of the kernel, 3 or 1
//   to_scales  (N, half of H rounded up), the inner products by pairs of rows
//   y          or none, where they alone are wanted
#define FINISH_IMAGES(pooled, added, probed) \
    finish_images(sums, &ring, &window, s, down, right, o, scales, &finish, products, pooled, added, probed)
#define FINISH(pooled, probed)                    \
    if (beside == SHORTCUT)                       \
        FINISH_IMAGES(pooled, SHORTCUT, probed);  \
    else if (beside)                              \
        FINISH_IMAGES(pooled, 1, probed);         \
    else                                          \
        FINISH_IMAGES(pooled, 0, probed);
int dynaconv_direct(const bf16 *x, const uint8_t *x_places, const uint32_t *kernel, int64_t side, const float *scales,
                    const bf16 *residual, int64_t residual_channels, const bf16 *probe, float *to_scales, bf16 *y,
                    uint8_t *y_places, const Shape *s, int threads) {
    int64_t blocks = blocks_of(s->channels), place = blocks * 2 * MATRIX_PAIRS, step = s->width * place;
    int64_t of_kernel = blocks * side * side * MATRIX_PAIRS, groups = (s->images + MATRIX_ROWS - 1) / MATRIX_ROWS;
    int64_t strip = strip_of(s->height, step * 2, up(s->outputs, LANES) / LANES * of_kernel * 4);
    int64_t chunk = most(1, MOST_KERNEL / (of_kernel * 8)) * 2 * LANES;
    Cuts cut = cut_groups(groups, s->height, threads);
    Maps inputs = {x, x_places, s->height, s->width, s->channels};
    int shortcut = residual == x && residual_channels == s->channels;
    Maps added = {residual, residual == x ? x_places : NULL, s->height, s->width, residual_channels};
    Maps probes = {probe, NULL, s->height, s->width, s->outputs};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        bf16 *rows = aligned_alloc(64, (strip + 2) * step * 2);
        float *sums = aligned_alloc(64, 8 * MATRIX_PAIRS * 4);
        MatrixConfig before;
        Finish finish = {1, residual ? &added : NULL, probe ? &probes : NULL, y, y_places};
        failed = !rows || !sums;
        take_tiles(&before);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * cut.cuts; task++) {
            if (!rows || !sums) continue;
            int64_t first = task / cut.cuts * MATRIX_ROWS, images = least(MATRIX_ROWS, s->images - first);
            int64_t top = task % cut.cuts * cut.rows, bottom = least(s->height, top + cut.rows);
            Ring ring = {&inputs, pack_row, s->height, s->width, place, first, images, strip + 2, most(0, top - 1), rows};
            for (int64_t start = top; start < bottom; start += strip) {
                int64_t stop = least(bottom, start + strip);
                pack_until(&ring, stop + 1);
                for (int64_t from = 0; from < s->outputs; from += chunk)
                    for (int64_t down = start; down < stop; down += 2) {
                        __m512 products[MATRIX_ROWS] = {0};
                        for (int64_t right = 0; right < s->width; right += 2) {
                            Window window;
                            find_window(&ring, down, right, side, &window);
                            for (int64_t o = from; o < least(s->outputs, from + chunk); o += 2 * LANES) {
                                multiply_window(&window, blocks, kernel + o / LANES * of_kernel, sums);
                                if (o + LANES < s->outputs)
                                    multiply_window(&window, blocks, kernel + (o / LANES + 1) * of_kernel,
                                                    sums + 4 * MATRIX_PAIRS);
                                else
                                    memset(sums + 4 * MATRIX_PAIRS, 0, 4 * MATRIX_PAIRS * 4);
                                int beside = residual && o < residual_channels ? shortcut ? SHORTCUT : 1 : 0;
                                if (y_places) {
                                    FINISH(1, 0)
                                } else if (probe) {
                                    FINISH(0, 1)
                                } else {
                                    FINISH(0, 0)
                                }
                            }
                        }
                        if (!probe) continue;
                        for (int64_t i = 0; i < ring.images; i++) {
                            float *product = to_scales + (first + i) * ((s->height + 1) / 2) + down / 2;
                            *product = (from ? *product : 0) + _mm512_reduce_add_ps(products[i]);
                        }
                    }
            }
        }
        give_tiles_back(&before);
        free(rows);
        free(sums);
    }
    return failed;
}

// Asks the system for the tiles' registers, which it saves only for who has asked. Returns whether this library uses
// them.
int dynaconv_matrix_tiles(void) {
    enum { REQUEST = 0x1023, TILES = 18 };
    return !syscall(SYS_arch_prctl, REQUEST, TILES);
}

#else

// The compiler does not know them, or was told to build for a processor without.
int dynaconv_matrix_tiles(void) { return -1; }

#endif
