// Grad of weight and bias, channels_last.
//
// Serves  up to 11x11 taps (1xk, kx1 up to 41), strides 1 and 2, dilation (not with a vertical stride), padding below the
//         kernel's height; fp32, fp16, bf16; any number of channels (a tile of one channel a thread), multiplier 1; bias
//         from the same pass.
// Owns    a block: up to 32 threads along channels, kChannels each, so that a warp reads whole lines; the other threads
//         take pieces (image, rows, strip of kColumns columns) of one split.
// Reduces the block's pieces in order through shared memory, kBatch sums at a time, then the splits in order
//         (grad_weight.cu). No atomics: results repeat bit for bit.
// Queues  ("queue") the rows of the steps to come in shared memory, each thread its own, where asynchronous copies bring
//         them. What is loaded into registers shares few scoreboards: to wait for the oldest row is to wait for the latest.
// Chosen  select_grad_weight.h.
#pragma once

#include "grad_weight_march.cuh"

namespace depthwise {

template <class T, int kKernelH, int kKernelW, int kStrideH, int kStrideW, int kDilationH, int kDilationW, int kColumns,
          int kChannels, bool kQueued_>
struct GradWeightNhwcTraits
    : MarchTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW, kColumns, kChannels, kChannels> {
  using March =
      MarchTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW, kColumns, kChannels, kChannels>;
  static constexpr int kBatch = 16 / kChannels;  // taps that are reduced together: 8 KB of shared memory
  static constexpr bool kQueued = kQueued_;
  static constexpr int kQueuedBlocks = max_int(1, queued_blocks(March::kRegisters));
  // A load of one channel has an address of its own beside its register.
  static constexpr int kBlocks = kQueued ? kQueuedBlocks : kChannels == 1 ? min_int(2, March::kBlocks) : March::kBlocks;
};

// Loads a piece's rows.
template <class Traits>
struct NhwcStrip {
  using T = typename Traits::T;
  static constexpr int kChannels = Traits::kChannels;
  static constexpr bool kQueued = Traits::kQueued;
  int pixel;  // elements from one pixel to the next
  // Which columns lie inside the image, as bits: one register instead of a predicate a column.
  StripMask<Traits::kWindow> grad_mask = 0, input_mask = 0;

  // The queue in shared memory: of each step, pixel by pixel those of all threads, so that they are read without
  // conflicts.
  static constexpr int kPixelBytes = kChannels * static_cast<int>(sizeof(T));
  static constexpr int kRowPixels = count_bits(Traits::kUsed);
  static constexpr int kStepBytes = (Traits::kColumns + Traits::kStrideH * kRowPixels) * kPixelBytes;
  static constexpr int kAheadBytes = 264;  // wanted: of four blocks of a multiprocessor, 132 KB
  static constexpr int kAhead = kQueued ? max_int(2, min_int(6, kAheadBytes / kStepBytes)) : Traits::kAhead;
  static constexpr int kQueueBytes = kQueued ? kAhead * kStepBytes * kGradWeightThreads : 0;
  CachePolicy policy;
  unsigned char* queue;  // the thread's
  __device__ __forceinline__ unsigned char* cell(int place) const {
    return queue + place * (kStepBytes * kGradWeightThreads);
  }
  static constexpr int of_pixel(int index) { return index * kPixelBytes * kGradWeightThreads; }
  // Of column k of a row of input, which is one of kUsed.
  static constexpr int input_cell(int row, int k) {
    return Traits::kColumns + row * kRowPixels + count_bits(Traits::kUsed & ((uint64_t{1} << k) - 1));
  }

  __device__ __forceinline__ NhwcStrip(int pixel, int grad_columns, int input_column, int input_columns,
                                       unsigned char* shared_queue, CachePolicy policy)
      : pixel(pixel), policy(policy), queue(shared_queue + (threadIdx.y * blockDim.x + threadIdx.x) * kPixelBytes) {
#pragma unroll
    for (int v = 0; v < Traits::kColumns; ++v)
      if (v < grad_columns) grad_mask |= 1u << v;
#pragma unroll
    for (int k = 0; k < Traits::kWindow; ++k)
      if (static_cast<unsigned>(input_column + k) < static_cast<unsigned>(input_columns))
        input_mask |= StripMask<Traits::kWindow>{1} << k;
  }

