// What the direct kernels of both layouts share.
#pragma once

#include "problem.h"
#include "vector.cuh"

namespace depthwise {

constexpr int min_int(int a, int b) { return a < b ? a : b; }
constexpr int max_int(int a, int b) { return a > b ? a : b; }

template <class Int>
constexpr Int divide_up(Int a, Int b) {
  return (a + b - 1) / b;
}

// Which of a window's rows or columns meet a tap of one of `outputs` outputs, as a bit mask. With a dilation most do not.
constexpr uint64_t window_mask(int outputs, int stride, int kernel, int dilation) {
  uint64_t mask = 0;
  for (int o = 0; o < outputs; ++o)
    for (int tap = 0; tap < kernel; ++tap) mask |= uint64_t{1} << (o * stride + tap * dilation);
  return mask;
}

constexpr int window_size(int outputs, int stride, int kernel, int dilation) {
  return (outputs - 1) * stride + (kernel - 1) * dilation + 1;
}

template <class T_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_>
struct NhwcTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_, kKernelW = kKernelW_;
  static constexpr int kStrideH = kStrideH_, kStrideW = kStrideW_;
  static constexpr int kDilationH = kDilationH_, kDilationW = kDilationW_;
};

}  // namespace depthwise
