// How toeplitz.cuh turns the images of tall kernels, NCHW: rows are taken for columns, and columns for rows.
//
// Idea    A kernel of 51x5 has 51 rows, each of which takes two products of a tile; as 5x51 it has five, of five products.
//         So the image is turned as it comes to shared memory, and its outputs are turned back as they leave. In: a warp loads
//         four times 8x8 elements, rows of 64 bytes, and ldmatrix turns them in a corner of shared memory. Out: movmatrix
//         turns them in registers; they are staged where the input was, and whole rows of images leave together. (Loads and
//         stores of 8x8 elements at a time, in rows of 16 bytes, took longer than the products: 51x5 and 25x5 on
//         32x128x56x56, fp16, H200: 57 us each.)
// Serves  as toeplitz.cuh, at stride 1 and multiplier 1.
// Names   `args` and `block` are turned: their rows are the image's columns, counted through all images, and their columns its
//         rows. An image has args.w rows of args.h elements.
#pragma once

#include "toeplitz_products.cuh"

namespace depthwise {

constexpr int kTurnedEights = 4;  // side by side, of a warp at a time
constexpr int kCornerChunks = kTurnedEights * kChunk;

// `corners`: room for kCornerChunks a warp. `whole`: rows begin on 16-byte boundaries.
template <class Traits>
__device__ __forceinline__ void load_turned(typename Traits::T* tile, typename Traits::T* corners,
                                            const DirectArgs& args, const ToeplitzBlock<Traits>& block, bool whole) {
  using T = typename Traits::T;
  constexpr int kAhead = 4, kColumns = kTurnedEights * kChunk;
  if (block.in_columns <= 0 || block.in_rows <= 0) return;
  const int64_t plane = static_cast<int64_t>(args.h) * args.w, image_step = args.out_c * plane;
  const T* const image = static_cast<const T*>(args.input) + (block.image * args.out_c + block.channel) * plane +
                         static_cast<int64_t>(block.in_column) * args.h;
  const UnalignedTensor tensor{args.input, static_cast<const T*>(args.input) + args.n * image_step};
  const int lane = threadIdx.x % 32, row = lane / kTurnedEights, column = lane % kTurnedEights * kChunk;
  // A corner: chunk (r + 2 * m) % 8 of matrix m is its row r, so that neither stores nor ldmatrix meet in a bank.
  uint4* const corner = reinterpret_cast<uint4*>(corners) + threadIdx.x / 32 * kCornerChunks;
  const auto in_corner = [&](int m, int r) { return corner + m * kChunk + (r + 2 * m) % kChunk; };
  uint4* const from_global = in_corner(lane % kTurnedEights, row);
  const unsigned to_matrices = ptx::shared_address(in_corner(lane / kChunk, lane % kChunk));
  const int end = block.in_row + block.in_rows, images = divide_up(end, args.h);
#pragma unroll 1
  for (Walk at(threadIdx.x / 32, Traits::kWarps, Traits::kStored, divide_up(args.h, kColumns)); at.outer < images;) {
    // All loads before the first store.
    UnalignedEight eight[kAhead];
    int chunk[kAhead], first[kAhead];  // chunk of the tile's rows; first: row of the tile, of a matrix's first column
    int columns[kAhead];               // that the image has from there on; 0: nothing to do
#pragma unroll
    for (int k = 0; k < kAhead; ++k, at.advance()) {
      const int begin = at.middle * kColumns, flat = at.outer * args.h + begin;
      const bool meets = at.outer < images && at.inner * kChunk < block.in_columns && flat < end &&
                         flat + min(kColumns, args.h - begin) > block.in_row;
      chunk[k] = at.inner, first[k] = flat - block.in_row, columns[k] = meets ? args.h - begin : 0;
      eight[k].clear();
      const int valid = columns[k] - column;
      if (valid <= 0 || at.inner * kChunk + row >= block.in_columns) continue;
      const T* const from =
          image + at.outer * image_step + static_cast<int64_t>(at.inner * kChunk + row) * args.h + begin + column;
      if (whole)
        eight[k].load_aligned(from);
      else if (!eight[k].load(tensor, from))
        eight[k].load_some(from, valid);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (columns[k] <= 0) continue;
      eight[k].store(from_global, EightMask(kEight));
      __syncwarp();
      unsigned matrix[kTurnedEights];
      ptx::load_matrices_transposed(matrix, to_matrices);
      __syncwarp();
#pragma unroll
      for (int m = 0; m < kTurnedEights; ++m) {
        const int in_image = m * kChunk + lane / 4, number = first[k] + in_image;
        if (in_image < columns[k] && number >= 0 && number < block.in_rows)
          reinterpret_cast<unsigned*>(tile + (number * Traits::kPitch + chunk[k]) * kChunk + block.offset)[lane % 4] =
              matrix[m];
      }
    }
  }
}

// Staged outputs: a row of the images' has as many columns as the block has rows; in chunks, an odd number.
inline __host__ __device__ int turned_pitch(int rows) { return divide_up(rows, kChunk) | 1; }

template <class Traits>
__device__ __forceinline__ void stage_turned(typename Traits::T* staged, const ToeplitzSums<Traits>& sum,
                                             const ToeplitzTiling& tiling, int first, int step, int rows) {
  const int pitch = turned_pitch(tiling.rows) * kChunk, lane = ptx::lane_index();
#pragma unroll
  for (int a = 0; a < Traits::kTilesH; ++a)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int flat = (first + a * step) * kTileRows + half * kChunk;
      if (flat >= rows) continue;
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n)
        reinterpret_cast<unsigned*>(staged + (n * kChunk + lane / 4) * pitch + flat)[lane % 4] =
            ptx::transpose_matrix(pack<typename Traits::T>(sum[a][n][2 * half], sum[a][n][2 * half + 1]));
    }
}

// kVector elements at a time, of one image and row.
template <int kVector, class Traits>
__device__ __forceinline__ void store_turned(const typename Traits::T* staged, const DirectArgs& args,
                                             const ToeplitzTiling& tiling, const ToeplitzBlock<Traits>& block) {
  using T = typename Traits::T;
  const int64_t plane = static_cast<int64_t>(args.out_h) * args.out_w, image_step = args.out_c * plane;
  const int pitch = turned_pitch(tiling.rows) * kChunk;
  T* const out = static_cast<T*>(args.out) + (block.image * args.out_c + block.channel) * plane +
                 static_cast<int64_t>(block.column) * args.out_h;
#pragma unroll 1
  for (int flat = threadIdx.x % 32 * kVector; flat < block.rows; flat += 32 * kVector) {
    const int image = tiling.row_divider.quotient(block.row + flat);
    T* const to = out + image * image_step + (block.row + flat - image * args.out_h);
#pragma unroll 4
    for (int row = threadIdx.x / 32; row < block.columns; row += Traits::kWarps)
      store_streaming(to + row * args.out_h, *reinterpret_cast<const Vector<T, kVector>*>(staged + row * pitch + flat));
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
