// select.h for the grad of weight: select_grad_weight, at the end, decides. Times are of 32 images on an H200, ms, where
// nothing else is said.
#pragma once

#include "select_common.h"

namespace depthwise {

// Small images in large batches: a product of sixteen images, or a lane an image.
inline Config select_images_grad_weight(const Problem& p) {
  const bool nchw = p.layout == Layout::kNchw;
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.n < kImagesBatch) return {};
  if (p.dtype != DType::kFloat32) {
    // Not channels that make no whole pixels of 16 bytes: 27x27, 126x14x14 (H100): 0.0466, toeplitz 0.0238; 7x7: 0.0347,
    // 0.0139; 13x13, 124x7x7: 0.0151, 0.0120; 5x5, 124x14x14: 0.0339, marching 0.0138; 3x3, 126x7x7: 0.0148, 0.0091.
    if (!nchw && p.c % 8 != 0) return {};
    // NCHW, fp16: 3x3, 960x7x7: 0.0098, staged 0.0136; 384x14x14: 0.0115, 0.0116; 7x7, 384x14x14: 0.012, 0.016; 27x27,
    // 512x14x14: 0.017, toeplitz 0.087; 29x29, 256x32x32: 0.042, 0.081; not 7x7, 192x28x28: 0.022, strips 0.018.
    // channels_last: 3x3, 960x7x7: 0.0111, marching 0.0113; 7x7, 384x14x14: 0.018, strips 0.026; 768x7x7: 0.011, 0.018;
    // 27x27, 512x14x14: 0.036, toeplitz 0.064; not 3x3, 384x14x14: 0.017, marching 0.013. Few kernel rows, by the rows of
    // an image (H100): 7x7, 384x14x14: 0.0174, images 0.0196, strips 0.0204; 5x5, 672x14x14: 0.0208, 0.0276, 0.0233;
    // that images up to 16x16 and kernels up to seven rows are alike rests on these two shapes alone.
    const Kernel kernel = nchw ? Kernel::kImagesGradWeightNchw : Kernel::kImagesGradWeightNhwc;
    for (int tile = tile_table(kernel, p.dtype).size - 1; tile >= 0; --tile) {
      const int columns = tile_table(kernel, p.dtype)[tile].columns;
      const bool few = columns == 32 ? taps <= k9x9 : !nchw && columns == 16 && taps < k5x5;
      if (few || !can_serve(p, kernel, tile)) continue;
      const bool by_rows = columns == 16 && can_serve(p, Kernel::kImageRowsGradWeight, 0);
      return by_rows ? Config{Kernel::kImageRowsGradWeight, 0} : Config{kernel, tile};
    }
    return {};
  }
  // fp32. NCHW: 5x5, 672x14x14: 0.0235, queue 0.0252; 7x7, 384x14x14: 0.0167, 0.0179; 27x27, 512x14x14: 0.044, blocked
  // 0.272; whole planes: 7x7, 768x7x7: 0.0114, by rows 0.0121, staged 0.016; 13x13, 512x7x7: 0.015, 0.017, blocked 0.077.
  // channels_last: 7x7, 384x14x14: 0.026, marching 0.034; 768x7x7: 0.015, 0.027; 27x27, 512x14x14: 0.064, blocked 0.272;
  // not 5x5, 672x14x14: 0.039, marching 0.028. Wider than 14 (H100): 13x13, 200x20x20: 0.033, blocked 0.057; channels_last
  // 0.044, 0.089.
  const bool is_few = taps <= (takes_half_lanes(false, p.w, p.out_w) ? kMaxRegisterTaps : nchw ? 0 : k5x5);
  if (p.n < kImagesFmaBatch || is_few) return {};
  return can_serve(p, Kernel::kImagesFmaGradWeight, 1) ? Config{Kernel::kImagesFmaGradWeight, 1}
                                                       : first_that_serves(p, Kernel::kImagesFmaGradWeight);
}

