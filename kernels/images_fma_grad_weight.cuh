// Grad of weight and bias of small images in large batches by multiply-adds, a lane an image. NCHW and channels_last.
//
// Serves  fp32; images up to 20x20, in and out; stride 1, dilation 1; compile-time are the width, the kernel's width and
//         its horizontal padding. Whole planes (kHeight > 0): the height, the kernel's height and its vertical padding as
//         well.
// Owns    a block: the units (images_fma_lanes.cuh) of its channels, for a share of the images. A thread: the taps of one
//         kernel row, in registers, for the image of its lane; the lanes' sums are added in a fixed order.
//         Rows: a warp takes every kWarps-th kernel row: of 'same' kernels that reach over the whole image, that gives
//         all warps the same work. Each row of grad_output with its row of input is 14x14 multiply-adds for 14 loads of
//         8 bytes.
//         Whole planes: both planes are registers and everything is unrolled: 7x7, 13x13: 2401 multiply-adds for 28
//         loads. The lanes' sums lie where the planes were, then a thread adds up those of a tap.
//         Wider than 14: the halves of a warp take two kernel rows of the same images, the p-th and the p-th from the
//         end, which 'same' kernels give the same work; of one in the middle, half of its rows each.
// Memory  both planes of every lane.
// Cost    no product with padding is taken, so that infinities need no care. To add up kTaps sums over the lanes takes
//         four instructions each by shuffles, 27x27 on 14x14: 112 beside 1423 multiply-adds a kernel row; through shared
//         memory it takes two.
// Errors  grow with the length of a chain of additions: sums of a row (of two rows of whole planes) are added to
//         those of the others, in groups of rows where registers allow, then over the lanes as a tree. One more addition
//         for every tap and row: 17 beside 196 multiply-adds of a row of 14 pixels, of kernels that reach over all of it.
// Chosen  select_grad_weight.h.
#pragma once

#include "exact_grad_weight.cuh"
#include "images_fma_lanes.cuh"

namespace depthwise {

// kHeight 0: any height, kernel height and vertical padding.
template <int kKernelW_, int kPaddingW_, int kWidth_, int kKernelH_, int kPaddingH_, int kHeight_, bool kChannelsLast_>
struct ImagesFmaGradWeightTraits {
  static constexpr int kKernelW = kKernelW_, kPaddingW = kPaddingW_, kWidth = kWidth_;
  static constexpr int kKernelH = kKernelH_, kPaddingH = kPaddingH_, kHeight = kHeight_;
  static constexpr bool kChannelsLast = kChannelsLast_, kWholePlane = kHeight > 0;
  static constexpr int kOutWidth = kWidth + 2 * kPaddingW - kKernelW + 1;
  static constexpr int kOutHeight = kHeight + 2 * kPaddingH - kKernelH + 1;  // of a whole plane
  static constexpr int kGranule = lane_grad_weight_granule(kWholePlane, kWidth, kOutWidth);
  static constexpr bool kHalves = takes_half_lanes(kWholePlane, kWidth, kOutWidth);  // of a warp, as above
  static constexpr int kPlaneBits = kHalves ? 4 : 5, kPlanes = 1 << kPlaneBits;      // of a unit
  static constexpr int kMaxHeight = kHalves ? kMaxLaneImage : max_lane_height(kWidth);
  static constexpr int kPitch = lane_pitch(kWidth, kGranule), kOutPitch = lane_pitch(kOutWidth, kGranule);
  // Taps that meet a pixel; the sums of others are zero.
  static constexpr int kFirstTap = max_int(0, kPaddingW - kOutWidth + 1);
  static constexpr int kTaps = min_int(kKernelW - 1, kWidth - 1 + kPaddingW) - kFirstTap + 1;
  // Seven warps, of so many registers a thread, hide all latencies.
  static constexpr int kFewestRegisters = 72, kOwnRegisters = kWholePlane || (kHalves && kTaps > 16) ? 24 : 16;

