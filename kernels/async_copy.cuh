// Asynchronous copies from global to shared memory; before sm_80 they are loads and stores.
#pragma once

#include "vector.cuh"

namespace depthwise {

// 4, 8 or 16 bytes, aligned to their size; zeros where `in_bounds` is false, and nothing is read then.
template <int kBytes, bool kThroughL1 = kBytes != 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool in_bounds = true) {
#if __CUDA_ARCH__ >= 800
  ptx::copy_async<kBytes, kThroughL1>(shared, global, in_bounds ? kBytes : 0);
#else
  using Word = typename RawWord<kBytes>::type;
  *static_cast<Word*>(shared) = in_bounds ? __ldg(static_cast<const Word*>(global)) : Word{};
#endif
}

// Shared memory that asynchronous copies go to; with its address at hand, an offset is all that a copy has to compute.
template <class T>
struct CopyTarget {
#if __CUDA_ARCH__ >= 800
  unsigned address;
  __device__ __forceinline__ explicit CopyTarget(unsigned address) : address(address) {}
  __device__ __forceinline__ explicit CopyTarget(T* shared) : address(ptx::opaque(ptx::shared_address(shared))) {}

  template <int kBytes>
  __device__ __forceinline__ void copy_async(int offset, const void* global, bool in_bounds = true) const {
    ptx::copy_async<kBytes>(address + offset * static_cast<int>(sizeof(T)), global, in_bounds ? kBytes : 0);
  }
  // 16 bytes; the L2 cache reads all of the 256 bytes that they lie in.
  __device__ __forceinline__ void copy_async_of_256(int offset, const void* global, bool in_bounds) const {
    ptx::copy_async_of_256(address + offset * static_cast<int>(sizeof(T)), global, in_bounds ? 16 : 0);
  }
#else
  T* shared;
  __device__ __forceinline__ explicit CopyTarget(T* shared) : shared(shared) {}

  template <int kBytes>
  __device__ __forceinline__ void copy_async(int offset, const void* global, bool in_bounds = true) const {
    depthwise::copy_async<kBytes>(shared + offset, global, in_bounds);
  }
  __device__ __forceinline__ void copy_async_of_256(int offset, const void* global, bool in_bounds) const {
    copy_async<16>(offset, global, in_bounds);
  }
#endif
};

// Copies `bytes` of the 16 bytes at `global`, an even number, and zeros for the rest; both pointers are aligned to 16 bytes.
// cp.async itself can copy a part, but compute-sanitizer takes it to read all 16: an error at a tensor's end.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global, int bytes) {
  if (bytes == 16) {
    copy_async<16>(shared, global);
    return;
  }
  const auto* const words = static_cast<const unsigned*>(global);
  auto* const copies = static_cast<unsigned*>(shared);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int left = bytes - 4 * k;
    if (left == 2)
      copies[k] = __ldg(reinterpret_cast<const unsigned short*>(words + k));
    else
      copy_async<4>(copies + k, words + k, left > 0);
  }
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  ptx::commit_copies();
#endif
}

// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  ptx::wait_for_copies<kPending>();
#endif
}

// All copies of all threads of the block have arrived.
__device__ __forceinline__ void wait_for_all_copies() {
#if __CUDA_ARCH__ >= 800
  ptx::wait_for_all_copies();
#endif
  __syncthreads();
}

// Waits for the oldest of `ahead` committed groups, 1 to 3.
__device__ __forceinline__ void wait_for_stage(int ahead) {
  if (ahead == 3)
    wait_for_copies<2>();
  else if (ahead == 2)
    wait_for_copies<1>();
  else
    wait_for_copies<0>();
}

// What lies side by side, of some images each, to the L2 cache, from where it is read soon. All threads of a block.
template <class T>
__device__ __forceinline__ void prefetch_rows(const T* first, int64_t image_stride, int images, int elements) {
  constexpr int kLine = 128 / sizeof(T);
  if (elements <= 0) return;
#pragma unroll 1
  for (int image = 0; image < images; ++image, first += image_stride)
#pragma unroll 1
    for (int k = threadIdx.x * kLine; k < elements + kLine - 1; k += blockDim.x * kLine)
      ptx::prefetch(first + min(k, elements - 1));  // the last line, if the first begins off a line
}

}  // namespace depthwise
