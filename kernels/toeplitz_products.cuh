// The products of toeplitz.cuh: what a warp multiplies, of either layout.
#pragma once

#include "toeplitz_block.cuh"

namespace depthwise {

template <class Traits>
using ToeplitzSums = float[Traits::kTilesH][Traits::kTilesW][4];

// A warp's tiles: every `step`-th of its channel's, whose rows are counted through all images of the block.
template <class Traits>
struct ToeplitzRows {
  static constexpr int kRowBytes = Traits::kPitch * kChunk * sizeof(typename Traits::T);

  int first, step, tiles;  // tiles: that exist, more than registers hold where the block has more
  int in_row
      [Traits::kTilesH];  // of the row that this lane names to ldmatrix, l % 16 of a tile, at the first kernel row
  unsigned address[Traits::kTilesH],
      zeros;               // of that row, and of the row of zeros that stands for all outside the image
  int first_tap, end_tap;  // kernel rows that meet the image anywhere in this warp

  // `tile`: the channel's input in shared memory; zero_row: a shared_address. Of the block: image_rows of input from image to image.
  template <class Block>
  __device__ __forceinline__ ToeplitzRows(const DirectArgs& args, const Block& block, const void* tile,
                                          unsigned zero_row, const IntDivider& row_divider, int all_rows,
                                          int image_rows, int first, int step) {
    const int lane = ptx::thread_index() % 32;
    tiles = first < step ? divide_up(divide_up(all_rows, kTileRows) - first, step) : 0;
    const unsigned base = ptx::shared_address(tile) + lane / kTileRows * 16;
    zeros = zero_row;                                             // of all lanes: either half of a pair of chunks
    int least = args.h, most = -args.kernel_h * args.dilation_h;  // of those that may meet the image
#pragma unroll
    for (int a = 0; a < Traits::kTilesH; ++a) {
      const int begin = (first + a * step) * kTileRows, flat = begin + lane % kTileRows, row = block.row + flat;
      const int image = row_divider.quotient(row);
      const bool exists = a < tiles && flat < all_rows;
      in_row[a] = exists ? (row - image * args.out_h) * args.stride_h - args.padding_h : kOutside;
      address[a] = base + (image * image_rows + in_row[a] - block.in_row) * kRowBytes;
      // The tile's first and last row; of two images, there is the first row of one, and the last of another.
      const int top = block.row + begin, bottom = block.row + min(begin + kTileRows, all_rows) - 1;
      const int top_image = row_divider.quotient(top), bottom_image = row_divider.quotient(bottom);
      const int low = top_image == bottom_image ? top - top_image * args.out_h : 0;
      const int high = top_image == bottom_image ? bottom - bottom_image * args.out_h : args.out_h - 1;
      const int low_in = low * args.stride_h - args.padding_h, high_in = high * args.stride_h - args.padding_h;
      if (a < tiles && low_in < args.h) least = min(least, low_in), most = max(most, min(high_in, args.h - 1));
    }
    first_tap = most < 0 ? (-most + args.dilation_h - 1) / args.dilation_h : 0;
    end_tap = least < args.h ? min(args.kernel_h, (args.h - 1 - least) / args.dilation_h + 1) : 0;
  }
  // Of the warps that share the tiles, the kernel rows of the part-th; `divider`: by how many they are.
  __device__ __forceinline__ void take_part(int part, const SmallDivider& divider) {
    const int taps = max(0, end_tap - first_tap), begin = first_tap;
    first_tap = begin + divider.quotient(taps * part);
    end_tap = begin + divider.quotient(taps * (part + 1));
  }
};

// body(row, pair of the n-th tile) for each of `rows` rows of outputs of which this lane has some.
template <class Traits, class Body>
__device__ __forceinline__ void for_each_row(const ToeplitzSums<Traits>& sum, int first, int step, int rows,
                                             Body body) {
#pragma unroll
  for (int a = 0; a < Traits::kTilesH; ++a)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (first + a * step) * kTileRows + half * 8 + ptx::lane_index() / 4;
      if (row < rows)
        body(row, [&](int n) { return pack<typename Traits::T>(sum[a][n][2 * half], sum[a][n][2 * half + 1]); });
    }
}

// kTall: kernel rows whose products are added up in registers of their own. Tensor cores truncate, and sums of many drift:
// 63x63 in fp16, an image of one sign, a quarter of the kernel's rows of another, was 4.9 units of the tests' reference.py off
// by sixteen rows together, where PyTorch's error allows 4.8 (H200; simulated, by sixteen 4.3, by eight 2.9).
constexpr int kRowsTogether = 8;
template <int kTiles, class Traits>
struct ToeplitzTotal {
  float value[kTiles][Traits::kTilesW][4] = {};
  int until = kRowsTogether;

  __device__ __forceinline__ void add(ToeplitzSums<Traits>& sum) {
#pragma unroll
    for (int a = 0; a < kTiles; ++a)
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) value[a][n][k] += sum[a][n][k], sum[a][n][k] = 0;
  }
  __device__ __forceinline__ void add_row(ToeplitzSums<Traits>& sum) {
    if (--until > 0) return;
    add(sum);
    until = kRowsTogether;
  }
  __device__ __forceinline__ void finish(ToeplitzSums<Traits>& sum) {
    add(sum);
#pragma unroll
    for (int a = 0; a < kTiles; ++a)
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[a][n][k] = value[a][n][k];
  }
};