  template <int kPixels>
  struct PixelRow {
    PackedLoad<T, kChannels> load[kPixels];
    template <int k>
    __device__ __forceinline__ float element(int channel) const {
      return load[k][channel];
    }
  };
  using GradRow = PixelRow<Traits::kColumns>;
  using InputRow = PixelRow<Traits::kWindow>;
  __device__ __forceinline__ void grad(const T* row, bool in_bounds, GradRow& registers) const {
    const auto mask = in_bounds ? grad_mask : 0;
#pragma unroll
    for (int v = 0; v < Traits::kColumns; ++v) registers.load[v].load(row + v * pixel, mask >> v & 1, policy);
  }
  __device__ __forceinline__ void input(const T* row, bool in_bounds, InputRow& registers) const {
    const auto mask = in_bounds ? input_mask : 0;
#pragma unroll
    for (int k = 0; k < Traits::kWindow; ++k)
      if (Traits::kUsed >> k & 1) registers.load[k].load(row + k * pixel, mask >> k & 1, policy);
  }

  __device__ __forceinline__ void request_grad(const T* row, bool in_bounds, int place) const {
    const auto mask = in_bounds ? grad_mask : 0;
    const auto target = policy.target(cell(place));
#pragma unroll
    for (int v = 0; v < Traits::kColumns; ++v)
      PackedLoad<T, kChannels>::request(target, of_pixel(v), row + v * pixel, mask >> v & 1, policy);
  }
  __device__ __forceinline__ void request_input(const T* row, bool in_bounds, int place, int step_row) const {
    const auto mask = in_bounds ? input_mask : 0;
    const auto target = policy.target(cell(place));
    for_each_index<Traits::kWindow>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (Traits::kUsed >> k & 1)
        PackedLoad<T, kChannels>::request(target, of_pixel(input_cell(step_row, k)), row + k * pixel, mask >> k & 1,
                                          policy);
    });
  }
  __device__ __forceinline__ void take(int place, GradRow& grad, InputRow (&input)[Traits::kStrideH]) const {
#pragma unroll
    for (int v = 0; v < Traits::kColumns; ++v) grad.load[v].take(cell(place) + of_pixel(v));
#pragma unroll
    for (int e = 0; e < Traits::kStrideH; ++e)
      for_each_index<Traits::kWindow>([&](auto index) {
        constexpr int k = decltype(index)::value;
        if constexpr (Traits::kUsed >> k & 1) input[e].load[k].take(cell(place) + of_pixel(input_cell(e, k)));
      });
  }
};

