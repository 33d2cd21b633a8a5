// Direct depthwise convolution, NCHW: forward, and grad of input at stride 1 (filter flipped).
//
// Serves  any compile-time kernel, stride, dilation, padding and row width modulo a word; fp32, fp16, bf16; depth
//         multiplier (forward).
// Owns    each thread computes kColumns x kRows neighbouring outputs of one plane in fp32 registers.
// Reads   each input row of the thread's window once, in aligned words of kVector elements, some rows before their use;
//         the overlap between neighbouring threads is served by L1. No shared memory, no synchronisation.
// Aligns  rows of any width: rows whose width is no multiple of a word begin at different places within a word. Where
//         they do repeats every few rows, is known when compiling, and is the same for all threads, because threads
//         begin at rows whose number, counted through all planes, is a multiple of that period (`skew_rows`). So loads
//         of row r have their own phase, and output row o is moved left to a word's boundary (`skew`).
// Chosen  for kernels whose weights fit registers (select.h).
#pragma once

#include "nchw_tile.cuh"

namespace depthwise {

constexpr int kDirectNchwThreads = 128;  // a block

// kPhase_: of the first row of a tile; kWidth, kOutWidth: of rows, modulo a word and modulo a thread's columns.
template <class T, int kKernelH, int kKernelW, int kStrideH, int kStrideW, int kDilationH, int kDilationW, int kPhase,
          int kWidth_, int kOutWidth_>
struct DirectNchwTraits : NchwTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW, kPhase> {
  static constexpr int kWidth = kWidth_, kOutWidth = kOutWidth_;
};

// Stores elements [kBegin, kEnd) of a vector whose first element would lie at `out`, a vector's boundary, in as few
// stores as there can be.
template <int kBegin, int kEnd, class T, int kColumns>
__device__ __forceinline__ void store_part(T* out, const float (&values)[kColumns]) {
  if constexpr (kBegin < kEnd) {
    constexpr int kWidth = widest_store(kBegin, kEnd, kColumns);
    Vector<T, kWidth> part;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) part.value[k] = from_float<T>(values[kBegin + k]);
    store_streaming(out + kBegin, part);
    store_part<kBegin + kWidth, kEnd>(out, values);
  }
}

template <class Traits, int kColumns, int kRows, int kVector>
struct DirectTile {
  using T = typename Traits::T;
  static constexpr int kRowsIn = window_size(kRows, Traits::kStrideH, Traits::kKernelH, Traits::kDilationH);
  static constexpr uint64_t kUsedRows = window_mask(kRows, Traits::kStrideH, Traits::kKernelH, Traits::kDilationH);
  static constexpr int kLastTap = (Traits::kKernelH - 1) * Traits::kDilationH;
  static_assert(kRowsIn <= 64 && kColumns * Traits::kStrideW % kVector == 0);

  // Columns by which output row o begins left of the thread's.
  static constexpr int skew(int o) { return o * Traits::kOutWidth % kColumns; }
  static constexpr int kMaxSkew = max_skew(kRows, kColumns, Traits::kOutWidth);
  static constexpr int kWindow =
      window_size(kColumns + kMaxSkew, Traits::kStrideW, Traits::kKernelW, Traits::kDilationW);
  static constexpr uint64_t kUsed =
      window_mask(kColumns + kMaxSkew, Traits::kStrideW, Traits::kKernelW, Traits::kDilationW);
  // Where input row r of the tile begins within a word.
  static constexpr int phase(int r) {
    return modulo(Traits::kPhase + kMaxSkew * Traits::kStrideW - r * Traits::kWidth, kVector);
  }
  static constexpr bool kStraddles = Traits::kWidth != 0;
  template <int r>
  using Row = WindowRow<T, kWindow, kUsed, kVector, phase(r), kStraddles>;

