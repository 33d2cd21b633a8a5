// Grad of weight and bias, NCHW.
//
// Serves  up to 11x11 taps (1xk, kx1 up to 41), strides 1 and 2, dilation (not with a vertical stride); fp32, fp16,
// bf16;
//         depth multiplier; bias from the same pass. One tile a specialisation: rows of input are read in words of
//         kVector elements, rows of grad_output in words of kGradVector.
// Owns    a block belongs to one output channel and one split; its threads take that split's pieces (image, rows, strip
//         of kColumns columns), strips first, so that a warp reads neighbouring words.
// Reduces warps by shuffles that halve the taps with the lanes (about one shuffle a tap), then the block's warps in
//         order in shared memory, then the splits in order (grad_weight.cu). No atomics: results repeat bit for bit.
// Chosen  wherever it serves (select.h).
#pragma once

#include "grad_weight_march.cuh"
#include "nchw_tile.cuh"

namespace depthwise {

template <class T, int kKernelH, int kKernelW, int kStrideH, int kStrideW, int kDilationH, int kDilationW, int kColumns,
          int kVector_, int kGradVector_, int kPhase_>
struct GradWeightNchwTraits : MarchTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW, kColumns,
                                          1, min_int(kVector_, kGradVector_)> {
  static constexpr int kVector = kVector_, kGradVector = kGradVector_, kPhase = kPhase_;
};

// Loads a piece's rows.
template <class Traits>
struct NchwStrip {
  using T = typename Traits::T;
  using Row = NchwRow<Traits, Traits::kColumns, Traits::kVector>;
  static constexpr int start(int word) {
    return (Row::kFirstWord + word) * Traits::kVector + Row::low(word) / Row::load_width(word) * Row::load_width(word);
  }
  // Which words lie inside the image, as bits: one register instead of a predicate a word.
  StripMask<Row::kWords> grad_mask = 0, input_mask = 0;

  __device__ __forceinline__ NchwStrip(int grad_columns, int input_column, int input_columns) {
#pragma unroll
    for (int v = 0; v < Traits::kColumns; v += Traits::kGradVector)
      if (v < grad_columns) grad_mask |= 1u << v;
#pragma unroll
    for (int word = 0; word < Row::kWords; ++word)
      if (Row::low(word) < Row::high(word) &&
          static_cast<unsigned>(input_column + start(word)) < static_cast<unsigned>(input_columns))
        input_mask |= StripMask<Row::kWords>{1} << word;
  }

  struct GradRow {
    PackedLoad<T, Traits::kGradVector> load[Traits::kColumns / Traits::kGradVector];
    __device__ __forceinline__ float element(int v, int) const {
      return load[v / Traits::kGradVector][v % Traits::kGradVector];
    }
  };
  __device__ __forceinline__ void grad(const T* row, bool in_bounds, GradRow& registers) const {
    const auto mask = in_bounds ? grad_mask : 0;
#pragma unroll
    for (int v = 0; v < Traits::kColumns; v += Traits::kGradVector)
      registers.load[v / Traits::kGradVector].load(row + v, mask >> v & 1);
  }

  struct InputRow {
    PackedLoad<T, Traits::kVector> load[Row::kWords];
    __device__ __forceinline__ float element(int k, int) const {
      const int column = k - Traits::kPhase, word = floor_divide(column, Traits::kVector) - Row::kFirstWord;
      return load[word][column - start(word)];
    }
  };
  __device__ __forceinline__ void input(const T* row, bool in_bounds, InputRow& registers) const {
    load_words(row, in_bounds ? input_mask : 0, registers);
  }
  template <int kWord = 0>
  __device__ __forceinline__ void load_words(const T* row, StripMask<Row::kWords> mask, InputRow& registers) const {
    if constexpr (kWord < Row::kWords) {
      if constexpr (Row::low(kWord) < Row::high(kWord))
        registers.load[kWord].template load<Row::load_width(kWord)>(row + start(kWord), mask >> kWord & 1);
      load_words<kWord + 1>(row, mask, registers);
    }
  }
};

// Sums of kCount values over a warp: each step exchanges half of what a lane still holds with the lane `offset` away,
// so that both have half as many. In the end a lane holds `kept` sums, those from index `first` to `end`.
template <int kCount, int kOffset = 16>
__device__ __forceinline__ void sum_over_warp(const float (&values)[kCount], float* shared, int first, int end) {
  if constexpr (kOffset == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (first + k < end) shared[first + k] = values[k];
  } else {
    constexpr int kHalf = (kCount + 1) / 2;
    const bool upper = threadIdx.x & kOffset;
    float half[kHalf];
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float high = k + kHalf < kCount ? values[k + kHalf < kCount ? k + kHalf : 0] : 0.f;
      half[k] = (upper ? high : values[k]) + __shfl_xor_sync(~0u, upper ? values[k] : high, kOffset);
    }
    sum_over_warp<kHalf, kOffset / 2>(half, shared, upper ? first + kHalf : first,
                                      upper ? end : min(end, first + kHalf));
  }
}

