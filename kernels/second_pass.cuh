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

// Whether the code of `kernel` waits: it may have been compiled for an earlier architecture than the device's. Captured
// into CUDA graphs since CUDA 12.3.
template <class Kernel>
bool waits_for_first_pass(Kernel kernel) {
  static const bool waits = [=] {
    cudaFuncAttributes attributes{};
    return CUDART_VERSION >= 12030 && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
           attributes.ptxVersion >= 90;
  }();
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
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace depthwise
