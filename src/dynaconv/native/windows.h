// Windows of 2x2 places in maps whose rows are packed for the matrix tiles: a left tile's 16 rows are 16 images at the
// same place, so that maps of any size are whole tiles. What would be multiplied with the zeros around a map is left out.

#pragma once

#include "matrix.h"

#ifdef MATRIX_TILES

static const int64_t MOST_ROWS = (int64_t)640 << 10;    // bytes of packed rows that a thread works on at once, or
static const int64_t MOST_MORE = (int64_t)384 << 10;    // so many more where the kernel, which passes by, is large
static const int64_t MOST_KERNEL = (int64_t)768 << 10;  // bytes of the kernel that it takes for all of them

// How many rows of `bytes` are finished together, an even number; two more lie packed. The kernel has `of_kernel`.
static int64_t strip_of(int64_t height, int64_t bytes, int64_t of_kernel) {
    return most(2, least(up(height, 2), ((MOST_ROWS + least(MOST_MORE, of_kernel)) / bytes - 2) / 2 * 2));
}

// Packed rows of the maps of 16 images, or fewer: row y lies at y modulo `held`.
typedef struct Ring {
    const void *maps;
    void (*pack)(const struct Ring *ring, int64_t y, bf16 *to);
    int64_t height, width;
    int64_t place;  // numbers of all images and channels at a place
    int64_t first, images, held;
    int64_t packed;  // rows that have been, from the top
    bf16 *rows;
} Ring;

static bf16 *row_of(const Ring *ring, int64_t y) { return ring->rows + y % ring->held * ring->width * ring->place; }

static void pack_until(Ring *ring, int64_t last) {
    for (; ring->packed < least(last, ring->height); ring->packed++)
        ring->pack(ring, ring->packed, row_of(ring, ring->packed));
}

// Left tiles at the four places of a window, for each tap of the kernel; none where the map ends.
typedef struct {
    const bf16 *at[9][4];
    int64_t taps;
} Window;

// How groups of 16 images are cut into tasks: each takes `rows` rows of a group, an even number, or those that are left.
typedef struct {
    int64_t cuts, rows;
} Cuts;

// A group is cut where there are too few of them to keep all threads busy.
static Cuts cut_groups(int64_t groups, int64_t height, int threads) {
    int64_t cuts = groups >= 4 * threads ? 1 : least(threads, (height + 1) / 2);
    return (Cuts){cuts, up((height + cuts - 1) / cuts, 2)};
}

static void find_window(const Ring *ring, int64_t y, int64_t x, int64_t side, Window *w) {
    int64_t height = ring->height, width = ring->width, margin = side / 2;
    w->taps = side * side;
    for (int64_t tap = 0; tap < w->taps; tap++)
        for (int64_t i = 0; i < 4; i++) {
            int64_t down = y + i / 2, right = x + i % 2, row = down + tap / side - margin;
            int64_t column = right + tap % side - margin;
            int inside = down < height && right < width && row >= 0 && row < height && column >= 0 && column < width;
            w->at[tap][i] = inside ? row_of(ring, row) + column * ring->place : NULL;
        }
}

#endif
