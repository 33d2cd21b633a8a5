// What the kernels for few taps can serve, which are compiled for their filter's size: forward, grad of input, and grad of
// weight (grad_weight_nchw, grad_weight_planes_nchw, grad_weight_nhwc, grad_weight_stream_nhwc, grad_weight_rows_nhwc).
#pragma once

#include "grad_weight_planes_tiling.h"
#include "grad_weight_rows_tiling.h"

namespace depthwise {

// 7x7: beyond this many fp32 weights a thread, registers spill.
constexpr int kMaxRegisterTaps = 49;
// Windows are described by 64-bit masks: eight outputs at stride 4 and this much kernel are 64 rows.
constexpr int kMaxSpan = 35;

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

// warps_nchw: registers for the filter, the sums of the live rows and a row of the window; an unrolled stage.
constexpr int kMaxWarpsRegisters = 110;

inline bool can_serve_warps(const Problem& p, const DirectArgs& args, const Tile& tile) {
  if (p.layout != Layout::kNchw || p.dtype == DType::kFloat32 || p.multiplier != 1 || !p.aligned) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (args.w % 2 != 0 || args.out_w % 2 != 0 || args.out_w < kWarpsColumns || args.padding_w < 0) return false;
  // Rows that are copied straight on: whole vectors in all, and pairs of columns that exist or do not.
  if (args.w % tile.vector != 0 && (args.out_w % kWarpsColumns != 0 || p.n * p.out_c * args.h * args.w % 8 != 0 ||
                                    args.padding_w % 2 != 0 || args.padding_w >= kWarpsColumns))
    return false;
  // A warp holds a row; in shared memory, one of copies of 16 bytes has a line on its left for the padding.
  const int columns = warps_columns(args.out_w);
  if (args.out_w > columns || (tile.vector == 8 && (args.w > 32 * kWarpsColumns || args.padding_w > kWarpsLine - 8)))
    return false;
  if (p.n * p.out_c * (args.out_h + 8) > kInt32Max) return false;  // blocks
  const int kernel_w = static_cast<int>(p.kernel_w);
  if (p.kernel_h * kernel_w + p.kernel_h * kWarpsColumns + kWarpsColumns + kernel_w > kMaxWarpsRegisters) return false;
  return warps_stage_rows(args.kernel_h) * p.kernel_h * kernel_w * kWarpsColumns <= kMaxRollingStage &&
         2 * warps_depth(args.kernel_h) * warps_stage_rows(args.kernel_h) *
                 warps_pitch(tile.vector, tile.vector - 1, kernel_w) <=
             kSharedBytesEverywhere;
}

// direct_nhwc's filters are registers as well; of one channel a thread there may be more.
constexpr int kMaxDirectNhwcTaps = 9, kMaxDirectNhwcTapsOfOne = 25;
// tiled_nhwc: 7x7 at stride 2 spills.
constexpr int kMaxTiledStridedTaps = 25;

inline bool can_serve_nhwc(const Problem& p, Kernel kernel, const Tile& tile) {
  if (p.layout != Layout::kNhwc || p.multiplier != 1 || p.w * p.c > kInt32Max / 64 || p.out_w * p.c > kInt32Max / 64)
    return false;

  const int kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w);
  const int stride_h = static_cast<int>(p.stride_h), stride_w = static_cast<int>(p.stride_w);
  const int dilation_h = static_cast<int>(p.dilation_h), dilation_w = static_cast<int>(p.dilation_w);
  const int taps = kernel_h * kernel_w;
  if (kernel == Kernel::kDirectNhwc) {
    const bool one = tile.vector == 1;
    return (p.aligned || one) && p.c % tile.vector == 0 &&
           taps <= (one ? kMaxDirectNhwcTapsOfOne : kMaxDirectNhwcTaps) &&
           window_pixels(tile.rows, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w) <=
               (one ? kMaxWindowPixelsOfOne : kMaxWindowPixels);
  }
  const int in_rows = window_size(4, stride_h, kernel_h, dilation_h);
  const int in_columns = window_size(4, stride_w, kernel_w, dilation_w);
  if (kernel == Kernel::kStreamNhwc) {
    const int vector = stream_nhwc_vector(kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w);
    const int live_rows = rolling_live_rows(kernel_h, stride_h, dilation_h);
    const int columns =
        stream_nhwc_columns(kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, element_size(p.dtype)) *
        stream_nhwc_least_tiles(tile.vector, vector, element_size(p.dtype));
    const int stage_pixels =
        rolling_stage_outputs(live_rows) * stride_h * window_size(columns, stride_w, kernel_w, dilation_w);
    const int registers = stream_nhwc_registers(kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w);
    // Of one channel a thread, dilated ones spill (5x5).
    return p.aligned && p.c * element_size(p.dtype) % 16 == 0 && (vector > 1 || (dilation_h == 1 && dilation_w == 1)) &&
           2 * stage_pixels * tile.vector * element_size(p.dtype) <= kSharedBytesEverywhere &&
           registers * vector <= kMaxStreamNhwcRegisters;
  }
  if (taps > kMaxTiledStridedTaps && (stride_h > 1 || stride_w > 1)) return false;
  const int pixel_bytes = (tile.vector * 4 + 8) * element_size(p.dtype);
  return p.aligned && p.c * element_size(p.dtype) % 16 == 0 &&
         in_rows * in_columns * pixel_bytes + tiled_nhwc_lane_taps(taps) * tile.vector * 16 <= kSharedBytesEverywhere;
}

