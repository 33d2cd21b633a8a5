// Whether a kernel with a tile can serve a problem at all: what it was written for, and what fits registers, shared memory
// and 32-bit indices on every architecture. Which of those that can is chosen: select.h.
#pragma once

#include <initializer_list>

#include "variants.h"

namespace depthwise {

// 7x7: beyond this many fp32 weights a thread, registers spill.
constexpr int kMaxRegisterTaps = 49;
// direct_nhwc's filters are registers as well.
constexpr int kMaxDirectNhwcTaps = 9;
// tiled_nhwc: 7x7 at stride 2 spills.
constexpr int kMaxTiledStridedTaps = 25;
// Windows are described by 64-bit masks: eight outputs at stride 4 and this much kernel are 64 rows.
constexpr int kMaxSpan = 35;
constexpr int64_t kInt32Max = 0x7fffffff;

// The problem as a direct kernel sees it; only the sizes are filled in.
inline DirectArgs direct_args(const Problem& p) {
  DirectArgs args{};
  args.n = p.n;
  args.out_c = p.out_c;
  args.multiplier = static_cast<int>(p.multiplier);
  args.flip = p.direction == Direction::kGradInput;
  args.h = static_cast<int>(args.flip ? p.out_h : p.h);
  args.w = static_cast<int>(args.flip ? p.out_w : p.w);
  args.out_h = static_cast<int>(args.flip ? p.h : p.out_h);
  args.out_w = static_cast<int>(args.flip ? p.w : p.out_w);
  args.padding_h = static_cast<int>(args.flip ? p.dilation_h * (p.kernel_h - 1) - p.padding_h : p.padding_h);
  args.padding_w = static_cast<int>(args.flip ? p.dilation_w * (p.kernel_w - 1) - p.padding_w : p.padding_w);
  args.kernel_h = static_cast<int>(p.kernel_h);
  args.kernel_w = static_cast<int>(p.kernel_w);
  args.stride_h = static_cast<int>(p.stride_h);
  args.dilation_h = static_cast<int>(p.dilation_h);
  args.dilation_w = static_cast<int>(p.dilation_w);
  return args;
}

inline int element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// toeplitz: columns are counted in chunks of eight.
struct Band {
  int chunks;        // that eight outputs read
  int origin;        // where the chunks of output column 0 begin
  int tiles_w;       // columns of a block, in eights
  int image_chunks;  // of an input row; 0: outputs are too wide for one block
  int tiles_h;       // rows of a warp, in sixteens

  int chunks_in(int stride_w) const { return (tiles_w - 1) * stride_w + chunks; }
};

inline Band band_of(const Problem& p) {
  const DirectArgs args = direct_args(p);
  Band band{};
  band.origin = floor_divide(-args.padding_w, 8);
  const int last = static_cast<int>(7 * p.stride_w) + (args.kernel_w - 1) * args.dilation_w - args.padding_w;
  band.chunks = floor_divide(last, 8) - band.origin + 1;
  band.image_chunks = floor_divide(args.w + 7, 8);
  band.tiles_w = floor_divide(args.out_w + 7, 8);
  const int stride = static_cast<int>(p.stride_w);
  // A warp's rows: many where a block holds many small images or, in channels_last, lays out the weights of eight
  // channels; few where shared memory bounds the rows (channels_last; 32x128x56x56, 31x31, fp16, H200: 0.48 ms with 16
  // rows, 0.54 with 32; 32x256x28x28, 29x29: 0.34 and 0.14 with 64; NCHW: 0.156 ms with 16, 0.112 with 32;
  // 32x512x14x14, 27x27: 0.106 with 16, 0.044 with 64).
  const auto rows_of = [&](int tiles_w) {
    if (p.layout == Layout::kNhwc) return tiles_w > 4 ? 1 : 4;
    return tiles_w > 2 ? 2 : 4;
  };
  band.tiles_h = rows_of(band.tiles_w);
  const bool meets_image = band.origin < band.image_chunks && band.origin + band.chunks_in(stride) > 0;
  if (band.tiles_w <= 8 && band.image_chunks <= 16 && meets_image) return band;
  // The width that wastes the fewest columns; of equals the widest.
  const int all = band.tiles_w;
  band.image_chunks = 0;
  band.tiles_w = 8;
  for (int tiles = 7; tiles >= 5; --tiles)
    if (floor_divide(all + tiles - 1, tiles) * tiles <
        floor_divide(all + band.tiles_w - 1, band.tiles_w) * band.tiles_w)
      band.tiles_w = tiles;
  band.tiles_h = rows_of(band.tiles_w);
  return band;
}

// Weights and the rows that sixteen outputs read, of eight channels in channels_last.
constexpr int64_t kMaxBandBytes = 160 << 10;
constexpr int kMaxBandChunks = 12;

// toeplitz, blocked: filters of fewer taps are for the other kernels.
constexpr int kMinLargeTaps = 25;

inline bool can_serve_toeplitz(const Problem& p) {
  if (p.kernel_h * p.kernel_w < kMinLargeTaps) return false;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return false;
  const int64_t span_h = (p.kernel_h - 1) * p.dilation_h, span_w = (p.kernel_w - 1) * p.dilation_w;
  if (p.stride_h > 4 || p.stride_w > 2 || span_h > 512 || span_w > 96) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.n * p.out_c * ((p.out_h + 15) / 16) * ((p.out_w + 31) / 32) > kInt32Max) return false;
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  const bool channels_last = p.layout == Layout::kNhwc;
  if (channels_last && p.multiplier != 1) return false;
  const Band band = band_of(p);
  if (band.chunks > kMaxBandChunks) return false;
  const int64_t in_h = p.direction == Direction::kGradInput ? p.out_h : p.h, rows = 15 * p.stride_h + span_h + 1;
  const int64_t pitch = band.chunks_in(static_cast<int>(p.stride_w)) + 2;
  return ((rows < in_h ? rows : in_h) * pitch * 16 + p.kernel_h * (8 * band.chunks + 13) * 4) *
             (channels_last ? 8 : 1) <=
         kMaxBandBytes;
}