  // Whether the products of a tap in a row are added up by themselves, before they are added to those of other rows.
  // Where images are as high as they are wide, a tap of few products, all in one chain, errs no more than the others do.
  static constexpr bool adds_apart(int tap) {
    const int shift = tap + kFirstTap - kPaddingW;
    const int products = min_int(kOutWidth, kWidth - shift) - max_int(0, -shift);
    return products * products > 2 * min_int(kWidth, kOutWidth);
  }

  // Rows: where a thread has registers for twice the sums, those of so many rows are added up by themselves as well.
  static constexpr int kRowsApart = 2 * kTaps + kWidth + kOutWidth + kOwnRegisters <= kFewestRegisters ? 7 : 0;

  static constexpr int kUnits = lane_units(kWholePlane);  // of a block
  // Of a unit. Rows: at most; half as many as an image of 14 rows has: the kernel rows of each, together, meet twice these.
  static constexpr int kWarps = kWholePlane ? 1 : kLaneGradWeightWarps;
  static constexpr int kThreads = 32 * kUnits * kWarps;
  // Whole planes: kernel rows whose sums have room where the planes of a unit were, a tap of all lanes after the other.
  static constexpr int kTapPitch = kLaneTapPitch;
  static constexpr int kUnitFloats = 32 * (lane_plane(kHeight, kWidth) + lane_plane(kOutHeight, kOutWidth));
  static constexpr int kChunks = divide_up(max_int(kKernelH, 1), kUnitFloats / (kTaps * kTapPitch));
  static constexpr int kRowsAtOnce = divide_up(kKernelH, kChunks);
  // Sums, input, grad_output, and what else a thread needs: eight more at a time.
  static constexpr int kValues = kWholePlane ? kHeight * kWidth + kOutHeight * kOutWidth : kWidth + kOutWidth;
  static constexpr int kRegisters = max_int(kFewestRegisters, divide_up(kTaps + kOwnRegisters + kValues, 8) * 8);
  static constexpr int kBlocks = lane_blocks(kThreads, kRegisters);
};

// Adds up kCount values over the lanes whose index differs in `bit`: a lane keeps every second of them.
template <int kCount>
__device__ __forceinline__ void halve_lane_sums(float* sum, int bit) {
  const bool odd = (threadIdx.x & bit) != 0;
#pragma unroll
  for (int k = 0; k < kCount; k += 2) {
    const float even_sum = sum[k], odd_sum = k + 1 < kCount ? sum[k + 1] : 0.f;
    sum[k / 2] = (odd ? odd_sum : even_sum) + __shfl_xor_sync(~0u, odd ? even_sum : odd_sum, bit);
  }
}

// Adds up kCount values over the images of each channel of the warp, or of each half of it. Value k * images + image ends
// as sum[k] of that image's lane.
template <bool kHalves, int kCount>
__device__ __forceinline__ void add_lanes(float (&sum)[kCount], int channel_bits) {
  constexpr int kHalf = divide_up(kCount, 2), kQuarter = divide_up(kCount, 4), kFewer = kHalves ? 1 : 0;
  halve_lane_sums<kCount>(sum, 1 << channel_bits);
  if (!kHalves || channel_bits < 3) halve_lane_sums<kHalf>(sum, 2 << channel_bits);
  if (channel_bits < 3 - kFewer) halve_lane_sums<kQuarter>(sum, 4 << channel_bits);
  if (channel_bits < 2 - kFewer) halve_lane_sums<divide_up(kCount, 8)>(sum, 8 << channel_bits);
  if (!kHalves && channel_bits < 1) halve_lane_sums<divide_up(kCount, 16)>(sum, 16);
}

// Leaves one sum; those of a split's further images are added to it.
template <class Traits>
__device__ __forceinline__ void store_sum(const GradWeightArgs& args, int64_t index, float value, bool first) {
  const int64_t weights = args.out_c * args.kernel_h * Traits::kKernelW;
  if (!first) value += args.partial[blockIdx.y * weights + index];
  store_grad_weight<float>(args, blockIdx.y, index, weights, value);
}

// Zeros for the taps of kernel row i that meet no pixel, from `begin` on.
template <class Traits>
__device__ __forceinline__ void store_zeros(const GradWeightArgs& args, int64_t kernel_row, int begin, int step) {
  if constexpr (Traits::kTaps < Traits::kKernelW)
    for (int j = begin; j < Traits::kKernelW; j += step)
      if (j < Traits::kFirstTap || j >= Traits::kFirstTap + Traits::kTaps)
        store_sum<Traits>(args, kernel_row * Traits::kKernelW + j, 0.f, true);
}

// Adds the products of `rows` rows of grad_output and of input. Those of a tap that has many are added up by themselves
// first: the longer a chain of additions, the larger the sums that it rounds. Where warps are few, two taps at a time hide
// the latency; where all of them have registers, more multiply-adds read a value that the one before has read.
template <class Traits>
__device__ __forceinline__ void multiply_rows(float* sum, const float (*grad)[Traits::kOutWidth],
                                              const float (*input)[Traits::kWidth], int rows) {
  constexpr int kAtOnce = Traits::kWholePlane ? 2 : Traits::kHalves && Traits::kTaps <= 16 ? Traits::kTaps : 1;
#pragma unroll
  for (int first = 0; first < Traits::kTaps; first += kAtOnce) {
    float part[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e)
      if (first + e < Traits::kTaps) part[e] = Traits::adds_apart(first + e) ? 0.f : sum[first + e];
#pragma unroll
    for (int y = 0; y < rows; ++y)
#pragma unroll
      for (int v = 0; v < Traits::kOutWidth; ++v)
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          const int k = v + first + e + Traits::kFirstTap - Traits::kPaddingW;
          if (first + e < Traits::kTaps && k >= 0 && k < Traits::kWidth)
            part[e] = fmaf(grad[y][v], input[y][k], part[e]);
        }
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e)
      if (first + e < Traits::kTaps)
        sum[first + e] = Traits::adds_apart(first + e) ? sum[first + e] + part[e] : part[e];
  }
}

