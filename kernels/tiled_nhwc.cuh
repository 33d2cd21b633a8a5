// Tiled depthwise convolution, channels_last: forward, and grad of input at stride 1 (filter flipped).
//
// Serves  any compile-time kernel, stride and dilation, any padding; fp32, fp16, bf16; channels a multiple of 16 bytes.
// Owns    a block computes a rectangle of pixels of kLanes * kVector channels, of one image or of several small ones;
//         each thread kColumns x kRows neighbouring pixels of kVector channels in fp32 registers.
// Memory  input rectangle and halo in shared memory, copied asynchronously with zeros for the padding; the filters
//         beside it as fp32, [lane][tap][channel of a lane], an odd number of 16-byte vectors a lane: those that lanes
//         read at once, and those of neighbouring taps that threads write at once, lie in different banks. can_serve.h
//         keeps the sum below the architecture's limit.
// Chosen  select.h.
#pragma once

#include "async_copy.cuh"
#include "direct.cuh"

namespace depthwise {

constexpr int kTiledNhwcThreads = 256;  // a block, at most

// How the pixels of a launch are cut. Threads of a block: x along channels, y over images x tiles_h x tiles_w.
struct NhwcTiling {
  int tiles_w, tiles_h, images;      // thread tiles of a block
  int blocks_w, blocks_h, blocks_c;  // blocks of an image
  int in_rows, in_columns;           // input rectangle of a block
};

template <class T, int kLanes, int kVector>
struct NhwcShared {
  static constexpr int kChannels = kLanes * kVector;
  static constexpr int kCopies = kChannels * sizeof(T) / 16;  // 16-byte copies a pixel
  static_assert(kChannels * sizeof(T) % 16 == 0);
  // Pixels are padded by 16 bytes where two tiles of a warp would otherwise read the same banks.
  static constexpr int kPixel = kChannels + (kLanes < 16 ? 16 / static_cast<int>(sizeof(T)) : 0);
};

template <class Traits, int kLanes, int kColumns, int kRows, int kVector>
__global__ void __launch_bounds__(kTiledNhwcThreads, 2)
    tiled_nhwc_kernel(const DirectArgs args, const NhwcTiling tiling) {
  using T = typename Traits::T;
  using Pixel = Vector<T, kVector>;
  using Shared = NhwcShared<T, kLanes, kVector>;
  constexpr int kKernelW = Traits::kKernelW;
  constexpr int kTaps = Traits::kKernelH * kKernelW;
  constexpr int kWindow = window_size(kColumns, Traits::kStrideW, kKernelW, Traits::kDilationW);
  constexpr uint64_t kUsedColumns = window_mask(kColumns, Traits::kStrideW, kKernelW, Traits::kDilationW);
  constexpr int kLastTap = (Traits::kKernelH - 1) * Traits::kDilationH;
  constexpr int kRowsIn = window_size(kRows, Traits::kStrideH, Traits::kKernelH, Traits::kDilationH);
  constexpr uint64_t kUsedRows = window_mask(kRows, Traits::kStrideH, Traits::kKernelH, Traits::kDilationH);
  constexpr bool kRegisterWeights = kTaps <= 9;
  constexpr int kLaneTaps = tiled_nhwc_lane_taps(kTaps);

  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* shared_weight = reinterpret_cast<float*>(shared_memory);
  T* shared_input = reinterpret_cast<T*>(shared_weight + kLaneTaps * Shared::kChannels);

  // Channels vary fastest over the grid: blocks that share pixels' cache lines run together.
  const int first_channel = blockIdx.x % tiling.blocks_c * Shared::kChannels;
  unsigned block = blockIdx.x / tiling.blocks_c;
  const int block_w = block % tiling.blocks_w;
  block /= tiling.blocks_w;
  const int block_h = block % tiling.blocks_h;
  const int first_image = block / tiling.blocks_h * tiling.images;
  const int first_column = block_w * tiling.tiles_w * kColumns;
  const int first_row = block_h * tiling.tiles_h * kRows;

  // Load the input rectangle: a warp a row.
  const int pixel = args.out_c;  // elements from one pixel to the next in memory
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  const int num_threads = blockDim.y * kLanes;
  const int num_warps = (num_threads + 31) / 32;
  const int in_first_row = first_row * Traits::kStrideH - args.padding_h;
  const int in_first_column = first_column * Traits::kStrideW - args.padding_w;
  for (int r = thread / 32; r < tiling.images * tiling.in_rows; r += num_warps) {
    const int image = tiling.images == 1 ? first_image : first_image + r / tiling.in_rows;
    const int in_row = in_first_row + (tiling.images == 1 ? r : r % tiling.in_rows);
    const bool row_in_bounds = image < args.n && static_cast<unsigned>(in_row) < static_cast<unsigned>(args.h);
    const T* row = static_cast<const T*>(args.input) +
                   ((static_cast<int64_t>(image) * args.h + in_row) * args.w + in_first_column) * pixel + first_channel;
    T* shared_row = shared_input + r * tiling.in_columns * Shared::kPixel;
    const int lanes = min(32, num_threads - thread / 32 * 32);  // the last warp may be a part of one
    for (int k = thread % 32; k < tiling.in_columns * Shared::kCopies; k += lanes) {
      const int column = k / Shared::kCopies;
      const int channel = k % Shared::kCopies * (16 / static_cast<int>(sizeof(T)));
      const bool in_bounds = row_in_bounds && first_channel + channel < args.out_c &&
                             static_cast<unsigned>(in_first_column + column) < static_cast<unsigned>(args.w);
      copy_async<16>(
          shared_row + column * Shared::kPixel + channel,
          in_bounds ? row + static_cast<int64_t>(column) * pixel + channel : static_cast<const T*>(args.input),
          in_bounds ? 16 : 0);
    }
  }
  commit_copies();

  // Load the filters, [channel][tap] in memory: kVector channels of a tap a thread.
  const auto* const filters = filters_of<Traits>(args, first_channel, kTaps);
  const int num_lanes = min(kLanes, (static_cast<int>(args.out_c) - first_channel) / kVector);
  for (int k = thread; k < num_lanes * kTaps; k += num_threads) {
    const int lane = k / kTaps, tap = k % kTaps;
    Vector<float, kVector> weights;
#pragma unroll
    for (int e = 0; e < kVector; ++e) weights.value[e] = load_for_sums<T>(filters + (lane * kVector + e) * kTaps + tap);
    const int place = lane * kLaneTaps + (args.flip ? kTaps - 1 - tap : tap);
    reinterpret_cast<Vector<float, kVector>*>(shared_weight)[place] = weights;
  }
  wait_for_copies<0>();
  __syncthreads();

  // Compute.
  const int channel = first_channel + threadIdx.x * kVector;
  const int tile_w = threadIdx.y % tiling.tiles_w;
  const int tile_h = threadIdx.y / tiling.tiles_w % tiling.tiles_h;
  const int tile_image = threadIdx.y / tiling.tiles_w / tiling.tiles_h;
  const int column = first_column + tile_w * kColumns;
  const int row = first_row + tile_h * kRows;
  const int image = first_image + tile_image;
  if (channel >= args.out_c || image >= args.n || column >= args.out_w || row >= args.out_h) return;

  const auto* lane_weight = reinterpret_cast<const Vector<float, kVector>*>(shared_weight) + threadIdx.x * kLaneTaps;
  float weight[kRegisterWeights ? kTaps : 1][kVector];
  if constexpr (kRegisterWeights) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
      for (int e = 0; e < kVector; ++e) weight[tap][e] = lane_weight[tap].value[e];
  }