// band_images: the ring of kernel rows lies in registers, and what sixteen images of a unit read in shared memory.
constexpr int kMaxBandImagesChunks = 7;

inline Band band_images_of(const Problem& p) {
  const DirectArgs args = direct_args(p);
  Band band{};
  band.origin = floor_divide(-args.padding_w, 8);
  band.chunks = floor_divide(7 + args.kernel_w - 1 - args.padding_w, 8) - band.origin + 1;
  band.image_chunks = floor_divide(args.w + 7, 8);
  band.tiles_w = floor_divide(args.out_w + 7, 8);
  return band;
}

inline bool can_serve_band_images(const Problem& p, const Tile& tile) {
  if (p.layout != Layout::kNchw || (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16)) return false;
  if (p.kernel_h * p.kernel_w < kMinLargeTaps || p.kernel_h > 512 || p.kernel_w > 8 * kMaxBandImagesChunks)
    return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.w > tile.columns || p.out_w > tile.columns) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.n * p.out_c * ((p.out_h + 3) / 4) * ((p.h + 3) / 4) > kInt32Max) return false;  // blocks, of either direction
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  const Band band = band_images_of(p);
  if (band.chunks > kMaxBandImagesChunks) return false;
  const int64_t in_h = p.direction == Direction::kGradInput ? p.out_h : p.h, rows = tile.rows - 1 + p.kernel_h;
  return (rows < in_h ? rows : in_h) * (band.image_chunks + 1) * 16 * 16 + p.kernel_h * (8 * band.chunks + 8) * 4 <=
         kMaxBandBytes;
}

constexpr int64_t kMaxGridY = 65535;

// images: the sizes of both images, and how far below its output row the input row of each kernel row lies, of those
// kernel rows that meet any: `shifts` of them from `first_shift` on, in steps of the dilation.
struct ImageShape {
  int h, w, out_h, out_w, first_shift, shifts, shift_step;
};

inline ImageShape image_shape_of(const Problem& p) {
  const DirectArgs args = direct_args(p);
  ImageShape shape{args.h, args.w, args.out_h, args.out_w, 0, 0, args.dilation_h};
  for (int row = args.kernel_h - 1; row >= 0; --row) {
    const int shift = row * args.dilation_h - args.padding_h;
    if (shift > -args.out_h && shift < args.h) shape.first_shift = shift, ++shape.shifts;
  }
  return shape;
}

constexpr int kMaxImageRegisters = 220;

inline bool can_serve_images(const Problem& p, const Tile& tile) {
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.multiplier != 1 || !p.aligned) return false;
  if (p.h > kMaxImageSize || p.w > kMaxImageSize || p.out_h > kMaxImageSize || p.out_w > kMaxImageSize) return false;
  const bool channels_last = p.layout == Layout::kNhwc;
  if (channels_last && p.c % 8 != 0) return false;
  if (p.c > kInt32Max / 2 || p.kernel_h * p.kernel_w > kInt32Max / 2 || p.n > kMaxGridY * kImagesTogether) return false;
  for (const int64_t pixels : {p.h * p.w, p.out_h * p.out_w})
    if (2 * tile.rows * planes_pitch(tile.vector, static_cast<int>(pixels), channels_last) > kSharedBytesEverywhere)
      return false;
  const ImageShape shape = image_shape_of(p);
  const int registers =
      image_registers(tile.rows / kImagesTogether, shape.h, shape.w, shape.out_h, shape.out_w, shape.shifts);
  return shape.shifts > 0 && registers <= kMaxImageRegisters && registers * tile.vector * 32 <= 64 << 10;
}

// strips: eight outputs read sixteen columns.
constexpr int kMinStripsKernel = 3, kMaxStripsKernel = 9;
constexpr int kMaxStripsWidth = 1 << 22;

inline bool can_serve_strips(const Problem& p, Kernel kernel) {
  const bool channels_last = kernel == Kernel::kStripsNhwc;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw)) return false;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return false;
  for (const int64_t size : {p.kernel_h, p.kernel_w})
    if (size < kMinStripsKernel || size > kMaxStripsKernel) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.w > kMaxStripsWidth || p.out_w > kMaxStripsWidth) return false;
  // Strips, of which a block has one at least.
  const DirectArgs args = direct_args(p);
  if (p.n * p.out_c * ((args.out_h + 6) / 7) * ((args.out_w + 15) / 8) > kInt32Max) return false;
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  // channels_last: a block takes several images only where they are small.
  return !channels_last || (p.multiplier == 1 && p.aligned && p.c % 8 == 0 && p.c <= 1 << 18 &&
                            p.h * p.w * p.c <= kInt32Max / 2 && p.out_h * p.out_w * p.c <= kInt32Max / 2);
}

