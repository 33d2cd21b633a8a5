// Streaming grad of weight and bias, channels_last.
//
// Serves  kernels whose sums fit registers (up to 49 taps), strides 1 and 2, any padding; fp32, fp16, bf16; channels a
//         multiple of 16 bytes.
// Owns    a block: kChannels channels and a share of the items (an item: some images, a strip of rows and a tile of
//         columns of grad_output; neighbouring items at the same time as its neighbours, so that L2 still holds the
//         columns that both read: 3x7, 32x128x128x256, fp16, H100: 0.53 GB from DRAM, one after the other 0.57). A
//         thread: all taps of kVector channels in fp32 registers, of four columns of one image of every item, which it
//         walks down: a step reads the next row of grad_output and the rows of input that are complete with it; the
//         kDepth rows of grad_output met last are kept in registers.
// Memory  a ring of stages in shared memory, filled asynchronously: what a step waits for was asked for a stage or more
//         ago, whatever else is under way. (Loads into registers share few scoreboards, and to wait for one of them is to
//         wait for the last.) Each stage is kStageSteps rows of grad_output and their rows of input, with zeros for the
//         padding and for rows beyond the strip, which leave no row of grad_output in registers at the end of an item.
// Reduces the block's threads in order through shared memory, then the splits in order (grad_weight.cu). No atomics.
// Zeros   times infinity would poison a sum: a block whose sums are not all finite takes them again, pair by pair.
// Chosen  select.h.
#pragma once

#include "cache_policy.cuh"
#include "grad_weight_march.cuh"

namespace depthwise {

template <class T_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_,
          int kChannels_>
struct GradWeightStreamTraits : NhwcTraits<T_, kKernelH_, kKernelW_, kStrideH_, kStrideW_, kDilationH_, kDilationW_> {
  static_assert(kDilationH_ == 1 && kDilationW_ == 1);
  using Shape = GradWeightStreamShape;
  static constexpr Shape kShape = grad_weight_stream_shape(kKernelH_, kKernelW_, kStrideH_, kStrideW_);
  static constexpr int kTaps = kKernelH_ * kKernelW_, kColumns = kGradWeightStreamColumns, kChannels = kChannels_;
  static constexpr int kVector = kShape.vector, kLanes = kChannels / kVector;
  static constexpr int kDepth = kShape.depth;                 // rows of grad_output that a row of input meets
  static constexpr int kStageSteps = kShape.stage_steps;      // a multiple of them
  static constexpr int kStageRows = kStageSteps * kStrideH_;  // of input
  static constexpr int kWindow = kShape.window;
  static constexpr uint64_t kUsed = window_mask(kColumns, kStrideW_, kKernelW_, 1);
  static constexpr int kCopies = kChannels * static_cast<int>(sizeof(T_)) / 16;  // of 16 bytes a pixel
  static_assert(kChannels * sizeof(T_) % 16 == 0 && kStageSteps % kDepth == 0);
  // Whether a row's four terms are added up before they join a tap's sum: equal ones would round the same way every time.
  // 16-bit results hide it.
  static constexpr bool kSumsRows = sizeof(T_) == 4;
  static constexpr int kBatch = max_int(1, 16 / kVector);  // taps that are reduced together
};

// Pixels of a stage's rows, and elements of a stage.
template <class Traits>
struct GradWeightStreamStage {
  int input_row, grad_row, input, all;

