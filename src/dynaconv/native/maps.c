// What is done with whole maps and kernels, without transforms.

#include "maps.h"

// 16 channels from `channel` at one place of one image, before max-pooling: zeros where it took none.
static __m512 read_place(const Maps *maps, int64_t image, int64_t y, int64_t x, int64_t channel, __mmask16 mask) {
    int64_t height = maps->height / 2, width = maps->width / 2;
    if (y / 2 >= height || x / 2 >= width) return _mm512_setzero_ps();
    int64_t place = ((image * height + y / 2) * width + x / 2) * maps->channels + channel;
    __m128i taken = _mm_maskz_loadu_epi8(mask, maps->places + place), here = _mm_set1_epi8((char)(y % 2 * 2 + x % 2));
    return load(maps->numbers + place, _mm_mask_cmpeq_epi8_mask(mask, taken, here));
}

// Undoes max-pooling: puts numbers, (N, H / 2, W / 2, O), where they were taken from in (N, H, W, O), zeros elsewhere.
void dynaconv_unpool(const bf16 *numbers, const uint8_t *places, bf16 *to, const Shape *s, int threads) {
    Maps maps = {numbers, places, s->height, s->width, s->outputs};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < s->images * s->height; row++)
        for (int64_t x = 0; x < s->width; x++)
            for (int64_t o = 0; o < s->outputs; o += LANES) {
                __mmask16 mask = lanes_left(s->outputs - o);
                __m512 values = read_place(&maps, row / s->height, row % s->height, x, o, mask);
                store(to + (row * s->width + x) * s->outputs + o, values, mask);
            }
}

// to = sum over k of weights[k] times kernels[k], all of `numbers` float32, into float32 or, where `rounded`, bfloat16:
// each kernel is read once, and nothing but the sum is written.
void dynaconv_mix_once(const float *const *kernels, const float *weights, int64_t count, int64_t numbers, int rounded,
                       void *to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < numbers; i += LANES) {
        __mmask16 mask = lanes_left(numbers - i);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < count; k++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[k]), _mm512_maskz_loadu_ps(mask, kernels[k] + i), sum);
        if (rounded)
            store((bf16 *)to + i, sum, mask);
        else
            _mm512_mask_storeu_ps((float *)to + i, mask, sum);
    }
}
