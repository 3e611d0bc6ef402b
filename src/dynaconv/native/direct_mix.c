// Mixtures of K kernels on matrix tiles: each image has a kernel of its own,
//
//   W_n = a_n1 W_1 + ... + a_nK W_K
//
// mixed 32 outputs of a few images at a time, and used up within the caches, place by place (`places.h`).
//
// Letters: N images, H W map, C channels in, O channels out, K kernels.

#include "places.h"

#ifdef MATRIX_TILES

static const int64_t MOST_MAPS = (int64_t)3 << 18;  // bytes of packed maps that stay near, or four images' maps
enum { TOGETHER = 4 };                              // images whose kernels are mixed at once, at most

// K kernels, (O, C, side, side) float32, side 3 or 1, to (O / 16, C / 32, 9, 16, K, 16) pairs: for each line of a right
// tile, which is of 16 outputs and two channels, that of every kernel. `turned` is as in `dynaconv_pack_kernel`.
void dynaconv_pack_kernels(const float *const *kernels, const int64_t *sides, const Shape *s, int turned, uint32_t *to,
                           int threads) {
    int64_t channels = turned ? s->outputs : s->channels, outputs = turned ? s->channels : s->outputs;
    int64_t apart = s->kernels * LANES, tile = MATRIX_ROWS * apart, of_outputs = blocks_of(channels) * TAPS * tile;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o += LANES)
        for (int64_t c = 0; c < channels; c += MATRIX_DEPTH)
            for (int64_t k = 0; k < s->kernels; k++) {
                uint32_t *block = to + o / LANES * of_outputs + c / MATRIX_DEPTH * TAPS * tile + k * LANES;
                int64_t taps = sides[k] * sides[k];
                for (int64_t line = 0; taps == 1 && line < TAPS * MATRIX_ROWS; line++)
                    _mm512_store_si512(block + line * apart, _mm512_setzero_si512());
                pack_kernel(kernels[k], taps, s, turned, o, c, apart, block + (taps == 1 ? TAPS / 2 * tile : 0));
            }
}

// Two sums to pairs in bfloat16, rounded to the nearest, halves away from zero, in less time than the processor's own
// instruction takes. Infinities stay, and NaNs, but for those whose bits are nearly all ones.
ALWAYS __m512i rounded_pairs(__m512 low, __m512 high) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xffff0000);
    __m512i a = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(low), half), 16);
    __m512i b = _mm512_add_epi32(_mm512_castps_si512(high), half);
    return _mm512_ternarylogic_epi32(upper, b, a, 0xea);  // upper & b | a
}

// `lines` lines of right tiles of the kernels of some images, `apart` numbers from each other. Products of pairs, which
// the processor has instructions for, would take longer than these.
ALWAYS void mix_lines(const uint32_t *kernels, const float *weights, int64_t lines, int64_t apart, uint32_t *to,
                      const int images, const int count) {
    for (int64_t line = 0; line < lines; line++, to += LANES) {
        __m512 even[TOGETHER], odd[TOGETHER];
        for (int n = 0; n < images; n++) even[n] = odd[n] = _mm512_setzero_ps();
        for (int k = 0; k < count; k++, kernels += LANES) {
            __m512i both = _mm512_loadu_si512(kernels);
            __m512 first = first_of(both), second = second_of(both);
            for (int n = 0; n < images; n++) {
                __m512 weight = _mm512_set1_ps(weights[n * count + k]);
                even[n] = _mm512_fmadd_ps(weight, first, even[n]), odd[n] = _mm512_fmadd_ps(weight, second, odd[n]);
            }
        }
        for (int n = 0; n < images; n++) _mm512_store_si512(to + n * apart, rounded_pairs(even[n], odd[n]));
    }
}

static void mix(const uint32_t *kernels, const float *weights, int64_t lines, int64_t apart, uint32_t *to, int images,
                int count) {
#define MIX(images, count) mix_lines(kernels, weights, lines, apart, to, images, count)
#define MIX_SOME(images)      \
    if (count == 2)           \
        MIX(images, 2);       \
    else if (count == 3)      \
        MIX(images, 3);       \
    else if (count == 4)      \
        MIX(images, 4);       \
    else                      \
        MIX(images, count);
    switch (images) {  // a loop of unknown length would take several times as long
        case 1: MIX_SOME(1) break;
        case 2: MIX_SOME(2) break;
        case 3: MIX_SOME(3) break;
        default: MIX_SOME(TOGETHER)
    }
#undef MIX_SOME
#undef MIX
}

// The mixture of x, (N, H, W, C), into y, (N, H, W, O): arguments and result as those of `dynaconv_mix`, but for
//   kernels  as `dynaconv_pack_kernels` leaves them
//   weights  (N, K) float32
int dynaconv_direct_mix(const bf16 *x, const uint8_t *x_places, const uint32_t *kernels, const float *weights,
                        const bf16 *residual, int64_t residual_channels, bf16 *y, uint8_t *y_places, const Shape *s,
                        int threads) {
    int64_t blocks = blocks_of(s->channels), count = s->kernels, lines = blocks * TAPS * MATRIX_ROWS;
    int64_t places = up(s->height * s->width, 64), spare = 2 * s->width + 2;
    Planes planes = planes_of(s);
    int64_t packed = blocks * planes.moves * planes.numbers, of_kernels = up(s->outputs, LANES) * lines * count * 4;
    // Tasks are of whole groups of images that are mixed at once, and as many for each thread: so many groups that
    // their maps stay near, or more where the kernels, which are fetched for every task, are much larger.
    int64_t together = least(TOGETHER, most(1, (s->images + threads - 1) / threads));
    int64_t groups = (s->images + together - 1) / together;
    int64_t several = most(1, most(MOST_MAPS, of_kernels / 4) / (packed * 2) / together);
    int64_t tasks = most(1, least(groups, up((groups + several - 1) / several, threads)));
    int64_t room = (groups + tasks - 1) / tasks * together;  // images of the largest task
    Maps inputs = {x, x_places, s->height, s->width, s->channels};
    Maps added = {residual, residual == x ? x_places : NULL, s->height, s->width, residual_channels};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        bf16 *maps = aligned_alloc(64, most(1, room) * packed * 2);
        float *sums = zeros((2 * places + spare) * LANES);
        uint32_t *mixed = aligned_alloc(64, TOGETHER * 2 * lines * LANES * 4);
        Finish finish = {1, residual ? &added : NULL, NULL, y, y_places};
        MatrixConfig before;
        int ready = maps && sums && mixed;
        failed = !ready;
        take_tiles(&before);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            if (!ready) continue;
            int64_t first = groups * task / tasks * together;
            int64_t last = least(s->images, groups * (task + 1) / tasks * together);
            for (int64_t image = first; image < last; image++)
                pack_planes(&inputs, image, &planes, maps + (image - first) * packed);
            for (int64_t o = 0; o < s->outputs; o += 2 * LANES)
                for (int64_t image = first; image < last; image += together) {
                    int64_t here = least(together, last - image), halves = o + LANES < s->outputs ? 2 : 1;
                    mix(kernels + o / LANES * lines * count * LANES, weights + image * count, halves * lines,
                        2 * lines * LANES, mixed, (int)here, (int)count);
                    for (int64_t i = 0; i < here; i++)
                        convolve_image(maps + (image + i - first) * packed, &planes, s, mixed + 2 * i * lines * LANES,
                                       halves, sums, image + i, o, &finish);
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
