// Rows of 16-bit elements that begin on any boundary of two bytes, eight elements at a time: the aligned words that hold
// them are read, shifted to where they belong and stored to shared memory together. Words that reach beyond the tensor
// are not read, but what they hold of it element by element.
#pragma once

#include "vector.cuh"

namespace depthwise {

constexpr int kEight = 8;  // elements: 16 bytes of shared memory

// Which bits of the last eight elements of a row of `columns` belong to it.
struct LastEight {
  unsigned word[kEight / 2];

  __device__ __forceinline__ explicit LastEight(int columns) {
    const int valid = columns % kEight == 0 ? kEight : columns % kEight;
#pragma unroll
    for (int k = 0; k < kEight / 2; ++k) word[k] = valid > 2 * k + 1 ? ~0u : valid > 2 * k ? 0xffffu : 0;
  }
};

// A tensor of which rows are read.
template <class T>
struct UnalignedTensor {
  const T *begin, *end;

  __device__ __forceinline__ UnalignedTensor(const void* tensor, int64_t elements)
      : begin(static_cast<const T*>(tensor)), end(begin + elements) {
    static_assert(sizeof(T) == 2);
  }
};

// Eight neighbouring elements on their way. Of the last of a row, `valid` exist.
struct UnalignedEight {
  static constexpr int kWords = kEight / 2 + 1;  // as many aligned ones hold them, wherever they begin
  unsigned word[kWords], shift;

  template <class T>
  __device__ __forceinline__ void load(const UnalignedTensor<T>& tensor, const T* from, int valid) {
    const auto* const words = reinterpret_cast<const unsigned*>(reinterpret_cast<uintptr_t>(from) & ~uintptr_t{3});
    const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
    shift = static_cast<unsigned>(address(from) & 2) * 8;
    if (address(words) >= address(tensor.begin) && address(words + kWords) <= address(tensor.end)) {
#pragma unroll
      for (int k = 0; k < kWords; ++k) word[k] = __ldg(words + k);
      return;
    }
    shift = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = 0;
#pragma unroll
    for (int k = 0; k < kEight; ++k)
      word[k / 2] |= static_cast<unsigned>(load_or_zero<1>(from + k, k < valid).value[0].bits) << k % 2 * 16;
  }

  __device__ __forceinline__ void clear() {
    shift = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = 0;
  }

  // To sixteen aligned bytes; zeros behind the row's end.
  __device__ __forceinline__ void store(void* shared, const LastEight& last, bool is_last) const {
    const unsigned all = is_last ? 0 : ~0u;
    const auto shifted = [&](int k) { return __funnelshift_r(word[k], word[k + 1], shift) & (last.word[k] | all); };
    *static_cast<uint4*>(shared) = uint4{shifted(0), shifted(1), shifted(2), shifted(3)};
  }
};

}  // namespace depthwise
