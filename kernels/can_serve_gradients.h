// What the kernels for both gradients at once can serve: 3x3 and 5x5 with same padding, at stride 1, of aligned tensors.
#pragma once

#include "gradients_tiling.h"
#include "variants.h"

namespace depthwise {

inline bool can_serve_gradients(const Problem& p, Kernel kernel) {
  const int element_bytes = element_size(p.dtype), words = 16 / element_bytes;
  if ((kernel == Kernel::kGradientsNhwc) != (p.layout == Layout::kNhwc) || !p.aligned || p.multiplier != 1)
    return false;
  if (p.kernel_h != p.kernel_w || (p.kernel_h != 3 && p.kernel_h != 5)) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.padding_h != p.kernel_h / 2 || p.padding_w != p.kernel_w / 2 || p.h <= p.kernel_h / 2) return false;
  if (p.n * (p.h + 2) > kInt32Max / 2 || p.h * p.w * p.c > kInt32Max / 2) return false;  // rows; elements of an image
  const GradWeightArgs args = grad_weight_args(p);
  switch (kernel) {
    case Kernel::kGradientsNhwc: return p.c % words == 0;
    // Offsets are 32-bit numbers; 5x5 has too many sums beside the rows that are under way.
    case Kernel::kGradientsNchw: return p.kernel_h == 3 && p.w % words == 0 && p.n * p.c * p.h * p.w <= kInt32Max;
    default: {
      const GradientsPlanesTiling tiling = gradients_planes_tiling(args, element_bytes, 1);
      return p.c * p.h * p.w % words == 0 && tiling.bytes <= kMaxGradientsPlaneBytes &&
             tiling.threads() <= gradients_plane_threads(args.kernel_h);
    }
  }
}

}  // namespace depthwise
