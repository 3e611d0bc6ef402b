// Batch norm and the activation behind it, each way in two passes over the maps; torch takes four and six.
//
//   y = f(z),  z = gain * xhat + offset,  xhat = (x - mean) / spread
//
// Maps are (images, places, C) bfloat16; statistics and parameters (C,) float32. The averages of y over each image's
// places, which the next block's weights or the logits are made of, are taken on the way, before rounding, and so is the
// gradient that comes of them.

#include "activation.h"

enum { BLOCK = 64 };  // places whose sums are made at once: what the nearest cache holds
enum { LARGE = 1 << 23 };  // numbers from which on memory takes longer than to compute the gradient of f twice
enum { AHEAD = 2048 };     // numbers between what is read and what is fetched

// The two sums of one block of places, 16 channels: of x and x squared from a shift, or of the gradient behind the
// activation and its product with xhat.
typedef struct {
    const bf16 *x, *gradient;
    int64_t images, places, channels;  // places of each image
    const float *shift, *inverse, *gain, *offset;
    const float *every;  // (images, C), added to the gradient at every place; or none
    bf16 *behind;        // where the gradient behind the activation is kept, or none
} Sums;

ALWAYS void fetch(const bf16 *numbers) { _mm_prefetch((const char *)numbers, _MM_HINT_T0); }

ALWAYS void sum_block(const Sums *in, int64_t image, int64_t first, int64_t last, int64_t c, __mmask16 mask, float *sum,
                      float *second, const int activation) {
    __m512 every = in->every ? _mm512_maskz_loadu_ps(mask, in->every + image * in->channels + c) : _mm512_setzero_ps();
    __m512 shift = _mm512_maskz_loadu_ps(mask, in->shift + c), a = _mm512_setzero_ps(), b = a, inverse = a, gain = a;
    __m512 offset = a;
    if (in->gradient) {
        inverse = _mm512_maskz_loadu_ps(mask, in->inverse + c), gain = _mm512_maskz_loadu_ps(mask, in->gain + c);
        offset = _mm512_maskz_loadu_ps(mask, in->offset + c);
    }
    int64_t stop = (image * in->places + last) * in->channels + c, step = in->channels;
    const bf16 *maps = in->x, *gradient = in->gradient;
    bf16 *behind = in->behind;
    int64_t ahead = BLOCK * step;
    for (int64_t at = (image * in->places + first) * step + c; at < stop; at += step) {
        __m512 x = _mm512_sub_ps(load(maps + at, mask), shift);
        if (gradient) {
            fetch(maps + at + ahead), fetch(gradient + at + ahead);
            x = _mm512_mul_ps(x, inverse);
            __m512 g = _mm512_add_ps(every, load(gradient + at, mask));
            g = activate_back(_mm512_fmadd_ps(gain, x, offset), g, activation);
            if (behind) store(behind + at, g, mask);
            a = _mm512_add_ps(a, g), b = _mm512_fmadd_ps(g, x, b);
        } else {
            a = _mm512_add_ps(a, x), b = _mm512_fmadd_ps(x, x, b);
        }
    }
    _mm512_mask_storeu_ps(sum + c, mask, _mm512_add_ps(a, _mm512_maskz_loadu_ps(mask, sum + c)));
    _mm512_mask_storeu_ps(second + c, mask, _mm512_add_ps(b, _mm512_maskz_loadu_ps(mask, second + c)));
}

// Sums over all places to sums, (2, C); every thread its blocks, the same ones every time. Returns 1 without memory.
static int sum_places(const Sums *in, int activation, float *sums, int threads) {
    int64_t channels = in->channels, step = up(2 * channels, LANES), blocks = (in->places + BLOCK - 1) / BLOCK;
    float *spaces = zeros(threads * step);
    if (!spaces) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *own = spaces + omp_get_thread_num() * step;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < in->images * blocks; block++)
            for (int64_t c = 0; c < channels; c += LANES) {
                int64_t first = block % blocks * BLOCK, last = least(in->places, first + BLOCK);
                __mmask16 mask = lanes_left(channels - c);
#define CALL(f) sum_block(in, block / blocks, first, last, c, mask, own, own + channels, f)
                FOR_ACTIVATION(activation, CALL)
#undef CALL
            }
    }
    for (int64_t i = 0; i < 2 * channels; i++) {
        double sum = 0;
        for (int t = 0; t < threads; t++) sum += spaces[t * step + i];
        sums[i] = (float)sum;
    }
    free(spaces);
    return 0;
}

// Mean and variance over all places of x, (places, C). Returns 0, or 1 where memory is short.
int dynaconv_moments(const bf16 *x, int64_t places, int64_t channels, float *mean, float *variance, int threads) {
    // Summed from the first place on: a mean far from zero would leave no digits for the variance.
    float *shift = zeros(3 * channels), *sums = shift + channels;
    if (!shift) return 1;
    for (int64_t c = 0; c < channels; c += LANES) {
        __mmask16 mask = lanes_left(channels - c);
        _mm512_mask_storeu_ps(shift + c, mask, load(x + c, mask));
    }
    Sums in = {x, NULL, 1, places, channels, shift, NULL, NULL, NULL, NULL, NULL};
    int failed = sum_places(&in, 0, sums, threads);
    for (int64_t c = 0; c < channels; c++) {
        float from_shift = sums[c] / (float)places;
        mean[c] = shift[c] + from_shift;
        variance[c] = sums[channels + c] / (float)places - from_shift * from_shift;
        if (variance[c] < 0) variance[c] = 0;
    }
    free(shift);
    return failed;
}

