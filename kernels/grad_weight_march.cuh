// What the marching grad-of-weight kernels of both layouts share: every thread keeps all taps of its channels in fp32
// registers and marches down the rows of a strip of grad_output columns. Each step brings the next row of grad_output
// and the rows of input that are complete with it; the last rows of grad_output, as many as the kernel is high, wait in
// registers, so every element is read once a strip.
//
// A piece of work is (image, residue, rows, strip): with dilation d, rows d apart are a problem of their own, so there
// are d residues; rows are cut where there would be too few threads (grad_weight_plan.h).
//
// Padding and ragged strips enter as zeros. A zero times an infinity is NaN, where the pair does not exist: sums that
// are not finite are computed anew, pair by pair (`sum_of_pairs`).
#pragma once

#include <type_traits>

#include "cache_policy.cuh"
#include "direct.cuh"
#include "grad_weight_plan.h"
#include "second_pass.cuh"

namespace depthwise {

// kColumns of grad_output a strip, kChannels a thread, kLoad elements a load.
template <class T_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_,
          int kColumns_, int kChannels_, int kLoad>
struct MarchTraits : NhwcTraits<T_, kKernelH_, kKernelW_, kStrideH_, kStrideW_, kDilationH_, kDilationW_> {
  static_assert(kDilationH_ == 1 || kStrideH_ == 1);
  static constexpr int kColumns = kColumns_, kChannels = kChannels_;
  static constexpr int kTaps = kKernelH_ * kKernelW_;
  static constexpr int kWindow = window_size(kColumns, kStrideW_, kKernelW_, kDilationW_);
  static constexpr uint64_t kUsed = window_mask(kColumns, kStrideW_, kKernelW_, kDilationW_);
  static_assert(kWindow <= 64);
  // Rows of grad_output that meet one step's rows of input.
  static constexpr int kDepth = divide_up(kKernelH_, kStrideH_);

  // Steps of an iteration: a multiple of kDepth lets the rows of grad_output stay where they are; where that is too
  // much code, they move every few steps.
  static constexpr int kMaxUnrolledFmas = 1600;
  static constexpr bool kRing = kDepth * kTaps * kColumns * kChannels <= kMaxUnrolledFmas;
  static constexpr int kSteps = !kRing ? 2 : kDepth <= 2 ? 4 : kDepth;
  static constexpr int kGradRows = kRing ? kDepth : kDepth + kSteps - 1;
  // Where the row of grad_output lies that `step` of an iteration meets with tap rows kStrideH * age and on.
  static constexpr int grad_row(int step, int age) {
    return kRing ? (step + kDepth - age) % kDepth : kDepth - 1 + step - age;
  }

  // Whether a row's terms are added up before they join a tap's sum: equal ones would round the same way every time. It
  // is a fifth of the arithmetic, which few taps have to spare; more of them, and registers would cost a multiprocessor
  // a block (sm_90: 21x1, and 5x5 at stride 2). 16-bit results hide it.
  static constexpr bool kSumsRows = sizeof(T_) == 4 && kTaps <= (kStrideW_ == 1 && kKernelH_ <= 5 ? 25 : 9);

  // Steps whose loads are in flight: about 40 registers of them.
  static constexpr MarchRegisters kRegisters =
      march_registers(kKernelH_, kKernelW_, kStrideH_, kStrideW_, kDilationW_, kColumns, kChannels, kLoad, sizeof(T_));
  static constexpr int kAhead = max_int(1, min_int(kTaps* kChannels <= 36 ? 3 : 2, 40 / max_int(1, kRegisters.step)));

  // Blocks a multiprocessor that the registers suffice for; addresses and the like take up to 80.
  static constexpr int kThreadRegisters = kRegisters.kept + kAhead * kRegisters.step + 80;
  static constexpr int kBlocks = max_int(1, (64 << 10) / (kGradWeightThreads * kThreadRegisters));
};

template <int kBits>
using StripMask = std::conditional_t<(kBits <= 32), uint32_t, uint64_t>;

// The elements of one load as they came, two of 16 bits a register. As values of their own they would be unpacked, and so
// waited for, as soon as they are loaded, not when they are used (5x5 fp16 channels_last, 32x240x28x28, H200: 0.108 ms,
// fp32 0.041).
template <class T, int kCount>
struct PackedLoad {
  unsigned word[(kCount * sizeof(T) + 3) / 4];