// The kernel rows of a warp. `first_channel`: of the unit; `first`: no images of the split came before.
template <class Traits>
__device__ __forceinline__ void sum_kernel_rows(const GradWeightArgs& args, const float* input, const float* grad,
                                                int first_channel, int channel_bits, bool first) {
  const int warp_rows = Traits::kHalves ? divide_up(args.kernel_h, 2) : args.kernel_h;
#pragma unroll 1
  for (int warp_row = threadIdx.x / 32; warp_row < warp_rows; warp_row += blockDim.x / 32) {
    const bool is_second = Traits::kHalves && threadIdx.x % 32 >= Traits::kPlanes;
    const int i = is_second ? args.kernel_h - 1 - warp_row : warp_row;
    const bool is_shared = Traits::kHalves && 2 * warp_row + 1 == args.kernel_h;  // by both halves
    const int shift = i - args.padding_h;  // from rows of grad_output to those of input
    int begin = max(0, -shift), end = min(args.out_h, args.h - shift);
    if (is_shared && begin < end) (is_second ? begin : end) = (begin + end) / 2;
    const float* from = input + (begin + shift) * Traits::kPitch;
    const float* grad_row = grad + begin * Traits::kOutPitch;
    const auto add_rows = [&](float* sums, int rows) {
#pragma unroll 1
      for (; rows > 0; --rows) {
        float row[1][Traits::kWidth], g[1][Traits::kOutWidth];
        load_lane_row<Traits::kGranule>(g[0], grad_row);
        load_lane_row<Traits::kGranule>(row[0], from);
        multiply_rows<Traits>(sums, g, row, 1);
        from += Traits::kPitch;
        grad_row += Traits::kOutPitch;
      }
    };
    float sum[Traits::kTaps] = {};
    if constexpr (Traits::kRowsApart == 0) {
      add_rows(sum, end - begin);
    } else {
#pragma unroll 1
      for (int rows = end - begin; rows > 0; rows -= Traits::kRowsApart) {
        float part[Traits::kTaps] = {};
        add_rows(part, min(rows, Traits::kRowsApart));
#pragma unroll
        for (int j = 0; j < Traits::kTaps; ++j) sum[j] += part[j];
      }
    }
    add_lanes<Traits::kHalves>(sum, channel_bits);
    // Of the values that it leaves, a lane has so many at most: two images a half of the warp, or four a warp.
    constexpr int kMostSums = divide_up(Traits::kTaps, Traits::kHalves ? 2 : 4);
    if constexpr (Traits::kHalves)
      if (is_shared)
#pragma unroll
        for (int k = 0; k < kMostSums; ++k) sum[k] += __shfl_xor_sync(~0u, sum[k], Traits::kPlanes);

    const int lane = threadIdx.x % Traits::kPlanes, image = lane >> channel_bits;
    const int images = Traits::kPlanes >> channel_bits;
    const int channel = first_channel + (lane & ((1 << channel_bits) - 1));
    if (channel < args.out_c && !(is_shared && is_second)) {
      const int64_t kernel_row = static_cast<int64_t>(channel) * args.kernel_h + i;
      const int64_t index = kernel_row * Traits::kKernelW + Traits::kFirstTap;
      if (channel_bits == 0 && Traits::kTaps <= Traits::kPlanes) {
        if (image < Traits::kTaps) store_sum<Traits>(args, index + image, sum[0], first);
      } else {
#pragma unroll
        for (int k = 0; k < kMostSums; ++k)
          if (k * images + image < Traits::kTaps) store_sum<Traits>(args, index + k * images + image, sum[k], first);
      }
      if (first) store_zeros<Traits>(args, kernel_row, image, images);
    }
  }
}