  __host__ __device__ explicit GradWeightStreamStage(const GradWeightStreamTiling& tiling)
      : input_row(tiling.images * tiling.in_columns * Traits::kChannels),
        grad_row(tiling.images * tiling.tiles_w * Traits::kColumns * Traits::kChannels),
        input(Traits::kStageRows * input_row),
        all(input + Traits::kStageSteps * grad_row) {}
};

struct GradWeightStreamItem {
  int first_image, first_row, end_row, first_column;
};

__device__ __forceinline__ GradWeightStreamItem stream_item_at(const GradWeightArgs& args,
                                                               const GradWeightStreamTiling& tiling, int index) {
  GradWeightStreamItem item;
  item.first_column = index % tiling.blocks_w * tiling.tiles_w * kGradWeightStreamColumns;
  index /= tiling.blocks_w;
  item.first_row = index % tiling.strips * args.rows;
  item.end_row = min(item.first_row + args.rows, args.out_h);
  item.first_image = index / tiling.strips * tiling.images;
  return item;
}

// A row of neighbouring pixels from `column` on, of a row of `end_column` in memory, by a warp: zeros where the row does
// not `exist` and outside it. `row` points to column 0; a lane copies the same 16 bytes of channels of every kPixels-th
// pixel.
template <class Traits, class T>
__device__ __forceinline__ void copy_pixels(T* shared, const T* row, int pixel, int columns, int column, int end_column,
                                            int channels, bool exists, CachePolicy policy) {
  constexpr int kPixels = 32 / Traits::kCopies;
  const int lane = threadIdx.x % 32, channel = lane % Traits::kCopies * (16 / static_cast<int>(sizeof(T)));
  const int first = lane / Traits::kCopies;
  if (first >= kPixels) return;
  const unsigned end = exists && channel < channels ? end_column : 0;
  const T* source = row + static_cast<int64_t>(column + first) * pixel + channel;
  shared += first * Traits::kChannels + channel;
#pragma unroll 2
  for (int k = first; k < columns; k += kPixels) {
    policy.copy_async<16>(shared, source, static_cast<unsigned>(column + k) < end);
    source += kPixels * pixel;
    shared += kPixels * Traits::kChannels;
  }
}

template <class Traits>
__global__ void __launch_bounds__(kGradWeightStreamThreads, 2)
    grad_weight_stream_nhwc_kernel(const GradWeightArgs args, const GradWeightStreamTiling tiling,
                                   const int ring_depth) {
  using T = typename Traits::T;
  constexpr int kTaps = Traits::kTaps, kVector = Traits::kVector, kLanes = Traits::kLanes, kDepth = Traits::kDepth;
  constexpr int kChannels = Traits::kChannels, kColumns = Traits::kColumns, kWindow = Traits::kWindow;

  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const ring = reinterpret_cast<T*>(shared_memory);
  const GradWeightStreamStage<Traits> stage(tiling);
  const int out_c = static_cast<int>(args.out_c), first_channel = blockIdx.x * kChannels;
  // A thread's lane along channels and its tile; the last warp may have threads that only copy, as if of tile 0.
  const int thread = threadIdx.x, num_threads = blockDim.x, tiles = tiling.images * tiling.tiles_w;
  const int lane = thread % kLanes, tile = thread < tiles * kLanes ? thread / kLanes : 0;
  const int begin = blockIdx.y, splits = args.splits;  // items begin, begin + splits, ...
  const int item_stages = divide_up(args.rows + kDepth - 1, Traits::kStageSteps);
  const int stages = divide_up(tiling.items - begin, splits) * item_stages;

  // Requests the next stage, item after item: a warp a row.
  const int64_t input_image = static_cast<int64_t>(args.h) * args.w * out_c;
  const int64_t grad_image = static_cast<int64_t>(args.out_h) * args.out_w * out_c;
  GradWeightStreamItem next_item{};
  int next_index = begin, next_step = 0, next_slot = 0;
  const CachePolicy policy(args);
  const auto request = [&](bool exists) {
    if (exists) {
      if (next_step == 0) {
        next_item = stream_item_at(args, tiling, next_index);
        next_index += splits;
      }
      const int first_row = next_item.first_row + next_step;
      // Rows below the window of the strip's last row would meet zeros alone.
      const int end_row =
          min(args.h, max(0, (next_item.end_row - 1) * Traits::kStrideH - args.padding_h + Traits::kKernelH));
      T* const target = ring + next_slot * stage.all;
      for (int k = threadIdx.x / 32; k < (Traits::kStageRows + Traits::kStageSteps) * tiling.images;
           k += blockDim.x / 32) {
        const int r = tiling.images == 1 ? k : k / tiling.images, image = next_item.first_image + k - r * tiling.images;
        const bool of_input = r < Traits::kStageRows;
        const int row =
            of_input ? first_row * Traits::kStrideH - args.padding_h + r : first_row + r - Traits::kStageRows;
        const int width = of_input ? args.w : args.out_w;
        const T* const plane = of_input ? static_cast<const T*>(args.input) + image * input_image
                                        : static_cast<const T*>(args.grad_output) + image * grad_image;
        const int grad_columns = tiling.tiles_w * kColumns;
        copy_pixels<Traits>(
            of_input ? target + k * tiling.in_columns * kChannels
                     : target + stage.input + (k - Traits::kStageRows * tiling.images) * grad_columns * kChannels,
            plane + static_cast<int64_t>(row) * width * out_c + first_channel, out_c,
            of_input ? tiling.in_columns : grad_columns,
            of_input ? next_item.first_column * Traits::kStrideW - args.padding_w : next_item.first_column, width,
            out_c - first_channel,
            image < args.n &&
                static_cast<unsigned>(row) < static_cast<unsigned>(of_input ? end_row : next_item.end_row),
            policy);
      }
      next_step += Traits::kStageSteps;
      if (next_step == item_stages * Traits::kStageSteps) next_step = 0;
      next_slot = next_slot + 1 == ring_depth ? 0 : next_slot + 1;
    }
    commit_copies();
  };
  for (int k = 0; k < ring_depth - 1; ++k) request(k < stages);

  const int image = tile / tiling.tiles_w, tile_column = (tile - image * tiling.tiles_w) * kColumns;
  const T* const input_corner =
      ring + (image * tiling.in_columns + tile_column * Traits::kStrideW) * kChannels + lane * kVector;
  const T* const grad_corner = ring + stage.input + tile * kColumns * kChannels + lane * kVector;
  const bool wants_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;
  float sum[kTaps][kVector] = {}, bias[kVector] = {};
  float grad[kDepth][kColumns][kVector] = {};
  int slot = 0;
  for (int k = 0; k < stages; ++k) {
    wait_for_stage(ring_depth - 1);
    __syncthreads();  // and every thread is done with the stage that the next request overwrites
    request(k + ring_depth - 1 < stages);
    const T* const input_stage = input_corner + slot * stage.all;
    const T* const grad_stage = grad_corner + slot * stage.all;
    slot = slot + 1 == ring_depth ? 0 : slot + 1;
    float bias_part[kVector] = {};
#pragma unroll
    for (int step = 0; step < Traits::kStageSteps; ++step) {
      float (&row)[kColumns][kVector] = grad[step % kDepth];
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const auto pixel =
            *reinterpret_cast<const Vector<T, kVector>*>(grad_stage + step * stage.grad_row + v * kChannels);
#pragma unroll
        for (int e = 0; e < kVector; ++e) row[v][e] = to_float(pixel.value[e]);
      }
      if (wants_bias) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) bias_part[e] += (row[0][e] + row[1][e]) + (row[2][e] + row[3][e]);
      }
#pragma unroll
      for (int r = 0; r < Traits::kStrideH; ++r) {
        float window[kWindow][kVector];
#pragma unroll
        for (int w = 0; w < kWindow; ++w) {
          if (!(Traits::kUsed >> w & 1)) continue;
          const auto pixel = *reinterpret_cast<const Vector<T, kVector>*>(
              input_stage + (step * Traits::kStrideH + r) * stage.input_row + w * kChannels);
#pragma unroll
          for (int e = 0; e < kVector; ++e) window[w][e] = to_float(pixel.value[e]);
        }
#pragma unroll
        for (int i = r; i < Traits::kKernelH; i += Traits::kStrideH) {
          const float (&met)[kColumns][kVector] = grad[(step - i / Traits::kStrideH + kDepth) % kDepth];
#pragma unroll
          for (int j = 0; j < Traits::kKernelW; ++j)
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              float& tap = sum[i * Traits::kKernelW + j][e];
              float terms = Traits::kSumsRows ? 0.f : tap;
#pragma unroll
              for (int v = 0; v < kColumns; ++v) terms = fmaf(met[v][e], window[v * Traits::kStrideW + j][e], terms);
              tap = Traits::kSumsRows ? tap + terms : terms;
            }
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) bias[e] += bias_part[e];
  }

  let_second_pass_begin();

  // Adds what the block's threads left in `slots` slots of shared memory for their channels, and stores it.
  float* const shared = reinterpret_cast<float*>(shared_memory);
  const auto store_slots = [&](int first_tap, int slots) {
    bool finite = true;
    __syncthreads();
    for (int k = thread; k < slots * kVector * kLanes; k += num_threads) {
      const int of_lane = k % kLanes, of = k / kLanes;
      const int channel = first_channel + of_lane * kVector + of % kVector;
      if (channel >= out_c) continue;
      const float* const first = shared + of * num_threads + of_lane;
      float total = first[0];
      for (int of_tile = 1; of_tile < tiles; ++of_tile) total += first[of_tile * kLanes];
      store_sum<Traits>(args, blockIdx.y, channel, first_tap + of / kVector, total);
      finite = finite && isfinite(total);
    }
    return __syncthreads_and(finite) != 0;
  };
  __syncthreads();
  bool finite = true;