// Whole planes, NCHW. H100, microseconds, of 32 images, fp32 / fp16, beside what served them before (marching, but for two):
// 3x3: 32x112x112: 47.3 / 28.8, 49.3 / 33.7; 144x56x56: 52.4 / 31.7, 56.3 / 36.8; 192x28x28: 21.2 / 16.1, 27.0 / 17.6;
// 384x14x14: 14.2 / 11.1, 15.9 / images 11.9; fp32, 960x7x7: 12.0, 14.9; at stride 2: 96x112x112: 80.0 / 44.8, 90.1 / 51.1;
// 144x56x56: 37.4 / 24.3, 39.2 / 27.8; 192x28x28: 18.0 / 12.6, 19.0 / 14.2. 5x5, fp32: 240x28x28: 26.0, 31.5; 672x14x14: 21.8,
// images 26.7; at stride 2: 144x56x56: 36.7 / 25.3, 43.3 / 28.0; 672x14x14: 18.5 / 14.4, 26.6 / 21.4. Not of larger images
// (3x3, 16x32x256x256: 115 / 65, 107 / 63); fp16: 5x5 at stride 1 (240x28x28: 21.2, strips 19.3; 672x14x14: 19.8, images 17.5)
// and 960x7x7 (11.1, images 9.7); fp32: 5x5, 1152x7x7 (16.4, images 14.6).
inline bool may_take_planes(const Problem& p) {
  constexpr int64_t kMostPixels = 112 * 112;
  return p.layout == Layout::kNchw && p.kernel_h * p.kernel_w <= k5x5 && p.h * p.w <= kMostPixels;
}
inline Config select_planes_grad_weight(const Problem& p) {
  constexpr int64_t kFewestPixels = 10 * 10;
  const bool wide = p.dtype == DType::kFloat32, many = p.kernel_h * p.kernel_w > k3x3;
  const bool strided = p.stride_h > 1 || p.stride_w > 1, small = p.h * p.w < kFewestPixels;
  if (!may_take_planes(p) || (small && (many || !wide)) || (many && !wide && !strided)) return {};
  return first_that_serves(p, Kernel::kGradWeightPlanesNchw);
}

inline Config select_marching_nchw(const Problem& p) {
  if (may_take_planes(p)) {
    const Config planes = first_that_serves(p, Kernel::kGradWeightPlanesNchw);
    if (planes.kernel != Kernel::kGeneral) return planes;
  }
  const Kernel kernel = Kernel::kGradWeightNchw;
  const TileTable table = tile_table(kernel, p.dtype);
  const bool wide = p.dtype == DType::kFloat32;
  // Rows to come wait in shared memory where there is much to do for each, fp32 (7x7, 96x56x56: 0.044, in registers 0.068),
  // or where they are long, fp16 (dilation 12, 8x256x64x64: 0.0216, 0.0225). Measured on shapes that planes serve now, and
  // held to where they cannot: 5x5, 240x28x28, fp32: 0.028, 0.035, but 3x3, 144x56x56: 0.055, 0.049; fp16: 3x3 at stride 2,
  // 96x112x112: 0.043, 0.046, but at stride 1, 144x56x56: 0.043, 0.030.
  const bool queued = wide ? p.kernel_h * p.kernel_w >= k5x5 : p.stride_w > 1 || p.dilation_w > 1;
  if (queued)
    for (int tile = 0; tile < table.size; ++tile)
      if (table[tile].queued && can_serve(p, kernel, tile)) return {kernel, tile};
  return first_that_serves(p, kernel);
}

// channels_last, fp32: kernels of so many taps queue their rows.
constexpr int64_t kQueuedTaps = k3x5;

// By whole rows. H100, fp32 / fp16, beside the stream or the march: 3x3, 144x56x56: 0.0547 / 0.0340, 0.0611 / 0.0421; 3x3 at
// stride 2, 96x112x112: 0.0810 / 0.0470, 0.0880 / 0.0515; 5x5 at stride 2, 144x56x56: 0.0418 / 0.0296, 0.0502 / 0.0363; 7x7
// at stride 2, fp16, 96x56x56: 0.0314, marching 0.0374. Two rows a thread of 3x3 in 16 bits (0.0340, one 0.0349) and of 7x7
// (0.0314, one 0.0359), one in fp32 (0.0547, two 0.0554). Not small images (3x3, 384x14x14: 0.0188, marching 0.0168), nor 5x5
// on 240x28x28 (0.0358, stream 0.0332). The thresholds rest on these shapes alone: images of 56x56 and no large tensors,
// pixels of 192 bytes a block, warps enough; 7x7, of one channel a thread, has neither.
inline Config select_rows_nhwc(const Problem& p) {
  constexpr int kFewestThreads = 168, kFewestPixels = 56 * 56, kFewestBytes = 192;
  constexpr int64_t kManyPositions = 1 << 20;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const bool wide = p.dtype == DType::kFloat32, strided = p.stride_h > 1;
  const bool is_7x7 = taps == kMaxRegisterTaps && !wide;
  const int tile = wide || (strided && !is_7x7) ? 0 : 1;
  if (p.stride_h != p.stride_w || p.kernel_h != p.kernel_w ||
      (taps != k3x3 && !(strided && (taps == k5x5 || is_7x7))) || p.h * p.w < kFewestPixels ||
      p.n * p.out_h * p.out_w > kManyPositions || !can_serve(p, Kernel::kGradWeightRowsNhwc, tile))
    return {};
  const GradWeightRowsTiling tiling = grad_weight_rows_tiling(p, kGradWeightRowsNhwcTiles[tile]);
  const int vector = grad_weight_rows_shape(p, kGradWeightRowsNhwcTiles[tile]).vector;
  const bool fills = tiling.threads >= kFewestThreads && tiling.lanes * vector * element_size(p.dtype) >= kFewestBytes;
  return fills || is_7x7 ? Config{Kernel::kGradWeightRowsNhwc, tile} : Config{};
}

