// The grad of one tap, term by term within bounds: for blocks of the fast kernels that met values that are not finite.
#pragma once

#include "problem.h"
#include "second_pass.cuh"
#include "vector.cuh"
#include "weights.cuh"

namespace depthwise {

// The positions of grad_output whose terms are asked for: images, rows, columns, from the first up to before the last.
struct GradRange {
  int64_t first_image, last_image;
  int first_row, last_row, first_column, last_column;
};

// Stride 1, dilation 1. Columns outside the image are skipped.
template <class T>
__device__ __forceinline__ float exact_grad_weight(const GradWeightArgs& args, bool channels_last, int64_t channel,
                                                   int i, int j, const GradRange& range) {
  const int64_t in_c = args.out_c / args.multiplier, in_channel = channel / args.multiplier;
  const int64_t grad_step = channels_last ? args.out_c : 1, in_step = channels_last ? in_c : 1;
  const int shift_h = i - args.padding_h, shift_w = j - args.padding_w;
  const int first_row = max(range.first_row, -shift_h), last_row = min(range.last_row, args.h - shift_h);
  const int first_column = max(max(range.first_column, 0), -shift_w);
  const int last_column = min(min(range.last_column, args.out_w), args.w - shift_w);
  float sum = 0.f;
  for (int64_t image = range.first_image; image < range.last_image; ++image) {
    for (int row = first_row; row < last_row; ++row) {
      const int64_t grad_row = channels_last ? (image * args.out_h + row) * args.out_w * args.out_c + channel
                                             : ((image * args.out_c + channel) * args.out_h + row) * args.out_w;
      const int64_t in_row = channels_last ? (image * args.h + row + shift_h) * args.w * in_c + in_channel
                                           : ((image * in_c + in_channel) * args.h + row + shift_h) * args.w;
      const T* const grad = static_cast<const T*>(args.grad_output) + grad_row;
      const T* const input = static_cast<const T*>(args.input) + in_row;
      float row_sum = 0.f;
#pragma unroll 1
      for (int column = first_column; column < last_column; ++column)
        row_sum = fmaf(load(grad + column * grad_step), load(input + (column + shift_w) * in_step), row_sum);
      sum += row_sum;
    }
  }
  return sum;
}

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }

// Where a block leaves its sums: the results themselves, or its split's row of the workspace.
template <class T>
__device__ __forceinline__ void store_grad_weight(const GradWeightArgs& args, int split, int64_t weight_idx,
                                                  int64_t weights, float value) {
  if (args.grad_weight != nullptr)
    store_gradient<T>(args.grad_weight, args.float_weight, weight_idx, value);
  else
    args.partial[split * weights + weight_idx] = value;
}

template <class T>
__device__ __forceinline__ void store_grad_bias(const GradWeightArgs& args, int split, int64_t channel, float value) {
  if (args.grad_bias != nullptr)
    store_gradient<T>(args.grad_bias, args.float_weight, channel, value);
  else if (args.partial_bias != nullptr)
    args.partial_bias[split * args.out_c + channel] = value;
}

}  // namespace depthwise