#pragma unroll
  for (int first_tap = 0; first_tap <= kTaps; first_tap += Traits::kBatch) {
#pragma unroll
    for (int k = 0; k < Traits::kBatch; ++k)
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (first_tap + k <= kTaps)
          shared[(k * kVector + e) * num_threads + thread] =
              first_tap + k < kTaps ? sum[min_int(first_tap + k, kTaps - 1)][e] : bias[e];
    finite = store_slots(first_tap, min_int(Traits::kBatch, kTaps + 1 - first_tap)) && finite;
  }
  if (finite) return;

  for (int tap = 0; tap < kTaps; ++tap) {
    for (int e = 0; e < kVector; ++e) {
      const int channel = first_channel + lane * kVector + e;
      float total = 0;
      for (int index = begin; index < tiling.items && channel < out_c; index += splits) {
        const GradWeightStreamItem item = stream_item_at(args, tiling, index);
        if (item.first_image + image >= args.n) continue;
        const Piece piece{item.first_image + image, 0, item.first_row, item.end_row, item.first_column + tile_column};
        total += sum_of_pairs<Traits>(args, piece, tap,
                                      static_cast<const T*>(args.grad_output) + piece.image * grad_image + channel,
                                      static_cast<const T*>(args.input) + piece.image * input_image + channel, out_c);
      }
      shared[e * num_threads + thread] = total;
    }
    store_slots(tap, 1);
  }
}

