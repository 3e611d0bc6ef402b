// Mirrored and shifted by whole pixels: a copy of an image's pixels, from bytes to numbers from 0 to 1.

#include "maps.h"

// To y, (N, C, H, W), from the bytes x of the same shape: a pixel is read in row rows[n][i] and column columns[n][j] of
// its image, (N, H) and (N, W), and is 0 where either of them is negative.
void dynaconv_shift(const uint8_t *x, int64_t images, int64_t channels, int64_t height, int64_t width,
                    const int32_t *rows, const int32_t *columns, float *y, int threads) {
    float shares[256];  // of 255, divided as torch divides
    for (int value = 0; value < 256; value++) shares[value] = (float)value / 255.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; n++) {
        const int32_t *across = columns + n * width;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t i = 0; i < height; i++) {
                int64_t row = rows[n * height + i];
                const uint8_t *from = x + ((n * channels + c) * height + most(row, 0)) * width;
                float *to = y + ((n * channels + c) * height + i) * width;
                for (int64_t j = 0; j < width; j++) to[j] = row < 0 || across[j] < 0 ? 0 : shares[from[across[j]]];
            }
    }
}
