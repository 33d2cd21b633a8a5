// Whether a kernel with a tile can serve a problem at all: what it was written for, and what fits registers, shared memory
// and 32-bit indices on every architecture. Which of those that can is chosen: select.h.
#pragma once

#include "can_serve_direct.h"
#include "can_serve_gradients.h"
#include "can_serve_images.h"
#include "can_serve_large.h"
#include "can_serve_strips.h"

namespace depthwise {

inline bool can_serve(const Problem& p, Kernel kernel, int tile) {
  if (kernel == Kernel::kGeneral) return true;
  if (p.n == 0) return false;  // nothing is launched
  if (p.dtype == DType::kFloat64 || is_grad_weight_kernel(kernel) != (p.direction == Direction::kGradWeight) ||
      is_gradients_kernel(kernel) != (p.direction == Direction::kGradients))
    return false;
  const bool grad_input_kernel = is_grad_input_kernel(kernel);
  if (grad_input_kernel && p.direction != Direction::kGradInput) return false;
  // The grad of input is a forward convolution with the filter flipped only where every output position has its own input
  // position.
  const bool strided = p.stride_h != 1 || p.stride_w != 1;
  if (p.direction == Direction::kGradInput && (strided != grad_input_kernel || p.multiplier != 1)) return false;
  const Tile& t = tile_table(kernel, p.dtype)[tile];
  switch (kernel) {
    case Kernel::kToeplitz: return can_serve_toeplitz(p);
    case Kernel::kBandImages: return can_serve_band_images(p, t);
    case Kernel::kBlocked: return can_serve_blocked(p, t);
    case Kernel::kToeplitzGradWeight:
    case Kernel::kBlockedGradWeight: return can_serve_large_grad_weight(p, kernel, tile);
    case Kernel::kStripsNchw:
    case Kernel::kStripsNhwc: return can_serve_strips(p, kernel);
    case Kernel::kStripsGradWeightNchw:
    case Kernel::kStripsGradWeightNhwc: return can_serve_strips_grad_weight(p, kernel);
    case Kernel::kImagesNchw:
    case Kernel::kImagesNhwc: return can_serve_images(p, kernel, t);
    case Kernel::kImageBandsNhwc: return can_serve_image_bands(p);
    case Kernel::kImagesGradWeightNchw:
    case Kernel::kImagesGradWeightNhwc: return can_serve_images_grad_weight(p, kernel, t);
    case Kernel::kImageRowsGradWeight: return can_serve_image_rows_grad_weight(p);
    case Kernel::kColumnsNchw:
    case Kernel::kColumnsNhwc:
    case Kernel::kColumnsGradWeight: return can_serve_columns(p, kernel);
    case Kernel::kImagesFma: return can_serve_images_fma(p, t);
    case Kernel::kImagesFmaGradWeight: return can_serve_images_fma_grad_weight(p, t);
    case Kernel::kGradWeightNchw:
    case Kernel::kGradWeightNhwc: return can_serve_grad_weight(p, kernel, t);
    case Kernel::kGradWeightPlanesNchw: return can_serve_grad_weight_planes(p, t);
    case Kernel::kGradWeightStreamNhwc: return can_serve_grad_weight_stream(p, t);
    case Kernel::kGradWeightRowsNhwc: return can_serve_grad_weight_rows(p, t);
    case Kernel::kGradientsNchw:
    case Kernel::kGradientsPlanesNchw:
    case Kernel::kGradientsNhwc: return can_serve_gradients(p, kernel);
    default: return can_serve_direct(p, kernel, t);
  }
}

}  // namespace depthwise
