// How a grad of weight is cut into splits: a pure function of the problem and its config. Every split of an output
// channel (or of a block's channels) is a thread block that leaves its partial sums in the workspace.
#pragma once

#include "blocked_grad_weight_tiling.h"
#include "columns_tiling.h"
#include "gradients_tiling.h"
#include "select.h"
#include "toeplitz_grad_weight_tiling.h"

namespace depthwise {

constexpr int64_t kMaxWorkspace = 16 << 20;  // bytes, unless one split needs more

constexpr int kGeneralThreads = 256;
// Taps of a block of the general kernel: what is computed for a position is shared by all of them (13x13 at stride 2,
// 32x128x56x56, fp16, H100: 0.69 ms, eight taps 0.88). In float64 sixteen would take too many registers.
inline int general_taps(const Problem& p) { return p.kernel_w > 8 && p.dtype != DType::kFloat64 ? 16 : 8; }
constexpr int64_t kGeneralBlocks = 2048;  // about two waves of 8 blocks on each of an H100's multiprocessors
constexpr int64_t kGeneralPositions = 8;  // of a thread: a split worth its second pass

constexpr int kGradWeightLanes = 32;                // channels_last: threads along channels, at most
constexpr int64_t kGradWeightAllThreads = 1 << 17;  // about a multiprocessor's worth for each of an H100's

// Blocks of the kernels for large sizes: whole rounds of what an H100's multiprocessors hold (two blocks each of
// toeplitz_grad_weight), and few of them, as each leaves a kernel's worth of sums (31x31 on 32x128x56x56, channels_last, fp16,
// H100: 256 blocks 0.111 ms, 512 0.119).
constexpr int64_t kToeplitzBlocksNhwc = 2 * kMultiprocessors, kBlockedBlocks = 8 * kMultiprocessors;
// strips_grad_weight: an H100's multiprocessors, of which one block each is enough (see its tiles).
constexpr int64_t kStripsBlocks = kMultiprocessors, kMostStripsWaves = 8;
constexpr int kStripsSharedBytes = 226 << 10;  // of a multiprocessor
constexpr int64_t kLargePositions = 256;       // a split worth its second pass
// A split at most, where the workspace allows it: tensor cores truncate, and sums of one sign drift.
constexpr int64_t kMostPositions = 1 << 17;

// grad_weight_stream_nhwc. Thread tiles of a block: `images` x `tiles_w`. Items: groups of images x strips of rows x `blocks_w`.
struct GradWeightStreamTiling {
  int tiles_w, images, in_columns;
  int blocks_w, strips, items;
  int stage_bytes;
};

inline GradWeightStreamTiling grad_weight_stream_tiling(const GradWeightStreamShape& shape, int channels,
                                                        int element_bytes, int64_t n, int64_t out_h, int64_t out_w,
                                                        int64_t rows) {
  GradWeightStreamTiling tiling{};
  const int all = divide_up(out_w, kGradWeightStreamColumns);
  for (int most = kGradWeightStreamThreads / (channels / shape.vector); most > 0; most /= 2) {
    tiling.tiles_w = divide_up(all, divide_up(all, most));
    tiling.in_columns = (tiling.tiles_w - 1) * kGradWeightStreamColumns * shape.stride_w + shape.window;
    // Small images side by side, as many as leave the fewest places of the last group empty.
    tiling.images = 1;
    for (int images = 2; all <= most && images <= most / all && images <= n; ++images)
      if (divide_up(n, images) * images <= divide_up(n, tiling.images) * tiling.images) tiling.images = images;
    const int row_pixels = shape.stride_h * tiling.in_columns + tiling.tiles_w * kGradWeightStreamColumns;
    tiling.stage_bytes = shape.stage_steps * tiling.images * row_pixels * channels * element_bytes;
    if (2 * tiling.stage_bytes <= kSharedBytesEverywhere) break;
  }
  tiling.blocks_w = divide_up(all, tiling.tiles_w);
  tiling.strips = divide_up(out_h, rows);
  tiling.items = divide_up(n, tiling.images) * tiling.strips * tiling.blocks_w;
  return tiling;
}

struct GradWeightPlan {
  int64_t splits;
  int rows;  // of grad_output that a thread marches down, at most
};

inline int64_t grad_weight_split_bytes(const Problem& p) {
  return p.out_c * (p.kernel_h * p.kernel_w + 1) * (p.dtype == DType::kFloat64 ? 8 : 4);
}

inline int64_t bounded_splits(const Problem& p, int64_t wanted) {
  const int64_t room = kMaxWorkspace / grad_weight_split_bytes(p);
  const int64_t splits = wanted < room ? wanted : room;
  return splits < 1 ? 1 : splits > 65535 ? 65535 : splits;
}

inline GradWeightPlan general_grad_weight_plan(const Problem& p) {
  const bool channels_last = p.layout == Layout::kNhwc;
  const int64_t channels = channels_last ? divide_up(p.out_c, 32) : p.out_c;
  const int64_t taps = p.kernel_h * divide_up(p.kernel_w, general_taps(p));
  const int64_t splits = kGeneralBlocks / (channels * taps);
  const int64_t threads = channels_last ? kGeneralThreads / 32 : kGeneralThreads;  // of a block, for one channel
  const int64_t worthwhile = p.n * p.out_h * p.out_w / (kGeneralPositions * threads);
  return {bounded_splits(p, splits < worthwhile ? splits : worthwhile), 0};
}

// Blocks of a multiprocessor, as registers allow, of a marching kernel of channels_last that queues its rows.
inline int64_t queued_march_blocks(const Problem& p, const Tile& tile) {
  const MarchRegisters registers =
      march_registers(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w), static_cast<int>(p.stride_h),
                      static_cast<int>(p.stride_w), static_cast<int>(p.dilation_w), tile.columns, tile.vector,
                      tile.vector, element_size(p.dtype));
  const int blocks = queued_blocks(registers);
  return blocks < 1 ? 1 : blocks;
}