// grad_input_nchw and grad_input_nhwc. Their tiles are four rows and columns, no multiple of a stride of 3.
inline bool can_serve_strided_grad_input(const Problem& p, const DirectArgs& args, Kernel kernel, const Tile& tile) {
  if (p.stride_h == 3 || p.stride_w == 3) return false;
  const bool channels_last = kernel == Kernel::kGradInputNhwc;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw) || !(p.aligned || tile.vector == 1) ||
      args.padding_w < -64 || (channels_last ? p.c : args.w) % tile.vector != 0)
    return false;
  if (channels_last && (p.w * p.c > kInt32Max / 64 || p.out_w * p.c > kInt32Max / 64)) return false;
  return grad_input_registers(tile.columns, tile.rows, channels_last ? tile.vector : 1, args.kernel_h, args.kernel_w,
                              static_cast<int>(p.stride_h), static_cast<int>(p.stride_w), args.dilation_h,
                              args.dilation_w) <= kMaxGradInputRegisters;
}

// The kernels for forward and grad of input.
inline bool can_serve_direct(const Problem& p, Kernel kernel, const Tile& tile) {
  if (p.stride_h > 4 || p.stride_w > 4 || p.dilation_h > 32 || p.dilation_w > 32) return false;
  if (p.h * p.w > kInt32Max || p.out_h * p.out_w > kInt32Max || p.n * p.out_c > kInt32Max) return false;
  const int64_t span = (p.kernel_h - 1) * p.dilation_h > (p.kernel_w - 1) * p.dilation_w
                           ? (p.kernel_h - 1) * p.dilation_h
                           : (p.kernel_w - 1) * p.dilation_w;
  if (span > kMaxSpan) return false;
  if (p.n * p.out_c * p.out_h * p.out_w / 4 > kInt32Max || p.padding_h > 1 << 20 || p.padding_w > 64) return false;

  const DirectArgs args = direct_args(p);
  if (is_grad_input_kernel(kernel)) return can_serve_strided_grad_input(p, args, kernel, tile);
  if (is_rolling_nchw(kernel)) return can_roll(p, args, kernel, tile);
  if (kernel == Kernel::kWarpsNchw) return can_serve_warps(p, args, tile);
  if (p.kernel_h * p.kernel_w > kMaxRegisterTaps) return false;
  return kernel == Kernel::kDirectNchw ? can_serve_direct_nchw(p, args, tile) : can_serve_nhwc(p, kernel, tile);
}

