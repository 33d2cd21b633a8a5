// What the kernels for up to nine rows and columns on the tensor cores can serve: strips_nchw, strips_nhwc, and for grad of
// weight strips_grad_weight_nchw, strips_grad_weight_nhwc.
#pragma once

#include <initializer_list>

#include "variants.h"

namespace depthwise {

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
// blocks of eight pixels; planar, one stage, for each channel `plane` elements, an odd number of 16-byte words, of
// lines of `pitch`. A line has eight words more than windows, so that in banks, which are eight words wide, its first
// window follows the last one of the line before.
struct StripsLayoutNhwc {
  int pitch, row, plane;          // elements
  int raw_row, raw_stage, bytes;  // bytes
  int line_factor;                // block * line_factor >> 16: its line, right for the few hundreds of a stage

  constexpr StripsLayoutNhwc(int kernel_h, int lines, int windows, int buffers)
      : pitch(kWindow * (windows == 8 ? 2 * windows + 1 : windows + 8)),
        row(lines * pitch),
        plane(strips_stage_rows(kernel_h, kStripsFewestRowsNhwc) * row),
        raw_row(lines * (2 * windows + 1) * kWindow * kStripsGradWeightChannels * 2),
        raw_stage(strips_stage_rows(kernel_h, kStripsFewestRowsNhwc) * raw_row),
        bytes(0),
        line_factor((1 << 16) / (2 * windows + 1) + 1) {
    if (plane % (2 * kWindow) == 0) plane += kWindow;
    bytes = buffers * raw_stage + kStripsGradWeightChannels * plane * 2;
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
      if (StripsLayoutNhwc(kernel_h, lines, windows, 2).bytes <= shared_bytes)
        return {windows, (all + windows - 1) / windows, lines};
  }
}

}  // namespace depthwise
