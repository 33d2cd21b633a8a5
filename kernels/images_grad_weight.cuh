// Grad of weight and bias of small images on the tensor cores, both layouts.
//
// Serves  fp16 and bf16, stride 1, dilation 1, images and outputs of at most kColumns rows and columns (8 or 16; NCHW: 32
//         as well), kernels up to 64x64, any padding below the kernel's size, any batch and alignment; no depth
//         multiplier.
// Idea    The K of a product are sixteen images of one channel: for a row y of the input and a row h of grad_output,
//         D[m][n] = sum over images of x[image][y][m] * g[image][h][n] holds the terms of kernel row y - h + padding, and
//         on its diagonals those of kernel column m - n + padding. All pairs of rows with the same y - h share their
//         accumulators. 16 columns are two products of M = 16, N = 8, 32 columns eight. Of 8 columns, M holds two rows y
//         and y + 1, whose accumulators are the upper half of y - h and the lower half of the next difference.
//         Of the multiplies, none is spent on padding, and all but (w / kColumns)^2 are wasted on columns that do not
//         exist; kernels narrower than the image leave diagonals unused.
// Zeros   meet no values: accumulators of columns that do not exist are left out, and so are the lower halves of an odd
//         last row of 8 columns, which has accumulators of its own. So NaN and infinity go where they belong.
// Owns    A block takes kChannels channels and a share of the stages, of 16 * kImageWarps images each. A work item is a
//         channel, sixteen of its images and a segment of kSegmentRows kernel rows; a warp takes kSegments items at a
//         time, and a block as many rounds as its items need (the planes stay where it has a single stage). The sums of
//         kImageWarps warps are added, then their diagonals through shared memory, all in a fixed order; the splits by
//         add_splits_kernel.
// Memory  A stage's planes, see images_grad_weight_planes.cuh, twice where stages overlap; from image to image an odd number of
//         16-byte words, so that ldmatrix meets no bank twice. 27x27 on 14x14 images: 29 KB of planes and 9 KB of
//         diagonals for one channel of NCHW, 118 KB and 19 KB for eight of channels_last.
// Chosen  select_grad_weight.h.
#pragma once

#include "exact_grad_weight.cuh"
#include "images_grad_weight_planes.cuh"
#include "images_grad_weight_sums.cuh"

namespace depthwise {

// channels_last: planes fill the shared memory, so that a block has the registers of a multiprocessor. 32 columns: a warp
// for every two kernel rows, four at least and sixteen at most.
constexpr int images_warps(bool channels_last, int columns, int live) {
  if (columns == 32) return live <= 8 ? 4 : live <= 16 ? 8 : 16;
  return !channels_last ? 4 : columns == 8 || live <= 8 ? 16 : 8;
}

// kLive_: kernel rows that meet the image at all. 16 and 32 columns: rounded up to whole segments. 8 columns: compiled
// also for the images' rows and for the first of the differences y - h.
template <class T_, int kColumns_, int kLive_, bool kChannelsLast_, int kInRows_, int kOutRows_, int kFirst_>
struct ImagesGradWeightTraits {
  using T = T_;
  static constexpr bool kChannelsLast = kChannelsLast_, kNarrow = kColumns_ == 8;
  static constexpr int kColumns = kColumns_, kLive = kLive_;
  static constexpr int kInRows = kInRows_, kOutRows = kOutRows_, kFirst = kFirst_;