template <class Traits>
int launch_grad_weight_stream_nhwc(const GradWeightArgs& args, int, cudaStream_t stream) {
  using T = typename Traits::T;
  const GradWeightStreamTiling tiling = grad_weight_stream_tiling(Traits::kShape, Traits::kChannels, sizeof(T), args.n,
                                                                  args.out_h, args.out_w, args.rows);
  const DeviceLimits& device = device_limits();
  const dim3 grid(divide_up(static_cast<int>(args.out_c), Traits::kChannels), args.splits);
  const int threads = divide_up(Traits::kLanes * tiling.images * tiling.tiles_w, 32) * 32;
  // As many stages as leave room for the other blocks of a multiprocessor.
  const int blocks = max_int(1, min_int(2 * kGradWeightStreamThreads / threads,
                                        divide_up(static_cast<int>(grid.x * grid.y), device.multiprocessors)));
  const int room = min_int(device.shared_bytes_block, device.shared_bytes / blocks - (1 << 10));
  const int ring_depth = max_int(2, min_int(4, room / tiling.stage_bytes));
  const int bytes = max_int(ring_depth * tiling.stage_bytes, Traits::kBatch * Traits::kVector * threads * 4);
  const auto kernel = grad_weight_stream_nhwc_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  kernel<<<grid, threads, bytes, stream>>>(args, tiling, ring_depth);
  return cudaGetLastError();
}

}  // namespace depthwise