// Of planes that are known at compile time: kernel rows from kFirstRow on, a tap kTapPitch after the other.
template <class Traits, int kFirstRow>
__device__ __forceinline__ void sum_plane_kernel_rows(const float (&in)[Traits::kHeight][Traits::kWidth],
                                                      const float (&g)[Traits::kOutHeight][Traits::kOutWidth],
                                                      float* sums) {
  for_each_index<min_int(Traits::kRowsAtOnce, Traits::kKernelH - kFirstRow)>([&](auto row) {
    constexpr int kRow = decltype(row)::value, kShift = kFirstRow + kRow - Traits::kPaddingH;
    constexpr int kEnd = min_int(Traits::kOutHeight, Traits::kHeight - kShift);
    float sum[Traits::kTaps] = {};
#pragma unroll
    for (int y = max_int(0, -kShift); y < kEnd; y += 2)
      multiply_rows<Traits>(sum, g + y, in + (y + kShift), min_int(2, kEnd - y));
#pragma unroll
    for (int j = 0; j < Traits::kTaps; ++j) sums[(kRow * Traits::kTaps + j) * Traits::kTapPitch] = sum[j];
  });
}

// The 32 sums of a tap, by channel.
__device__ __forceinline__ void add_channels(float (&sum)[8], const float* lanes, int channel_bits) {
#pragma unroll
  for (int k = 0; k < 32; k += 8) {
    float eight[8];
    load_lane_row<4>(eight, lanes + k);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] = k == 0 ? eight[e] : sum[e] + eight[e];
  }
#pragma unroll
  for (int channels = 4; channels > 0; channels /= 2)
    if (1 << channel_bits <= channels)
#pragma unroll
      for (int e = 0; e < channels; ++e) sum[e] += sum[e + channels];
}

