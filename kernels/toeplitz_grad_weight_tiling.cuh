// How toeplitz_grad_weight is compiled for a kernel's size, and how a launch of it is cut into stages.
#pragma once

#include "direct.cuh"
#include "rectangle.cuh"

namespace depthwise {

// Compiled for the kernel's size in eights of rows and of columns.
template <class T_, int kRowEights, int kColumnEights, int kChunks_, bool kChannelsLast_, bool kRolls_, bool kSkips_>
struct ToeplitzGradWeightTraits {
  using T = T_;
  static constexpr bool kChannelsLast = kChannelsLast_, kRolls = kRolls_, kSkips = kSkips_;
  static constexpr int kChunks = kChunks_;  // of 16 input columns
  static constexpr int kTileColumns = 16 * kChunks, kChunkPairs = divide_up(kChunks, 2);
  static constexpr int kTilesI = kRowEights, kTilesJ = divide_up(kColumnEights, 2);
  static constexpr bool kLastTileHalf = kColumnEights % 2 == 1;
  static constexpr int kMaxSums = 64;                                         // a thread
  static constexpr int kGroups = divide_up(4 * kTilesI * kTilesJ, kMaxSums);  // warps that share the kernel's rows
  static constexpr int kGroupTiles = divide_up(kTilesI, kGroups);
  static_assert(kGroups <= 2);

  static constexpr int kChannels = !kChannelsLast ? 1 : kGroups == 1 ? 8 : 4;
  static constexpr int kWarps = kChannelsLast ? kChannels * kGroups : kToeplitzWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSlots = kWarps / kGroups;  // NCHW: warps that share the rows; channels_last: the channels
  static constexpr int kStages = kChannelsLast ? 1 : 2;
  // Blocks of a multiprocessor that registers must leave room for: 80, 128 or 255 a thread. Those that roll hold tiles of
  // input rows and a row's Toeplitz fragments beside the sums.
  static constexpr int kMostHeld = 90;
  static constexpr int kSums = 4 * kTilesJ * kGroupTiles;
  static constexpr int kSkipping = kSkips ? 6 + 2 * kGroupTiles : 0;  // for what is held across branches
  static constexpr int kHeld = kRolls ? 2 * kChunks * kGroupTiles + 4 * (kChunks + kTilesJ - 1) + kSkipping : 0;
  static constexpr int kBlocks = kSums > 32 || kSums + kHeld > kMostHeld ? 1 : kSums > 8 || kChannelsLast ? 2 : 3;