  static constexpr int kWarps = images_warps(kChannelsLast, kColumns, kLive);
  static constexpr int kThreads = 32 * kWarps;
  // 8 columns: half of the threads copy each tensor, so that all loads are under way at once.
  static constexpr int kTensorThreads = kNarrow ? kThreads / 2 : kThreads;
  // Threads of a warp that copy what is not copied asynchronously: four pairs of rows of seven are 28 words, and 32 where
  // they go, which is all banks.
  static constexpr int kCopyLanes = kNarrow ? 28 : 32;
  static constexpr int kChannels = images_channels(kChannelsLast, kColumns);  // at most
  static constexpr int kImageWarps = images_stage(kChannelsLast, kColumns, kLive) / 16;
  static constexpr int kStageImages = 16 * kImageWarps;
  // Many kernel rows: a long segment and a short one, half of all segments apart.
  static constexpr int kSegments = kColumns == 16 && !kChannelsLast && kImageWarps == 1 ? 2 : 1;
  static constexpr int kCuts = kNarrow ? 1 : images_cuts(kChannelsLast, kColumns, kLive);
  static constexpr int kSegmentRows = divide_up(kLive, kCuts);
  // Of a multiprocessor, as registers allow. Six of few rows: 5x5 on 672x14x14, 672 blocks, are a single wave. Before sm_80
  // the same code takes more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr int kMostBlocks = 4;
#else
  static constexpr int kMostBlocks = 6;
#endif
  static constexpr bool kFewRows = kColumns == 16 && !kChannelsLast && kSegmentRows <= 3;
  static constexpr int kBlocks = kColumns == 32                 ? (kWarps == 4 ? 3 : 16 / kWarps)
                                 : kChannelsLast                ? 1
                                 : kFewRows                     ? kMostBlocks
                                 : !kNarrow && kSegmentRows > 5 ? 3
                                                                : 4;
  static constexpr int kMaxItems = kChannels * kImageWarps * kCuts;
  static constexpr int kMaxRounds = divide_up(kMaxItems, kWarps* kSegments);
  static_assert(kImageWarps == 1 || (kMaxRounds == 1 && kSegments == 1));

