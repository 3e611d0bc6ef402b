// The convolution with tiles of 4x4 outputs.

#define TILE 4
#include "gradients.h"
#include "mix.h"