inline Config select_marching_nhwc(const Problem& p) {
  const bool wide = p.dtype == DType::kFloat32, dilated = p.dilation_h > 1 || p.dilation_w > 1;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const auto tile_of = [&](int channels, bool queued = false) {
    for (int tile = 0; tile < TileTable(kGradWeightNhwcTiles).size; ++tile) {
      const Tile& t = kGradWeightNhwcTiles[tile];
      if (t.vector == channels && t.queued == queued && can_serve(p, Kernel::kGradWeightNhwc, tile))
        return Config{Kernel::kGradWeightNhwc, tile};
    }
    return Config{};
  };
  const Config rows = select_rows_nhwc(p);
  if (rows.kernel != Kernel::kGeneral) return rows;
  const bool small = p.out_h * p.out_w <= 14 * 14, large = p.n * p.out_h * p.out_w >= 1 << 20;
  // Streams. fp32 at stride 1, 32 channels: 3x3, 16x64x512x512: 0.491, marching 0.510; 144x56x56: 0.051, 0.055; 1x11,
  // 16x64x128x128: 0.050, 0.067; not at stride 2 (96x112x112: 0.077, 0.073). fp16, 64 channels: 144x56x56: 0.036, 0.042;
  // 3x7, 128x128x256: 0.208, 0.281; 1x11: 0.036, 0.059; 3x3 at stride 2: 0.047, 0.050; but 32 for 5x5 at stride 2
  // (144x56x56: 0.032, 64 channels 0.043, 0.044). fp32 5x5 (H100): 672x14x14: 0.0267, marching 0.0312; 240x28x28: 0.0332,
  // queue 0.0337.
  const bool is_5x5 = wide && taps == k5x5 && p.kernel_h == p.kernel_w && p.out_h * p.out_w >= 14 * 14;
  if ((!small || is_5x5) && p.c >= 32 && (wide ? p.stride_w == 1 && (taps < kQueuedTaps || is_5x5) : taps <= k5x5)) {
    const int tile = wide || taps == k5x5 ? 1 : 0;
    if (can_serve(p, Kernel::kGradWeightStreamNhwc, tile)) return {Kernel::kGradWeightStreamNhwc, tile};
  }
  // fp32: rows to come wait in shared memory where there is much to do for each, of two channels as far as registers hold
  // their sums (H100: 3x7, 128x128x256: 0.398, stream 0.420; 7x7,
  // 96x56x56: 0.073, marching 0.085, stream 0.095; 192x28x28: 0.041, 0.055, 0.058; 9x9, 768x32x32: 0.202, 0.218).
  if (wide && taps >= kQueuedTaps && p.stride_w == 1 && !dilated && (!small || taps > k5x5)) {
    const Config queue = tile_of(taps <= k5x5 ? 2 : 1, true);
    if (queue.kernel != Kernel::kGeneral) return queue;
  }
  // Four channels a thread, where registers hold them, but one in small images, of which there would be too few threads
  // (3x3, 384x14x14, fp32 / fp16: 0.016 / 0.014, four 0.022 / 0.018),
  // and fewer in large ones, of which more warps are read at once (3x3, 16x64x512x512: 0.509 / 0.279, four 0.536 /
  // 0.350). In fp32 one also where four do not fit (3x7, 128x128x256: 0.339, two 0.394).
  Config config = small || (large && wide) ? tile_of(1) : large ? tile_of(2) : tile_of(4);
  // Channels that are even and no more: 16 bits queue their rows (5x5, H100: 126x56x56: 0.0418, in registers 0.0553;
  // 126x28x28: 0.0198, 0.0250; 18x112x112: 0.0277, 0.0301; 62x20x20: 0.0168, 0.0202, one channel a thread 0.0153).
  if (config.kernel == Kernel::kGeneral && !wide && p.stride_w == 1 && !dilated) config = tile_of(2, true);
  if (config.kernel == Kernel::kGeneral && wide) config = tile_of(1);
  return config.kernel != Kernel::kGeneral ? config : first_that_serves(p, Kernel::kGradWeightNhwc);
}