// A unit's planes, which are known at compile time, by its warp. `first`: no images of the split came before.
template <class Traits>
__device__ __forceinline__ void sum_plane(const GradWeightArgs& args, float* shared, const float* input,
                                          const float* grad, int first_channel, int channel_bits, bool first) {
  float in[Traits::kHeight][Traits::kWidth], g[Traits::kOutHeight][Traits::kOutWidth];
#pragma unroll
  for (int y = 0; y < Traits::kOutHeight; ++y) load_lane_row<Traits::kGranule>(g[y], grad + y * Traits::kOutPitch);
#pragma unroll
  for (int y = 0; y < Traits::kHeight; ++y) load_lane_row<Traits::kGranule>(in[y], input + y * Traits::kPitch);
  const int64_t filters = static_cast<int64_t>(first_channel) * (Traits::kKernelH * Traits::kKernelW);
  for_each_index<Traits::kChunks>([&](auto chunk) {
    constexpr int kFirstRow = decltype(chunk)::value * Traits::kRowsAtOnce;
    constexpr int kSums = min_int(Traits::kRowsAtOnce, Traits::kKernelH - kFirstRow) * Traits::kTaps;
    __syncthreads();
    const int thread = ptx::thread_index(), lane = thread % 32;
    float* const sums = shared + thread / 32 * Traits::kUnitFloats;
    sum_plane_kernel_rows<Traits, kFirstRow>(in, g, sums + lane);
    __syncthreads();
#pragma unroll 1
    for (int k = lane; k < kSums; k += 32) {
      float sum[8];
      add_channels(sum, sums + k * Traits::kTapPitch, channel_bits);
      const int tap = k / Traits::kTaps * Traits::kKernelW + k % Traits::kTaps;
      const int64_t index = filters + kFirstRow * Traits::kKernelW + Traits::kFirstTap + tap;
      if (channel_bits == 0 && first_channel < args.out_c) store_sum<Traits>(args, index, sum[0], first);
      if (channel_bits == 0) continue;
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < 1 << channel_bits && first_channel + e < args.out_c)
          store_sum<Traits>(args, index + e * Traits::kKernelH * Traits::kKernelW, sum[e], first);
    }
  });
  if (!first) return;
  const int channels = min(1 << channel_bits, static_cast<int>(args.out_c) - first_channel);
  for (int k = ptx::thread_index() % 32; k < channels * Traits::kKernelH; k += 32)
    store_zeros<Traits>(args, static_cast<int64_t>(first_channel) * Traits::kKernelH + k, 0, 1);
}