// Marching kernels: a thread takes a strip of columns down `rows` rows. Rows are cut until there are threads enough,
// but not so short that the kernel's own height of rows, which the next piece reads again, costs much.
inline GradWeightPlan marching_grad_weight_plan(const Problem& p, const Tile& tile) {
  const int64_t rows = divide_up(p.out_h, p.dilation_h);  // rows `dilation_h` apart are a problem of their own
  const int64_t strips = p.n * p.dilation_h * divide_up(p.out_w, tile.columns);  // of one channel
  const bool channels_last = p.layout == Layout::kNhwc;
  const int64_t lanes = channels_last ? p.c / tile.vector : p.out_c;
  const int64_t fewest_rows = 3 * divide_up(p.kernel_h, p.stride_h) < 8 ? 8 : 3 * divide_up(p.kernel_h, p.stride_h);
  int64_t pieces = 1;
  // Queues hide latencies, so that threads need not be many: what a single wave of blocks takes is not cut into two waves
  // (7x7, 32x96x56x56, H100: 0.066 ms, in two pieces 0.073; 192x28x28: 0.041, 0.052).
  const int64_t held =
      channels_last && tile.queued ? kMultiprocessors * kGradWeightThreads * queued_march_blocks(p, tile) : 0;
  const auto is_one_wave = [&] { return strips * lanes * pieces <= held && strips * lanes * 2 * pieces > held; };
  while (!tile.staged && strips * lanes * pieces < kGradWeightAllThreads &&
         divide_up(rows, 2 * pieces) >= fewest_rows && !is_one_wave())
    pieces *= 2;

  const int64_t x = channels_last ? divide_up(lanes, divide_up(lanes, kGradWeightLanes)) : 1;
  const int64_t threads = kGradWeightThreads / x;  // of a block, for one channel
  const int64_t per_thread = strips * lanes * pieces / kGradWeightAllThreads;
  const int64_t splits = divide_up(strips * pieces, threads * (per_thread < 1 ? 1 : per_thread));
  return {bounded_splits(p, splits), static_cast<int>(divide_up(rows, pieces))};
}

