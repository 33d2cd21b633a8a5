// How the kernels that compute both gradients at once are cut into blocks: functions of the sizes and the tile.
#pragma once

#include "problem.h"

namespace depthwise {

// "Virtual" rows: images one below the other, kernel / 2 rows of zeros between them. A block takes some of them, of as many
// images as they are, and reads as many rows of grad_output above and below. Blocks that take stages of `step` rows take
// whole ones.
constexpr int virtual_rows(int images, int h, int kernel) { return images * (h + kernel / 2) - kernel / 2; }
inline int virtual_rows_of_block(int all, int blocks, int kernel, int step) {
  const int halo = kernel / 2 * 2;
  const int rows = divide_up(divide_up(all, max_int(1, blocks)) + halo, step) * step - halo;
  return max_int(rows, step);
}

// gradients_nhwc. A thread: a strip of columns of one channel, or of two of 16 bits where registers hold their sums.
constexpr int kGradientsColumns = 4;
constexpr int gradients_vector(int kernel, int element_bytes) { return kernel == 3 && element_bytes == 2 ? 2 : 1; }
constexpr int gradients_threads(int kernel) { return kernel == 3 ? 256 : 192; }  // of a block, at most

struct GradientsNhwcTiling {
  int tiles_w, blocks_w;    // strips of a block; blocks side by side
  int images, walk_images;  // images side by side in a block; one below the other
  int rows, splits;         // virtual rows of a block; blocks of a group of channels
};

// One block a multiprocessor: rings of several stages fill its shared memory.
inline GradientsNhwcTiling gradients_nhwc_tiling(const GradWeightArgs& args, int lanes, int element_bytes,
                                                 int64_t most_splits) {
  GradientsNhwcTiling tiling{};
  const int kernel = args.kernel_h, n = static_cast<int>(args.n);
  const int all = divide_up(args.w, kGradientsColumns), most = gradients_threads(kernel) / lanes;
  tiling.blocks_w = divide_up(all, most);
  tiling.tiles_w = divide_up(all, tiling.blocks_w);
  const int beside = tiling.blocks_w > 1 ? 1 : max_int(1, min_int(n, most / tiling.tiles_w));
  tiling.walk_images = divide_up(n, beside);
  tiling.images = divide_up(n, tiling.walk_images);
  const int64_t groups = divide_up<int64_t>(args.out_c, lanes * gradients_vector(kernel, element_bytes));
  const int64_t wanted = min_int64(kMultiprocessors / groups, most_splits) / tiling.blocks_w;
  const int all_rows = virtual_rows(tiling.walk_images, args.h, kernel);
  tiling.rows = virtual_rows_of_block(all_rows, static_cast<int>(wanted), kernel, kernel);
  tiling.splits = divide_up(all_rows, tiling.rows) * tiling.blocks_w;
  return tiling;
}

// gradients_nchw. A group of lanes walks down one channel, 16 bytes a lane; rows wider than a warp take several.
constexpr int kGradientsWarps = 4;  // of a block

struct GradientsNchwTiling {
  int lanes, groups, warps;  // of a row in a warp; rows of a warp; warps of a row
  int rows, splits;          // virtual rows of a group; blocks of a channel
};

inline GradientsNchwTiling gradients_nchw_tiling(const GradWeightArgs& args, int element_bytes, int64_t most_splits) {
  GradientsNchwTiling tiling{};
  const int lanes = args.w * element_bytes / 16, blocks = element_bytes == 2 ? 4 : 5;  // of a multiprocessor
  tiling.lanes = min_int(lanes, 32);
  tiling.groups = lanes > 32 ? 1 : 32 / tiling.lanes;
  tiling.warps = divide_up(lanes, 32);
  const int64_t wanted = max_int64(divide_up(tiling.warps, kGradientsWarps),
                                   min_int64(blocks * kMultiprocessors / args.out_c, most_splits));
  const int all_rows = virtual_rows(static_cast<int>(args.n), args.h, args.kernel_h);
  const int parts = max_int(1, static_cast<int>(wanted) * kGradientsWarps / tiling.warps) * tiling.groups;
  tiling.rows = virtual_rows_of_block(all_rows, parts, args.kernel_h, args.kernel_h);
  const int units = divide_up(divide_up(all_rows, tiling.rows), tiling.groups) * tiling.warps;
  tiling.splits = divide_up(units, kGradientsWarps);
  return tiling;
}

// gradients_planes_nchw. A block: some planes of neighbouring channels, of several images one after the other. A thread: a
// strip of columns, and a part of the rows, of a plane.
constexpr int kGradientsStrip = 7, kGradientsParts = 4, kGradientsPlaneBlocks = 8;
constexpr int gradients_plane_threads(int kernel) { return kernel == 3 ? 256 : 160; }  // of a block, at most
constexpr int kMaxGradientsPlaneBytes = 56 << 10;                                      // of one of the two tensors

struct GradientsPlanesTiling {
  int planes, strips, parts, part_rows;
  int images, splits;  // images of a block; blocks of a group of planes
  int bytes;           // of a stage's planes of one tensor
  int threads() const { return divide_up(planes * strips * parts, 32) * 32; }
};

inline GradientsPlanesTiling gradients_planes_tiling(const GradWeightArgs& args, int element_bytes,
                                                     int64_t most_splits) {
  GradientsPlanesTiling tiling{};
  tiling.strips = divide_up(args.w, kGradientsStrip);
  tiling.part_rows = divide_up(args.h, kGradientsParts);
  tiling.parts = divide_up(args.h, tiling.part_rows);
  // Two warps, but planes enough to be copied in whole words.
  tiling.planes = 4;
  while (2 * tiling.planes * tiling.strips <= 16) tiling.planes *= 2;
  const int64_t plane_bytes = static_cast<int64_t>(args.h) * args.w * element_bytes;
  while (tiling.planes * plane_bytes % 16 != 0) tiling.planes *= 2;
  const int64_t bytes = tiling.planes * plane_bytes;
  tiling.bytes = static_cast<int>(min_int64(bytes, kInt32Max));
  const int64_t groups = divide_up<int64_t>(args.out_c, tiling.planes);
  const int64_t wanted =
      max_int64(1, min_int64(min_int64(kGradientsPlaneBlocks * kMultiprocessors / groups, most_splits), args.n));
  tiling.images = static_cast<int>(divide_up(args.n, wanted));
  tiling.splits = static_cast<int>(divide_up(args.n, tiling.images));
  return tiling;
}

}  // namespace depthwise