// blocked: a row of a thread's window lies in registers; of wide tiles, what some of its taps read.
constexpr int kMaxBlockedWindow = 80;
constexpr int kMaxTallBlockedWindow = 40;  // beside the sums of seven rows

inline bool can_serve_blocked(const Problem& p, const Tile& tile) {
  if (p.kernel_h * p.kernel_w < kMinLargeTaps) return false;
  const int64_t span_h = (p.kernel_h - 1) * p.dilation_h, span_w = (p.kernel_w - 1) * p.dilation_w;
  if (p.stride_h > 2 || p.stride_w > 2 || p.kernel_w > 64 || span_h > 512) return false;
  const bool is_wide = tile.columns > 7;
  if (is_wide && (p.stride_w > 1 || p.dilation_w > 1 || p.dilation_h > 1)) return false;
  if (!is_wide && 6 * p.stride_w + span_w >= (tile.rows > 4 ? kMaxTallBlockedWindow : kMaxBlockedWindow)) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.n * p.out_c * ((p.out_h + tile.rows - 1) / tile.rows) * ((p.out_w + 6) / 7) > kInt32Max) return false;
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  const bool channels_last = p.layout == Layout::kNhwc;
  if (channels_last && p.multiplier != 1) return false;
  // Weights, and what a block one thread wide and high reads.
  const int64_t in_h = p.direction == Direction::kGradInput ? p.out_h : p.h,
                rows = (tile.rows - 1) * p.stride_h + span_h + 1;
  const int64_t channels = channels_last ? 16 / element_size(p.dtype) : 1;
  const int64_t weight_bytes = p.kernel_h * (p.kernel_w + 3) * 4 * channels;
  const int64_t in_bytes = (rows < in_h ? rows : in_h) * ((tile.columns - 1) * p.stride_w + span_w + 1) * 4 * channels;
  // The weights of many channels leave room for few threads (8x64x128x128, 63x63, fp32, channels_last, H200: 67 ms).
  return weight_bytes + in_bytes <= kSharedBytesEverywhere && (!channels_last || weight_bytes <= 24 << 10);
}

// Grad of weight: every tap is a register (11x11), and a dilated row of taps must leave room beside them.
constexpr int kMaxGradWeightTaps = 121;
constexpr int kMaxGradWeightSpan = 40;
// Beyond these, registers spill: a thread of channels_last has an address for each load as well.
constexpr int kMaxMarchRegisters = 200;
constexpr int kMaxMarchRegistersNhwc = 225;
constexpr int kGradWeightThreads = 128;  // a block, at most
constexpr int kMaxWideStripTaps = 25;    // NCHW, strips of eight columns