// Kernels up to 9x9 in 16 bits on the tensor cores: NCHW, 7x7, 96x56x56: 0.027, marching 0.049; 5x5, 240x28x28: 0.018,
// 0.022; 9x9, 768x32x32: 0.054, 0.124; 3x7, 128x128x256: 0.165, 0.198; not 3x3 (144x56x56: 0.038, 0.030). channels_last:
// 7x7, 96x56x56: 0.036, 0.066; 5x5, 240x28x28: 0.024, 0.031; 9x9, 768x32x32: 0.089, toeplitz 0.147; not 3x7 (0.247, stream
// 0.208).
inline Config select_strips_grad_weight(const Problem& p) {
  const bool nchw = p.layout == Layout::kNchw;
  if (p.kernel_h * p.kernel_w < (nchw ? k3x5 : k5x5)) return {};
  return first_that_serves(p, nchw ? Kernel::kStripsGradWeightNchw : Kernel::kStripsGradWeightNhwc);
}

// NCHW, small images by columns, fp32 / fp16, H100, us: 3x3, 384x14x14: 14.3 / 11.0, marching 16.6, images 12.7; 8 images of
// these: 8.2 / 7.4, 10.3 / 9.0; 256 images: 74.0 / 41.6, 84.0 / 50.0; 384x16x16: 15.9 / 12.0, 18.2 / 13.4; 960x7x7: 11.6 / 9.9,
// staged 15.5, images 10.6; 5x5, 672x14x14: 21.6 / 16.4, images 27.3 / 18.3; 960x7x7, fp32: 12.0,
// 13.1; not in 16 bits (12.6, 10.7).
inline Config select_columns_grad_weight(const Problem& p) {
  const bool few = p.kernel_h * p.kernel_w <= k3x3;
  if (p.kernel_h < 3 || p.kernel_w < 3 || p.n < kImagesBatch || !columns_fill_warps(p.w) ||
      (!few && p.w <= 8 && p.dtype != DType::kFloat32))
    return {};
  return first_that_serves(p, Kernel::kColumnsGradWeight);
}

inline Config select_large_grad_weight(const Problem& p) { return first_that_serves(p, Kernel::kToeplitzGradWeight); }

inline Config select_grad_weight(const Problem& p) {
  const bool channels_last = p.layout == Layout::kNhwc;
  for (const Config& config : {select_columns_grad_weight(p), select_planes_grad_weight(p),
                               select_images_grad_weight(p), select_strips_grad_weight(p)})
    if (config.kernel != Kernel::kGeneral) return config;
  const Config marching = channels_last ? select_marching_nhwc(p) : select_marching_nchw(p);
  // 16 bits beyond 9x9, or from 7x7 on in channels_last: 9x9, 768x32x32: 0.147, marching 0.201; what strips do not serve,
  // H100: 7x7, 124x56x56: 0.0766, marching 0.0929; 126x28x28: 0.0265, 0.0302; 125x56x56: 0.0928, 0.0920; 62x112x112, eight
  // images: 0.0488, 0.0593.
  const Config large = select_large_grad_weight(p);
  const bool prefers_large =
      channels_last && p.kernel_h * p.kernel_w >= kMaxRegisterTaps && large.kernel != Kernel::kGeneral;
  if (marching.kernel != Kernel::kGeneral && !prefers_large) return marching;
  if (large.kernel != Kernel::kGeneral) return large;
  if (can_serve(p, Kernel::kBlockedGradWeight, channels_last)) return {Kernel::kBlockedGradWeight, channels_last};
  return marching;
}

}  // namespace depthwise
