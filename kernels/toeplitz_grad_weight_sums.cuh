// How the sums of toeplitz_grad_weight leave a block: from registers through shared memory, where those of NCHW's warps are
// added up, to where they are stored, tap by tap.
#pragma once

#include "exact_grad_weight.cuh"
#include "toeplitz_grad_weight_stages.cuh"

namespace depthwise {

// A thread's warp, and of which group and slot that is (Traits::kGroups, Traits::kSlots).
struct ToeplitzThread {
  int warp, lane, group, slot;
};

// Returns whether what the thread stored is finite. `bias`: its warp's; `parity`: of the even tile's kernel columns; `sums`:
// shared memory.
template <class Traits>
__device__ __forceinline__ bool store_sums(const GradWeightArgs& args,
                                           const float (&sum)[Traits::kGroupTiles][Traits::kTilesJ][4], bool has_bias,
                                           float bias, int parity, float* sums, int first_channel,
                                           ToeplitzThread thread) {
  using T = typename Traits::T;
  constexpr int kTilesJ = Traits::kTilesJ, kGroupTiles = Traits::kGroupTiles;
  const int taps = args.kernel_h * args.kernel_w;
  const int warp = thread.warp, lane = thread.lane, group = thread.group, slot = thread.slot;
  const auto place = [&](unsigned i,
                         unsigned j) {  // of a kernel row, counted from a warp's first, and column in a warp's sums
    const unsigned tile = i / 16 * kTilesJ + j / 16 * 2 + ((j & 1) ^ parity);
    return (tile * 4 + i / 8 % 2 * 2 + j / 2 % 2) * Traits::kSumPitch + i % 8 * 4 + j % 16 / 4;
  };
  const int channel = first_channel + (Traits::kChannelsLast ? slot : 0);
  bool finite = true;
  const auto store = [&](int64_t c, int tap, float value) {
    store_grad_weight<T>(args, blockIdx.y, c * taps + tap, args.out_c * taps, value);
  };
  if constexpr (Traits::kChannelsLast) {
    if (channel < args.out_c && group == 0 && lane == 0) store_grad_bias<T>(args, blockIdx.y, channel, bias);
    float* const own = sums + warp * Traits::kWarpSums;
#pragma unroll
    for (int n = 0; n < kGroupTiles; ++n) {
#pragma unroll
      for (int k = 0; k < 4 * kTilesJ; ++k) own[k * Traits::kSumPitch + lane] = sum[n][k / 4][k % 4];
      __syncwarp();
      const int first = group * Traits::kGroupRows + n * Traits::kTileRows;
      const int rows = min(Traits::kTileRows, args.kernel_h - first);
      for (int tap = lane; channel < args.out_c && tap < rows * args.kernel_w; tap += 32) {
        const int i = tap / args.kernel_w;
        const float value = own[place(i, tap - i * args.kernel_w)];
        finite = finite && is_finite(value);
        store(channel, first * args.kernel_w + tap, value);
      }
      __syncwarp();
    }
  } else {  // in a fixed order
    constexpr int kHalf = Traits::kSlots / 2;
    float* const own = sums + (slot % kHalf * Traits::kGroups + group) * Traits::kWarpSums + lane;
    const float* const flat = &sum[0][0][0];
    if (slot >= kHalf) {
#pragma unroll
      for (int k = 0; k < Traits::kSums; ++k) own[k * Traits::kSumPitch] = flat[k];
    }
    __syncthreads();
    if (slot < kHalf) {
#pragma unroll
      for (int k = 0; k < Traits::kSums; ++k) own[k * Traits::kSumPitch] += flat[k];
    }
    __syncthreads();
    const unsigned columns = args.kernel_w, next_rows = Traits::kThreads / columns,
                   next_columns = Traits::kThreads - next_rows * columns;
    unsigned i = threadIdx.x / columns, j = threadIdx.x - i * columns;
#pragma unroll 1
    for (int tap = threadIdx.x; tap < taps; tap += Traits::kThreads) {
      const unsigned from = i / Traits::kGroupRows;
      const float* const part = sums + from * Traits::kWarpSums + place(i - from * Traits::kGroupRows, j);
      float value = part[0];
#pragma unroll
      for (int k = 1; k < kHalf; ++k) value += part[k * Traits::kGroups * Traits::kWarpSums];
      finite = finite && is_finite(value);
      store(channel, tap, value);
      i += next_rows, j += next_columns;
      if (j >= columns) j -= columns, ++i;
    }
    if (!has_bias) return finite;
    __syncthreads();
    if (group == 0 && lane == 0) sums[slot] = bias;
    __syncthreads();
    if (threadIdx.x == 0) {
      bias = 0.f;
      for (int k = 0; k < Traits::kSlots; ++k) bias += sums[k];
      store_grad_bias<T>(args, blockIdx.y, channel, bias);
    }
  }
  return finite;
}

}  // namespace depthwise
