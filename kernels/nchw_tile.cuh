// What the NCHW kernels that keep their filter in registers share: rows of a thread's window, and how it rolls down the rows
// of its outputs; runs of what they store.
#pragma once

#include "direct.cuh"

namespace depthwise {

constexpr int kStreamThreads = 256;  // a block of stream_nchw and planes_nchw, at most

template <class T_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_,
          int kPhase_>
struct NchwTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_, kKernelW = kKernelW_;
  static constexpr int kStrideH = kStrideH_, kStrideW = kStrideW_;
  static constexpr int kDilationH = kDilationH_, kDilationW = kDilationW_;
  // Where a window starts within an aligned word of input: the horizontal padding but for whole words.
  static constexpr int kPhase = kPhase_;
  static constexpr int kTaps = kKernelH * kKernelW;
};

// One row of a thread's input window, whose elements kUsed marks, read in aligned words of kVector elements. The window
// starts kPhase elements left of a word's boundary. Words may straddle the ends of rows if kStraddles.
template <class T, int kWindow_, uint64_t kUsed_, int kVector, int kPhase, bool kStraddles = false>
struct WindowRow {
  static constexpr int kWindow = kWindow_;
  static constexpr uint64_t kUsed = kUsed_;
  static_assert(kWindow <= 64);
  static constexpr int kFirstWord = floor_divide(-kPhase, kVector);
  static constexpr int kWords = floor_divide(kWindow - 1 - kPhase, kVector) - kFirstWord + 1;

  // The part [low, high) of word `word` that the window uses; low == high: none.
  static constexpr int low(int word) {
    for (int k = 0; k < kVector; ++k)
      if (used(word, k)) return k;
    return 0;
  }
  static constexpr int high(int word) {
    for (int k = kVector; k > 0; --k)
      if (used(word, k - 1)) return k;
    return 0;
  }
  static constexpr bool used(int word, int k) {
    const int offset = (kFirstWord + word) * kVector + k + kPhase;
    return offset >= 0 && offset < kWindow && (kUsed >> offset & 1);
  }
  // The smallest aligned power of two that covers the used part: an edge word that gives one column is a narrow load.
  static constexpr int load_width(int word) {
    int width = 1;
    while (low(word) / width != (high(word) - 1) / width) width *= 2;
    return width;
  }

  // The row as it lies in memory, its phase at `column`, which is where `memory` points; unused elements never become
  // registers. `Memory` loads words, or zeros where a word holds no element of the row.
  template <class Memory, int kWord = 0>
  __device__ __forceinline__ static void load(T (&window)[kWindow], const T* memory, int column, int width,
                                              bool row_in_bounds) {
    if constexpr (kWord < kWords) {
      constexpr int kLow = low(kWord), kHigh = high(kWord);
      if constexpr (kLow < kHigh) {
        constexpr int kWidth = load_width(kWord);
        constexpr int kStart = (kFirstWord + kWord) * kVector + kLow / kWidth * kWidth;
        const int start = column + kStart;
        const bool in_bounds =
            kStraddles ? start > -kWidth && start < width : static_cast<unsigned>(start) < static_cast<unsigned>(width);
        const auto words = Memory::template load<kWidth>(memory + kStart, row_in_bounds && in_bounds);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          constexpr int kBase = kStart + kPhase;
          if (kBase + k >= 0 && kBase + k < kWindow) window[kBase + k] = words.value[k];
        }
      }
      load<Memory, kWord + 1>(window, memory, column, width, row_in_bounds);
    }
  }
};

// The row of kColumns neighbouring outputs.
template <class Traits, int kColumns, int kVector>
struct NchwRow
    : WindowRow<typename Traits::T, window_size(kColumns, Traits::kStrideW, Traits::kKernelW, Traits::kDilationW),
                window_mask(kColumns, Traits::kStrideW, Traits::kKernelW, Traits::kDilationW), kVector,
                Traits::kPhase> {
  static_assert(kColumns * Traits::kStrideW % kVector == 0, "a thread's window must start on a load boundary");
};

// The input column of a window's phase, for outputs from `column` on.
template <class Traits>
__device__ __forceinline__ int window_column(const DirectArgs& args, int column) {
  return column * Traits::kStrideW - (args.padding_w - Traits::kPhase);
}

struct GlobalMemory {
  template <int kCount, class T>
  __device__ __forceinline__ static Vector<T, kCount> load(const T* pointer, bool in_bounds) {
    return load_or_zero<kCount>(pointer, in_bounds);
  }
};

struct SharedMemory {
  template <int kCount, class T>
  __device__ __forceinline__ static Vector<T, kCount> load(const T* pointer, bool in_bounds) {
    VectorWord<T, kCount> bits;
    bits.word = {};
    if (in_bounds) bits.word = *reinterpret_cast<const decltype(bits.word)*>(pointer);
    return bits.vector;
  }
};

