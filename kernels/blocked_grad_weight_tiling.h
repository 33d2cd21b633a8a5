// How blocked_grad_weight is cut: pure functions of the problem, of a thread's taps and of shared memory, for the plan of
// the splits as for the launcher.
#pragma once

#include "problem.h"

namespace depthwise {

constexpr int kBlockedSharedBytes = 48 << 10;      // of a block everywhere
constexpr int kBlockedMostSharedBytes = 72 << 10;  // where a multiprocessor has them for each block
constexpr int kStrip = 4;                          // columns of grad_output a step takes
constexpr int kBlockedTileColumns = 64;            // of grad_output a stage holds, at most

// More taps a thread: 168 registers leave the compiler a choice of banks; of 128, one multiply-add in seven of 4x8 taps has
// all operands in one bank.
constexpr int kBlockedFewTaps = 24;

struct BlockedGradWeightShape {
  int rows, columns;    // taps of a thread
  int threads, blocks;  // of a block, at most; of a multiprocessor, by registers
};

// `is_roomy`: registers for many taps and for sums of parts.
constexpr BlockedGradWeightShape blocked_grad_weight_shape(int rows, int columns, bool is_roomy) {
  return {rows, columns, is_roomy ? 128 : 256, is_roomy ? 3 : 2};
}

struct BlockedGradWeightCut {
  int images, band_rows, tile_columns;      // of grad_output: a stage
  int num_bands, num_column_tiles, stages;  // of a channel
  int input_rows;                           // of an image in a stage, at most
  int tiles_h, tiles_w, groups;             // threads: register tiles of the kernel, and those that share the strips
  int input_pitch;                          // columns of an input row: those that the tile's meet