inline bool can_serve_grad_weight(const Problem& p, Kernel kernel, const Tile& tile) {
  const bool channels_last = kernel == Kernel::kGradWeightNhwc;
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw) || taps > kMaxGradWeightTaps) return false;
  // Rows that are `dilation_h` apart are a problem of their own; with a stride they are not.
  if (p.dilation_h > 1 && p.stride_h > 1) return false;
  if (p.stride_h > 2 || p.stride_w > 2 || (p.kernel_w - 1) * p.dilation_w > kMaxGradWeightSpan) return false;
  // Rows of grad_output that meet padding alone would be missed.
  if (p.padding_h > (p.kernel_h - 1) * p.dilation_h || p.padding_w > 64) return false;
  if (p.h * p.w > kInt32Max || p.n * p.out_h * p.out_w > kInt32Max) return false;
  const int load = channels_last || tile.vector < tile.grad_vector ? tile.vector : tile.grad_vector;
  const MarchRegisters registers =
      march_registers(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w), static_cast<int>(p.stride_h),
                      static_cast<int>(p.stride_w), static_cast<int>(p.dilation_w), tile.columns,
                      channels_last ? tile.vector : 1, load, element_size(p.dtype));
  if (channels_last && tile.queued) {
    // Two steps of all threads, beside 8 KB.
    const int64_t window = (tile.columns - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
    const int64_t bytes = (p.stride_h * window + tile.columns) * tile.vector * element_size(p.dtype);
    if (2 * bytes * kGradWeightThreads + (8 << 10) > kSharedBytesEverywhere) return false;
  }
  if (channels_last) {
    const int loads = registers.step * 4 / (tile.vector * (load == 1 ? 4 : element_size(p.dtype)));
    const int limit = tile.vector == 1 ? kMaxMarchRegistersNhwc : kMaxMarchRegisters;
    return p.multiplier == 1 && p.c % tile.vector == 0 && (p.aligned || tile.vector == 1) &&
           registers.kept + registers.step + 2 * loads <= limit && p.h * p.w * p.c <= kInt32Max &&
           p.out_h * p.out_w * p.c <= kInt32Max;
  }
  if (registers.kept + registers.step > kMaxMarchRegisters) return false;
  if (tile.staged) {
    // The images that a block's threads may meet at once, and one more at either end.
    const int64_t strips = (p.out_w + tile.columns - 1) / tile.columns;
    const int64_t elements = (kGradWeightThreads / strips + 2) * (p.h * p.w + p.out_h * p.out_w);
    if (p.dilation_h != 1 || strips > kGradWeightThreads || elements * element_size(p.dtype) > 44 << 10) return false;
  }
  if (tile.queued) {
    // Two steps of all threads, of words that may begin and end outside the window.
    const int64_t window = (tile.columns - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1 + 2 * tile.vector;
    const int64_t bytes = (p.stride_h * window + tile.columns) * element_size(p.dtype);
    if (2 * bytes * kGradWeightThreads > kSharedBytesEverywhere) return false;
  }
  if (tile.columns == 8 && taps > kMaxWideStripTaps) return false;
  return (p.aligned || (tile.vector == 1 && tile.grad_vector == 1)) && p.w % tile.vector == 0 &&
         p.out_w % tile.grad_vector == 0;
}

// stream_nchw and planes_nchw: registers for the filter, the sums of the live rows and a row of the window, and the
// multiply-adds of an unrolled stage, which are compile time.
constexpr int kMaxRollingRegisters = 150;
constexpr int kMaxRollingStage = 3000;
constexpr int kMaxThreadsW = 256;

inline bool can_roll(const Problem& p, const DirectArgs& args, Kernel kernel, const Tile& tile) {
  const bool aligned = p.aligned || tile.vector == 1;
  if (p.layout != Layout::kNchw || p.multiplier != 1 || !aligned || args.w % tile.vector != 0 || args.padding_w < -64 ||
      args.out_w > kMaxThreadsW * tile.columns)
    return false;
  const int taps = static_cast<int>(p.kernel_h * p.kernel_w);
  const int live_rows =
      rolling_live_rows(static_cast<int>(p.kernel_h), static_cast<int>(p.stride_h), static_cast<int>(p.dilation_h));
  const int stage_rows = rolling_stage_outputs(live_rows) * static_cast<int>(p.stride_h);
  const int window = window_size(tile.columns, static_cast<int>(p.stride_w), static_cast<int>(p.kernel_w),
                                 static_cast<int>(p.dilation_w));
  if (taps + live_rows * tile.columns + window > kMaxRollingRegisters ||
      stage_rows * taps * tile.columns > kMaxRollingStage * static_cast<int>(p.stride_h))
    return false;
  // Shared memory for the smallest launch: one plane, or a ring of the fewest stages, and its outputs.
  const int64_t granule = 16 / element_size(p.dtype);
  const int64_t depth = stream_depth(args.w % granule == 0 && p.aligned ? 2 : 3, stage_rows * args.w, granule);
  // A granule at the end of a stage may reach into the next stage, not beyond: rows of one fp16 element are eight a granule.
  if (kernel == Kernel::kStreamNchw && stage_rows * args.w < granule) return false;
  const int64_t elements = kernel == Kernel::kPlanesNchw
                               ? static_cast<int64_t>(args.h) * args.w + static_cast<int64_t>(args.out_h) * args.out_w
                               : depth * stage_rows * args.w + rolling_stage_outputs(live_rows) * args.out_w;
  return (elements + 4 * granule) * element_size(p.dtype) <= kSharedBytesEverywhere;
}

// toeplitz_grad_weight and blocked_grad_weight: a kernel's sums are a block's registers.
constexpr int kMaxLargeGradWeight = 64;

inline bool can_serve_large_grad_weight(const Problem& p, Kernel kernel, int tile) {
  const bool channels_last =
      kernel == Kernel::kBlockedGradWeight ? tile == 1 : kToeplitzGradWeightTiles[tile].vector > 1;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw)) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (kernel == Kernel::kToeplitzGradWeight && p.dtype == DType::kFloat32) return false;
  if (p.kernel_h > kMaxLargeGradWeight || p.kernel_w > kMaxLargeGradWeight) return false;
  // Columns of grad_output that meet padding alone would be missed by the bias.
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  const int64_t channels = channels_last ? p.out_c : 1;  // that lie between neighbouring columns
  return p.h * p.w <= kInt32Max && p.out_h * p.out_w <= kInt32Max && p.w * channels <= kInt32Max &&
         p.out_w * channels <= kInt32Max && p.out_c <= kInt32Max &&
         p.n * p.out_h * (p.w + p.out_w + 15) / 16 <= kInt32Max;
}

// images_grad_weight: the kernel rows that meet the image, as differences between an input row and an output row.
struct LiveRows {
  int first, count;
};
inline LiveRows live_rows_of(const Problem& p) {
  const int64_t first = p.padding_h < p.out_h - 1 ? -p.padding_h : 1 - p.out_h;
  const int64_t last = p.kernel_h - 1 - p.padding_h < p.h - 1 ? p.kernel_h - 1 - p.padding_h : p.h - 1;
  return {static_cast<int>(first), static_cast<int>(last - first + 1)};
}

