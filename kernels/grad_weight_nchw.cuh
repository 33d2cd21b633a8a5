// Grad of weight and bias, NCHW.
//
// Serves  up to 11x11 taps (1xk, kx1 up to 41), strides 1 and 2, dilation (not with a vertical stride), padding below the
//         kernel's height; fp32, fp16, bf16; depth multiplier; bias from the same pass. One tile a specialisation: rows
//         of input are read in words of kVector elements, rows of grad_output in words of kGradVector.
// Owns    a block belongs to one output channel and one split; its threads take that split's pieces (image, rows, strip
//         of kColumns columns), strips first, so that a warp reads neighbouring words.
// Reduces warps by shuffles that halve the taps with the lanes (about one shuffle a tap), then the block's warps in
//         order in shared memory, then the splits in order (grad_weight.cu). No atomics: results repeat bit for bit.
// Memory  "staged" copies the whole planes of a round to shared memory first: images of odd width are read element by
//         element, and lanes at many images would touch a line each (mbv2_7: 32x960x7x7, H200: 0.0195 ms without).
//         "queue": the rows of the steps to come wait in shared memory, a thread's own, where asynchronous copies bring them.
//         What is loaded into registers shares few scoreboards: to wait for the oldest row is to wait for the latest.
// Chosen  select_grad_weight.h.
#pragma once

#include "grad_weight_march.cuh"
#include "nchw_tile.cuh"

namespace depthwise {

template <class T, int kKernelH, int kKernelW, int kStrideH, int kStrideW, int kDilationH, int kDilationW, int kColumns,
          int kVector_, int kGradVector_, int kPhase_, bool kStaged_, bool kQueued_>
struct GradWeightNchwTraits : MarchTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW, kColumns,
                                          1, min_int(kVector_, kGradVector_)> {
  using March = MarchTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW, kColumns, 1,
                            min_int(kVector_, kGradVector_)>;
  static constexpr int kVector = kVector_, kGradVector = kGradVector_, kPhase = kPhase_;
  static constexpr bool kStaged = kStaged_, kQueued = kQueued_;
  // A queue in shared memory leaves the registers of a step at once.
  static constexpr int kQueuedRegisters = March::kRegisters.kept + March::kRegisters.step + 56;
  static constexpr int kBlocks =
      kQueued ? max_int(1, (64 << 10) / (kGradWeightThreads * kQueuedRegisters)) : March::kBlocks;
};

// Loads a piece's rows.
template <class Traits>
struct NchwStrip {
  using T = typename Traits::T;
  using Row = NchwRow<Traits, Traits::kColumns, Traits::kVector>;
  static constexpr bool kQueued = Traits::kQueued;
  static constexpr int kBytes = sizeof(T);
  // Asynchronous copies have four bytes at least.
  static constexpr int width(int word) { return max_int(Row::load_width(word), kQueued ? 4 / kBytes : 1); }
  static constexpr int start(int word) {
    return (Row::kFirstWord + word) * Traits::kVector + Row::low(word) / width(word) * width(word);
  }

  // The queue in shared memory: of each step, cell by cell those of all threads, so that they are read without conflicts.
  static constexpr int input_bytes(int words) {  // of a thread, of a row
    int bytes = 0;
    for (int word = 0; word < words; ++word)
      if (Row::low(word) < Row::high(word)) bytes += width(word) * kBytes;
    return bytes;
  }
  static constexpr int kGradBytes = Traits::kColumns * kBytes, kInputBytes = input_bytes(Row::kWords);
  static constexpr int kStepBytes = kGradBytes + Traits::kStrideH * kInputBytes;
  static constexpr int kAheadBytes = 264;  // wanted: of five blocks of a multiprocessor, 165 KB
  static constexpr int kAhead = kQueued ? max_int(2, min_int(6, kAheadBytes / kStepBytes)) : Traits::kAhead;
  static constexpr int kQueueBytes = kQueued ? kAhead * kStepBytes * kGradWeightThreads : 0;
  unsigned char* queue;
  // This thread's cell of `bytes` of a step, and how far those of later words are from the first.
  __device__ __forceinline__ unsigned char* cell(int place, int bytes) const {
    return queue + place * (kStepBytes * kGradWeightThreads) + threadIdx.x * bytes;
  }
  static constexpr int of_word(int first_byte) { return first_byte * kGradWeightThreads; }

