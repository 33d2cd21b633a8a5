// Which kernel and which tile serve a problem, and why: the one place that decides. Pure C++: no launch, no device.
#pragma once

#include <string>

#include "can_serve.h"

namespace depthwise {

// tiled_nhwc: the tile that wastes the fewest channels; of equals 12 lanes, whose blocks are smaller (7x7 on 32x192x28x28,
// fp32 / fp16, H200: 0.039 / 0.036 ms, 16 lanes 0.040 / 0.038).
inline int tiled_nhwc_tile(int64_t channels) {
  int best = 0;
  int64_t least = 0;
  for (int tile = 0; tile < TileTable(kTiledNhwcTiles).size; ++tile) {
    const int64_t block = kTiledNhwcTiles[tile].vector * 4;
    const int64_t padded = (channels + block - 1) / block * block;
    if (least == 0 || padded < least) least = padded, best = tile;
  }
  return best;
}

// The first tile of a kernel's table that serves `p`, or the general kernel.
inline Config first_that_serves(const Problem& p, Kernel kernel) {
  for (int tile = 0; tile < tile_table(kernel, p.dtype).size; ++tile)
    if (can_serve(p, kernel, tile)) return {kernel, tile};
  return {};
}

// toeplitz and blocked, where they are the fastest; else the general kernel, which stands for none. H200, 32 images, ms.
inline Config select_large(const Problem& p) {
  const DirectArgs args = direct_args(p);
  const bool nchw = p.layout == Layout::kNchw, dilated = p.dilation_h > 1 || p.dilation_w > 1;
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (can_serve(p, Kernel::kToeplitz, 0)) {
    // 9x9 on 768x32x32: 0.077, planes 0.158.
    if (taps > kMaxRegisterTaps) return {Kernel::kToeplitz, 0};
    // 7x7. NCHW: 96x56x56: 0.031, planes 0.046; 192x28x28: 0.024, 0.030; 384x14x14: 0.019, 0.019; 768x7x7: 0.019, 0.014.
    // channels_last: 96x56x56: 0.058, tiled 0.053; 192x28x28: 0.041, 0.036; 384x14x14: 0.023, 0.026; 768x7x7: 0.019 both.
    // Dilation 3, 8x64x56x56: NCHW 0.012, direct 0.016; channels_last 0.021. 5x5 on 240x28x28: 0.027, planes 0.024.
    const bool fits = nchw ? args.out_w > 14 : args.out_w <= 16;
    if (taps == kMaxRegisterTaps && (dilated || fits)) return {Kernel::kToeplitz, 0};
  }
  // fp32 9x9 on 768x32x32: NCHW 0.345, planes 0.163; channels_last 0.325.
  const int64_t few = nchw && !dilated ? 81 : kMaxRegisterTaps;
  if (taps > few && can_serve(p, Kernel::kBlocked, 0)) return {Kernel::kBlocked, 0};
  return {};
}

// direct_nchw: a tile that reads and writes whole vectors, or the general kernel, which stands for none. H200, ms.
inline Config select_direct_nchw(const Problem& p) {
  const DirectArgs args = direct_args(p);
  const bool wide = p.dtype == DType::kFloat32, strided = p.stride_h > 1 || p.stride_w > 1;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const auto tile_of = [&](int rows, int columns) {
    const TileTable table = tile_table(Kernel::kDirectNchw, p.dtype);
    for (int tile = 0; tile < table.size; ++tile)
      if (table[tile].rows == rows && table[tile].columns == columns && table[tile].vector == columns &&
          can_serve(p, Kernel::kDirectNchw, tile))
        return Config{Kernel::kDirectNchw, tile};
    return Config{};
  };
  // Eight rows a thread, but four for kernels of one row (1x11, 16x64x128x128: 0.038 / 0.025, 0.040 / 0.029 with eight),
  // for dilated ones (3x3, dilation 12, 8x256x64x64: 0.025 / 0.020, 0.030 / 0.022) and for 3x3 at stride 2
  // (32x96x112x112: 0.054 / 0.032, 0.057 / 0.035), and sixteen for more work on tall planes (3x7, 32x128x128x256, fp32:
  // 0.277, 0.285 with eight). In 16 bits four also where outputs are not aligned, whose windows are wide (3x3,
  // 16x64x512x512: 0.279, 0.305 with eight; 3x7: 0.196, 0.204), and narrow vectors for 5x5 at stride 2 (32x144x56x56:
  // 0.022, 0.024 with wide ones).
  const bool few_rows = p.kernel_h == 1 || p.dilation_h > 1 || (strided && taps <= 9) || (!wide && args.out_w % 8 != 0);
  const int columns = wide ? 4 : 8;
  Config best;
  if (wide && !strided && !few_rows && taps > 9 && taps < 25 && args.w % 4 == 0 && args.out_h >= 64)
    best = tile_of(16, 4);
  if (!wide && strided && taps > 9) best = tile_of(8, 4);
  if (best.kernel == Kernel::kGeneral) best = tile_of(few_rows ? 4 : 8, columns);
  if (best.kernel == Kernel::kGeneral) best = tile_of(8, columns);
  return best.kernel != Kernel::kGeneral ? best : tile_of(8, 4);
}

// Forward, and grad of input at stride 1. Times are of 32 images on an H200, ms, fp32 / fp16 where nothing else is said.
inline Config select_nchw(const Problem& p) {
  const DirectArgs args = direct_args(p);
  const int64_t taps = p.kernel_h * p.kernel_w;
  // Small planes, of which many are loaded at once (3x3, 384x14x14: planes 0.012 / 0.011, direct 0.014 / 0.012; 5x5,
  // 672x14x14, fp16: 0.021, 0.024). In fp32 large filters repay that detour later (5x5, 672x14x14: 0.026, direct 0.022;
  // 7x7, 96x56x56: 0.049, 0.039; 192x28x28: 0.031, 0.026; 768x7x7: 0.015, 0.023).
  const int64_t small = p.dtype == DType::kFloat32 && taps >= 25 ? 12 * 12 : 32 * 32;
  if (p.dilation_h == 1 && p.dilation_w == 1 && args.h * args.w <= small) {
    const Config planes = first_that_serves(p, Kernel::kPlanesNchw);
    if (planes.kernel != Kernel::kGeneral) return planes;
  }
  const Config direct = select_direct_nchw(p);
  if (direct.kernel != Kernel::kGeneral) return direct;
  // What has too many taps, or lies off the boundaries of words: shared memory is where that costs little.
  const Config planes = first_that_serves(p, Kernel::kPlanesNchw);
  if (planes.kernel != Kernel::kGeneral) return planes;
  const Config stream = first_that_serves(p, Kernel::kStreamNchw);
  return stream.kernel != Kernel::kGeneral ? stream : first_that_serves(p, Kernel::kDirectNchw);
}

inline Config select_nhwc(const Problem& p) {
  // Wide pixels are whole cache lines (3x3, 16x64x512x512: 64 channels 0.57 / 0.30, 32 channels 0.64 / 0.37), unless
  // channels beyond the last are wasted (144x56x56: 0.043 / 0.032 against 0.040 / 0.029). At stride 2 they win all the
  // same (96x112x112: 0.058 / 0.038 against 0.063 / 0.043).
  const auto padded = [&](int64_t block) { return (p.c + block - 1) / block * block; };
  const bool narrow = padded(32) < padded(64) && (p.stride_w == 1 || p.c < 64);
  const int tile = narrow ? 1 : 0;
  // With one channel a thread stream_nhwc has not been measured.
  if (stream_nhwc_vector(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w), static_cast<int>(p.stride_h),
                         static_cast<int>(p.stride_w), static_cast<int>(p.dilation_h),
                         static_cast<int>(p.dilation_w)) > 1) {
    if (can_serve(p, Kernel::kStreamNhwc, tile)) return {Kernel::kStreamNhwc, tile};
    if (can_serve(p, Kernel::kStreamNhwc, 1 - tile)) return {Kernel::kStreamNhwc, 1 - tile};
  }
  // Dilated kernels of few taps, and what is not aligned.
  const Config direct = first_that_serves(p, Kernel::kDirectNhwc);
  if (direct.kernel != Kernel::kGeneral) return direct;
  const int tiled = tiled_nhwc_tile(p.c);
  if (can_serve(p, Kernel::kTiledNhwc, tiled)) return {Kernel::kTiledNhwc, tiled};
  return {};
}

