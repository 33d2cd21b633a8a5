// What the kernels for both gradients at once share: a position of the input needs the same window of grad_output for its own
// gradient and for what it adds to the weights', so that three tensors are read and written where two kernels move four.
// gradients_nhwc.cuh, gradients_nchw.cuh, gradients_planes_nchw.cuh; launched by gradients.cu.
#pragma once

#include "cache_policy.cuh"
#include "exact_grad_weight.cuh"
#include "gradients_tiling.h"

namespace depthwise {

// Of a walk: an image, and a row of it, or of the zeros below it.
struct VirtualRow {
  int image, y;
  __device__ __forceinline__ VirtualRow(int row, int period)
      : image(row >= 0 ? row / period : -1), y(row - image * period) {}
};

template <class Traits>
__device__ __forceinline__ const weight_t<Traits>* weights_of(const GradientsArgs& args) {
  return static_cast<const weight_t<Traits>*>(args.weight);
}

// A step of a strip: the sums of its columns' gradients, and its terms of the weights'. `window`: the rows of grad_output,
// of which `newest` is the last; x: the strip's input. A row's terms are added up before they join a tap's sum in fp32: equal
// ones would round the same way every time.
template <class Traits>
__device__ __forceinline__ void add_step(float (&sum)[Traits::kTaps], float (&y)[Traits::kColumns],
                                         const float (&weight)[Traits::kTaps], const float (&x)[Traits::kColumns],
                                         const float (&window)[Traits::kKernel][Traits::kWindow], int newest) {
  constexpr int kKernel = Traits::kKernel;
  constexpr bool kIsWide = sizeof(typename Traits::T) == 4;
#pragma unroll
  for (int v = 0; v < Traits::kColumns; ++v) y[v] = 0;
#pragma unroll
  for (int i = 0; i < kKernel; ++i) {
    const float (&row)[Traits::kWindow] = window[(newest - i + kKernel) % kKernel];
#pragma unroll
    for (int j = 0; j < kKernel; ++j) {
      float& tap = sum[i * kKernel + j];
      float terms = kIsWide ? 0.f : tap;
#pragma unroll
      for (int v = 0; v < Traits::kColumns; ++v) {
        const float value = row[v + kKernel - 1 - j];
        terms = fmaf(x[v], value, terms);
        y[v] = fmaf(weight[i * kKernel + j], value, y[v]);
      }
      tap = kIsWide ? tap + terms : terms;
    }
  }
}

// A tap's terms of virtual rows of some images and of columns of the input, within bounds: where a sum is not finite, as a
// zero beside the image times infinity is not.
template <class T>
__device__ __noinline__ float exact_of_rows(const GradientsArgs& args, bool channels_last, int64_t channel, int tap,
                                            int first_image, int images, int begin, int end, int first_column,
                                            int last_column) {
  const int padding = args.padding_h, i = tap / args.kernel_w, j = tap - i * args.kernel_w;
  const int period = args.h + padding;
  float sum = 0;
#pragma unroll 1
  for (int image = begin / period; image < images && image * period < end; ++image) {
    const int first = max(begin - image * period, 0), last = min(end - image * period, args.h);
    const GradRange range{first_image + image,         first_image + image + 1,
                          max(0, first + padding - i), min(args.out_h, last + padding - i),
                          first_column + padding - j,  last_column + padding - j};
    sum += exact_grad_weight<T>(args, channels_last, channel, i, j, range);
  }
  return sum;
}

}  // namespace depthwise
