// RandomAffine and ColorJitter of training images, each image from first to last within the nearest cache.
//
// What `data/augment.py` does to a batch transform by transform, in the same order and with the same conventions, which
// are those of torch's grid_sample without aligned corners and of torchvision's colour transforms.

#include "maps.h"

enum { BLACK, BORDER, REFLECTION };

// Sizes of the images and what is done to them; a colour transform that is off is not the same as one of strength zero.
typedef struct {
    int64_t images, channels, height, width;
    int64_t cubic, fill, brightness, contrast, saturation, hue;
} Transforms;

// The factors of one image.
typedef struct {
    float brightness, contrast, saturation, hue;
} Colours;

static const float RED = 0.299f, GREEN = 0.587f, BLUE = 0.114f;  // of grey

ALWAYS __m512 all(float value) { return _mm512_set1_ps(value); }
ALWAYS __m512 floor_of(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// A NaN stays one, the maximum of two numbers being its second argument if either is none: a fault must not be hidden.
ALWAYS __m512 keep(__m512 x) { return _mm512_min_ps(all(1.0f), _mm512_max_ps(_mm512_setzero_ps(), x)); }

// The weights of four pixels in a row for a place between the middle two, `t` behind the second.
ALWAYS void weigh(__m512 t, __m512 w[4], int64_t cubic) {
    __m512 one = all(1.0f), rest = _mm512_sub_ps(one, t);
    if (!cubic) {
        w[0] = w[3] = _mm512_setzero_ps();
        w[1] = rest, w[2] = t;
        return;
    }
    const float a = -0.75f;
    for (int k = 0; k < 2; k++) {
        __m512 near = k ? rest : t, far = _mm512_add_ps(near, one), sum;
        sum = _mm512_fmsub_ps(all(a + 2), near, all(a + 3));
        w[1 + k] = _mm512_fmadd_ps(_mm512_mul_ps(sum, near), near, one);
        sum = _mm512_fmsub_ps(all(a), far, all(5 * a));
        sum = _mm512_fmadd_ps(sum, far, all(8 * a));
        w[3 * k] = _mm512_fmsub_ps(sum, far, all(4 * a));
    }
}

// Replaces whole places along an axis outside 0 to length - 1 by those that they repeat, or takes their weight.
// What comes out can be read, whatever the place: a NaN becomes 0.
ALWAYS __m512i bring_inside(__m512 place, float length, int64_t fill, __m512 *weight) {
    __m512 first = _mm512_setzero_ps(), last = all(length - 1);
    __m512 found = _mm512_min_ps(_mm512_max_ps(place, first), last);
    if (fill == BLACK) *weight = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(found, place, _CMP_EQ_OQ), *weight);
    if (fill == REFLECTION) {  // the mirror stands at the edge of the last pixel, which is therefore seen twice
        __m512 period = all(2 * length), turns = floor_of(_mm512_div_ps(place, period));
        __m512 around = _mm512_fnmadd_ps(turns, period, place);
        found = _mm512_min_ps(around, _mm512_sub_ps(all(2 * length - 1), around));
        found = _mm512_min_ps(_mm512_max_ps(found, first), last);
    }
    return _mm512_cvttps_epi32(found);
}

// Where sixteen places of a row are read: four rows and four columns each, with their weights.
typedef struct {
    int32_t rows[4][LANES], columns[4][LANES];
    float along[4][LANES], across[4][LANES];
} Sources;