// Kernels whose blocks take one channel, or several, and a share of the images: `blocks` blocks wanted in all.
inline GradWeightPlan large_grad_weight_plan(const Problem& p, int64_t channels, int64_t blocks) {
  const int64_t positions = p.n * p.out_h * p.out_w;
  const int64_t splits = blocks / channels;
  const int64_t worthwhile = positions / kLargePositions;
  const int64_t fewest = positions / kMostPositions;
  return {bounded_splits(p, splits > worthwhile ? worthwhile : splits < fewest ? fewest : splits), 0};
}

// strips_grad_weight_nchw: few splits, as one block a multiprocessor is enough; of tensors so large that their sums are cut
// for precision, as many as make some waves of two blocks a multiprocessor (3x7, 32x128x128x256, fp16, H100: 16 splits
// 0.202, 4 to 8 splits 0.205).
inline GradWeightPlan strips_nchw_grad_weight_plan(const Problem& p) {
  const int64_t fewest = p.n * p.out_h * p.out_w / kMostPositions;
  const int64_t splits = large_grad_weight_plan(p, p.out_c, kStripsBlocks).splits;
  const int64_t most = 2 * kMostStripsWaves * kMultiprocessors / p.out_c;
  return {splits > 1 && splits <= fewest && splits < most ? bounded_splits(p, most) : splits, 0};
}

// blocked_grad_weight: the splits that are estimated to be the fastest, of those with as many images each, of whole rounds
// of the blocks that an H100's multiprocessors hold, which are cut within images, and of bands of images. (fp32, H200,
// microseconds by splits; NCHW: 31x31, 8x40x96x96: 13: 148, 16: 166, 26: 159; 64x3x56x56, two parts: 44: 42.9, 64: 38.7, 88:
// 43.4; 27x27, 32x40x33x47: 8: 105, 9: 104, 16: 96, 19: 112; 29x29, 16x200x48x48: 5: 352, 8: 337, 13: 368, 16: 330;
// channels_last: 453, 450, 459, 363.)
inline GradWeightPlan blocked_grad_weight_plan(const Problem& p) {
  constexpr int kMostRounds = 4, kMostBands = 32;
  constexpr int64_t kMostBlocks = 32 * kMultiprocessors;
  // More splits of whole images are preferred to fewer that are estimated to be as fast, and both to others.
  constexpr double kAsFast = 1.01, kClearly = 0.95;
  const TapTile taps = best_tap_tile(p.kernel_h, p.kernel_w);
  const int64_t images = p.n * divide_up(p.out_w, kBlockedTileColumns);
  const int64_t worthwhile = p.n * p.out_h * p.out_w / kLargePositions;
  const int64_t first = bounded_splits(p, divide_up(p.n * p.out_h * p.out_w, kMostPositions));
  int64_t most = bounded_splits(p, worthwhile < kMostBlocks / p.out_c ? worthwhile : kMostBlocks / p.out_c);
  if (most < first) most = first;
  const bool channels_last = p.layout == Layout::kNhwc;
  const auto cycles_of = [&](int64_t splits) {
    return blocked_grad_weight_cycles(
        p, taps, blocked_grad_weight_cut(p, taps, splits, kMultiprocessorSharedBytes, channels_last), splits,
        channels_last);
  };
  int64_t best = 0;
  double least = 0;
  for (int64_t share = images; share > 0; --share) {  // of a split
    const int64_t splits = images / share;
    if (splits * share != images || splits < first) continue;
    if (splits > most) break;
    const double cycles = cycles_of(splits);
    if (best == 0 || cycles < kAsFast * least) best = splits;
    if (least == 0 || cycles < least) least = cycles;
  }
  least *= best == 0 ? 1 : kClearly;
  const auto look_at = [&](int64_t splits) {
    if (splits < first || splits > most || images % splits == 0) return;
    const double cycles = cycles_of(splits);
    if (best == 0 || cycles < least) least = cycles, best = splits;
  };
  for (int parts = 1; parts <= kBlockedMostParts; ++parts)
    for (int rounds = 1; rounds <= kMostRounds; ++rounds)
      look_at(rounds * taps.blocks() * kMultiprocessors / (p.out_c * parts));
  for (int bands = 2; bands <= kMostBands; bands *= 2) look_at(bands * images);
  return {best == 0 ? first : best, 0};
}

