// How a launch of blocked.cuh is cut. What costs is the multiprocessor with the most blocks, warps without enough others
// beside them, lanes that are not full and blocks that load; an estimate weighs them.
#pragma once

#include "direct.cuh"

namespace depthwise {

// How a launch is cut into blocks.
struct BlockedTiling {
  int tiles_w, tiles_h, images;  // thread tiles of a block, for each channel
  int row_step;                  // tiles of a band, whose rows take turns
  int blocks_w, blocks_h;        // of an image
  int threads;                   // for each channel
  int lanes;                     // threads that load a row
  int width, pitch;              // columns of input that a block reads; floats from one input row to the next
};

template <class Traits>
int blocked_shared_bytes(const DirectArgs& args, const BlockedTiling& tiling) {
  const int out_rows = tiling.tiles_h * Traits::kRows, planes = Traits::kChannels * tiling.images;
  const int in_rows = min_int(args.h, (out_rows - 1) * Traits::kStrideH + (args.kernel_h - 1) * Traits::kDilationH + 1);
  const int in_floats =
      planes * Traits::image_pitch(in_rows * tiling.pitch, tiling.tiles_w) + tiling.width + Traits::kSlack;
  const int out_floats = planes * out_rows * tiling.tiles_w * Traits::kColumns;
  return 4 *
         (Traits::kChannels * args.kernel_h * Traits::kWeightPitch + max_int(divide_up(in_floats, 4) * 4, out_floats));
}

// Estimates how long a launch takes, in cycles. Of tiles of twelve and ten columns (27x27 to 31x31 and 13x13, NCHW and
// channels_last, H100), the cut that it finds took at most 2% longer than the best of fifteen that were forced.
template <class Traits>
struct BlockedEstimate {
  static constexpr int kMostTiles = 128;  // of an image's height that are looked at; those below count as whole
  // Issue slots a cycle of a scheduler and of a warp that is alone there; cycles until a block computes, and for each
  // float that a thread loads.
  static constexpr double kIssueRate = 0.85, kWarpRate = 0.67;
  static constexpr double kStartCycles = Traits::kChannelsLast ? 13600 : 10200;
  static constexpr double kFloatCycles = Traits::kChannelsLast ? 24 : 40;

  const DirectArgs& args;
  int full = 0;                              // issue slots of a warp whose whole window lies inside the image
  int above[kMostTiles], below[kMostTiles];  // of rows outside that a tile skips

  // `all_h`: tiles of an image's height, dealt to blocks and bands as `tiling` tells.
  void set(const BlockedTiling& tiling, int all_h) {
    const int row_step = Traits::kIsWide ? tiling.row_step : 1;
    const int step = row_step * Traits::kStrideH;
    const int rows = (Traits::kRows - 1) * step + (args.kernel_h - 1) * Traits::kDilationH + 1;
    const auto slots = [&](int outside) {  // of the first or last so many of a window's rows
      int tap_rows = 0;
      for (int o = 0; o < Traits::kRows && o * step < outside; ++o)
        tap_rows += min_int(args.kernel_h, divide_up(outside - o * step, Traits::kDilationH));
      return outside * Traits::kRowSlots + tap_rows * Traits::kTapRowSlots;
    };
    full = slots(rows);
    for (int tile = 0; tile < min_int(all_h, kMostTiles); ++tile) {
      const int tile_h = tile % tiling.tiles_h;
      const int row = (tile - tile_h + tile_h / row_step * row_step) * Traits::kRows + tile_h % row_step;
      const int first = row * Traits::kStrideH - args.padding_h;
      above[tile] = slots(min_int(rows, max_int(0, -first)));
      below[tile] = slots(min_int(rows, max_int(0, first + rows - args.h)));
    }
  }