// From the places' sources (right, down) in pixels.
ALWAYS void find(const Transforms *t, __m512 right, __m512 down, Sources *s) {
    __m512 column = floor_of(right), row = floor_of(down), across[4], along[4];
    weigh(_mm512_sub_ps(right, column), across, t->cubic);
    weigh(_mm512_sub_ps(down, row), along, t->cubic);
    for (int k = 0; k < 4; k++) {
        __m512i columns = bring_inside(_mm512_add_ps(column, all(k - 1.0f)), (float)t->width, t->fill, &across[k]);
        __m512i rows = bring_inside(_mm512_add_ps(row, all(k - 1.0f)), (float)t->height, t->fill, &along[k]);
        _mm512_storeu_si512(s->columns[k], columns);
        _mm512_storeu_si512(s->rows[k], _mm512_mullo_epi32(rows, _mm512_set1_epi32((int)t->width)));
        _mm512_storeu_ps(s->across[k], across[k]);
        _mm512_storeu_ps(s->along[k], along[k]);
    }
}

// All channels of one place at once: gathering sixteen places of one channel takes four times as long.
ALWAYS __m128 sample(const float *pixels, const Sources *s, int64_t lane) {
    __m128 sum = _mm_setzero_ps();
    for (int i = 0; i < 4; i++) {
        const float *row = pixels + 4 * (int64_t)s->rows[i][lane];
        __m128 line = _mm_setzero_ps();
        for (int j = 0; j < 4; j++)
            line = _mm_fmadd_ps(_mm_loadu_ps(row + 4 * s->columns[j][lane]), _mm_set1_ps(s->across[j][lane]), line);
        sum = _mm_fmadd_ps(line, _mm_set1_ps(s->along[i][lane]), sum);
    }
    return sum;
}

// `map` takes a place, from -1 to 1 on both axes, to its source, likewise. `pixels` has room for four numbers a pixel.
static void move(const float *x, const Transforms *t, const float map[6], float *pixels, float *y) {
    const __m512 lanes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    float height = (float)t->height, width = (float)t->width;
    int64_t plane = t->height * t->width;
    for (int64_t p = 0; p < plane; p++)
        for (int64_t c = 0; c < 4; c++) pixels[4 * p + c] = c < t->channels ? x[c * plane + p] : 0;
    for (int64_t i = 0; i < t->height; i++)
        for (int64_t j = 0; j < t->width; j += LANES) {
            __m512 across = _mm512_add_ps(lanes, all((float)j + 0.5f));
            across = _mm512_fmsub_ps(across, all(2 / width), all(1.0f));
            float along = (2 * (float)i + 1) / height - 1;
            __m512 right = _mm512_fmadd_ps(across, all(map[0]), all(map[1] * along + map[2]));
            __m512 down = _mm512_fmadd_ps(across, all(map[3]), all(map[4] * along + map[5]));
            right = _mm512_fmadd_ps(right, all(width / 2), all((width - 1) / 2));
            down = _mm512_fmadd_ps(down, all(height / 2), all((height - 1) / 2));
            Sources sources;
            find(t, right, down, &sources);
            for (int64_t lane = 0; lane < least(LANES, t->width - j); lane++) {
                float found[4];
                __m128 sum = sample(pixels, &sources, lane);
                // A cubic overshoots at sharp edges.
                if (t->cubic) sum = _mm_min_ps(_mm_set1_ps(1), _mm_max_ps(_mm_setzero_ps(), sum));
                _mm_storeu_ps(found, sum);
                for (int64_t c = 0; c < t->channels; c++) y[c * plane + i * t->width + j + lane] = found[c];
            }
        }
}

ALWAYS __m512 grey_of(const __m512 p[3], int64_t channels) {
    if (channels == 1) return p[0];
    return _mm512_fmadd_ps(all(BLUE), p[2], _mm512_fmadd_ps(all(GREEN), p[1], _mm512_mul_ps(all(RED), p[0])));
}

// From `start`, and beyond, towards `stop`.
ALWAYS __m512 blend(__m512 start, __m512 stop, float share) {
    return keep(_mm512_fmadd_ps(_mm512_sub_ps(stop, start), all(share), start));
}

