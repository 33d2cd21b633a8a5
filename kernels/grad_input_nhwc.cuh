// Grad of input for strides above 1, channels_last: gathered from grad_output, no atomics.
//
// Serves  strides 1, 2 and 4 in any combination, any compile-time kernel, dilation and padding; fp32, fp16, bf16; channels
//         a multiple of kVector.
// Owns    each thread computes kColumns x kRows neighbouring pixels of kVector channels in fp32 registers, tile after tile
//         down a strip of rows. Both are multiples of the stride, so which tap meets which pixel of grad_output is known
//         when compiling. Threads of a block lie along channels first, so a warp reads and writes whole lines.
// Reads   the first tile's window of grad_output at once; then, while a tile is computed, the rows that the next one's
//         window has more. Filters come by shared memory: they are as many bytes as a tile's window, and a thread's own lie
//         far from its neighbour's.
// Chosen  for kernels whose weights fit registers (select.h).
#pragma once

#include "async_copy.cuh"
#include "grad_window.cuh"

namespace depthwise {

constexpr int kGradInputNhwcThreads = 128;
constexpr int kGradInputNhwcLanes = 32;  // threads along channels, at most

template <class T, int kKernelH, int kKernelW, int kStrideH, int kStrideW, int kDilationH, int kDilationW,
          int kPaddingW_, int kPaddingH_>
struct GradInputNhwcTraits : NhwcTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW> {
  static constexpr int kPaddingW = kPaddingW_, kPaddingH = kPaddingH_;
};

// Element e of a word as it was loaded.
template <class T, class Word>
__device__ __forceinline__ float element_of(const Word& word, int e) {
  union {
    Word word;
    T value[sizeof(Word) / sizeof(T)];
  } bits;
  bits.word = word;
  return to_float(bits.value[e]);
}

// How a thread's strip is cut. Many taps of 16 bits: as many rows as repay the filter, in tiles of few rows, that leave
// registers to more threads; else it is a tile of four rows. (5x5 at stride 2, 144x56x56, H100, us, by tiles of two rows;
// fp16: 2: 22.2, 4: 20.9, 7: 22.0, a tile of four rows: 24.0; fp32: 34.4, 33.6, 35.4, 31.7. 3x3, 96x112x112, fp16, by rows
// of a strip: 4: 39.6, 8: 41.5, 16: 43.2; fp32: 4: 72, 8: 76.)
template <class Traits, int kColumns_, int kVector_>
struct GradInputNhwcShape {
  using T = typename Traits::T;
  static constexpr int kColumns = kColumns_, kVector = kVector_, kTaps = Traits::kKernelH * Traits::kKernelW;
  static constexpr bool kOneTile = kTaps <= 9 || sizeof(T) > 2;
  static constexpr int kRows = kOneTile ? 4 : max_int(2, Traits::kStrideH);
  static constexpr int kTiles = kOneTile ? 1 : 8 / kRows;
  using Columns = GradWindow<kColumns, Traits::kKernelW, Traits::kStrideW, Traits::kDilationW, Traits::kPaddingW>;
  using Rows = GradWindow<kRows, Traits::kKernelH, Traits::kStrideH, Traits::kDilationH, Traits::kPaddingH>;
  // Rows of a window as they came, the next one's as well, the filter, and the rest.
  static constexpr int kWordRegisters = divide_up(kVector * int{sizeof(T)}, 4);
  static constexpr int kRegisters =
      (Rows::kSize + (kTiles > 1 ? Rows::kSteps : 0)) * Columns::kSize * kWordRegisters + kTaps * kVector + 24;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr int kBlocks = 1;
#else
  static constexpr int kBlocks =
      max_int(1, min_int(8, (64 << 10) / (kGradInputNhwcThreads * divide_up(kRegisters, 8) * 8)));
#endif
};

template <class Traits, class Shape>
__global__ void __launch_bounds__(kGradInputNhwcThreads, Shape::kBlocks)
    grad_input_nhwc_kernel(const DirectArgs args, const unsigned tiles_w, const unsigned strips,
                           const unsigned blocks_c) {
  using T = typename Traits::T;
  using Columns = typename Shape::Columns;
  using Rows = typename Shape::Rows;
  constexpr int kColumns = Shape::kColumns, kRows = Shape::kRows, kVector = Shape::kVector, kTaps = Shape::kTaps;
  constexpr int kKept = Rows::kSize - Rows::kSteps;
  using Pixel = Vector<T, kVector>;
  using Word = typename RawWord<sizeof(Pixel)>::type;
  __shared__ Word filters[kGradInputNhwcLanes * kTaps];

  const int first_channel = blockIdx.x % blocks_c * blockDim.x * kVector;
  const int channel = first_channel + threadIdx.x * kVector;
  unsigned tile = blockIdx.x / blocks_c * blockDim.y + threadIdx.y;
  const int tile_w = tile % tiles_w;
  tile /= tiles_w;
  const int first_tile = tile % strips * Shape::kTiles;
  const int64_t image = tile / strips;
  const bool exists = channel < args.out_c && image < args.n;

  // In bytes: from one pixel to the next, and from row to row.
  const int pixel = args.out_c * int{sizeof(T)}, row_step = args.w * pixel, out_row_step = args.out_w * pixel;
  int first_row = first_tile * Rows::kSteps + Rows::kFirst;
  const int first_column = tile_w * Columns::kSteps + Columns::kFirst;
  const auto* input = reinterpret_cast<const unsigned char*>(static_cast<const T*>(args.input) + channel) +
                      (image * args.h + first_row) * row_step + static_cast<int64_t>(first_column) * pixel;
  // Words as they came: taken apart, they would be waited for at once.
  const auto load_row = [&](Word(&row)[Columns::kSize], int r, bool wanted) {
    const bool row_in_bounds = wanted && static_cast<unsigned>(first_row + r) < static_cast<unsigned>(args.h);
    const unsigned char* const from = input + r * row_step;
#pragma unroll
    for (int k = 0; k < Columns::kSize; ++k) {
      row[k] = Word{};
      if (row_in_bounds && static_cast<unsigned>(first_column + k) < static_cast<unsigned>(args.w))
        row[k] = __ldg(reinterpret_cast<const Word*>(from + k * pixel));
    }
  };
  Word grad[Rows::kSize][Columns::kSize];
#pragma unroll
  for (int r = 0; r < Rows::kSize; ++r) load_row(grad[r], r, exists);

  // [channel][tap] in memory: the block's filters are contiguous, and so are a thread's.
  const auto* const all_filters = filters_of<Traits>(args, first_channel, kTaps);
  const int words = min(static_cast<int>(blockDim.x), (static_cast<int>(args.out_c) - first_channel) / kVector) * kTaps;
  for (int k = threadIdx.y * blockDim.x + threadIdx.x; k < words; k += blockDim.x * blockDim.y)
    copy_weights<T, kVector>(reinterpret_cast<T*>(filters + k), all_filters + k * kVector);
  wait_for_all_copies();
  if (!exists) return;
  const Pixel* const packed = reinterpret_cast<const Pixel*>(filters + threadIdx.x * kTaps);
  float weight[kTaps][kVector];
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    const Pixel word = packed[k];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const int flipped = k * kVector + e;
      weight[kTaps - 1 - flipped % kTaps][flipped / kTaps] = to_float(word.value[e]);
    }
  }

  const int column = tile_w * kColumns;
  int row = first_tile * kRows;
  auto* out = reinterpret_cast<unsigned char*>(static_cast<T*>(args.out) + channel) +
              (image * args.out_h + row) * out_row_step + static_cast<int64_t>(column) * pixel;
