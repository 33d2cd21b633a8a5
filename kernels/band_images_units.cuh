// What band_images is compiled for, how a launch of it is cut into blocks, and how a block's units are dealt to its warps so
// that all partitions of a multiprocessor have as many products. See band_images.cuh.
#pragma once

#include "toeplitz_block.cuh"

namespace depthwise {

constexpr int kBandImages = kTileRows;  // of a product
constexpr int kBandImagesWarps = 8;

// kOrigin: chunk of the image in which the band of output column 0 begins. kImageChunks: of an image row. kTiles: of an
// output row, in eights. kRows: of a unit. kApart: rounds of the ring are taken in turn from the upper and the lower half.
template <class T_, int kChunks_, int kOrigin_, int kImageChunks_, int kTiles_, int kRows_, bool kApart_>
struct BandImagesTraits {
  using T = T_;
  static constexpr int kChunks = kChunks_, kOrigin = kOrigin_, kImageChunks = kImageChunks_, kTiles = kTiles_;
  static constexpr int kRows = kRows_, kStrideW = 1;
  static constexpr bool kApart = kApart_, kChannelsLast = false, kTurned = false;
  static constexpr int kWarps = kBandImagesWarps, kThreads = 32 * kWarps;
  static constexpr int kPitch = kImageChunks, kStored = kPitch;  // chunks of a row in shared memory
  static constexpr int kPairs = (kImageChunks + 1) / 2;
  // Pairs of weights a kernel row: the band of eight outputs, from the last output's first column on.
  static constexpr int kBand = kChunk * kChunks + kChunk - 2;

  // Tiles n, n + kStep, ... make a unit.
  static constexpr int kStep = 2, kColumnGroups = min_int(kStep, kTiles);
  static constexpr int tiles(int group) { return divide_up(kTiles - group, kStep); }

  // Whether the band of tile n has chunk c of the image, and products for that: how many pairs of chunks.
  static constexpr bool used(int n, int c) {
    return c >= 0 && c < kImageChunks && c >= n + kOrigin && c < n + kOrigin + kChunks;
  }
  static constexpr int products(int group) {
    int count = 0;
    for (int n = group; n < kTiles; n += kStep)
      for (int k = 0; k < kPairs; ++k) count += used(n, 2 * k) || used(n, 2 * k + 1);
    return count;
  }
  static constexpr bool fetches(int group, int k) {
    for (int n = group; n < kTiles; n += kStep)
      if (used(n, 2 * k) || used(n, 2 * k + 1)) return true;
    return false;
  }
  static constexpr bool fetches_band(int group, int s) {
    for (int n = group; n < kTiles; n += kStep)
      if (used(n, n + kOrigin + s)) return true;
    return false;
  }

  // Sums, the ring of kernel rows, an input row, and what else there is: what nvcc needs at most.
  static constexpr int kRegisters = divide_up(kTiles, kStep) * kRows * 4 + kRows * kChunks + 6 * kPairs + 18;
  static constexpr int kBlocks = kRegisters <= 128 ? 2 : 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static constexpr int kBoundBlocks = kBlocks;
#else
  static constexpr int kBoundBlocks = 1;
#endif
};

// How a launch is cut into blocks, and a block into units.
struct BandImagesTiling {
  static constexpr int kMaxUnits = 64;

  int groups, rows, tiles_h;  // of a block: sixteens of images, rows of outputs; blocks of an image
  int early_rows;             // of input: what the warps' first units read of the first sixteen images
  bool all_early;             // they read other images as well
  int image_pitch;            // elements of shared memory from image to image
  int in_vector;              // elements a copy
  bool pairs;                 // outputs are stored by twos
  int round;                  // blocks, one on each multiprocessor
  unsigned char begin[kBandImagesWarps + 1], unit[kMaxUnits];  // those of a warp
};

// Unit: column group, rows, sixteen images, in one number.
template <class Traits>
struct BandUnit {
  int column_group, row, group;  // row: counted from the block's first

