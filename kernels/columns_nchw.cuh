// Depthwise convolution of small planes, NCHW, by multiply-adds, a warp several planes: forward, and grad of input at
// stride 1 (filter flipped).
//
// Serves  kernels of odd size up to 5x5, stride 1, dilation 1, the padding that keeps the images' size, planes of up to
//         32 rows; the sizes of kernel and planes are compile time; fp32, fp16, bf16; aligned tensors; no depth
//         multiplier.
// Owns    a lane has two neighbouring columns of a plane (of odd widths one) and walks down all of its rows, whose
//         values are registers (of planes of more than 16 rows some at a time); those beside them are its neighbours', by
//         shuffles. 28 lanes of 32 at widths of 7 and 14.
// Memory  a warp's planes, which are one run in memory: copied in, all at once, and replaced by the outputs on their
//         way out, as each lane reads what it overwrites.
// Waits   warps do not wait for each other, and blocks are small, so that some store while others load.
// Chosen  select.h.
#pragma once

#include "async_copy.cuh"
#include "columns.cuh"
#include "nchw_tile.cuh"

namespace depthwise {

template <class Traits>
struct ColumnsRun {
  using T = typename Traits::T;
  // Of a block. Few, but not of planes so small that beginning the blocks takes longer than what they do (3x3, fp32,
  // H100, us: 32x960x7x7: four 9.1, two 9.5, one 10.7; 5x5, 32x672x14x14: 20.2, 20.0, 20.5).
  static constexpr int kWarps = Traits::kPixels <= 64 ? 4 : 2;
  static constexpr int kPlanes = columns_run_planes(Traits::kHeight, Traits::kWidth, sizeof(T));
  static constexpr int kElements = kPlanes * Traits::kPixels, kBytes = kElements * static_cast<int>(sizeof(T));
  static constexpr int kCopy = kBytes % 16 == 0 ? 16 : kBytes % 8 == 0 ? 8 : 4;  // bytes
  static constexpr int kRoom = divide_up(kBytes, 16) * 16;
  static_assert(kPlanes > 0 && kBytes % kCopy == 0);

  // Calls body(offset) for the lane's copies of a whole run; in elements.
  template <class Body>
  __device__ __forceinline__ static void for_each_copy(int lane, Body body) {
    constexpr int kStep = kCopy / static_cast<int>(sizeof(T));
#pragma unroll
    for (int k = 0; k < divide_up(kBytes, 32 * kCopy); ++k)
      if ((k + 1) * 32 * kCopy <= kBytes || (k * 32 + lane) * kCopy < kBytes) body((k * 32 + lane) * kStep);
  }
};

template <class Traits>
__global__ void __launch_bounds__(32 * ColumnsRun<Traits>::kWarps)
    columns_nchw_kernel(const __grid_constant__ DirectArgs args, const IntDivider channels) {
  using T = typename Traits::T;
  using Run = ColumnsRun<Traits>;
  using Word = ColumnsWord<T, Traits::kColumns>;
  constexpr int kHeight = Traits::kHeight, kWidth = Traits::kWidth, kColumns = Traits::kColumns;
  constexpr int kKernelH = Traits::kKernelH, kKernelW = Traits::kKernelW, kPaddingH = Traits::kPaddingH;
  constexpr int kRows = columns_rows(kHeight, kKernelH);
  static_assert(kRows == kHeight || kRows % kKernelH == 0);

  __shared__ uint4 shared_memory[Run::kWarps * Run::kRoom / 16];
  const ColumnsLane<Traits> lane;
  const int warp = threadIdx.x / 32, all_planes = static_cast<int>(args.n) * static_cast<int>(args.out_c);
  const int first_plane = (blockIdx.x * Run::kWarps + warp) * Run::kPlanes;
  const int planes = min(Run::kPlanes, all_planes - first_plane);  // may be none: shuffles want all lanes nevertheless
  T* const room = reinterpret_cast<T*>(shared_memory + warp * (Run::kRoom / 16));

  // Load.
  const T* const input = static_cast<const T*>(args.input) + static_cast<int64_t>(first_plane) * Traits::kPixels;
  if (planes == Run::kPlanes) {
    Run::for_each_copy(lane.lane, [&](int offset) { copy_async<Run::kCopy>(room + offset, input + offset); });
    commit_copies();
  } else {
#pragma unroll 1
    for (int k = lane.lane; k < planes * Traits::kPixels; k += 32) room[k] = input[k];
  }
  const int plane = max(0, min(lane.plane, planes - 1));  // a lane without one takes another's
  const unsigned flat = min(first_plane + plane, all_planes - 1),
                 channel = flat - channels.quotient(flat) * channels.divisor;
  float weight[Traits::kTaps];
  load_filter<Traits>(weight, args, channel);
  const float bias = bias_of<Traits>(args, channel);
  T* const mine = room + plane * Traits::kPixels + lane.column;
  const bool exists = lane.plane < planes;
  Word word[kRows];
  const auto read = [&](Word& to, int row) {
    if (exists) to.word = *reinterpret_cast<const typename Word::Word*>(mine + row * kWidth);
  };
  wait_for_copies<0>();
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRows; ++r) read(word[r], r);

