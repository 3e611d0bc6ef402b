// The convolution with tiles of 2x2 outputs.

#define TILE 2
#include "gradients.h"
#include "mix.h"
