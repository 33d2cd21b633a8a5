// The launch of a kernel that adds what the kernel before it left: from sm_90 on it begins while that one ends
// (programmatic dependent launch). The first calls let_second_pass_begin() when its work is nearly done; the second begins
// with wait_for_first_pass(), which returns when all blocks of the first have ended and their results are visible.
#pragma once

#include "direct.cuh"
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

// Whether the kernel may begin early. Captured into CUDA graphs since CUDA 12.3, which the driver must know as well.
template <class Kernel>
bool waits_for_first_pass(Kernel kernel) {
  static const bool captured = [] {
    int driver = 0;
    return CUDART_VERSION >= 12030 && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
  }();
  return captured && is_compiled_for_sm90(kernel);
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
