// Depthwise convolution of small images in large batches by multiply-adds, a lane an image: forward, and grad of input
// at stride 1 (filter flipped). NCHW and channels_last.
//
// Serves  fp32; images up to 20x20, in and out; stride 1, dilation 1; compile-time are the width, the kernel's width and
//         its horizontal padding. Whole planes (kHeight > 0): the height, the kernel's height and its vertical padding as
//         well.
// Owns    a lane owns its image, so that the weights are the same for all lanes that share a channel, and products with
//         padding are left out: by compile-time indices within rows, by the ranges of loops among rows. A thread
//         computes kRows rows of outputs in registers, a warp kRows rows of its unit (images_fma_lanes.cuh).
//         Rows: it walks down the kernel; a kernel row serves all of its output rows, whose input rows are a ring of
//         registers: 14x14, 27x27, kRows = 2: 392 multiply-adds for 7 loads of weights and 4 of input, 16 bytes each.
//         Whole planes: the input is registers as well, and everything is unrolled: 7x7, 13x13: 2401 multiply-adds for
//         52 and 14 loads.
// Memory  the block's filters and input planes; the outputs reuse the input's room on their way out.
// Cost    no multiply-add is wasted where kRows divides the outputs' height and all lanes have images.
// Errors  grow with the length of a chain of additions: where one would be longer than kLongestChain, the products of a
//         kernel row are added up by themselves first. Their registers are those of the ring: a thread walks down the
//         kernel for one output row after the other. 20x20, 13x13: 20 additions beside 218 multiply-adds.
// Chosen  select.h.
#pragma once

#include "images_fma_lanes.cuh"

namespace depthwise {

// kHeight 0: any height, kernel height and vertical padding.
template <int kKernelW_, int kPaddingW_, int kWidth_, int kRows_, int kKernelH_, int kPaddingH_, int kHeight_,
          bool kChannelsLast_>
struct ImagesFmaTraits {
  using T = float;
  static constexpr int kKernelW = kKernelW_, kPaddingW = kPaddingW_, kWidth = kWidth_, kRows = kRows_;
  static constexpr int kKernelH = kKernelH_, kPaddingH = kPaddingH_, kHeight = kHeight_;
  static constexpr bool kChannelsLast = kChannelsLast_, kWholePlane = kHeight > 0;
  static constexpr int kOutWidth = kWidth + 2 * kPaddingW - kKernelW + 1;
  static constexpr int kOutHeight =
      kWholePlane ? kHeight + 2 * kPaddingH - kKernelH + 1 : max_lane_out_height(kOutWidth);  // at most
  static constexpr int kMaxHeight = kWholePlane ? kHeight : max_lane_height(kWidth);
  static constexpr int kPitch = lane_pitch(kWidth), kOutPitch = lane_pitch(kOutWidth);
  static constexpr int kWeightPitch = lane_pitch(kKernelW);
  // Taps that meet a pixel.
  static constexpr int kFirstTap = max_int(0, kPaddingW - kOutWidth + 1);
  static constexpr int kLastTap = min_int(kKernelW - 1, kWidth - 1 + kPaddingW);
  // Products that one running sum adds up, at most.
  static constexpr int kLongestChain = 256;
  static constexpr bool kAddsRowsApart = min_int(kKernelW, kWidth) * kMaxHeight > kLongestChain;

