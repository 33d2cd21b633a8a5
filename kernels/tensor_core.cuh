// Warp-wide building blocks of the tensor-core kernels.
//
// Fragments of D[16][8] += A[16][K] * B[K][8], for lane = 4 * g + t (g 0..7, t 0..3); a register holds two neighbouring
// 16-bit elements, the first in its low half:
//   A   a[0] = A[g][2t, 2t+1], a[1] = A[g + 8][2t, 2t+1]; K = 16: a[2], a[3] the same at columns 2t + 8
//   B   b[0] = B[2t, 2t+1][g]; K = 16: b[1] = B[2t + 8, 2t + 9][g]
//   D   d[0], d[1] = D[g][2t, 2t+1]; d[2], d[3] = D[g + 8][2t, 2t+1]
// So K = 16 is two K = 8 side by side, and any two neighbouring chunks of eight columns make one.
#pragma once

#include "async_copy.cuh"

namespace depthwise {

template <class T>
constexpr bool is_bfloat16 = false;
template <>
inline constexpr bool is_bfloat16<bfloat16> = true;

// Two values as the 16-bit halves of a register.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
#if __CUDA_ARCH__ >= 800
  return is_bfloat16<T> ? ptx::to_bfloat16x2(low, high) : ptx::to_float16x2(low, high);
#else
  return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
#endif
}

// Of a run of pairs: whether one is not finite. Starts as zero; what comes out says so to is_poisoned.
template <class T>
__device__ __forceinline__ unsigned probe_pair(unsigned probe, unsigned pair) {
  if constexpr (!is_bfloat16<T>) return ptx::probe_float16_pair(probe, pair);
#if __CUDA_ARCH__ >= 800
  return ptx::probe_bfloat16_pair(probe, pair);
#else
  constexpr unsigned kExponent = 0x7f80;
  return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent ? ~0u : probe;
#endif
}
__device__ __forceinline__ bool is_poisoned(unsigned probe) { return (probe & 0x7fff7fff) != 0; }

// The sums of a warp's products.
template <int kRows, int kColumns>
__device__ __forceinline__ void start_sums(float (&sum)[kRows][kColumns][4], float bias) {
#pragma unroll
  for (int a = 0; a < kRows; ++a)
#pragma unroll
    for (int b = 0; b < kColumns; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[a][b][e] = bias;
}
// Whether some are NaN. One chain of additions is a wait of some hundred cycles; four take registers.
template <int kChains = 1, int kRows, int kColumns>
__device__ __forceinline__ bool has_nan(const float (&sum)[kRows][kColumns][4]) {
  float probe[kChains] = {};
#pragma unroll
  for (int a = 0; a < kRows; ++a)
#pragma unroll
    for (int b = 0; b < kColumns; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) probe[e % kChains] += sum[a][b][e];
  float all = 0;
#pragma unroll
  for (int k = 0; k < kChains; ++k) all += probe[k];
  return all != all;
}

// What an architecture lacks (bf16 before sm_80): the product of K = 8 by shuffles and plain multiply-adds. A function,
// as hundreds of copies would take minutes to compile.
template <class T>
__device__ __noinline__ float4 multiply_by_shuffles(float4 d, unsigned a0, unsigned a1, unsigned b0) {
  const auto half = [](unsigned pair, int k) { return to_float(T{static_cast<unsigned short>(pair >> 16 * k)}); };
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const unsigned row[2] = {__shfl_sync(~0u, a0, lane / 4 * 4 + t), __shfl_sync(~0u, a1, lane / 4 * 4 + t)};
    const unsigned column[2] = {__shfl_sync(~0u, b0, lane % 4 * 8 + t), __shfl_sync(~0u, b0, lane % 4 * 8 + 4 + t)};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      d.x = fmaf(half(row[0], k), half(column[0], k), d.x);
      d.y = fmaf(half(row[0], k), half(column[1], k), d.y);
      d.z = fmaf(half(row[1], k), half(column[0], k), d.z);
      d.w = fmaf(half(row[1], k), half(column[1], k), d.w);
    }
  }
  return d;
}

// d += A * B with K = 8.
template <class T>
__device__ __forceinline__ void multiply_k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
  if constexpr (!is_bfloat16<T>) {
    ptx::multiply_float16(d, a0, a1, b0);
  } else {
#if __CUDA_ARCH__ >= 800
    ptx::multiply_bfloat16(d, a0, a1, b0);
#else
    const float4 sum = multiply_by_shuffles<T>(make_float4(d[0], d[1], d[2], d[3]), a0, a1, b0);
    d[0] = sum.x, d[1] = sum.y, d[2] = sum.z, d[3] = sum.w;
#endif
  }
}

// d += A * B with K = 16, the chunks of eight given one after the other; sm_75 takes two steps.
template <class T>
__device__ __forceinline__ void multiply_k16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                             unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (is_bfloat16<T>)
    ptx::multiply_bfloat16(d, a0, a1, a2, a3, b0, b1);
  else
    ptx::multiply_float16(d, a0, a1, a2, a3, b0, b1);
#else
  multiply_k8<T>(d, a0, a1, b0);
  multiply_k8<T>(d, a2, a3, b1);
#endif
}

}  // namespace depthwise