// The sum of each channel's grad_output; `shared`: a float for every thread.
template <class Traits>
__device__ __forceinline__ void sum_bias(const GradWeightArgs& args, const float* grad, float* shared, int channel_bits,
                                         int first_channel, bool first) {
  // Each lane adds up every warps-th row of its plane; of a half of the warp, every second of these.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32 / Traits::kUnits;
  const int first_row = Traits::kHalves ? warp + warps * (lane / Traits::kPlanes) : warp % warps;
  float sum = 0.f;
  for (int y = first_row; y < args.out_h; y += 32 / Traits::kPlanes * warps) {
    float row[Traits::kOutWidth], row_sum = 0.f;
    load_lane_row<Traits::kGranule>(row, grad + y * Traits::kOutPitch);
#pragma unroll
    for (int v = 0; v < Traits::kOutWidth; ++v) row_sum += row[v];
    sum += row_sum;
  }
  for (int bit = 16; bit >= 1 << channel_bits; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp % warps != 0 || lane >= 1 << channel_bits) return;
  for (int other = 1; other < warps; ++other) sum += shared[threadIdx.x + 32 * other];
  const int channel = first_channel + lane;
  if (channel >= args.out_c) return;
  if (!first) sum += args.partial_bias[blockIdx.y * args.out_c + channel];
  store_grad_bias<float>(args, blockIdx.y, channel, sum);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    images_fma_grad_weight_kernel(const GradWeightArgs args, const int channel_bits, const int groups) {
  using Input = LanePlanes<Traits::kWidth, Traits::kWholePlane ? Traits::kHeight : Traits::kMaxHeight, Traits::kGranule,
                           Traits::kChannelsLast>;
  using Output = LanePlanes<Traits::kOutWidth, Traits::kWholePlane ? Traits::kOutHeight : Traits::kMaxHeight,
                            Traits::kGranule, Traits::kChannelsLast>;
  const int in_plane = lane_plane(args.h, Traits::kWidth, Traits::kGranule);
  const int out_plane = lane_plane(args.out_h, Traits::kOutWidth, Traits::kGranule);
  extern __shared__ __align__(16) float shared[];
  float* const inputs = shared;
  float* const grads = inputs + Traits::kPlanes * Traits::kUnits * in_plane;
  float* const bias_sums = grads + Traits::kPlanes * Traits::kUnits * out_plane;

  const int first_channel = blockIdx.x * (Traits::kUnits << channel_bits);
  const int begin = static_cast<unsigned>(groups) * blockIdx.y / args.splits;
  const int end = static_cast<unsigned>(groups) * (blockIdx.y + 1) / args.splits;
#pragma unroll 1
  for (int group = begin; group < end; ++group) {
    const bool first = group == begin;
    if (!first) __syncthreads();
    LaneSlots slots;
    slots.units = Traits::kUnits;
    slots.channel_bits = channel_bits;
    slots.plane_bits = Traits::kPlaneBits;
    slots.first_channel = first_channel;
    slots.num_channels = static_cast<int>(args.out_c);
    slots.first_image = group * (Traits::kPlanes >> channel_bits);
    slots.num_images = static_cast<int>(args.n);
    Input::load(inputs, args.input, slots, args.h);
    Output::load(grads, args.grad_output, slots, args.out_h);
    Input::clear_missing(inputs, slots, args.h);
    Output::clear_missing(grads, slots, args.out_h);
    wait_for_all_copies();

    const int warp = threadIdx.x / 32, unit = Traits::kUnits == 1 ? 0 : warp / Traits::kWarps;
    const int slot = unit * 32 + threadIdx.x % Traits::kPlanes, unit_channel = first_channel + (unit << channel_bits);
    const float* const input = inputs + slot * in_plane;
    const float* const grad = grads + slot * out_plane;
    if (args.partial_bias != nullptr || args.grad_bias != nullptr)
      sum_bias<Traits>(args, grad, bias_sums, channel_bits, unit_channel, first);
    if constexpr (Traits::kWholePlane)
      sum_plane<Traits>(args, shared, input, grad, unit_channel, channel_bits, first);
    else
      sum_kernel_rows<Traits>(args, input, grad, unit_channel, channel_bits, first);
  }
}

template <class Traits>
int launch_images_fma_grad_weight(const GradWeightArgs& args, int, cudaStream_t stream) {
  const LaneCut cut = images_fma_grad_weight_cut(args, Traits::kWholePlane, Traits::kChannelsLast);
  if (const int error = allow_shared_bytes(images_fma_grad_weight_kernel<Traits>, cut.shared_bytes)) return error;
  const int rows = Traits::kHalves ? divide_up(args.kernel_h, 2) : args.kernel_h;  // of the kernel, that a warp takes
  int warps = Traits::kWholePlane ? Traits::kWarps : min_int(Traits::kWarps, rows);
  if (Traits::kHalves) warps = divide_up(rows, divide_up(rows, warps));  // all as many
  const dim3 blocks(divide_up(static_cast<int>(args.out_c), Traits::kUnits << cut.channel_bits), args.splits);
  images_fma_grad_weight_kernel<Traits><<<blocks, 32 * Traits::kUnits * warps, cut.shared_bytes, stream>>>(
      args, cut.channel_bits, lane_groups(args.n, cut));
  return cudaGetLastError();
}

}  // namespace depthwise
