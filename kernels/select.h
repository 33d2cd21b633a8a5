// Which kernel and which tile serve a problem, and why: the one place that decides. Pure C++: no launch, no device.
#pragma once

#include <string>

#include "can_serve.h"

namespace depthwise {

// tiled_nhwc: the tile that wastes the fewest channels; of equals the widest (whole cache lines a pixel).
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
    // channels_last: 96x56x56: 0.060, tiled 0.053; 192x28x28: 0.036, 0.039; 384x14x14: 0.021, 0.027.
    // Dilation 3, 8x64x56x56: NCHW 0.012, direct 0.016; channels_last 0.021. 5x5 on 240x28x28: 0.027, planes 0.024.
    const bool fits = nchw ? args.out_w > 14 : args.out_w <= 28;
    if (taps == kMaxRegisterTaps && (dilated || fits)) return {Kernel::kToeplitz, 0};
  }
  // fp32 9x9 on 768x32x32: NCHW 0.345, planes 0.163; channels_last 0.325.
  const int64_t few = nchw && !dilated ? 81 : kMaxRegisterTaps;
  if (taps > few && can_serve(p, Kernel::kBlocked, 0)) return {Kernel::kBlocked, 0};
  return {};
}

// Forward, and grad of input at stride 1. Times are of 32 images on an H200, ms, fp32 / fp16 where nothing else is said.
inline Config select_nchw(const Problem& p) {
  const DirectArgs args = direct_args(p);
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.dilation_h == 1 && p.dilation_w == 1) {
    // Small planes, of which many are loaded at once (3x3, 384x14x14: planes 0.012 / 0.011, direct 0.016 / 0.014), and
    // filters that cost registers or loads elsewhere (7x7, 96x56x56: 0.048 / 0.046, direct 0.064 / 0.058). Larger planes
    // of few taps are read faster without the detour (3x3, 144x56x56: 0.037 / 0.029, direct 0.036 / 0.026).
    if (args.h * args.w <= 32 * 32 || taps >= 25) {
      const Config planes = first_that_serves(p, Kernel::kPlanesNchw);
      if (planes.kernel != Kernel::kGeneral) return planes;
    }
    // Rows that fill a warp at least, where a thread saves instructions by rolling down them: 16-bit (3x3, 16x64x512x512:
    // 0.31, direct 0.44) and larger filters (3x7, 128x128x256: 0.31 / 0.24, direct 0.39 / 0.29), not 3x1 (64x8x512x512:
    // 0.28 / 0.15, direct 0.26 / 0.13) nor 3x3 in fp32 (16x64x512x512: 0.60, direct 0.58).
    // Rows off the boundaries of words: shared memory is where they cost little.
    const bool fills_warps = args.out_w * element_size(p.dtype) >= 28 * 16;
    const bool saves = p.kernel_h > 1 && (taps > 9 || (taps > 3 && p.dtype != DType::kFloat32));
    const bool unaligned = !p.aligned || args.w % 4 != 0;
    if (p.stride_h == 1 && p.stride_w == 1 && fills_warps && (saves || unaligned)) {
      const Config stream = first_that_serves(p, Kernel::kStreamNchw);
      if (stream.kernel != Kernel::kGeneral) return stream;
    }
  }
  const Config direct = first_that_serves(p, Kernel::kDirectNchw);
  if (direct.kernel != Kernel::kGeneral) return direct;
  const Config planes = first_that_serves(p, Kernel::kPlanesNchw);
  if (planes.kernel != Kernel::kGeneral) return planes;
  return first_that_serves(p, Kernel::kStreamNchw);
}

inline Config select_nhwc(const Problem& p) {
  // Wide pixels are whole cache lines (3x3, 16x64x512x512: 64 channels 0.57 / 0.30, 32 channels 0.64 / 0.37), unless
  // channels beyond the last are wasted (144x56x56: 0.043 / 0.032 against 0.040 / 0.029). At stride 2 they win all the
  // same (96x112x112: 0.058 / 0.038 against 0.063 / 0.043).
  const auto padded = [&](int64_t block) { return (p.c + block - 1) / block * block; };
  const bool narrow = padded(32) < padded(64) && (p.stride_w == 1 || p.c < 64);
  const int tile = narrow ? 1 : 0;
  if (can_serve(p, Kernel::kStreamNhwc, tile)) return {Kernel::kStreamNhwc, tile};
  if (can_serve(p, Kernel::kStreamNhwc, 1 - tile)) return {Kernel::kStreamNhwc, 1 - tile};
  // Dilated kernels of few taps, and what is not aligned.
  const Config direct = first_that_serves(p, Kernel::kDirectNhwc);
  if (direct.kernel != Kernel::kGeneral) return direct;
  const int tiled = tiled_nhwc_tile(p.c);
  if (can_serve(p, Kernel::kTiledNhwc, tiled)) return {Kernel::kTiledNhwc, tiled};
  return {};
}

inline Config select_grad_weight(const Problem& p) {
  const bool channels_last = p.layout == Layout::kNhwc;
  const Config marching = first_that_serves(p, channels_last ? Kernel::kGradWeightNhwc : Kernel::kGradWeightNchw);
  if (marching.kernel != Kernel::kGeneral) return marching;
  const Kernel toeplitz = channels_last ? Kernel::kToeplitzGradWeightNhwc : Kernel::kToeplitzGradWeightNchw;
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
