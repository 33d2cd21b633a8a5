// Grad of input: grad_input[n, c] = sum over taps and multiplier of grad_output * weight, gathered, without atomics.
// At stride 1 it is the forward kernel over grad_output with the filter flipped.
#include "dispatch.cuh"
#include "launch.h"

namespace depthwise {

void launch_grad_input(const Problem& problem, const void* grad_output, const void* weight, void* grad_input,
                       void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (launch_specialised(problem, grad_output, weight, nullptr, grad_input, cuda_stream)) return;
  with_types(problem, [&](auto tag, auto weight_tag) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    const unsigned blocks = general_blocks(problem.n * problem.c * problem.h * problem.w);
    general_grad_input_kernel<T, W>
        <<<blocks, kGeneralThreads, 0, cuda_stream>>>(general_args(problem), static_cast<const T*>(grad_output),
                                                      static_cast<const W*>(weight), static_cast<T*>(grad_input));
  });
  check_launch(cudaGetLastError());
}

}  // namespace depthwise