  // What is left of a kernel row's accumulators in a lane: two neighbouring columns of the blocks of 8x8 that are up to
  // kSpan blocks off the diagonal.
  static constexpr int kTiles = kNarrow ? 1 : kColumns / 16;
  static constexpr int kSpan = kNarrow ? 0 : 2 * kTiles - 1;
  static constexpr int kParts = 2 * (2 * kSpan + 1);
  // Floats; 2 * (pitch - 1) is 8 modulo 32. 32 columns: they take the place of the planes.
  static constexpr int kDiagonalPitch = 32 * kTiles + 5;
  static constexpr bool kOverlays = kColumns == 32;
  static constexpr int kDiagonalBuffers = kOverlays || kFewRows ? 1 : 2;  // that many blocks have room for one
  static constexpr int kDiagonalFloats = kDiagonalBuffers * 8 * kDiagonalPitch;
  // What takes the place of the planes after the last stage, and what is beside them.
  static constexpr int late_bytes(int channels) {
    if (kOverlays) return kWarps * kDiagonalFloats * 4;
    return kImageWarps == 1 ? 0 : channels * kCuts * kSegmentRows * kParts * 32 * 4;
  }
  static constexpr int kOwnBytes = (kMaxItems + (kOverlays ? 0 : kWarps * kDiagonalFloats)) * 4;
};

// How a launch is cut.
struct ImagesTiling {
  int channels, stages, split_stages;
  int buffers, buffer_elements;  // one or two
  int planes_bytes;              // of all buffers
  ImagesTensor tensors[2];       // input, grad_output
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    images_grad_weight_kernel(const GradWeightArgs args, const __grid_constant__ ImagesTiling tiling) {
  using T = typename Traits::T;
  using Sums = std::conditional_t<Traits::kNarrow, NarrowSums<Traits>, WideSums<Traits>>;
  constexpr int kWarps = Traits::kWarps, kSegments = Traits::kSegments, kRows = Traits::kSegmentRows;
  constexpr int kImageWarps = Traits::kImageWarps, kParts = Traits::kParts;

  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const planes = reinterpret_cast<T*>(shared_memory);
  float* const item_bias = reinterpret_cast<float*>(shared_memory + tiling.planes_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Diagonals<Traits> diagonals{
      (Traits::kOverlays ? reinterpret_cast<float*>(shared_memory) : item_bias + Traits::kMaxItems) +
      warp * Traits::kDiagonalFloats};

  const int block_channels = Traits::kChannelsLast ? tiling.channels : Traits::kChannels;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * block_channels;
  const int channels = static_cast<int>(min(static_cast<int64_t>(block_channels), args.out_c - first_channel));
  const int begin = blockIdx.y * tiling.split_stages, end = min(begin + tiling.split_stages, tiling.stages);
  const int in_channel = Traits::kStageImages * tiling.tensors[0].pitch,
            grad_channel = Traits::kStageImages * tiling.tensors[1].pitch;
  const int in_elements = block_channels * in_channel;
  const auto images_of = [&](int stage) {
    const int64_t left = args.n - static_cast<int64_t>(stage) * Traits::kStageImages;
    return static_cast<int>(min(static_cast<int64_t>(Traits::kStageImages), left));
  };

  const auto load_stage = [&](auto is_first, int stage, T* shared) {
    constexpr bool kFirst = decltype(is_first)::value;
    // The two tensors in a loop: half of the code, and nothing of both is held in registers at once.
    const int only = threadIdx.x / Traits::kTensorThreads;
#pragma unroll 1
    for (int k = Traits::kNarrow ? only : 0; k < (Traits::kNarrow ? only + 1 : 2); ++k) {
      const bool is_input = k == 0;
      const ImagesTensor& tensor = tiling.tensors[k];
      const int plane = tensor.height * tensor.width;
      StagePlanes<T> p;
      p.global = static_cast<const T*>(is_input ? args.input : args.grad_output) +
                 static_cast<int64_t>(stage) * Traits::kStageImages * tensor.image_stride +
                 first_channel * (Traits::kChannelsLast ? 1 : plane);
      p.shared = shared + (is_input ? 0 : in_elements);
      p.channels = channels;
      p.images = images_of(stage);
      if constexpr (Traits::kChannelsLast) {
        transpose_planes<Traits, kFirst>(p, tensor, args.out_c);
      } else {
        copy_planes<Traits, kFirst>(p, tensor);
        clear_planes<Traits>(p, tensor);
      }
    }
  };

  // Kernel rows i have differences i - padding_h; the first that meets the image.
  const int first_difference = Traits::kNarrow ? Traits::kFirst : -min(args.padding_h, args.out_h - 1);
  const int live_rows = min(args.kernel_h - 1 - args.padding_h, args.h - 1) - first_difference + 1;
  const int taps = args.kernel_h * args.kernel_w;
  const auto weight_idx = [&](int channel, int tap) { return (first_channel + channel) * taps + tap; };
  // What meets padding alone.
  const int reach = max(args.padding_w, args.kernel_w - 1 - args.padding_w);
  if (live_rows < args.kernel_h || reach >= Traits::kColumns)
#pragma unroll 1
    for (int k = threadIdx.x; k < channels * taps; k += Traits::kThreads) {
      const int channel = k / taps, i = (k - channel * taps) / args.kernel_w,
                j = k - channel * taps - i * args.kernel_w;
      const int row = i - args.padding_h - first_difference, column = j - args.padding_w;
      if (row < 0 || row >= live_rows || column <= -Traits::kColumns || column >= Traits::kColumns)
        store_grad_weight<T>(args, blockIdx.y, weight_idx(0, k), args.out_c * taps, 0.f);
    }

  // ldmatrix: where this lane's rows of sixteen images lie, see tensor_core.cuh; bytes.
  const unsigned in_lane = (lane / 16 * 8 + lane % 8) * tiling.tensors[0].pitch * sizeof(T) + lane / 8 % 2 * 16;
  const unsigned grad_lane = (lane / 8 % 2 * 8 + lane % 8) * tiling.tensors[1].pitch * sizeof(T) + lane / 16 * 16;
  const bool has_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;
  const int items = block_channels * kImageWarps * Traits::kCuts;
  const bool one_stage = end - begin == 1, stays = one_stage && !Traits::kOverlays;  // for the next round
  int loaded = begin;
  if (loaded < end) {
    load_stage(std::true_type{}, loaded++, planes);
    commit_copies();
  }
  if constexpr (!Traits::kOverlays) diagonals.clear();

#pragma unroll 1
  for (int round = 0; round < Traits::kMaxRounds; ++round) {
    Sums sums[kSegments];
    float bias[kSegments] = {};
    // Channels vary fastest, segments slowest.
    const auto item = [&](int s) { return (round * kSegments + s) * kWarps + warp; };
    const auto channel = [&](int s) { return Traits::kChannels == 1 ? 0 : item(s) % block_channels; };
    const auto share = [&](int s) { return Traits::kChannels == 1 ? item(s) : item(s) / block_channels; };
    const auto image_warp = [&](int s) { return share(s) % kImageWarps; };
    const auto segment = [&](int s) { return share(s) / kImageWarps; };
    const auto is_idle = [&](int s) { return item(s) >= items || channel(s) >= channels; };

    if (round > 0 && !stays) loaded = begin;
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      if (round == 0 || !stays) {
#pragma unroll 1
        for (; loaded < min(end, stage + tiling.buffers); ++loaded) {
          load_stage(std::false_type{}, loaded,
                     planes + ((loaded - begin) & (tiling.buffers - 1)) * tiling.buffer_elements);
          commit_copies();
        }
        if (loaded > stage + 1)
          wait_for_copies<1>();
        else
          wait_for_copies<0>();
        __syncthreads();
      }
      const T* const buffer = planes + ((stage - begin) & (tiling.buffers - 1)) * tiling.buffer_elements;
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        if (is_idle(s) || image_warp(s) * 16 >= images_of(stage)) continue;
        const T* const in = buffer + channel(s) * in_channel + image_warp(s) * 16 * tiling.tensors[0].pitch;
        const T* const grad =
            buffer + in_elements + channel(s) * grad_channel + image_warp(s) * 16 * tiling.tensors[1].pitch;
        const unsigned in_address = ptx::shared_address(in) + in_lane;
        const unsigned grad_address = ptx::shared_address(grad) + grad_lane;
        if constexpr (Traits::kNarrow)
          sums[s].multiply(in_address, grad_address);
        else
          sums[s].multiply(in_address, grad_address, first_difference + segment(s) * kRows, reach, args.h, args.out_h);
        if (!has_bias) continue;
        // 32 bytes at a time: 16 columns of a row, or two rows of 8.
        const int chunks = Traits::kNarrow ? divide_up(args.out_h, 2) : args.out_h * Traits::kTiles;
#pragma unroll 1
        for (int chunk = segment(s); chunk < chunks; chunk += Traits::kCuts) {
          unsigned words[4];
          ptx::load_matrices_transposed(words, grad_address + chunk * 32);
          const int column = lane / 4 + (Traits::kNarrow ? 0 : chunk % Traits::kTiles * 16);
          const bool first = column < args.out_w;
          const bool second = Traits::kNarrow ? first && 2 * chunk + 1 < args.out_h : column + 8 < args.out_w;
          const auto pair = [](unsigned word) { return low_to_float<T>(word) + high_to_float<T>(word); };
          if (first) bias[s] += pair(words[0]) + pair(words[1]);
          if (second) bias[s] += pair(words[2]) + pair(words[3]);
        }
      }
      if (!one_stage) __syncthreads();
    }
    if (round == Traits::kMaxRounds - 1) let_second_pass_begin();

    if constexpr (Traits::kOverlays) {
      __syncthreads();
      diagonals.clear();
    }
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) bias[s] += __shfl_xor_sync(~0u, bias[s], offset);
      if (lane == 0 && item(s) < items) item_bias[item(s)] = bias[s];

