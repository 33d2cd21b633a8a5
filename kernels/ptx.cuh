// The PTX instructions that C++ has no words for, one function each; no other file has inline assembly.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace depthwise::ptx {

// The same pointer, of which the compiler no longer knows how it was computed: offsets are added to it, and not to its
// parts, which takes twice the instructions.
template <class T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}
// The same number, likewise: what is computed from it is computed anew, instead of kept in registers.
__device__ __forceinline__ unsigned opaque(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ int64_t opaque(int64_t value) {
  asm("" : "+l"(value));
  return value;
}

// threadIdx.x, read anew: what is computed from it takes no register in between.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// threadIdx.x % 32 of blocks of one dimension, likewise.
__device__ __forceinline__ int lane_index() {
  int index;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(index));
  return index;
}

// 16-bit values are passed as their bits.
__device__ __forceinline__ float from_float16(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ unsigned short to_float16(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// A shift, but one that the compiler does not take apart from the pair of values that it works on: as the shift that it
// is, both are unpacked as soon as they are loaded, and wait in a register each.
__device__ __forceinline__ float from_bfloat16(unsigned short bits) {
  float value;
  asm("mov.b32 %0, {%1, %2};" : "=f"(value) : "h"(static_cast<unsigned short>(0)), "h"(bits));
  return value;
}
__device__ __forceinline__ unsigned short to_bfloat16(float value) {  // sm_80
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// Each half of `sum` plus zero times that of `pair`: NaN from when on a pair was not finite; bfloat16: sm_80.
__device__ __forceinline__ unsigned probe_float16_pair(unsigned sum, unsigned pair) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  return sum;
}
__device__ __forceinline__ unsigned probe_bfloat16_pair(unsigned sum, unsigned pair) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  return sum;
}

// Two values as a word of two, the first in its low half; sm_80.
__device__ __forceinline__ unsigned to_float16x2(float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned to_bfloat16x2(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// How soon the L2 cache gives up a line that is loaded so: first of all, or as any other. It exists from sm_80 on, but only
// sm_90 takes it (cache_policy.cuh).
__device__ __forceinline__ uint64_t cache_policy(bool evict_first) {
  uint64_t first, normal;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  return evict_first ? first : normal;
}
__device__ __forceinline__ unsigned short load(const unsigned short* from, uint64_t policy) {
  unsigned short word;
  asm("ld.global.nc.L2::cache_hint.u16 %0, [%1], %2;" : "=h"(word) : "l"(from), "l"(policy));
  return word;
}
__device__ __forceinline__ unsigned load(const unsigned* from, uint64_t policy) {
  unsigned word;
  asm("ld.global.nc.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(word) : "l"(from), "l"(policy));
  return word;
}
__device__ __forceinline__ uint2 load(const uint2* from, uint64_t policy) {
  uint2 word;
  asm("ld.global.nc.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;" : "=r"(word.x), "=r"(word.y) : "l"(from), "l"(policy));
  return word;
}
__device__ __forceinline__ uint4 load(const uint4* from, uint64_t policy) {
  uint4 word;
  asm("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
      : "l"(from), "l"(policy));
  return word;
}

// Likewise, before whatever touches memory after it.
__device__ __forceinline__ uint4 load_in_order(const uint4* from, uint64_t policy) {
  uint4 word;
  asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from), "l"(policy)
               : "memory");
  return word;
}

// Clusters of blocks, sm_90. A barrier of all their threads: what was written before arriving, to shared memory of any of
// the blocks, is seen after waiting; `relaxed`: nothing was.
__device__ __forceinline__ void arrive_at_cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void arrive_relaxed_at_cluster_barrier() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_at_cluster_barrier() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where the block `rank` of the cluster has what this one has at a shared_address.
__device__ __forceinline__ unsigned address_in_cluster(unsigned shared_address, int rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address), "r"(rank));
  return address;
}
__device__ __forceinline__ void store_in_cluster(unsigned address, uint4 words) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Asynchronous copies (sm_80) of kBytes, 4, 8 or 16, aligned to that: the first `bytes` from `global`, then zeros.
// Copies of 16 bytes go past L1, unless somebody else reads the line.
template <int kBytes, bool kThroughL1 = kBytes != 16>
__device__ __forceinline__ void copy_async(unsigned shared_address, const void* global, int bytes) {
  if constexpr (!kThroughL1)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address), "l"(global), "r"(bytes),
                 "n"(kBytes)
                 : "memory");
}
template <int kBytes, bool kThroughL1 = kBytes != 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  copy_async<kBytes, kThroughL1>(shared_address(shared), global, bytes);
}
// The same of 16 bytes, for which the L2 cache reads all of the 256 bytes that they lie in.
__device__ __forceinline__ void copy_async_of_256(unsigned shared_address, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(global), "r"(bytes)
               : "memory");
}
// The same with a cache_policy. The address must not be one to which ptxas can add a uniform register: the instruction that
// ptxas 13.0 writes then is one that no GPU executes ("illegal instruction", sm_90).
template <int kBytes, bool kThroughL1 = kBytes != 16>
__device__ __forceinline__ void copy_async(unsigned shared_address, const void* global, int bytes, uint64_t policy) {
  if constexpr (!kThroughL1)
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address), "l"(global),
                 "r"(bytes), "l"(policy)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %4, %2, %3;" ::"r"(shared_address), "l"(global),
                 "r"(bytes), "l"(policy), "n"(kBytes)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void wait_for_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Barriers in shared memory (sm_90), each at a shared_address; a phase ends with its `count` arrivals, and the bytes that
// they tell it to expect.
__device__ __forceinline__ void initialise_barrier(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes the barriers that this thread initialised known to copies, from the block's next barrier on.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect_bytes(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Bulk copies, of which a barrier gets the bytes: a multiple of 16, as both addresses are.
__device__ __forceinline__ void copy_bulk(unsigned shared_address, const void* global, int bytes, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void copy_bulk(unsigned shared_address, const void* global, int bytes, unsigned barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
// Waits for the end of the barrier's phase of this parity.
__device__ __forceinline__ void wait_for_barrier(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}

// The 128 bytes around an address, to the L2 cache.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Programmatic dependent launch (sm_90): the kernel that was launched to depend on this one may begin; what this one
// depends on has ended.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// 8x8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8, 16 aligned bytes at a shared_address, and
// gets elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(unsigned (&matrix)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices(unsigned (&matrix)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrix[0]), "=r"(matrix[1])
               : "r"(address)
               : "memory");
}
// The same, but a lane gets column l / 4 of each: its elements of rows 2 * (l % 4) and 2 * (l % 4) + 1.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&matrix)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&matrix)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrix[0]), "=r"(matrix[1])
               : "r"(address)
               : "memory");
}

// The same of a matrix that lies in registers, a lane's elements as of load_matrices.
__device__ __forceinline__ unsigned transpose_matrix(unsigned matrix) {
  unsigned transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
}

// d += A * B, fragments as in tensor_core.cuh; sm_80, but for float16 with K = 8.
__device__ __forceinline__ void multiply_float16(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void multiply_bfloat16(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void multiply_float16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                 unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_bfloat16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                  unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace depthwise::ptx
