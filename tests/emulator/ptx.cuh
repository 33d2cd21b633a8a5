// The functions of kernels/ptx.cuh in C++; what takes a warp or time is in emulator.cpp.
#pragma once

#include "cuda_runtime.h"

namespace depthwise::ptx {

template <class T>
T* opaque(T* pointer) {
  return pointer;
}

inline float from_float16(unsigned short bits) { return static_cast<float>(emulated_bit_cast<_Float16>(bits)); }
inline unsigned short to_float16(float value) {
  return emulated_bit_cast<unsigned short>(static_cast<_Float16>(value));
}
inline float from_bfloat16(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
inline unsigned short to_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);  // to nearest even
  return static_cast<unsigned short>(value != value ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

unsigned shared_address(const void* shared);

void copy_async(void* shared, const void* global, int width, int bytes);
template <int kBytes>
void copy_async(void* shared, const void* global, int bytes) {
  copy_async(shared, global, kBytes, bytes);
}
void commit_copies();
void wait_for_copies(int pending);
template <int kPending>
void wait_for_copies() {
  wait_for_copies(kPending);
}
void wait_for_all_copies();

void load_matrices(unsigned* matrix, int count, unsigned address);
template <int kCount>
void load_matrices(unsigned (&matrix)[kCount], unsigned address) {
  load_matrices(matrix, kCount, address);
}

struct Product {
  float* d;
  unsigned a[4], b[2];
  int k;
  float (*convert)(unsigned short);
};
void multiply(const Product& product);
inline void multiply_float16(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
  multiply({d, {a0, a1}, {b0}, 8, from_float16});
}
inline void multiply_bfloat16(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
  multiply({d, {a0, a1}, {b0}, 8, from_bfloat16});
}
inline void multiply_float16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                             unsigned b1) {
  multiply({d, {a0, a1, a2, a3}, {b0, b1}, 16, from_float16});
}
inline void multiply_bfloat16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                              unsigned b1) {
  multiply({d, {a0, a1, a2, a3}, {b0, b1}, 16, from_bfloat16});
}

}  // namespace depthwise::ptx
