// Both gradients at once, NCHW, of planes that fit shared memory.
//
// Serves  3x3 and 5x5 with same padding, stride 1, multiplier 1; fp32, fp16, bf16; aligned tensors, of any width.
// Owns    a block: some planes of neighbouring channels, of several images one after the other. A thread: a strip of seven
//         columns and a part of the rows of a plane; the sums of all taps, the weights, and kKernel rows of grad_output, in
//         fp32 registers. The grad of input takes the place of the input in shared memory, from where whole planes leave.
// Memory  a ring of one to four stages, of an image's planes of both tensors each, filled asynchronously: 128x384x14x14, fp16:
//         two stages of 6 KB in each of eight blocks a multiprocessor.
// Reduces a block's threads in order through shared memory, then the splits in order (gradients.cu). No atomics.
// Zeros   times infinity would poison a sum of the weights': those that are not finite are taken again, pair by pair.
// Chosen  select_gradients.h.
#pragma once

#include "gradients.cuh"

namespace depthwise {

// kExact: strips divide the columns.
template <class T_, int kKernel_, bool kExact_>
struct GradientsPlanesTraits {
  using T = T_;
  static constexpr int kKernel = kKernel_, kPadding = kKernel / 2, kTaps = kKernel * kKernel;
  static constexpr bool kExact = kExact_;
  static constexpr int kColumns = kGradientsStrip, kWindow = kColumns + 2 * kPadding;
  static constexpr int kThreads = gradients_plane_threads(kKernel), kMinBlocks = 2;
};

struct GradientsPlanesRing {
  GradientsPlanesTiling tiling;
  int depth, stage_bytes;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    gradients_planes_nchw_kernel(const __grid_constant__ GradientsArgs args, const GradientsPlanesRing ring) {
  using T = typename Traits::T;
  constexpr int kKernel = Traits::kKernel, kPadding = Traits::kPadding, kTaps = Traits::kTaps;
  constexpr int kColumns = Traits::kColumns, kWindow = Traits::kWindow;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const GradientsPlanesTiling& tiling = ring.tiling;
  const int thread = threadIdx.x, threads = blockDim.x, channels = static_cast<int>(args.out_c);
  const int first_channel = blockIdx.x * tiling.planes, planes = min(tiling.planes, channels - first_channel);
  const int of_plane = tiling.strips * tiling.parts, number = thread / of_plane, in_plane = thread - number * of_plane;
  const int part = in_plane / tiling.strips, strip = in_plane - part * tiling.strips;
  const bool active = number < planes;
  const int column = strip * kColumns, plane = args.h * args.w;
  const int first_row = active ? part * tiling.part_rows : 0;
  const int end_row = active ? min(first_row + tiling.part_rows, args.h) : 0;
  const int begin = blockIdx.y * tiling.images, images = min(tiling.images, static_cast<int>(args.n) - begin);

  const int words = planes * plane * static_cast<int>(sizeof(T)) / 16, half = ring.stage_bytes / 2;
  const int64_t stride = static_cast<int64_t>(channels) * plane * static_cast<int>(sizeof(T));  // bytes
  const int64_t first = begin * stride + static_cast<int64_t>(first_channel) * plane * static_cast<int>(sizeof(T));
  const unsigned char* next_grad = static_cast<const unsigned char*>(args.grad_output) + first + thread * 16;
  const unsigned char* next_in = static_cast<const unsigned char*>(args.input) + first + thread * 16;
  unsigned char* out = static_cast<unsigned char*>(args.grad_input) + first + thread * 16;
  const CachePolicy policy(args);
  const auto target = policy.target(shared_memory + thread * 16);
  int next_slot = ptx::opaque(0);  // see CachePolicy::target
  const auto request = [&](bool exists) {
    if (exists) {
#pragma unroll 2
      for (int k = 0; k < words - thread; k += threads) {
        policy.template copy_async<16>(target, next_slot + k * 16, next_grad + k * 16, true);
        policy.template copy_async<16>(target, next_slot + half + k * 16, next_in + k * 16, true);
      }
      next_grad += stride, next_in += stride;
    }
    commit_copies();
    next_slot = next_slot + ring.stage_bytes == ring.depth * ring.stage_bytes ? 0 : next_slot + ring.stage_bytes;
  };
  for (int k = 0; k < ring.depth - 1; ++k) request(k < images);

  float weight[kTaps], sum[kTaps] = {};
#pragma unroll
  for (int t = 0; t < kTaps; ++t)
    weight[t] = active ? load_for_sums<T>(weights_of<Traits>(args) + (first_channel + number) * kTaps + t) : 0.f;
  int slot = 0;
#pragma unroll 1
  for (int image = 0; image < images; ++image) {
    if (ring.depth == 1) {
      __syncthreads();
      request(true);
      wait_for_all_copies();
    } else {
      wait_for_stage(ring.depth - 1);
      __syncthreads();
      request(image + ring.depth - 1 < images);
    }
    const T* const grad = reinterpret_cast<const T*>(shared_memory + slot) + number * plane + column;
    T* const in = reinterpret_cast<T*>(shared_memory + slot + half) + number * plane + column;
    const auto load_row = [&](float (&row)[kWindow], int at) {
      const bool exists = static_cast<unsigned>(at) < static_cast<unsigned>(args.h);
      const T* const from = grad + at * args.w - kPadding;
#pragma unroll
      for (int k = 0; k < kWindow; ++k) {
        bool there = exists;
        if (k < kPadding)
          there = exists && strip > 0;
        else if (Traits::kExact && k >= kPadding + kColumns)
          there = exists && strip + 1 < tiling.strips;
        else if (!Traits::kExact)
          there = exists && column + k - kPadding < args.w;
        row[k] = there ? to_float(from[k]) : 0.f;
      }
    };
    float window[kKernel][kWindow];
    if (first_row < end_row) {
#pragma unroll
      for (int k = 0; k < kKernel - 1; ++k) load_row(window[k], first_row - kPadding + k);
    }
#pragma unroll 1
    for (int start = first_row; start < end_row; start += kKernel) {
#pragma unroll
      for (int u = 0; u < kKernel; ++u) {
        if (u > 0 && start + u >= end_row) break;
        constexpr int kBehind = kKernel - 1;
        load_row(window[(u + kBehind) % kKernel], start + u + kPadding);
        T* const row = in + (start + u) * args.w;
        float x[kColumns], y[kColumns];
#pragma unroll
        for (int v = 0; v < kColumns; ++v) x[v] = Traits::kExact || column + v < args.w ? to_float(row[v]) : 0.f;
        add_step<Traits>(sum, y, weight, x, window, (u + kBehind) % kKernel);
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
          if (Traits::kExact || column + v < args.w) row[v] = from_float<T>(y[v]);
      }
    }
    __syncthreads();
    const unsigned char* const from = shared_memory + slot + half + thread * 16;
#pragma unroll 2
    for (int k = 0; k < words - thread; k += threads)
      __stcs(reinterpret_cast<uint4*>(out + k * 16), *reinterpret_cast<const uint4*>(from + k * 16));
    out += stride;
    slot = slot + ring.stage_bytes == ring.depth * ring.stage_bytes ? 0 : slot + ring.stage_bytes;
  }

  let_second_pass_begin();
  wait_for_all_copies();
  float* const room = reinterpret_cast<float*>(shared_memory);
#pragma unroll
  for (int t = 0; t < kTaps; ++t) room[t * threads + thread] = sum[t];
  __syncthreads();
#pragma unroll 1
  for (int k = thread; k < kTaps * planes; k += threads) {
    const int channel = k / kTaps, tap = k - channel * kTaps;
    const float* const from = room + tap * threads + channel * of_plane;
    float total = 0;
#pragma unroll 4
    for (int t = 0; t < of_plane; ++t) total += from[t];
    if (!is_finite(total))
      total = exact_grad_weight<T>(args, false, first_channel + channel, tap / kKernel, tap % kKernel,
                                   GradRange{begin, begin + images, 0, args.out_h, 0, args.out_w});
    store_grad_weight<T>(args, blockIdx.y, (first_channel + channel) * kTaps + tap, args.out_c * kTaps, total);
  }
}

template <class Traits>
int launch_gradients_planes_nchw(const GradientsArgs& args, int, cudaStream_t stream) {
  constexpr int kMostStages = 4;
  const DeviceLimits& device = device_limits();
  GradientsPlanesRing ring{gradients_planes_tiling(args, sizeof(typename Traits::T), args.most_splits)};
  const GradientsPlanesTiling& tiling = ring.tiling;
  ring.stage_bytes = 2 * tiling.bytes;
  const int room = min_int(device.shared_bytes_block, device.shared_bytes / kGradientsPlaneBlocks - (1 << 10));
  ring.depth = max_int(1, min_int(min_int(kMostStages, tiling.images), room / ring.stage_bytes));
  const int threads = tiling.threads();
  const int bytes = max_int(ring.depth * ring.stage_bytes, Traits::kTaps * threads * static_cast<int>(sizeof(float)));
  if (bytes > device.shared_bytes_block) return kTooLittleSharedMemory;
  const auto kernel = gradients_planes_nchw_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  kernel<<<dim3(divide_up(static_cast<int>(args.out_c), tiling.planes), tiling.splits), threads, bytes, stream>>>(args,
                                                                                                                  ring);
  return cudaGetLastError();
}

}  // namespace depthwise
