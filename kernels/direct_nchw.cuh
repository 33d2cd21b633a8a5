// Direct depthwise convolution, NCHW: forward, and grad of input at stride 1 (filter flipped).
//
// Serves  any compile-time kernel, stride, dilation and horizontal padding; fp32, fp16, bf16; depth multiplier (forward).
// Owns    each thread computes kColumns x kRows neighbouring outputs of one plane in fp32 registers.
// Reads   each input row of the thread's window once, in aligned words of kVector elements where rows allow it; the
//         overlap between neighbouring threads is served by L1. No shared memory, no synchronisation.
// Chosen  for kernels whose weights fit registers (select.h).
#pragma once

#include "nchw_tile.cuh"

namespace depthwise {

constexpr int kDirectNchwThreads = 256;  // a block, at most

// `store_width`: elements a store, or kRealign where rows start off a vector boundary and warps lie within one row.
constexpr int kRealign = 0;

// Stores a row that starts `shift` elements before a vector boundary: each lane hands its first `shift` outputs to the
// lane before it, and stores a whole vector from its output `shift` on. Only the ends of a warp's row are narrow
// stores. Whole vectors matter: with 510 columns stored two at a time, 7% of the bandwidth is lost (16x64x512x512, 3x3,
// fp32, H100: 0.77 ms against 0.72).
template <class T, int kColumns>
__device__ __forceinline__ void store_row_realigned(int shift, T* row, int column, int width,
                                                    const float (&values)[kColumns], bool row_in_bounds) {
  constexpr int kWords = kColumns * sizeof(T) / 4;
  union {
    unsigned word[kWords];
    Vector<T, kColumns> vector;
  } own, shifted;
#pragma unroll
  for (int v = 0; v < kColumns; ++v) own.vector.value[v] = from_float<T>(values[v]);

  unsigned words[2 * kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    words[k] = own.word[k];
    words[kWords + k] = __shfl_down_sync(~0u, own.word[k], 1);
  }
  const int bytes = shift * static_cast<int>(sizeof(T));
#pragma unroll
  for (int k = 0; k + 2 < 2 * kWords; ++k) words[k] = bytes & 8 ? words[k + 2] : words[k];
#pragma unroll
  for (int k = 0; k + 1 < 2 * kWords; ++k) words[k] = bytes & 4 ? words[k + 1] : words[k];
#pragma unroll
  for (int k = 0; k < kWords; ++k)
    shifted.word[k] = sizeof(T) == 2 && bytes & 2 ? __funnelshift_r(words[k], words[k + 1], 16) : words[k];

  if (!row_in_bounds) return;
  const int lane = threadIdx.x % 32;
  const bool whole = lane < 31 && column + shift + kColumns <= width;
  const bool head_given_away = lane > 0 && column + shift <= width;
  if (whole) store_streaming(row + column + shift, shifted.vector);
  if (whole && head_given_away) return;
#pragma unroll
  for (int v = 0; v < kColumns; ++v) {
    const bool pending = v < shift ? !head_given_away : !whole;
    if (pending && column + v < width) row[column + v] = own.vector.value[v];
  }
}

// Rows of more than 7 taps spill in as few registers as the compiler would take by itself.
template <class Traits, int kColumns, int kRows, int kVector>
__global__ void __launch_bounds__(kDirectNchwThreads, Traits::kKernelW > 7 ? 1 : 0)
    direct_nchw_kernel(const DirectArgs args, const unsigned tiles_w, const unsigned tiles_h, const int store_width) {
  using T = typename Traits::T;
  using Row = NchwRow<Traits, kColumns, kVector>;
  constexpr int kRowsIn = window_size(kRows, Traits::kStrideH, Traits::kKernelH, Traits::kDilationH);
  // Rows in flight before the first is used, as many as about 64 registers less the filter's hold.
  constexpr int kRowRegisters = (Row::kWindow * sizeof(T) + 3) / 4;
  constexpr int kRowsAhead = min_int(kRowsIn, max_int(2, (64 - Traits::kTaps) / kRowRegisters));

  // Which outputs: a block covers blockDim.z planes, blockDim.y x kRows rows, blockDim.x x kColumns columns.
  const unsigned tile_w = blockIdx.x % tiles_w;
  const unsigned tile_h = blockIdx.x / tiles_w % tiles_h;
  const unsigned plane_idx = blockIdx.x / tiles_w / tiles_h * blockDim.z + threadIdx.z;
  const bool plane_in_bounds = plane_idx < static_cast<unsigned>(args.n * args.out_c);
  const unsigned plane = plane_in_bounds ? plane_idx : 0;
  const int column = (tile_w * blockDim.x + threadIdx.x) * kColumns;
  const int row = (tile_h * blockDim.y + threadIdx.y) * kRows;
  const int num_rows = plane_in_bounds ? args.out_h - row : 0;  // of this thread's rows, how many exist

  const unsigned out_channel = plane % static_cast<unsigned>(args.out_c);
  const T* input = static_cast<const T*>(args.input) + static_cast<int64_t>(plane / args.multiplier) * args.h * args.w;
  T* out = static_cast<T*>(args.out) + static_cast<int64_t>(plane) * args.out_h * args.out_w;

  const int first_row = row * Traits::kStrideH - args.padding_h;
  const auto load_row = [&](T(&window)[Row::kWindow], int r) {
    const int in_row = first_row + r;
    Row::template load<GlobalMemory>(window, input + static_cast<int64_t>(in_row) * args.w,
                                     window_column<Traits>(args, column), args.w,
                                     num_rows > 0 && static_cast<unsigned>(in_row) < static_cast<unsigned>(args.h));
  };
  float weight[Traits::kTaps];
  load_filter<Traits>(weight, args, out_channel);
  const float bias = args.bias ? load(static_cast<const T*>(args.bias) + out_channel) : 0.f;

  convolve_tile<Traits, kColumns, kRows, kVector, kRowsAhead>(
      weight, bias, load_row, [&](int o, float (&sum)[kColumns]) {
        constexpr int kWidest = min_int(kColumns, 16 / sizeof(T));
        T* out_row = out + static_cast<int64_t>(row + o) * args.out_w;
        if (store_width == kRealign) {
          const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(out_row) / sizeof(T) % kColumns);
          store_row_realigned(misaligned ? kColumns - misaligned : 0, out_row, column, args.out_w, sum, o < num_rows);
        } else if (o < num_rows) {
          if (store_width == kWidest)
            store_row<kWidest, true>(out_row, column, args.out_w, sum);
          else if (store_width == 2)
            store_row<2, true>(out_row, column, args.out_w, sum);
          else
            store_row<1, true>(out_row, column, args.out_w, sum);
        }
      });
}

