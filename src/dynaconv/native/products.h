// Products of transformed maps with transformed kernels: they are the same for tiles of any size.

#pragma once

#include "maps.h"

enum {
    PANEL = 4,  // vectors of outputs side by side, for which sums are held in registers
    ROWS = 6,   // tiles of the same
    FEW = 4,    // channels of the same, in the backward pass
};

// Seen by the files of this library alone.
#define INTERNAL __attribute__((visibility("hidden")))

// Rows of a chunk, of one image where kernels are mixed: `places` pairs of their tiles, and what the image's gradient
// is shared out by.
typedef struct {
    const uint32_t *tiles, *products, *weights;
    float *to_weights;
    int64_t places;
} Segment;

// Where the tiles and products of one point, some channels and some outputs lie in every segment, and the numbers from
// one vector of outputs to the next.
typedef struct {
    int64_t tiles, products, step;
} Offsets;

INTERNAL void mix_panel(const uint32_t *kernels, const uint32_t *weights, int64_t pairs, int64_t channels, int vectors,
                        uint32_t *panel);
INTERNAL void multiply(const uint32_t *tiles, int64_t tile_stride, int64_t pairs, const uint32_t *panel,
                       const uint32_t *weights, int64_t mixed, float *sums, int64_t sum_stride, int64_t rows,
                       int vectors);
INTERNAL void add_gradients(const Segment *segments, int64_t rows, const Offsets *at, const uint32_t *kernels,
                            int64_t count, int64_t pairs, float *to, int vectors);
