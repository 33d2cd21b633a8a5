// Streaming grad of weight and bias, channels_last.
//
// Serves  kernels whose sums fit registers (up to 49 taps), strides 1 and 2, any padding; fp32, fp16, bf16; aligned
//         tensors, channels a multiple of 16 bytes, multiplier 1.
// Owns    a block: kChannels channels and a share of the items (an item: some images, a strip of rows and a tile of
//         columns of grad_output; neighbouring items at the same time as its neighbours, so that L2 still holds the
//         columns that both read: 3x7, 32x128x128x256, fp16, H100: 0.53 GB from DRAM, one after the other 0.57). A
//         thread: all taps of kVector channels in fp32 registers, of four columns of one image of every item, which it
//         walks down: a step reads the next row of grad_output and the rows of input that are complete with it; the
//         kDepth rows of grad_output met last are kept in registers.
// Memory  a ring of stages in shared memory, filled asynchronously: what a step waits for was asked for a stage or more
//         ago, whatever else is under way. (Loads into registers share few scoreboards, and to wait for one of them is to
//         wait for the last.) Each stage is kStageSteps rows of grad_output and their rows of input, with zeros for the
//         padding and for rows beyond the strip, which leave no row of grad_output in registers at the end of an item. Of
//         few steps, a stage is twice as many where that leaves two of them room.
// Reduces the block's threads in order through shared memory, then the splits in order (grad_weight.cu). No atomics.
// Zeros   times infinity would poison a sum: a block whose sums are not all finite takes them again, pair by pair.
// Chosen  select_grad_weight.h.
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
  static constexpr bool kIsDouble = false, kMayDouble = sizeof(T_) == 2 && kTaps * kVector <= 42 && kStageRows <= 3;
  static constexpr bool kIsLarge = false, kMayBeLarge = kMayDouble && kVector <= 2;
  static constexpr bool kKeepsPointers = sizeof(T_) == 2;
  static constexpr int kWindow = kShape.window;
  static constexpr uint64_t kUsed = window_mask(kColumns, kStrideW_, kKernelW_, 1);
  static constexpr int kCopies = kChannels * static_cast<int>(sizeof(T_)) / 16;  // of 16 bytes a pixel
  static_assert(kChannels * sizeof(T_) % 16 == 0 && kStageSteps % kDepth == 0);
  // What a thread copies of every row, one of kTilePixels pixels a tile at a time; and columns of input that remain.
  static constexpr int kTilePixels = min_int(kLanes / kCopies, kColumns);
  static_assert(kLanes % kCopies == 0 && kColumns % kTilePixels == 0);
  static constexpr int kGradCopies = kColumns / kTilePixels, kInputCopies = kGradCopies * kStrideW_;
  static constexpr int kHalo = kWindow - kColumns * kStrideW_;
  // Whether a row's four terms are added up before they join a tap's sum: equal ones would round the same way every time.
  // 16-bit results hide it.
  static constexpr bool kSumsRows = sizeof(T_) == 4;
  static constexpr int kBatch = max_int(1, 16 / kVector);  // taps that are reduced together
  // Whether what meets no row of grad_output is left out of an item's first and last stage: where a row's arithmetic is worth
  // a branch (of 14 rows, 5x5 takes 20 steps otherwise), and registers suffice, which 7x7's do not.
  static constexpr bool kLeavesOut = sizeof(T_) == 4 && kKernelH_ == 5 && kKernelW_ == 5 && kVector == 1;
};

// Stages of twice as many steps: half the barriers, and what begins a stage. The second half of an item's last one may be
// empty.
template <class Traits>
struct DoubleStages : Traits {
  static constexpr int kStageSteps = 2 * Traits::kStageSteps, kStageRows = 2 * Traits::kStageRows;
  static constexpr bool kIsDouble = true;
};