  __host__ __device__ BandUnit(int unit, const BandImagesTiling& tiling) {
    const int rows = divide_up(tiling.rows, Traits::kRows);
    column_group = unit % Traits::kColumnGroups, unit /= Traits::kColumnGroups;
    row = unit % rows * Traits::kRows;
    group = unit / rows;
  }
};

// What a block computes and reads.
struct BandImagesBlock {
  int image, images, channel, row, rows;  // outputs
  int in_row, in_rows, in_columns;        // input inside the image
  static constexpr int channels = 1, in_column = 0, offset = 0;

  template <class Traits>
  __device__ int gap(const BandImagesTiling& tiling) const {
    return tiling.image_pitch - in_rows * Traits::kPitch * kChunk;
  }
  __device__ LoadedRows loaded() const { return {in_row, in_rows, 0, images * in_rows}; }

  __device__ BandImagesBlock(const DirectArgs& args, const BandImagesTiling& tiling) {
    unsigned block = ptx::opaque(blockIdx.x);  // not kept in registers through a unit
    row = block % tiling.tiles_h * tiling.rows, block /= tiling.tiles_h;
    channel = block % static_cast<unsigned>(args.out_c);
    image = block / static_cast<unsigned>(args.out_c) * tiling.groups * kBandImages;
    images = min(tiling.groups * kBandImages, static_cast<int>(args.n) - image);
    rows = min(tiling.rows, args.out_h - row);
    in_row = max(0, row - args.padding_h);
    in_rows = max(0, min(args.h, row + rows - 1 - args.padding_h + args.kernel_h) - in_row);
    in_columns = args.w;
  }
};

// Deals a block's units to its warps, from the first row down: each to the partition that has the fewest products so far,
// and there to the warp that has.
template <class Traits>
void deal_units(BandImagesTiling& tiling, const DirectArgs& args) {
  const int units = tiling.groups * divide_up(tiling.rows, Traits::kRows) * Traits::kColumnGroups;
  int cost[kBandImagesWarps] = {}, owner[BandImagesTiling::kMaxUnits];
  for (int k = 0; k < units; ++k) {
    const BandUnit<Traits> unit(k, tiling);
    int pairs = 0;  // of rows of outputs and of input
    for (int y = unit.row; y < min_int(unit.row + Traits::kRows, tiling.rows); ++y)
      pairs += max_int(0, min_int(args.h, y - args.padding_h + args.kernel_h) - max_int(0, y - args.padding_h));
    const auto of_partition = [&](int w) { return cost[w % kPartitions] + cost[w % kPartitions + kPartitions]; };
    int warp = 0;
    for (int w = 1; w < kBandImagesWarps; ++w) {
      const int difference = of_partition(w) - of_partition(warp);
      if (difference < 0 || (difference == 0 && cost[w] < cost[warp])) warp = w;
    }
    owner[k] = warp;
    cost[warp] += pairs * Traits::products(unit.column_group) + 1;
  }
  int count = 0;
  tiling.early_rows = 0, tiling.all_early = false;
  for (int warp = 0; warp < kBandImagesWarps; ++warp) {
    tiling.begin[warp] = static_cast<unsigned char>(count);
    for (int k = 0; k < units; ++k)
      if (owner[k] == warp) tiling.unit[count++] = static_cast<unsigned char>(k);
    if (count == tiling.begin[warp]) continue;
    const BandUnit<Traits> first(tiling.unit[tiling.begin[warp]], tiling);
    if (first.group > 0) tiling.all_early = true;
    const int rows = first.row + Traits::kRows - 1 + args.kernel_h;  // of all blocks, whatever their first row
    tiling.early_rows = max_int(tiling.early_rows, rows - (tiling.tiles_h == 1 ? max_int(0, args.padding_h) : 0));
  }
  tiling.begin[kBandImagesWarps] = static_cast<unsigned char>(count);
}

}  // namespace depthwise