  // Compute. Lanes without a plane read nothing, as others replace what is there.
  float sum[kKernelH][kColumns];  // of output row o: o % kKernelH
  const auto complete = [&](int o, int slot) {
    if (!exists) return;
    Word result;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) result.vector.value[v] = from_float<T>(sum[slot][v]);
    *reinterpret_cast<typename Word::Word*>(mine + o * kWidth) = result.word;
  };
#pragma unroll
  for (int slot = 0; slot < kKernelH; ++slot)
#pragma unroll
    for (int v = 0; v < kColumns; ++v) sum[slot][v] = bias;
#pragma unroll 1
  for (int base = 0; base < kHeight; base += kRows)
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int r = base + k;
      if (kHeight % kRows != 0 && r >= kHeight) break;
      float window[Traits::kWindow];
      lane.window(window, word[k]);
      if (kRows < kHeight && r + kRows < kHeight) read(word[k], r + kRows);
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        const int o = k - i + kPaddingH;  // from `base` on
        if (kRows == kHeight && (o < 0 || o >= kHeight)) continue;
        float (&row_sum)[kColumns] = sum[(o + kKernelH) % kKernelH];
#pragma unroll
        for (int j = 0; j < kKernelW; ++j)
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
            row_sum[v] = fmaf(window[v + j], weight[i * kKernelW + j], i == 0 && j == 0 ? bias : row_sum[v]);
      }
      if (r >= kPaddingH) complete(r - kPaddingH, (k - kPaddingH + kKernelH) % kKernelH);
    }
#pragma unroll
  for (int o = max_int(0, kHeight - kPaddingH); o < kHeight; ++o) complete(o, o % kKernelH);

  // Store.
  __syncwarp();
  T* const out = static_cast<T*>(args.out) + static_cast<int64_t>(first_plane) * Traits::kPixels;
  if (planes == Run::kPlanes) {
    Run::for_each_copy(lane.lane, [&](int offset) {
      using Copy = Vector<T, Run::kCopy / static_cast<int>(sizeof(T))>;
      store_streaming(out + offset, *reinterpret_cast<const Copy*>(room + offset));
    });
  } else {
#pragma unroll 1
    for (int k = lane.lane; k < planes * Traits::kPixels; k += 32) out[k] = room[k];
  }
}

template <class Traits>
int launch_columns_nchw(const DirectArgs& args, int, cudaStream_t stream) {
  using Run = ColumnsRun<Traits>;
  const int64_t blocks = divide_up<int64_t>(args.n * args.out_c, Run::kPlanes * Run::kWarps);
  columns_nchw_kernel<Traits><<<static_cast<unsigned>(blocks), 32 * Run::kWarps, 0, stream>>>(
      args, IntDivider(static_cast<unsigned>(args.out_c)));
  return cudaGetLastError();
}

}  // namespace depthwise