      float parts[kRows][kParts];
      sums[s].fold(parts, args.w, args.out_w);
      constexpr int kAtOnce = Traits::kNarrow ? 2 : 1, kPeriod = Traits::kNarrow ? 16 : 32;  // lanes of a row
      constexpr int kSteps = divide_up(kRows, kAtOnce), kFirstSteps = divide_up(kSteps, kImageWarps);
      const auto is_mine = [&](int step) { return kImageWarps == 1 || image_warp(s) == step / kFirstSteps; };
      if constexpr (kImageWarps > 1) {
        // Two warps have a segment's sums: each gives half of the rows away.
        float* const exchange = reinterpret_cast<float*>(shared_memory) +
                                (channel(s) * Traits::kCuts + segment(s)) * kRows * kParts * 32 + lane;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kRows * kParts; ++k)
          if (!is_idle(s) && !is_mine(k / kParts / kAtOnce)) exchange[k * 32] = parts[k / kParts][k % kParts];
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kRows * kParts; ++k)
          if (!is_idle(s) && is_mine(k / kParts / kAtOnce)) parts[k / kParts][k % kParts] += exchange[k * 32];
      }
      if (is_idle(s)) continue;
      const int first_row = segment(s) * kRows + lane / kPeriod, j = lane % kPeriod - Traits::kColumns + args.padding_w;
      const int rows = min(live_rows, (segment(s) + 1) * kRows) - first_row;
      int stored_rows[Traits::kTiles];
