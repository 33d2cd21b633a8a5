// Both gradients at once, NCHW.
//
// Serves  3x3 with same padding, stride 1, multiplier 1; fp32, fp16, bf16; aligned tensors, rows a multiple of 16 bytes.
// Owns    a group of lanes, 16 bytes of a row each, walks down virtual rows of one channel (gradients_tiling.h), and takes its
//         neighbours' edges by shuffles; rows wider than a warp are divided among warps (kWide), whose edges are loads. A
//         lane: the sums of all taps, the weights, and three rows of grad_output, in fp32 registers.
// Memory  kKernel rows of both tensors under way in registers, 49 to 61 KB a multiprocessor. (Six: 463 us for 474, fp32, 128x96x
//         112x112, H200, but 272 for 263 in fp16.)
// Reduces lanes by shuffles, warps in order through shared memory, then the splits in order (gradients.cu). No atomics.
// Zeros   times infinity would poison a sum of the weights': those that are not finite are taken again, pair by pair.
// Chosen  select_gradients.h.
#pragma once

#include "gradients.cuh"

namespace depthwise {

template <class T_, bool kWide_>
struct GradientsNchwTraits {
  using T = T_;
  static constexpr int kKernel = 3, kPadding = 1, kTaps = 9;
  static constexpr bool kWide = kWide_;
  static constexpr int kWarps = kGradientsWarps, kThreads = 32 * kWarps, kMinBlocks = sizeof(T) == 2 || kWide ? 4 : 5;
  static constexpr int kColumns = 16 / sizeof(T), kWindow = kColumns + 2 * kPadding;
};

// Where a walk is, through planes that lie apart; in elements.
struct PlaneWalk {
  int y, offset;
  __device__ __forceinline__ PlaneWalk(const VirtualRow& row, int w, int image_stride)
      : y(row.y), offset(row.image * image_stride + row.y * w) {}
  __device__ __forceinline__ void advance(int period, int w, int to_next_image) {
    const bool ends = ++y == period;
    offset += ends ? to_next_image : w;
    if (ends) y = 0;
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    gradients_nchw_kernel(const __grid_constant__ GradientsArgs args, const GradientsNchwTiling tiling) {
  using T = typename Traits::T;
  constexpr int kKernel = Traits::kKernel, kPadding = Traits::kPadding, kTaps = Traits::kTaps;
  constexpr int kColumns = Traits::kColumns, kWindow = Traits::kWindow;
  __shared__ float shared[Traits::kWarps][kTaps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = blockIdx.x;
  const int unit = blockIdx.y * Traits::kWarps + warp, of_row = Traits::kWide ? unit % tiling.warps : 0;
  const int group = Traits::kWide ? 0 : lane / tiling.lanes,
            of_group = Traits::kWide ? lane : lane - group * tiling.lanes;
  const int part = (Traits::kWide ? unit / tiling.warps : unit) * tiling.groups + group;
  const int column = (of_row * 32 + of_group) * kColumns;
  const bool active = group < tiling.groups && column < args.w;
  const bool is_first = of_group == 0, is_last = of_group == (Traits::kWide ? 31 : tiling.lanes - 1);
  const int period = args.h + kPadding, plane = args.h * args.w, image_stride = plane * static_cast<int>(args.out_c);
  const int to_next_image = image_stride - (period - 1) * args.w;
  const int all_rows = virtual_rows(static_cast<int>(args.n), args.h, kKernel),
            begin = min(part * tiling.rows, all_rows);
  const int end = min(begin + tiling.rows, all_rows);
  // Steps at which a row of grad_output is wanted, and of the others.
  const int grad_steps = active && end > begin ? min(end + kPadding, all_rows) - (begin - kPadding) : 0;
  const int in_steps = active ? end - begin : 0;
  const int first = channel * plane + column;
  const T* const grad = static_cast<const T*>(args.grad_output) + first;
  const T* const in =
      static_cast<const T*>(args.input) + first - kPadding * args.w;  // so many rows behind grad_output's
  T* const out = static_cast<T*>(args.grad_input) + first;
  PlaneWalk at({begin - kPadding, period}, args.w, image_stride);
  PlaneWalk out_at({begin - 2 * kPadding, period}, args.w, image_stride);
  const int halo_at = is_first ? -kPadding : kColumns;
  const bool has_halo = Traits::kWide && active && (is_first ? column > 0 : is_last && column + kColumns < args.w);

  const CachePolicy policy(args);
  const auto load_row = [&](VectorWord<T, kColumns>& row, const T* from, bool exists) {
    row.word = {};
    if (exists) row.word = policy.load(reinterpret_cast<const uint4*>(from));
  };
  VectorWord<T, kColumns> next_grad[kKernel], next_in[kKernel];
  T halo[kKernel][kPadding] = {};
  const auto request = [&](int slot, int step) {
    const bool grad_row = at.y < args.h && step < grad_steps;
    load_row(next_grad[slot], grad + at.offset, grad_row);
    if constexpr (Traits::kWide) {
#pragma unroll
      for (int q = 0; q < kPadding; ++q)
        halo[slot][q] = load_or_zero<1>(grad + at.offset + halo_at + q, grad_row && has_halo).value[0];
    }
    const bool in_row = static_cast<unsigned>(at.y - kPadding) < static_cast<unsigned>(args.h) &&
                        static_cast<unsigned>(step - 2 * kPadding) < static_cast<unsigned>(in_steps);
    load_row(next_in[slot], in + at.offset, in_row);
    at.advance(period, args.w, to_next_image);
  };
#pragma unroll
  for (int k = 0; k < kKernel; ++k) request(k, k);

  float weight[kTaps], sum[kTaps] = {}, window[kKernel][kWindow] = {};
#pragma unroll
  for (int t = 0; t < kTaps; ++t) weight[t] = load_for_sums<T>(weights_of<Traits>(args) + channel * kTaps + t);
  const int steps = min(tiling.rows, all_rows) + 2 * kPadding;
#pragma unroll 1
  for (int start = 0; start < steps; start += kKernel) {
#pragma unroll
    for (int u = 0; u < kKernel; ++u) {
      float (&newest)[kWindow] = window[u];
      float x[kColumns], y[kColumns];
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        newest[kPadding + v] = to_float(next_grad[u].vector.value[v]);
        x[v] = to_float(next_in[u].vector.value[v]);
      }
#pragma unroll
      for (int q = 0; q < kPadding; ++q) {
        const float left = __shfl_up_sync(~0u, newest[kColumns + q], 1);
        const float right = __shfl_down_sync(~0u, newest[kPadding + q], 1);
        const float edge = Traits::kWide ? to_float(halo[u][q]) : 0.f;
        newest[q] = is_first ? edge : left;
        newest[kPadding + kColumns + q] = is_last ? edge : right;
      }
      request(u, start + u + kKernel);
      add_step<Traits>(sum, y, weight, x, window, u);
      if (out_at.y < args.h && static_cast<unsigned>(start + u - 2 * kPadding) < static_cast<unsigned>(in_steps))
        store_streaming(out + out_at.offset, y);
      out_at.advance(period, args.w, to_next_image);
    }
  }

  let_second_pass_begin();
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) sum[t] += __shfl_xor_sync(~0u, sum[t], bits);
    if (lane == 0) shared[warp][t] = sum[t];
  }
  __syncthreads();
  if (threadIdx.x >= kTaps) return;
  const int tap = threadIdx.x;
  float total = 0;
#pragma unroll
  for (int k = 0; k < Traits::kWarps; ++k) total += shared[k][tap];
  if (!is_finite(total)) {
    total = 0;
#pragma unroll 1
    for (int k = 0; k < Traits::kWarps; ++k) {
      const int other = blockIdx.y * Traits::kWarps + k, others = other / tiling.warps * tiling.groups;
      const int rows = others * tiling.rows, columns = 32 * kColumns, left = other % tiling.warps * columns;
      total += exact_of_rows<T>(args, false, channel, tap, 0, static_cast<int>(args.n), rows,
                                rows + tiling.groups * tiling.rows, left, min(left + columns, args.w));
    }
  }
  store_grad_weight<T>(args, blockIdx.y, channel * kTaps + tap, args.out_c * kTaps, total);
}

template <class Traits>
int launch_gradients_nchw(const GradientsArgs& args, int, cudaStream_t stream) {
  const GradientsNchwTiling tiling = gradients_nchw_tiling(args, sizeof(typename Traits::T), args.most_splits);
  gradients_nchw_kernel<Traits>
      <<<dim3(static_cast<unsigned>(args.out_c), tiling.splits), Traits::kThreads, 0, stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