  CachePolicy policy;
  // Which words lie inside the image, as bits: one register instead of a predicate a word.
  StripMask<Row::kWords> grad_mask = 0, input_mask = 0;

  __device__ __forceinline__ NchwStrip(int grad_columns, int input_column, int input_columns, unsigned char* queue,
                                       CachePolicy policy)
      : queue(queue), policy(policy) {
#pragma unroll
    for (int v = 0; v < Traits::kColumns; v += Traits::kGradVector)
      if (v < grad_columns) grad_mask |= 1u << v;
    for_each_index<Row::kWords>([&](auto index) {
      constexpr int word = decltype(index)::value;
      if constexpr (Row::low(word) < Row::high(word)) {
        constexpr int kStart = start(word);
        if (static_cast<unsigned>(input_column + kStart) < static_cast<unsigned>(input_columns))
          input_mask |= StripMask<Row::kWords>{1} << word;
      }
    });
  }

  struct GradRow {
    PackedLoad<T, Traits::kGradVector> load[Traits::kColumns / Traits::kGradVector];
    template <int v>
    __device__ __forceinline__ float element(int) const {
      return load[v / Traits::kGradVector][v % Traits::kGradVector];
    }
  };
  __device__ __forceinline__ void grad(const T* row, bool in_bounds, GradRow& registers) const {
    const auto mask = in_bounds ? grad_mask : 0;
#pragma unroll
    for (int v = 0; v < Traits::kColumns; v += Traits::kGradVector)
      registers.load[v / Traits::kGradVector].template load<Traits::kGradVector, Traits::kStaged>(
          row + v, mask >> v & 1, policy);
  }

  struct InputRow {
    PackedLoad<T, Traits::kVector> load[Row::kWords];
    template <int k>
    __device__ __forceinline__ float element(int) const {
      constexpr int kColumn = k - Traits::kPhase, kWord = floor_divide(kColumn, Traits::kVector) - Row::kFirstWord;
      constexpr int kElement = kColumn - start(kWord);
      return load[kWord][kElement];
    }
  };
  __device__ __forceinline__ void input(const T* row, bool in_bounds, InputRow& registers) const {
    load_words(row, in_bounds ? input_mask : 0, registers);
  }
  template <int kWord = 0>
  __device__ __forceinline__ void load_words(const T* row, StripMask<Row::kWords> mask, InputRow& registers) const {
    if constexpr (kWord < Row::kWords) {
      constexpr int kStart = start(kWord);
      if constexpr (Row::low(kWord) < Row::high(kWord))
        registers.load[kWord].template load<width(kWord), Traits::kStaged>(row + kStart, mask >> kWord & 1, policy);
      load_words<kWord + 1>(row, mask, registers);
    }
  }

