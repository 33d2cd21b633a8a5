// General depthwise convolution: forward, grad of input, grad of weight and bias.
//
// Serves  every kernel size, stride, padding, dilation and depth multiplier; fp32, fp16, bf16 (fp32 accumulators) and
//         fp64; NCHW and channels_last, through strides; 64-bit offsets, so tensors past 2^31 elements too.
// Owns    forward, grad of input: one thread an element, lanes along the dimension that is contiguous in memory; it finds
//         once which taps meet an element of the other tensor, and asks no tap.
//         grad of weight: a block owns eight or sixteen taps of one kernel row for one output channel (NCHW) or 32
//         of them (channels_last), and a share of the positions; its partial sums go to `partial`,
//         [split][channel][tap], and a second kernel adds the splits in order, where there are several. No atomics:
//         results repeat bit for bit.
// Chosen  when no specialisation serves, and during CUDA graph capture when its specialisation is not built yet.
#pragma once

#include <numeric>

#include "grad_weight_plan.h"
#include "problem.h"
#include "second_pass.cuh"
#include "vector.cuh"
#include "weights.cuh"

namespace depthwise {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

template <class T>
__device__ __forceinline__ T store_accumulator(accumulator_t<T> value) {
  if constexpr (sizeof(T) == 2)
    return from_float<T>(value);
  else
    return value;
}

// Divides by multiplying, exactly for indices below 2^53: a 64-bit division would be a subroutine with a stack frame.
struct Divider {
  int divisor;
  double reciprocal;

  __device__ __forceinline__ int64_t split(int64_t index, int* remainder) const {
    int64_t quotient = static_cast<int64_t>(static_cast<double>(index) * reciprocal);
    int64_t rest = index - quotient * divisor;
    if (rest < 0) --quotient, rest += divisor;
    if (rest >= divisor) ++quotient, rest -= divisor;
    *remainder = static_cast<int>(rest);
    return quotient;
  }
};

// A dense 4-d tensor: its strides, and how a linear index over its memory splits into n, c, h, w.
struct DenseTensor {
  bool channels_last;
  Divider c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;

  struct Index {
    int64_t n;
    int c, h, w;
  };

  __device__ __forceinline__ Index split(int64_t linear) const {
    Index index;
    if (channels_last) linear = c.split(linear, &index.c);
    linear = w.split(linear, &index.w);
    linear = h.split(linear, &index.h);
    if (!channels_last) linear = c.split(linear, &index.c);
    index.n = linear;
    return index;
  }
};

inline DenseTensor dense_tensor(Layout layout, int64_t c, int64_t h, int64_t w) {
  const auto divider = [](int64_t size) { return Divider{static_cast<int>(size), 1.0 / static_cast<double>(size)}; };
  if (layout == Layout::kNhwc) return {true, divider(c), divider(h), divider(w), c * h * w, 1, w * c, c};
  return {false, divider(c), divider(h), divider(w), c * h * w, h * w, w, 1};
}

// How the outputs that meet an element of the input follow each other: every `step` taps, `outputs` outputs back.
struct OutputSteps {
  int step, outputs;
};
inline OutputSteps output_steps(int64_t stride, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation);
  return {static_cast<int>(stride / common), static_cast<int>(dilation / common)};
}

struct GeneralArgs {
  int64_t n;
  int multiplier, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  DenseTensor in, out;  // input (grad_input) and output (grad_output)
  OutputSteps steps_h, steps_w;

  __host__ __device__ int64_t in_elements() const { return n * in.stride_n; }
  __host__ __device__ int64_t out_elements() const { return n * out.stride_n; }
};

// The taps of a row or column of the filter that meet an element, found once so that no tap has to be asked: `count` taps
// from `first` on, every `step`, which meet the other tensor's elements from `place` on.
struct MetTaps {
  int first, count, place;
};

// Forward: `start` is where the first tap lies in an input of `size`; taps are `dilation` elements apart.
__device__ __forceinline__ MetTaps input_taps(int start, int kernel, int dilation, int size) {
  const int first = start < 0 ? (dilation - 1 - start) / dilation : 0;
  const int end = size > start ? min(kernel, (size - 1 - start) / dilation + 1) : 0;
  return {first, end - first, start + first * dilation};
}

