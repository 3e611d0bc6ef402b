// Convolutions with 3x3 kernels, zeros around the map, stride one, by Winograd's F(TILE x TILE, 3x3) in bfloat16, and
// the mixture of K of them, for x86 processors with AVX-512 and its products of bfloat16.
//
//   Y_n = A' [ sum_k a_nk (G w_k G') * (B' x_n B) ] A + R_n
//
// The kernels of one image are mixed between the transforms, a panel at a time, and the panel is used up before it
// leaves the nearest cache: K convolutions cost one, and no mixed kernel is ever written to memory. Every thread takes
// chunks of tile rows of its own, transformed, multiplied and transformed back within its cache; only where gradients
// are larger than the caches, threads share the chunks.
//
// This is compiled once for each TILE: 2, 3 and 4. A tile of TILE x TILE outputs takes POINTS x POINTS products a
// channel: 4, 2.8 or 2.25 an output. Larger ones round more: by 0.4%, 0.6%, and 0.8 to 1.2% of the norm of a result,
// where a direct convolution does by 0.2%.
//
// Letters: N images, H W map, C channels in, O channels out, K kernels, F products of a tile.
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308).

#pragma once

#include "products.h"

enum {
    POINTS = TILE + 2,  // a tile's inputs each way, and the points that its polynomials are taken at
    F = POINTS * POINTS,
    BLOCK = TILE % 2 ? 2 : 1,  // tiles each way whose outputs are whole windows of 2x2
    SIDE = BLOCK * TILE,       // outputs of a block each way
    MOST_PLACES = F > SIDE * SIDE ? F : SIDE * SIDE,
};

#define PASTE(name, tile) name##tile
#define PASTED(name, tile) PASTE(name, tile)
#define OF_TILE(name) PASTED(name, TILE)

#if TILE == 2
// Points 0, 1, -1 and infinity, whose sign is the other way round, in A and B alike.

// B': inputs of a tile to points.
ALWAYS void to_points(const __m512 d[4], __m512 p[4]) {
    p[0] = _mm512_sub_ps(d[0], d[2]);
    p[1] = _mm512_add_ps(d[1], d[2]);
    p[2] = _mm512_sub_ps(d[2], d[1]);
    p[3] = _mm512_sub_ps(d[1], d[3]);
}

// A': points to outputs of a tile.
ALWAYS void from_points(const __m512 p[4], __m512 y[2]) {
    y[0] = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), p[2]);
    y[1] = _mm512_sub_ps(_mm512_sub_ps(p[1], p[2]), p[3]);
}

// A: the way back of `from_points`.
ALWAYS void spread(const __m512 y[2], __m512 p[4]) {
    p[0] = y[0];
    p[1] = _mm512_add_ps(y[0], y[1]);
    p[2] = _mm512_sub_ps(y[0], y[1]);
    p[3] = _mm512_sub_ps(_mm512_setzero_ps(), y[1]);
}

// G: a row of a kernel to points.
ALWAYS void kernel_to_points(const __m512 g[3], __m512 p[4]) {
    __m512 half = _mm512_set1_ps(0.5f);
    __m512 even = _mm512_mul_ps(half, _mm512_add_ps(g[0], g[2])), odd = _mm512_mul_ps(half, g[1]);
    p[0] = g[0];
    p[1] = _mm512_add_ps(even, odd);
    p[2] = _mm512_sub_ps(even, odd);
    p[3] = g[2];
}

// G': the way back of `kernel_to_points`.
ALWAYS void kernel_from_points(const __m512 p[4], __m512 g[3]) {
    __m512 half = _mm512_set1_ps(0.5f), even = _mm512_mul_ps(half, _mm512_add_ps(p[1], p[2]));
    g[0] = _mm512_add_ps(p[0], even);
    g[1] = _mm512_mul_ps(half, _mm512_sub_ps(p[1], p[2]));
    g[2] = _mm512_add_ps(even, p[3]);
}
#elif TILE == 3
// Points a, -a, b, -b and infinity, with a = 2/5 and b = 3/2. The usual 0, 1, -1 and 2 round twice as much: 1.4% of a
// result's norm for 0.6%.
#define NUMBER(value) _mm512_set1_ps((float)(value))
static const double point_a = 0.4, square_a = 0.16, point_b = 1.5, square_b = 2.25;