// toeplitz_grad_weight, NCHW: as many splits as are estimated to end first, in fortieths of a row that a block multiplies
// while another shares its multiprocessor. Blocks come in waves of two a multiprocessor; a last one of a block each is
// faster. A wave costs some beside its rows, and so do the second pass and what it reads. (fp16, H100, microseconds by
// splits; 31x31 on 32x128x56x56: 1: 105.8, 2: 90.2, 4: 92.6; 29x29 on 16x200x48x48: 1: 63.2, 2: 70.9, 3: 66.6, 4: 68.4, 8: 77.2;
// 27x27 on 32x40x33x47: 4: 37.8, 5: 36.4, 6: 31.7, 7: 42.4, 8: 36.2, 16: 35.0; 31x31 on 8x40x96x96: 4: 38.9, 6: 32.8, 8: 35.6,
// 16: 35.1.)
inline GradWeightPlan toeplitz_grad_weight_plan_nchw(const Problem& p, const Tile& tile) {
  constexpr int64_t kMostWaves = 4, kTogether = 40, kAlone = 27;
  constexpr int64_t kWaveCost = 1100, kSecondPassCost = 900, kSplitCost = 9;
  const int64_t column_tiles = divide_up(p.w, tile.columns), images = p.n * column_tiles;
  const int64_t positions = p.n * p.out_h * p.out_w;
  const int out_h = static_cast<int>(p.out_h);
  const int64_t fewest = bounded_splits(p, positions / kMostPositions);
  const int64_t worthwhile = positions / kLargePositions, wanted = 2 * kMultiprocessors * kMostWaves / p.out_c;
  const int64_t most = bounded_splits(p, wanted < worthwhile ? wanted : worthwhile);
  const auto cost = [&](int64_t splits, int bands) {
    const int64_t rows = toeplitz_cut(p.n, column_tiles, out_h, splits, bands, kToeplitzWarps, kToeplitzWarps).cost;
    const int64_t waves = p.out_c * splits / (2 * kMultiprocessors), rest = p.out_c * splits % (2 * kMultiprocessors);
    const int64_t rest_cost = rest == 0 ? 0 : rows * (rest > kMultiprocessors ? kTogether : kAlone) + kWaveCost;
    return waves * (rows * kTogether + kWaveCost) + rest_cost +
           (splits > 1 ? kSecondPassCost + splits * kSplitCost : 0);
  };
  int64_t best = fewest, least = 0;
  for (int bands = 1; toeplitz_cuts_into(bands, out_h); ++bands) {
    const int64_t stages = images * divide_up(p.out_h, divide_up(p.out_h, bands));
    for (int64_t splits = fewest;;) {
      const int64_t split_cost = cost(splits, bands);
      if (least == 0 || split_cost < least) least = split_cost, best = splits;
      const int64_t share = divide_up(stages, splits);
      if (share == 1) break;
      splits = divide_up(stages, share - 1);
      if (splits > most) break;
    }
  }
  return {best, 0};
}

