// General depthwise convolution: forward, grad of input, grad of weight and bias.
//
// Serves  every kernel size, stride, padding, dilation and depth multiplier; fp32, fp16, bf16 (fp32 accumulators) and
//         fp64; NCHW and channels_last, through strides; 64-bit offsets, so tensors past 2^31 elements too.
// Owns    forward, grad of input: one thread an element, lanes along the dimension that is contiguous in memory.
//         grad of weight: a block owns kGeneralTapsPerBlock taps of one kernel row for one output channel (NCHW) or 32
//         of them (channels_last), and a share of the positions; its partial sums go to `partial`,
//         [split][channel][tap], and a second kernel adds the splits in order. No atomics: results repeat bit for bit.
// Chosen  when no specialisation serves, and during CUDA graph capture when its specialisation is not built yet.
#pragma once

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

struct GeneralArgs {
  int64_t n;
  int multiplier, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  DenseTensor in, out;  // input (grad_input) and output (grad_output)

  __host__ __device__ int64_t in_elements() const { return n * in.stride_n; }
  __host__ __device__ int64_t out_elements() const { return n * out.stride_n; }
};

constexpr int kGeneralThreads = 256;

// Weight and bias are of W: T, or float32 (weights.cuh).
template <class T, class W>
__global__ void __launch_bounds__(kGeneralThreads)
    general_forward_kernel(const GeneralArgs args, const T* input, const W* weight, const W* bias, T* out) {
  const int64_t linear = static_cast<int64_t>(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (linear >= args.out_elements()) return;
  const auto o = args.out.split(linear);

  const T* plane = input + o.n * args.in.stride_n + o.c / args.multiplier * args.in.stride_c;
  const W* filter = weight + static_cast<int64_t>(o.c) * args.kernel_h * args.kernel_w;
  accumulator_t<T> sum = bias ? load_for_sums<T>(bias + o.c) : 0;
  for (int i = 0; i < args.kernel_h; ++i) {
    const int h = o.h * args.stride_h - args.padding_h + i * args.dilation_h;
    if (h < 0 || h >= args.in.h.divisor) continue;
    const T* row = plane + h * args.in.stride_h;
    accumulator_t<T> row_sum = 0;  // apart: a running sum loses bits with every term
    for (int j = 0; j < args.kernel_w; ++j) {
      const int w = o.w * args.stride_w - args.padding_w + j * args.dilation_w;
      if (w >= 0 && w < args.in.w.divisor)
        row_sum += load(row + w * args.in.stride_w) * load_for_sums<T>(filter + i * args.kernel_w + j);
    }
    sum += row_sum;
  }
  out[linear] = store_accumulator<T>(sum);
}

template <class T, class W>
__global__ void __launch_bounds__(kGeneralThreads)
    general_grad_input_kernel(const GeneralArgs args, const T* grad_output, const W* weight, T* grad_input) {
  const int64_t linear = static_cast<int64_t>(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (linear >= args.in_elements()) return;
  const auto x = args.in.split(linear);

  accumulator_t<T> sum = 0;
  for (int c = x.c * args.multiplier; c < (x.c + 1) * args.multiplier; ++c) {
    const T* plane = grad_output + x.n * args.out.stride_n + c * args.out.stride_c;
    const W* filter = weight + static_cast<int64_t>(c) * args.kernel_h * args.kernel_w;
    for (int i = 0; i < args.kernel_h; ++i) {
      const int h = x.h + args.padding_h - i * args.dilation_h;  // stride_h times the output row, if it is one
      const int out_h = h / args.stride_h;
      if (h < 0 || out_h * args.stride_h != h || out_h >= args.out.h.divisor) continue;
      accumulator_t<T> row_sum = 0;
      for (int j = 0; j < args.kernel_w; ++j) {
        const int w = x.w + args.padding_w - j * args.dilation_w;
        const int out_w = w / args.stride_w;
        if (w < 0 || out_w * args.stride_w != w || out_w >= args.out.w.divisor) continue;
        row_sum += load(plane + out_h * args.out.stride_h + out_w * args.out.stride_w) *
                   load_for_sums<T>(filter + i * args.kernel_w + j);
      }
      sum += row_sum;
    }
  }
  grad_input[linear] = store_accumulator<T>(sum);
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// A block of 32 x 8 threads. NCHW: all of them along positions of one channel. channels_last: x along channels, y along
// positions. A position is (n, out_h, out_w), out_w fastest. grid: x channels, y groups of taps, z splits.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGeneralThreads, 4)
    general_grad_weight_kernel(const GeneralArgs args, const T* grad_output, const T* input, accumulator_t<T>* partial,
                               accumulator_t<T>* partial_bias) {
  using Sum = accumulator_t<T>;
  const int out_c = args.out.c.divisor;
  const int channel = kChannelsLast ? blockIdx.x * 32 + threadIdx.x : blockIdx.x;
  const int groups_w = (args.kernel_w + kGeneralTapsPerBlock - 1) / kGeneralTapsPerBlock;
  const int tap_h = blockIdx.y / groups_w;
  const int first_tap_w = blockIdx.y % groups_w * kGeneralTapsPerBlock;
  const bool bias_block = partial_bias != nullptr && blockIdx.y == 0;

  const int64_t positions = args.n * args.out.h.divisor * args.out.w.divisor;
  int ignored;
  const Divider splits{static_cast<int>(gridDim.z), 1.0 / gridDim.z};
  const int64_t begin = splits.split(positions * blockIdx.z, &ignored);
  const int64_t end = splits.split(positions * (blockIdx.z + 1), &ignored);
  const int thread = kChannelsLast ? threadIdx.y : threadIdx.y * 32 + threadIdx.x;
  constexpr int kStep = kChannelsLast ? kGeneralThreads / 32 : kGeneralThreads;

  Sum sum[kGeneralTapsPerBlock] = {};
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
      const T* row = plane + n * args.in.stride_n + h * args.in.stride_h;
      const int first_w = out_w * args.stride_w - args.padding_w + first_tap_w * args.dilation_w;
#pragma unroll
      for (int k = 0; k < kGeneralTapsPerBlock; ++k) {
        const int w = first_w + k * args.dilation_w;
        if (first_tap_w + k < args.kernel_w && w >= 0 && w < args.in.w.divisor)
          sum[k] += grad * load(row + w * args.in.stride_w);
      }
    }
  }

  let_second_pass_begin();

  // Add the block's threads in a fixed order: lanes of a warp first (NCHW), then the warps.
  __shared__ Sum shared[kGeneralTapsPerBlock + 1][kGeneralThreads / 32][32];
  const auto reduce = [&](Sum value, int slot) {
    if (!kChannelsLast) value = sum_of_warp(value);
    shared[slot][threadIdx.y][threadIdx.x] = value;
  };
#pragma unroll
  for (int k = 0; k < kGeneralTapsPerBlock; ++k) reduce(sum[k], k);
  reduce(bias + (bias_part + bias_of_8), kGeneralTapsPerBlock);
  __syncthreads();
  if (channel >= out_c || threadIdx.y != 0 || (!kChannelsLast && threadIdx.x != 0)) return;
  const int64_t row = static_cast<int64_t>(blockIdx.z) * out_c + channel;
  for (int k = 0; k <= kGeneralTapsPerBlock; ++k) {
    Sum of_warp[8];
    static_assert(kGeneralThreads / 32 == 8);
#pragma unroll
    for (int y = 0; y < 8; ++y) of_warp[y] = shared[k][y][threadIdx.x];
    const Sum total = sum_of_eight(of_warp);
    if (k == kGeneralTapsPerBlock) {
      if (bias_block) partial_bias[row] = total;
    } else if (first_tap_w + k < args.kernel_w) {
      partial[(row * args.kernel_h + tap_h) * args.kernel_w + first_tap_w + k] = total;
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