// How wide a store may be: rows of `width` elements from `out` on.
template <class T>
int store_width_for(const void* out, int width, int columns, bool whole_warps) {
  int elements = columns;
  while (width % elements != 0 || reinterpret_cast<uintptr_t>(out) / sizeof(T) % elements != 0) elements /= 2;
  if (elements == columns) return min_int(columns, 16 / static_cast<int>(sizeof(T)));
  if (whole_warps) return kRealign;
  return elements >= 2 ? 2 : 1;
}

template <class Traits, int kColumns, int kRows, int kVector>
int launch_direct_nchw(const DirectArgs& args, cudaStream_t stream) {
  const int columns = divide_up(args.out_w, kColumns), rows = divide_up(args.out_h, kRows);
  const bool misaligned = store_width_for<typename Traits::T>(args.out, args.out_w, kColumns, true) == kRealign;
  int x = divide_up(columns, divide_up(columns, 128));
  if (misaligned && x >= 24) x = divide_up(x, 32) * 32;  // warps within one row, so that stores can be realigned
  int y = max_int(1, min_int(rows, kDirectNchwThreads / x));
  y = divide_up(rows, divide_up(rows, y));
  const int z = max_int(1, min_int(64, kDirectNchwThreads / (x * y)));

  const unsigned tiles_w = divide_up(columns, x), tiles_h = divide_up(rows, y);
  const int64_t blocks = divide_up<int64_t>(args.n * args.out_c, z) * tiles_w * tiles_h;
  direct_nchw_kernel<Traits, kColumns, kRows, kVector><<<static_cast<unsigned>(blocks), dim3(x, y, z), 0, stream>>>(
      args, tiles_w, tiles_h, store_width_for<typename Traits::T>(args.out, args.out_w, kColumns, x % 32 == 0));
  return cudaGetLastError();
}

// The tiles of variants.h's table, in its order.
template <class Traits>
int launch_direct_nchw(const DirectArgs& args, int tile, cudaStream_t stream) {
  if constexpr (sizeof(typename Traits::T) == 4) {
    switch (tile) {
      case 0: return launch_direct_nchw<Traits, 4, 4, 4>(args, stream);
      case 1: return launch_direct_nchw<Traits, 4, 4, 1>(args, stream);
    }
  } else {
    switch (tile) {
      case 0: return launch_direct_nchw<Traits, 8, 4, 8>(args, stream);
      case 1: return launch_direct_nchw<Traits, 4, 4, 4>(args, stream);
      case 2: return launch_direct_nchw<Traits, 4, 4, 1>(args, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace depthwise