inline bool can_serve_images_grad_weight(const Problem& p, Kernel kernel, const Tile& tile) {
  if (p.layout != (kernel == Kernel::kImagesGradWeightNhwc ? Layout::kNhwc : Layout::kNchw)) return false;
  if (p.dtype == DType::kFloat32 || p.multiplier != 1) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.kernel_h > kMaxLargeGradWeight || p.kernel_w > kMaxLargeGradWeight) return false;
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  // channels_last: a block takes as many channels as fit.
  const int64_t stage = images_stage(false, tile.columns, 1) * (images_pitch(static_cast<int>(p.h), tile.columns) +
                                                                images_pitch(static_cast<int>(p.out_h), tile.columns));
  if (tile.columns == 32 && stage * 2 > kSharedBytesEverywhere) return false;
  return p.h <= tile.columns && p.w <= tile.columns && p.out_h <= tile.columns && p.out_w <= tile.columns &&
         p.c <= kInt32Max / 256 && p.n <= kInt32Max;
}

// strips_grad_weight: rows and columns of a kernel.
constexpr int kMaxSmallGradWeight = 9;

inline bool can_serve_strips_grad_weight(const Problem& p, Kernel kernel) {
  const bool channels_last = kernel == Kernel::kStripsGradWeightNhwc;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw) || p.dtype == DType::kFloat32) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.kernel_h > kMaxSmallGradWeight || p.kernel_w > kMaxSmallGradWeight) return false;
  // channels_last: words of eight channels, and rows' offsets that are 32-bit numbers.
  if (channels_last &&
      (!p.aligned || p.c % 8 != 0 || p.multiplier != 1 || p.w * p.c > kInt32Max || p.out_w * p.c > kInt32Max))
    return false;
  return p.h * p.w <= kInt32Max && p.out_h * p.out_w <= kInt32Max && p.out_c <= kInt32Max &&
         p.n * p.out_h * (p.w + p.out_w + 15) <= kInt32Max && p.padding_h <= 1 << 20 && p.padding_w <= 1 << 20;
}

// What a product of the tensor cores takes: windows of eight columns of grad_output of sixteen strips.
constexpr int kWindow = 8;
constexpr int kStripsAtOnce = 16;

// Steps of a stage: a multiple of the kernel's rows, so that those of grad_output are registers with fixed names.
constexpr int strips_stage_rows(int kernel_h, int fewest) { return (fewest + kernel_h - 1) / kernel_h * kernel_h; }

// strips_grad_weight_nhwc: sixteen channels a block, one for each warp; two blocks of few registers a multiprocessor.
constexpr int kStripsGradWeightChannels = 16;
constexpr int kStripsFewestRowsNhwc = 3;
constexpr int strips_blocks_nhwc(int kernel_h) { return kernel_h <= 3 ? 2 : 1; }

// Its shared memory, of rounds of `lines` patches of `windows` windows: as it lies in global memory, `buffers` stages of
// blocks of eight pixels; planar, `sets` stages, for each channel `plane` elements, an odd number of 16-byte words, of
// lines of `pitch`. A line has eight words more than windows, so that in banks, which are eight words wide, its first
// window follows the last one of the line before.
struct StripsLayoutNhwc {
  int sets;
  int pitch, row, plane;          // elements
  int raw_row, raw_stage, bytes;  // bytes
  int line_factor;                // block * line_factor >> 16: its line, right for the few hundreds of a stage

  constexpr StripsLayoutNhwc(int kernel_h, int lines, int windows, int buffers, int sets)
      : sets(sets),
        pitch(kWindow * (windows == 8 ? 2 * windows + 1 : windows + 8)),
        row(lines * pitch),
        plane(strips_stage_rows(kernel_h, kStripsFewestRowsNhwc) * row),
        raw_row(lines * (2 * windows + 1) * kWindow * kStripsGradWeightChannels * 2),
        raw_stage(strips_stage_rows(kernel_h, kStripsFewestRowsNhwc) * raw_row),
        bytes(0),
        line_factor((1 << 16) / (2 * windows + 1) + 1) {
    if (plane % (2 * kWindow) == 0) plane += kWindow;
    bytes = buffers * raw_stage + sets * kStripsGradWeightChannels * plane * 2;
  }
};

// As many lines as make sixteen strips, of segments of a row that leave room for two stages in `shared_bytes`.
struct StripsCutNhwc {
  int windows, segments, lines;
};
constexpr StripsCutNhwc strips_cut_nhwc(int kernel_h, int out_w, int shared_bytes) {
  const int all = (out_w + kWindow - 1) / kWindow;
  for (int segments = (all + 7) / 8;; ++segments) {
    const int windows = (all + segments - 1) / segments;
    for (int lines = kStripsAtOnce / windows; lines > 0; --lines)
      if (StripsLayoutNhwc(kernel_h, lines, windows, 2, 1).bytes <= shared_bytes)
        return {windows, (all + windows - 1) / windows, lines};
  }
}

