// How blocked_grad_weight is cut: pure functions of the problem, of a thread's taps and of shared memory, for the plan of
// the splits as for the launcher.
#pragma once

#include "problem.h"

namespace depthwise {

constexpr int kBlockedSharedBytes = 48 << 10;      // of a block everywhere
constexpr int kBlockedMostSharedBytes = 72 << 10;  // where a multiprocessor has them for each block
constexpr int kStrip = 4;                          // columns of grad_output a step takes
constexpr int kBlockedTileColumns = 64;            // of grad_output a stage holds, at most

// Registers of a thread's sums, of those of parts, and of its strip: with more, 128 in all leave the compiler no choice of
// banks (of 4x8 taps, one multiply-add in seven then has all operands in one), or are too few.
constexpr int kBlockedFewSums = 72;

struct BlockedGradWeightShape {
  int rows, columns;    // taps of a thread
  int threads, blocks;  // of a block, at most; of a multiprocessor, by registers

  // What a block may take where a multiprocessor has so many bytes of shared memory; each block costs 1 KB of its own.
  constexpr int shared_bytes(int of_multiprocessor) const {
    const int share = of_multiprocessor / blocks - (1 << 10);
    return share > kBlockedMostSharedBytes ? kBlockedMostSharedBytes
           : share < kBlockedSharedBytes   ? kBlockedSharedBytes
                                           : share;
  }
};

// `sums_parts`: whether parts have sums of their own.
constexpr BlockedGradWeightShape blocked_grad_weight_shape(int rows, int columns, bool sums_parts) {
  const bool is_roomy = sums_parts && 2 * rows * columns + kStrip * rows > kBlockedFewSums;
  return {rows, columns, 128, is_roomy ? 3 : 4};
}

struct BlockedGradWeightCut {
  int images, band_rows, tile_columns;      // of grad_output: a stage
  int num_bands, num_column_tiles, stages;  // of a channel
  int input_rows;                           // of an image in a stage, at most
  int tiles_h, tiles_w, groups;             // threads: register tiles of the kernel, and those that share the strips
  int input_pitch;                          // columns of an input row: those that the tile's meet
  int buffers;                              // of a stage each: two where the next one is loaded meanwhile