  static constexpr int kUnits = lane_units(kWholePlane);       // of a block
  static constexpr int kWarps = divide_up(kOutHeight, kRows);  // of a unit, at most
  static constexpr int kThreads = 32 * kUnits * kWarps;
  // Sums, input, and what else a thread needs; seven warps hide all latencies, and four where nearly all is multiply-adds.
  static constexpr int kRegisters = kWholePlane
                                        ? max_int(kWarps == 1 ? 104 : 72, kRows* kOutWidth + kHeight * kWidth + 24)
                                        : max_int(72, kRows* kOutWidth + kRows * kWidth + 16);
  static constexpr int kBlocks = lane_blocks(kThreads, kRegisters);
};

// The filters of `channels` channels, kernel rows kWeightPitch apart; a warp takes whole rows. To be waited for with
// wait_for_all_copies.
template <class Traits>
__device__ __forceinline__ void load_filters(float* shared, const DirectArgs& args, int first_channel, int channels) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (lane >= Traits::kKernelW) return;
  const float* from = static_cast<const float*>(args.weight) +
                      (static_cast<int64_t>(first_channel) * args.kernel_h + warp) * Traits::kKernelW + lane;
  const CopyTarget<float> target(shared);
  const int column = args.flip ? Traits::kKernelW - 1 - lane : lane;
  int first = (args.flip ? args.kernel_h - 1 - warp : warp) * Traits::kWeightPitch + column;
  const int step = (args.flip ? -warps : warps) * Traits::kWeightPitch;
#pragma unroll 1
  for (int channel = 0; channel < channels; ++channel) {
    const float* at = from;
    int offset = first;
#pragma unroll 2
    for (int i = warp; i < args.kernel_h; i += warps) {
      target.template copy_async<4>(offset, at);
      at = ptx::opaque(at + warps * Traits::kKernelW);
      offset += step;
    }
    from += args.kernel_h * Traits::kKernelW;
    first += lane_plane(args.kernel_h, Traits::kKernelW);
  }
}

// Adds the products of one kernel row with the input rows row_of(o) to the sums of outputs o, kFirst and on.
template <class Traits, int kFirst, int kCount, class RowOf>
__device__ __forceinline__ void add_products(float (&sum)[Traits::kRows][Traits::kOutWidth], const float* weights,
                                             RowOf row_of) {
#pragma unroll
  for (int j = Traits::kFirstTap / 4 * 4; j <= Traits::kLastTap; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(weights + j);
    const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int o = kFirst; o < kFirst + kCount; ++o)
#pragma unroll
        for (int v = 0; v < Traits::kOutWidth; ++v) {
          const int column = v + j + k - Traits::kPaddingW;
          if (j + k < Traits::kKernelW && column >= 0 && column < Traits::kWidth)
            sum[o][v] = fmaf(row_of(o)[column], w[k], sum[o][v]);
        }
  }
}

// The same, by themselves first where chains would be long.
template <class Traits, int kFirst, int kCount, class RowOf>
__device__ __forceinline__ void multiply_kernel_row(float (&sum)[Traits::kRows][Traits::kOutWidth],
                                                    const float* weights, RowOf row_of) {
  if constexpr (!Traits::kAddsRowsApart) {
    add_products<Traits, kFirst, kCount>(sum, weights, row_of);
  } else {
    float part[Traits::kRows][Traits::kOutWidth] = {};
    add_products<Traits, kFirst, kCount>(part, weights, row_of);
#pragma unroll
    for (int o = kFirst; o < kFirst + kCount; ++o)
#pragma unroll
      for (int v = 0; v < Traits::kOutWidth; ++v) sum[o][v] += part[o][v];
  }
}

// What a thread works on.
struct LaneWork {
  const float *plane, *filter;
  int first_row;  // of the outputs
};

