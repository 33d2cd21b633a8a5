// How toeplitz.cuh turns the images of tall kernels, NCHW: rows are taken for columns, and columns for rows.
//
// Idea    A kernel of 51x5 has 51 rows, each of which takes two products of a tile; as 5x51 it has five, of five products.
//         So the image is turned as it comes to shared memory, and its outputs are turned back as they leave: a warp loads
//         8x8 elements, two neighbours a lane, and movmatrix gives it the two that lie below each other.
// Serves  as toeplitz.cuh, at stride 1 and multiplier 1. Images of an odd number of columns are loaded and stored one element
//         at a time.
// Names   `args` and `block` are turned: their rows are the image's columns, counted through all images, and their columns its
//         rows. An image has args.w rows of args.h elements.
#pragma once

#include "toeplitz_products.cuh"

namespace depthwise {

// Two neighbours of a row of an image: the columns `flat` and `flat + 1`, counted from the first of `image` through all that
// follow.
template <class T>
struct TurnedPair {
  T *first, *second;  // null: outside of [begin, end)

  // `image`: the first column, in the row that is meant; images of `columns` columns lie `step` elements apart.
  template <class Quotient>
  __device__ __forceinline__ TurnedPair(T* image, int64_t step, int columns, int flat, int begin, int end,
                                        Quotient quotient) {
    const auto at = [&](int k) -> T* {
      if (k < begin || k >= end) return nullptr;
      const int images = quotient(k);
      return image + images * step + (k - images * columns);
    };
    first = at(flat), second = at(flat + 1);
  }
  // Whether they are one word, `even`: as rows begin on words, and `flat` is even.
  __device__ __forceinline__ bool is_word(bool even) const { return even && first != nullptr && second != nullptr; }
};

template <class Traits>
__device__ __forceinline__ void load_turned(typename Traits::T* tile, const DirectArgs& args,
                                            const ToeplitzBlock<Traits>& block, bool even) {
  using T = typename Traits::T;
  if (block.in_columns <= 0 || block.in_rows <= 0) return;
  const int64_t plane = static_cast<int64_t>(args.h) * args.w;
  const T* const image = static_cast<const T*>(args.input) + (block.image * args.out_c + block.channel) * plane +
                         static_cast<int64_t>(block.in_column) * args.h;
  const int lane = threadIdx.x % 32, first = block.in_row / 2 * 2, end = block.in_row + block.in_rows;
#pragma unroll 1
  for (int flat = first + threadIdx.x / 32 * kChunk; flat < end; flat += Traits::kWarps * kChunk) {
    const TurnedPair<const T> pair(image, args.out_c * plane, args.h, flat + lane % 4 * 2, block.in_row, end,
                                   [&](int k) { return k / args.h; });
    const bool is_word = pair.is_word(even);
    // All loads before the first store.
    unsigned words[Traits::kStored] = {};
#pragma unroll
    for (int c = 0; c < Traits::kStored; ++c) {
      const int row = c * kChunk + lane / 4;  // of the image
      if (row >= block.in_columns) continue;
      if (is_word) {
        words[c] = __ldg(reinterpret_cast<const unsigned*>(pair.first + row * args.h));
      } else {
        if (pair.first) words[c] = __ldg(&pair.first[row * args.h].bits);
        if (pair.second) words[c] |= static_cast<unsigned>(__ldg(&pair.second[row * args.h].bits)) << 16;
      }
    }
    const int number = flat + lane / 4 - block.in_row;
    unsigned* const to = reinterpret_cast<unsigned*>(tile + number * Traits::kPitch * kChunk + block.offset) + lane % 4;
#pragma unroll
    for (int c = 0; c < Traits::kStored; ++c) {
      const unsigned turned = ptx::transpose_matrix(words[c]);
      if (c * kChunk < block.in_columns && number >= 0 && number < block.in_rows) to[c * kChunk / 2] = turned;
    }
  }
}

// The sums of a warp's tiles to memory; of a part of a block's warps, `rows` is 0.
template <class Traits>
__device__ __forceinline__ void store_turned(const ToeplitzSums<Traits>& sum, const DirectArgs& args,
                                             const ToeplitzTiling& tiling, const ToeplitzBlock<Traits>& block,
                                             int first, int step, int rows) {
  using T = typename Traits::T;
  const int64_t plane = static_cast<int64_t>(args.out_h) * args.out_w;
  T* const image = static_cast<T*>(args.out) + (block.image * args.out_c + block.channel) * plane +
                   static_cast<int64_t>(block.column) * args.out_h;
  const int lane = ptx::lane_index();
#pragma unroll
  for (int a = 0; a < Traits::kTilesH; ++a)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int flat = (first + a * step) * kTileRows + half * kChunk;
      if (flat >= rows) continue;
      const TurnedPair<T> pair(image, args.out_c * plane, args.out_h, block.row + flat + lane % 4 * 2, block.row,
                               block.row + rows, [&](int k) { return tiling.row_divider.quotient(k); });
      const bool is_word = block.row % 2 == 0 && pair.is_word(tiling.out_vector > 1);
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n) {
        const unsigned two = ptx::transpose_matrix(pack<T>(sum[a][n][2 * half], sum[a][n][2 * half + 1]));
        const int row = n * kChunk + lane / 4;  // of the image
        if (row >= block.columns) continue;
        if (is_word) {
          *reinterpret_cast<unsigned*>(pair.first + row * args.out_h) = two;
        } else {
          if (pair.first) pair.first[row * args.out_h].bits = static_cast<unsigned short>(two);
          if (pair.second) pair.second[row * args.out_h].bits = static_cast<unsigned short>(two >> 16);
        }
      }
    }
}

// Stored outputs of the block that are NaN, computed again, when all are stored.
template <class Traits>
__device__ __noinline__ void mend_turned(const DirectArgs& args, const ToeplitzTiling& tiling) {
  using T = typename Traits::T;
  const ToeplitzBlock<Traits> block(args, tiling);
  const int64_t plane = static_cast<int64_t>(args.out_h) * args.out_w;
#pragma unroll 1
  for (int k = threadIdx.x; k < block.rows * block.columns; k += Traits::kThreads) {
    const int column = block.column + k / block.rows, flat = block.row + k % block.rows;
    const int image = tiling.row_divider.quotient(flat), row = flat - image * args.out_h;
    T* const at = static_cast<T*>(args.out) + ((block.image + image) * args.out_c + block.channel) * plane +
                  static_cast<int64_t>(column) * args.out_h + row;
    if (is_nan(*at))
      *at =
          from_float<T>(toeplitz_exact<Traits, Traits::kTurned>(args, block.image + image, block.channel, row, column));
  }
}

}  // namespace depthwise