  // Stores a row's outputs from column `first` on, which lie at `out`: of a row that begins kSkew elements within a
  // vector, the first and the last thread have a part.
  template <int kSkew>
  __device__ __forceinline__ static void store(T* out, int first, int width, const float (&values)[kColumns]) {
    if constexpr (kVector == 1) {  // rows begin anywhere
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (first + v < width) store_streaming(out + v, Vector<T, 1>{{from_float<T>(values[v])}});
    } else {
      constexpr int kTail = (Traits::kOutWidth + kSkew) % kColumns;
      const bool head = kSkew > 0 && first < 0, whole = first + kColumns <= width;
      if (!head && whole) return store_part<0, kColumns>(out, values);
      if (head && whole) return store_part<kSkew, kColumns>(out, values);
      if (!head && first < width) return store_part<0, kTail>(out, values);
      if (head) store_part<kSkew, kTail>(out, values);
    }
  }

  // Rows in flight before they are used, in registers that the filter leaves. More of them cost warps: 3x3 in fp32 is
  // fastest with three rows, a filter of twice the work or 16-bit rows with more (16x64x512x512, H200, fp32: 0.521 ms,
  // 0.527 with four, 0.551 with six; 16-bit grad of input: 0.284 with seven, 0.302 with six, 0.340 with four).
  static constexpr int kAheadRegisters = kRows >= 16                            ? 88 - Traits::kTaps
                                         : sizeof(T) == 4 && Traits::kTaps <= 9 ? 28
                                                                                : min_int(42, 64 - Traits::kTaps);
  static constexpr int kRowRegisters = (kWindow * static_cast<int>(sizeof(T)) + 3) / 4;
  static constexpr int kRowsAhead = min_int(kRowsIn, max_int(2, kAheadRegisters / kRowRegisters));
};

// How threads are counted: all columns of a tile row, all tile rows of a plane, all planes.
struct DirectNchwPlan {
  SkewRows skew_rows;
  unsigned threads;
  IntDivider columns, rows, out_channels;
};

// Blocks of a multiprocessor that the registers of strided windows leave room for, without spills.
template <class Traits>
constexpr int strided_blocks() {
  if (Traits::kTaps > 25 || Traits::kDilationW > 1) return 1;
#if __CUDA_ARCH__ == 900
  return Traits::kKernelW <= 5 ? 4 : 3;
#else
  return Traits::kTaps <= 9 ? 4 : sizeof(typename Traits::T) == 2 ? 3 : 1;
#endif
}

// Rows of more than 7 taps, and strided windows, spill in as few registers as the compiler would take by itself.
template <class Traits>
constexpr int kDirectNchwBlocks = Traits::kKernelW > 7 || Traits::kStrideW > 2 ? 1
                                  : Traits::kStrideW == 1                      ? 0
                                                                               : strided_blocks<Traits>();