// Output rows of any plane: kernel rows that meet the image in all of the thread's rows, from the ring, then those that do
// in some. `work_of()` is asked again for each part: it costs less than the registers to remember it.
template <class Traits, class WorkOf>
__device__ __forceinline__ void sum_rows(float (&sum)[Traits::kRows][Traits::kOutWidth], const DirectArgs& args,
                                         WorkOf work_of) {
  constexpr int kRows = Traits::kRows;
  // first_in_row: that the first output meets with kernel row 0. Kernel rows [whole_begin, whole_end) meet the image in
  // all rows; none are taken from the ring where their products are added up apart.
  const auto whole_end_of = [&](int first_in_row, int whole_begin) {
    return Traits::kAddsRowsApart ? whole_begin : min(args.kernel_h, args.h - first_in_row - (kRows - 1));
  };
  const LaneWork work = work_of();
  const int first_in_row = work.first_row - args.padding_h;
  const int whole_begin = max(0, -first_in_row), whole_end = whole_end_of(first_in_row, whole_begin);

  if (whole_begin < whole_end) {
    float ring[kRows][Traits::kWidth];
    const float* row = work.plane + (first_in_row + whole_begin) * Traits::kPitch;
    const float* weights = work.filter + whole_begin * Traits::kWeightPitch;
    const float* const last_weights = work.filter + whole_end * Traits::kWeightPitch;
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r, row += Traits::kPitch) load_lane_row<4>(ring[r], row);
    bool more = true;
#pragma unroll 1
    while (more)
      for_each_index<kRows>([&](auto phase) {
        if (!more) return;
        constexpr int kPhase = decltype(phase)::value;
        load_lane_row<4>(ring[(kPhase + kRows - 1) % kRows], row);
        multiply_kernel_row<Traits, 0, kRows>(sum, weights, [&](int o) { return ring[(o + kPhase) % kRows]; });
        row += Traits::kPitch;
        weights += Traits::kWeightPitch;
        more = weights != last_weights;
      });
  }
  for_each_index<kRows>([&](auto output) {
    constexpr int kOutput = decltype(output)::value;
    const LaneWork work = work_of();
    const int first_in_row = work.first_row - args.padding_h;
    const int whole_begin = max(0, -first_in_row), whole_end = whole_end_of(first_in_row, whole_begin);
    const int end = min(args.kernel_h, args.h - first_in_row - kOutput);
#pragma unroll 1
    for (int i = max(0, -(first_in_row + kOutput)); i < end; ++i) {
      if (i == whole_begin) i = max(i, whole_end);
      if (i >= end) break;
      float row[Traits::kWidth];
      load_lane_row<4>(row, work.plane + (first_in_row + kOutput + i) * Traits::kPitch);
      multiply_kernel_row<Traits, kOutput, 1>(sum, work.filter + i * Traits::kWeightPitch, [&](int) { return row; });
    }
  });
}

