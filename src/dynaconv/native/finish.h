// From sums to maps: what becomes of them, and max-pooling.

#pragma once

#include "maps.h"

// What becomes of the sums.
typedef struct {
    float scale;
    const Maps *residual;  // added to the first outputs; or none
    const Maps *probe;     // of O channels, whose inner product with the sums is asked for; or none
    bf16 *to;
    uint8_t *places;  // where max-pooling took its numbers from; or none, and there is no pooling
} Finish;

// The largest of 2x2 outputs and where it stood: the first of equals, and a NaN before all numbers. They are compared
// before they are rounded, where torch compares what rounding has left.
ALWAYS __m512 largest_of(const __m512 values[4], __m128i *from) {
    __m512 largest = values[0];
    *from = _mm_setzero_si128();
#pragma GCC unroll 4
    for (int i = 1; i < 4; i++) {
        __mmask16 larger = _mm512_cmp_ps_mask(values[i], largest, _CMP_GT_OQ) |
                           _mm512_cmp_ps_mask(values[i], values[i], _CMP_UNORD_Q);
        largest = _mm512_mask_mov_ps(largest, larger, values[i]);
        *from = _mm_mask_mov_epi8(*from, larger, _mm_set1_epi8((char)i));
    }
    return largest;
}

// Stores 2x2 outputs, or the largest of them and where it stood.
ALWAYS void store_window(const __m512 values[4], const Shape *s, int64_t image, int64_t y, int64_t x, int64_t o,
                         __mmask16 mask, const Finish *finish) {
    if (!finish->places) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            if (y + i / 2 < s->height && x + i % 2 < s->width) {
                int64_t place = (image * s->height + y + i / 2) * s->width + x + i % 2;
                store(finish->to + place * s->outputs + o, values[i], mask);
            }
        return;
    }
    if (y + 1 >= s->height || x + 1 >= s->width) return;
    __m128i from;
    __m512 largest = largest_of(values, &from);
    int64_t place = ((image * (s->height / 2) + y / 2) * (s->width / 2) + x / 2) * s->outputs + o;
    store(finish->to + place, largest, mask);
    _mm_mask_storeu_epi8(finish->places + place, mask, from);
}
