// What select.h and select_grad_weight.h share.
#pragma once

#include "can_serve.h"

namespace depthwise {

constexpr int64_t k3x3 = 9, k3x5 = 15, k5x5 = 25, k9x9 = 81;  // taps

// Batches that fill the lanes of a product or of a warp: kernels that take several images at once waste the others.
constexpr int64_t kImagesBatch = 8, kImagesFmaBatch = 16;

// The first tile of a kernel's table that serves `p`, or the general kernel.
inline Config first_that_serves(const Problem& p, Kernel kernel) {
  for (int tile = 0; tile < tile_table(kernel, p.dtype).size; ++tile)
    if (can_serve(p, kernel, tile)) return {kernel, tile};
  return {};
}

}  // namespace depthwise