// Grad of weight. H200, 32 images, ms.
inline Config select_marching_nhwc(const Problem& p) {
  const bool wide = p.dtype == DType::kFloat32;
  const auto tile_of = [&](int channels) {
    const int tile = channels == 4 ? 0 : channels == 2 ? 1 : 2;
    return can_serve(p, Kernel::kGradWeightNhwc, tile) ? Config{Kernel::kGradWeightNhwc, tile} : Config{};
  };
  // Four channels a thread, where registers hold them, but one in small images, of which there would be too few threads
  // (3x3, 384x14x14, fp32 / fp16: 0.016 / 0.014, four 0.022 / 0.018; 5x5, 672x14x14: 0.031 / 0.028, two 0.044 / 0.035),
  // and fewer in large ones, of which more warps are read at once (3x3, 16x64x512x512: 0.509 / 0.279, four 0.536 /
  // 0.350; not 144x56x56, fp16: 0.044, four 0.043). In fp32 one also where four do not fit (3x7, 128x128x256: 0.339, two
  // 0.394; 1x11, 16x64x128x128: 0.069, 0.083; not 5x5, 240x28x28: 0.047, 0.043).
  const bool small = p.out_h * p.out_w <= 14 * 14, large = p.n * p.out_h * p.out_w >= 1 << 20;
  Config config = small || (large && wide) ? tile_of(1) : large ? tile_of(2) : tile_of(4);
  if (config.kernel == Kernel::kGeneral && wide) config = tile_of(1);
  return config.kernel != Kernel::kGeneral ? config : first_that_serves(p, Kernel::kGradWeightNhwc);
}