  const Pixel bias = load_biases<Traits, kVector>(args, channel);
  float sum[kRows][kColumns][kVector];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
#pragma unroll
    for (int q = 0; q < kColumns; ++q)
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[o][q][e] = to_float(bias.value[e]);

  const T* corner = shared_input +
                    ((tile_image * tiling.in_rows + tile_h * kRows * Traits::kStrideH) * tiling.in_columns +
                     tile_w * kColumns * Traits::kStrideW) *
                        Shared::kPixel +
                    threadIdx.x * kVector;
#pragma unroll
  for (int r = 0; r < kRowsIn; ++r) {
    if (!(kUsedRows >> r & 1)) continue;
    float window[kWindow][kVector];
#pragma unroll
    for (int k = 0; k < kWindow; ++k) {
      if (!(kUsedColumns >> k & 1)) continue;
      const Pixel in = *reinterpret_cast<const Pixel*>(corner + (r * tiling.in_columns + k) * Shared::kPixel);
#pragma unroll
      for (int e = 0; e < kVector; ++e) window[k][e] = to_float(in.value[e]);
    }
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
      const int tap_h = r - o * Traits::kStrideH;
      if (tap_h < 0 || tap_h % Traits::kDilationH != 0 || tap_h > kLastTap) continue;
#pragma unroll
      for (int j = 0; j < kKernelW; ++j) {
        const int tap = tap_h / Traits::kDilationH * kKernelW + j;
        Vector<float, kVector> w;
        if constexpr (kRegisterWeights) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) w.value[e] = weight[tap][e];
        } else {
          w = lane_weight[tap];
        }
#pragma unroll
        for (int q = 0; q < kColumns; ++q)
#pragma unroll
          for (int e = 0; e < kVector; ++e)
            sum[o][q][e] = fmaf(window[q * Traits::kStrideW + j * Traits::kDilationW][e], w.value[e], sum[o][q][e]);
      }
    }
  }

  T* out = static_cast<T*>(args.out) +
           ((static_cast<int64_t>(image) * args.out_h + row) * args.out_w + column) * pixel + channel;
