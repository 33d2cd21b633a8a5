// The launch of a kernel that adds what the kernel before it left: from sm_90 on it begins while that one ends
// (programmatic dependent launch). The first calls let_second_pass_begin() when its work is nearly done; the second begins
// with wait_for_first_pass(), which returns when all blocks of the first have ended and their results are visible.
#pragma once

#include "ptx.cuh"

namespace depthwise {

__device__ __forceinline__ void let_second_pass_begin() {
#if __CUDA_ARCH__ >= 900
  ptx::launch_dependents();
#endif
}

__device__ __forceinline__ void wait_for_first_pass() {
#if __CUDA_ARCH__ >= 900
  ptx::wait_for_dependencies();
#endif
}

// Whether the current device's code of `kernel` waits: it may have been compiled for an earlier architecture. Captured into
// CUDA graphs since CUDA 12.3, which the driver must know as well.
template <class Kernel>
bool waits_for_first_pass(Kernel kernel) {
  thread_local int known_device = -1;
  thread_local bool waits = false;
  int device = 0;
  cudaGetDevice(&device);
  if (device != known_device) {
    int driver = 0;
    cudaFuncAttributes attributes{};
    waits = CUDART_VERSION >= 12030 && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
            cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    known_device = device;
  }
  return waits;
}

template <class... Parameters, class... Arguments>
int launch_second_pass(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, cudaStream_t stream,
                       Arguments... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = waits_for_first_pass(kernel) ? 1 : 0;
  const int error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  cudaGetLastError();  // forgets the error, which would be the next launch's
  return error;
}

}  // namespace depthwise
