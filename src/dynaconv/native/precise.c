// A block in evaluation mode on matrix tiles with float32 numbers: the convolution, its scale, the shortcut, max-pooling,
// batch norm and the activation, in one pass over the maps.
//
// A number is the sum of two in bfloat16 but for 2^-18 of it, and three products of these are one in float32 but for as
// much: high * high + low * high + high * low. Source: Henry, Tang and Heinecke, Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations (arXiv:1904.06376).
//
// Letters: N images, H W map, C channels in, O channels out.

#include "activation.h"
#include "windows.h"

#ifdef MATRIX_TILES

enum { HALF = 2 * MATRIX_PAIRS };  // numbers of a left tile

typedef struct {
    const float *numbers;
    int64_t channels;
} Floats;

// One row of the maps of 16 images, or fewer, to (W, C / 32) pairs of left tiles, high and low.
static void pack_row(const Ring *ring, int64_t y, bf16 *to) {
    const Floats *maps = ring->maps;
    int64_t channels = maps->channels;
    for (int64_t x = 0; x < ring->width; x++)
        for (int64_t c = 0; c < channels; c += MATRIX_DEPTH, to += 2 * HALF)
            for (int64_t i = 0; i < ring->images; i++) {
                const float *from =
                    maps->numbers + (((ring->first + i) * ring->height + y) * ring->width + x) * channels + c;
                __mmask16 first = lanes_left(channels - c);
                __mmask16 second = channels - c > LANES ? lanes_left(channels - c - LANES) : 0;
                __m512 low = _mm512_maskz_loadu_ps(first, from), high = _mm512_maskz_loadu_ps(second, from + LANES);
                __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                low = _mm512_sub_ps(low, low_half(rounded)), high = _mm512_sub_ps(high, high_half(rounded));
                _mm512_store_si512(to + i * MATRIX_DEPTH, rounded);
                _mm512_store_si512(to + HALF + i * MATRIX_DEPTH, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
}

// The sums of one window for 16 outputs: (4, 16 images, 16 outputs).
static void multiply_window(const Window *w, int64_t blocks, const uint32_t *high, const uint32_t *low, float *sums) {
    zero_four();
    WRITTEN;
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tap = 0; tap < w->taps; tap++, high += MATRIX_PAIRS, low += MATRIX_PAIRS) {
            const bf16 *const *at = w->at[tap];
            int64_t there = block * 2 * HALF;
            _tile_loadd(4, high, MATRIX_STRIDE);
            _tile_loadd(5, low, MATRIX_STRIDE);
#define MULTIPLY(i, left, kernel, half)                          \
    if (at[i]) {                                                 \
        _tile_loadd(left, at[i] + there + half, MATRIX_STRIDE);  \
        _tile_dpbf16ps(i, left, kernel);                         \
    }
            MULTIPLY(0, 6, 4, 0)
            MULTIPLY(1, 7, 4, 0)
            MULTIPLY(2, 6, 4, 0)
            MULTIPLY(3, 7, 4, 0)
            MULTIPLY(0, 6, 4, HALF)
            MULTIPLY(1, 7, 4, HALF)
            MULTIPLY(2, 6, 4, HALF)
            MULTIPLY(3, 7, 4, HALF)
            MULTIPLY(0, 6, 5, 0)
            MULTIPLY(1, 7, 5, 0)
            MULTIPLY(2, 6, 5, 0)
            MULTIPLY(3, 7, 5, 0)
#undef MULTIPLY
        }
    store_four(sums);
    WRITTEN;
}

// What becomes of the sums, in this order.
typedef struct {
    const float *scales;    // (N,)
    const float *residual;  // (N, H, W, its channels), added to the first outputs
    int64_t residual_channels;
    int pooled;  // to the largest of each window of 2x2
    const float *gain, *offset;  // (O,), or none, and no activation
    float *to;
} Rest;

// One image's window of sums, 16 outputs from `o`.
ALWAYS void finish_image(const float *sums, const Shape *s, int64_t image, int64_t y, int64_t x, int64_t o,
                          const Rest *rest, const int activation) {
    __mmask16 mask = lanes_left(s->outputs - o);
    __mmask16 shared = o < rest->residual_channels ? mask & lanes_left(rest->residual_channels - o) : 0;
    __m512 values[4], scale = _mm512_set1_ps(rest->scales[image]);
    int64_t places[4], count = rest->pooled ? 1 : 4;
    for (int64_t j = 0; j < 4; j++) {
        int64_t down = y + j / 2, right = x + j % 2, inside = down < s->height && right < s->width;
        places[j] = inside ? (image * s->height + down) * s->width + right : -1;
        values[j] = _mm512_mul_ps(_mm512_load_ps(sums + j * MATRIX_PAIRS), scale);
        if (inside && shared)
            values[j] = _mm512_add_ps(values[j], _mm512_maskz_loadu_ps(shared, rest->residual +
                                                                       places[j] * rest->residual_channels + o));
    }
    if (rest->pooled) {
        if (places[3] < 0) return;
        __m128i from;
        values[0] = largest_of(values, &from);
        places[0] = (image * (s->height / 2) + y / 2) * (s->width / 2) + x / 2;
    }
    for (int64_t j = 0; j < count; j++) {
        if (places[j] < 0) continue;
        if (rest->gain)
            values[j] = activate_precisely(_mm512_fmadd_ps(values[j], _mm512_maskz_loadu_ps(mask, rest->gain + o),
                                                           _mm512_maskz_loadu_ps(mask, rest->offset + o)),
                                           activation);
        _mm512_mask_storeu_ps(rest->to + places[j] * s->outputs + o, mask, values[j]);
    }
}

static void finish_images(const float *sums, const Ring *ring, const Shape *s, int64_t y, int64_t x, int64_t o,
                          const Rest *rest, int activation) {
#define FINISH(activation)                             \
    for (int64_t i = 0; i < ring->images; i++)         \
        finish_image(sums + i * LANES, s, ring->first + i, y, x, o, rest, activation)
    FOR_ACTIVATION(activation, FINISH)
#undef FINISH
}

// One convolution of x, (N, H, W, C), and what follows it, to y, (N, H, W, O) or (N, H / 2, W / 2, O).
//   high, low   the kernel's halves as `dynaconv_pack_kernel` leaves them; side: 3 or 1
//   scales      (N,): the sums of an image are multiplied by its scale
//   residual    (N, H, W, residual_channels), added behind that
//   gain,
//   offset      (O,), behind the pooling: y = f(gain * z + offset), f the activation; or none, and y = z
// Returns 1 without memory.
int dynaconv_precise(const float *x, const uint32_t *high, const uint32_t *low, int64_t side, const float *scales,
                     const float *residual, int64_t residual_channels, int pooled, const float *gain,
                     const float *offset, int activation, float *y, const Shape *s, int threads) {
    int64_t blocks = blocks_of(s->channels), place = blocks * 2 * HALF, step = s->width * place;
    int64_t of_kernel = blocks * side * side * MATRIX_PAIRS, groups = (s->images + MATRIX_ROWS - 1) / MATRIX_ROWS;
    int64_t strip = strip_of(s->height, step * 2, up(s->outputs, LANES) / LANES * of_kernel * 4);
    int64_t chunk = most(1, MOST_KERNEL / (of_kernel * 8)) * LANES;
    Cuts cut = cut_groups(groups, s->height, threads);
    Floats maps = {x, s->channels};
    Rest rest = {scales, residual, residual_channels, pooled, gain, offset, y};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        bf16 *rows = aligned_alloc(64, (strip + 2) * step * 2);
        float *sums = aligned_alloc(64, 4 * MATRIX_PAIRS * 4);
        MatrixConfig before;
        failed = !rows || !sums;
        take_tiles(&before);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * cut.cuts; task++) {
            if (!rows || !sums) continue;
            int64_t first = task / cut.cuts * MATRIX_ROWS, images = least(MATRIX_ROWS, s->images - first);
            int64_t top = task % cut.cuts * cut.rows, bottom = least(s->height, top + cut.rows);
            Ring ring = {&maps, pack_row, s->height, s->width, place, first, images, strip + 2, most(0, top - 1), rows};
            for (int64_t start = top; start < bottom; start += strip) {
                int64_t stop = least(bottom, start + strip);
                pack_until(&ring, stop + 1);
                for (int64_t from = 0; from < s->outputs; from += chunk)
                    for (int64_t down = start; down < stop; down += 2)
                        for (int64_t right = 0; right < s->width; right += 2) {
                            Window window;
                            find_window(&ring, down, right, side, &window);
                            for (int64_t o = from; o < least(s->outputs, from + chunk); o += LANES) {
                                int64_t tiles = o / LANES * of_kernel;
                                multiply_window(&window, blocks, high + tiles, low + tiles, sums);
                                finish_images(sums, &ring, s, down, right, o, &rest, activation);
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

#endif