  // Fills the first kWidth elements; a false predicate gives zeros.
  template <int kWidth = kCount, bool kShared = false>
  __device__ __forceinline__ void load(const T* pointer, bool in_bounds, CachePolicy policy) {
    using Word = typename RawWord<sizeof(T) * kWidth>::type;
    const Word* source = reinterpret_cast<const Word*>(pointer);
    Word loaded{};
    // Elements of two bytes one by one, of small images: what a policy adds to so many loads costs more than it saves (3x3,
    // 32x384x14x14, channels_last, fp16 / bf16, H100: 0.0138 / 0.0140 ms, with a policy 0.0156 / 0.0154).
    if (in_bounds) loaded = kShared ? *source : sizeof(Word) == 2 ? __ldg(source) : policy.load(source);
    keep(loaded);
  }
  template <class Word>
  __device__ __forceinline__ void keep(Word loaded) {
    if constexpr (sizeof(Word) <= 4) {
      word[0] = loaded;
    } else {
      word[0] = loaded.x, word[1] = loaded.y;
      if constexpr (sizeof(Word) == 16) word[2] = loaded.z, word[3] = loaded.w;
    }
  }
  // The same by way of sizeof(T) * kWidth bytes of shared memory, from which `take` fetches it later.
  template <int kWidth = kCount>
  __device__ __forceinline__ static void request(CopyTarget<unsigned char> target, int offset, const T* pointer,
                                                 bool in_bounds, CachePolicy policy) {
    policy.copy_async<sizeof(T) * kWidth, true>(target, offset, pointer, in_bounds);
  }
  template <int kWidth = kCount>
  __device__ __forceinline__ void take(const void* cell) {
    keep(*static_cast<const typename RawWord<sizeof(T) * kWidth>::type*>(cell));
  }
  __device__ __forceinline__ float operator[](int k) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word[k]);
    else
      return k % 2 ? high_to_float<T>(word[k / 2]) : low_to_float<T>(word[k / 2]);
  }
};

// Rows of grad_output `residue` + dilation * [begin, end), of one image.
struct Piece {
  int image, residue, begin, end, column;
};

struct Pieces {
  int strips, cuts, per_channel;  // a channel's pieces: images x residues x cuts x strips
};

template <class Traits>
Pieces count_pieces(const GradWeightArgs& args) {
  Pieces pieces;
  pieces.strips = divide_up(args.out_w, Traits::kColumns);
  pieces.cuts = divide_up(divide_up(args.out_h, Traits::kDilationH), args.rows);
  pieces.per_channel = static_cast<int>(args.n) * Traits::kDilationH * pieces.cuts * pieces.strips;
  return pieces;
}

template <class Traits>
__device__ __forceinline__ Piece piece_at(const GradWeightArgs& args, const Pieces& pieces, unsigned index) {
  Piece piece;
  piece.column = static_cast<int>(index % pieces.strips) * Traits::kColumns;
  index /= pieces.strips;
  piece.begin = static_cast<int>(index % pieces.cuts) * args.rows;
  index /= pieces.cuts;
  piece.residue = Traits::kDilationH == 1 ? 0 : static_cast<int>(index % Traits::kDilationH);
  piece.image = static_cast<int>(index / Traits::kDilationH);
  const int rows = (args.out_h - piece.residue + Traits::kDilationH - 1) / Traits::kDilationH;
  piece.end = min(piece.begin + args.rows, rows);
  return piece;
}