template <class Traits, int kColumns, int kRows, int kVector>
__global__ void __launch_bounds__(kDirectNchwThreads, kDirectNchwBlocks<Traits>)
    direct_nchw_kernel(const DirectArgs args, const DirectNchwPlan plan) {
  using T = typename Traits::T;
  using Tile = DirectTile<Traits, kColumns, kRows, kVector>;

  // Which outputs.
  const unsigned thread = blockIdx.x * kDirectNchwThreads + threadIdx.x;
  if (thread >= plan.threads) return;
  const unsigned tile = plan.columns.quotient(thread), plane = plan.rows.quotient(tile);
  const int column = (thread - tile * plan.columns.divisor) * kColumns;
  const int row = (tile - plane * plan.rows.divisor) * kRows - plan.skew_rows.before(plane);
  if (row >= args.out_h) return;

  const unsigned out_channel = plane - plan.out_channels.quotient(plane) * plan.out_channels.divisor;
  const unsigned in_plane = args.multiplier == 1 ? plane : plane / args.multiplier;
  const T* const input =
      ptx::opaque(static_cast<const T*>(args.input) + static_cast<int64_t>(in_plane) * args.h * args.w);
  T* const out = ptx::opaque(static_cast<T*>(args.out) + static_cast<int64_t>(plane) * args.out_h * args.out_w);

  // The window: its first row, its first column, and which of its columns exist where words straddle.
  const int first_row = row * Traits::kStrideH - args.padding_h;
  const int first_column = (column - Tile::kMaxSkew) * Traits::kStrideW - args.padding_w;
  unsigned exists[Tile::kWindow];
#pragma unroll
  for (int k = 0; k < Tile::kWindow; ++k)
    exists[k] = static_cast<unsigned>(first_column + k) < static_cast<unsigned>(args.w) ? ~0u : 0u;

  T ahead[Tile::kRowsAhead][Tile::kWindow];
  int offset = first_row * args.w + first_column;
  const auto load_row = [&](auto index) {
    constexpr int r = decltype(index)::value;
    using Row = typename Tile::template Row<r>;
    if constexpr (r < Tile::kRowsIn && (Tile::kUsedRows >> r & 1))
      Row::template load<GlobalMemory>(ahead[r % Tile::kRowsAhead], input + (offset + Tile::phase(r)),
                                       first_column + Tile::phase(r), args.w,
                                       static_cast<unsigned>(first_row + r) < static_cast<unsigned>(args.h));
    offset += args.w;
  };
  for_each_index<Tile::kRowsAhead>(load_row);

  float weight[Traits::kTaps];
  load_filter<Traits>(weight, args, out_channel);
  const float bias = bias_of<Traits>(args, out_channel);
  float sum[kRows][kColumns];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
#pragma unroll
    for (int v = 0; v < kColumns; ++v) sum[o][v] = bias;

  int out_offset = row * args.out_w + column;
  // Each row is added to all output rows that it meets, so that only kKernelH rows of sums are ever live.
  for_each_index<Tile::kRowsIn>([&](auto index) {
    constexpr int r = decltype(index)::value;
    if constexpr (Tile::kUsedRows >> r & 1) {
      float window[Tile::kWindow];
#pragma unroll
      for (int k = 0; k < Tile::kWindow; ++k)
        if (Tile::kUsed >> k & 1) {
          window[k] = to_float(ahead[r % Tile::kRowsAhead][k]);
          if (Tile::kStraddles) window[k] = __uint_as_float(__float_as_uint(window[k]) & exists[k]);
        }
      load_row(std::integral_constant<int, r + Tile::kRowsAhead>{});
      for_each_index<kRows>([&](auto out_index) {
        constexpr int o = decltype(out_index)::value, kTapH = r - o * Traits::kStrideH;
        if constexpr (kTapH >= 0 && kTapH % Traits::kDilationH == 0 && kTapH <= Tile::kLastTap) {
          constexpr int kSkew = Tile::skew(o), kShift = Tile::kMaxSkew - kSkew;
#pragma unroll
          for (int j = 0; j < Traits::kKernelW; ++j)
#pragma unroll
            for (int v = 0; v < kColumns; ++v)
              sum[o][v] = fmaf(window[(v + kShift) * Traits::kStrideW + j * Traits::kDilationW],
                               weight[kTapH / Traits::kDilationH * Traits::kKernelW + j], sum[o][v]);
          if constexpr (kTapH == Tile::kLastTap) {
            if (static_cast<unsigned>(row + o) < static_cast<unsigned>(args.out_h))
              Tile::template store<kSkew>(out + (out_offset - kSkew), column - kSkew, args.out_w, sum[o]);
            out_offset += args.out_w;
          }
        }
      });
    } else {
      load_row(std::integral_constant<int, r + Tile::kRowsAhead>{});
    }
  });
}

template <class Traits, int kColumns, int kRows, int kVector>
int launch_direct_nchw(const DirectArgs& args, int, cudaStream_t stream) {
  using Tile = DirectTile<Traits, kColumns, kRows, kVector>;
  const SkewRows skew_rows = skew_rows_of(args, Traits::kStrideH, kColumns, kVector);
  const int columns = divide_up(args.out_w + Tile::kMaxSkew, kColumns);
  const int rows = divide_up(args.out_h + skew_rows.period - 1, kRows);
  const unsigned threads = static_cast<unsigned>(args.n * args.out_c * rows * columns);
  const DirectNchwPlan plan{skew_rows, threads, IntDivider(columns), IntDivider(rows),
                            IntDivider(static_cast<unsigned>(args.out_c))};
  direct_nchw_kernel<Traits, kColumns, kRows, kVector>
      <<<divide_up(threads, static_cast<unsigned>(kDirectNchwThreads)), kDirectNchwThreads, 0, stream>>>(args, plan);
  return cudaGetLastError();
}

}  // namespace depthwise