// channels_last. Few channels: as many splits, of as many stages each, as leave least to the multiprocessor that has most.
// Counted in rows of its stages: a block costs some beside them, more where it is alone on its multiprocessor, and so do
// the second pass and what it reads. Images are cut into bands for splits that have no image otherwise.
inline GradWeightPlan toeplitz_grad_weight_plan_nhwc(const Problem& p, const Tile& tile) {
  constexpr int64_t kMostWaves = 8, kMostStages = 8, kManyChannels = 128, kBlockCost = 24;
  constexpr int64_t kTogether = 20, kAlone = 32;            // a row costs, in twentieths of one
  constexpr int64_t kSplitCost = 9, kSecondPassCost = 600;  // likewise
  const int64_t groups = divide_up(p.out_c, tile.vector);
  const GradWeightPlan usual = large_grad_weight_plan(p, groups, kToeplitzBlocksNhwc);
  if (p.out_c >= kManyChannels || usual.splits == 1) return usual;
  const int64_t images = p.n * divide_up(p.w, tile.columns);
  const int64_t fewest = p.n * p.out_h * p.out_w / kMostPositions;
  const auto cost = [&](int64_t splits, int bands) {
    const int64_t rows = divide_up(p.out_h, bands);
    const int64_t split_cost = divide_up(images * divide_up(p.out_h, rows), splits) * (rows + p.kernel_h);
    const int64_t waves = divide_up(groups * splits, kMultiprocessors);
    return waves * (split_cost + kBlockCost) * (waves > 1 ? kTogether : kAlone) + splits * kSplitCost +
           (splits > 1 ? kSecondPassCost : 0);
  };
  int64_t best = usual.splits, least = cost(usual.splits, static_cast<int>(divide_up(usual.splits, images)));
  least -= least / 10;  // others have to be worth it
  for (int bands = 1; toeplitz_cuts_into(bands, static_cast<int>(p.out_h)); ++bands) {
    const int64_t stages = images * divide_up(p.out_h, divide_up(p.out_h, bands));
    const int64_t fewest_stages = divide_up(stages * groups, kMostWaves * kMultiprocessors);
    const int64_t most_stages = bands > 1 ? 1 : fewest_stages + kMostStages;
    for (int64_t k = fewest_stages; k <= most_stages; ++k) {
      const int64_t splits = divide_up(stages, k), split_cost = cost(splits, bands);
      if (splits >= fewest && split_cost < least && bounded_splits(p, splits) == splits)
        least = split_cost, best = splits;
    }
  }
  return {best, 0};
}

// images_grad_weight: blocks wanted, as many as are at once on an H100's multiprocessors; `Large`: channels_last, and 32
// columns.
constexpr int64_t kImagesBlocksNchw = 4 * kMultiprocessors, kImagesBlocksLarge = kMultiprocessors;

inline GradWeightPlan images_grad_weight_plan(const Problem& p, const Tile& tile) {
  const bool channels_last = p.layout == Layout::kNhwc;
  const int live = live_rows_of(p).count;
  const int64_t channels = divide_up(p.out_c, images_channels(channels_last, tile.columns));
  const int64_t stages = divide_up(p.n, images_stage(channels_last, tile.columns, live));
  const int64_t splits = (channels_last || tile.columns == 32 ? kImagesBlocksLarge : kImagesBlocksNchw) / channels;
  const int64_t fewest = p.n * p.out_h / kMostPositions;
  const int64_t wanted = splits < fewest ? fewest : splits;
  return {bounded_splits(p, wanted < stages ? wanted : stages), 0};
}

// image_rows_grad_weight: a block for each of an H100's multiprocessors at a time. A block costs as much as some images
// beside its own.
inline GradWeightPlan image_rows_grad_weight_plan(const Problem& p) {
  constexpr int64_t kMostWaves = 2, kBlockCost = 3;
  const int64_t groups = divide_up(p.out_c, kImageRowsChannels);
  const int64_t fewest = divide_up(p.n * p.out_h * p.out_w, kMostPositions);
  int64_t least = 0, best = fewest;
  for (int64_t splits = fewest; splits <= p.n; ++splits) {
    const int64_t waves = divide_up(groups * splits, kMultiprocessors);
    if (waves > kMostWaves && splits > fewest) break;
    const int64_t cost = waves * (divide_up(p.n, splits) + kBlockCost);
    if (least == 0 || cost < least) least = cost, best = splits;
  }
  return {bounded_splits(p, best), 0};
}