  // Cycles; what is compared is their sixth power.
  double of(const BlockedTiling& tiling, const DeviceLimits& device, int bytes, int64_t blocks, int all_h) const {
    const int lanes = tiling.tiles_w * tiling.images;  // that share rows
    const int warps = divide_up(lanes * tiling.tiles_h, 32), threads = warps * 32 * Traits::kChannels;
    int64_t all = 0;
    int longest = 0;
    const auto skipped = [&](const int* slots, int tile) { return tile < kMostTiles ? slots[tile] : 0; };
    for (int block = 0; block < tiling.blocks_h; ++block)
      for (int warp = 0; warp < warps; ++warp) {
        const int last = min_int(tiling.tiles_h - 1, (warp * 32 + 31) / lanes);
        const int top = block * tiling.tiles_h + warp * 32 / lanes;
        const int bottom = min_int(all_h - 1, block * tiling.tiles_h + last);
        const int slots = max_int(0, full - skipped(above, bottom) - skipped(below, min_int(top, bottom)));
        all += slots;
        longest = max_int(longest, slots);
      }
    // Blocks of the multiprocessor that has most, those of them at once, and those one after the other.
    const int most = static_cast<int>(divide_up<int64_t>(blocks, device.multiprocessors));
    const int at_once =
        max_int(1, min_int(Traits::kResidentWarps * 32 / threads, device.shared_bytes / (bytes + 1024)));
    const int rounds = divide_up(most, at_once);
    const double load = kStartCycles + kFloatCycles * (bytes / 4) / threads;
    const double work = static_cast<double>(all) * Traits::kChannels / tiling.blocks_h / 4 / kIssueRate;
    // Warps wait for themselves, or for each other; where both count, for longer.
    const double alone = rounds * (load + longest / kWarpRate);
    const double together = load + most * work + (rounds - 1) * load / at_once;
    const double a = alone * alone, b = together * together;
    return a * a * a + b * b * b;
  }
};

// The cut that is estimated to be the fastest: into how many blocks an image's height, and how many images a block. Many
// threads a block come first, and fewer have to be clearly better. No tiles: shared memory is too small.
template <class Traits>
BlockedTiling blocked_tiling(const DirectArgs& args, const DeviceLimits& device) {
  constexpr int kMostCuts = 8;       // of an image's height, and of images, that are looked at
  constexpr double kClearly = 0.83;  // of the sixth power: 0.97
  const int all_w = divide_up(args.out_w, Traits::kColumns), all_h = divide_up(args.out_h, Traits::kRows);
  const int all_images = static_cast<int>(args.n), max_threads = Traits::kThreads / Traits::kChannels / 32 * 32;
  const int64_t channels = divide_up<int64_t>(args.out_c, Traits::kChannels);

  BlockedTiling tiling{}, best{};
  const auto set_columns = [&](int tiles_w) {
    tiling.tiles_w = tiles_w;
    tiling.blocks_w = divide_up(all_w, tiles_w);
    tiling.width = window_size(tiles_w * Traits::kColumns, Traits::kStrideW, Traits::kKernelW, Traits::kDilationW);
    tiling.pitch = Traits::row_pitch(tiling.width, tiling.blocks_w > 1 ? 0 : args.padding_w, args.w);
  };
  set_columns(divide_up(all_w, divide_up(all_w, 32)));
  tiling.tiles_h = tiling.images = 1;
  while (tiling.tiles_w > 1 && blocked_shared_bytes<Traits>(args, tiling) > device.shared_bytes_for(2))
    set_columns(divide_up(tiling.tiles_w, 2));

  BlockedEstimate<Traits> estimate{args};
  double least = 0;
  for (int tiles_h = min_int(all_h, max_threads / tiling.tiles_w), cuts = 0; tiles_h > 0 && cuts < kMostCuts;
       --tiles_h) {
    tiling.blocks_h = divide_up(all_h, tiles_h);
    if (divide_up(all_h, tiling.blocks_h) < tiles_h) continue;
    tiling.tiles_h = tiles_h;
    tiling.images = 1;
    if (blocked_shared_bytes<Traits>(args, tiling) > device.shared_bytes_block) continue;
    ++cuts;
    // No bands, or as wide ones as leave most rows of a thread within a kernel's height.
    int widest = 1;
    for (int step = 2; Traits::kIsWide && 4 * step * Traits::kRows <= 7 * args.kernel_h; ++step)
      if (tiles_h % step == 0) widest = step;
    for (const int step : {widest, 1}) {
      if (step == 1 && widest > 1 && !Traits::kHasFewSums) continue;
      tiling.row_step = step;
      estimate.set(tiling, all_h);
      tiling.images = min_int(all_images, max_threads / (tiling.tiles_w * tiles_h));
      for (int tries = 0; tiling.images > 0 && tries < kMostCuts; --tiling.images) {
        const int groups = divide_up(all_images, tiling.images), bytes = blocked_shared_bytes<Traits>(args, tiling);
        if (divide_up(all_images, groups) < tiling.images || bytes > device.shared_bytes_block) continue;
        ++tries;
        const double cost =
            estimate.of(tiling, device, bytes, channels * groups * tiling.blocks_w * tiling.blocks_h, all_h);
        if (least == 0 || cost < kClearly * least) least = cost, best = tiling;
      }
      if (widest == 1) break;
    }
  }
  // Whole warps a row, unless fewer threads leave fewer of them idle at its end.
  const int in_columns = min_int(args.w, best.width);
  best.lanes = 32;
  for (int lanes = 16; lanes >= 8; lanes /= 2)
    if (divide_up(in_columns, lanes) * lanes < divide_up(in_columns, best.lanes) * best.lanes) best.lanes = lanes;
  best.threads = divide_up(best.tiles_w * best.tiles_h * best.images, 32) * 32;
  return best;
}

}  // namespace depthwise