// The kPart-th kRows output rows of a plane that is known at compile time.
template <class Traits, int kPart>
__device__ __forceinline__ void sum_plane_part(float (&sum)[Traits::kRows][Traits::kOutWidth], const float* plane,
                                               const float* filter) {
  constexpr int kFirstRow = kPart * Traits::kRows - Traits::kPaddingH;  // that the first output meets with kernel row 0
  constexpr int kOutputs = min_int(Traits::kRows, Traits::kOutHeight - kPart * Traits::kRows);
  float input[Traits::kHeight][Traits::kWidth];
#pragma unroll
  for (int r = 0; r < Traits::kHeight; ++r)
    if (r >= kFirstRow && r < kFirstRow + kOutputs + Traits::kKernelH - 1)
      load_lane_row<4>(input[r], plane + r * Traits::kPitch);
  for_each_index<Traits::kKernelH>([&](auto kernel_row) {
    constexpr int i = decltype(kernel_row)::value;
    constexpr int kFirst = max_int(0, -(kFirstRow + i));
    constexpr int kCount = min_int(kOutputs, Traits::kHeight - kFirstRow - i) - kFirst;
    if constexpr (kCount > 0)
      multiply_kernel_row<Traits, kFirst, kCount>(sum, filter + i * Traits::kWeightPitch,
                                                  [&](int o) { return input[o + kFirstRow + i]; });
  });
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    images_fma_kernel(const DirectArgs args, const int channel_bits) {
  const int channels = Traits::kUnits << channel_bits;
  const int filter_floats = lane_plane(args.kernel_h, Traits::kKernelW);
  extern __shared__ __align__(16) float shared[];
  float* const planes = shared + channels * filter_floats;
  const auto slots = [&] {
    LaneSlots slots;
    slots.units = Traits::kUnits;
    slots.channel_bits = channel_bits;
    slots.plane_bits = 5;
    slots.first_channel = blockIdx.x * channels;
    slots.num_channels = static_cast<int>(args.out_c);
    slots.first_image = blockIdx.y * (32 >> channel_bits);
    slots.num_images = static_cast<int>(args.n);
    return slots;
  };

  // Load.
  LanePlanes<Traits::kWidth, Traits::kMaxHeight, 4, Traits::kChannelsLast>::load(planes, args.input, slots(), args.h);
  const int first_channel = blockIdx.x * channels;
  const int existing = min(channels, static_cast<int>(args.out_c) - first_channel);
  load_filters<Traits>(shared, args, first_channel, existing);
  wait_for_all_copies();

  // Compute.
  const auto part_of = [](int thread) { return Traits::kUnits == 1 ? thread / 32 : thread / 32 % Traits::kWarps; };
  const auto slot_of = [](int thread) {
    return Traits::kUnits == 1 ? thread % 32 : thread / 32 / Traits::kWarps * 32 + thread % 32;
  };
  const auto channel_of = [&](int slot) { return (slot / 32 << channel_bits) + (slot & ((1 << channel_bits) - 1)); };
  const auto work_of = [&] {
    const int thread = ptx::thread_index(), slot = slot_of(thread);
    return LaneWork{planes + slot * lane_plane(args.h, Traits::kWidth), shared + channel_of(slot) * filter_floats,
                    part_of(thread) * Traits::kRows};
  };
  const int channel = channel_of(slot_of(threadIdx.x));
  const float bias = args.bias != nullptr && channel < existing
                         ? load(static_cast<const float*>(args.bias) + first_channel + channel)
                         : 0.f;
  float sum[Traits::kRows][Traits::kOutWidth];
#pragma unroll
  for (int o = 0; o < Traits::kRows; ++o)
#pragma unroll
    for (int v = 0; v < Traits::kOutWidth; ++v) sum[o][v] = bias;
  if constexpr (Traits::kWholePlane) {
    const LaneWork work = work_of();
    for_each_index<Traits::kWarps>([&](auto part) {
      constexpr int kPart = decltype(part)::value;
      if (work.first_row == kPart * Traits::kRows) sum_plane_part<Traits, kPart>(sum, work.plane, work.filter);
    });
  } else {
    sum_rows<Traits>(sum, args, work_of);
  }

  // Store, through the input's room.
  __syncthreads();
  {
    const int thread = ptx::thread_index(), first_row = part_of(thread) * Traits::kRows;
    float* const out =
        planes + slot_of(thread) * lane_plane(args.out_h, Traits::kOutWidth) + first_row * Traits::kOutPitch;
#pragma unroll
    for (int o = 0; o < Traits::kRows; ++o)
      if (first_row + o < args.out_h) store_lane_row(out + o * Traits::kOutPitch, sum[o]);
  }
  __syncthreads();
  LanePlanes<Traits::kOutWidth, Traits::kOutHeight, 4, Traits::kChannelsLast>::store(args.out, planes, slots(),
                                                                                     args.out_h);
}

template <class Traits>
int launch_images_fma(const DirectArgs& args, int, cudaStream_t stream) {
  const LaneCut cut = images_fma_cut(args, Traits::kWholePlane, Traits::kChannelsLast);
  if (const int error = allow_shared_bytes(images_fma_kernel<Traits>, cut.shared_bytes)) return error;
  const dim3 blocks(divide_up(static_cast<int>(args.out_c), Traits::kUnits << cut.channel_bits),
                    divide_up(static_cast<int>(args.n), 32 >> cut.channel_bits));
  const int warps = Traits::kUnits * divide_up(args.out_h, Traits::kRows);
  images_fma_kernel<Traits><<<blocks, 32 * warps, cut.shared_bytes, stream>>>(args, cut.channel_bits);
  return cudaGetLastError();
}

}  // namespace depthwise
