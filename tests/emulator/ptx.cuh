// The functions of kernels/ptx.cuh in C++; what takes a warp or time is in emulator.cpp.
#pragma once

#include <initializer_list>

#include "cuda_runtime.h"

namespace depthwise::ptx {

template <class T>
T* opaque(T* pointer) {
  return pointer;
}

inline unsigned opaque(unsigned value) { return value; }
inline int opaque(int value) { return value; }
inline int64_t opaque(int64_t value) { return value; }
inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline int lane_index() { return static_cast<int>(threadIdx.x % 32); }

inline float from_float16(unsigned short bits) { return static_cast<float>(emulated_bit_cast<_Float16>(bits)); }
inline unsigned short to_float16(float value) {
  return emulated_bit_cast<unsigned short>(static_cast<_Float16>(value));
}
inline float from_bfloat16(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
inline unsigned short to_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);  // to nearest even
  return static_cast<unsigned short>(value != value ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline unsigned probe_float16_pair(unsigned sum, unsigned pair) {
  return (pair & 0x7c00) == 0x7c00 || (pair >> 16 & 0x7c00) == 0x7c00 ? 0x7fff7fff : sum;
}
inline unsigned probe_bfloat16_pair(unsigned sum, unsigned pair) {
  return (pair & 0x7f80) == 0x7f80 || (pair >> 16 & 0x7f80) == 0x7f80 ? 0x7fff7fff : sum;
}

inline unsigned to_float16x2(float low, float high) { return to_float16(low) | unsigned{to_float16(high)} << 16; }
inline unsigned to_bfloat16x2(float low, float high) { return to_bfloat16(low) | unsigned{to_bfloat16(high)} << 16; }

unsigned shared_address(const void* shared);

void arrive_at_cluster_barrier();
inline void arrive_relaxed_at_cluster_barrier() { arrive_at_cluster_barrier(); }
void wait_at_cluster_barrier();
unsigned address_in_cluster(unsigned shared_address, int rank);
void store_in_cluster(unsigned address, uint4 words);

void* at_shared_address(unsigned address);

void copy_async(void* shared, const void* global, int width, int bytes);
template <int kBytes, bool kThroughL1 = false>
void copy_async(void* shared, const void* global, int bytes) {
  copy_async(shared, global, kBytes, bytes);
}
template <int kBytes>
void copy_async(unsigned shared_address, const void* global, int bytes) {
  copy_async(at_shared_address(shared_address), global, kBytes, bytes);
}
inline void copy_async_of_256(unsigned shared_address, const void* global, int bytes) {
  copy_async<16>(shared_address, global, bytes);
}
inline uint64_t cache_policy(bool) { return 0; }
template <class Word>
Word load(const Word* from, uint64_t) {
  return __ldg(from);
}
inline uint4 load_in_order(const uint4* from, uint64_t) { return *from; }
template <int kBytes, bool kThroughL1 = false>
void copy_async(unsigned shared_address, const void* global, int bytes, uint64_t) {
  copy_async(at_shared_address(shared_address), global, kBytes, bytes);
}
void commit_copies();
void wait_for_copies(int pending);
template <int kPending>
void wait_for_copies() {
  wait_for_copies(kPending);
}
void wait_for_all_copies();

// Bulk copies are in nobody's name: that they and others keep out of each other's way is not checked, but by what arrives.
void initialise_barrier(unsigned barrier, int count);
inline void show_barriers() {}
void expect_bytes(unsigned barrier, int bytes);
void arrive(unsigned barrier);
void copy_bulk(unsigned shared_address, const void* global, int bytes, unsigned barrier);
inline void copy_bulk(unsigned shared_address, const void* global, int bytes, unsigned barrier, uint64_t) {
  copy_bulk(shared_address, global, bytes, barrier);
}
void wait_for_barrier(unsigned barrier, unsigned parity);

inline void prefetch(const void* global) { *static_cast<const volatile char*>(global); }

// Kernels run one after the other.
inline void launch_dependents() {}
inline void wait_for_dependencies() {}

void load_matrices(unsigned* matrix, int count, unsigned address);
template <int kCount>
void load_matrices(unsigned (&matrix)[kCount], unsigned address) {
  load_matrices(matrix, kCount, address);
}
void load_matrices_transposed(unsigned* matrix, int count, unsigned address);
template <int kCount>
void load_matrices_transposed(unsigned (&matrix)[kCount], unsigned address) {
  load_matrices_transposed(matrix, kCount, address);
}

inline unsigned transpose_matrix(unsigned matrix) {
  const int lane = emulator::lane(), row = lane / 4, column = lane % 4 * 2;
  const unsigned low = __shfl_sync(~0u, matrix, column * 4 + row / 2);
  const unsigned high = __shfl_sync(~0u, matrix, (column + 1) * 4 + row / 2);
  return row % 2 == 0 ? (low & 0xffff) | high << 16 : low >> 16 | (high & 0xffff0000u);
}

// `words`: a lane's fragments of A, then of B; three for K = 8, six for K = 16.
void multiply(float* d, const unsigned* words, int count, float (*convert)(unsigned short));
template <class... Words>
void multiply_float16(float (&d)[4], Words... words) {
  multiply(d, std::initializer_list<unsigned>{words...}.begin(), sizeof...(words), from_float16);
}
template <class... Words>
void multiply_bfloat16(float (&d)[4], Words... words) {
  multiply(d, std::initializer_list<unsigned>{words...}.begin(), sizeof...(words), from_bfloat16);
}

}  // namespace depthwise::ptx
