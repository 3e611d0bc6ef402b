// The activations that are compiled, forward and back, 16 numbers at a time.

#pragma once

#include "maps.h"

enum { RELU = 1, SILU = 2 };

// Calls `call` with the activation as a constant, for which the compiler writes a loop of its own.
#define FOR_ACTIVATION(activation, call) \
    switch (activation) {                \
        case RELU: call(RELU); break;    \
        case SILU: call(SILU); break;    \
        default: call(0);                \
    }

// e to the power of x, within 2e-7 of itself: a polynomial for the fraction of x / log 2, the exponent for the rest.
static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(scaled, whole), sum = _mm512_set1_ps(1.5403530e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3333558e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.24022651f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69314718f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

// One over 1 + e to the power of -z: estimated to 14 bits, and a step of Newton's, which takes a third of a division.
static inline __m512 logistic(__m512 z) {
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), z)));
    __m512 estimate = _mm512_rcp14_ps(below);
    return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(below, estimate, _mm512_set1_ps(2.0f)));
}

// The same within 7e-5 of itself, for maps that are rounded to bfloat16, by 2e-3 of themselves; averages and sums, which
// are taken before that, are as good. A polynomial of a lower degree, the estimate as it is, and nothing to keep an
// infinite power from it, one over which is 0.
static inline __m512 roughly_logistic(__m512 z) {
    __m512 scaled = _mm512_mul_ps(z, _mm512_set1_ps(-1.44269504f));
    __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(scaled, whole), sum = _mm512_set1_ps(9.5701e-3f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.591786e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.24024745f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69312181f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.99999926f));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(sum, whole)));
}

// For results in float32.
ALWAYS __m512 activate_precisely(__m512 z, const int activation) {
    // A NaN in z stays one: the maximum of two numbers is its second argument if either is none.
    if (activation == RELU) return _mm512_max_ps(_mm512_setzero_ps(), z);
    return activation == SILU ? _mm512_mul_ps(z, logistic(z)) : z;
}

// For results in bfloat16; so is the way back.
ALWAYS __m512 activate(__m512 z, const int activation) {
    return activation == SILU ? _mm512_mul_ps(z, roughly_logistic(z)) : activate_precisely(z, activation);
}

ALWAYS __m512 activate_back(__m512 z, __m512 gradient, const int activation) {
    __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
    if (activation == RELU) return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, zero, _CMP_NLE_UQ), gradient);
    if (activation != SILU) return gradient;
    __m512 s = roughly_logistic(z), slope = _mm512_fmadd_ps(_mm512_mul_ps(z, s), _mm512_sub_ps(one, s), s);
    return _mm512_mul_ps(gradient, slope);
}
