// Whether both gradients are computed at once, and by which kernel: the general kernel stands for one after the other.
// Microseconds, fp32 / fp16, H200; in brackets the times of grad of input and of grad of weight added up, each of them after
// a flush of the L2 cache (one right after the other, the second finds some of grad_output there, and less is gained).
#pragma once

#include "select_common.h"

namespace depthwise {

// channels_last, 3x3: 128x144x56x56 206 / 131 (286 / 153), 128x96x112x112 481 / 268 (608 / 368), 128x384x14x14 39 / 27
// (59 / 50), 128x240x28x28 90 / 54 (128 / 84), 16x64x512x512 818 / 391 (1040 / 522), 32x960x7x7 13 / 12 (20 / 18). 5x5,
// 128x240x28x28: 114 / 106 (140 / 109).
// Lanes: wide pixels, unless too many of their channels are none (144 channels, fp32: 24 lanes 206, 32 lanes 214; 240, fp16: 32
// lanes 54). By how much is an estimate, which agrees with what was measured. 5x5: few lanes, of many strips (16 lanes 114,
// 48 lanes 118).
inline Config select_gradients_nhwc(const Problem& p) {
  const int vector = gradients_vector(static_cast<int>(p.kernel_h), element_size(p.dtype));
  const auto cost = [&](int lanes) {
    const int of_lane = lanes == 32 ? 100 : lanes == 24 ? 108 : lanes == 16 ? 112 : 135;
    return divide_up<int64_t>(p.c, lanes * vector) * lanes * of_lane;
  };
  Config best;
  int64_t least = 0;
  for (int tile = 0; tile < TileTable(kGradientsNhwcTiles).size; ++tile) {
    const int lanes = kGradientsNhwcTiles[tile].vector;
    if ((p.kernel_h > 3 && lanes > 16) || !can_serve(p, Kernel::kGradientsNhwc, tile)) continue;
    if (best.kernel == Kernel::kGeneral || cost(lanes) < least) {
      best = {Kernel::kGradientsNhwc, tile};
      least = cost(lanes);
    }
  }
  return best;
}

// NCHW, 3x3: 32x144x56x56 55 / 38 (77 / 48), 128x96x112x112 474 / 256 (681 / 348), 16x64x512x512 819 / 425 (1129 / 525);
// planes: 128x384x14x14 39 / 27 (57 / 36), 128x240x28x28 83 / 52 (107 / 74), 32x960x7x7 13 / 12 (17 / 16),
// 128x144x56x56 186 / 113 (269 / 139). 5x5, planes, 128x240x28x28: 113 / 96 (135 / 80); 32x672x14x14 36 us, where one after
// the other takes 34.
inline Config select_gradients_nchw(const Problem& p) {
  constexpr int64_t kSmallPlane = 32 * 32, kSmallPlane5x5 = 20 * 20;
  if (p.kernel_h > 3 && p.h * p.w < kSmallPlane5x5) return {};
  const Config planes = first_that_serves(p, Kernel::kGradientsPlanesNchw);
  if (p.h * p.w <= kSmallPlane && planes.kernel != Kernel::kGeneral) return planes;
  const Config rows = first_that_serves(p, Kernel::kGradientsNchw);
  return rows.kernel != Kernel::kGeneral ? rows : planes;
}

// 5x5 in 16 bits takes as long as both apart, or longer: what it computes for a position costs more than what it saves.
inline Config select_gradients(const Problem& p) {
  if (p.kernel_h > 3 && p.dtype != DType::kFloat32) return {};
  return p.layout == Layout::kNhwc ? select_gradients_nhwc(p) : select_gradients_nchw(p);
}

}  // namespace depthwise
