// Reads weight and bias, stores their gradients. Beside 16-bit tensors they may be float32, as autocast finds a module's
// parameters: rounded where they are read, they are what its casts would have left, without the launches of these. Kernels
// that read them are compiled for either; those that store gradients are told (GradWeightArgs::float_weight).
#pragma once

#include <cstdint>

#include "async_copy.cuh"
#include "problem.h"
#include "vector.cuh"

namespace depthwise {

// Traits of a kernel whose weight and bias are float32.
template <class Traits>
struct WithFloatWeight : Traits {};

template <class Traits>
struct WeightOf {
  using type = typename Traits::T;
};
template <class Traits>
struct WeightOf<WithFloatWeight<Traits>> {
  using type = float;
};
template <class Traits>
using weight_t = typename WeightOf<Traits>::type;

// The filters from that of `channel` on, of so many taps.
template <class Traits>
__device__ __forceinline__ const weight_t<Traits>* filters_of(const DirectArgs& args, int64_t channel, int taps) {
  return static_cast<const weight_t<Traits>*>(args.weight) + channel * taps;
}

// A stored value as one of T, the tensors' dtype.
template <class T, class Stored>
__device__ __forceinline__ T round_to(Stored value) {
  if constexpr (sizeof(Stored) == sizeof(T))
    return value;
  else
    return from_float<T>(value);
}

// An element so rounded, in the type of the sums.
template <class T, class Stored>
__device__ __forceinline__ auto load_for_sums(const Stored* pointer) {
  if constexpr (sizeof(Stored) == sizeof(T))
    return load(pointer);
  else
    return to_float(round_to<T>(load(pointer)));
}

// kCount elements so rounded; a false predicate reads nothing and gives zeros.
template <class T, int kCount, class Stored>
__device__ __forceinline__ Vector<T, kCount> load_rounded(const Stored* pointer, bool in_bounds = true) {
  if constexpr (sizeof(Stored) == sizeof(T)) {
    return load_or_zero<kCount>(pointer, in_bounds);
  } else {
    constexpr int kLoad = min_int(kCount, 16 / static_cast<int>(sizeof(Stored)));
    Vector<T, kCount> rounded;
#pragma unroll
    for (int v = 0; v < kCount; v += kLoad) {
      const auto part = load_or_zero<kLoad>(pointer + v, in_bounds);
#pragma unroll
      for (int k = 0; k < kLoad; ++k) rounded.value[v + k] = round_to<T>(part.value[k]);
    }
    return rounded;
  }
}
template <class T, class Stored>
__device__ __forceinline__ T load_rounded(const Stored* pointer, bool in_bounds = true) {
  return load_rounded<T, 1>(pointer, in_bounds).value[0];
}

// kCount elements for shared memory, to be waited for like asynchronous copies and with a barrier.
template <class T, int kCount, class Stored>
__device__ __forceinline__ void copy_weights(T* shared, const Stored* global) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  if constexpr (sizeof(Stored) == sizeof(T) && kBytes >= 4) {
    copy_async<kBytes>(shared, global);
  } else {
    VectorWord<T, kCount> bits;
    bits.vector = load_rounded<T, kCount>(global);
    *reinterpret_cast<decltype(bits.word)*>(shared) = bits.word;
  }
}

// The biases of kCount channels from `channel` on; zeros where there are none.
template <class Traits, int kCount>
__device__ __forceinline__ Vector<typename Traits::T, kCount> load_biases(const DirectArgs& args, int64_t channel) {
  Vector<typename Traits::T, kCount> bias{};
  if (args.bias)
    bias = load_rounded<typename Traits::T, kCount>(static_cast<const weight_t<Traits>*>(args.bias) + channel);
  return bias;
}
// Of one channel: `index` apart from `first`, so that a loop over it adds to one pointer.
template <class Traits>
__device__ __forceinline__ float bias_of(const DirectArgs& args, int64_t first, int index = 0) {
  const auto* const biases = static_cast<const weight_t<Traits>*>(args.bias);
  return biases ? load_for_sums<typename Traits::T>(biases + first + index) : 0.f;
}

// An element of grad_weight or grad_bias.
template <class T>
__device__ __forceinline__ void store_gradient(void* gradient, bool float_weight, int64_t idx, float value) {
  if (sizeof(T) == 2 && float_weight)
    static_cast<float*>(gradient)[idx] = value;
  else
    static_cast<T*>(gradient)[idx] = from_float<T>(value);
}

}  // namespace depthwise