#pragma unroll
  for (int o = 0; o < kRows; ++o)
#pragma unroll
    for (int q = 0; q < kColumns; ++q)
      if (row + o < args.out_h && column + q < args.out_w)
        store_streaming<kVector>(out + (static_cast<int64_t>(o) * args.out_w + q) * pixel, sum[o][q]);
}

// Chooses the rectangle: least copied and computed pixels over the whole image, in blocks of about 128 threads where
// that costs no more than a tenth (16x64x512x512, 3x3, fp16, H100: 4x2 tiles 0.377 ms, 8x2 tiles 0.388 ms).
template <class Traits, int kLanes, int kColumns, int kRows>
NhwcTiling choose_nhwc_tiling(const DirectArgs& args, int channels, int pixel_bytes, int shared_limit) {
  const int all_w = divide_up(args.out_w, kColumns), all_h = divide_up(args.out_h, kRows);
  const int max_tiles = kTiledNhwcThreads / kLanes;
  NhwcTiling best{};
  double least = 0;
  for (int w = 1; w <= min_int(all_w, max_tiles); ++w) {
    for (int h = 1; h <= min_int(all_h, max_tiles / w); ++h) {
      NhwcTiling tiling{w, h, 1, divide_up(all_w, w), divide_up(all_h, h), 0, 0, 0};
      tiling.in_rows = (h * kRows - 1) * Traits::kStrideH + (Traits::kKernelH - 1) * Traits::kDilationH + 1;
      tiling.in_columns = (w * kColumns - 1) * Traits::kStrideW + (Traits::kKernelW - 1) * Traits::kDilationW + 1;
      const int in_pixels = tiling.in_rows * tiling.in_columns;
      if (tiling.blocks_w * tiling.blocks_h == 1)  // a small image: several in a block
        tiling.images = max_int(1, min_int(128 / (kLanes * w * h), min_int(shared_limit / 2 / (in_pixels * pixel_bytes),
                                                                           static_cast<int>(args.n))));
      if (tiling.images * in_pixels * pixel_bytes > shared_limit) continue;
      const int threads = kLanes * w * h * tiling.images;
      const double cost = (in_pixels + 0.5 * w * h * kColumns * kRows) * tiling.blocks_w * tiling.blocks_h *
                          (threads > 128  ? 1.1
                           : threads < 64 ? 1.2
                                          : 1.0);
      if (least == 0 || cost < least) least = cost, best = tiling;
    }
  }
  best.blocks_c = divide_up(static_cast<int>(args.out_c), channels);
  return best;
}

template <class Traits, int kLanes, int kColumns, int kRows, int kVector>
int launch_tiled_nhwc(const DirectArgs& args, cudaStream_t stream) {
  using T = typename Traits::T;
  using Shared = NhwcShared<T, kLanes, kVector>;
  constexpr int kWeightBytes =
      tiled_nhwc_lane_taps(Traits::kKernelH * Traits::kKernelW) * Shared::kChannels * sizeof(float);
  constexpr int kPixelBytes = Shared::kPixel * sizeof(T);
  const int shared_limit = device_limits().shared_bytes_for(2);
  const auto kernel = tiled_nhwc_kernel<Traits, kLanes, kColumns, kRows, kVector>;
  const NhwcTiling tiling = choose_nhwc_tiling<Traits, kLanes, kColumns, kRows>(args, Shared::kChannels, kPixelBytes,
                                                                                shared_limit - kWeightBytes);
  if (tiling.tiles_w == 0) return cudaErrorInvalidConfiguration;
  const int shared_bytes = kWeightBytes + tiling.images * tiling.in_rows * tiling.in_columns * kPixelBytes;
  if (const int error = allow_shared_bytes(kernel, shared_bytes)) return error;
  const int64_t blocks =
      divide_up<int64_t>(args.n, tiling.images) * tiling.blocks_w * tiling.blocks_h * tiling.blocks_c;
  const dim3 threads(kLanes, tiling.tiles_w * tiling.tiles_h * tiling.images);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args, tiling);
  return cudaGetLastError();
}

// The tiles of variants.h's table, in its order.
template <class Traits>
int launch_tiled_nhwc(const DirectArgs& args, int tile, cudaStream_t stream) {
  constexpr int kRows = Traits::kKernelH * Traits::kKernelW <= 9 && Traits::kStrideH == 1 ? 4 : 2;
  switch (tile) {
    case 0: return launch_tiled_nhwc<Traits, 12, 4, kRows, 4>(args, stream);
    case 1: return launch_tiled_nhwc<Traits, 16, 4, kRows, 4>(args, stream);
    case 2: return launch_tiled_nhwc<Traits, 8, 4, kRows, 4>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace depthwise
