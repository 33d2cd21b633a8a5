// Grad of input for strides above 1, NCHW: gathered from grad_output, no atomics.
//
// Serves  strides 1, 2 and 4 in any combination, any compile-time kernel, dilation and padding; fp32, fp16, bf16.
// Owns    each thread computes kColumns x kRows neighbouring elements of one plane of grad_input in fp32 registers. Both
//         are multiples of the stride, so which tap meets which element of grad_output is known when compiling.
// Reads   the thread's window of grad_output at once, in words of up to kVector elements; the overlap between
//         neighbouring threads is served by L1. No shared memory, no synchronisation.
// Chosen  for kernels whose weights fit registers (select.h).
#pragma once

#include "grad_window.cuh"
#include "nchw_tile.cuh"

namespace depthwise {

constexpr int kGradInputNchwThreads = 256;  // a block, at most

template <class T, int kKernelH, int kKernelW, int kStrideH, int kStrideW, int kDilationH, int kDilationW,
          int kPaddingW, int kPaddingH_>
struct GradInputNchwTraits : NchwTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW, kPaddingW> {
  static constexpr int kPaddingH = kPaddingH_;
};

template <class Traits, int kColumns, int kRows, int kVector>
__global__ void __launch_bounds__(kGradInputNchwThreads)
    grad_input_nchw_kernel(const DirectArgs args, const unsigned tiles_w, const unsigned tiles_h,
                           const int store_width) {
  using T = typename Traits::T;
  using Columns = GradWindow<kColumns, Traits::kKernelW, Traits::kStrideW, Traits::kDilationW, Traits::kPhase>;
  using Rows = GradWindow<kRows, Traits::kKernelH, Traits::kStrideH, Traits::kDilationH, Traits::kPaddingH>;
  // A row of the window is that of kSteps outputs at stride 1.
  using Row = WindowRow<T, Columns::kSize, (uint64_t{1} << Columns::kSize) - 1, min_int(kVector, Columns::kSteps),
                        -Columns::kFirst>;

  // Which outputs: a block covers blockDim.z planes, blockDim.y x kRows rows, blockDim.x x kColumns columns.
  const int tile_w = blockIdx.x % tiles_w * blockDim.x + threadIdx.x;
  const int tile_h = blockIdx.x / tiles_w % tiles_h * blockDim.y + threadIdx.y;
  const unsigned plane = blockIdx.x / tiles_w / tiles_h * blockDim.z + threadIdx.z;
  const int column = tile_w * kColumns, row = tile_h * kRows;
  if (plane >= static_cast<unsigned>(args.n * args.out_c) || row >= args.out_h || column >= args.out_w) return;

  const T* input = static_cast<const T*>(args.input) + static_cast<int64_t>(plane) * args.h * args.w;
  const int first_row = tile_h * Rows::kSteps + Rows::kFirst;
  T grad[Rows::kSize][Columns::kSize];
#pragma unroll
  for (int r = 0; r < Rows::kSize; ++r)
    Row::template load<GlobalMemory>(
        grad[r], input + static_cast<int64_t>(first_row + r) * args.w + tile_w * Columns::kSteps,
        tile_w * Columns::kSteps, args.w, static_cast<unsigned>(first_row + r) < static_cast<unsigned>(args.h));
  float weight[Traits::kTaps];
  load_filter<Traits>(weight, args, plane % static_cast<unsigned>(args.out_c));

  T* out = static_cast<T*>(args.out) + static_cast<int64_t>(plane) * args.out_h * args.out_w;
#pragma unroll
  for (int o = 0; o < kRows; ++o) {
    if (row + o >= args.out_h) return;
    float sum[kColumns] = {};
#pragma unroll
    for (int r = 0; r < Rows::kSize; ++r) {
      const int tap_h = Rows::tap(o, r);
      if (tap_h < 0) continue;
#pragma unroll
      for (int k = 0; k < Columns::kSize; ++k)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          const int tap_w = Columns::tap(v, k);
          if (tap_w >= 0) sum[v] = fmaf(to_float(grad[r][k]), weight[tap_h * Traits::kKernelW + tap_w], sum[v]);
        }
    }
    constexpr int kWidest = min_int(kColumns, 16 / sizeof(T));
    T* out_row = out + static_cast<int64_t>(row + o) * args.out_w;
    if (store_width == kWidest)
      store_row<kWidest, true>(out_row, column, args.out_w, sum);
    else if (store_width >= 2)
      store_row<2, true>(out_row, column, args.out_w, sum);
    else
      store_row<1, true>(out_row, column, args.out_w, sum);
  }
}

template <class Traits, int kColumns, int kRows, int kVector>
int launch_grad_input_nchw(const DirectArgs& args, cudaStream_t stream) {
  using T = typename Traits::T;
  const int columns = divide_up(args.out_w, kColumns), rows = divide_up(args.out_h, kRows);
  const int x = divide_up(columns, divide_up(columns, 128));
  int y = max_int(1, min_int(rows, kGradInputNchwThreads / x));
  y = divide_up(rows, divide_up(rows, y));
  const int z = max_int(1, min_int(64, kGradInputNchwThreads / (x * y)));

  constexpr int kBytes = sizeof(T);
  const int store_width = copy_width(args.out, args.out_w, min_int(kColumns, 16 / kBytes), kBytes);
  const unsigned tiles_w = divide_up(columns, x), tiles_h = divide_up(rows, y);
  const int64_t blocks = divide_up<int64_t>(args.n * args.out_c, z) * tiles_w * tiles_h;
  grad_input_nchw_kernel<Traits, kColumns, kRows, kVector>
      <<<static_cast<unsigned>(blocks), dim3(x, y, z), 0, stream>>>(args, tiles_w, tiles_h, store_width);
  return cudaGetLastError();
}

// The tiles of variants.h's table, in its order.
template <class Traits>
int launch_grad_input_nchw(const DirectArgs& args, int tile, cudaStream_t stream) {
  constexpr int kColumns = sizeof(typename Traits::T) == 4 ? 4 : 8;
  constexpr int kRegisters = grad_input_registers(kColumns, 4, 1, Traits::kKernelH, Traits::kKernelW, Traits::kStrideH,
                                                  Traits::kStrideW, Traits::kDilationH, Traits::kDilationW);
  switch (tile) {
    case 0:
      if constexpr (kRegisters <= kMaxGradInputRegisters)
        return launch_grad_input_nchw<Traits, kColumns, 4, kColumns / 2>(args, stream);
      break;
    case 1: return launch_grad_input_nchw<Traits, 4, 4, 1>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace depthwise