#pragma unroll
      for (int q = 0; q < Traits::kTiles; ++q) {
        const bool exists = q > 0 || lane % kPeriod > 0;  // the first lane's diagonal is beyond the image
        stored_rows[q] = exists && static_cast<unsigned>(j + 32 * q) < static_cast<unsigned>(args.kernel_w) ? rows : 0;
      }
      const int64_t first = weight_idx(channel(s), (first_row + first_difference + args.padding_h) * args.kernel_w + j);
      const auto store_rows = [&](auto* out) {
        for_each_index<kSteps>([&](auto step) {
          constexpr int kRow = step * kAtOnce;
          if (is_mine(step)) {
            float values[Traits::kTiles];
            diagonals.template sum<step, min_int(kAtOnce, kRows - kRow)>(values, parts + kRow);
#pragma unroll
            for (int q = 0; q < Traits::kTiles; ++q)
              if (kRow < stored_rows[q]) out[32 * q] = from_float<std::remove_reference_t<decltype(*out)>>(values[q]);
          }
          out += kAtOnce * args.kernel_w;
        });
      };
      if (args.grad_weight == nullptr)
        store_rows(args.partial + blockIdx.y * args.out_c * taps + first);
      else if (args.float_weight)
        store_rows(static_cast<float*>(args.grad_weight) + first);
      else
        store_rows(static_cast<T*>(args.grad_weight) + first);
      __syncwarp();
    }
    if constexpr (Traits::kOverlays && Traits::kMaxRounds > 1) __syncthreads();
  }

  if (!has_bias) return;
  __syncthreads();
  if (threadIdx.x < static_cast<unsigned>(channels)) {
    float bias = 0.f;
    for (int item = threadIdx.x; item < items; item += block_channels) bias += item_bias[item];
    store_grad_bias<T>(args, blockIdx.y, first_channel + threadIdx.x, bias);
  }
}

template <class Traits>
int launch_images_grad_weight(const GradWeightArgs& args, int, cudaStream_t stream) {
  const auto kernel = images_grad_weight_kernel<Traits>;
  ImagesTiling tiling{Traits::kChannels,
                      static_cast<int>(divide_up<int64_t>(args.n, Traits::kStageImages)),
                      0,
                      0,
                      0,
                      0,
                      {images_tensor<Traits>(args.input, args.out_c, Traits::kChannels, args.h, args.w),
                       images_tensor<Traits>(args.grad_output, args.out_c, Traits::kChannels, args.out_h, args.out_w)}};
  tiling.split_stages = divide_up(tiling.stages, args.splits);
  // Eight more elements: of 8 columns, the second row of an odd last pair is read.
  const auto elements = [&](int channels) {
    return channels * Traits::kStageImages * (tiling.tensors[0].pitch + tiling.tensors[1].pitch) + 8;
  };
  const auto bytes = [&](int channels, int buffers) {
    return max_int(buffers * elements(channels) * static_cast<int>(sizeof(typename Traits::T)),
                   Traits::late_bytes(channels)) +
           Traits::kOwnBytes;
  };
  const DeviceLimits& limits = device_limits();
  if constexpr (Traits::kChannelsLast) {
    while (tiling.channels > 1 && bytes(tiling.channels, 1) > limits.shared_bytes_block) tiling.channels /= 2;
    tiling.tensors[0] = images_tensor<Traits>(args.input, args.out_c, tiling.channels, args.h, args.w);
    tiling.tensors[1] = images_tensor<Traits>(args.grad_output, args.out_c, tiling.channels, args.out_h, args.out_w);
  }
  constexpr int kOverlapping = min_int(3, Traits::kBlocks);  // blocks of a multiprocessor
  const bool twice = !Traits::kChannelsLast && tiling.split_stages > 1 &&
                     bytes(tiling.channels, 2) <= limits.shared_bytes_for(kOverlapping);
  tiling.buffers = twice ? 2 : 1;
  const int all = bytes(tiling.channels, tiling.buffers);
  tiling.planes_bytes = all - Traits::kOwnBytes;
  tiling.buffer_elements = elements(tiling.channels);
  if (const int error = allow_shared_bytes(kernel, all)) return error;
  const auto blocks = static_cast<unsigned>(divide_up<int64_t>(args.out_c, tiling.channels));
  kernel<<<dim3(blocks, args.splits), Traits::kThreads, all, stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