  __device__ __forceinline__ void request_grad(const T* row, bool in_bounds, int place) const {
    const auto mask = in_bounds ? grad_mask : 0;
#pragma unroll
    for (int v = 0; v < Traits::kColumns; v += Traits::kGradVector)
      PackedLoad<T, Traits::kGradVector>::request(policy.target(cell(place, Traits::kGradVector * kBytes)),
                                                  of_word(v * kBytes), row + v, mask >> v & 1, policy);
  }
  __device__ __forceinline__ void request_input(const T* row, bool in_bounds, int place, int step_row) const {
    const auto mask = in_bounds ? input_mask : 0;
    for_each_index<Row::kWords>([&](auto index) {
      constexpr int kWord = decltype(index)::value;
      if constexpr (Row::low(kWord) < Row::high(kWord))
        PackedLoad<T, Traits::kVector>::template request<width(kWord)>(
            policy.target(cell(place, width(kWord) * kBytes)),
            of_word(kGradBytes + step_row * kInputBytes + input_bytes(kWord)), row + start(kWord), mask >> kWord & 1,
            policy);
    });
  }
  __device__ __forceinline__ void take(int place, GradRow& grad, InputRow (&input)[Traits::kStrideH]) const {
#pragma unroll
    for (int v = 0; v < Traits::kColumns; v += Traits::kGradVector)
      grad.load[v / Traits::kGradVector].take(cell(place, Traits::kGradVector * kBytes) + of_word(v * kBytes));
#pragma unroll
    for (int e = 0; e < Traits::kStrideH; ++e)
      for_each_index<Row::kWords>([&](auto index) {
        constexpr int kWord = decltype(index)::value;
        if constexpr (Row::low(kWord) < Row::high(kWord))
          input[e].load[kWord].template take<width(kWord)>(cell(place, width(kWord) * kBytes) +
                                                           of_word(kGradBytes + e * kInputBytes + input_bytes(kWord)));
      });
  }
};

// Sums of kCount values over a warp: each step exchanges half of what a lane still holds with the lane `offset` away,
// so that both have half as many. In the end a lane holds a few sums, those from index `first` to `end`, which it puts, or
// adds, to `shared`.
template <bool kAdds = false, int kOffset = 16, int kCount>
__device__ __forceinline__ void sum_over_warp(const float (&values)[kCount], float* shared, int first, int end) {
  if constexpr (kOffset == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (first + k < end) shared[first + k] = kAdds ? shared[first + k] + values[k] : values[k];
  } else {
    constexpr int kHalf = (kCount + 1) / 2;
    const bool upper = threadIdx.x & kOffset;
    float half[kHalf];
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float high = k + kHalf < kCount ? values[k + kHalf < kCount ? k + kHalf : 0] : 0.f;
      half[k] = (upper ? high : values[k]) + __shfl_xor_sync(~0u, upper ? values[k] : high, kOffset);
    }
    sum_over_warp<kAdds, kOffset / 2>(half, shared, upper ? first + kHalf : first,
                                      upper ? end : min(end, first + kHalf));
  }
}

// Stores the sums of `threads` threads, whole warps, of which each has left its own at `shared`; `thread` is this one.
// Returns whether those that the thread stored are finite.
template <class Traits>
__device__ __forceinline__ bool store_sums(const GradWeightArgs& args, unsigned split, unsigned channel,
                                           const float* shared, int thread, int threads) {
  constexpr int kTaps = Traits::kTaps, kPitch = kTaps + 1;
  bool finite = true;
  for (int tap = thread; tap <= kTaps; tap += threads) {
    float total = shared[tap];
    for (int k = 1; k < threads / 32; ++k) total += shared[k * kPitch + tap];
    store_sum<Traits>(args, split, channel, tap, total);
    finite = finite && isfinite(total);
  }
  return finite;
}

// Adds up one tap's sums of `threads` threads.
template <class Traits>
__device__ __forceinline__ void store_tap(const GradWeightArgs& args, unsigned split, unsigned channel, int tap,
                                          float total, float* shared, int thread, int threads) {
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  if (thread % 32 == 0) shared[thread / 32] = total;
  __syncthreads();
  for (int k = 1; k < threads / 32 && thread == 0; ++k) total += shared[k];
  if (thread == 0) store_sum<Traits>(args, split, channel, tap, total);
  __syncthreads();
}