// Of the first kTiles tiles. `pairs`: the channel's weights.
template <int kTiles, class Traits>
__device__ __forceinline__ void multiply_rows(ToeplitzSums<Traits>& sum, const ToeplitzRows<Traits>& rows,
                                              const DirectArgs& args, const unsigned* pairs) {
  using T = typename Traits::T;
  constexpr int kTilesW = Traits::kTilesW, kStrideW = Traits::kStrideW;
  const int lane = ptx::thread_index() % 32;
  const unsigned* row =
      pairs + rows.first_tap * Traits::kBand + (kChunk - 1) * kStrideW + 2 * (lane % 4) - kStrideW * (lane / 4);
  int in_row[kTiles];
  unsigned address[kTiles];
#pragma unroll
  for (int a = 0; a < kTiles; ++a) {
    in_row[a] = rows.in_row[a] + rows.first_tap * args.dilation_h;
    address[a] = rows.address[a] + rows.first_tap * args.dilation_h * rows.kRowBytes;
  }
  std::conditional_t<Traits::kTall, ToeplitzTotal<kTiles, Traits>, int> total{};
  // Every kApart-th kernel row, then those below them, and so on.
  constexpr int kApart = Traits::kApart;
  const int count = max(0, rows.end_tap - rows.first_tap);
#pragma unroll 1
  for (int first = 0; first < kApart; ++first) {
    const int of_pass = (count - first + kApart - 1) / kApart;
#pragma unroll 1
    for (int left = of_pass; left > 0; --left, row += kApart * Traits::kBand) {
      unsigned band[Traits::kChunks];
#pragma unroll
      for (int s = 0; s < Traits::kChunks; ++s) band[s] = row[s * kChunk];
#pragma unroll
      for (int a = 0; a < kTiles; ++a) {
        const bool in_bounds = static_cast<unsigned>(in_row[a]) < static_cast<unsigned>(args.h);
        const unsigned from = in_bounds ? address[a] : rows.zeros;
        in_row[a] += kApart * args.dilation_h;
        address[a] += kApart * args.dilation_h * rows.kRowBytes;
        unsigned in[Traits::kEndPair][4];  // rows 0-7 and 8-15 of a pair's first chunk, then of its second
#pragma unroll
        for (int k = Traits::kFirstPair; k < Traits::kEndPair; ++k)
          ptx::load_matrices(in[k], from + (k - Traits::kFirstPair) * 32);
#pragma unroll
        for (int step = 0; step < Traits::kSteps; ++step)
#pragma unroll
          for (int n = 0; n < kTilesW; ++n) {
            const int k = Traits::pair(n, step), s = 2 * k - n * kStrideW;
            const bool left = Traits::used(n, 2 * k), right = Traits::used(n, 2 * k + 1);
            if (left && right)
              multiply_k16<T>(sum[a][n], in[k][0], in[k][1], in[k][2], in[k][3], band[s], band[s + 1]);
            else if (left)
              multiply_k8<T>(sum[a][n], in[k][0], in[k][1], band[s]);
            else if (right)
              multiply_k8<T>(sum[a][n], in[k][2], in[k][3], band[s + 1]);
          }
      }
      if constexpr (Traits::kTall) total.add_row(sum);
    }
    const int back = 1 - kApart * of_pass;
    row += back * Traits::kBand;
#pragma unroll
    for (int a = 0; a < kTiles; ++a) {
      in_row[a] += back * args.dilation_h;
      address[a] += back * args.dilation_h * rows.kRowBytes;
    }
  }
  if constexpr (Traits::kTall) total.finish(sum);
}

// The sums of the warps that share tiles, added up by the first of them. `slot`: which of the block's sharing groups; all
// threads of the block come here. The room in shared memory is not that of the input.
template <class Traits>
__device__ __forceinline__ void add_parts(ToeplitzSums<Traits>& sum, float4* room, int tiles, int slot, int part,
                                          int parts, int held_tiles) {
  constexpr int kLanes = 32;
  const int pitch = held_tiles * Traits::kTilesW * kLanes;  // from part to part
  room += slot * (parts - 1) * pitch + ptx::lane_index();
  if (part > 0) {
    float4* const to = room + (part - 1) * pitch;
#pragma unroll
    for (int a = 0; a < Traits::kTilesH; ++a)
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n)
        if (a < tiles)
          to[(a * Traits::kTilesW + n) * kLanes] = float4{sum[a][n][0], sum[a][n][1], sum[a][n][2], sum[a][n][3]};
  }
  __syncthreads();
  if (part > 0) return;
#pragma unroll 1
  for (int other = 1; other < parts; ++other, room += pitch)
#pragma unroll
    for (int a = 0; a < Traits::kTilesH; ++a)
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n)
        if (a < tiles) {
          const float4 more = room[(a * Traits::kTilesW + n) * kLanes];
          sum[a][n][0] += more.x, sum[a][n][1] += more.y, sum[a][n][2] += more.z, sum[a][n][3] += more.w;
        }
}

// A loop of its own for each number of tiles, as branches keep the products of different tiles apart.
template <class Traits>
__device__ __forceinline__ void multiply_rows(ToeplitzSums<Traits>& sum, const ToeplitzRows<Traits>& rows,
                                              const DirectArgs& args, const unsigned* pairs) {
  const int tiles = min(rows.tiles, Traits::kTilesH);
  for_each_index<Traits::kTilesH>([&](auto k) {
    if (tiles == k.value + 1) multiply_rows<k.value + 1, Traits>(sum, rows, args, pairs);
  });
}

}  // namespace depthwise
