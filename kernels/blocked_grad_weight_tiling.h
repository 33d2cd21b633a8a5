// How blocked_grad_weight is cut: pure functions of the problem, of a thread's taps and of shared memory, for the plan of
// the splits as for the launcher.
#pragma once

#include "problem.h"

namespace depthwise {

constexpr int kBlockedSharedBytes = 48 << 10;  // of a block everywhere
constexpr int kBlockedSharedBytesNhwc = 40 << 10;
constexpr int kBlockedMostSharedBytes = 72 << 10;  // where a multiprocessor has them for each block
constexpr int kBlockedMostParts = 4;               // of the kernel's rows
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
  int num_column_tiles, tile_columns;  // of grad_output
  int num_bands, band_rows;            // of a tile of columns of an image
  int bands;                           // of a channel: some blocks take one more than others
  int images, stage_bands;             // of a stage, at most: whole images, or bands of one
  int stage_rows, input_rows;          // of an image in a stage, at most
  int parts;                           // of the kernel's rows, a block each
  int tiles_h, tiles_w, groups;        // threads: register tiles of a part, and those that share the strips
  int input_pitch;                     // columns of an input row: those that the tile's meet
  int buffers;                         // of a stage each: two where the next one is loaded meanwhile

  constexpr int threads() const { return (tiles_h * tiles_w * groups + 31) / 32 * 32; }
  constexpr int input_elements() const { return images * input_rows * input_pitch; }
  // A strip's rows lie side by side, `rows` - 1 rows of zeros, of a thread's `rows` taps, above and below them. An odd
  // number: so many neighbouring threads' strips meet banks of their own.
  constexpr int strips() const { return tile_columns / kStrip; }
  constexpr int strip_rows(int rows) const { return (stage_rows + rows - 1) | 1; }
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

// Kernel rows are dealt to threads from both ends: those as far from the middle meet as many rows of the image. The tile of
// `place`, and the place of a tile, of so many.
constexpr int blocked_grad_weight_tile(int place, int tiles_h) {
  return place >= tiles_h ? place : place % 2 == 0 ? place / 2 : tiles_h - 1 - place / 2;
}
constexpr int blocked_grad_weight_place(int tile_h, int tiles_h) {
  return 2 * tile_h < tiles_h ? 2 * tile_h : 2 * (tiles_h - 1 - tile_h) + 1;
}

// Estimates the cycles of a launch on an H100, for all blocks as long as the longest. Fitted to 84 forced cuts of 6 problems
// in two layouts, fp32, H200: 0.92 to 1.08 times as long as estimated, but for six of them.
template <class Args>
double blocked_grad_weight_cycles(const Args& args, const TapTile& tile, const BlockedGradWeightCut& cut,
                                  int64_t splits, bool channels_last) {
  constexpr int kSectorFloats = 8;
  // Cycles of a scheduler for a warp's multiply-add and what comes with it, where windows are loaded by fours and by twos,
  // and for a strip; of a warp that is alone there, times as many, of which the slowest adds some.
  constexpr double kByFours = 1.13, kByTwos = 1.42, kStripCycles = 650, kAlone = 1.47, kTail = 0.126;
  // Cycles of a launch and of a block beside its march, and of a stage; of a multiprocessor for each float that it loads. In
  // channels_last these lie a sector each, which blocks of other channels take from the L1 cache, if that has room: bytes
  // beside which it has, and of those that double the cost. Bytes a cycle of the sums' way to the second pass and back.
  constexpr double kBlockCycles = 18400, kStageCycles = 530, kFloatCycles = 0.17, kSectorCycles = 0.8;
  constexpr double kRoom = 130 << 10, kDoubled = 74 << 10, kBytes = 1540;
  // How much of a second round is as if all multiprocessors took as many blocks as fit.
  constexpr double kUneven = 0.6;
  const int h = static_cast<int>(args.h), w = static_cast<int>(args.w);
  const int out_h = static_cast<int>(args.out_h), padding_h = static_cast<int>(args.padding_h);
  const int warps = cut.threads() / 32, strips = cut.strips(), place_threads = cut.groups * cut.tiles_w;

  // Steps down a strip of a whole image, of all warps and of the one that has most; every cut adds those between two bands.
  const int between = tile.rows - 1;
  int all_steps = 0, most_steps = 0;
  for (int part = 0; part < cut.parts; ++part)
    for (int warp = 0; warp < warps; ++warp) {
      int steps = 0;
      for (int place = 32 * warp / place_threads; place <= (32 * warp + 31) / place_threads && place < cut.tiles_h;
           ++place) {
        const int tile_h = part * cut.tiles_h + blocked_grad_weight_tile(place, cut.tiles_h);
        const int shift = tile_h * tile.rows - padding_h;
        steps = max_int(steps, min_int(out_h + between, h - shift) - max_int(-shift, 0));
      }
      all_steps += steps;
      most_steps = max_int(most_steps, steps);
    }
  // A block's bands, at most, in tiles of an image; its pieces of those, and its stages.
  const int share = divide_up(cut.bands, static_cast<int>(splits)), pieces = divide_up(cut.num_bands, cut.stage_bands);
  const double tiles = static_cast<double>(share) / cut.num_bands;
  const bool whole = cut.bands / cut.num_bands % splits == 0;
  const double cuts = tiles * pieces + (whole ? 0 : 1);
  double stages = cut.images > 1 ? tiles / cut.images + (whole ? 0 : 1) : cuts;
  if (stages < 1) stages = 1;
  const double more = (cuts - tiles) * between, rounds = static_cast<double>(strips) / cut.groups;
  const double step_cycles = (tile.columns % 4 == 0 ? kByFours : kByTwos) * tile.rows * tile.columns * kStrip;
  const double strip_cycles = cuts * kStripCycles;
  const double mean = static_cast<double>(all_steps) / (cut.parts * warps);
  const double work = rounds * ((tiles * mean + more) * step_cycles + strip_cycles) * warps / 4;
  const double longest = rounds * ((tiles * most_steps + more) * step_cycles + strip_cycles);

  double blocks = divide_up(args.out_c * splits * cut.parts, kMultiprocessors);  // of the multiprocessor that has most
  const int places = cut.places(tile, kMultiprocessorSharedBytes, static_cast<int>(blocks));
  const int block_rounds = divide_up(static_cast<int>(blocks), places);
  if (block_rounds == 2) blocks += kUneven * (2 * places - blocks);
  double float_cycles = kFloatCycles;
  if (channels_last) {
    const double taken = places * (cut.shared_bytes(tile) + (1 << 10)) - kRoom;
    float_cycles = kSectorCycles * (args.out_c < kSectorFloats ? static_cast<double>(args.out_c) / kSectorFloats : 1) *
                   (1 + (taken > 0 ? taken / kDoubled : 0));
  }
  const double floats = tiles * (h * min_int(w, cut.input_pitch) + out_h * cut.tile_columns);
  // Warps wait for themselves, or for each other, at last for the slowest; where both count, for longer: the sixth root of
  // the sum of sixth powers.
  const double load = kBlockCycles + stages * kStageCycles;
  const double alone = block_rounds * (load + longest * kAlone);
  const double together =
      load + blocks * (work + floats * float_cycles) + (block_rounds - 1) * load / places + kTail * longest;
  const double high = alone > together ? alone : together, low = alone > together ? together : alone;
  const double ratio = low / high * (low / high);
  const double second_pass = splits > 1 ? 8.0 * args.out_c * splits * args.kernel_h * args.kernel_w / kBytes : 0;
  return high * (1 + ratio * ratio * ratio / 6) + second_pass;
}

// The cut for so many splits of a channel that is estimated to be the fastest.
template <class Args>
BlockedGradWeightCut blocked_grad_weight_cut(const Args& args, const TapTile& tile, int64_t splits,
                                             int of_multiprocessor, bool channels_last) {
  constexpr int kFewestRows = 4, kManyBands = 8;
  const int h = static_cast<int>(args.h), kernel_h = static_cast<int>(args.kernel_h);
  const int out_h = static_cast<int>(args.out_h), out_w = static_cast<int>(args.out_w);
  const int most_bytes = tile.shared_bytes(of_multiprocessor);
  // channels_last: the L1 cache needs the rest.
  const int shared_bytes = channels_last ? min_int(most_bytes, kBlockedSharedBytesNhwc) : most_bytes;
  const int all_tiles_h = divide_up(kernel_h, tile.rows);
  BlockedGradWeightCut cut{}, best{};
  cut.tiles_w = divide_up(args.kernel_w, tile.columns);
  cut.num_column_tiles = divide_up(out_w, kBlockedTileColumns);
  cut.tile_columns = divide_up(divide_up(out_w, cut.num_column_tiles), kStrip) * kStrip;
  cut.input_pitch = divide_up(cut.tile_columns + cut.tiles_w * tile.columns, 4) * 4;
  const int64_t tiles = args.n * cut.num_column_tiles;

  double cycles = 0;
  // Stages of so many whole images, or bands of one; two of them where there is room and a block has more than one.
  const auto look = [&](int images, int stage_bands) {
    cut.images = images, cut.stage_bands = stage_bands;
    cut.stage_rows = min_int(out_h, stage_bands * cut.band_rows);
    cut.input_rows = min_int(h, cut.stage_rows + min_int(kernel_h, cut.tiles_h * tile.rows) - 1);
    const bool one_stage = tiles % splits == 0 && tiles / splits * cut.num_bands <= images * stage_bands;
    for (cut.buffers = one_stage ? 1 : 2; cut.buffers > 0; --cut.buffers) {
      if (cut.shared_bytes(tile) > shared_bytes) continue;
      const double found = blocked_grad_weight_cycles(args, tile, cut, splits, channels_last);
      if (best.parts == 0 || found < cycles) cycles = found, best = cut;
      return true;
    }
    return false;
  };
  // Parts of the kernel where images alone make few blocks.
  const int most_parts = args.out_c * tiles < tile.blocks() * kMultiprocessors ? kBlockedMostParts : 1;
  for (cut.parts = 1; cut.parts <= most_parts; ++cut.parts) {
    if (all_tiles_h % cut.parts != 0) continue;
    cut.tiles_h = all_tiles_h / cut.parts;
    cut.groups = kBlockedThreads / (cut.tiles_h * cut.tiles_w);
    // Whole images where they can be dealt evenly, or as many bands as make shares even enough; or bands that fit.
    const int many = max_int(kManyBands, static_cast<int>(2 * divide_up(splits, tiles)));
    for (int bands = 1; bands <= many || best.parts == 0; bands = bands == 1 ? many : bands * kManyBands) {
      if (bands == 1 && tiles % splits != 0) continue;
      cut.band_rows = max_int(divide_up(out_h, bands), bands > many ? 1 : min_int(kFewestRows, out_h));
      cut.num_bands = divide_up(out_h, cut.band_rows);
      cut.bands = static_cast<int>(tiles * cut.num_bands);
      int stage_bands = cut.num_bands;
      while (!look(1, stage_bands) && stage_bands > 1) --stage_bands;
      for (const int pieces : {divide_up(cut.num_bands, stage_bands), 2 * divide_up(cut.num_bands, stage_bands)})
        if (divide_up(cut.num_bands, pieces) < stage_bands) look(1, divide_up(cut.num_bands, pieces));  // as long each
      if (cut.num_column_tiles > 1 || stage_bands < cut.num_bands) continue;
      const int share = static_cast<int>(tiles / splits);
      for (int count = divide_up(share, 2); count > 0; --count) {  // stages of as many images each
        const int images = divide_up(share, count);
        if (divide_up(share, images) == count && images > 1 && !look(images, stage_bands)) break;
      }
    }
  }
  return best;
}

}  // namespace depthwise
