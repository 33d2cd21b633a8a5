// What kernels of many families share, and their launchers: the device's limits and architecture, dividers, filters, sums,
// and how threads of streaming kernels roll down rows.
#pragma once

#include <utility>

#include "problem.h"
#include "vector.cuh"
#include "weights.cuh"

namespace depthwise {

template <class Body, int... kIndices>
__device__ __forceinline__ void for_each_index(std::integer_sequence<int, kIndices...>, Body&& body) {
  (body(std::integral_constant<int, kIndices>{}), ...);
}
// Calls body(0), body(1), ... with constants. In an unrolled loop an index is no constant expression: functions of it
// that loop themselves are evaluated when the kernel runs, and what they index lies in local memory.
template <int kCount, class Body>
__device__ __forceinline__ void for_each_index(Body&& body) {
  for_each_index(std::make_integer_sequence<int, kCount>{}, body);
}

// What the launchers need to know of the current device.
struct DeviceLimits {
  int multiprocessors, shared_bytes, shared_bytes_block;  // shared memory of a multiprocessor, and of a block at most
  int l2_bytes;
  int clusters;  // whether blocks can be launched in clusters, which write to each other's shared memory

  // What a block may take so that `blocks` of them share a multiprocessor; each costs 1 KB of its own.
  int shared_bytes_for(int blocks) const {
    return min_int(shared_bytes_block, max_int(kSharedBytesEverywhere, shared_bytes / blocks - (1 << 10)));
  }
};

// Read anew when a thread changes to another device.
inline const DeviceLimits& device_limits() {
  thread_local DeviceLimits limits{1, 64 << 10, 48 << 10, 0, 0};
  thread_local int known = -1;
  int device = 0;
  cudaGetDevice(&device);
  if (device != known) {
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&limits.shared_bytes_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&limits.l2_bytes, cudaDevAttrL2CacheSize, device);
    cudaDeviceGetAttribute(&limits.clusters, cudaDevAttrClusterLaunch, device);
    known = device;
  }
  return limits;
}

// For which architecture the current device's code of `kernel` was compiled: 90 for sm_90, though the device may be a later
// one.
template <class Kernel>
int compiled_architecture(Kernel kernel) {
  thread_local int known = -1, architecture = 0;
  int device = 0;
  cudaGetDevice(&device);
  if (device != known) {
    cudaFuncAttributes attributes{};
    architecture = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? attributes.ptxVersion : 0;
    known = device;
  }
  return architecture;
}
template <class Kernel>
bool is_compiled_for_sm90(Kernel kernel) {
  return compiled_architecture(kernel) >= 90;
}

