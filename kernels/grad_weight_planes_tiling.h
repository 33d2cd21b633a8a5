// How grad_weight_planes_nchw cuts a problem (see there): a pure function of the problem's sizes, the units of a block and
// the device's multiprocessors and shared memory.
#pragma once

#include "variants.h"

namespace depthwise {

constexpr int kGradWeightPlanesThreads = 512;   // of a block, and of a multiprocessor, at most
constexpr int kFewestPlanesThreads = 64;        // for a channel, where a multiprocessor holds many
constexpr int kMostPlanesBlocks = 12;           // of a multiprocessor
constexpr int kMostPlanesUnitBytes = 18 << 10;  // three of them fit every architecture
// Stages of the ring. Two, not four: what is under way drives more of what other kernels wrote out of the L2 cache (H100,
// microseconds: 3x3 at stride 2, 32x96x112x112, fp32 / fp16: 80.4 / 44.3, four 83.5 / 47.9; 5x5, 32x240x28x28, fp32: 27.8,
// 29.5; at stride 2, 32x144x56x56: 37.4 / 24.9, 38.7 / 27.0).
constexpr int kPlanesDepth = 2;
// A stage at most, beside a third of a block's memory: likewise (3x3, 32x144x56x56, fp16: 31.7, stages half as large again
// 33.8; 32x192x28x28, fp32 / fp16: 21.2 / 16.1, 22.8 / 15.6; 5x5, 32x240x28x28, fp32: 26.0, 27.8), but not less (32x672x14x14:
// 21.8, three quarters 24.5).
constexpr int kMostPlanesStageBytes = 25 << 10, kPlanesRoom = 3;
// Stages of a channel: while the first is summed up, others arrive, unless they are smaller than this (3x3, 32x384x14x14,
// fp16, by stages: 2: 11.0, 4: 11.9; 32x960x7x7, fp32, four channels a unit: 2: 11.7, 4: 12.4).
constexpr int kFewestPlanesStages = 4, kFewestPlanesStageBytes = 20 << 10;
// Planes side by side, of so many groups of channels at least, until they have so many bytes of input: 3x3, 32x960x7x7, fp32:
// four 12.4, one 14.3, eight 15.1; 5x5, 32x672x14x14: two 23.0, one 26.8; but 3x3, 32x384x14x14: two 18.1, one 15.6.
constexpr int kFewestPlanesGroups = kMultiprocessors * 3 / 2, kFewestPlanesPieceBytes = 1000;

// What a specialisation is compiled for.
struct GradWeightPlanesShape {
  int kernel_h, stride_h, columns, element_bytes;
  constexpr int depth() const { return divide_up(kernel_h, stride_h); }
  constexpr int granule() const { return 16 / element_bytes; }  // elements of a copy
};

// Step t of a plane: row t of grad_output and rows t * stride_h - padding_h and on of input, stride_h of them, which meet
// that row and depth() - 1 before it. A band is a run of steps; a unit of work is a band of an image, of `channels`
// neighbouring channels where it is the whole plane. Units are counted channel by channel, and every block takes as many.
struct GradWeightPlanesTiling {
  int first_step, steps, bands, band_steps;  // of a plane: those that meet the image; 0 bands: not even a step fits
  int channels, in_chunks, grad_chunks;      // of a unit; chunks of 16 bytes
  int strips;                                // of a row
  // Of a stage: units; pieces of their bands, for different threads; these, of a channel.
  int images, cuts, cut_steps, threads;
  int stage_bytes, bytes;  // 0 bytes: nothing fits
};

// What does not depend on the device.
inline GradWeightPlanesTiling grad_weight_planes_bands(const GradWeightPlanesShape& shape, const GradWeightArgs& args) {
  GradWeightPlanesTiling t{};
  t.strips = divide_up(args.out_w, shape.columns);
  t.first_step = args.padding_h / shape.stride_h;
  t.steps = min_int(divide_up(args.h + args.padding_h, shape.stride_h), args.out_h + shape.depth() - 1) - t.first_step;
  const int granule = shape.granule();
  const auto chunks_of = [&](int64_t rows, int columns, bool begins_anywhere) {
    return static_cast<int>(divide_up(rows * columns + (begins_anywhere ? granule - 1 : 0), granule));
  };
  t.channels = 1;
  while (args.multiplier == 1 && args.out_c % (2 * t.channels) == 0 &&
         args.out_c / (2 * t.channels) >= kFewestPlanesGroups &&
         int64_t{t.channels} * args.h * args.w * shape.element_bytes < kFewestPlanesPieceBytes)
    t.channels *= 2;
  const int in_size = t.channels * args.h * args.w, out_size = t.channels * args.out_h * args.out_w;
  t.in_chunks = chunks_of(1, in_size, in_size % granule != 0);
  t.grad_chunks = chunks_of(1, out_size, out_size % granule != 0);
  t.band_steps = t.steps;
  for (int bands = 2; 16 * (t.in_chunks + t.grad_chunks) > kMostPlanesUnitBytes; ++bands) {
    if (t.band_steps <= 1) return {};
    t.channels = 1;
    t.band_steps = divide_up(t.steps, bands);
    t.in_chunks = chunks_of(min_int(args.h, t.band_steps * shape.stride_h), args.w, true);
    t.grad_chunks = chunks_of(min_int(args.out_h, t.band_steps + shape.depth() - 1), args.out_w, true);
  }
  t.bands = divide_up(t.steps, t.band_steps);
  return t;
}

// With `blocks` of a multiprocessor in `ring` bytes each. `share`: units of a block.
inline GradWeightPlanesTiling grad_weight_planes_cut(const GradWeightPlanesShape& shape, const GradWeightArgs& args,
                                                     int64_t share, int blocks, int ring) {
  GradWeightPlanesTiling t = grad_weight_planes_bands(shape, args);
  if (t.bands == 0) return t;
  const int most_threads =  // of a channel
      max_int(kFewestPlanesThreads, kGradWeightPlanesThreads / (blocks * t.channels) / 32 * 32);
  const int sums = t.channels * most_threads / 32 * (args.kernel_h * args.kernel_w + 1) * 4,
            unit_bytes = 16 * (t.in_chunks + t.grad_chunks);
  const int units = static_cast<int>(min_int64(args.n * t.bands, share));
  const int fitting =
      min_int(most_threads / t.strips, min_int(kMostPlanesStageBytes, (ring - sums) / kPlanesRoom) / unit_bytes);
  if (fitting <= 0) return t;
  const int64_t stages_worthwhile = max_int64(1, int64_t{units} * unit_bytes / kFewestPlanesStageBytes);
  const int stages = max_int(divide_up(units, t.bands > 1 ? 1 : fitting),
                             static_cast<int>(min_int64(min_int(units, kFewestPlanesStages), stages_worthwhile)));
  t.images = divide_up(units, stages);
  const int cuts = min_int(most_threads / (t.images * t.strips), divide_up(t.band_steps, shape.depth()));
  t.cut_steps = divide_up(t.band_steps, cuts);
  t.cuts = divide_up(t.band_steps, t.cut_steps);
  t.threads = divide_up(t.images * t.cuts * t.strips, 32) * 32;
  t.stage_bytes = t.images * unit_bytes;
  t.bytes = kPlanesDepth * t.stage_bytes + sums;
  return t;
}

// As many blocks a multiprocessor as there are, or fewer if that leaves too little memory for each.
inline GradWeightPlanesTiling grad_weight_planes_tiling(const GradWeightPlanesShape& shape, const GradWeightArgs& args,
                                                        int64_t share, int multiprocessors, int shared_bytes,
                                                        int shared_bytes_block) {
  GradWeightPlanesTiling t = grad_weight_planes_bands(shape, args);
  if (t.bands == 0) return t;
  const int64_t units = args.out_c / t.channels * args.n * t.bands;
  const int64_t all = divide_up(divide_up(units, share), static_cast<int64_t>(multiprocessors));
  for (int blocks = static_cast<int>(min_int64(all, kMostPlanesBlocks)); blocks > 0 && t.bytes == 0; --blocks)
    t = grad_weight_planes_cut(shape, args, share, blocks,
                               min_int(shared_bytes_block, shared_bytes / blocks - (1 << 10)) - (1 << 10));
  return t;
}

inline GradWeightPlanesShape grad_weight_planes_shape(const Problem& p, const Tile& tile) {
  return {static_cast<int>(p.kernel_h), static_cast<int>(p.stride_h), tile.columns, element_size(p.dtype)};
}

}  // namespace depthwise