// blocked_grad_weight: the taps of a thread, as few multiply-adds wasted as can be; the loads of a step and the
// kRows - 1 steps more than rows are counted in, at 12 rows.
struct TapTile {
  int rows, columns;
};
constexpr TapTile best_tap_tile(int64_t kernel_h, int64_t kernel_w) {
  constexpr TapTile kCandidates[] = {{4, 8}, {3, 8}, {2, 8}, {8, 4}, {7, 4}, {6, 4}, {5, 4}, {4, 4}, {3, 4}};
  constexpr int kLoads = 8, kSteps = 12, kMaxThreads = 128;
  TapTile best{};
  int64_t least = 0;
  for (const TapTile tile : kCandidates) {
    const int64_t tiles = ((kernel_h + tile.rows - 1) / tile.rows) * ((kernel_w + tile.columns - 1) / tile.columns);
    const int64_t cost = tiles * (tile.rows * tile.columns + tile.columns + kLoads) * (kSteps + tile.rows - 1);
    if (tiles <= kMaxThreads && (least == 0 || cost < least)) least = cost, best = tile;
  }
  return best;
}

// direct_nchw: where the first row of a thread's window begins within a word, the same for all threads; -1: it is not.
inline int direct_nchw_phase(const DirectArgs& args, const Tile& tile) {
  const int vector = tile.vector;
  const SkewRows skew_rows = skew_rows_of(args, args.stride_h, tile.columns, vector);
  if (tile.rows % skew_rows.period != 0) return -1;
  if (args.w % vector == 0) return modulo(args.padding_w, vector);
  // Words straddle the ends of rows, but must not straddle the end of the tensor.
  if (args.multiplier > 1 || args.n * args.out_c % vector * args.h * args.w % vector != 0) return -1;
  int phase = -1;
  for (int plane = 0; plane < vector; ++plane)
    for (int tile_h = 0; tile_h < vector; ++tile_h) {
      const int64_t first_row = (tile_h * tile.rows - skew_rows.before(plane)) * args.stride_h - args.padding_h;
      const int here = modulo(args.padding_w - (static_cast<int64_t>(plane) * args.h + first_row) * args.w, vector);
      if (phase >= 0 && here != phase) return -1;
      phase = here;
    }
  return phase;
}

// direct_nchw: registers for the filter, the sums of the live rows and two rows of the window.
constexpr int kMaxDirectNchwRegisters = 150;

inline bool can_serve_direct_nchw(const Problem& p, const DirectArgs& args, const Tile& tile) {
  if (p.layout != Layout::kNchw || args.padding_w < -64 || (!p.aligned && tile.vector > 1)) return false;
  // Strided windows of many taps spill, and tiles of many rows where windows are large.
  const int64_t stride = p.stride_h > p.stride_w ? p.stride_h : p.stride_w;
  if (p.kernel_h * p.kernel_w > 9) {
    if (stride > 2 || (stride > 1 && (args.w % tile.vector != 0 || tile.columns == 8))) return false;
    if (tile.vector == 8 && args.w % 8 == 4) return false;  // words of four straddle nothing
    if (stride > 1 && p.kernel_h * p.kernel_w > 25 && tile.rows > 4 && p.dtype == DType::kFloat32) return false;
  }
  if (tile.rows > 4 && (p.stride_h > 2 || p.dilation_h > 1)) return false;
  if (tile.rows > 8 && (p.stride_h > 1 || p.stride_w > 1 || p.dilation_w > 1 || p.kernel_w > 7)) return false;
  const int64_t tiles_w = (args.out_w + 2 * tile.columns) / tile.columns, tiles_h = (args.out_h + 8) / tile.rows + 1;
  if (p.n * p.out_c * tiles_h * tiles_w > kInt32Max) return false;  // threads
  // Offsets within a plane, of rows around it too, are 32-bit numbers.
  if ((p.h + 64) * p.w > kInt32Max || (p.out_h + 64) * p.out_w > kInt32Max) return false;
  const int skew = tile.vector > 1 ? max_skew(tile.rows, tile.columns, args.out_w % tile.columns) : 0;
  const int window = window_size(tile.columns + skew, static_cast<int>(p.stride_w), args.kernel_w, args.dilation_w);
  const int span = (args.kernel_h - 1) * args.dilation_h + 1, live_rows = span < tile.rows ? span : tile.rows;
  return window <= 64 &&
         args.kernel_h * args.kernel_w + live_rows * tile.columns + 2 * window <= kMaxDirectNchwRegisters &&
         direct_nchw_phase(args, tile) >= 0;
}

// Kernels whose lanes are images. Pairs of an input and an output position along one dimension that meet a tap.
constexpr int lane_pairs(int in, int out, int kernel, int padding) {
  int pairs = 0;
  for (int o = 0; o < out; ++o)
    for (int k = 0; k < in; ++k) pairs += k - o + padding >= 0 && k - o + padding < kernel;
  return pairs;
}

// Small images, stride 1, fp32; element for element alike in every plane, so all tensors are aligned.
inline bool has_lane_images(const Problem& p) {
  if (p.dtype != DType::kFloat32) return false;
  if (p.kernel_h * p.kernel_w < kMinLargeTaps || p.kernel_h > 64 || p.kernel_w > 32) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (!p.aligned || p.multiplier != 1 || p.padding_h > 64 || p.padding_w > 64) return false;
  if (p.n > 4 * 65535 || p.out_c > kInt32Max / 64) return false;  // blocks of a launch
  return p.h <= kMaxLaneImage && p.w <= kMaxLaneImage && p.out_h <= kMaxLaneImage && p.out_w <= kMaxLaneImage;
}

