// The whitening stem and the activation behind it: images in float32 to maps in bfloat16, written once.

#include "activation.h"

// What a stem makes of images, which have margins and may lie in any order: strides of image, channel, row, column.
typedef struct {
    int64_t images, channels, height, width;  // of the maps that come out, but for the channels
    int64_t side, step;                       // of the kernels; from place to place
    int64_t strides[4];
} Stem;

ALWAYS void whiten_place(const float *x, const Stem *s, const float *directions, int64_t count, bf16 *y, float *sums,
                         const int activation) {
    int64_t padded = up(count, LANES);
    for (int64_t v = 0; v < padded; v += LANES) {
        const float *direction = directions + v;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < s->channels; c++)
            for (int64_t i = 0; i < s->side; i++)
                for (int64_t j = 0; j < s->side; j++, direction += padded) {
                    float pixel = x[c * s->strides[1] + i * s->strides[2] + j * s->strides[3]];
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(pixel), _mm512_loadu_ps(direction), sum);
                }
        __mmask16 mask = lanes_left(count - v);
        for (int negative = 0; negative < 2; negative++) {
            __m512 z = activate(negative ? _mm512_sub_ps(_mm512_setzero_ps(), sum) : sum, activation);
            float *total = sums + negative * count + v;
            _mm512_mask_storeu_ps(total, mask, _mm512_add_ps(z, _mm512_maskz_loadu_ps(mask, total)));
            store(y + negative * count + v, z, mask);
        }
    }
}

// Every direction with both signs: to y, (N, H, W, 2 * count), from directions, (channels * side * side, count), which
// are continued by zeros to a multiple of 16; and to averages, (N, 2 * count), over each image's places.
void dynaconv_whiten(const float *x, const Stem *s, const float *directions, int64_t count, int activation, bf16 *y,
                     float *averages, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t image = 0; image < s->images; image++) {
        float *sums = averages + image * 2 * count;
        memset(sums, 0, 2 * count * 4);
        for (int64_t place = 0; place < s->height * s->width; place++) {
            int64_t row = place / s->width, column = place % s->width;
            const float *from = x + image * s->strides[0] + row * s->step * s->strides[2] +
                                column * s->step * s->strides[3];
            bf16 *to = y + (image * s->height * s->width + place) * 2 * count;
#define CALL(f) whiten_place(from, s, directions, count, to, sums, f)
            FOR_ACTIVATION(activation, CALL)
#undef CALL
        }
        for (int64_t i = 0; i < 2 * count; i++) sums[i] /= (float)(s->height * s->width);
    }
}