  constexpr int threads() const { return (tiles_h * tiles_w * groups + 31) / 32 * 32; }
  constexpr int input_elements() const { return images * input_rows * input_pitch; }
  // rows - 1 rows of zeros above and below each image, of a thread's `rows` taps.
  constexpr int grad_elements(int rows) const { return (images * (band_rows + rows - 1) + rows - 1) * tile_columns; }
  // The sums of all threads take the room of a stage at the end.
  constexpr int shared_bytes(const BlockedGradWeightShape& shape) const {
    const int stage = input_elements() + grad_elements(shape.rows), sums = shape.rows * shape.columns * threads();
    return 4 * (stage > sums ? stage : sums);
  }
};

// Estimates the cycles of a launch on an H100, for all blocks as long as the longest: 7 problems in two layouts took 0.74
// to 1.3 times as long, the less the more uneven their splits were.
template <class Args>
double blocked_grad_weight_cycles(const Args& args, const BlockedGradWeightShape& shape,
                                  const BlockedGradWeightCut& cut, int64_t splits) {
  constexpr int kMultiprocessors = 132, kSharedBytes = 228 << 10;
  // Issue slots a cycle of a scheduler and of a warp that is alone there; cycles until a block loads, for each float that
  // a thread then loads, and of a stage and of a block beside; bytes a cycle of the sums' way to the second pass and back.
  constexpr double kIssueRate = 0.85, kWarpRate = 0.67, kTail = 0.3;
  constexpr double kStartCycles = 13600, kFloatCycles = 60, kStageCycles = 3400, kEndCycles = 5000, kBytes = 1750;
  const auto up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const auto least = [](int a, int b) { return a < b ? a : b; };
  const int n = static_cast<int>(args.n), h = static_cast<int>(args.h), w = static_cast<int>(args.w);
  const int out_h = static_cast<int>(args.out_h), padding_h = static_cast<int>(args.padding_h);
  const int threads = cut.threads(), warps = threads / 32, strips = cut.tile_columns / kStrip;

  // Steps down a strip of a whole image, of all tiles and of the one that has most; bands add those between them.
  int all_steps = 0, most_steps = 0;
  for (int tile = 0; tile < cut.tiles_h; ++tile) {
    const int shift = tile * shape.rows - padding_h;
    const int steps = least(out_h + shape.rows - 1, h - shift) - (shift < 0 ? -shift : 0);
    if (steps > 0) all_steps += steps;
    if (steps > most_steps) most_steps = steps;
  }
  const int between = (cut.num_bands - 1) * (shape.rows - 1);
  const double mean = (static_cast<double>(all_steps) / cut.tiles_h + between) / cut.num_bands;
  const double most = least(most_steps, cut.band_rows + shape.rows - 1);
  // Issue slots of a strip: steps of multiply-adds, loads and sums of parts, and what surrounds them.
  const int taps = shape.rows * shape.columns;
  const double step_slots = taps * kStrip + shape.columns / 4 + 8 + taps / 16, strip_slots = 80 + taps;
  const int rounds = up(cut.images * strips, cut.groups);
  const int fewer = rounds - up(((n - 1) % cut.images + 1) * strips, cut.groups);  // of the last stage
  const int stages = up(cut.stages, splits);                                       // of a block, at most
  const double longest = stages * rounds * (most * step_slots + strip_slots);
  const double work =
      (stages * rounds - static_cast<double>(fewer) / splits) * (mean * step_slots + strip_slots) * warps;

  const int by_memory = kSharedBytes / (cut.shared_bytes(shape) + 1024),
            by_threads = shape.threads * shape.blocks / threads;
  const int places = by_memory < 1 ? 1 : least(by_memory, by_threads);
  const int blocks = up(args.out_c * splits, kMultiprocessors);  // of the multiprocessor that has most
  const int in_columns = least(w, cut.input_pitch);
  const double floats =
      cut.images * (static_cast<double>(cut.input_rows) * in_columns + cut.band_rows * cut.tile_columns);
  const double load = kStartCycles + kEndCycles + stages * (kStageCycles + kFloatCycles * floats / threads);
  // Warps wait for themselves, or for each other, at last for the slowest; where both count, for longer: the sixth root of
  // the sum of sixth powers.
  const int block_rounds = up(blocks, places);
  const double alone = block_rounds * (load + longest / kWarpRate);
  const double together =
      load + blocks * work / 4 / kIssueRate + (block_rounds - 1) * load / places + kTail * longest / kWarpRate;
  const double high = alone > together ? alone : together, low = alone > together ? together : alone;
  const double ratio = low / high * (low / high);
  const double second_pass = splits > 1 ? 8.0 * args.out_c * splits * args.kernel_h * args.kernel_w / kBytes : 0;
  return high * (1 + ratio * ratio * ratio / 6) + second_pass;
}

// The cut for so many splits of a channel, with as many images a stage as is estimated to be the fastest.
template <class Args>
BlockedGradWeightCut blocked_grad_weight_cut(const Args& args, const BlockedGradWeightShape& shape, int64_t splits,
                                             int shared_bytes) {
  constexpr int kFewestRows = 8, kMostTries = 6;
  const auto up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const auto least = [](int a, int b) { return a < b ? a : b; };
  const auto most = [](int a, int b) { return a > b ? a : b; };
  const int h = static_cast<int>(args.h), kernel_h = static_cast<int>(args.kernel_h);
  const int out_h = static_cast<int>(args.out_h), out_w = static_cast<int>(args.out_w);
  const int halo = shape.rows - 1;
  BlockedGradWeightCut cut{};
  cut.tiles_h = up(kernel_h, shape.rows);
  cut.tiles_w = up(args.kernel_w, shape.columns);
  const int max_groups = shape.threads / (cut.tiles_h * cut.tiles_w);
  cut.num_column_tiles = up(out_w, kBlockedTileColumns);
  cut.tile_columns = up(up(out_w, cut.num_column_tiles), kStrip) * kStrip;
  cut.input_pitch = cut.tile_columns + cut.tiles_w * shape.columns;

  // As many rows as fit. Few images: bands, so that every split has a stage.
  const int budget = shared_bytes / 4 - 2 * halo * cut.tile_columns;  // floats
  const int in_row = cut.input_pitch, grad_row = cut.tile_columns;
  const int fitting = (budget - (kernel_h - 1) * in_row) / (in_row + grad_row);
  const int fitting_whole = h < budget / in_row ? (budget - h * in_row) / grad_row : 0;
  const int rows = most(1, least(out_h, most(fitting, fitting_whole)));
  const int wanted_bands = up(splits, args.n * cut.num_column_tiles);
  const int bands = most(up(out_h, rows), least(wanted_bands, up(out_h, kFewestRows)));
  cut.band_rows = up(out_h, bands);
  cut.num_bands = up(out_h, cut.band_rows);
  cut.input_rows = least(h, cut.band_rows + kernel_h - 1);

  const int strips = cut.tile_columns / kStrip;
  const auto set_images = [&](int images) {
    cut.images = images;
    cut.stages = up(args.n, images) * cut.num_bands * cut.num_column_tiles;
    // The fewest groups that need no more rounds than all would.
    cut.groups = up(images * strips, up(images * strips, max_groups));
  };
  set_images(1);
  if (cut.num_bands > 1 || cut.num_column_tiles > 1) return cut;
  const int room = (budget + halo * grad_row) / (cut.input_rows * in_row + (out_h + halo) * grad_row);
  const int images = least(room, up(args.n, splits));
  BlockedGradWeightCut best = cut;
  double fewest = blocked_grad_weight_cycles(args, shape, cut, splits);
  for (int tried = most(2, images - kMostTries); tried <= images; ++tried) {
    set_images(tried);
    const double cycles = blocked_grad_weight_cycles(args, shape, cut, splits);
    if (cycles < fewest) fewest = cycles, best = cut;
  }
  return best;
}

}  // namespace depthwise