template <class Traits>
__global__ void __launch_bounds__(kGradWeightThreads, Traits::kBlocks)
    grad_weight_nchw_kernel(const GradWeightArgs args, const Pieces pieces) {
  using T = typename Traits::T;
  constexpr int kTaps = Traits::kTaps, kWarps = kGradWeightThreads / 32;
  const unsigned channel = blockIdx.x, split = blockIdx.y;
  const int first_piece = split * blockDim.x + threadIdx.x;
  const int piece_step = args.splits * blockDim.x;
  const int64_t in_c = args.out_c / args.multiplier;
  const auto grad_plane = [&](int image) {
    return static_cast<const T*>(args.grad_output) + (image * args.out_c + channel) * args.out_h * args.out_w;
  };
  const auto input_plane = [&](int image) {
    return static_cast<const T*>(args.input) + (image * in_c + channel / args.multiplier) * args.h * args.w;
  };

  float sum[kTaps][1] = {};
  float bias[1] = {}, bias_part[1] = {};
  for (int index = first_piece; index < pieces.per_channel; index += piece_step) {
    const Piece piece = piece_at<Traits>(args, pieces, index);
    const int column = piece.column * Traits::kStrideW;
    const NchwStrip<Traits> strip(args.out_w - piece.column, column, args.w);
    march<Traits>(args, piece, strip, grad_plane(piece.image) + piece.column, input_plane(piece.image) + column,
                  args.out_w, args.w, sum, bias, bias_part);
    bias[0] += bias_part[0];
    bias_part[0] = 0;
  }

  __shared__ float shared[kWarps][kTaps + 1];
  float values[kTaps + 1];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) values[tap] = sum[tap][0];
  values[kTaps] = bias[0];
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  sum_over_warp(values, shared[warp], 0, kTaps + 1);
  __syncthreads();
  bool finite = true;
  for (int tap = threadIdx.x; tap <= kTaps; tap += blockDim.x) {
    float total = shared[0][tap];
    for (int k = 1; k < num_warps; ++k) total += shared[k][tap];
    store_sum<Traits>(args, split, channel, tap, total);
    finite = finite && isfinite(total);
  }
  if (__syncthreads_and(finite)) return;

  for (int tap = 0; tap < kTaps; ++tap) {
    float total = 0;
    for (int index = first_piece; index < pieces.per_channel; index += piece_step) {
      const Piece piece = piece_at<Traits>(args, pieces, index);
      total += sum_of_pairs<Traits>(args, piece, tap, grad_plane(piece.image), input_plane(piece.image), 1);
    }
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (threadIdx.x % 32 == 0) shared[warp][0] = total;
    __syncthreads();
    for (int k = 1; k < num_warps && threadIdx.x == 0; ++k) total += shared[k][0];
    if (threadIdx.x == 0) store_sum<Traits>(args, split, channel, tap, total);
    __syncthreads();
  }
}

template <class Traits>
int launch_grad_weight_nchw(const GradWeightArgs& args, int, cudaStream_t stream) {
  const Pieces pieces = count_pieces<Traits>(args);
  const int threads = min_int(kGradWeightThreads, divide_up(divide_up(pieces.per_channel, args.splits), 32) * 32);
  const dim3 blocks(static_cast<unsigned>(args.out_c), args.splits);
  grad_weight_nchw_kernel<Traits><<<blocks, threads, 0, stream>>>(args, pieces);
  return cudaGetLastError();
}

}  // namespace depthwise