inline Config select_grad_weight(const Problem& p) {
  const bool channels_last = p.layout == Layout::kNhwc;
  const Kernel toeplitz = channels_last ? Kernel::kToeplitzGradWeightNhwc : Kernel::kToeplitzGradWeightNchw;
  // channels_last of more than 7x7 in 16 bits: 9x9, 768x32x32: 0.149, marching 0.201.
  const bool prefers_toeplitz = channels_last && p.kernel_h * p.kernel_w > 49 && can_serve(p, toeplitz, 0);
  const Config marching = channels_last ? select_marching_nhwc(p) : first_that_serves(p, Kernel::kGradWeightNchw);
  if (marching.kernel != Kernel::kGeneral && !prefers_toeplitz) return marching;
  if (can_serve(p, toeplitz, 0)) {
    // The narrowest tile that holds a row, or the widest.
    int tile = tile_table(toeplitz, p.dtype).size - 1;
    while (tile > 0 && p.w > tile_table(toeplitz, p.dtype)[tile].columns) --tile;
    return {toeplitz, tile};
  }
  if (can_serve(p, Kernel::kBlockedGradWeight, channels_last)) return {Kernel::kBlockedGradWeight, channels_last};
  return marching;
}

inline Config select_config(const Problem& p) {
  const bool nchw = p.layout == Layout::kNchw;
  if (p.direction == Direction::kGradWeight) return select_grad_weight(p);
  if (p.direction == Direction::kGradInput && (p.stride_h != 1 || p.stride_w != 1))
    return first_that_serves(p, nchw ? Kernel::kGradInputNchw : Kernel::kGradInputNhwc);
  const Config large = select_large(p);
  if (large.kernel != Kernel::kGeneral) return large;
  const Config config = nchw ? select_nchw(p) : select_nhwc(p);
  if (config.kernel != Kernel::kGeneral) return config;
  // What needs too many registers or too much shared memory elsewhere, such as 7x7 with dilation 3 in channels_last.
  const Config toeplitz = first_that_serves(p, Kernel::kToeplitz);
  return toeplitz.kernel != Kernel::kGeneral ? toeplitz : first_that_serves(p, Kernel::kBlocked);
}

// The config whose tile is called `name`; false where it cannot serve `p`.
inline bool forced_config(const Problem& p, const std::string& name, Config* config) {
  if (name == "general") {
    *config = {};
    return true;
  }
  for (const Kernel kernel : kSpecialisedKernels)
    for (int tile = 0; tile < tile_table(kernel, p.dtype).size; ++tile)
      if (name == tile_table(kernel, p.dtype)[tile].name && can_serve(p, kernel, tile)) {
        *config = {kernel, tile};
        return true;
      }
  return false;
}

}  // namespace depthwise