// columns_grad_weight: one split, unless there are few channels, or so many images that some rounds of them are even enough.
inline GradWeightPlan columns_grad_weight_plan(const Problem& p) {
  constexpr int64_t kBlocks = 8 * kMultiprocessors;
  const int64_t groups = divide_up(p.n, columns_planes(static_cast<int>(p.w)));
  const int64_t fewest = divide_up(p.n * p.h * p.w, kMostPositions);
  const int64_t splits = min_int64(groups / kColumnsGradWeightGroups, kBlocks / p.out_c);
  return {bounded_splits(p, splits < fewest ? fewest : splits), 0};
}

// Blocks of images_fma_grad_weight: four rounds of what an H100's multiprocessors hold.
constexpr int64_t kImagesFmaBlocks = 8 * kMultiprocessors;

// A split is some groups of images. Only the workspace can add up several of them: then there are two splits at least.
inline GradWeightPlan images_fma_grad_weight_plan(const Problem& p, const Tile& tile) {
  const bool whole_plane = tile.columns > 0;
  const LaneCut cut = images_fma_grad_weight_cut(p, whole_plane, p.layout == Layout::kNhwc);
  const int64_t groups = lane_groups(p.n, cut);
  const int64_t channel_blocks = divide_up(p.out_c, lane_units(whole_plane) << cut.channel_bits);
  if (groups == 1) return {1, 0};
  const int64_t wanted = divide_up(kImagesFmaBlocks, channel_blocks);
  const int64_t splits = bounded_splits(p, wanted < groups ? wanted : groups);
  return {splits < 2 ? 2 : splits, 0};
}

// One round of the blocks that an H100 holds, of as many items each, or of one item less where that takes few blocks more,
// so that no multiprocessor holds fewer. How many strips: the least work of a multiprocessor, counted in stages of warps, of
// which four more stand for what so few warps leave unhidden of their latencies. Strips are whole stages. Of tall images in
// 16 bits two strips rather than one, where they cost hardly more: blocks read rows of fewer images at once. (3x7,
// 32x128x128x256, fp16 / bf16, H100, ms: 132 splits of 64 rows 0.2011 / 0.2017, 128 splits 0.2035 / 0.2022, of 63 rows
// 0.2047 / 0.2038, of 126 rows 0.2034 / 0.2046.)
inline GradWeightPlan stream_grad_weight_plan(const Problem& p, const Tile& tile) {
  constexpr int64_t kThreads = 512, kSharedBytes = 216 << 10;  // what each of them holds
  constexpr int64_t kManyPositions = 1 << 20, kBlocksOfMany = 2;
  constexpr int64_t kUnhiddenWarps = 4, kTallRows = 96, kTolerance = 32, kFewMore = 16;
  const GradWeightStreamShape shape =
      grad_weight_stream_shape(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w), static_cast<int>(p.stride_h),
                               static_cast<int>(p.stride_w));
  const GradWeightStreamTiling tiling =
      grad_weight_stream_tiling(shape, tile.vector, element_size(p.dtype), p.n, p.out_h, p.out_w, p.out_h);
  const int64_t threads = divide_up(tile.vector / shape.vector * tiling.tiles_w * tiling.images, 32) * 32;
  const int64_t by_memory = kSharedBytes / (2 * tiling.stage_bytes), by_threads = kThreads / threads;
  // Of large tensors in 16 bits, where registers hold four channels, two blocks, whose stages are twice as large (3x3,
  // 64x128x256x512, fp16, H100: 1.454 ms, four blocks 1.487).
  const bool is_large = element_size(p.dtype) == 2 && shape.vector == 4 && p.n * p.out_h * p.out_w >= kManyPositions;
  const int64_t most = min_int64(by_memory, by_threads);
  const int64_t blocks = kMultiprocessors * (is_large ? min_int64(most, kBlocksOfMany) : most);
  const int64_t channels = divide_up(p.out_c, tile.vector);
  const int64_t wanted = bounded_splits(p, blocks < channels ? 1 : blocks / channels);
  GradWeightPlan best{};
  int64_t least = 0;
  for (const int64_t strips : {1, 2, 3, 4, 6, 8, 12, 16}) {
    const int64_t stages = divide_up(divide_up(p.out_h, strips) + shape.depth - 1, shape.stage_steps);
    const int64_t rows = min_int64(p.out_h, stages * shape.stage_steps - shape.depth + 1);
    const int64_t all = tiling.items * divide_up(p.out_h, rows), items = divide_up(all, wanted);  // of a block
    const int64_t even = divide_up(all, items), splits = items > 1 && wanted - even <= even / kFewMore ? wanted : even;
    const int64_t warps = divide_up(channels * splits, kMultiprocessors) * divide_up(threads, 32);
    const int64_t cost = items * stages * (warps + kUnhiddenWarps);
    const bool is_near = strips == 2 && shape.vector == 2 && shape.depth > 1 && element_size(p.dtype) == 2 &&
                         p.out_h >= kTallRows && cost <= least + least / kTolerance;
    if (least == 0 || cost < least || is_near) least = cost, best = {splits, static_cast<int>(rows)};
  }
  return best;
}

