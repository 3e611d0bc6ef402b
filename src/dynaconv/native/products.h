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

// The rows of one image in a chunk: `places` pairs of its tiles, and what its gradient is shared out by.
typedef struct {
    const uint32_t *tiles, *products, *weights;
    float *to_weights;
    int64_t places;
} Segment;

INTERNAL void mix_panel(const uint32_t *kernels, const uint32_t *weights, int64_t pairs, int64_t channels, int vectors,
                        uint32_t *panel);
INTERNAL void multiply(const uint32_t *tiles, int64_t channels, const uint32_t *panel, const uint32_t *weights,
                       int64_t mixed, float *sums, int64_t sum_stride, int64_t rows, int vectors);
INTERNAL void add_gradients(const Segment *segments, int64_t rows, int64_t offset, int64_t product_step,
                            const uint32_t *kernels, int64_t count, int64_t pairs, float *to, int vectors);
