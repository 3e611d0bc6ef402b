// The convolution with tiles of 3x3 outputs.

#define TILE 3
#include "gradients.h"
#include "mix.h"