// grad_weight_rows_nhwc: one round of blocks, all of as many units.
inline GradWeightPlan rows_grad_weight_plan(const Problem& p, const Tile& tile) {
  return {bounded_splits(p, grad_weight_rows_tiling(p, tile).splits), 0};
}

// grad_weight_planes_nchw: `rows` are the units of a block (see there). All units of a channel, and no second pass, of
// channels enough; else a round of blocks with as many units each. (H100, microseconds, fp32 / fp16: 3x3 at stride 2,
// 32x192x28x28: 18.0 / 12.6, in two blocks a multiprocessor 20.2 / 14.9; 5x5, 32x240x28x28: 27.8, 31.0; but 3x3, 32x144x56x56:
// 58.9 / 36.7, 55.7 / 34.4; blocks of one round or of four: 65.2 / 34.1, 55.7 / 33.5.)
inline GradWeightPlan planes_grad_weight_plan(const Problem& p, const Tile& tile) {
  constexpr int64_t kFewestChannels = kMultiprocessors * 7 / 5, kBlocks = 2 * kMultiprocessors;
  const GradWeightPlanesTiling tiling =
      grad_weight_planes_bands(grad_weight_planes_shape(p, tile), grad_weight_args(p));
  const int64_t of_channel = p.n * tiling.bands, channels = p.out_c / tiling.channels;
  const int64_t share = channels >= kFewestChannels ? of_channel : divide_up(channels * of_channel, kBlocks);
  // Blocks that take a part of the same channel.
  const auto splits_of = [&](int64_t units) {
    return units % of_channel == 0   ? 1
           : of_channel % units == 0 ? of_channel / units
                                     : (of_channel + 2 * units - 2) / units;
  };
  return {splits_of(share), static_cast<int>(share)};
}

// strips_grad_weight_nhwc: of as many pieces of an image, as many patches a round, and as many rounds a block (see
// strips_grad_weight.cuh), as leave the least work to the multiprocessor that has most of it: steps, which cost as some strips beside
// their own. A block that begins costs some steps. (7x7, 32x192x28x28, fp16, H100: 11 splits of three patches 0.0254 ms, 8
// splits of four 0.0271.)
inline GradWeightPlan strips_nhwc_grad_weight_plan(const Problem& p) {
  constexpr int kMostPieces = 8, kMostRounds = 4, kBlockCost = 10, kStepCost = 8;
  const int kernel_h = static_cast<int>(p.kernel_h), blocks = strips_blocks_nhwc(kernel_h);
  const int stage_rows = strips_stage_rows(kernel_h, kStripsFewestRowsNhwc);
  const StripsCutNhwc cut = strips_cut_nhwc(kernel_h, static_cast<int>(p.out_w), kStripsSharedBytes / blocks);
  const int64_t groups = divide_up(p.out_c, kStripsGradWeightChannels);
  int64_t least = 0, best = 1;
  for (int64_t pieces = 1; pieces <= kMostPieces && pieces <= p.out_h; ++pieces) {
    const int64_t stages = divide_up(divide_up(p.out_h, pieces) + kernel_h - 1, stage_rows);
    for (int lines = cut.lines; lines > 0; --lines) {
      const int64_t all_rounds = divide_up(p.n * cut.segments * pieces, lines);
      for (int64_t rounds = 1; rounds <= kMostRounds && rounds <= all_rounds; ++rounds) {
        const int64_t splits = divide_up(all_rounds, rounds);
        const int64_t cost = divide_up(groups * splits, blocks * kStripsBlocks) *
                             (rounds * stages * stage_rows * (kStepCost + lines * cut.windows) +
                              kBlockCost * (kStepCost + cut.lines * cut.windows));
        if (least == 0 || cost < least) least = cost, best = splits;
      }
    }
  }
  // More waves of blocks than this are even enough.
  const int64_t most = divide_up(kMostStripsWaves * kStripsBlocks, groups);
  const int64_t fewest = p.n * p.out_h * p.out_w / kMostPositions;
  return {bounded_splits(p, best < most ? best : most > fewest ? most : fewest), 0};
}