// Multiply-adds of a whole plane, which are compile time, and values in registers.
constexpr int kMaxLanePlane = 4096, kMaxImagesFmaRegisters = 128, kMaxImagesFmaGradWeightRegisters = 150;

inline bool can_serve_images_fma(const Problem& p, const Tile& tile) {
  if (!has_lane_images(p)) return false;
  const DirectArgs args = direct_args(p);
  const int pairs_h = lane_pairs(args.h, args.out_h, args.kernel_h, args.padding_h);
  const int pairs_w = lane_pairs(args.w, args.out_w, args.kernel_w, args.padding_w);
  if (pairs_h == 0 || pairs_w == 0 || args.out_h > max_lane_out_height(args.out_w)) return false;
  const bool whole_plane = tile.columns > 0;
  if (whole_plane) {
    // channels_last is as fast row by row (7x7 and 13x13 on 7x7 images).
    const int rows = tile.rows < args.out_h ? tile.rows : args.out_h;
    if (p.layout == Layout::kNhwc || pairs_h * pairs_w > kMaxLanePlane ||
        rows * args.out_w + args.h * args.w > kMaxImagesFmaRegisters)
      return false;
  }
  return images_fma_cut(args, whole_plane, p.layout == Layout::kNhwc).shared_bytes <= kSharedBytesEverywhere;
}

inline bool can_serve_images_fma_grad_weight(const Problem& p, const Tile& tile) {
  // Positions that meet padding alone would be missed.
  if (!has_lane_images(p) || p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  const DirectArgs args = direct_args(p);
  const bool whole_plane = tile.columns > 0;
  if (whole_plane) {
    const int pairs_h = lane_pairs(args.h, args.out_h, args.kernel_h, args.padding_h);
    const int pairs_w = lane_pairs(args.w, args.out_w, args.kernel_w, args.padding_w);
    const int taps = args.w + args.out_w - 1;  // of a kernel row, which are registers beside both planes
    if (p.layout == Layout::kNhwc || pairs_w * pairs_h > kMaxLanePlane || args.kernel_h >= args.h + args.out_h ||
        !lane_sums_fit(taps, args.h, args.w, args.out_h, args.out_w) ||
        args.h * args.w + args.out_h * args.out_w + taps > kMaxImagesFmaGradWeightRegisters)
      return false;
  }
  return images_fma_grad_weight_cut(args, whole_plane, p.layout == Layout::kNhwc).shared_bytes <=
         kSharedBytesEverywhere;
}

// grad_weight_stream_nhwc: an unrolled stage, and a ring of two stages of a single thread tile.
inline bool can_serve_grad_weight_stream(const Problem& p, const Tile& tile) {
  if (p.layout != Layout::kNhwc || p.multiplier != 1 || !p.aligned || p.c * element_size(p.dtype) % 16 != 0)
    return false;
  if (p.stride_h > 2 || p.stride_w > 2 || p.dilation_h > 1 || p.dilation_w > 1) return false;
  if (p.kernel_h * p.kernel_w > kMaxRegisterTaps || p.padding_h > 1 << 20 || p.padding_w > 64) return false;
  if (p.n * p.h * p.w > kInt32Max || p.n * p.out_h * p.out_w > kInt32Max || p.w * p.c > kInt32Max / 128 ||
      p.out_w * p.c > kInt32Max / 128)
    return false;
  const GradWeightStreamShape shape =
      grad_weight_stream_shape(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w), static_cast<int>(p.stride_h),
                               static_cast<int>(p.stride_w));
  const int64_t row_pixels = shape.stride_h * shape.window + kGradWeightStreamColumns;
  return shape.vector > 0 &&
         2 * shape.stage_steps * row_pixels * tile.vector * element_size(p.dtype) <= kSharedBytesEverywhere;
}