ALWAYS void to_points(const __m512 d[5], __m512 p[5]) {
    __m512 even_a = _mm512_mul_ps(NUMBER(point_a), _mm512_fnmadd_ps(NUMBER(square_b), d[0], d[2]));
    __m512 even_b = _mm512_mul_ps(NUMBER(point_b), _mm512_fnmadd_ps(NUMBER(square_a), d[0], d[2]));
    __m512 odd_a = _mm512_fnmadd_ps(NUMBER(square_b), d[1], d[3]);
    __m512 odd_b = _mm512_fnmadd_ps(NUMBER(square_a), d[1], d[3]);
    p[0] = _mm512_add_ps(odd_a, even_a);
    p[1] = _mm512_sub_ps(odd_a, even_a);
    p[2] = _mm512_add_ps(odd_b, even_b);
    p[3] = _mm512_sub_ps(odd_b, even_b);
    p[4] = _mm512_fnmadd_ps(NUMBER(square_a + square_b), d[2],
                            _mm512_fmadd_ps(NUMBER(square_a * square_b), d[0], d[4]));
}

ALWAYS void from_points(const __m512 p[5], __m512 y[3]) {
    __m512 even_a = _mm512_add_ps(p[0], p[1]), odd_a = _mm512_sub_ps(p[0], p[1]);
    __m512 even_b = _mm512_add_ps(p[2], p[3]), odd_b = _mm512_sub_ps(p[2], p[3]);
    y[0] = _mm512_add_ps(even_a, even_b);
    y[1] = _mm512_fmadd_ps(NUMBER(point_a), odd_a, _mm512_mul_ps(NUMBER(point_b), odd_b));
    y[2] = _mm512_fmadd_ps(NUMBER(square_a), even_a, _mm512_fmadd_ps(NUMBER(square_b), even_b, p[4]));
}

ALWAYS void spread(const __m512 y[3], __m512 p[5]) {
    __m512 even_a = _mm512_fmadd_ps(NUMBER(square_a), y[2], y[0]), odd_a = _mm512_mul_ps(NUMBER(point_a), y[1]);
    __m512 even_b = _mm512_fmadd_ps(NUMBER(square_b), y[2], y[0]), odd_b = _mm512_mul_ps(NUMBER(point_b), y[1]);
    p[0] = _mm512_add_ps(even_a, odd_a);
    p[1] = _mm512_sub_ps(even_a, odd_a);
    p[2] = _mm512_add_ps(even_b, odd_b);
    p[3] = _mm512_sub_ps(even_b, odd_b);
    p[4] = y[2];
}

// One over the product of the differences to the other finite points: 1 / (2 a (aa - bb)), and 1 / (2 b (bb - aa)). Of
// -a and -b it has the other sign.
static const double of_a = -250.0 / 418, of_b = 100.0 / 627;

ALWAYS void kernel_to_points(const __m512 g[3], __m512 p[5]) {
    __m512 even_a = _mm512_mul_ps(NUMBER(of_a), _mm512_fmadd_ps(NUMBER(square_a), g[2], g[0]));
    __m512 even_b = _mm512_mul_ps(NUMBER(of_b), _mm512_fmadd_ps(NUMBER(square_b), g[2], g[0]));
    __m512 odd_a = _mm512_mul_ps(NUMBER(of_a * point_a), g[1]), odd_b = _mm512_mul_ps(NUMBER(of_b * point_b), g[1]);
    p[0] = _mm512_add_ps(odd_a, even_a);
    p[1] = _mm512_sub_ps(odd_a, even_a);
    p[2] = _mm512_add_ps(odd_b, even_b);
    p[3] = _mm512_sub_ps(odd_b, even_b);
    p[4] = g[2];
}

ALWAYS void kernel_from_points(const __m512 p[5], __m512 g[3]) {
    __m512 even_a = _mm512_mul_ps(NUMBER(of_a), _mm512_sub_ps(p[0], p[1]));
    __m512 even_b = _mm512_mul_ps(NUMBER(of_b), _mm512_sub_ps(p[2], p[3]));
    __m512 odd_b = _mm512_mul_ps(NUMBER(of_b * point_b), _mm512_add_ps(p[2], p[3]));
    g[0] = _mm512_add_ps(even_a, even_b);
    g[1] = _mm512_fmadd_ps(NUMBER(of_a * point_a), _mm512_add_ps(p[0], p[1]), odd_b);
    g[2] = _mm512_fmadd_ps(NUMBER(square_a), even_a, _mm512_fmadd_ps(NUMBER(square_b), even_b, p[4]));
}
#else
// Points 0, a, -a, b, -b and infinity, with a = 2/3 and b = 3/2. The usual 1 and 2 round twice as much: 1.8% of a
// result's norm for 0.8%. That a times b is one leaves factors out.
#define NUMBER(value) _mm512_set1_ps((float)(value))
static const double point_a = 2.0 / 3, square_a = 4.0 / 9, point_b = 3.0 / 2, square_b = 9.0 / 4;