ALWAYS void write_place(const bf16 *x, bf16 *y, int64_t channels, const float *mean, const float *factor,
                        const float *offset, float *sums, const int activation) {
    for (int64_t c = 0; c < channels; c += LANES) {
        __mmask16 mask = lanes_left(channels - c);
        __m512 centred = _mm512_sub_ps(load(x + c, mask), _mm512_maskz_loadu_ps(mask, mean + c));
        __m512 z = _mm512_fmadd_ps(centred, _mm512_maskz_loadu_ps(mask, factor + c),
                                   _mm512_maskz_loadu_ps(mask, offset + c));
        z = activate(z, activation);
        _mm512_mask_storeu_ps(sums + c, mask, _mm512_add_ps(z, _mm512_maskz_loadu_ps(mask, sums + c)));
        store(y + c, z, mask);
    }
}

// y = f((x - mean) * factor + offset); the factor is gain / spread. Averages, (images, C), are those of y.
void dynaconv_normalize(const bf16 *x, int64_t images, int64_t places, int64_t channels, const float *mean,
                        const float *factor, const float *offset, int activation, bf16 *y, float *averages,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t image = 0; image < images; image++) {
        float *sums = averages + image * channels;
        memset(sums, 0, channels * 4);
        for (int64_t place = image * places; place < (image + 1) * places; place++) {
            const bf16 *from = x + place * channels;
            bf16 *to = y + place * channels;
#define CALL(f) write_place(from, to, channels, mean, factor, offset, sums, f)
            FOR_ACTIVATION(activation, CALL)
#undef CALL
        }
        for (int64_t c = 0; c < channels; c++) sums[c] /= (float)places;
    }
}

// What the gradient towards x is made of, for each channel: dx = factor * g + along * (x - mean) + constant, with g the
// gradient behind the activation.
typedef struct {
    float *factor, *along, *constant;
} Line;

// Where g was kept it stands in dx already; elsewhere it is computed again, and dx written past the caches.
ALWAYS void write_back(const Sums *in, const Line *line, int64_t place, const float *every, bf16 *dx, const int kept,
                       const int activation) {
    for (int64_t c = 0; c < in->channels; c += LANES) {
        __mmask16 mask = lanes_left(in->channels - c);
        int64_t at = place * in->channels + c;
        __m512 x = _mm512_sub_ps(load(in->x + at, mask), _mm512_maskz_loadu_ps(mask, in->shift + c)), g;
        __m512 factor = _mm512_maskz_loadu_ps(mask, line->factor + c);
        fetch(in->x + at + AHEAD);
        if (kept) {
            g = load(dx + at, mask);
        } else {
            fetch(in->gradient + at + AHEAD);
            g = load(in->gradient + at, mask);
            if (every) g = _mm512_add_ps(g, _mm512_loadu_ps(every + c));
            g = activate_back(_mm512_fmadd_ps(x, factor, _mm512_loadu_ps(in->offset + c)), g, activation);
        }
        __m512 sum = _mm512_fmadd_ps(x, _mm512_maskz_loadu_ps(mask, line->along + c),
                                     _mm512_maskz_loadu_ps(mask, line->constant + c));
        sum = _mm512_fmadd_ps(g, factor, sum);
        if (kept)
            store(dx + at, sum, mask);
        else
            _mm256_stream_si256((__m256i *)(dx + at), (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

// The gradients of normalising with the moments of x itself: towards x; and sums, (2, C), towards offset and gain.
// `inverse` is one over the spread; `every`, (images, C) or none, is added to dy at every place.
// The first pass leaves the gradient behind the activation in dx, so that the second need not compute it again, unless
// the maps are so large that to write it and to read it back takes longer.
// Returns 0, or 1 where memory is short.
int dynaconv_normalize_gradients(const bf16 *x, const bf16 *dy, const float *every, int64_t images, int64_t places,
                                 int64_t channels, const float *mean, const float *inverse, const float *gain,
                                 const float *offset, int activation, bf16 *dx, float *sums, int threads) {
    int kept = images * places * channels < LARGE || channels % LANES || (uintptr_t)dx % 32;
    Sums in = {x, dy, images, places, channels, mean, inverse, gain, offset, every, kept ? dx : NULL};
    if (!every) in.images = 1, in.places = images * places;  // nothing tells them apart
    float *space = zeros(3 * channels);
    if (!space) return 1;
    Line line = {space, space + channels, space + 2 * channels};
    int failed = sum_places(&in, activation, sums, threads);
    if (!failed) {
        float share = 1.0f / (float)(images * places);
        for (int64_t c = 0; c < channels; c++) {
            line.factor[c] = gain[c] * inverse[c];
            line.along[c] = -line.factor[c] * share * sums[channels + c] * inverse[c];
            line.constant[c] = -line.factor[c] * share * sums[c];
        }
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t place = 0; place < images * places; place++) {
                const float *mine = every ? every + place / places * channels : NULL;
#define CALL(f) write_back(&in, &line, place, mine, dx, 0, f)
                if (kept) {
                    write_back(&in, &line, place, NULL, dx, 1, 0);
                } else {
                    FOR_ACTIVATION(activation, CALL)
                }
#undef CALL
            }
            _mm_sfence();  // what went past the caches is there for whoever reads it next
        }
    }
    free(space);
    return failed;
}