// Double stages of large tensors: their copies have no policy to choose, but bring the L2 cache the part of a pixel that
// another block reads at that time. An item's first and last stage, which leave out the rows of grad_output that do not
// exist, are apart, so that those between have no branches. That is three times the code, for which registers do not
// suffice where a thread has four channels. H100, fp16: 3x7, 32x128x128x256: 0.2045 ms, with other copies 0.2083, double
// stages with these copies 0.2084, with other copies 0.2096; not these copies for 3x3, 64x128x256x512: 1.604, others 1.502.
template <class Traits>
struct LargeStages : DoubleStages<Traits> {
  static constexpr bool kIsLarge = true;
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

constexpr int kNoColumn = -(1 << 30);  // nor one of those that follow

// A thread's share of kRows rows of pixels: kCount of every row, `step` apart. `column`: of the first; zeros stand for
// those outside [0, end_column) and for rows outside [0, end_row). Returns the source of the row that follows.
template <int kRows, int kCount, bool kIsLarge, class T>
__device__ __forceinline__ const T* copy_pixels(CachePolicy policy, T* shared, int shared_pitch, int shared_step,
                                                const T* source, int pitch, int source_step, int column, int step,
                                                int end_column, int row, int end_row) {
  const auto copy_rows = [&](auto copy) {
    const T* next = source;
#pragma unroll(kCount* kRows > 12 ? 1 : kCount)
    for (int k = 0; k < kCount; ++k) {
      const bool column_exists = static_cast<unsigned>(column + k * step) < static_cast<unsigned>(end_column);
      const T* from = source + k * source_step;
#pragma unroll(kCount* kRows > 16 ? 1 : kRows)
      for (int r = 0; r < kRows; ++r) {
        const bool exists = column_exists && static_cast<unsigned>(row + r) < static_cast<unsigned>(end_row);
        copy(r * shared_pitch + k * shared_step, from, exists);
        from += ptx::opaque(pitch);
      }
      if (k == 0) next = from;
    }
    return next;
  };
  if (!kIsLarge && policy.evicts_first)
    return copy_rows([&](int to, const T* from, bool exists) { policy.copy_async<16>(shared + to, from, exists); });
  const CopyTarget<T> target(shared);
  return copy_rows([&](int to, const T* from, bool exists) {
    if (kIsLarge)
      target.copy_async_of_256(to, from, exists);
    else
      target.template copy_async<16>(to, from, exists);
  });
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
  // A thread's lane along channels and its tile; the last warp may have threads to spare.
  const unsigned thread = ptx::thread_index();
  const int num_threads = blockDim.x, tiles = tiling.images * tiling.tiles_w;
  const bool has_tile = thread < static_cast<unsigned>(tiles * kLanes);
  const int lane = thread % kLanes, tile = has_tile ? thread / kLanes : 0;
  const int image = tile / tiling.tiles_w, image_tile = tile - image * tiling.tiles_w;
  const int begin = blockIdx.y, splits = args.splits;  // items begin, begin + splits, ...
  const int item_stages = divide_up(args.rows + kDepth - 1, Traits::kStageSteps);
  const int stages = divide_up(tiling.items - begin, splits) * item_stages;

  // Requests the next stage, item after item. Threads copy for their own image, the same 16 bytes of channels of every
  // copy_step-th pixel: all warps as much, as they wait for each other, and the first ones the kHalo columns of input that
  // remain. Columns that do not exist for a thread are negative.
  const int64_t input_image = static_cast<int64_t>(args.h) * args.w * out_c;
  const int64_t grad_image = static_cast<int64_t>(args.out_h) * args.out_w * out_c;
  const int copy_channel = lane % Traits::kCopies * (16 / static_cast<int>(sizeof(T)));
  const int copy_column = image_tile * Traits::kTilePixels + lane / Traits::kCopies;
  const int copy_step = tiling.tiles_w * Traits::kTilePixels;
  const int input_pitch = args.w * out_c, grad_pitch = args.out_w * out_c;
  T* const target = ring + (image * tiling.in_columns + copy_column) * kChannels + copy_channel;
  const int to_grad = stage.input - image * (tiling.in_columns - tiling.tiles_w * kColumns) * kChannels;
  const bool copies = has_tile && lane / Traits::kCopies < Traits::kTilePixels;
  GradWeightStreamItem next_item{};
  int next_index = begin, next_stage = 0, next_slot = 0;
  // What the thread copies first of the stage, and columns of that; of an item all along where registers hold it.
  const T *next_input = nullptr, *next_grad = nullptr;
  int end_input_row = 0, next_input_column = 0, next_grad_column = 0;
  const CachePolicy policy(args);
  const auto request = [&](bool exists) {
    if (exists && copies) {
      if (next_stage == 0) {
        next_item = stream_item_at(args, tiling, next_index);
        next_index += splits;
      }
      const int next_row = next_item.first_row + next_stage * Traits::kStageSteps;
      if (next_stage == 0 || !Traits::kKeepsPointers) {
        // Rows below the window of the strip's last row would meet zeros alone.
        end_input_row =
            max(0, min(args.h, (next_item.end_row - 1) * Traits::kStrideH - args.padding_h + Traits::kKernelH));
        next_input_column = next_item.first_column * Traits::kStrideW - args.padding_w + copy_column;
        next_grad_column = next_item.first_column + copy_column;
        const int64_t of_image = next_item.first_image + image;
        next_input = static_cast<const T*>(args.input) + of_image * input_image +
                     static_cast<int64_t>(next_row * Traits::kStrideH - args.padding_h) * input_pitch +
                     static_cast<int64_t>(next_input_column) * out_c + first_channel + copy_channel;
        next_grad = static_cast<const T*>(args.grad_output) + of_image * grad_image +
                    static_cast<int64_t>(next_row) * grad_pitch + next_grad_column * out_c + first_channel +
                    copy_channel;
        if (of_image >= args.n || first_channel + copy_channel >= out_c)
          next_input_column = next_grad_column = kNoColumn;
      }
      const int input_row = next_row * Traits::kStrideH - args.padding_h;
      const T* const input = next_input;
      next_input = copy_pixels<Traits::kStageRows, Traits::kInputCopies, Traits::kIsLarge>(
          policy, target + next_slot, stage.input_row, copy_step * kChannels, next_input, input_pitch,
          copy_step * out_c, next_input_column, copy_step, args.w, input_row, end_input_row);
#pragma unroll 1
      for (int k = copy_column; k < Traits::kHalo; k += copy_step) {
        const int column = Traits::kInputCopies * copy_step + k - copy_column;
        copy_pixels<Traits::kStageRows, 1, Traits::kIsLarge>(
            policy, target + (next_slot + column * kChannels), stage.input_row, 0, input + column * out_c, input_pitch,
            0, next_input_column + column, 0, args.w, input_row, end_input_row);
      }
      next_grad = copy_pixels<Traits::kStageSteps, Traits::kGradCopies, Traits::kIsLarge>(
          policy, target + (next_slot + to_grad), stage.grad_row, copy_step * kChannels, next_grad, grad_pitch,
          copy_step * out_c, next_grad_column, copy_step, args.out_w, next_row, next_item.end_row);
      next_stage = next_stage + 1 == item_stages ? 0 : next_stage + 1;
    }
    commit_copies();
    next_slot = next_slot + stage.all == ring_depth * stage.all ? 0 : next_slot + stage.all;
  };
  for (int k = 0; k < ring_depth - 1; ++k) request(k < stages);

  const int tile_column = image_tile * kColumns;
  const T* const input_corner =
      ring + (image * tiling.in_columns + tile_column * Traits::kStrideW) * kChannels + lane * kVector;
  const T* const grad_corner = ring + stage.input + tile * kColumns * kChannels + lane * kVector;
  const bool wants_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;
  float sum[kTaps][kVector] = {}, bias[kVector] = {};
  float grad[kDepth][kColumns][kVector] = {};
  int stages_left = item_stages;
  const int last_rows =
      args.rows - (item_stages - 1) * Traits::kStageSteps;  // of an item's last stage; none: not positive
  for (int k = 0; k < stages; ++k) {
    stages_left = stages_left == 0 ? item_stages - 1 : stages_left - 1;
    wait_for_stage(ring_depth - 1);
    __syncthreads();  // and every thread is done with the stage that the next request overwrites
    request(k + ring_depth - 1 < stages);
    const T* const input_stage = input_corner + next_slot;  // which is the oldest stage's as well
    const T* const grad_stage = grad_corner + next_slot;
    float bias_part[kVector] = {};
    const auto take = [&](auto is_first, auto is_last) {
      constexpr bool kIsFirst = decltype(is_first)::value, kIsLast = decltype(is_last)::value;
#pragma unroll
      for (int step = 0; step < Traits::kStageSteps; ++step) {
        const bool may_end = kIsLast || Traits::kLeavesOut ||
                             (!Traits::kIsLarge && Traits::kIsDouble && step == Traits::kStageSteps / 2);
        if (may_end && (kIsLast || stages_left == 0) && step - kDepth + 1 >= last_rows) break;
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
            if ((kIsFirst && step < i / Traits::kStrideH) || (kIsLast && step - i / Traits::kStrideH >= last_rows))
              continue;
            if (Traits::kLeavesOut && step < i / Traits::kStrideH && stages_left == item_stages - 1) continue;
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
    };
    if (Traits::kIsLarge && stages_left == item_stages - 1)
      take(std::true_type(), std::false_type());
    else if (Traits::kIsLarge && stages_left == 0)
      take(std::false_type(), std::true_type());
    else
      take(std::false_type(), std::false_type());
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
      const float total = sum_in_parts(first, tiles, kLanes);
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
  const auto launch = [&](auto kernel, int depth) -> int {
    if (const int error = allow_shared_bytes(kernel, bytes)) return error;
    kernel<<<grid, threads, bytes, stream>>>(args, tiling, depth);
    return cudaGetLastError();
  };
  // 3x7, 32x128x128x256, fp16, H100: 0.208, stages of three steps 0.215.
  if constexpr (Traits::kMayBeLarge)
    if (ring_depth == 4 && !args.evict_first) return launch(grad_weight_stream_nhwc_kernel<LargeStages<Traits>>, 2);
  if constexpr (Traits::kMayDouble)
    if (ring_depth == 4) return launch(grad_weight_stream_nhwc_kernel<DoubleStages<Traits>>, 2);
  return launch(grad_weight_stream_nhwc_kernel<Traits>, ring_depth);
}

}  // namespace depthwise