ALWAYS void to_points(const __m512 d[6], __m512 p[6]) {
    __m512 both = NUMBER(square_a + square_b);
    __m512 even_a = _mm512_fnmadd_ps(NUMBER(square_b), d[2], d[4]);
    __m512 even_b = _mm512_fnmadd_ps(NUMBER(square_a), d[2], d[4]);
    __m512 odd_a = _mm512_fmsub_ps(NUMBER(point_a), d[3], _mm512_mul_ps(NUMBER(point_b), d[1]));
    __m512 odd_b = _mm512_fmsub_ps(NUMBER(point_b), d[3], _mm512_mul_ps(NUMBER(point_a), d[1]));
    p[0] = _mm512_fnmadd_ps(both, d[2], _mm512_add_ps(d[0], d[4]));
    p[1] = _mm512_add_ps(even_a, odd_a);
    p[2] = _mm512_sub_ps(even_a, odd_a);
    p[3] = _mm512_add_ps(even_b, odd_b);
    p[4] = _mm512_sub_ps(even_b, odd_b);
    p[5] = _mm512_fnmadd_ps(both, d[3], _mm512_add_ps(d[1], d[5]));
}

ALWAYS void from_points(const __m512 p[6], __m512 y[4]) {
    __m512 even_a = _mm512_add_ps(p[1], p[2]), odd_a = _mm512_sub_ps(p[1], p[2]);
    __m512 even_b = _mm512_add_ps(p[3], p[4]), odd_b = _mm512_sub_ps(p[3], p[4]);
    y[0] = _mm512_add_ps(p[0], _mm512_add_ps(even_a, even_b));
    y[1] = _mm512_fmadd_ps(NUMBER(point_a), odd_a, _mm512_mul_ps(NUMBER(point_b), odd_b));
    y[2] = _mm512_fmadd_ps(NUMBER(square_a), even_a, _mm512_mul_ps(NUMBER(square_b), even_b));
    y[3] = _mm512_fmadd_ps(NUMBER(point_a * square_a), odd_a, _mm512_fmadd_ps(NUMBER(point_b * square_b), odd_b, p[5]));
}

ALWAYS void spread(const __m512 y[4], __m512 p[6]) {
    __m512 even_a = _mm512_fmadd_ps(NUMBER(square_a), y[2], y[0]);
    __m512 even_b = _mm512_fmadd_ps(NUMBER(square_b), y[2], y[0]);
    __m512 odd_a = _mm512_fmadd_ps(NUMBER(point_a * square_a), y[3], _mm512_mul_ps(NUMBER(point_a), y[1]));
    __m512 odd_b = _mm512_fmadd_ps(NUMBER(point_b * square_b), y[3], _mm512_mul_ps(NUMBER(point_b), y[1]));
    p[0] = y[0];
    p[1] = _mm512_add_ps(even_a, odd_a);
    p[2] = _mm512_sub_ps(even_a, odd_a);
    p[3] = _mm512_add_ps(even_b, odd_b);
    p[4] = _mm512_sub_ps(even_b, odd_b);
    p[5] = y[3];
}

// One over the product of the differences to the other finite points: 1 / (2 aa (aa - bb)), and 1 / (2 bb (bb - aa)).
static const double of_a = -81.0 / 130, of_b = 8.0 / 65;

ALWAYS void kernel_to_points(const __m512 g[3], __m512 p[6]) {
    __m512 even_a = _mm512_mul_ps(NUMBER(of_a), _mm512_fmadd_ps(NUMBER(square_a), g[2], g[0]));
    __m512 even_b = _mm512_mul_ps(NUMBER(of_b), _mm512_fmadd_ps(NUMBER(square_b), g[2], g[0]));
    __m512 odd_a = _mm512_mul_ps(NUMBER(of_a * point_a), g[1]), odd_b = _mm512_mul_ps(NUMBER(of_b * point_b), g[1]);
    p[0] = g[0];
    p[1] = _mm512_add_ps(even_a, odd_a);
    p[2] = _mm512_sub_ps(even_a, odd_a);
    p[3] = _mm512_add_ps(even_b, odd_b);
    p[4] = _mm512_sub_ps(even_b, odd_b);
    p[5] = g[2];
}

ALWAYS void kernel_from_points(const __m512 p[6], __m512 g[3]) {
    __m512 even_a = _mm512_mul_ps(NUMBER(of_a), _mm512_add_ps(p[1], p[2]));
    __m512 even_b = _mm512_mul_ps(NUMBER(of_b), _mm512_add_ps(p[3], p[4]));
    __m512 odd_b = _mm512_mul_ps(NUMBER(of_b * point_b), _mm512_sub_ps(p[3], p[4]));
    g[0] = _mm512_add_ps(p[0], _mm512_add_ps(even_a, even_b));
    g[1] = _mm512_fmadd_ps(NUMBER(of_a * point_a), _mm512_sub_ps(p[1], p[2]), odd_b);
    g[2] = _mm512_fmadd_ps(NUMBER(square_a), even_a, _mm512_fmadd_ps(NUMBER(square_b), even_b, p[5]));
}
#endif