template <class Traits>
__device__ __forceinline__ void load_filter(float (&weight)[Traits::kTaps], const DirectArgs& args, unsigned channel) {
  using T = typename Traits::T;
  const auto* const filter = filters_of<Traits>(args, channel, Traits::kTaps);
  float straight[Traits::kTaps];
#pragma unroll
  for (int tap = 0; tap < Traits::kTaps; ++tap) straight[tap] = load_for_sums<T>(filter + tap);
#pragma unroll
  for (int tap = 0; tap < Traits::kTaps; ++tap)
    weight[tap] = args.flip ? straight[Traits::kTaps - 1 - tap] : straight[tap];
}

// Stores the part of a row that lies below `width`, kWidth elements at a time.
template <int kWidth, bool kStreaming, class T, int kColumns>
__device__ __forceinline__ void store_row(T* row, int column, int width, const float (&values)[kColumns]) {
#pragma unroll
  for (int v = 0; v < kColumns; v += kWidth) {
    if (column + v >= width) continue;
    Vector<T, kWidth> part;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) part.value[k] = from_float<T>(values[v + k]);
    if constexpr (kStreaming)
      store_streaming(row + column + v, part);
    else
      *reinterpret_cast<Vector<T, kWidth>*>(row + column + v) = part;
  }
}

// So many registers are best left to the compiler, which spills in as few as it would take by itself beyond that.
constexpr int rolling_registers_by_compiler() {
#if __CUDA_ARCH__ >= 800
  return 88;
#else
  return 80;
#endif
}

// kColumns neighbouring outputs of every row that a thread walks down. An input row is read and converted once, and added
// to all output rows that it meets: kLiveRows rows of sums, whose registers are fixed by unrolling a stage.
template <class Traits, int kColumns, int kVector>
struct RollingColumns : RollingShape<Traits> {
  using T = typename Traits::T;
  using Shape = RollingShape<Traits>;
  using Row = NchwRow<Traits, kColumns, kVector>;

  // Blocks of kStreamThreads that a multiprocessor's registers hold without spills, with 40 for addresses, and 4 more where
  // weights are rounded; 0 leaves the fewest registers to the compiler.
  static constexpr int kRegisters =
      Traits::kTaps + Shape::kLiveRows * kColumns + Row::kWindow + (sizeof(weight_t<Traits>) > sizeof(T) ? 44 : 40);
  static constexpr int kBlocks = kRegisters <= rolling_registers_by_compiler() ? 0 : kRegisters <= 128 ? 2 : 1;

  float weight[Traits::kTaps];
  float bias;
  float sum[Shape::kLiveRows][kColumns] = {};

  __device__ __forceinline__ void load_channel(const DirectArgs& args, unsigned channel) {
    load_filter<Traits>(weight, args, channel);
    bias = bias_of<Traits>(args, channel);
  }

  // load_row(window, r) reads input row r of the stage; store(o, sums) takes output row o, counted from the one whose
  // first tap is the stage's first row: rows that earlier stages began are negative.
  template <class LoadRow, class StoreRow>
  __device__ __forceinline__ void stage(LoadRow&& load_row, StoreRow&& store) {
#pragma unroll
    for (int r = 0; r < Shape::kStageRows; ++r) {
      T row[Row::kWindow];
      load_row(row, r);
      float window[Row::kWindow];
#pragma unroll
      for (int k = 0; k < Row::kWindow; ++k)
        if (Row::kUsed >> k & 1) window[k] = to_float(row[k]);
#pragma unroll
      for (int i = 0; i < Traits::kKernelH; ++i) {
        if (!Shape::meets(r, i)) continue;
        const int o = Shape::output_row(r, i);
        float (&row_sum)[kColumns] = sum[(o + Shape::kStageOutputs * Shape::kLiveRows) % Shape::kLiveRows];
#pragma unroll
        for (int j = 0; j < Traits::kKernelW; ++j)
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
            row_sum[v] = fmaf(window[v * Traits::kStrideW + j * Traits::kDilationW], weight[i * Traits::kKernelW + j],
                              i == 0 && j == 0 ? bias : row_sum[v]);
        if (i == Traits::kKernelH - 1) store(o, row_sum);
      }
    }
  }
};

// Outputs of several rows or planes are one run in memory: whole 16-byte granules but for the two ends. `staged` holds
// the run [begin, end) with begin as far from a 16-byte boundary as `out` is.
template <class T>
__device__ __forceinline__ void store_run(T* out, const T* staged, int begin, int end) {
  constexpr int kGranule = 16 / sizeof(T);
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(out) % 16 / sizeof(T));
  for (int k = threadIdx.x * kGranule; k < skew + end; k += blockDim.x * kGranule) {
    if (k >= skew + begin && k + kGranule <= skew + end) {
      store_streaming(out - skew + k, *reinterpret_cast<const Vector<T, kGranule>*>(staged - skew + k));
    } else {
      for (int e = max(k, skew + begin); e < min(k + kGranule, skew + end); ++e) out[e - skew] = staged[e - skew];
    }
  }
}

}  // namespace depthwise