// Marches down a piece. `strip` loads a row's elements for the piece: grad(pointer, in_bounds, row) and input(pointer,
// in_bounds, row), whose element<column>(channel) is taken later; the pointers are to the strip's first column in the piece's image, and step by
// rows: only additions are left in the loop. Grad of bias is summed in parts of about 40 rows, so that equal gradients
// do not all round the same way; the last part is the caller's to add.
template <class Traits, class Strip>
__device__ __forceinline__ void march(const GradWeightArgs& args, const Piece& piece, const Strip& strip,
                                      const typename Traits::T* next_grad, const typename Traits::T* next_input,
                                      int grad_pitch, int input_pitch, float (&sum)[Traits::kTaps][Traits::kChannels],
                                      float (&bias)[Traits::kChannels], float (&bias_part)[Traits::kChannels]) {
  constexpr int kChannels = Traits::kChannels, kColumns = Traits::kColumns, kWindow = Traits::kWindow;
  constexpr int kDepth = Traits::kDepth, kStrideH = Traits::kStrideH, kAhead = Strip::kAhead;
  constexpr int kRowStep = Traits::kDilationH;  // of grad_output, from step to step

  if (piece.begin >= piece.end) return;
  // Step t brings row t of grad_output and rows t * kStrideH - padding and on of input: from the first step that has a
  // row inside the image to the last.
  const int origin = piece.residue * kStrideH - args.padding_h;
  constexpr int kInputStep = kRowStep * kStrideH;
  const int first = max(piece.begin, (kInputStep - kStrideH - origin) / kInputStep);
  const int last = min(piece.end + kDepth - 1, (args.h - origin + kInputStep - 1) / kInputStep);

  next_grad += static_cast<int64_t>(piece.residue + (first - kDepth + 1) * kRowStep) * grad_pitch;
  next_input += static_cast<int64_t>(origin + first * kInputStep) * input_pitch;
  const int64_t grad_step = static_cast<int64_t>(grad_pitch) * kRowStep;
  const int64_t input_step = static_cast<int64_t>(input_pitch) * kRowStep;

  // Rows of the steps to come: in registers, or in shared memory (Strip::kQueued), of which step `place` is the next.
  constexpr bool kQueued = Strip::kQueued;
  typename Strip::GradRow ahead_grad[kQueued ? 1 : kAhead];
  typename Strip::InputRow ahead_input[kQueued ? 1 : kAhead][kStrideH];
  int place = 0;
  const auto load_step = [&](int t, int slot) {
    const bool has_grad = t < piece.end;
    if constexpr (kQueued)
      strip.request_grad(ptx::opaque(next_grad), has_grad, place);
    else
      strip.grad(ptx::opaque(next_grad), has_grad, ahead_grad[slot]);
    next_grad += grad_step;
#pragma unroll
    for (int e = 0; e < kStrideH; ++e) {
      const int row = origin + t * kInputStep + e;
      const bool has_input = t < last && (kStrideH == 1 || static_cast<unsigned>(row) < static_cast<unsigned>(args.h));
      if constexpr (kQueued)
        strip.request_input(ptx::opaque(next_input), has_input, place, e);
      else
        strip.input(ptx::opaque(next_input), has_input, ahead_input[slot][e]);
      next_input += input_step;
    }
    if constexpr (kQueued) {
      commit_copies();
      place = place + 1 == kAhead ? 0 : place + 1;
    }
  };
  if constexpr (kQueued) wait_for_copies<0>();  // what was asked for beyond the end of the piece before

  float grad[Traits::kGradRows][kColumns][kChannels];
  const auto take_grad = [&](const typename Strip::GradRow& row, float (&converted)[kColumns][kChannels]) {
#pragma unroll
    for (int e = 0; e < kChannels; ++e) {
      float tree[kColumns];
      for_each_index<kColumns>([&](auto index) {
        constexpr int v = decltype(index)::value;
        tree[v] = converted[v][e] = row.template element<v>(e);
      });
#pragma unroll
      for (int width = kColumns / 2; width > 0; width /= 2)
#pragma unroll
        for (int v = 0; v < width; ++v) tree[v] += tree[v + width];
      bias_part[e] += tree[0];
    }
  };

  // The rows of grad_output before the first step.
#pragma unroll
  for (int age = kDepth - 1; age > 0; --age) {
    typename Strip::GradRow row;
    strip.grad(next_grad, first - age >= piece.begin && first - age < piece.end, row);
    next_grad += grad_step;
    take_grad(row, grad[Traits::grad_row(0, age)]);
  }
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) load_step(first + slot, slot);

  for (int start = first; start < last; start += Traits::kSteps) {
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      const int t = start + step;
      if (step > 0 && t >= last) return;

      // Take what this step needs out of the queue, and fill the queue's end.
      if constexpr (kQueued) {
        wait_for_copies<kAhead - 1>();
        strip.take(place, ahead_grad[0], ahead_input[0]);
      }
      take_grad(ahead_grad[0], grad[Traits::grad_row(step, 0)]);
      float window[kStrideH][kWindow][kChannels];
#pragma unroll
      for (int e = 0; e < kStrideH; ++e)
        for_each_index<kWindow>([&](auto index) {
          constexpr int k = decltype(index)::value;
          if constexpr (Traits::kUsed >> k & 1)
#pragma unroll
            for (int c = 0; c < kChannels; ++c) window[e][k][c] = ahead_input[0][e].template element<k>(c);
        });
#pragma unroll
      for (int slot = 0; slot + 1 < (kQueued ? 1 : kAhead); ++slot) {
        ahead_grad[slot] = ahead_grad[slot + 1];
#pragma unroll
        for (int e = 0; e < kStrideH; ++e) ahead_input[slot][e] = ahead_input[slot + 1][e];
      }
      load_step(t + kAhead, kAhead - 1);

#pragma unroll
      for (int i = 0; i < Traits::kKernelH; ++i)
#pragma unroll
        for (int j = 0; j < Traits::kKernelW; ++j) {
          float (&tap)[kChannels] = sum[i * Traits::kKernelW + j];
          float row[kChannels] = {};
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
              float& to = Traits::kSumsRows ? row[c] : tap[c];
              to = fmaf(grad[Traits::grad_row(step, i / kStrideH)][v][c],
                        window[i % kStrideH][v * Traits::kStrideW + j * Traits::kDilationW][c], to);
            }
          if constexpr (Traits::kSumsRows) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) tap[c] += row[c];
          }
        }
    }
    if constexpr (!Traits::kRing) {
#pragma unroll
      for (int row = 0; row + 1 < kDepth; ++row)
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
#pragma unroll
          for (int c = 0; c < kChannels; ++c) grad[row][v][c] = grad[row + Traits::kSteps][v][c];
    }
    if (static_cast<unsigned>(start - first) % 32 < Traits::kSteps) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) bias[c] += bias_part[c], bias_part[c] = 0;
    }
  }
}

