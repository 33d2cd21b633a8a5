// Copies of whole rows from global to shared memory, an instruction each, which a barrier in shared memory counts (sm_90).
#pragma once

#include "cache_policy.cuh"
#include "problem.h"

namespace depthwise {

// `arrivals`: a barrier for each stage of a ring. One thread begins, expects and copies; all may wait. Sources, places and
// sizes are multiples of 16 bytes.
class BulkCopies {
 public:
#if __CUDA_ARCH__ >= 900
  __device__ __forceinline__ BulkCopies(uint64_t* arrivals, const GradWeightArgs& args)
      : arrivals_(ptx::shared_address(arrivals)), policy_(args) {}

  // Before a barrier of the block, and before that thread's first copies.
  template <int kStages>
  __device__ __forceinline__ void begin() const {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) ptx::initialise_barrier(of(stage), 1);
    ptx::show_barriers();
  }
  // What the copies of a stage, which may follow, have in all.
  __device__ __forceinline__ void expect(int stage, int bytes) const { ptx::expect_bytes(of(stage), bytes); }
  // Rows of `bytes` each, `pitch` elements apart, to places from row `slot` of `slots` on.
  template <class T>
  __device__ __forceinline__ void copy_rows(int stage, T* shared, const T* global, int rows, int bytes, int pitch,
                                            int slot, int slots, int slot_pitch) const {
#pragma unroll 1
    for (int row = 0; row < rows && bytes > 0; ++row) {
      policy_.copy_bulk(ptx::shared_address(shared + slot * slot_pitch), global, bytes, of(stage));
      global += pitch;
      slot = slot + 1 == slots ? 0 : slot + 1;
    }
  }
  // `phase`: 0 where it is the stage's first use, 1 the second, and so on in turns.
  __device__ __forceinline__ void wait(int stage, int phase) const { ptx::wait_for_barrier(of(stage), phase); }

 private:
  __device__ __forceinline__ unsigned of(int stage) const {
    return arrivals_ + stage * static_cast<int>(sizeof(uint64_t));
  }

  unsigned arrivals_;
  CachePolicy policy_;
#else
  __device__ __forceinline__ BulkCopies(uint64_t*, const GradWeightArgs&) {}
  template <int kStages>
  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ void expect(int, int) const {}
  template <class T>
  __device__ __forceinline__ void copy_rows(int, T*, const T*, int, int, int, int, int, int) const {}
  __device__ __forceinline__ void wait(int, int) const {}
#endif

 public:
  // Whether the current device's code of `kernel` has them: it may have been compiled for an earlier architecture.
  template <class Kernel>
  static bool are_code_of(Kernel kernel) {
    thread_local int known_device = -1;
    thread_local bool known = false;
    int device = 0;
    cudaGetDevice(&device);
    if (device != known_device) {
      cudaFuncAttributes attributes{};
      known = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
      known_device = device;
    }
    return known;
  }
};

}  // namespace depthwise