template <class Traits>
__global__ void __launch_bounds__(kGradWeightThreads, Traits::kBlocks)
    grad_weight_nhwc_kernel(const GradWeightArgs args, const Pieces pieces) {
  using T = typename Traits::T;
  constexpr int kTaps = Traits::kTaps, kChannels = Traits::kChannels, kBatch = Traits::kBatch;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  // Of few rows the work is nearly done (3x3, 32x384x14x14, fp16, H100: 13.6 us, at the end 13.9).
  constexpr int kFewRows = 16;
  if (args.rows <= kFewRows) let_second_pass_begin();
  const int out_c = static_cast<int>(args.out_c);
  const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * kChannels;
  const int first_piece = blockIdx.y * blockDim.y + threadIdx.y;
  const int piece_step = args.splits * blockDim.y;
  const auto grad_plane = [&](int image) {
    return static_cast<const T*>(args.grad_output) + static_cast<int64_t>(image) * args.out_h * args.out_w * out_c +
           channel;
  };
  const auto input_plane = [&](int image) {
    return static_cast<const T*>(args.input) + static_cast<int64_t>(image) * args.h * args.w * out_c + channel;
  };

  const CachePolicy policy(args);
  float sum[kTaps][kChannels] = {};
  float bias[kChannels] = {}, bias_part[kChannels] = {};
  if (channel < out_c) {
    for (int index = first_piece; index < pieces.per_channel; index += piece_step) {
      const Piece piece = piece_at<Traits>(args, pieces, index);
      const int column = piece.column * Traits::kStrideW - args.padding_w;
      const NhwcStrip<Traits> strip(out_c, args.out_w - piece.column, column, args.w, shared_memory, policy);
      march<Traits>(args, piece, strip, grad_plane(piece.image) + static_cast<int64_t>(piece.column) * out_c,
                    input_plane(piece.image) + static_cast<int64_t>(column) * out_c, args.out_w * out_c, args.w * out_c,
                    sum, bias, bias_part);
#pragma unroll
      for (int e = 0; e < kChannels; ++e) bias[e] += bias_part[e], bias_part[e] = 0;
    }
  }

  let_second_pass_begin();
  __shared__ float shared[kBatch * kChannels][kGradWeightThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, num_threads = blockDim.x * blockDim.y;
  // Adds what the block's threads left in `slots` slots of shared memory for their channels, and stores it.
  const auto store_slots = [&](int first_tap, int slots) {
    bool finite = true;
    __syncthreads();
    for (int k = thread; k < slots * kChannels * static_cast<int>(blockDim.x); k += num_threads) {
      const int lane = k % blockDim.x, slot = k / blockDim.x;
      const int of_channel = (blockIdx.x * blockDim.x + lane) * kChannels + slot % kChannels;
      if (of_channel >= out_c) continue;
      const float total = sum_in_parts(&shared[slot][lane], blockDim.y, blockDim.x);
      store_sum<Traits>(args, blockIdx.y, of_channel, first_tap + slot / kChannels, total);
      finite = finite && isfinite(total);
    }
    return __syncthreads_and(finite) != 0;
  };

  bool finite = true;
#pragma unroll
  for (int first_tap = 0; first_tap <= kTaps; first_tap += kBatch) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
#pragma unroll
      for (int e = 0; e < kChannels; ++e)
        if (first_tap + k <= kTaps)
          shared[k * kChannels + e][thread] =
              first_tap + k < kTaps ? sum[min_int(first_tap + k, kTaps - 1)][e] : bias[e];
    finite = store_slots(first_tap, min_int(kBatch, kTaps + 1 - first_tap)) && finite;
  }
  if (finite) return;

  for (int tap = 0; tap < kTaps; ++tap) {
    for (int e = 0; e < kChannels; ++e) {
      float total = 0;
      for (int index = first_piece; index < pieces.per_channel && channel < out_c; index += piece_step) {
        const Piece piece = piece_at<Traits>(args, pieces, index);
        total +=
            sum_of_pairs<Traits>(args, piece, tap, grad_plane(piece.image) + e, input_plane(piece.image) + e, out_c);
      }
      shared[e][thread] = total;
    }
    store_slots(tap, 1);
  }
}

template <class Traits>
int launch_grad_weight_nhwc(const GradWeightArgs& args, int, cudaStream_t stream) {
  const Pieces pieces = count_pieces<Traits>(args);
  const int lanes = static_cast<int>(args.out_c) / Traits::kChannels;
  const int blocks_c = divide_up(lanes, kGradWeightLanes);
  const int x = divide_up(lanes, blocks_c);
  const int y = min_int(kGradWeightThreads / x, divide_up(pieces.per_channel, args.splits));
  constexpr int kBytes = NhwcStrip<Traits>::kQueueBytes, kStaticBytes = 8 << 10;
  if (const int error = allow_shared_bytes(grad_weight_nhwc_kernel<Traits>, kBytes, kStaticBytes)) return error;
  grad_weight_nhwc_kernel<Traits><<<dim3(blocks_c, args.splits), dim3(x, y), kBytes, stream>>>(args, pieces);
  return cudaGetLastError();
}

}  // namespace depthwise