// Turns the hue and keeps saturation and value of HSV: red, green and blue see one curve over the circle of six parts.
ALWAYS void turn_hue(__m512 p[3], float turns) {
    __m512 value = _mm512_max_ps(_mm512_max_ps(p[0], p[1]), p[2]);
    __m512 chroma = _mm512_sub_ps(value, _mm512_min_ps(_mm512_min_ps(p[0], p[1]), p[2]));
    __m512 safe = _mm512_max_ps(chroma, all(1e-12f));
    __m512 sixth = _mm512_add_ps(all(4.0f), _mm512_div_ps(_mm512_sub_ps(p[0], p[1]), safe));
    __m512 from_green = _mm512_add_ps(all(2.0f), _mm512_div_ps(_mm512_sub_ps(p[2], p[0]), safe));
    __m512 from_red = _mm512_div_ps(_mm512_sub_ps(p[1], p[2]), safe);
    sixth = _mm512_mask_mov_ps(sixth, _mm512_cmp_ps_mask(value, p[1], _CMP_EQ_OQ), from_green);
    sixth = _mm512_mask_mov_ps(sixth, _mm512_cmp_ps_mask(value, p[0], _CMP_EQ_OQ), from_red);
    for (int c = 0; c < 3; c++) {
        __m512 place = _mm512_add_ps(sixth, all(6 * turns + 5 - 2 * c));
        place = _mm512_fnmadd_ps(floor_of(_mm512_mul_ps(place, all(1 / 6.0f))), all(6.0f), place);
        __m512 share = keep(_mm512_min_ps(place, _mm512_sub_ps(all(4.0f), place)));
        p[c] = _mm512_fnmadd_ps(share, chroma, value);
    }
}

// In the order of torchvision's documentation. Contrast needs the mean of the whole image, so there are two passes.
static void recolour(float *y, const Transforms *t, const Colours *f) {
    int64_t plane = t->height * t->width;
    __m512 p[3], sum = _mm512_setzero_ps();
    for (int64_t i = 0; (t->brightness || t->contrast) && i < plane; i += LANES) {
        __mmask16 mask = lanes_left(plane - i);
        for (int64_t c = 0; c < t->channels; c++) {
            p[c] = _mm512_maskz_loadu_ps(mask, y + c * plane + i);
            if (!t->brightness) continue;
            p[c] = keep(_mm512_mul_ps(p[c], all(f->brightness)));
            _mm512_mask_storeu_ps(y + c * plane + i, mask, p[c]);
        }
        sum = _mm512_add_ps(sum, grey_of(p, t->channels));
    }
    __m512 mean = all(_mm512_reduce_add_ps(sum) / (float)plane);
    for (int64_t i = 0; i < plane; i += LANES) {
        __mmask16 mask = lanes_left(plane - i);
        for (int64_t c = 0; c < t->channels; c++) {
            p[c] = _mm512_maskz_loadu_ps(mask, y + c * plane + i);
            if (t->contrast) p[c] = blend(mean, p[c], f->contrast);
        }
        if (t->channels == 3 && t->saturation) {
            __m512 grey = grey_of(p, 3);
            for (int c = 0; c < 3; c++) p[c] = blend(grey, p[c], f->saturation);
        }
        if (t->channels == 3 && t->hue) turn_hue(p, f->hue);
        for (int64_t c = 0; c < t->channels; c++) _mm512_mask_storeu_ps(y + c * plane + i, mask, p[c]);
    }
}

// Transforms x, (N, C, H, W) with C 1 or 3, into y; `maps` and `colours` hold those of every image. `pixels` is working
// space, (threads, H, W, 4).
void dynaconv_transform(const float *x, const Transforms *t, const float *maps, const Colours *colours, float *pixels,
                        float *y, int threads) {
    int64_t plane = t->height * t->width, size = t->channels * plane;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < t->images; n++) {
        move(x + n * size, t, maps + 6 * n, pixels + 4 * plane * omp_get_thread_num(), y + n * size);
        if (t->brightness || t->contrast || t->saturation || t->hue) recolour(y + n * size, t, colours + n);
    }
}