#pragma unroll 1
  for (int t = 0; t < Shape::kTiles; ++t) {
    Word next[Rows::kSteps][Columns::kSize];
    if (t + 1 < Shape::kTiles) {
#pragma unroll
      for (int r = 0; r < Rows::kSteps; ++r) load_row(next[r], Rows::kSize + r, true);
    }
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
              sum[e] = fmaf(element_of<T>(grad[r][k], e), weight[tap_h * Traits::kKernelW + tap_w][e], sum[e]);
          }
        if (column + v < args.out_w) store_streaming(reinterpret_cast<T*>(out + v * pixel), sum);
      }
      out += out_row_step;
    }
    if (t + 1 == Shape::kTiles) return;
#pragma unroll
    for (int r = 0; r < Rows::kSize; ++r)
#pragma unroll
      for (int k = 0; k < Columns::kSize; ++k)
        grad[r][k] = r < kKept ? grad[min_int(r + Rows::kSteps, Rows::kSize - 1)][k] : next[max_int(r - kKept, 0)][k];
    row += kRows;
    first_row += Rows::kSteps;
    input += Rows::kSteps * row_step;
  }
}

template <class Traits, int kVector>
int launch_grad_input_nhwc(const DirectArgs& args, cudaStream_t stream) {
  if constexpr (grad_input_registers(4, 4, kVector, Traits::kKernelH, Traits::kKernelW, Traits::kStrideH,
                                     Traits::kStrideW, Traits::kDilationH,
                                     Traits::kDilationW) <= kMaxGradInputRegisters) {
    using Shape = GradInputNhwcShape<Traits, 4, kVector>;
    const int vectors = static_cast<int>(args.out_c) / kVector;
    const unsigned blocks_c = divide_up(vectors, kGradInputNhwcLanes);
    const int x = divide_up(vectors, static_cast<int>(blocks_c));
    const int y = kGradInputNhwcThreads / x;
    const unsigned tiles_w = divide_up(args.out_w, Shape::kColumns);
    const unsigned strips = divide_up(args.out_h, Shape::kRows * Shape::kTiles);
    const int64_t blocks = divide_up<int64_t>(args.n * tiles_w * strips, y) * blocks_c;
    grad_input_nhwc_kernel<Traits, Shape>
        <<<static_cast<unsigned>(blocks), dim3(x, y), 0, stream>>>(args, tiles_w, strips, blocks_c);
    return cudaGetLastError();
  }
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
