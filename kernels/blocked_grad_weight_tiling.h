// How blocked_grad_weight is cut: pure functions of the problem, of a thread's taps and of shared memory, for the plan of
// the splits as for the launcher.
#pragma once

#include "problem.h"

namespace depthwise {

constexpr int kBlockedSharedBytes = 48 << 10;      // of a block everywhere
constexpr int kBlockedMostSharedBytes = 72 << 10;  // where a multiprocessor has them for each block
constexpr int kBlockedThreads = 128;               // of a block, at most
constexpr int kStrip = 4;                          // columns of grad_output a step takes
constexpr int kBlockedTileColumns = 64;            // of grad_output a stage holds, at most

// The taps of a thread, as few multiply-adds wasted as can be; the loads of a step and the kRows - 1 steps more than rows
// are counted in, at 12 rows. Of eight columns at most the windows of a quarter of a warp meet all banks once; more only
// where a kernel has two such tiles a row.
struct TapTile {
  int rows, columns;

  // Blocks of a multiprocessor, by registers, of which the sums and those of parts take most.
  constexpr int blocks() const { return rows * columns > 32 ? 3 : 4; }
  // What a block may take where a multiprocessor has so many bytes of shared memory; each block costs 1 KB of its own.
  constexpr int shared_bytes(int of_multiprocessor) const {
    const int share = of_multiprocessor / blocks() - (1 << 10);
    return share > kBlockedMostSharedBytes ? kBlockedMostSharedBytes
           : share < kBlockedSharedBytes   ? kBlockedSharedBytes
                                           : share;
  }
};
constexpr TapTile best_tap_tile(int64_t kernel_h, int64_t kernel_w) {
  constexpr TapTile kCandidates[] = {{4, 8}, {3, 8}, {2, 8}, {8, 4}, {7, 4}, {6, 4}, {5, 4}, {4, 4}, {3, 4}, {3, 14}};
  constexpr int kLoads = 16, kSteps = 12;
  TapTile best{};
  int64_t least = 0;
  for (const TapTile tile : kCandidates) {
    if (tile.columns > 8 && 2 * tile.columns > kernel_w + 1) continue;
    const int64_t tiles = ((kernel_h + tile.rows - 1) / tile.rows) * ((kernel_w + tile.columns - 1) / tile.columns);
    const int64_t cost = tiles * (tile.rows * tile.columns + tile.columns + kLoads) * (kSteps + tile.rows - 1);
    if (tiles <= kBlockedThreads && (least == 0 || cost < least)) least = cost, best = tile;
  }
  return best;
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
  // A strip's rows lie side by side, `rows` - 1 rows of zeros, of a thread's `rows` taps, above and below them. An odd
  // number: so many neighbouring threads' strips meet banks of their own.
  constexpr int strips() const { return tile_columns / kStrip; }
  constexpr int strip_rows(int rows) const { return (band_rows + rows - 1) | 1; }
  constexpr int grad_elements(int rows) const { return (images * strips() * strip_rows(rows) + rows - 1) * kStrip; }
  constexpr int stage_elements(int rows) const { return input_elements() + grad_elements(rows); }
  // The sums of all threads take the room of the stages at the end.
  constexpr int shared_bytes(const TapTile& taps) const {
    const int stages = buffers * stage_elements(taps.rows), sums = taps.rows * taps.columns * threads();
    return 4 * (stages > sums ? stages : sums);
  }
  // How many of a multiprocessor's blocks are there at once: as many in all rounds.
  constexpr int places(const TapTile& taps, int of_multiprocessor, int blocks) const {
    const int by_memory = of_multiprocessor / (shared_bytes(taps) + (1 << 10));
    const int by_threads = taps.blocks() * kBlockedThreads / threads();
    const int most = by_memory < 1 ? 1 : by_memory < by_threads ? by_memory : by_threads;
    return divide_up(blocks, divide_up(blocks, most));
  }
};

// Estimates the cycles of a launch on an H100, for all blocks as long as the longest. Fitted to 420 forced cuts of 6
// problems in two layouts: 0.86 to 1.15 times as long in the middle of them, and what it picks among ten is 2% slower than
// the best of these.
template <class Args>
double blocked_grad_weight_cycles(const Args& args, const TapTile& tile, const BlockedGradWeightCut& cut,
                                  int64_t splits, bool channels_last) {
  // Issue slots a cycle of a scheduler and of a warp that is alone there; cycles of a multiply-add, whose operands do not
  // always come at once; cycles until a block loads, and of a stage and of a block beside; of a multiprocessor for each float
  // that it loads, which lie a sector each in channels_last; bytes a cycle of the sums' way to the second pass and back.
  constexpr double kIssueRate = 0.84, kWarpRate = 0.52, kTail = 0.18, kMultiplyAddCycles = 1.1;
  constexpr double kStartCycles = 13600, kStageCycles = 3500, kEndCycles = 3800, kBytes = 1750;
  const double float_cycles = channels_last ? 1 : 0.33;
  const int n = static_cast<int>(args.n), h = static_cast<int>(args.h), w = static_cast<int>(args.w);
  const int out_h = static_cast<int>(args.out_h), padding_h = static_cast<int>(args.padding_h);
  const int threads = cut.threads(), warps = threads / 32, strips = cut.strips();

  // Steps down a strip of a whole image, of all tiles and of the one that has most; bands add those between them.
  int all_steps = 0, most_steps = 0;
  for (int tile_h = 0; tile_h < cut.tiles_h; ++tile_h) {
    const int shift = tile_h * tile.rows - padding_h;
    const int steps = min_int(out_h + tile.rows - 1, h - shift) - (shift < 0 ? -shift : 0);
    if (steps > 0) all_steps += steps;
    if (steps > most_steps) most_steps = steps;
  }
  const int between = (cut.num_bands - 1) * (tile.rows - 1);
  const double mean = (static_cast<double>(all_steps) / cut.tiles_h + between) / cut.num_bands;
  const double most = min_int(most_steps, cut.band_rows + tile.rows - 1);
  // Issue slots of a strip: steps of multiply-adds, loads and sums of parts, and what surrounds them.
  const int taps = tile.rows * tile.columns;
  const double step_slots = kMultiplyAddCycles * taps * kStrip + tile.columns / 4 + tile.rows + 6 + taps / 16,
               strip_slots = 80 + taps;
  const auto rounds_of = [&](int units) {  // groups share the last strips
    const int rest = units % cut.groups;
    return units / cut.groups + (rest == 0 ? 0 : 1.0 / (cut.groups / rest));
  };
  const double rounds = rounds_of(cut.images * strips);
  const double fewer = rounds - rounds_of(((n - 1) % cut.images + 1) * strips);  // of the last stage
  const int stages = divide_up(cut.stages, splits);                              // of a block, at most
  const double longest = stages * rounds * (most * step_slots + strip_slots);
  const double work = (stages * rounds - fewer / splits) * (mean * step_slots + strip_slots) * warps;

  const int blocks = divide_up(args.out_c * splits, kMultiprocessors);  // of the multiprocessor that has most
  const int places = cut.places(tile, kMultiprocessorSharedBytes, blocks);
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
BlockedGradWeightCut blocked_grad_weight_cut(const Args& args, const TapTile& tile, int64_t splits,
                                             int of_multiprocessor, bool channels_last) {
  constexpr int kFewestRows = 8, kMostTries = 6;
  const int h = static_cast<int>(args.h), kernel_h = static_cast<int>(args.kernel_h);
  const int out_h = static_cast<int>(args.out_h), out_w = static_cast<int>(args.out_w);
  BlockedGradWeightCut cut{};
  cut.tiles_h = divide_up(kernel_h, tile.rows);
  cut.tiles_w = divide_up(args.kernel_w, tile.columns);
  cut.groups = kBlockedThreads / (cut.tiles_h * cut.tiles_w);
  const int shared_bytes = tile.shared_bytes(of_multiprocessor);
  cut.num_column_tiles = divide_up(out_w, kBlockedTileColumns);
  cut.tile_columns = divide_up(divide_up(out_w, cut.num_column_tiles), kStrip) * kStrip;
  cut.input_pitch = divide_up(cut.tile_columns + cut.tiles_w * tile.columns, 4) * 4;

  const int strips = cut.strips();
  const auto set = [&](int bands, int images) {
    cut.images = images;
    cut.band_rows = divide_up(out_h, bands);
    cut.num_bands = divide_up(out_h, cut.band_rows);
    cut.input_rows = min_int(h, cut.band_rows + kernel_h - 1);
    cut.stages = divide_up(args.n, images) * cut.num_bands * cut.num_column_tiles;
    cut.buffers = cut.stages > splits ? 2 : 1;
    if (cut.shared_bytes(tile) > shared_bytes) cut.buffers = 1;
    return cut.shared_bytes(tile) <= shared_bytes;
  };
  // Few images: bands, so that every split has a stage; or as many as fit.
  int fewest = max_int(1, min_int(divide_up(splits, args.n * cut.num_column_tiles), divide_up(out_h, kFewestRows)));
  while (!set(fewest, 1) && cut.band_rows > 1) ++fewest;
  BlockedGradWeightCut best = cut;
  double cycles = blocked_grad_weight_cycles(args, tile, cut, splits, channels_last);
  const auto look = [&](int bands, int images) {
    if (!set(bands, images)) return;
    const double found = blocked_grad_weight_cycles(args, tile, cut, splits, channels_last);
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
