// How columns_nchw, columns_grad_weight and columns_nhwc share small images out among threads. For what can serve, for
// launches and for the kernels.
#pragma once

#include "problem.h"

namespace depthwise {

// Rows and columns of a kernel; rows of a plane, and of those whose rows all are registers at once.
constexpr int kMaxColumnsKernel = 5, kMaxColumnsHeight = 32, kMaxColumnsRows = 16;
// columns_nchw: rows that are registers.
constexpr int columns_rows(int height, int kernel_h) {
  return height <= kMaxColumnsRows ? height : kernel_h < 3 ? 4 * kernel_h : kernel_h < 5 ? 2 * kernel_h : kernel_h;
}

// columns_nhwc: columns of an image, channels of a block.
constexpr int kMaxColumnsNhwcWidth = 16, kColumnsNhwcChannels = 32, kMaxColumnsNhwcTaps = 9;

// Neighbouring columns of a lane; lanes of a plane.
constexpr int columns_of(int width) { return width % 2 == 0 ? 2 : 1; }
constexpr int columns_lanes(int width) { return width / columns_of(width); }
// Planes of a warp.
constexpr int columns_planes(int width) { return 32 / columns_lanes(width); }
// Whether that is most of its lanes, and of a size that was measured.
constexpr bool columns_fill_warps(int64_t width) {
  return width <= 32 && columns_planes(static_cast<int>(width)) * columns_lanes(static_cast<int>(width)) >= 24;
}
// columns_nchw copies them as one run, in words of four bytes at least.
constexpr int columns_run_planes(int height, int width, int element_bytes) {
  const int planes = columns_planes(width);
  return planes * height * width * element_bytes % 4 == 0 ? planes : planes - 1;
}

// columns_grad_weight: warps of a block, and groups of images that are worth one. Of many taps fewer warps, so that all
// blocks are under way at once (5x5, 32x672x14x14, H100, fp32 / fp16: two 21.6 / 16.4 us, four 24.8 / 18.1; 3x3,
// 384x14x14: 14.9 / 12.3, 14.3 / 11.0).
constexpr int columns_grad_weight_warps(int taps) { return taps > 9 ? 2 : 4; }
constexpr int kColumnsGradWeightGroups = 8;

}  // namespace depthwise
