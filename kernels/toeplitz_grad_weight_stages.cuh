// How toeplitz_grad_weight is compiled for a kernel's size, how a launch of it is cut into stages, and what is copied of
// them.
#pragma once

#include "direct.cuh"
#include "rectangle.cuh"
#include "tensor_core.cuh"
#include "toeplitz_grad_weight_tiling.h"

namespace depthwise {

// Compiled for the kernel's size in sixteens of rows and of columns, and for the columns of a stage in eights.
template <class T_, int kRowSixteens, int kColumnSixteens, int kEights_, bool kChannelsLast_>
struct ToeplitzGradWeightTraits {
  using T = T_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kEights = kEights_;  // of input columns
  static constexpr int kTileColumns = 8 * kEights, kPairs = kEights / 2;
  static constexpr bool kHasSingle = kEights % 2 == 1;  // an eight that has no partner
  static constexpr ToeplitzGradWeightLayout kLayout =
      toeplitz_grad_weight_layout(kRowSixteens, kColumnSixteens, kEights, kChannelsLast);
  static constexpr int kTileRows = kToeplitzTileRows, kTilesJ = kLayout.tiles_j;
  static constexpr int kGroups = kLayout.groups, kGroupTiles = kLayout.group_tiles;
  static constexpr int kGroupRows = kTileRows * kGroupTiles;
  static_assert(kGroups <= 2);

  static constexpr int kChannels = kLayout.channels;
  static constexpr int kWarps = kChannelsLast ? kChannels * kGroups : kToeplitzWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSlots = kWarps / kGroups;  // NCHW: warps that share the rows; channels_last: the channels
  static constexpr int kStages = kChannelsLast ? 1 : 2;
  // A row's Toeplitz fragments of even and of odd offsets: a step of two columns to the right is one, of two tiles of
  // kernel columns to the left.
  static constexpr int kFragments = kEights + kTilesJ - 2;
  // The last step of a row that multiplies by a fragment; -1 where none does.
  static constexpr int last_step(int fragment) {
    int last = -1;
    for (int eight = 0; eight < kEights; ++eight)
      for (int m = 0; m < kTilesJ; m += 2)
        if (eight - m + kTilesJ - 2 == fragment) {
          const int step = eight < 2 * kPairs ? eight % kPairs : kPairs;
          last = step > last ? step : last;
        }
    return last;
  }
  static constexpr int kSums = 4 * kTilesJ * kGroupTiles;
  // Blocks of a multiprocessor that registers must leave room for: 128 or 255 a thread.
  static constexpr int kMostHeld = 96;
  static constexpr int kHeld = kSums + 2 * kEights * kGroupTiles + 2 * kFragments;
  static constexpr int kBlocks = kSums > 32 || kHeld > kMostHeld ? 1 : 2;

  static constexpr int kInputPitch = kLayout.input_pitch, kGradPitch = kLayout.grad_pitch;
  // The sums' way out: floats from one of a thread's sums to the next, so that those of a kernel row meet few banks
  // twice. NCHW: of half of the warps; channels_last: of 16 kernel rows.
  static constexpr int kSumPitch = 33, kWarpSums = kSumPitch * (kChannelsLast ? 4 * kTilesJ : kSums);
  static constexpr int kReductionBytes = 4 * kWarpSums * (kChannelsLast ? kWarps : kWarps / 2);
};

// Blocks of a multiprocessor that registers leave room for: fewer where bfloat16 is multiplied by calls.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class Traits>
constexpr int kLeastBlocks = is_bfloat16<typename Traits::T> ? 1 : Traits::kBlocks;
#else
template <class Traits>
constexpr int kLeastBlocks = Traits::kBlocks;
#endif

// How a launch is cut.
struct ToeplitzGradWeightTiling {
  int images, band_rows, tile_columns;      // a stage
  int num_bands, num_column_tiles, stages;  // of a channel
  int split_stages, longer_splits;          // of a split; splits that have one more
  int image_rows, input_rows;               // shared memory: input rows from image to image, and of a stage or ring
  int step_rows, step_input_rows;           // channels_last: of the gradient, which a step multiplies, and that it adds
  int first_step, fill_step_rows;           // 0 or, of a ring, negative; input rows that a negative step adds
  int first_input_row, zero_rows;           // of step 0, from a stage's first row on; above it in shared memory
  int plane_elements;                       // of a stage, or of a channel's ring and step
  int grad_columns, step_pixels;            // channels_last: that are copied; of a step
  SmallDivider grad_eights;
  int grad_start;                       // first column of a tile's gradient, from its first input column
  int input_vector, grad_vector;        // elements a copy; channels_last: channels, all of them at most
  int input_lane_bits, grad_lane_bits;  // threads along a row, as powers of two
  int in_channels;
  int64_t input_image, grad_image;   // elements of an image
  const void *input_end, *grad_end;  // of the tensors
};

struct ToeplitzStage {
  int first_image, images, first_row, rows, first_column, columns;
  bool last_columns;
};

// Walks from stage to stage: tiles of columns first, then bands, then images.
struct ToeplitzWalk {
  int column_tile, band, first_image;

