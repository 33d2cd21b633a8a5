// Rows of 16-bit elements that begin on any boundary of two bytes, eight elements at a time: the aligned words that hold
// them are read, shifted to where they belong and stored to shared memory together. Words that reach beyond the tensor
// are not read, but what they hold of it element by element.
#pragma once

#include "vector.cuh"

namespace depthwise {

constexpr int kEight = 8;  // elements: 16 bytes of shared memory

// Which bits of eight elements are those of the first `valid` ones.
struct EightMask {
  unsigned word[kEight / 2];

  __device__ __forceinline__ explicit EightMask(int valid) {
#pragma unroll
    for (int k = 0; k < kEight / 2; ++k) word[k] = valid > 2 * k + 1 ? ~0u : valid > 2 * k ? 0xffffu : 0;
  }
};
// Of the last eight elements of a row.
__device__ __forceinline__ EightMask last_eight(int columns) { return EightMask((columns + kEight - 1) % kEight + 1); }

// A tensor of which rows are read.
struct UnalignedTensor {
  const void *begin, *end;
};

// Eight neighbouring elements on their way to shared memory.
struct UnalignedEight {
  static constexpr int kWords = kEight / 2 + 1;  // as many aligned ones hold them, wherever they begin
  unsigned word[kWords], shift;

  // False, and nothing is read, where those words do not all lie in the tensor.
  __device__ __forceinline__ bool load(const UnalignedTensor& tensor, const void* from) {
    const auto* const words = reinterpret_cast<const unsigned*>(reinterpret_cast<uintptr_t>(from) & ~uintptr_t{3});
    const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
    shift = static_cast<unsigned>(address(from) & 2) * 8;
    if (address(words) < address(tensor.begin) || address(words + kWords) > address(tensor.end)) return false;
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = __ldg(words + k);
    return true;
  }

  // The same of sixteen aligned bytes, and of elements one by one, of which `valid` exist.
  __device__ __forceinline__ void load_aligned(const void* from) {
    const uint4 words = __ldg(static_cast<const uint4*>(from));
    shift = 0;
    word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
  }
  template <class T>
  __device__ __forceinline__ void load_some(const T* from, int valid) {
    clear();
#pragma unroll
    for (int k = 0; k < kEight; ++k)
      if (k < valid) word[k / 2] |= static_cast<unsigned>(__ldg(&from[k].bits)) << k % 2 * 16;
  }

  __device__ __forceinline__ void clear() {
    shift = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = 0;
  }

  // To sixteen aligned bytes; zeros where neither the mask nor `all` has ones.
  __device__ __forceinline__ void store(void* shared, const EightMask& mask, unsigned all = 0) const {
    const auto shifted = [&](int k) { return __funnelshift_r(word[k], word[k + 1], shift) & (mask.word[k] | all); };
    *static_cast<uint4*>(shared) = uint4{shifted(0), shifted(1), shifted(2), shifted(3)};
  }
};

// The same element by element, of which `valid` exist.
template <class T>
__device__ __forceinline__ void copy_eight(T* shared, const T* from, int valid) {
#pragma unroll 1
  for (int k = 0; k < kEight; ++k) shared[k] = load_or_zero<1>(from + k, k < valid).value[0];
}

}  // namespace depthwise