// One tap's sum over a piece, of the pairs that exist alone. `grad` and `input` point to the thread's channel in the
// piece's image.
template <class Traits>
__device__ __forceinline__ float sum_of_pairs(const GradWeightArgs& args, const Piece& piece, int tap,
                                              const typename Traits::T* grad, const typename Traits::T* input,
                                              int pixel) {
  float sum = 0;
  const int tap_h = tap / Traits::kKernelW * Traits::kDilationH - args.padding_h;
  const int tap_w = tap % Traits::kKernelW * Traits::kDilationW - args.padding_w;
  for (int t = piece.begin; t < piece.end; ++t) {
    const int out_h = piece.residue + t * Traits::kDilationH;
    const int h = out_h * Traits::kStrideH + tap_h;
    if (h < 0 || h >= args.h) continue;
    for (int out_w = piece.column; out_w < min(piece.column + Traits::kColumns, args.out_w); ++out_w) {
      const int w = out_w * Traits::kStrideW + tap_w;
      if (w >= 0 && w < args.w)
        sum = fmaf(load(grad + (static_cast<int64_t>(out_h) * args.out_w + out_w) * pixel),
                   load(input + (static_cast<int64_t>(h) * args.w + w) * pixel), sum);
    }
  }
  return sum;
}

// What `count` threads left in shared memory, `step` apart, eight at a time and in parts of 64 (see sum_of_eight).
__device__ __forceinline__ float sum_in_parts(const float* terms, int count, int step) {
  float sum = 0, part = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += 8) {
    float term[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) term[k] = first + k < count ? terms[(first + k) * step] : 0;
    part += sum_of_eight(term);
    if (first % 64 == 56) sum += part, part = 0;
  }
  return sum + part;
}

// Writes one sum of the block: `tap` kTaps is the bias.
template <class Traits>
__device__ __forceinline__ void store_sum(const GradWeightArgs& args, int64_t split, int64_t channel, int tap,
                                          float value) {
  using T = typename Traits::T;
  if (tap < Traits::kTaps) {
    if (args.grad_weight)
      store_gradient<T>(args.grad_weight, args.float_weight, channel * Traits::kTaps + tap, value);
    else
      args.partial[(split * args.out_c + channel) * Traits::kTaps + tap] = value;
  } else if (args.grad_weight ? args.grad_bias != nullptr : args.partial_bias != nullptr) {
    if (args.grad_weight)
      store_gradient<T>(args.grad_bias, args.float_weight, channel, value);
    else
      args.partial_bias[split * args.out_c + channel] = value;
  }
}

}  // namespace depthwise