  // Elements from row to row. Input: an odd number of 16-byte words, so that ldmatrix meets no bank twice.
  // Gradient: the columns a tile of input columns meets, and room to start at a multiple of eight.
  static constexpr int kInputPitch = kTileColumns + 8;
  static constexpr int kGradPitch = kTileColumns + 16 * kTilesJ + 8;
  static constexpr int kReductionBytes = kChannelsLast ? 0 : kWarps / 2 * 32 * 4 * kSums;
};

// How a launch is cut.
struct ToeplitzGradWeightTiling {
  int images, band_rows, tile_columns;      // a stage
  int num_bands, num_column_tiles, stages;  // of a channel
  int image_rows, input_rows;               // shared memory: input rows from image to image, and of a stage
  int warps_per_image;                      // NCHW: that share an image's rows
  int grad_start;                           // first column of a tile's gradient, from its first input column
  int input_vector, grad_vector;            // elements a copy; channels_last: all channels or 1
  int input_lanes, grad_lanes;              // threads along a row, a power of two
  const void *input_end, *grad_end;         // of the tensors
};

struct ToeplitzStage {
  int64_t first_image;
  int images, first_row, rows, first_column, columns;
  bool last_columns;
};

__device__ __forceinline__ ToeplitzStage toeplitz_stage(const GradWeightArgs& args,
                                                        const ToeplitzGradWeightTiling& tiling, int stage_idx) {
  const int column_tile = stage_idx % tiling.num_column_tiles, rest = stage_idx / tiling.num_column_tiles;
  ToeplitzStage stage;
  stage.first_image = static_cast<int64_t>(rest / tiling.num_bands) * tiling.images;
  stage.images = static_cast<int>(min(static_cast<int64_t>(tiling.images), args.n - stage.first_image));
  stage.first_row = rest % tiling.num_bands * tiling.band_rows;
  stage.rows = min(tiling.band_rows, args.out_h - stage.first_row);
  stage.first_column = column_tile * tiling.tile_columns;
  stage.columns = min(tiling.tile_columns, args.w - stage.first_column);
  stage.last_columns = column_tile == tiling.num_column_tiles - 1;
  return stage;
}

// The widest copy that rows of `width` elements allow.
template <class T>
int toeplitz_vector(const void* tensor, int width) {
  int vector = 8;
  while (width % vector != 0 || reinterpret_cast<uintptr_t>(tensor) % (vector * sizeof(T)) != 0) vector /= 2;
  return vector;
}

template <class Traits>
ToeplitzGradWeightTiling toeplitz_tiling(const GradWeightArgs& args) {
  using T = typename Traits::T;
  constexpr int kInputRow = Traits::kInputPitch * 2, kGradRow = Traits::kGradPitch * 2;
  const int budget =
      device_limits().shared_bytes_for(min_int(2, Traits::kBlocks)) / (Traits::kStages * Traits::kChannels);
  ToeplitzGradWeightTiling tiling;
  tiling.num_column_tiles = divide_up(args.w, Traits::kTileColumns);
  tiling.tile_columns = divide_up(divide_up(args.w, tiling.num_column_tiles), 16) * 16;

  constexpr int kMoreRows = 8 * Traits::kGroups * Traits::kGroupTiles - 1;  // that a band's last row meets
  // Input rows from image to image; images of which all rows fit.
  const auto image_rows = [&](int rows) { return max_int(rows + kMoreRows - args.padding_h, args.padding_h + args.h); };
  const int more_rows = args.out_h + kMoreRows - image_rows(args.out_h);  // of the last image
  const int room = (budget - more_rows * kInputRow) / (image_rows(args.out_h) * kInputRow + args.out_h * kGradRow);
  // As many rows as fit, but bands, where there are few images, so that every split has a stage. NCHW: as many as leave
  // least to the split that has most.
  const int most_rows = max_int(1, min_int(args.out_h, (budget - kMoreRows * kInputRow) / (kInputRow + kGradRow)));
  const int least_bands = divide_up(args.out_h, most_rows);
  if constexpr (Traits::kChannelsLast) {
    constexpr int kFewestRows = 8, kEnoughRows = 28;
    const int64_t images = args.n * tiling.num_column_tiles;
    const int wanted_bands = static_cast<int>(divide_up<int64_t>(args.splits, images));
    const int bands = max_int(least_bands, min_int(wanted_bands, divide_up(args.out_h, kFewestRows)));
    tiling.num_bands = divide_up(args.out_h, divide_up(args.out_h, bands));
    tiling.warps_per_image = Traits::kSlots;
    tiling.images = 1;
    if (tiling.num_bands == 1) {
      const int share = static_cast<int>(divide_up<int64_t>(args.n, args.splits));
      const int most = max_int(1, min_int(min_int(divide_up(kEnoughRows, args.out_h), room), share));
      tiling.images = divide_up(share, divide_up(share, most));
    }
  } else {
    ToeplitzCut best{};
    for (int bands = least_bands; bands == least_bands || toeplitz_cuts_into(bands, args.out_h); ++bands) {
      const ToeplitzCut cut = toeplitz_cut(args.n, tiling.num_column_tiles, args.out_h, args.splits, bands,
                                           Traits::kSlots, room, Traits::kRolls);
      if (best.bands == 0 || cut.cost < best.cost) best = cut;
    }
    tiling.num_bands = best.bands, tiling.images = best.images, tiling.warps_per_image = best.slots_per_image;
  }
  tiling.band_rows = divide_up(args.out_h, tiling.num_bands);
  tiling.image_rows = image_rows(tiling.band_rows);
  tiling.input_rows = (tiling.images - 1) * tiling.image_rows + tiling.band_rows + kMoreRows;
  tiling.stages =
      static_cast<int>(divide_up<int64_t>(args.n, tiling.images)) * tiling.num_bands * tiling.num_column_tiles;
  // Column 15 of the last tile of kernel columns reads furthest to the left.
  const int leftmost = args.padding_w - (16 * Traits::kTilesJ - 1);
  tiling.grad_start = (leftmost - 7) / 8 * 8;  // leftmost is at most 0

  if (Traits::kChannelsLast) {
    const auto aligned = [&](const void* tensor) {
      return args.multiplier == 1 && args.out_c % Traits::kChannels == 0 &&
             reinterpret_cast<uintptr_t>(tensor) % (Traits::kChannels * sizeof(T)) == 0;
    };
    tiling.input_vector = aligned(args.input) ? Traits::kChannels : 1;
    tiling.grad_vector = aligned(args.grad_output) ? Traits::kChannels : 1;
    tiling.input_lanes = row_lanes(tiling.tile_columns / 2);
    tiling.grad_lanes = row_lanes(min_int(args.out_w + 1, Traits::kGradPitch) / 2);
  } else {
    tiling.input_vector = toeplitz_vector<T>(args.input, args.w);
    tiling.grad_vector = toeplitz_vector<T>(args.grad_output, args.out_w);
    tiling.input_lanes = row_lanes(divide_up(min_int(args.w, tiling.tile_columns), tiling.input_vector));
    tiling.grad_lanes = row_lanes(divide_up(min_int(args.out_w, Traits::kGradPitch), tiling.grad_vector));
    const int64_t in_planes = args.n * (args.out_c / args.multiplier), planes = args.n * args.out_c;
    tiling.input_end = static_cast<const T*>(args.input) + in_planes * args.h * args.w;
    tiling.grad_end = static_cast<const T*>(args.grad_output) + planes * args.out_h * args.out_w;
  }
  return tiling;
}

}  // namespace depthwise
