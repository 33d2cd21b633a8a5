// Typed memory access of 1, 2, 4, 8 or 16 bytes, and conversion to and from the fp32 accumulators.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace depthwise {

// The 16-bit types, as bits. CUDA's own headers for them cost half a second of compilation for each of the passes of
// nvcc, which is more than most kernels here.
struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <int kBytes>
struct RawWord;
template <>
struct RawWord<2> {
  using type = unsigned short;
};
template <>
struct RawWord<4> {
  using type = unsigned int;
};
template <>
struct RawWord<8> {
  using type = uint2;
};
template <>
struct RawWord<16> {
  using type = uint4;
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T value[kCount];
};

// A vector, and the word as which one instruction moves it. Zeros are assigned to the word: initialised with {}, nvcc 13.0
// makes blocked kernels of float16 up to 3% longer.
template <class T, int kCount>
struct VectorWord {
  using Word = typename RawWord<sizeof(T) * kCount>::type;
  static_assert(sizeof(Vector<T, kCount>) == sizeof(Word));
  union {
    Word word;
    Vector<T, kCount> vector;
  };
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(float16 value) { return ptx::from_float16(value.bits); }
__device__ __forceinline__ float to_float(bfloat16 value) { return ptx::from_bfloat16(value.bits); }

// The two 16-bit values of a register.
template <class T>
__device__ __forceinline__ float low_to_float(unsigned word) {
  return to_float(T{static_cast<unsigned short>(word)});
}
template <>
__device__ __forceinline__ float low_to_float<bfloat16>(unsigned word) {
  return __uint_as_float(word << 16);
}
template <class T>
__device__ __forceinline__ float high_to_float(unsigned word) {
  return to_float(T{static_cast<unsigned short>(word >> 16)});
}
template <>
__device__ __forceinline__ float high_to_float<bfloat16>(unsigned word) {
  return __uint_as_float(word & 0xffff0000u);
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float value) {
  return {ptx::to_float16(value)};
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
#if __CUDA_ARCH__ >= 800
  return {ptx::to_bfloat16(value)};
#else
  const unsigned bits = __float_as_uint(value);  // to nearest even; NaN stays NaN
  const unsigned rounded = bits + 0x7fffu + (bits >> 16 & 1);
  return {static_cast<unsigned short>((value != value ? bits | 0x400000u : rounded) >> 16)};
#endif
}

// One element, read-only.
__device__ __forceinline__ float load(const float* pointer) { return __ldg(pointer); }
__device__ __forceinline__ double load(const double* pointer) { return __ldg(pointer); }
template <class T>
__device__ __forceinline__ float load(const T* pointer) {
  return to_float(T{__ldg(&pointer->bits)});
}

// One read-only load; a false predicate reads nothing and gives zeros.
template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load_or_zero(const T* pointer, bool in_bounds) {
  VectorWord<T, kCount> bits;
  bits.word = {};
  if (in_bounds) bits.word = __ldg(reinterpret_cast<const decltype(bits.word)*>(pointer));
  return bits.vector;
}

// One store that marks its line as first to leave the cache: an output is not read again by the kernel that wrote it.
template <int kCount, class T>
__device__ __forceinline__ void store_streaming(T* pointer, const Vector<T, kCount>& vector) {
  VectorWord<T, kCount> bits;
  bits.vector = vector;
  __stcs(reinterpret_cast<decltype(bits.word)*>(pointer), bits.word);
}

template <int kCount, class T>
__device__ __forceinline__ void store_streaming(T* pointer, const float (&values)[kCount]) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int k = 0; k < kCount; ++k) vector.value[k] = from_float<T>(values[k]);
  store_streaming(pointer, vector);
}

}  // namespace depthwise
