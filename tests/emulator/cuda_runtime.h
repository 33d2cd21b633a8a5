// What kernels/ uses of CUDA, for a plain C++ compiler; emulator.cpp runs it. tests/emulator.py rewrites what no header
// can stand in for: launches, shared memory and launch bounds.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>

#define __CUDA_ARCH__ EMULATED_ARCH
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// <cmath> and <algorithm> would be half of a kernel's compilation.
extern "C" float fabsf(float) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
#define isfinite __builtin_isfinite
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// ---- What emulator.cpp does

namespace emulator {

struct Registers {
  dim3 thread, block, threads, blocks;
};
extern Registers registers;

int barrier(bool vote);  // __syncthreads; of how many threads the vote was true
void warp_barrier();
uint64_t shuffle(uint64_t word, int source_lane);
int lane();
void check_global_read(const void* pointer, int bytes);
void* static_shared(int line, int bytes);
void* dynamic_shared();
void check_threads(int most, int blocks_per_multiprocessor = 0);

struct Launch {
  dim3 blocks, threads;
  int shared_bytes;
  void* stream;
  int cluster = 1;  // blocks that reach each other's shared memory

  template <class... Arguments>
  auto operator()(const Arguments&... arguments) const {
    return std::make_pair(*this, std::make_tuple(arguments...));
  }
};
void launch(const void* kernel, const Launch& shape, void (*body)(const void*), const void* arguments, int bytes);
int allow_shared_bytes(const void* kernel, int bytes);
int device_attribute(int attribute);
int last_error();
const char* error_text();

// Memory that the launches up to the next forget_memory() may read, and write where it is not const: then it is
// poisoned first.
void* device_memory(const char* name, void* pointer, int64_t bytes, bool writable);
void forget_memory();
template <class Tensor>
void* device_pointer(const char* name, Tensor& tensor) {
  return device_memory(name, tensor.data_ptr(), tensor.numel() * tensor.element_size(), !std::is_const_v<Tensor>);
}

}  // namespace emulator

// A rewritten launch: kernel * Launch{blocks, threads, shared_bytes, stream}(arguments...).
template <class... Parameters, class... Arguments>
void operator*(void (*kernel)(Parameters...), const std::pair<emulator::Launch, std::tuple<Arguments...>>& call) {
  const auto body = [kernel, arguments = call.second] { std::apply(kernel, arguments); };
  using Body = decltype(body);
  emulator::launch(
      reinterpret_cast<const void*>(kernel), call.first, [](const void* self) { (*static_cast<Body*>(self))(); }, &body,
      sizeof(body));
}

// ---- Device functions

static constexpr const dim3 &threadIdx = emulator::registers.thread, &blockIdx = emulator::registers.block;
static constexpr const dim3 &blockDim = emulator::registers.threads, &gridDim = emulator::registers.blocks;

inline void __syncthreads() { emulator::barrier(false); }
inline int __syncthreads_or(int vote) { return emulator::barrier(vote) > 0; }
inline int __syncthreads_and(int vote) { return emulator::barrier(!vote) == 0; }

inline void __syncwarp() { emulator::warp_barrier(); }

template <class To, class From>
To emulated_bit_cast(From from) {
  To to{};
  std::memcpy(&to, &from, min(sizeof(to), sizeof(from)));
  return to;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated_bit_cast<T>(emulator::shuffle(emulated_bit_cast<uint64_t>(value), lane));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, emulator::lane() ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  const int source = emulator::lane() + lanes;
  return __shfl_sync(mask, value, source < 32 ? source : emulator::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const int source = emulator::lane() - lanes;
  return __shfl_sync(mask, value, source >= 0 ? source : emulator::lane());
}

template <class T>
T __ldg(const T* pointer) {
  emulator::check_global_read(pointer, sizeof(T));
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}

inline float __uint_as_float(unsigned bits) { return emulated_bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulated_bit_cast<unsigned>(value); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  unsigned word = 0;
  for (int k = 0; k < 4; ++k)
    word |= static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> 8 * (selector >> 4 * k & 7) & 0xff)
            << 8 * k;
  return word;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// ---- Host functions

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize,
  cudaDevAttrClusterLaunch
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };

inline int cudaGetLastError() { return emulator::last_error(); }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::error_text(); }
inline int cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) { return cudaSuccess; }
inline int cudaGetDevice(int*) { return cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = emulator::device_attribute(attribute);
  return cudaSuccess;
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel* kernel, int, int bytes) {
  return emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}
#define CUDART_VERSION 13000
inline int cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = EMULATED_ARCH / 10;
  return cudaSuccess;
}
enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const int bytes = static_cast<int>(config->dynamicSmemBytes);
  const bool clusters = config->numAttrs > 0 && config->attrs->id == cudaLaunchAttributeClusterDimension;
  const int cluster = clusters ? static_cast<int>(config->attrs->val.clusterDim.x) : 1;
  kernel* emulator::Launch{config->gridDim, config->blockDim, bytes, config->stream, cluster}(arguments...);
  return cudaGetLastError();
}
inline int cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