// Both gradients at once: as many splits as the workspace has room for.
inline int64_t most_gradients_splits(const Problem& p) { return bounded_splits(p, kInt32Max); }
inline GradWeightPlan gradients_plan(const Problem& p, const Config& config) {
  const GradWeightArgs args = grad_weight_args(p);
  const int element_bytes = element_size(p.dtype);
  const int64_t most = most_gradients_splits(p);
  switch (config.kernel) {
    case Kernel::kGradientsNhwc:
      return {gradients_nhwc_tiling(args, kGradientsNhwcTiles[config.tile].vector, element_bytes, most).splits, 0};
    case Kernel::kGradientsNchw: return {gradients_nchw_tiling(args, element_bytes, most).splits, 0};
    default: return {gradients_planes_tiling(args, element_bytes, most).splits, 0};
  }
}

inline GradWeightPlan grad_weight_plan(const Problem& p, const Config& config) {
  switch (config.kernel) {
    case Kernel::kGradientsNchw:
    case Kernel::kGradientsPlanesNchw:
    case Kernel::kGradientsNhwc: return gradients_plan(p, config);
    case Kernel::kGradWeightNchw:
    case Kernel::kGradWeightNhwc: return marching_grad_weight_plan(p, tile_table(config.kernel, p.dtype)[config.tile]);
    case Kernel::kGradWeightStreamNhwc:
      return stream_grad_weight_plan(p, tile_table(config.kernel, p.dtype)[config.tile]);
    case Kernel::kGradWeightPlanesNchw:
      return planes_grad_weight_plan(p, tile_table(config.kernel, p.dtype)[config.tile]);
    case Kernel::kGradWeightRowsNhwc: return rows_grad_weight_plan(p, tile_table(config.kernel, p.dtype)[config.tile]);
    case Kernel::kToeplitzGradWeight:
      return p.layout == Layout::kNhwc
                 ? toeplitz_grad_weight_plan_nhwc(p, tile_table(config.kernel, p.dtype)[config.tile])
                 : toeplitz_grad_weight_plan_nchw(p, tile_table(config.kernel, p.dtype)[config.tile]);
    case Kernel::kColumnsGradWeight: return columns_grad_weight_plan(p);
    case Kernel::kImageRowsGradWeight: return image_rows_grad_weight_plan(p);
    case Kernel::kImagesFmaGradWeight:
      return images_fma_grad_weight_plan(p, tile_table(config.kernel, p.dtype)[config.tile]);
    case Kernel::kBlockedGradWeight: return blocked_grad_weight_plan(p);
    case Kernel::kImagesGradWeightNchw:
    case Kernel::kImagesGradWeightNhwc:
      return images_grad_weight_plan(p, tile_table(config.kernel, p.dtype)[config.tile]);
    case Kernel::kStripsGradWeightNchw: return strips_nchw_grad_weight_plan(p);
    case Kernel::kStripsGradWeightNhwc: return strips_nhwc_grad_weight_plan(p);
    default: return general_grad_weight_plan(p);
  }
}

}  // namespace depthwise