// Copies the planes of images first to last to shared memory, `pitch` elements apart. A warp takes a plane, so that it
// reads whole lines, and has the same part of kBatch planes under way.
template <class T, class PlaneOf>
__device__ __forceinline__ void stage_planes(T* staged, int pitch, int size, int first, int last,
                                             const PlaneOf& plane_of) {
  constexpr int kBatch = 16;
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  for (int k = threadIdx.x % 32; k < size; k += 32)
    for (int image = first + warp; image <= last; image += kBatch * num_warps) {
      T values[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        values[b] = load_or_zero<1>(plane_of(image + b * num_warps) + k, image + b * num_warps <= last).value[0];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (image + b * num_warps <= last) staged[(image + b * num_warps - first) * pitch + k] = values[b];
    }
}

template <class Traits>
__global__ void __launch_bounds__(kGradWeightThreads, Traits::kBlocks)
    grad_weight_nchw_kernel(const GradWeightArgs args, const Pieces pieces) {
  using T = typename Traits::T;
  constexpr int kTaps = Traits::kTaps, kWarps = kGradWeightThreads / 32;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const unsigned channel = blockIdx.x, split = blockIdx.y;
  const int first_piece = split * blockDim.x + threadIdx.x;
  const int piece_step = args.splits * blockDim.x;
  const int64_t in_c = args.out_c / args.multiplier;
  const auto grad_plane = [&](int image) {
    return static_cast<const T*>(args.grad_output) + (image * args.out_c + channel) * args.out_h * args.out_w;
  };
  const auto input_plane = [&](int image) {
    return static_cast<const T*>(args.input) + (image * in_c + channel / args.multiplier) * args.h * args.w;
  };

  const CachePolicy policy(args);
  float sum[kTaps][1] = {};
  float bias[1] = {}, bias_part[1] = {};
  for (int index = first_piece; index - static_cast<int>(threadIdx.x) < pieces.per_channel; index += piece_step) {
    const Piece piece = piece_at<Traits>(args, pieces, index);
    const T* grad = grad_plane(piece.image);
    const T* input = input_plane(piece.image);
    if constexpr (Traits::kStaged) {
      // The planes of this round's images.
      T* const staged = reinterpret_cast<T*>(shared_memory);
      const int in_size = args.h * args.w, out_size = args.out_h * args.out_w;
      const int per_image = pieces.strips * pieces.cuts, round = index - static_cast<int>(threadIdx.x);
      const int first_image = round / per_image;
      const int last_image =
          min(static_cast<int>(args.n), (round + static_cast<int>(blockDim.x) - 1) / per_image + 1) - 1;
      __syncthreads();
      stage_planes(staged, in_size + out_size, in_size, first_image, last_image, input_plane);
      stage_planes(staged + in_size, in_size + out_size, out_size, first_image, last_image, grad_plane);
      __syncthreads();
      input = staged + (piece.image - first_image) * (in_size + out_size);
      grad = input + in_size;
    }
    if (index >= pieces.per_channel) break;
    const int column = piece.column * Traits::kStrideW;
    const NchwStrip<Traits> strip(args.out_w - piece.column, column, args.w, shared_memory, policy);
    march<Traits>(args, piece, strip, grad + piece.column, input + column, args.out_w, args.w, sum, bias, bias_part);
    bias[0] += bias_part[0];
    bias_part[0] = 0;
  }

  let_second_pass_begin();
  __shared__ float shared[kWarps][kTaps + 1];
  float values[kTaps + 1];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) values[tap] = sum[tap][0];
  values[kTaps] = bias[0];
  sum_over_warp(values, shared[threadIdx.x / 32], 0, kTaps + 1);
  __syncthreads();
  const bool finite = store_sums<Traits>(args, split, channel, shared[0], threadIdx.x, blockDim.x);
  if (__syncthreads_and(finite)) return;

  for (int tap = 0; tap < kTaps; ++tap) {
    float total = 0;
    for (int index = first_piece; index < pieces.per_channel; index += piece_step) {
      const Piece piece = piece_at<Traits>(args, pieces, index);
      total += sum_of_pairs<Traits>(args, piece, tap, grad_plane(piece.image), input_plane(piece.image), 1);
    }
    store_tap<Traits>(args, split, channel, tap, total, shared[0], threadIdx.x, blockDim.x);
  }
}

template <class Traits>
int launch_grad_weight_nchw(const GradWeightArgs& args, int, cudaStream_t stream) {
  const Pieces pieces = count_pieces<Traits>(args);
  const int threads = min_int(kGradWeightThreads, divide_up(divide_up(pieces.per_channel, args.splits), 32) * 32);
  const dim3 blocks(static_cast<unsigned>(args.out_c), args.splits);
  const int planes = min_int(static_cast<int>(args.n), threads / (pieces.strips * pieces.cuts) + 2);
  const int plane_bytes = (args.h * args.w + args.out_h * args.out_w) * static_cast<int>(sizeof(typename Traits::T));
  const int shared_bytes = Traits::kStaged ? planes * plane_bytes : NchwStrip<Traits>::kQueueBytes;
  constexpr int kStaticBytes = kGradWeightThreads / 32 * (Traits::kTaps + 1) * static_cast<int>(sizeof(float));
  if (const int error = allow_shared_bytes(grad_weight_nchw_kernel<Traits>, shared_bytes, kStaticBytes)) return error;
  grad_weight_nchw_kernel<Traits><<<blocks, threads, shared_bytes, stream>>>(args, pieces);
  return cudaGetLastError();
}

}  // namespace depthwise
