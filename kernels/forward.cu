// Forward: out[n, c*m+k] = bias + sum over taps of input[n, c] * weight[c*m+k].
#include "dispatch.cuh"
#include "launch.h"

namespace depthwise {

void launch_forward(const Problem& problem, const void* input, const void* weight, const void* bias, void* out,
                    void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (launch_specialised(problem, input, weight, bias, out, cuda_stream)) return;
  with_types(problem, [&](auto tag, auto weight_tag) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    const unsigned blocks = general_blocks(problem.n * problem.out_c * problem.out_h * problem.out_w);
    general_forward_kernel<T, W><<<blocks, kGeneralThreads, 0, cuda_stream>>>(
        general_args(problem), static_cast<const T*>(input), static_cast<const W*>(weight), static_cast<const W*>(bias),
        static_cast<T*>(out));
  });
  check_launch(cudaGetLastError());
}

}  // namespace depthwise