// Whether `kernel` with tile `tile` can serve `p` at all.
inline bool can_serve(const Problem& p, Kernel kernel, int tile) {
  if (kernel == Kernel::kGeneral) return true;
  if (p.dtype == DType::kFloat64 || is_grad_weight_kernel(kernel) != (p.direction == Direction::kGradWeight))
    return false;
  if (kernel == Kernel::kImagesFmaGradWeight)
    return can_serve_images_fma_grad_weight(p, tile_table(kernel, p.dtype)[tile]);
  if (kernel == Kernel::kToeplitzGradWeight || kernel == Kernel::kBlockedGradWeight)
    return can_serve_large_grad_weight(p, kernel, tile);
  if (is_images_grad_weight(kernel)) return can_serve_images_grad_weight(p, kernel, tile_table(kernel, p.dtype)[tile]);
  if (kernel == Kernel::kGradWeightStreamNhwc) return can_serve_grad_weight_stream(p, kGradWeightStreamNhwcTiles[tile]);
  if (is_strips_grad_weight(kernel)) return can_serve_strips_grad_weight(p, kernel);
  if (is_grad_weight_kernel(kernel)) return can_serve_grad_weight(p, kernel, tile_table(kernel, p.dtype)[tile]);
  const bool grad_input_kernel = is_grad_input_kernel(kernel);
  if (grad_input_kernel && p.direction != Direction::kGradInput) return false;
  // The grad of input is a flipped forward pass only where every output position has its own input position.
  const bool strided = p.stride_h != 1 || p.stride_w != 1;
  if (p.direction == Direction::kGradInput && (strided != grad_input_kernel || p.multiplier != 1)) return false;
  if (grad_input_kernel && (p.stride_h == 3 || p.stride_w == 3)) return false;  // tiles are four rows and columns
  if (kernel == Kernel::kToeplitz) return can_serve_toeplitz(p);
  if (kernel == Kernel::kBandImages) return can_serve_band_images(p, kBandImagesTiles[tile]);
  if (kernel == Kernel::kBlocked) return can_serve_blocked(p, kBlockedTiles[tile]);
  if (is_images(kernel))
    return p.layout == (kernel == Kernel::kImagesNhwc ? Layout::kNhwc : Layout::kNchw) &&
           can_serve_images(p, tile_table(kernel, p.dtype)[tile]);
  if (kernel == Kernel::kImagesFma) return can_serve_images_fma(p, tile_table(kernel, p.dtype)[tile]);
  if (is_strips(kernel)) return can_serve_strips(p, kernel);
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.stride_h > 4 || p.stride_w > 4 || p.dilation_h > 32 || p.dilation_w > 32) return false;
  if (p.h * p.w > kInt32Max || p.out_h * p.out_w > kInt32Max || p.n * p.out_c > kInt32Max) return false;
  const int64_t span = (p.kernel_h - 1) * p.dilation_h > (p.kernel_w - 1) * p.dilation_w
                           ? (p.kernel_h - 1) * p.dilation_h
                           : (p.kernel_w - 1) * p.dilation_w;
  if (span > kMaxSpan) return false;
  if (p.n * p.out_c * p.out_h * p.out_w / 4 > kInt32Max || p.padding_h > 1 << 20 || p.padding_w > 64) return false;

  const DirectArgs args = direct_args(p);
  const Tile& t = tile_table(kernel, p.dtype)[tile];
  const bool aligned = p.aligned || t.vector == 1;
  const int kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w);
  const int stride_h = static_cast<int>(p.stride_h), stride_w = static_cast<int>(p.stride_w);
  const int dilation_h = static_cast<int>(p.dilation_h), dilation_w = static_cast<int>(p.dilation_w);
  if (grad_input_kernel) {
    const bool channels_last = kernel == Kernel::kGradInputNhwc;
    if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw) || !aligned || args.padding_w < -64 ||
        (channels_last ? p.c : args.w) % t.vector != 0)
      return false;
    if (channels_last && (p.w * p.c > kInt32Max / 64 || p.out_w * p.c > kInt32Max / 64)) return false;
    return grad_input_registers(t.columns, t.rows, channels_last ? t.vector : 1, kernel_h, kernel_w, stride_h, stride_w,
                                dilation_h, dilation_w) <= kMaxGradInputRegisters;
  }
  if (is_rolling_nchw(kernel)) return can_roll(p, args, kernel, t);
  if (taps > kMaxRegisterTaps) return false;
  if (kernel == Kernel::kDirectNchw) return can_serve_direct_nchw(p, args, t);
  if (p.layout != Layout::kNhwc || p.multiplier != 1 || p.w * p.c > kInt32Max / 64 || p.out_w * p.c > kInt32Max / 64)
    return false;

  if (kernel == Kernel::kDirectNhwc)
    return aligned && p.c % t.vector == 0 && taps <= kMaxDirectNhwcTaps &&
           window_pixels(t.rows, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w) <= kMaxWindowPixels;
  const int in_rows = window_size(4, stride_h, kernel_h, dilation_h);
  const int in_columns = window_size(4, stride_w, kernel_w, dilation_w);
  if (kernel == Kernel::kStreamNhwc) {
    const int vector = stream_nhwc_vector(kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w);
    const int live_rows = rolling_live_rows(kernel_h, stride_h, dilation_h);
    const int columns = 4 * stream_nhwc_least_tiles(t.vector, vector, element_size(p.dtype));
    const int stage_pixels =
        rolling_stage_outputs(live_rows) * stride_h * window_size(columns, stride_w, kernel_w, dilation_w);
    const int registers = stream_nhwc_registers(kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w);
    // Of one channel a thread, dilated ones spill (5x5).
    return p.aligned && p.c * element_size(p.dtype) % 16 == 0 && (vector > 1 || (dilation_h == 1 && dilation_w == 1)) &&
           2 * stage_pixels * t.vector * element_size(p.dtype) <= kSharedBytesEverywhere &&
           registers * vector <= kMaxStreamNhwcRegisters;
  }
  if (taps > kMaxTiledStridedTaps && (stride_h > 1 || stride_w > 1)) return false;
  const int pixel_bytes = (t.vector * 4 + 8) * element_size(p.dtype);
  return p.aligned && p.c * element_size(p.dtype) % 16 == 0 &&
         in_rows * in_columns * pixel_bytes + tiled_nhwc_lane_taps(static_cast<int>(taps)) * t.vector * 16 <=
             kSharedBytesEverywhere;
}

}  // namespace depthwise