// Grad of weight: every tap is a register (11x11), and a dilated row of taps must leave room beside them.
constexpr int kMaxGradWeightTaps = 121;
constexpr int kMaxGradWeightSpan = 40;
// Beyond these, registers spill: a thread of channels_last has an address for each load as well.
constexpr int kMaxMarchRegisters = 200;
constexpr int kMaxMarchRegistersNhwc = 225;
constexpr int kMaxWideStripTaps = 25;  // NCHW, strips of eight columns

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
    if (tile.vector * element_size(p.dtype) < 4) return false;  // too narrow for an asynchronous copy
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

// grad_weight_planes_nchw: registers of the sums, the live rows of grad_output and the window, and of what was read ahead.
constexpr int kMaxPlanesRegisters = 88;

inline bool can_serve_grad_weight_planes(const Problem& p, const Tile& tile) {
  const int64_t taps = p.kernel_h * p.kernel_w, granule = 16 / element_size(p.dtype);
  if (p.layout != Layout::kNchw || !p.aligned || taps > kMaxRegisterTaps || p.dilation_h > 1 || p.dilation_w > 1)
    return false;
  if (p.stride_h > 2 || p.stride_w > 2 || p.kernel_w - 1 > kMaxGradWeightSpan) return false;
  // Rows of grad_output that meet padding alone would be missed.
  if (p.padding_h > p.kernel_h - 1 || p.padding_w > 64) return false;
  if (p.w % tile.vector != 0 || p.out_w % tile.grad_vector != 0 || (tile.columns == 8 && taps > kMaxWideStripTaps))
    return false;
  // All planes of a channel begin alike within their 16 bytes.
  if (p.c * p.h * p.w % granule != 0 || p.out_c * p.out_h * p.out_w % granule != 0) return false;
  const int64_t strips = divide_up(p.out_w, static_cast<int64_t>(tile.columns));
  if (strips > kFewestPlanesThreads || p.n * p.out_c * (p.h + p.padding_h) * strips > kInt32Max / 2 ||
      p.h * p.w > kInt32Max / 16)
    return false;
  const MarchRegisters registers =
      march_registers(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w), static_cast<int>(p.stride_h),
                      static_cast<int>(p.stride_w), 1, tile.columns, 1,
                      tile.vector < tile.grad_vector ? tile.vector : tile.grad_vector, element_size(p.dtype));
  return registers.kept + registers.step <= kMaxPlanesRegisters &&
         grad_weight_planes_cut(grad_weight_planes_shape(p, tile), grad_weight_args(p), 1, 1, kSharedBytesEverywhere)
                 .bytes > 0;
}

// grad_weight_rows_nhwc: 16 bytes of channels a block, and one band under way.
inline bool can_serve_grad_weight_rows(const Problem& p, const Tile& tile) {
  if (p.layout != Layout::kNhwc || p.multiplier != 1 || !p.aligned || p.c * element_size(p.dtype) % 16 != 0)
    return false;
  if (p.stride_h > 2 || p.stride_w > 2 || p.stride_h > p.kernel_h || p.stride_w > p.kernel_w || p.dilation_h > 1 ||
      p.dilation_w > 1)
    return false;
  if (p.kernel_h * p.kernel_w > kMaxRegisterTaps || p.padding_h > 1 << 20 || p.padding_w > 64 || p.h > 1 << 28 ||
      p.w > 1 << 16 || p.out_w > 1 << 16)
    return false;
  if (p.n * p.out_h > kInt32Max || p.w * p.c > kInt32Max || p.out_w * p.c > kInt32Max || p.c > kInt32Max / 128)
    return false;
  const GradWeightRowsShape shape = grad_weight_rows_shape(p, tile);
  if (shape.vector == 0) return false;
  const GradWeightArgs args = grad_weight_args(p);
  GradWeightRowsTiling least = grad_weight_rows_cut(shape, args, true, 1, 1, 1);
  grad_weight_rows_ring(least, shape, args, 1, 2);
  return least.threads <= kGradWeightRowsThreads && least.bytes <= kSharedBytesEverywhere;
}

}  // namespace depthwise
