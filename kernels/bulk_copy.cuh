// Copies from global to shared memory, an instruction each, which barriers in shared memory count (sm_90).
#pragma once

#include "cache_policy.cuh"
#include "problem.h"

namespace depthwise {

// To the kStages stages of a ring. `barriers`, kBarriers in shared memory: of each stage one for its copies' arrival, and
// where kHasEnds one for when all warps are done with it. One thread begins, and expects what a stage gets; the copies may
// be of any threads, after that; all may wait. Sources, places and sizes are multiples of 16 bytes. `phase`, modulo 2: 0 where
// it is the stage's first use.
template <int kStages, bool kHasEnds = false>
class BulkCopies {
 public:
  static constexpr int kBarriers = kHasEnds ? 2 * kStages : kStages;

#if __CUDA_ARCH__ >= 900
  static constexpr bool kExist = true;
  __device__ __forceinline__ BulkCopies(uint64_t* barriers, const GradWeightArgs& args)
      : barriers_(ptx::shared_address(barriers)), policy_(args) {}

  // Before a barrier of the block, and before that thread's first copies.
  __device__ __forceinline__ void begin() const {
#pragma unroll
    for (int k = 0; k < kBarriers; ++k) ptx::initialise_barrier(at(k), k < kStages ? 1 : blockDim.x / 32);
    ptx::show_barriers();
  }
  // What the copies of a stage have in all.
  __device__ __forceinline__ void expect(int stage, int bytes) const { ptx::expect_bytes(at(stage), bytes); }
  // `shared`: a ptx::shared_address.
  __device__ __forceinline__ void copy(int stage, unsigned shared, const void* global, int bytes) const {
    policy_.copy_bulk(shared, global, bytes, at(stage));
  }
  // Rows of `bytes` each, `pitch` elements apart, to places from row `slot` of `slots` on.
  template <class T>
  __device__ __forceinline__ void copy_rows(int stage, T* shared, const T* global, int rows, int bytes, int pitch,
                                            int slot, int slots, int slot_pitch) const {
#pragma unroll 1
    for (int row = 0; row < rows && bytes > 0; ++row) {
      copy(stage, ptx::shared_address(shared + slot * slot_pitch), global, bytes);
      global += pitch;
      slot = slot + 1 == slots ? 0 : slot + 1;
    }
  }
  __device__ __forceinline__ void wait(int stage, int phase) const { ptx::wait_for_barrier(at(stage), phase); }

  // All of the warp are done with the stage.
  __device__ __forceinline__ void end(int stage) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::arrive(at(kStages + stage));
  }
  __device__ __forceinline__ void wait_for_end(int stage, int phase) const {
    ptx::wait_for_barrier(at(kStages + stage), phase);
  }

 private:
  __device__ __forceinline__ unsigned at(int barrier) const {
    return barriers_ + barrier * static_cast<int>(sizeof(uint64_t));
  }

  unsigned barriers_;
  CachePolicy policy_;
#else
  static constexpr bool kExist = false;
  __device__ __forceinline__ BulkCopies(uint64_t*, const GradWeightArgs&) {}
  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ void expect(int, int) const {}
  __device__ __forceinline__ void copy(int, unsigned, const void*, int) const {}
  template <class T>
  __device__ __forceinline__ void copy_rows(int, T*, const T*, int, int, int, int, int, int) const {}
  __device__ __forceinline__ void wait(int, int) const {}
  __device__ __forceinline__ void end(int) const {}
  __device__ __forceinline__ void wait_for_end(int, int) const {}
#endif
};

}  // namespace depthwise