// More than 48 KB of shared memory, with the `static_bytes` that the kernel declares, has to be asked for.
template <class Kernel>
int allow_shared_bytes(Kernel kernel, int bytes, int static_bytes = 0) {
  if (bytes + static_bytes <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Elements a copy may take: a power of two up to `most` that divides the rows and the address.
inline int copy_width(const void* tensor, int64_t row, int most = 8, int element_bytes = 2) {
  int width = most;
  while (row % width != 0 || reinterpret_cast<uintptr_t>(tensor) / element_bytes % width != 0) width /= 2;
  return width;
}

// Calls body(kVector) with the constant that `vector`, a copy_width, is.
template <class Body>
__device__ __forceinline__ void with_vector(int vector, Body&& body) {
  switch (vector) {
    case 8: return body(std::integral_constant<int, 8>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 2: return body(std::integral_constant<int, 2>{});
    default: return body(std::integral_constant<int, 1>{});
  }
}

// Division by a number known at launch alone: a multiplication and a shift. For dividends below 2^31.
struct IntDivider {
  unsigned divisor, factor, shift;

  explicit IntDivider(unsigned divisor) : divisor(divisor), shift(31) {
    while (uint64_t{1} << (shift - 31) < divisor) ++shift;
    factor = static_cast<unsigned>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ unsigned quotient(unsigned dividend) const {
    return static_cast<unsigned>(static_cast<uint64_t>(dividend) * factor >> shift);
  }
};

// The same, for dividends below 2048 whose product with the divisor is below 2^20.
struct SmallDivider {
  int factor = 0;

  SmallDivider() = default;
  explicit SmallDivider(int divisor) : factor((1 << 20) / divisor + 1) {}
  __device__ __forceinline__ int quotient(int dividend) const { return dividend * factor >> 20; }
};

// Walks (outer, middle, inner) in steps of `step` items without a division a step.
struct Walk {
  int inner, middle, outer;
  int inners, middles, step_inner, step_middle, step_outer;

  __device__ Walk(int start, int step, int inners, int middles) : inners(inners), middles(middles) {
    inner = start % inners, outer = start / inners;
    middle = outer % middles, outer /= middles;
    step_inner = step % inners, step_outer = step / inners;
    step_middle = step_outer % middles, step_outer /= middles;
  }
  __device__ __forceinline__ void advance() {
    inner += step_inner, middle += step_middle, outer += step_outer;
    if (inner >= inners) inner -= inners, ++middle;
    if (middle >= middles) middle -= middles, ++outer;
  }
};

template <class T_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_>
struct NhwcTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_, kKernelW = kKernelW_;
  static constexpr int kStrideH = kStrideH_, kStrideW = kStrideW_;
  static constexpr int kDilationH = kDilationH_, kDilationW = kDilationW_;
};

// Into how many strips to cut each of `count` images of `rows` rows, when `concurrent` blocks run at once and a strip
// costs `overhead` rows beside its own: waves of blocks that leave few multiprocessors idle at the end.
inline int best_strips(int64_t count, int concurrent, int rows, int min_rows, int overhead) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int strips = 1; strips <= max_int(1, min_int(64, rows / min_rows)); ++strips) {
    const int64_t waves = divide_up<int64_t>(count * strips, max_int(1, concurrent));
    const int64_t cost = waves * (divide_up(rows, strips) + overhead);
    if (cost < least) least = cost, best = strips;
  }
  return best;
}

// How a thread rolls down the rows of its columns: a stage is as many input rows as begin kStageOutputs output rows.
template <class Traits>
struct RollingShape {
  static constexpr int kSpan = (Traits::kKernelH - 1) * Traits::kDilationH + 1;
  // Output rows that one input row may meet. A stage is a multiple of them, so that its sums' registers are fixed.
  static constexpr int kLiveRows = rolling_live_rows(Traits::kKernelH, Traits::kStrideH, Traits::kDilationH);
  static constexpr int kStageOutputs = rolling_stage_outputs(kLiveRows);
  static constexpr int kStageRows = kStageOutputs * Traits::kStrideH;
  static constexpr int kLag = kLiveRows - 1;  // output rows that a stage begins and does not complete

  // Whether row r of a stage meets tap row i of an output row, and of which, counted from the stage's first.
  static constexpr bool meets(int r, int i) {
    return (r - i * Traits::kDilationH + Traits::kStrideH * kSpan) % Traits::kStrideH == 0;
  }
  static constexpr int output_row(int r, int i) {
    return (r - i * Traits::kDilationH + Traits::kStrideH * kSpan) / Traits::kStrideH - kSpan;
  }
};

// By pairs: equal terms, such as those of the grad of bias of a mean, would round the same way every time that one more is
// added to a sum; doubled, they do not round.
template <class T>
__device__ __forceinline__ T sum_of_eight(const T (&term)[8]) {
  return ((term[0] + term[1]) + (term[2] + term[3])) + ((term[4] + term[5]) + (term[6] + term[7]));
}

// Filters are [channel][tap] in memory: those of a thread's kVector channels are contiguous.
template <class Traits, int kVector>
__device__ __forceinline__ void load_filters(float (&weight)[Traits::kKernelH * Traits::kKernelW][kVector],
                                             const weight_t<Traits>* filters, bool flip_rows, bool flip_columns) {
  constexpr int kKernelW = Traits::kKernelW, kTaps = Traits::kKernelH * kKernelW;
  Vector<typename Traits::T, kVector> packed[kTaps];
#pragma unroll
  for (int k = 0; k < kTaps; ++k) packed[k] = load_rounded<typename Traits::T, kVector>(filters + k * kVector);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const auto element = [&](int row, int column) {
        const int k = e * kTaps + row * kKernelW + column;
        return packed[k / kVector].value[k % kVector];
      };
      const int row = tap / kKernelW, column = tap % kKernelW;
      const auto of_row = [&](int r) { return flip_columns ? element(r, kKernelW - 1 - column) : element(r, column); };
      weight[tap][e] = to_float(flip_rows ? of_row(Traits::kKernelH - 1 - row) : of_row(row));
    }
}

}  // namespace depthwise
