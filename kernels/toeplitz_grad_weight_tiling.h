// How toeplitz_grad_weight's shared memory is laid out and its images are cut: pure functions of the problem, for what it
// can serve and the plan of the splits as for the kernel and its launcher.
#pragma once

#include "problem.h"

namespace depthwise {

// Input columns of a stage, in eights, where stages have `most` columns at most.
constexpr int toeplitz_eights(int64_t width, int most) {
  const int64_t tiles = (width + most - 1) / most;
  return static_cast<int>(((width + tiles - 1) / tiles + 7) / 8);
}

// Kernel rows, and rows of input, of a tile.
constexpr int kToeplitzTileRows = 16;
// channels_last: rows of the gradient that a step of a ring multiplies; powers of two that divide a tile's.
constexpr int kMostToeplitzStepRows = 16, kFewestToeplitzStepRows = 4;

// A block, for a kernel's size in sixteens of rows and of columns, and for a stage's columns in eights.
struct ToeplitzGradWeightLayout {
  int tiles_i, tiles_j;     // of 16 kernel rows; of 8 kernel columns
  int groups, group_tiles;  // warps that share the kernel's rows; tiles_i of each
  int channels;
  // Elements from row to row. Input: an odd number of 16-byte words, so that ldmatrix meets no bank twice. Gradient: the
  // columns a tile of input columns meets, and room to start at a multiple of eight.
  int input_pitch, grad_pitch;

  constexpr int kernel_rows() const { return kToeplitzTileRows * groups * group_tiles; }
  // channels_last: of a channel's rows; stores to eight planes meet no bank twice.
  constexpr int plane_elements(int input_rows, int grad_rows) const {
    return ((input_rows * input_pitch + grad_rows * grad_pitch) / 8 | 1) * 8;
  }
  // Some planes of every channel and, as they come, some pixels; of 16 bits.
  constexpr int shared_bytes(int planes, int elements, int pixels) const {
    return 2 * (planes * channels * elements + pixels * kGranule);
  }
};

constexpr ToeplitzGradWeightLayout toeplitz_grad_weight_layout(int row_sixteens, int column_sixteens, int eights,
                                                               bool channels_last) {
  constexpr int kMaxSums = 64;  // a thread
  ToeplitzGradWeightLayout layout{row_sixteens, 2 * column_sixteens};
  layout.groups = divide_up(4 * layout.tiles_i * layout.tiles_j, kMaxSums);
  layout.group_tiles = divide_up(layout.tiles_i, layout.groups);
  layout.channels = !channels_last ? 1 : layout.groups == 1 ? 8 : 4;
  layout.input_pitch = 8 * (eights | 1);
  layout.grad_pitch = 8 * eights + 8 * layout.tiles_j + 8;
  return layout;
}

// NCHW: how images are cut into stages, for which a block's `slots` (warps, or pairs of them) take rows: a stage is some
// images, or a band of rows of one.
constexpr int kToeplitzWarps = 8, kMostToeplitzBands = 8;
// From one of a slot's rows to its next: of two tiles of input rows, one is in registers already.
constexpr int kToeplitzRowStep = kToeplitzTileRows;

struct ToeplitzCut {
  int bands, images;
  int64_t cost;  // of the split that has most stages: in rows of all slots, and what stages cost beside
};
// `bands`: as many as are wanted; `room`: for images of a stage.
constexpr ToeplitzCut toeplitz_cut(int64_t n, int64_t column_tiles, int out_h, int64_t splits, int bands, int slots,
                                   int room) {
  constexpr int kStageCost = 7, kFewestImages = 2, kStageRows = 72;
  const int rows = divide_up(out_h, bands);
  ToeplitzCut cut{divide_up(out_h, rows), 1, 0};
  if (cut.bands == 1) {
    const int64_t share = divide_up(n, splits),
                  enough = rows * kFewestImages > kStageRows ? kFewestImages : kStageRows / rows,
                  most = enough < room ? enough : room;
    const int64_t images = most < 1 ? 1 : most < share ? most : share;
    cut.images = static_cast<int>(divide_up(share, divide_up(share, images)));
  }
  const int64_t stages = divide_up(divide_up(n, static_cast<int64_t>(cut.images)) * cut.bands * column_tiles, splits);
  // Of the slot that has most of them: whole rounds, and what is left of all images, dealt evenly.
  const int64_t slot_rows = cut.images * (rows / kToeplitzRowStep) * (kToeplitzRowStep / slots) +
                            divide_up(cut.images * (rows % kToeplitzRowStep), slots);
  cut.cost = stages * (slot_rows * slots + cut.images * kStageCost);
  return cut;
}
constexpr bool toeplitz_cuts_into(int bands, int out_h) {
  return bands <= kMostToeplitzBands && (bands - 1) * kToeplitzWarps < out_h;
}

}  // namespace depthwise
