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

template <class T_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_>
struct NhwcTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_, kKernelW = kKernelW_;
  static constexpr int kStrideH = kStrideH_, kStrideW = kStrideW_;
  static constexpr int kDilationH = kDilationH_, kDilationW = kDilationW_;
};

}  // namespace depthwise
