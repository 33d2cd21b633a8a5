// Depthwise convolution of small images, channels_last, by multiply-adds, a block some channels of an image: forward,
// and grad of input at stride 1 (filter flipped).
//
// Serves  kernels of odd size up to five rows, five columns and nine taps, stride 1, dilation 1, the padding that keeps the
//         images' size, images of up to 16 rows and columns; the sizes of kernel and images are compile time; fp32, fp16,
//         bf16; aligned tensors, channels a multiple of 16 bytes; no depth multiplier.
// Owns    a block takes 32 channels; a thread two of them and a column, all of whose rows it walks down, its filter and
//         kKernelH rows of sums in registers.
// Memory  the block's image with zeros on both sides, all of it copied at once.
// Writes  64 or 128 contiguous bytes of a pixel.
// Chosen  select.h.
#pragma once

#include "async_copy.cuh"
#include "columns.cuh"

namespace depthwise {

template <class T, int kKernelH, int kKernelW, int kHeight, int kWidth>
struct ColumnsNhwcTraits : SmallImageTraits<T, kKernelH, kKernelW, kHeight, kWidth> {
  static constexpr int kVector = 2, kLanes = kColumnsNhwcChannels / kVector, kThreads = kLanes * kWidth;
  static constexpr int kChannels = kColumnsNhwcChannels;
  static constexpr int kGranule = 16 / static_cast<int>(sizeof(T)), kCopies = kChannels / kGranule;  // of a pixel
  static constexpr int kPitch = (kWidth + 2 * ColumnsNhwcTraits::kPaddingW) * kChannels;             // a row
  static constexpr int kBlocks = max_int(1, min_int(16, (64 << 10) / (72 * divide_up(kThreads, 32) * 32)));
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    columns_nhwc_kernel(const __grid_constant__ DirectArgs args) {
  using T = typename Traits::T;
  constexpr int kHeight = Traits::kHeight, kWidth = Traits::kWidth, kVector = Traits::kVector;
  constexpr int kKernelH = Traits::kKernelH, kKernelW = Traits::kKernelW, kTaps = Traits::kTaps;
  constexpr int kPaddingH = Traits::kPaddingH, kPaddingW = Traits::kPaddingW;
  constexpr int kCopies = Traits::kCopies, kChannels = Traits::kChannels, kPitch = Traits::kPitch;

  __shared__ uint4 shared_memory[kHeight * kPitch / Traits::kGranule];
  T* const tile = reinterpret_cast<T*>(shared_memory);
  const int all_channels = static_cast<int>(args.out_c), first_channel = blockIdx.x * kChannels;
  const int64_t image = static_cast<int64_t>(blockIdx.y) * (kHeight * kWidth) * all_channels + first_channel;

  // Load; channels beyond the last are others' instead.
  const int part = threadIdx.x % kCopies * Traits::kGranule, channels = min(kChannels, all_channels - first_channel);
  const T* const from = static_cast<const T*>(args.input) + image + (part < channels ? part : 0);
  const CopyTarget<T> target(tile + part);
  constexpr int kAtOnce = Traits::kThreads / kCopies;  // pixels
  static_assert(Traits::kThreads % kCopies == 0);
#pragma unroll
  for (int k = 0; k < divide_up(kHeight * kWidth, kAtOnce); ++k) {
    const int pixel = k * kAtOnce + static_cast<int>(threadIdx.x) / kCopies, row = pixel / kWidth;
    if ((k + 1) * kAtOnce <= kHeight * kWidth || pixel < kHeight * kWidth)
      target.template copy_async<16>(row * kPitch + (pixel - row * kWidth + kPaddingW) * kChannels,
                                     from + static_cast<int64_t>(pixel) * all_channels);
  }
  commit_copies();
  // Before the zeros: behind that loop nvcc 13.0 (sm_90) leaves most of the loads for after the wait for the copies.
  const int lane = threadIdx.x % Traits::kLanes * kVector, column = threadIdx.x / Traits::kLanes;
  const int channel = first_channel + min(lane, channels - kVector);
  float weight[kTaps][kVector], bias[kVector];
  load_filters<Traits>(weight, filters_of<Traits>(args, channel, kTaps), args.flip, args.flip);
#pragma unroll
  for (int e = 0; e < kVector; ++e) bias[e] = bias_of<Traits>(args, channel + e);
#pragma unroll 1
  for (int k = threadIdx.x; k < kHeight * 2 * kPaddingW * kCopies; k += Traits::kThreads) {
    const int pixel = k / kCopies, row = pixel / max_int(1, 2 * kPaddingW), column = pixel - row * 2 * kPaddingW;
    shared_memory[(row * kPitch + (column < kPaddingW ? column : kWidth + column) * kChannels) / Traits::kGranule +
                  k % kCopies] = uint4{};
  }
  wait_for_all_copies();

  // Compute and store.
  const T* const window_at = tile + column * kChannels + lane;
  T* const out = static_cast<T*>(args.out) + image + static_cast<int64_t>(column) * all_channels + lane;
  float sum[kKernelH][kVector];
#pragma unroll
  for (int r = 0; r < kHeight + kPaddingH; ++r) {
    if (r < kHeight) {
      float window[kKernelW][kVector];
#pragma unroll
      for (int j = 0; j < kKernelW; ++j) {
        const auto pair = *reinterpret_cast<const Vector<T, kVector>*>(window_at + r * kPitch + j * kChannels);
#pragma unroll
        for (int e = 0; e < kVector; ++e) window[j][e] = to_float(pair.value[e]);
      }
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        const int o = r - i + kPaddingH;
        if (o < 0 || o >= kHeight) continue;
        const bool begins = i == 0 || r == 0;
#pragma unroll
        for (int j = 0; j < kKernelW; ++j)
#pragma unroll
          for (int e = 0; e < kVector; ++e)
            sum[o % kKernelH][e] =
                fmaf(window[j][e], weight[i * kKernelW + j][e], begins && j == 0 ? bias[e] : sum[o % kKernelH][e]);
      }
    }
    const int o = r - kPaddingH;
    if (o >= 0 && lane < channels)
      store_streaming(out + static_cast<int64_t>(o * kWidth) * all_channels, sum[o % kKernelH]);
  }
}

template <class Traits>
int launch_columns_nhwc(const DirectArgs& args, int, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(divide_up<int64_t>(args.out_c, Traits::kChannels)),
                    static_cast<unsigned>(args.n));
  columns_nhwc_kernel<Traits><<<blocks, Traits::kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace depthwise