// Grad of input: `start` is the element's place in the padded input, which tap k meets as that of output
// (start - k * dilation) / stride, where there is such an output; the others follow by `steps`.
__device__ __forceinline__ MetTaps output_taps(int start, int kernel, int stride, int dilation, int size,
                                               OutputSteps steps) {
  const int tries = min(steps.step, kernel);
  int first = 0;
  while (first < tries && (start - first * dilation) % stride != 0) ++first;
  const int place = (start - first * dilation) / stride;
  const int64_t beyond = place < size ? 0 : (place - size) / steps.outputs + 1;  // too far right
  const int64_t tap = first + beyond * steps.step;
  const int output = static_cast<int>(place - beyond * steps.outputs);
  if (first == tries || output < 0 || tap >= kernel) return {0, 0, 0};
  const int last_tap = (kernel - 1 - static_cast<int>(tap)) / steps.step, last_output = output / steps.outputs;
  return {static_cast<int>(tap), min(last_tap, last_output) + 1, output};
}

// So many rows or columns of taps: how far it is from one to the next, in the tensor that they meet and in the filter.
struct TapSteps {
  int count;
  int64_t elements, taps;
};

// The products of taps and what they meet, from the first of them on. Each row is summed apart: a running sum loses bits
// with every term. A filter of one column is a row.
template <class T, class W>
__device__ __forceinline__ accumulator_t<T> sum_products(const T* from, const W* taps, int kernel_w, TapSteps rows,
                                                         TapSteps columns) {
  const TapSteps outer = kernel_w == 1 ? columns : rows, inner = kernel_w == 1 ? rows : columns;
  accumulator_t<T> sum = 0;
  for (int i = 0; i < outer.count; ++i, from += outer.elements, taps += outer.taps) {
    const T* element = from;
    const W* tap = taps;
    accumulator_t<T> row_sum = 0;
    for (int j = 0; j < inner.count; ++j, element += inner.elements, tap += inner.taps)
      row_sum += load(element) * load_for_sums<T>(tap);
    sum += row_sum;
  }
  return sum;
}