  __device__ __forceinline__ ToeplitzWalk(const ToeplitzGradWeightTiling& tiling, int stage_idx) {
    // A division takes as long as a row of grad_output.
    const int rest = tiling.num_column_tiles == 1 ? stage_idx : stage_idx / tiling.num_column_tiles;
    column_tile = stage_idx - rest * tiling.num_column_tiles;
    const int group = tiling.num_bands == 1 ? rest : rest / tiling.num_bands;
    band = rest - group * tiling.num_bands;
    first_image = group * tiling.images;
  }
  __device__ __forceinline__ void advance(const ToeplitzGradWeightTiling& tiling) {
    if (++column_tile < tiling.num_column_tiles) return;
    column_tile = 0;
    if (++band < tiling.num_bands) return;
    band = 0;
    first_image += tiling.images;
  }
  __device__ __forceinline__ ToeplitzStage stage(const GradWeightArgs& args,
                                                 const ToeplitzGradWeightTiling& tiling) const {
    ToeplitzStage stage;
    stage.first_image = first_image;
    stage.images = min(tiling.images, static_cast<int>(args.n) - first_image);
    stage.first_row = band * tiling.band_rows;
    stage.rows = min(tiling.band_rows, args.out_h - stage.first_row);
    stage.first_column = column_tile * tiling.tile_columns;
    stage.columns = min(tiling.tile_columns, args.w - stage.first_column);
    stage.last_columns = column_tile == tiling.num_column_tiles - 1;
    return stage;
  }
};

struct ToeplitzSizes {
  int64_t image, row;  // elements
  int height, width;
};
// Of a tile of columns: [low, high) from `start` on, which itself is counted from the tile's first input column.
struct ToeplitzColumns {
  int start, low, high;
};

// What is copied of a stage's rows; where to, and which channel of NCHW or which pixels, is to be completed.
template <class T>
__device__ __forceinline__ Rectangle<T, T> toeplitz_rows(const void* tensor, ToeplitzSizes sizes,
                                                         ToeplitzColumns columns, const ToeplitzStage& stage,
                                                         int first_row, int rows) {
  Rectangle<T, T> r;
  r.global = static_cast<const T*>(tensor) + stage.first_image * sizes.image;
  r.image_stride = sizes.image;
  r.row_stride = sizes.row;
  r.images = stage.images;
  r.rows = rows;
  r.first_row = first_row;
  r.height = sizes.height;
  r.first_column = stage.first_column + columns.start;
  r.width = sizes.width;
  r.low = columns.low;
  r.high = columns.high;
  return r;
}
template <class Traits>
__device__ __forceinline__ Rectangle<typename Traits::T, typename Traits::T> toeplitz_input(
    const GradWeightArgs& args, const ToeplitzGradWeightTiling& tiling, const ToeplitzStage& stage, int first_row,
    int rows) {
  const ToeplitzSizes sizes{tiling.input_image,
                            Traits::kChannelsLast ? static_cast<int64_t>(args.w) * tiling.in_channels : args.w, args.h,
                            args.w};
  const ToeplitzColumns columns{0, 0, tiling.num_column_tiles == 1 ? args.w : tiling.tile_columns};
  return toeplitz_rows<typename Traits::T>(args.input, sizes, columns, stage, first_row, rows);
}
template <class Traits>
__device__ __forceinline__ Rectangle<typename Traits::T, typename Traits::T> toeplitz_grad(
    const GradWeightArgs& args, const ToeplitzGradWeightTiling& tiling, const ToeplitzStage& stage, int first_row,
    int rows) {
  const bool one_column_tile = tiling.num_column_tiles == 1;
  const ToeplitzSizes sizes{tiling.grad_image, Traits::kChannelsLast ? args.out_w * args.out_c : args.out_w, args.out_h,
                            args.out_w};
  const ToeplitzColumns columns{tiling.grad_start, one_column_tile ? -tiling.grad_start : 0,
                                one_column_tile ? args.out_w - tiling.grad_start : Traits::kGradPitch};
  return toeplitz_rows<typename Traits::T>(args.grad_output, sizes, columns, stage, first_row, rows);
}

// Planes, and of channels_last the pixels of a step: of input, then of the gradient.
template <class Traits>
int toeplitz_shared_bytes(const ToeplitzGradWeightTiling& tiling) {
  static_assert(kPixelElements == kGranule);
  return max_int(Traits::kReductionBytes,
                 Traits::kLayout.shared_bytes(Traits::kStages, tiling.plane_elements, tiling.step_pixels));
}

template <class Traits>
ToeplitzGradWeightTiling toeplitz_tiling(const GradWeightArgs& args) {
  using T = typename Traits::T;
  constexpr int kInputRow = Traits::kInputPitch * 2, kGradRow = Traits::kGradPitch * 2;
  const int budget = device_limits().shared_bytes_for(Traits::kBlocks);
  constexpr int kRowsOfKernel = Traits::kLayout.kernel_rows();
  ToeplitzGradWeightTiling tiling{};
  tiling.num_column_tiles = divide_up(args.w, Traits::kTileColumns);
  tiling.tile_columns = divide_up(divide_up(args.w, tiling.num_column_tiles), 8) * 8;
  if constexpr (Traits::kChannelsLast) {
    // Bands, where there are few images, so that every split has a stage.
    constexpr int kFewestRows = 8;
    const int64_t images = args.n * tiling.num_column_tiles;
    const int wanted_bands = static_cast<int>(divide_up<int64_t>(args.splits, images));
    const int bands = min_int(wanted_bands, divide_up(args.out_h, kFewestRows));
    tiling.num_bands = divide_up(args.out_h, divide_up(args.out_h, bands));
    tiling.band_rows = divide_up(args.out_h, tiling.num_bands);
    tiling.images = 1;
    tiling.grad_columns = tiling.num_column_tiles == 1 ? divide_up(args.out_w, 8) * 8 : Traits::kGradPitch;
    tiling.grad_eights = SmallDivider(tiling.grad_columns / 8);
    const auto fits = [&] {
      const int grad_rows = divide_up(tiling.step_rows, 4) * 4;
      tiling.plane_elements = Traits::kLayout.plane_elements(tiling.input_rows, grad_rows);
      tiling.step_pixels = tiling.step_input_rows * Traits::kTileColumns + grad_rows * tiling.grad_columns;
      return toeplitz_shared_bytes<Traits>(tiling) <= budget;
    };
    tiling.step_rows = args.out_h;
    tiling.step_input_rows = divide_up(args.h, 4) * 4;
    tiling.zero_rows = args.padding_h;
    tiling.input_rows = max_int(args.padding_h + tiling.step_input_rows, args.out_h + kRowsOfKernel - 1);
    if (tiling.num_bands > 1 || !fits()) {  // a ring
      tiling.zero_rows = 0;
      for (int rows = kMostToeplitzStepRows;; rows /= 2) {
        tiling.step_rows = tiling.step_input_rows = rows;
        tiling.input_rows = kRowsOfKernel + rows;
        if (fits() || rows == kFewestToeplitzStepRows) break;
      }
      tiling.first_input_row = kRowsOfKernel - args.padding_h;
      // In one step, if that takes no more pixels than others.
      tiling.fill_step_rows =
          kRowsOfKernel * Traits::kTileColumns <= tiling.step_pixels ? kRowsOfKernel : tiling.step_rows;
      tiling.first_step = -(kRowsOfKernel / tiling.fill_step_rows);
    }
  } else {
    constexpr int kMoreRows = kRowsOfKernel - 1;  // that a band's last row meets
    const int stage_budget = budget / Traits::kStages;
    // Input rows from image to image; images of which all rows fit.
    const auto image_rows = [&](int rows) {
      return max_int(rows + kMoreRows - args.padding_h, args.padding_h + args.h);
    };
    const int more_rows = args.out_h + kMoreRows - image_rows(args.out_h);  // of the last image
    const int room =
        (stage_budget - more_rows * kInputRow) / (image_rows(args.out_h) * kInputRow + args.out_h * kGradRow);
    // As many rows as fit, but as many bands as leave least to the split that has most.
    const int most_rows =
        max_int(1, min_int(args.out_h, (stage_budget - kMoreRows * kInputRow) / (kInputRow + kGradRow)));
    const int least_bands = divide_up(args.out_h, most_rows);
    ToeplitzCut best{};
    for (int bands = least_bands; bands == least_bands || toeplitz_cuts_into(bands, args.out_h); ++bands) {
      const ToeplitzCut cut =
          toeplitz_cut(args.n, tiling.num_column_tiles, args.out_h, args.splits, bands, Traits::kSlots, room);
      if (best.bands == 0 || cut.cost < best.cost) best = cut;
    }
    tiling.num_bands = best.bands, tiling.images = best.images;
    tiling.band_rows = divide_up(args.out_h, tiling.num_bands);
    tiling.image_rows = image_rows(tiling.band_rows);
    tiling.input_rows = (tiling.images - 1) * tiling.image_rows + tiling.band_rows + kMoreRows;
    tiling.plane_elements =
        tiling.input_rows * Traits::kInputPitch + tiling.images * tiling.band_rows * Traits::kGradPitch;
  }
  tiling.stages =
      static_cast<int>(divide_up<int64_t>(args.n, tiling.images)) * tiling.num_bands * tiling.num_column_tiles;
  tiling.split_stages = tiling.stages / args.splits, tiling.longer_splits = tiling.stages % args.splits;
  // The last kernel column reads furthest to the left.
  const int leftmost = args.padding_w - (8 * Traits::kTilesJ - 1);
  tiling.grad_start = (leftmost - 7) / 8 * 8;  // leftmost is at most 0

  tiling.in_channels = static_cast<int>(args.out_c / args.multiplier);
  tiling.input_image = static_cast<int64_t>(tiling.in_channels) * args.h * args.w;
  tiling.grad_image = args.out_c * args.out_h * args.out_w;
  if (Traits::kChannelsLast) {
    const auto vector = [&](const void* tensor) {
      return args.multiplier == 1 ? copy_width(tensor, args.out_c, Traits::kChannels) : 1;
    };
    tiling.input_vector = vector(args.input);
    tiling.grad_vector = vector(args.grad_output);
    // Two pixels at once, or pieces of one.
    const auto lane_bits = [](int columns, int vector) {
      return row_lane_bits(vector == 1 ? columns / 2 : columns * (Traits::kChannels / vector));
    };
    tiling.input_lane_bits = lane_bits(Traits::kTileColumns, tiling.input_vector);
    tiling.grad_lane_bits = lane_bits(tiling.grad_columns, tiling.grad_vector);
  } else {
    tiling.input_vector = copy_width(args.input, args.w);
    tiling.grad_vector = copy_width(args.grad_output, args.out_w);
    const auto step = [](int vector) { return vector == 1 ? kEight : vector; };  // rows on any boundary: by eights
    tiling.input_lane_bits = row_lane_bits(divide_up(min_int(args.w, tiling.tile_columns), step(tiling.input_vector)));
    tiling.grad_lane_bits = row_lane_bits(divide_up(min_int(args.out_w, Traits::kGradPitch), step(tiling.grad_vector)));
    const int64_t in_planes = args.n * (args.out_c / args.multiplier), planes = args.n * args.out_c;
    tiling.input_end = static_cast<const T*>(args.input) + in_planes * args.h * args.w;
    tiling.grad_end = static_cast<const T*>(args.grad_output) + planes * args.out_h * args.out_w;
  }
  return tiling;
}

}  // namespace depthwise