  constexpr int threads() const { return (tiles_h * tiles_w * groups + 31) / 32 * 32; }
  constexpr int input_elements() const { return images * input_rows * input_pitch; }
  // rows - 1 rows of zeros above and below each image, of a thread's `rows` taps.
  constexpr int grad_elements(int rows) const { return (images * (band_rows + rows - 1) + rows - 1) * tile_columns; }
  constexpr int stage_elements(int rows) const { return input_elements() + grad_elements(rows); }
  // The sums of all threads take the room of the stages at the end.
  constexpr int shared_bytes(const BlockedGradWeightShape& shape) const {
    const int stages = buffers * stage_elements(shape.rows), sums = shape.rows * shape.columns * threads();
    return 4 * (stages > sums ? stages : sums);
  }
};

// Estimates the cycles of a launch on an H100, for all blocks as long as the longest. Fitted to 420 forced cuts of 6
// problems in two layouts: 0.86 to 1.15 times as long in the middle of them, and what it picks among ten is 2% slower than
// the best of these.
template <class Args>
double blocked_grad_weight_cycles(const Args& args, const BlockedGradWeightShape& shape,
                                  const BlockedGradWeightCut& cut, int64_t splits, bool channels_last) {
  constexpr int kSharedBytes = 228 << 10;
  // Issue slots a cycle of a scheduler and of a warp that is alone there; cycles of a multiply-add, whose operands do not
  // all come at once; cycles until a block loads, and of a stage and of a block beside; of a multiprocessor for each float
  // that it loads, which lie a sector each in channels_last; bytes a cycle of the sums' way to the second pass and back.
  constexpr double kIssueRate = 0.84, kWarpRate = 0.52, kTail = 0.18, kMultiplyAddCycles = 1.3;
  constexpr double kStartCycles = 13600, kStageCycles = 3500, kEndCycles = 3800, kBytes = 1750;
  const double float_cycles = channels_last ? 1 : 0.33;
  const int n = static_cast<int>(args.n), h = static_cast<int>(args.h), w = static_cast<int>(args.w);
  const int out_h = static_cast<int>(args.out_h), padding_h = static_cast<int>(args.padding_h);
  const int threads = cut.threads(), warps = threads / 32, strips = cut.tile_columns / kStrip;

  // Steps down a strip of a whole image, of all tiles and of the one that has most; bands add those between them.
  int all_steps = 0, most_steps = 0;
  for (int tile = 0; tile < cut.tiles_h; ++tile) {
    const int shift = tile * shape.rows - padding_h;
    const int steps = min_int(out_h + shape.rows - 1, h - shift) - (shift < 0 ? -shift : 0);
    if (steps > 0) all_steps += steps;
    if (steps > most_steps) most_steps = steps;
  }
  const int between = (cut.num_bands - 1) * (shape.rows - 1);
  const double mean = (static_cast<double>(all_steps) / cut.tiles_h + between) / cut.num_bands;
  const double most = min_int(most_steps, cut.band_rows + shape.rows - 1);
  // Issue slots of a strip: steps of multiply-adds, loads and sums of parts, and what surrounds them.
  const int taps = shape.rows * shape.columns;
  const double step_slots = kMultiplyAddCycles * taps * kStrip + shape.columns / 4 + 8 + taps / 16,
               strip_slots = 80 + taps;
  const int rounds = divide_up(cut.images * strips, cut.groups);
  const int fewer = rounds - divide_up(((n - 1) % cut.images + 1) * strips, cut.groups);  // of the last stage
  const int stages = divide_up(cut.stages, splits);                                       // of a block, at most
  const double longest = stages * rounds * (most * step_slots + strip_slots);
  const double work =
      (stages * rounds - static_cast<double>(fewer) / splits) * (mean * step_slots + strip_slots) * warps;

  const int by_memory = kSharedBytes / (cut.shared_bytes(shape) + 1024),
            by_threads = shape.threads * shape.blocks / threads;
  const int places = by_memory < 1 ? 1 : min_int(by_memory, by_threads);
  const int blocks = divide_up(args.out_c * splits, kMultiprocessors);  // of the multiprocessor that has most
  const int in_columns = min_int(w, cut.input_pitch);
  const double floats =
      cut.images * (static_cast<double>(cut.input_rows) * in_columns + cut.band_rows * cut.tile_columns);
  const double load = kStartCycles + kEndCycles + stages * kStageCycles;
  // Warps wait for themselves, or for each other, at last for the slowest; where both count, for longer: the sixth root of
  // the sum of sixth powers.
  const int block_rounds = divide_up(blocks, places);
  const double alone = block_rounds * (load + longest / kWarpRate);
  const double together = load + blocks * (work / 4 / kIssueRate + stages * floats * float_cycles) +
                          (block_rounds - 1) * load / places + kTail * longest / kWarpRate;
  const double high = alone > together ? alone : together, low = alone > together ? together : alone;
  const double ratio = low / high * (low / high);
  const double second_pass = splits > 1 ? 8.0 * args.out_c * splits * args.kernel_h * args.kernel_w / kBytes : 0;
  return high * (1 + ratio * ratio * ratio / 6) + second_pass;
}

// The cut for so many splits of a channel, with as many images a stage as is estimated to be the fastest.
template <class Args>
BlockedGradWeightCut blocked_grad_weight_cut(const Args& args, const BlockedGradWeightShape& shape, int64_t splits,
                                             int shared_bytes, bool channels_last) {
  constexpr int kFewestRows = 8, kMostTries = 6;
  const int h = static_cast<int>(args.h), kernel_h = static_cast<int>(args.kernel_h);
  const int out_h = static_cast<int>(args.out_h), out_w = static_cast<int>(args.out_w);
  BlockedGradWeightCut cut{};
  cut.tiles_h = divide_up(kernel_h, shape.rows);
  cut.tiles_w = divide_up(args.kernel_w, shape.columns);
  const int max_groups = shape.threads / (cut.tiles_h * cut.tiles_w);
  cut.num_column_tiles = divide_up(out_w, kBlockedTileColumns);
  cut.tile_columns = divide_up(divide_up(out_w, cut.num_column_tiles), kStrip) * kStrip;
  cut.input_pitch = divide_up(cut.tile_columns + cut.tiles_w * shape.columns, 4) * 4;

  const int strips = cut.tile_columns / kStrip;
  const auto set = [&](int bands, int images) {
    cut.images = images;
    cut.band_rows = divide_up(out_h, bands);
    cut.num_bands = divide_up(out_h, cut.band_rows);
    cut.input_rows = min_int(h, cut.band_rows + kernel_h - 1);
    cut.stages = divide_up(args.n, images) * cut.num_bands * cut.num_column_tiles;
    // The fewest groups that need no more rounds than all would.
    cut.groups = divide_up(images * strips, divide_up(images * strips, max_groups));
    cut.buffers = cut.stages > splits ? 2 : 1;
    if (cut.shared_bytes(shape) > shared_bytes) cut.buffers = 1;
    return cut.shared_bytes(shape) <= shared_bytes;
  };
  // Few images: bands, so that every split has a stage; or as many as fit.
  int fewest = max_int(1, min_int(divide_up(splits, args.n * cut.num_column_tiles), divide_up(out_h, kFewestRows)));
  while (!set(fewest, 1) && cut.band_rows > 1) ++fewest;
  BlockedGradWeightCut best = cut;
  double cycles = blocked_grad_weight_cycles(args, shape, cut, splits, channels_last);
  const auto look = [&](int bands, int images) {
    if (!set(bands, images)) return;
    const double found = blocked_grad_weight_cycles(args, shape, cut, splits, channels_last);
    if (found < cycles) cycles = found, best = cut;
  };
  for (int bands = fewest + 1; bands < fewest + kMostTries && divide_up(out_h, bands) >= kFewestRows; ++bands)
    look(bands, 1);
  if (fewest > 1 || cut.num_column_tiles > 1) return best;
  // channels_last: two stages at least, as loads take long there (13x13, 32x200x20x20, five splits, H100: a stage of one
  // image 82 us, of four 84; 31x31, 8x40x96x96: two stages a block 219, one 234).
  const int share = channels_last ? divide_up(divide_up(args.n, splits), 2) : divide_up(args.n, splits);
  for (int images = max_int(2, share - kMostTries); images <= share; ++images) look(1, images);
  return best;
}

}  // namespace depthwise