// Weight and bias are of W: T, or float32 (weights.cuh).
template <class T, class W>
__global__ void __launch_bounds__(kGeneralThreads)
    general_forward_kernel(const GeneralArgs args, const T* input, const W* weight, const W* bias, T* out) {
  const int64_t linear = static_cast<int64_t>(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (linear >= args.out_elements()) return;
  const auto o = args.out.split(linear);

  const MetTaps rows =
      input_taps(o.h * args.stride_h - args.padding_h, args.kernel_h, args.dilation_h, args.in.h.divisor);
  const MetTaps columns =
      input_taps(o.w * args.stride_w - args.padding_w, args.kernel_w, args.dilation_w, args.in.w.divisor);
  const T* from = input + o.n * args.in.stride_n + o.c / args.multiplier * args.in.stride_c +
                  rows.place * args.in.stride_h + columns.place * args.in.stride_w;
  const W* taps = weight + (static_cast<int64_t>(o.c) * args.kernel_h + rows.first) * args.kernel_w + columns.first;
  accumulator_t<T> sum = bias ? load_for_sums<T>(bias + o.c) : 0;
  sum += sum_products<T>(from, taps, args.kernel_w, {rows.count, args.dilation_h * args.in.stride_h, args.kernel_w},
                         {columns.count, args.dilation_w * args.in.stride_w, 1});
  out[linear] = store_accumulator<T>(sum);
}

template <class T, class W>
__global__ void __launch_bounds__(kGeneralThreads, 4)
    general_grad_input_kernel(const GeneralArgs args, const T* grad_output, const W* weight, T* grad_input) {
  const int64_t linear = static_cast<int64_t>(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (linear >= args.in_elements()) return;
  const auto x = args.in.split(linear);

  const MetTaps rows = output_taps(x.h + args.padding_h, args.kernel_h, args.stride_h, args.dilation_h,
                                   args.out.h.divisor, args.steps_h);
  const MetTaps columns = output_taps(x.w + args.padding_w, args.kernel_w, args.stride_w, args.dilation_w,
                                      args.out.w.divisor, args.steps_w);
  const T* from =
      grad_output + x.n * args.out.stride_n + rows.place * args.out.stride_h + columns.place * args.out.stride_w;
  const int64_t first_tap = static_cast<int64_t>(rows.first) * args.kernel_w + columns.first;
  accumulator_t<T> sum = 0;
  for (int c = x.c * args.multiplier; c < (x.c + 1) * args.multiplier; ++c)
    sum += sum_products<T>(from + c * args.out.stride_c,
                           weight + static_cast<int64_t>(c) * args.kernel_h * args.kernel_w + first_tap, args.kernel_w,
                           {rows.count, -args.steps_h.outputs * args.out.stride_h,
                            static_cast<int64_t>(args.steps_h.step) * args.kernel_w},
                           {columns.count, -args.steps_w.outputs * args.out.stride_w, args.steps_w.step});
  grad_input[linear] = store_accumulator<T>(sum);
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// The results of a grad of weight of one split, which needs no second pass; `weight` null: there are several.
struct GeneralGrads {
  void *weight, *bias;
  bool is_float;  // beside 16-bit tensors

  template <class T>
  __device__ __forceinline__ void store(void* grads, int64_t idx, accumulator_t<T> total) const {
    if (is_float)
      static_cast<float*>(grads)[idx] = static_cast<float>(total);
    else
      static_cast<T*>(grads)[idx] = store_accumulator<T>(total);
  }
};

// A block of 32 x 8 threads. NCHW: all of them along positions of one channel. channels_last: x along channels, y along
// positions. A position is (n, out_h, out_w), out_w fastest. grid: x channels, y groups of taps, z splits.
template <class T, bool kChannelsLast, int kTaps>
__global__ void __launch_bounds__(kGeneralThreads, kTaps > 8 ? 3 : 4)
    general_grad_weight_kernel(const GeneralArgs args, const T* grad_output, const T* input, accumulator_t<T>* partial,
                               accumulator_t<T>* partial_bias, const GeneralGrads grads) {
  using Sum = accumulator_t<T>;
  const int out_c = args.out.c.divisor;
  const int channel = kChannelsLast ? blockIdx.x * 32 + threadIdx.x : blockIdx.x;
  const int groups_w = (args.kernel_w + kTaps - 1) / kTaps;
  const int tap_h = blockIdx.y / groups_w;
  const int first_tap_w = blockIdx.y % groups_w * kTaps;
  const int taps = min(kTaps, args.kernel_w - first_tap_w);
  const int64_t step = args.dilation_w * args.in.stride_w;
  const bool bias_block = partial_bias != nullptr && blockIdx.y == 0;

  const int64_t positions = args.n * args.out.h.divisor * args.out.w.divisor;
  int ignored;
  const Divider splits{static_cast<int>(gridDim.z), 1.0 / gridDim.z};
  const int64_t begin = splits.split(positions * blockIdx.z, &ignored);
  const int64_t end = splits.split(positions * (blockIdx.z + 1), &ignored);
  const int thread = kChannelsLast ? threadIdx.y : threadIdx.y * 32 + threadIdx.x;
  constexpr int kStep = kChannelsLast ? kGeneralThreads / 32 : kGeneralThreads;

  Sum sum[kTaps] = {};
  // In parts of 128 terms, these in parts of 8: equal gradients would round the same way every time.
  Sum bias = 0, bias_part = 0, bias_of_8 = 0;
  int terms = 0;
  if (channel < out_c) {
    const T* grad_plane = grad_output + channel * args.out.stride_c;
    const T* plane = input + channel / args.multiplier * args.in.stride_c;
    for (int64_t position = begin + thread; position < end; position += kStep) {
      int out_w, out_h;
      const int64_t n = args.out.h.split(args.out.w.split(position, &out_w), &out_h);
      const Sum grad = load(grad_plane + n * args.out.stride_n + out_h * args.out.stride_h + out_w * args.out.stride_w);
      bias_of_8 += grad;
      if (++terms % 8 == 0) {
        bias_part += bias_of_8, bias_of_8 = 0;
        if (terms % 128 == 0) bias += bias_part, bias_part = 0;
      }
      const int h = out_h * args.stride_h - args.padding_h + tap_h * args.dilation_h;
      if (h < 0 || h >= args.in.h.divisor) continue;
      const int first_w = out_w * args.stride_w - args.padding_w + first_tap_w * args.dilation_w;
      const T* const from = plane + n * args.in.stride_n + h * args.in.stride_h + first_w * args.in.stride_w;
#pragma unroll
      for (int k = 0; k < kTaps; ++k)
        if (k < taps && static_cast<unsigned>(first_w + k * args.dilation_w) < static_cast<unsigned>(args.in.w.divisor))
          sum[k] += grad * load(from + k * step);
    }
  }

  let_second_pass_begin();

  // Add the block's threads in a fixed order: lanes of a warp first (NCHW), then the warps.
  __shared__ Sum shared[kTaps + 1][kGeneralThreads / 32][32];
  const auto reduce = [&](Sum value, int slot) {
    if (!kChannelsLast) value = sum_of_warp(value);
    shared[slot][threadIdx.y][threadIdx.x] = value;
  };
#pragma unroll
  for (int k = 0; k < kTaps; ++k) reduce(sum[k], k);
  reduce(bias + (bias_part + bias_of_8), kTaps);
  __syncthreads();
  if (channel >= out_c || threadIdx.y != 0) return;
  const int64_t row = static_cast<int64_t>(blockIdx.z) * out_c + channel;
  // channels_last: each lane has its channel's sums; NCHW: all lanes have the same, of which each adds one up.
  constexpr int kSlots = kChannelsLast ? 1 : 32;
  for (int k = kChannelsLast ? 0 : threadIdx.x; k <= kTaps; k += kSlots) {
    Sum of_warp[8];
    static_assert(kGeneralThreads / 32 == 8);
#pragma unroll
    for (int y = 0; y < 8; ++y) of_warp[y] = shared[k][y][kChannelsLast ? threadIdx.x : k];
    const Sum total = sum_of_eight(of_warp);
    const int64_t idx = (row * args.kernel_h + tap_h) * args.kernel_w + first_tap_w + k;
    if (k == kTaps && bias_block) {
      if (grads.weight != nullptr)
        grads.store<T>(grads.bias, channel, total);
      else
        partial_bias[row] = total;
    } else if (k < taps) {
      if (grads.weight != nullptr)
        grads.store<T>(grads.weight, idx, total);
      else
        partial[idx] = total;
    }
  }
}

// Rows of threads of a block that adds splits: more for many splits, so that none has to load one batch after the other
// (channels_last, H100, 8 / 32 rows: 448 splits of 3x3 at stride 2, 32x96x112x112, fp32: 88.2 / 86.9 us; 128 of
// 5x5 at stride 2, 144x56x56, fp16: 31.3 / 30.5; but 56 of 5x5, 240x28x28, fp32: 34.1 / 34.2; 32 of 3x3, 384x14x14: 14.1 /
// 14.3).
constexpr int kFewSplitShares = kGeneralThreads / 32, kMostSplitShares = 32;
constexpr int split_shares(int splits) { return splits > 64 ? kMostSplitShares : kFewSplitShares; }

// Adds the splits of 32 sums in a fixed order: each of a block's rows of threads its share of them, then the rows.
// `partial`: [split][weights], then [split][biases].
template <class T>
__global__ void __launch_bounds__(32 * kMostSplitShares)
    add_splits_kernel(const accumulator_t<T>* partial, int splits, int64_t weights, int64_t biases, T* grad_weight,
                      T* grad_bias) {
  using Sum = accumulator_t<T>;
  constexpr int kBatch = 8;
  static_assert(kFewSplitShares % kBatch == 0 && kMostSplitShares % kBatch == 0);
  const int shares = blockDim.y;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const bool of_bias = k >= weights;
  const int64_t count = of_bias ? biases : weights;
  const int64_t idx = of_bias ? k - weights : k;
  if (of_bias) partial += splits * weights;
  const int first = static_cast<int>(threadIdx.y);
  const Sum* from = partial + first * count + idx;
  const int64_t step = shares * count;
  int left = idx < count && first < splits ? (splits - first + shares - 1) / shares : 0;
  wait_for_first_pass();
  Sum sum = 0;
  if (left == 1) {
    sum = *from;
  } else {  // as many loads under way as can be; what is left at the end is one batch too
#pragma unroll 1
    for (; left > 0; left -= kBatch) {
      Sum value[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b, from += step) value[b] = b < left ? *from : 0;
      sum += sum_of_eight(value);
    }
  }

  __shared__ Sum shared[kMostSplitShares][32];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || idx >= count) return;
  sum = 0;
#pragma unroll 1
  for (int share = 0; share < shares; share += kBatch) {
    Sum value[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) value[b] = shared[share + b][threadIdx.x];
    sum += sum_of_eight(value);
  }
  (of_bias ? grad_bias : grad_weight)[idx] = store_accumulator<T>(sum);
}

}  // namespace depthwise