// How the tile rows of all images, one image after the other, are cut into chunks.
typedef struct {
    int64_t tile_rows, tiles_across, rows_at_once, chunks;
} Plan;

// A chunk is half as large as the transformed kernels that it goes through, so that those are read about as often as
// the chunk is written and read, within what the caches of one core and of all cores hold: measured (docs/log.md).
static inline Plan plan(const Shape *s, int64_t bytes_per_tile, int64_t kernel_bytes, int threads) {
    int64_t chunk_bytes = most((int64_t)1 << 19, least(kernel_bytes / 2, (int64_t)1 << 23));
    Plan p = {(s->height + TILE - 1) / TILE, (s->width + TILE - 1) / TILE, 0, 0};
    int64_t rows = s->images * p.tile_rows;
    int64_t wanted = most(1, least(chunk_bytes / (bytes_per_tile * p.tiles_across), rows / (2 * threads)));
    if (BLOCK > 1) wanted = most(wanted, p.tile_rows);  // blocks are not cut apart
    if (wanted >= p.tile_rows) {  // images two by two, as their gradients are shared out
        int64_t images = wanted / p.tile_rows;
        wanted = (images > 1 ? images / 2 * 2 : 1) * p.tile_rows;
    } else {  // parts of one image, as equal as can be
        int64_t parts = (p.tile_rows + wanted - 1) / wanted;
        wanted = (p.tile_rows + parts - 1) / parts;
    }
    p.rows_at_once = wanted;
    p.chunks = (rows + wanted - 1) / wanted;
    return p;
}

// Where number (f, row, slot, column) of transformed kernels lies: in panels of 64 columns, the last as wide as is
// left, each (rows, slots, columns of the panel).
static inline int64_t at(int64_t f, int64_t row, int64_t slot, int64_t column, int64_t rows, int64_t slots,
                         int64_t columns) {
    int64_t panel = column / (PANEL * LANES) * (PANEL * LANES), width = least(PANEL * LANES, columns - panel);
    return rows * slots * (f * columns + panel) + (row * slots + slot) * width + column - panel;
}

// Where the numbers of a square of places lie in a map: found once for all their channels.
typedef struct {
    const bf16 *numbers[MOST_PLACES];   // none outside the map
    const uint8_t *taken[MOST_PLACES];  // of pooled maps: where in its window each number was taken from,
    char here[MOST_PLACES];             // and where in its window this place is
} Square;

static const bf16 nothing[LANES];

// Finds the square of `side` places each way that begins at (y, x).
static inline void find_square(const Maps *maps, int64_t image, int64_t y, int64_t x, const int side, Square *to) {
    int64_t height = maps->height, width = maps->width, pooled = maps->places != NULL;
    for (int i = 0; i < side; i++)
        for (int j = 0; j < side; j++) {
            int64_t down = y + i, along = x + j;
            int inside = down >= 0 && down < height && along >= 0 && along < width;
            if (pooled) inside = inside && down / 2 < height / 2 && along / 2 < width / 2;
            int64_t place = pooled ? (image * (height / 2) + down / 2) * (width / 2) + along / 2
                                   : (image * height + down) * width + along;
            to->numbers[side * i + j] = inside ? maps->numbers + place * maps->channels : NULL;
            if (pooled) {
                to->taken[side * i + j] = maps->places + (inside ? place * maps->channels : 0);
                to->here[side * i + j] = (char)(down % 2 * 2 + along % 2);
            }
        }
}

// 16 channels from `channel` at one place; zeros outside the map, where max-pooling took none, and where `mask` is.
ALWAYS __m512 read_square(const Square *from, int place, int64_t channel, __mmask16 mask, const int pooled) {
    const bf16 *numbers = from->numbers[place];
    numbers = numbers ? numbers + channel : nothing;
    if (!pooled) return load(numbers, mask);
    __m128i taken = _mm_maskz_loadu_epi8(mask, from->taken[place] + channel);
    return load(numbers, _mm_mask_cmpeq_epi8_mask(mask, taken, _mm_set1_epi8(from->here[place])));
}

// B' x B: the inputs of a tile to points, 16 channels of them.
ALWAYS void transform_inputs(const Square *from, int64_t channel, __mmask16 mask, __m512 to[F], const int pooled) {
    __m512 column[POINTS][POINTS];
#pragma GCC unroll 16
    for (int j = 0; j < POINTS; j++) {
        __m512 d[POINTS];
#pragma GCC unroll 16
        for (int i = 0; i < POINTS; i++) d[i] = read_square(from, POINTS * i + j, channel, mask, pooled);
        to_points(d, column[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < POINTS; i++) {
        __m512 row[POINTS];
#pragma GCC unroll 16
        for (int j = 0; j < POINTS; j++) row[j] = column[j][i];
        to_points(row, to + POINTS * i);
    }
}
