// How soon the L2 cache gives up the lines of tensors that are read once: on sm_90, first of all if it is told so.
//
// A cache that is full of what other kernels wrote has to write that to memory before it takes in anything new; lines
// that leave first make room for each other instead. grad of weight, 32x144x56x56, 3x3, fp16, H100: 38.4 -> 35.2 us, in
// channels_last 43.7 -> 41.2. It costs where rows are read twice, by neighbouring blocks: forward reads its input as any
// other (28.1 -> 30.5 us), and so do gradients of tensors much larger than the cache (evicts_first in grad_weight.cu).
// Forward by image_bands, whose loads read every element once, gains (5x5, 32x672x14x14, fp16, H100: 14.7 -> 14.5 us); not
// strips_nchw, whose copies take more instructions with a policy (9x9, 32x768x32x32: 48.3 -> 49.1).
// Other architectures were not measured.
#pragma once

#include "async_copy.cuh"
#include "direct.cuh"

namespace depthwise {

// Arguments of a kernel that reads every element of its input once, which may leave the cache first then.
inline DirectArgs with_policy(DirectArgs args, int element_bytes) {
  const int64_t in = static_cast<int64_t>(args.h) * args.w * (args.out_c / args.multiplier);
  const int64_t out = static_cast<int64_t>(args.out_h) * args.out_w * args.out_c;
  args.evict_first = args.n * (in + out) * element_bytes <= 4 * int64_t{device_limits().l2_bytes};
  return args;
}

class CachePolicy {
 public:
  // Kernels whose copies' instructions count have a second, plain copy of them for large tensors.
#if __CUDA_ARCH__ == 900
  const bool evicts_first;
  __device__ __forceinline__ explicit CachePolicy(const GradWeightArgs& args)
      : evicts_first(args.evict_first),
        policy_(ptx::cache_policy(args.evict_first)),
        zero_(static_cast<unsigned>(args.splits) >> 31) {}
  __device__ __forceinline__ explicit CachePolicy(const DirectArgs& args)
      : evicts_first(args.evict_first),
        policy_(ptx::cache_policy(args.evict_first)),
        zero_(static_cast<unsigned>(args.multiplier) >> 31) {}
#else
  static constexpr bool evicts_first = false;
  __device__ __forceinline__ explicit CachePolicy(const GradWeightArgs&) {}
  __device__ __forceinline__ explicit CachePolicy(const DirectArgs&) {}
#endif

  template <class Word>
  __device__ __forceinline__ Word load(const Word* from) const {
#if __CUDA_ARCH__ == 900
    return ptx::load(from, policy_);
#else
    return __ldg(from);
#endif
  }

  // Before whatever touches memory after it.
  __device__ __forceinline__ uint4 load_in_order(const uint4* from) const {
#if __CUDA_ARCH__ == 900
    return ptx::load_in_order(from, policy_);
#else
    return *from;
#endif
  }

  // Where copy_async copies to. What is added to it afterwards must not be uniform, but for constants: see ptx::copy_async,
  // and `zero_`, of which ptxas does not know that it is 0.
  template <class T>
  __device__ __forceinline__ CopyTarget<T> target(T* shared) const {
#if __CUDA_ARCH__ == 900
    return CopyTarget<T>(ptx::shared_address(shared) ^ zero_);
#else
    return CopyTarget<T>(shared);
#endif
  }
  template <int kBytes, bool kThroughL1 = kBytes != 16, class T>
  __device__ __forceinline__ void copy_async(CopyTarget<T> target, int offset, const void* global,
                                             bool in_bounds) const {
#if __CUDA_ARCH__ == 900
    ptx::copy_async<kBytes, kThroughL1>(target.address + offset * static_cast<int>(sizeof(T)), global,
                                        in_bounds ? kBytes : 0, policy_);
#else
    target.template copy_async<kBytes>(offset, global, in_bounds);
#endif
  }
#if __CUDA_ARCH__ >= 900
  // See ptx::copy_bulk.
  __device__ __forceinline__ void copy_bulk(unsigned shared_address, const void* global, int bytes,
                                            unsigned barrier) const {
#if __CUDA_ARCH__ == 900
    ptx::copy_bulk(shared_address, global, bytes, barrier, policy_);
#else
    ptx::copy_bulk(shared_address, global, bytes, barrier);
#endif
  }
#endif
  template <int kBytes, class T>
  __device__ __forceinline__ void copy_async(T* shared, const void* global, bool in_bounds) const {
    copy_async<kBytes>(target(shared), 0, global, in_bounds);
  }

#if __CUDA_ARCH__ == 900
 private:
  uint64_t policy_;
  unsigned zero_;
#endif
};

}  // namespace depthwise
