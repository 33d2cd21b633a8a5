// What the grad-of-input kernels of both layouts share: how outputs of a strided convolution's gradient meet elements of
// grad_output.
//
// As in the direct kernels the filter is flipped and the padding dilation * (kernel - 1) - padding: element (row, column)
// of grad_input sums the taps at row - padding + tap * dilation of a grad_output with stride - 1 zeros between elements.
#pragma once

#include "direct.cuh"

namespace depthwise {

// One dimension of a thread's tile: which elements of grad_output its `kOutputs` outputs read.
template <int kOutputs, int kKernel, int kStride, int kDilation, int kPadding>
struct GradWindow {
  static_assert(kOutputs % kStride == 0);
  static constexpr int kSteps = kOutputs / kStride;  // of grad_output from one tile to the next
  static constexpr int kFirst = -floor_divide(kPadding, kStride);
  static constexpr int kSize = floor_divide(kOutputs - 1 + (kKernel - 1) * kDilation - kPadding, kStride) - kFirst + 1;

  // The tap between output `o` and element `k` of the window, or -1.
  static constexpr int tap(int o, int k) {
    const int offset = (kFirst + k) * kStride + kPadding - o;
    return offset >= 0 && offset % kDilation == 0 && offset / kDilation < kKernel ? offset / kDilation : -1;
  }
};

}  // namespace depthwise
