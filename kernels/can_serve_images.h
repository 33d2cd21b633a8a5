// What the kernels for small images can serve: on the tensor cores images, image_bands_nhwc, images_grad_weight and
// image_rows_grad_weight; by multiply-adds those of columns, and images_fma and images_fma_grad_weight.
#pragma once

#include <initializer_list>

#include "can_serve_large.h"
#include "columns_tiling.h"
#include "images_fma_tiling.h"
#include "images_tiling.h"

namespace depthwise {

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

inline bool can_serve_images(const Problem& p, Kernel kernel, const Tile& tile) {
  const bool channels_last = kernel == Kernel::kImagesNhwc;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw)) return false;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.multiplier != 1 || !p.aligned) return false;
  if (p.h > kMaxImageSize || p.w > kMaxImageSize || p.out_h > kMaxImageSize || p.out_w > kMaxImageSize) return false;
  if (channels_last && p.c % 8 != 0) return false;
  if (p.c > kInt32Max / 2 || p.kernel_h * p.kernel_w > kInt32Max / 2 || p.n > kMaxGridY * kImagesTogether) return false;
  for (const int64_t pixels : {p.h * p.w, p.out_h * p.out_w})
    if (2 * kImagesTogether * planes_pitch(tile.vector, static_cast<int>(pixels), channels_last) >
        kSharedBytesEverywhere)
      return false;
  const ImageShape shape = image_shape_of(p);
  const int registers = image_registers(shape.h, shape.w, shape.out_h, shape.out_w, shape.shifts);
  return shape.shifts > 0 && registers <= kMaxImageRegisters && registers * tile.vector * 32 <= 64 << 10;
}

// image_bands_nhwc: rows of input that a band of outputs meets, which are registers.
constexpr int kMaxImageBandsRows = 14;

inline bool can_serve_image_bands(const Problem& p) {
  if (p.layout != Layout::kNhwc || (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16)) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.multiplier != 1 || !p.aligned || p.c % 8 != 0) return false;
  if (p.h > kMaxImageSize || p.w > kMaxImageSize || p.out_h > kMaxImageSize || p.out_w > kMaxImageSize) return false;
  if (p.c > kInt32Max / (kImagesTogether * kMaxImageSize * kMaxImageSize) || p.kernel_h * p.kernel_w > kInt32Max / 2 ||
      p.n > kMaxGridY * kImagesTogether / kImageBands)
    return false;
  const ImageShape shape = image_shape_of(p);
  return shape.shifts > 0 && image_bands_rows(shape.out_h, shape.shifts, shape.shift_step) <= kMaxImageBandsRows;
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

inline bool can_serve_image_rows_grad_weight(const Problem& p) {
  if (p.layout != Layout::kNhwc || p.dtype == DType::kFloat32 || p.multiplier != 1) return false;
  if (!p.aligned || p.c % 8 != 0) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.kernel_h > kMaxImageRowsKernel || p.padding_h >= p.kernel_h) return false;
  if (p.padding_w >= kImageRowsSize || p.kernel_w - p.padding_w > kImageRowsSize) return false;
  return p.h <= kImageRowsSize && p.w <= kImageRowsSize && p.out_h <= kImageRowsSize && p.out_w <= kImageRowsSize &&
         p.c <= kInt32Max / 256 && p.n <= kInt32Max;
}

// columns_nchw, columns_nhwc and columns_grad_weight.
inline bool can_serve_columns(const Problem& p, Kernel kernel) {
  const bool channels_last = kernel == Kernel::kColumnsNhwc;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw) || p.multiplier != 1 || !p.aligned) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.kernel_h > kMaxColumnsKernel || p.kernel_w > kMaxColumnsKernel) return false;
  if (2 * p.padding_h + 1 != p.kernel_h || 2 * p.padding_w + 1 != p.kernel_w) return false;
  if (p.h > (kernel == Kernel::kColumnsNchw ? kMaxColumnsHeight : kMaxColumnsRows) || p.w > 64 ||
      p.n * p.c > kInt32Max / 64)
    return false;
  if (channels_last)
    return p.kernel_h * p.kernel_w <= kMaxColumnsNhwcTaps && p.w <= kMaxColumnsNhwcWidth && p.n <= kMaxGridY &&
           p.c * element_size(p.dtype) % 16 == 0;
  const int width = static_cast<int>(p.w);
  return columns_lanes(width) <= 32 && columns_run_planes(static_cast<int>(p.h), width, element_size(p.dtype)) > 0;
}

// Kernels whose lanes are images. Pairs of an input and an output position along one dimension that meet a tap.
constexpr int lane_pairs(int in, int out, int kernel, int padding) {
  int pairs = 0;
  for (int o = 0; o < out; ++o)
    for (int k = 0; k < in; ++k) pairs += k - o + padding >= 0 && k - o + padding < kernel;
  return pairs;
}

// Small images, stride 1, fp32; element for element alike in every plane, so all tensors are aligned.
inline bool has_lane_images(const Problem& p, int max_height, int max_out_height) {
  if (p.dtype != DType::kFloat32) return false;
  if (p.kernel_h * p.kernel_w < kMinLargeTaps || p.kernel_h > 64 || p.kernel_w > 32) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (!p.aligned || p.multiplier != 1 || p.padding_h > 64 || p.padding_w > 64) return false;
  if (p.n > 4 * 65535 || p.out_c > kInt32Max / 64) return false;  // blocks of a launch
  return p.h <= max_height && p.w <= kMaxLaneImage && p.out_h <= max_out_height && p.out_w <= kMaxLaneImage;
}

// Multiply-adds of a whole plane, which are compile time, and values in registers.
constexpr int kMaxLanePlane = 4096, kMaxImagesFmaRegisters = 128, kMaxImagesFmaGradWeightRegisters = 150;

inline bool can_serve_images_fma(const Problem& p, const Tile& tile) {
  const DirectArgs args = direct_args(p);
  if (!has_lane_images(p, max_lane_height(p.w), max_lane_height(p.out_w))) return false;
  const int pairs_h = lane_pairs(args.h, args.out_h, args.kernel_h, args.padding_h);
  const int pairs_w = lane_pairs(args.w, args.out_w, args.kernel_w, args.padding_w);
  if (pairs_h == 0 || pairs_w == 0 || args.out_h > max_lane_out_height(args.out_w)) return false;
  const bool whole_plane = tile.columns > 0;
  if (whole_plane) {
    // channels_last is as fast row by row (7x7 and 13x13 on 7x7 images, H200).
    const int rows = tile.rows < args.out_h ? tile.rows : args.out_h;
    if (p.layout == Layout::kNhwc || pairs_h * pairs_w > kMaxLanePlane ||
        rows * args.out_w + args.h * args.w > kMaxImagesFmaRegisters)
      return false;
  }
  return images_fma_cut(args, whole_plane, p.layout == Layout::kNhwc).shared_bytes <= kSharedBytesEverywhere;
}

inline bool can_serve_images_fma_grad_weight(const Problem& p, const Tile& tile) {
  // Positions that meet padding alone would be missed.
  const bool whole_plane = tile.columns > 0;
  const int max_height = takes_half_lanes(whole_plane, p.w, p.out_w) ? kMaxLaneImage : max_lane_height(1);
  if (!has_lane_images(p, max_height, max_height) || p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w)
    return false;
  const DirectArgs args = direct_args(p);
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

}  // namespace depthwise
