// Direct depthwise convolution, channels_last: forward, and grad of input at stride 1 (filter flipped).
//
// Serves  compile-time kernels of up to nine taps, of one channel a thread up to 25, any stride and dilation whose windows
//         fit registers, any padding; fp32, fp16, bf16; channels a multiple of kVector.
// Owns    each thread computes kColumns x kRows neighbouring pixels of kVector channels in fp32 registers. Threads of a
//         block lie along channels first, so a warp reads and writes whole lines.
// Reads   every row of the window before the first is used: bytes in flight are what this kernel lives on. Filters are
//         [channel][tap] in memory, so a thread's are contiguous and go straight to registers.
// Chosen  select.h.
#pragma once

#include "direct.cuh"

namespace depthwise {

constexpr int kDirectNhwcThreads = 128;
constexpr int kDirectNhwcLanes = 32;  // threads along channels, at most

// Blocks of a multiprocessor that registers must leave room for; 0: as the compiler has it, which is fewer registers for
// q2r2 (3x3, dilation 12, 8x256x64x64, fp32, H100: 122 for 206, forward 38.9 us for 40.7), but spills q4r4's on sm_120.
constexpr int direct_nhwc_blocks(int columns, int vector) { return columns == 2 && vector == 4 ? 0 : 2; }

template <class Traits, int kColumns, int kRows, int kVector>
__global__ void __launch_bounds__(kDirectNhwcThreads, direct_nhwc_blocks(kColumns, kVector))
    direct_nhwc_kernel(const DirectArgs args, const unsigned tiles_w, const unsigned tiles_h, const unsigned blocks_c) {
  using T = typename Traits::T;
  using Pixel = Vector<T, kVector>;
  constexpr int kKernelW = Traits::kKernelW;
  constexpr int kTaps = Traits::kKernelH * kKernelW;
  constexpr int kWindow = window_size(kColumns, Traits::kStrideW, kKernelW, Traits::kDilationW);
  constexpr uint64_t kUsedColumns = window_mask(kColumns, Traits::kStrideW, kKernelW, Traits::kDilationW);
  constexpr int kLastTap = (Traits::kKernelH - 1) * Traits::kDilationH;
  constexpr int kRowsIn = window_size(kRows, Traits::kStrideH, Traits::kKernelH, Traits::kDilationH);
  constexpr uint64_t kUsedRows = window_mask(kRows, Traits::kStrideH, Traits::kKernelH, Traits::kDilationH);

  const int channel = (blockIdx.x % blocks_c * blockDim.x + threadIdx.x) * kVector;
  unsigned tile = blockIdx.x / blocks_c * blockDim.y + threadIdx.y;
  const int column = tile % tiles_w * kColumns;
  tile /= tiles_w;
  const int row = tile % tiles_h * kRows;
  const int64_t image = tile / tiles_h;
  if (channel >= args.out_c || image >= args.n) return;

  const int pixel = args.out_c;  // elements from one pixel to the next
  const int first_row = row * Traits::kStrideH - args.padding_h;
  const int first_column = column * Traits::kStrideW - args.padding_w;
  const T* input = static_cast<const T*>(args.input) + channel +
                   ((image * args.h + first_row) * args.w + first_column) * static_cast<int64_t>(pixel);
  const auto load_row = [&](Pixel(&window)[kWindow], int r) {
    const bool row_in_bounds = static_cast<unsigned>(first_row + r) < static_cast<unsigned>(args.h);
    const T* row_input = input + static_cast<int64_t>(r) * args.w * pixel;
#pragma unroll
    for (int k = 0; k < kWindow; ++k)
      if (kUsedColumns >> k & 1)
        window[k] =
            load_or_zero<kVector>(row_input + k * pixel, row_in_bounds && static_cast<unsigned>(first_column + k) <
                                                                              static_cast<unsigned>(args.w));
  };
  Pixel window[kRowsIn][kWindow];
#pragma unroll
  for (int r = 0; r < kRowsIn; ++r)
    if (kUsedRows >> r & 1) load_row(window[r], r);

  float weight[kTaps][kVector];
  load_filters<Traits>(weight, filters_of<Traits>(args, channel, kTaps), args.flip, args.flip);

  const Pixel bias = load_biases<Traits, kVector>(args, channel);
  float sum[kRows][kColumns][kVector];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
#pragma unroll
    for (int q = 0; q < kColumns; ++q)
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[o][q][e] = args.bias ? to_float(bias.value[e]) : 0.f;

  T* out = static_cast<T*>(args.out) + channel +
           ((image * args.out_h + row) * args.out_w + column) * static_cast<int64_t>(pixel);
#pragma unroll
  for (int r = 0; r < kRowsIn; ++r) {
    if (!(kUsedRows >> r & 1)) continue;
    float in[kWindow][kVector];
#pragma unroll
    for (int k = 0; k < kWindow; ++k)
      if (kUsedColumns >> k & 1)
#pragma unroll
        for (int e = 0; e < kVector; ++e) in[k][e] = to_float(window[r][k].value[e]);
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
      const int tap_h = r - o * Traits::kStrideH;
      if (tap_h < 0 || tap_h % Traits::kDilationH != 0 || tap_h > kLastTap) continue;
#pragma unroll
      for (int j = 0; j < kKernelW; ++j) {
        const int tap = tap_h / Traits::kDilationH * kKernelW + j;
#pragma unroll
        for (int q = 0; q < kColumns; ++q)
#pragma unroll
          for (int e = 0; e < kVector; ++e)
            sum[o][q][e] = fmaf(in[q * Traits::kStrideW + j * Traits::kDilationW][e], weight[tap][e], sum[o][q][e]);
      }
      // Output row o is complete: store it now, so that only kKernelH rows of sums are ever live.
      if (tap_h == kLastTap && row + o < args.out_h) {
#pragma unroll
        for (int q = 0; q < kColumns; ++q)
          if (column + q < args.out_w)
            store_streaming(out + (static_cast<int64_t>(o) * args.out_w + q) * pixel, sum[o][q]);
      }
    }
  }
}

template <class Traits, int kColumns, int kRows, int kVector>
int launch_direct_nhwc(const DirectArgs& args, int, cudaStream_t stream) {
  const int vectors = static_cast<int>(args.out_c) / kVector;
  const unsigned blocks_c = divide_up(vectors, kDirectNhwcLanes);
  const int x = divide_up(vectors, static_cast<int>(blocks_c));
  const int y = kDirectNhwcThreads / x;
  const unsigned tiles_w = divide_up(args.out_w, kColumns), tiles_h = divide_up(args.out_h, kRows);
  const int64_t blocks = divide_up<int64_t>(args.n * tiles_w * tiles_h, y) * blocks_c;
  direct_nhwc_kernel<Traits, kColumns, kRows, kVector>
      <<<static_cast<unsigned>(blocks), dim3(x, y), 0, stream>>>(args, tiles_w, tiles_h, blocks_c);
  return cudaGetLastError();
}

}  // namespace depthwise
