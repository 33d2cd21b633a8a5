// The products of images_grad_weight, of 16 or 32 columns and of 8, and the sums of their diagonals.
//
// Planes lie in shared memory as rows of columns, image after image, so that ldmatrix with .trans gives both fragments:
// A[m][k] is column m of image k, B[k][n] column n of image k. A lane names a row of image l / 16 * 8 + l % 8 for A, and
// of image l / 8 % 2 * 8 + l % 8 for B; the other bit of l tells which eight columns.
#pragma once

#include "direct.cuh"
#include "tensor_core.cuh"

namespace depthwise {

// Sums of kSegmentRows kernel rows of 16 or 32 columns.
template <class Traits>
struct WideSums {
  using T = typename Traits::T;
  static constexpr int kRows = Traits::kSegmentRows, kTiles = Traits::kTiles, kRowBytes = 32 * kTiles;
  float sum[kRows][kTiles][2 * kTiles][4] = {};  // 16 columns of input by 8 of grad_output

  // The least distance of two columns of such a tile.
  static constexpr int distance(int m, int n) {
    return 8 * n > 16 * m + 15 ? 8 * n - (16 * m + 15) : 16 * m > 8 * n + 7 ? 16 * m - (8 * n + 7) : 0;
  }

  // `in`, `grad`: the lane's addresses for ldmatrix of row 0. `first`: the first of the rows' differences y - h.
  // `reach`: the largest distance of columns that the kernel has.
  __device__ __forceinline__ void multiply(unsigned in, unsigned grad, int first, int reach, int in_rows,
                                           int out_rows) {
    unsigned window[kRows][kTiles][4];  // rows h + first to h + first + kRows - 1, round and round
    int h = max(0, -(first + kRows - 1));
    const int end = min(out_rows, in_rows - first);
    const auto exists = [&](int row) { return static_cast<unsigned>(row) < static_cast<unsigned>(in_rows); };
    const auto load_row = [](unsigned (&row)[kTiles][4], unsigned address) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) ptx::load_matrices_transposed(row[m], address + m * 32);
    };
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r)
      if (exists(h + first + r)) load_row(window[r], in + (h + first + r) * kRowBytes);
#pragma unroll 1
    for (; h < end; h += kRows) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (h + u >= end) break;
        const int row = h + u + first;
        unsigned columns[kTiles][4];
        load_row(columns, grad + (h + u) * kRowBytes);
        if (exists(row + kRows - 1)) load_row(window[(u + kRows - 1) % kRows], in + (row + kRows - 1) * kRowBytes);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (!exists(row + r)) continue;
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            const unsigned (&x)[4] = window[(u + r) % kRows][m];
#pragma unroll
            for (int n = 0; n < 2 * kTiles; ++n)
              if (distance(m, n) < 8 || reach >= distance(m, n))
                multiply_k16<T>(sum[r][m][n], x[0], x[1], x[2], x[3], columns[n / 2][n % 2 * 2],
                                columns[n / 2][n % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  // Adds the blocks of 8x8 that have the same diagonals.
  __device__ __forceinline__ void fold(float (&parts)[kRows][Traits::kParts], int width, int out_width) const {
    constexpr int kSpan = Traits::kSpan;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < Traits::kParts; ++k) parts[r][k] = 0.f;
#pragma unroll
    for (int m = 0; m < 2 * kTiles; ++m)
#pragma unroll
      for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool exists = 8 * m + g < width && 8 * n + 2 * t + e < out_width;
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            parts[r][e * (2 * kSpan + 1) + kSpan + m - n] += exists ? sum[r][m / 2][n][m % 2 * 2 + e] : 0.f;
        }
  }
};

// Sums of all kernel rows of 8 columns.
template <class Traits>
struct NarrowSums {
  using T = typename Traits::T;
  static constexpr int kRows = Traits::kLive, kFirst = Traits::kFirst;
  static constexpr int kPairs = divide_up(Traits::kInRows, 2), kChunkBytes = 32;  // two rows
  // Upper half: difference kFirst - 1 + index, lower half: the next.
  float sum[kRows + 1][4] = {};
  float last[kRows][4] = {};  // of an odd last row, upper half

  static constexpr bool is_live(int difference) { return difference >= kFirst && difference < kFirst + kRows; }

  __device__ __forceinline__ void multiply(unsigned in, unsigned grad) {
    unsigned x[kPairs][4];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) ptx::load_matrices_transposed(x[pair], in + pair * kChunkBytes);
#pragma unroll
    for (int chunk = 0; chunk < divide_up(Traits::kOutRows, 2); ++chunk) {
      unsigned columns[4];
      ptx::load_matrices_transposed(columns, grad + chunk * kChunkBytes);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int h = 2 * chunk + k;
        if (h >= Traits::kOutRows) continue;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const int difference = 2 * pair - h;
          const auto add = [&](float (&d)[4]) {
            multiply_k16<T>(d, x[pair][0], x[pair][1], x[pair][2], x[pair][3], columns[2 * k], columns[2 * k + 1]);
          };
          if (2 * pair + 1 == Traits::kInRows) {
            if (is_live(difference)) add(last[difference - kFirst]);
          } else if (is_live(difference) || is_live(difference + 1)) {
            add(sum[difference - kFirst + 1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void fold(float (&parts)[kRows][Traits::kParts], int width, int out_width) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool exists = g < width && 2 * t + e < out_width;
#pragma unroll
      for (int r = 0; r < kRows; ++r) parts[r][e] = exists ? sum[r + 1][e] + sum[r][2 + e] + last[r][e] : 0.f;
    }
  }
};

// The diagonals m - n of a kernel row, or of two of 8 columns, as rows of floats, one for each n modulo 8: lane l sums
// l - 16 (16 columns), l - 32 and l (32 columns), or l % 16 - 8. Cells that no m reaches stay zeros. Of two buffers a
// warp writes one while it may still read the other.
template <class Traits>
struct Diagonals {
  static constexpr int kPitch = Traits::kDiagonalPitch, kSize = 8 * kPitch;
  float* shared;  // this warp's

  __device__ __forceinline__ void clear() const {
#pragma unroll 1
    for (int k = threadIdx.x % 32; k < Traits::kDiagonalFloats; k += 32) shared[k] = 0.f;
    __syncwarp();
  }

  // `parts` as fold leaves them.
  template <int kRow, int kRowsAtOnce>
  __device__ __forceinline__ void sum(float (&sums)[Traits::kTiles], const float (*parts)[Traits::kParts]) const {
    constexpr int kSpan = Traits::kSpan;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float* const buffer = shared + kRow % Traits::kDiagonalBuffers * kSize;
    float* const cells = buffer + 2 * t * (kPitch - 1) + Traits::kColumns + g;  // n = 2t, where m = 0 would be
    if constexpr (Traits::kDiagonalBuffers == 1) __syncwarp();
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int row = 0; row < kRowsAtOnce; ++row)
#pragma unroll
        for (int k = -kSpan; k <= kSpan; ++k)
          cells[e * (kPitch - 1) + row * 2 * Traits::kColumns + 8 * k] = parts[row][e * (2 * kSpan + 1) + kSpan + k];
    __syncwarp();
#pragma unroll
    for (int q = 0; q < Traits::kTiles; ++q) {
      const float* const column = buffer + lane + 32 * q;
      float part[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) part[k] = column[k * kPitch] + column[(k + 4) * kPitch];
      sums[q] = (part[0] + part[1]) + (part[2] + part[3]);
    }
  }
};

}  // namespace depthwise
