// Grad of weight and bias of small planes, NCHW, by multiply-adds.
//
// Serves  what columns_nchw serves, planes of up to 16 rows.
// Owns    a block has a channel and a share of the images, its warps groups of images in turn. A lane has two
//         neighbouring columns of an image (of odd widths one), all of whose rows of both tensors are registers, and
//         sums of all taps; the input beside its columns is its neighbours', by shuffles. 28 lanes of 32 at widths of 7
//         and 14.
// Reads   each word once; lines leave the L2 cache first.
// Zeros   Padding meets zeros instead of grad_output: NaN and infinity go where they belong.
// Adds    the lanes' sums through shared memory, in a fixed order; the splits by add_splits_kernel.
// Chosen  select_grad_weight.h.
#pragma once

#include "cache_policy.cuh"
#include "columns.cuh"
#include "exact_grad_weight.cuh"

namespace depthwise {

template <class Traits>
__global__ void __launch_bounds__(32 * columns_grad_weight_warps(Traits::kTaps))
    columns_grad_weight_kernel(const __grid_constant__ GradWeightArgs args) {
  using T = typename Traits::T;
  using Word = ColumnsWord<T, Traits::kColumns>;
  constexpr int kWarps = columns_grad_weight_warps(Traits::kTaps), kThreads = 32 * kWarps,
                kPlanes = columns_planes(Traits::kWidth);
  constexpr int kHeight = Traits::kHeight, kWidth = Traits::kWidth, kColumns = Traits::kColumns;
  constexpr int kKernelH = Traits::kKernelH, kKernelW = Traits::kKernelW, kTaps = Traits::kTaps;
  constexpr int kPaddingH = Traits::kPaddingH, kPaddingW = Traits::kPaddingW, kReach = Traits::kReach;

  const ColumnsLane<Traits> lane;
  const CachePolicy policy(args);
  const int channel = blockIdx.x, warp = threadIdx.x / 32;
  const int groups = static_cast<int>(divide_up<int64_t>(args.n, kPlanes)), share = divide_up(groups, args.splits);
  const int begin = blockIdx.y * share, end = min(begin + share, groups);
  const bool has_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;

  float sum[kTaps] = {}, bias = 0.f;
  // As many rounds for all warps: shuffles in a loop that may end sooner for some lanes would be code of its own.
#pragma unroll 1
  for (int round = begin; round < end; round += kWarps) {
    const int group = round + warp;
    const int64_t image = static_cast<int64_t>(group) * kPlanes + lane.plane;
    const bool exists = lane.plane < kPlanes && group < end && image < args.n;
    const int64_t first = ((exists ? image : 0) * args.out_c + channel) * Traits::kPixels + lane.column;
    const T* const in = static_cast<const T*>(args.input) + first;
    const T* const grad = static_cast<const T*>(args.grad_output) + first;
    Word in_word[kHeight], grad_word[kHeight];
#pragma unroll
    for (int r = 0; r < kHeight; ++r) {
      in_word[r].word = policy.load(reinterpret_cast<const typename Word::Word*>(in + r * kWidth));
      grad_word[r].word = policy.load(reinterpret_cast<const typename Word::Word*>(grad + r * kWidth));
    }
    if (!exists)
#pragma unroll
      for (int r = 0; r < kHeight; ++r) in_word[r] = grad_word[r] = Word();
    if (ptx::opaque(static_cast<int>(has_bias)) != 0) {  // in place, not two copies of the loop
      float part[4] = {};  // a running sum of equal terms would round the same way every time
#pragma unroll
      for (int r = 0; r < kHeight; ++r) {
        float row = grad_word[r].value(0);
#pragma unroll
        for (int v = 1; v < kColumns; ++v) row += grad_word[r].value(v);
        part[r % 4] += row;
      }
      bias += (part[0] + part[1]) + (part[2] + part[3]);
    }

    // The live rows of grad_output: as they are, and with zeros where the plane ends beside them.
    float live[kKernelH][kColumns], live_left[kReach][kKernelH][kColumns], live_right[kReach][kKernelH][kColumns];
#pragma unroll
    for (int r = -kPaddingH; r < kHeight; ++r) {
      const int next = r + kPaddingH;  // met from now on
      if (next < kHeight)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          const float value = grad_word[next].value(v);
          live[next % kKernelH][v] = value;
#pragma unroll
          for (int d = 0; d < kReach; ++d) {
            live_left[d][next % kKernelH][v] = lane.has_left(d + 1) ? value : 0.f;
            live_right[d][next % kKernelH][v] = lane.has_right(d + 1) ? value : 0.f;
          }
        }
      if (r < 0) continue;
      float window[Traits::kWindow];
      lane.window(window, in_word[r]);
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        const int o = r - i + kPaddingH;
        if (o < 0 || o >= kHeight) continue;
#pragma unroll
        for (int j = 0; j < kKernelW; ++j)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) {
            const int left = kPaddingW - 1 - v - j, right = v + j - kPaddingW - kColumns;  // columns between
            const auto& rows = left >= 0    ? live_left[left >= 0 ? left / kColumns : 0]
                               : right >= 0 ? live_right[right >= 0 ? right / kColumns : 0]
                                            : live;
            sum[i * kKernelW + j] = fmaf(window[v + j], rows[o % kKernelH][v], sum[i * kKernelW + j]);
          }
      }
    }
  }
  let_second_pass_begin();

  // Add the lanes: kSharers threads a tap, four lanes at a time.
  constexpr int kSums = kTaps + 1, kPitch = kThreads + 4;
  constexpr int kSharers = 8 * kSums <= kThreads ? 8 : 4 * kSums <= kThreads ? 4 : 2;
  static_assert(kSharers * kSums <= kThreads);
  __shared__ float4 shared_sums[kSums * kPitch / 4];
  float* const sums = reinterpret_cast<float*>(shared_sums) + threadIdx.x;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) sums[tap * kPitch] = sum[tap];
  sums[kTaps * kPitch] = bias;
  __syncthreads();
  const int tap = min(static_cast<int>(threadIdx.x) / kSharers, kTaps), sharer = threadIdx.x % kSharers;
  float total = 0.f;
#pragma unroll
  for (int k = 0; k < kThreads / 4; k += kSharers) {
    const float4 four = shared_sums[tap * (kPitch / 4) + k + sharer];
    total += (four.x + four.y) + (four.z + four.w);
  }
#pragma unroll
  for (int offset = kSharers / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  if (threadIdx.x >= kSharers * kSums || sharer != 0) return;
  if (tap < kTaps)
    store_grad_weight<T>(args, blockIdx.y, static_cast<int64_t>(channel) * kTaps + tap, args.out_c * kTaps, total);
  else if (has_bias)
    store_grad_bias<T>(args, blockIdx.y, channel, total);
}

template <class Traits>
int launch_columns_grad_weight(const GradWeightArgs& args, int, cudaStream_t stream) {
  columns_grad_weight_kernel<Traits><<<dim3(static_cast<unsigned>(args.out_c), static_cast<unsigned>(args.splits)),
                                       32 * columns_grad_weight_warps(Traits::kTaps), 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace depthwise
