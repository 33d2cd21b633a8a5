// Grad of input for strides above 1, channels_last: gathered from grad_output, no atomics.
//
// Serves  strides 1, 2 and 4 in any combination, any compile-time kernel, dilation and padding; fp32, fp16, bf16; channels
//         a multiple of kVector.
// Owns    each thread computes kColumns x kRows neighbouring pixels of kVector channels in fp32 registers. Both are
//         multiples of the stride, so which tap meets which pixel of grad_output is known when compiling. Threads of a
//         block lie along channels first, so a warp reads and writes whole lines.
// Reads   the thread's window of grad_output at once.
// Chosen  for kernels whose weights fit registers (select.h).
#pragma once

#include "grad_window.cuh"

namespace depthwise {

constexpr int kGradInputNhwcThreads = 128;
constexpr int kGradInputNhwcLanes = 32;  // threads along channels, at most

template <class T, int kKernelH, int kKernelW, int kStrideH, int kStrideW, int kDilationH, int kDilationW,
          int kPaddingW_, int kPaddingH_>
struct GradInputNhwcTraits : NhwcTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW> {
  static constexpr int kPaddingW = kPaddingW_, kPaddingH = kPaddingH_;
};

template <class Traits, int kColumns, int kRows, int kVector>
__global__ void __launch_bounds__(kGradInputNhwcThreads)
    grad_input_nhwc_kernel(const DirectArgs args, const unsigned tiles_w, const unsigned tiles_h,
                           const unsigned blocks_c) {
  using T = typename Traits::T;
  using Pixel = Vector<T, kVector>;
  using Columns = GradWindow<kColumns, Traits::kKernelW, Traits::kStrideW, Traits::kDilationW, Traits::kPaddingW>;
  using Rows = GradWindow<kRows, Traits::kKernelH, Traits::kStrideH, Traits::kDilationH, Traits::kPaddingH>;
  constexpr int kTaps = Traits::kKernelH * Traits::kKernelW;

  const int channel = (blockIdx.x % blocks_c * blockDim.x + threadIdx.x) * kVector;
  unsigned tile = blockIdx.x / blocks_c * blockDim.y + threadIdx.y;
  const int tile_w = tile % tiles_w;
  tile /= tiles_w;
  const int tile_h = tile % tiles_h;
  const int64_t image = tile / tiles_h;
  if (channel >= args.out_c || image >= args.n) return;

  const int pixel = args.out_c;  // elements from one pixel to the next
  const int first_row = tile_h * Rows::kSteps + Rows::kFirst;
  const int first_column = tile_w * Columns::kSteps + Columns::kFirst;
  const T* input = static_cast<const T*>(args.input) + channel +
                   ((image * args.h + first_row) * args.w + first_column) * static_cast<int64_t>(pixel);
  Pixel grad[Rows::kSize][Columns::kSize];
#pragma unroll
  for (int r = 0; r < Rows::kSize; ++r) {
    const bool row_in_bounds = static_cast<unsigned>(first_row + r) < static_cast<unsigned>(args.h);
    const T* row = input + static_cast<int64_t>(r) * args.w * pixel;
#pragma unroll
    for (int k = 0; k < Columns::kSize; ++k)
      grad[r][k] = load_or_zero<kVector>(
          row + k * pixel, row_in_bounds && static_cast<unsigned>(first_column + k) < static_cast<unsigned>(args.w));
  }

  // [channel][tap] in memory: a thread's filters are contiguous.
  const T* filters = static_cast<const T*>(args.weight) + static_cast<int64_t>(channel) * kTaps;
  Pixel packed[kTaps];
#pragma unroll
  for (int k = 0; k < kTaps; ++k) packed[k] = load_or_zero<kVector>(filters + k * kVector, true);
  float weight[kTaps][kVector];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const int flipped = e * kTaps + kTaps - 1 - tap;
      weight[tap][e] = to_float(packed[flipped / kVector].value[flipped % kVector]);
    }

  const int column = tile_w * kColumns, row = tile_h * kRows;
  T* out = static_cast<T*>(args.out) + channel +
           ((image * args.out_h + row) * args.out_w + column) * static_cast<int64_t>(pixel);
#pragma unroll
  for (int o = 0; o < kRows; ++o) {
    if (row + o >= args.out_h) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      float sum[kVector] = {};
#pragma unroll
      for (int r = 0; r < Rows::kSize; ++r)
#pragma unroll
        for (int k = 0; k < Columns::kSize; ++k) {
          const int tap_h = Rows::tap(o, r), tap_w = Columns::tap(v, k);
          if (tap_h < 0 || tap_w < 0) continue;
#pragma unroll
          for (int e = 0; e < kVector; ++e)
            sum[e] = fmaf(to_float(grad[r][k].value[e]), weight[tap_h * Traits::kKernelW + tap_w][e], sum[e]);
        }
      if (column + v < args.out_w) store_streaming(out + (static_cast<int64_t>(o) * args.out_w + v) * pixel, sum);
    }
  }
}

template <class Traits, int kColumns, int kRows, int kVector>
int launch_grad_input_nhwc(const DirectArgs& args, cudaStream_t stream) {
  const int vectors = static_cast<int>(args.out_c) / kVector;
  const unsigned blocks_c = divide_up(vectors, kGradInputNhwcLanes);
  const int x = divide_up(vectors, static_cast<int>(blocks_c));
  const int y = kGradInputNhwcThreads / x;
  const unsigned tiles_w = divide_up(args.out_w, kColumns), tiles_h = divide_up(args.out_h, kRows);
  const int64_t blocks = divide_up<int64_t>(args.n * tiles_w * tiles_h, y) * blocks_c;
  grad_input_nhwc_kernel<Traits, kColumns, kRows, kVector>
      <<<static_cast<unsigned>(blocks), dim3(x, y), 0, stream>>>(args, tiles_w, tiles_h, blocks_c);
  return cudaGetLastError();
}

template <class Traits, int kVector>
int launch_grad_input_nhwc(const DirectArgs& args, cudaStream_t stream) {
  if constexpr (grad_input_registers(4, 4, kVector, Traits::kKernelH, Traits::kKernelW, Traits::kStrideH,
                                     Traits::kStrideW, Traits::kDilationH,
                                     Traits::kDilationW) <= kMaxGradInputRegisters)
    return launch_grad_input_nhwc<Traits, 4, 4, kVector>(args, stream);
  return cudaErrorInvalidValue;
}

// The tiles of variants.h's table, in its order.
template <class Traits>
int launch_grad_input_nhwc(const DirectArgs& args, int tile, cudaStream_t stream) {
  switch (tile) {
    case 0: return launch_grad_input_nhwc<Traits, 4>(args, stream);
    case 1: return launch_grad_input_nhwc<Traits, 2>(args, stream);
    case 2: return launch_grad_input_nhwc<Traits, 1>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace depthwise
