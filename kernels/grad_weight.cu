// Grad of weight and bias: sums over n, out_h, out_w of grad_output * input, split over blocks and added in a fixed
// order. Workspace: splits * out_channels * (taps + 1) accumulators, at most kMaxWorkspace bytes unless one split needs
// more.
#include "dispatch.cuh"
#include "launch.h"

namespace depthwise {
namespace {

constexpr int64_t kMaxWorkspace = 16 << 20;
constexpr int64_t kWantedBlocks = 2048;  // two waves of 8 blocks on each of an H100's 132 multiprocessors
constexpr int64_t kMinPositions = 2048;  // a split worth its second pass

struct GradWeightGrid {
  int64_t channels, taps, splits;
};

GradWeightGrid grad_weight_grid(const Problem& p) {
  GradWeightGrid grid;
  grid.channels = p.layout == Layout::kNhwc ? (p.out_c + 31) / 32 : p.out_c;
  grid.taps = p.kernel_h * ((p.kernel_w + kTapsPerBlock - 1) / kTapsPerBlock);
  const int64_t bytes = p.out_c * (p.kernel_h * p.kernel_w + 1) * (p.dtype == DType::kFloat64 ? 8 : 4);
  grid.splits = kWantedBlocks / (grid.channels * grid.taps);
  grid.splits = grid.splits < kMaxWorkspace / bytes ? grid.splits : kMaxWorkspace / bytes;
  const int64_t worthwhile = p.n * p.out_h * p.out_w / kMinPositions;
  grid.splits = grid.splits < worthwhile ? grid.splits : worthwhile;
  grid.splits = grid.splits < 1 ? 1 : grid.splits > 65535 ? 65535 : grid.splits;
  return grid;
}

}  // namespace

int64_t grad_weight_workspace(const Problem& p) {
  return grad_weight_grid(p).splits * p.out_c * (p.kernel_h * p.kernel_w + 1) * (p.dtype == DType::kFloat64 ? 8 : 4);
}

void launch_grad_weight(const Problem& problem, const void* grad_output, const void* input, void* grad_weight,
                        void* grad_bias, void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const GradWeightGrid grid = grad_weight_grid(problem);
  const Config config = config_for(problem);  // refuses a forced variant that cannot serve
  if (config.kernel != Kernel::kGeneral) throw std::runtime_error("depthwise_inline: grad_weight has no such kernel");
  if (grid.taps > 65535) throw std::runtime_error("depthwise_inline: kernel too large");
  with_type(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Sum = accumulator_t<T>;
    const int64_t weights = problem.out_c * problem.kernel_h * problem.kernel_w;
    Sum* const partial = static_cast<Sum*>(workspace);
    Sum* const partial_bias = grad_bias ? partial + grid.splits * weights : nullptr;
    const auto launch = [&](auto kernel) {
      kernel<<<dim3(grid.channels, grid.taps, grid.splits), dim3(32, kGeneralThreads / 32), 0, cuda_stream>>>(
          general_args(problem), static_cast<const T*>(grad_output), static_cast<const T*>(input), partial,
          partial_bias);
    };
    problem.layout == Layout::kNhwc ? launch(general_grad_weight_kernel<T, true>)
                                    : launch(general_grad_weight_kernel<T, false>);
    check_launch(cudaGetLastError());
    const int splits = static_cast<int>(grid.splits);
    add_splits_kernel<T><<<general_blocks(weights), kGeneralThreads, 0, cuda_stream>>>(partial, splits, weights,
                                                                                       static_cast<T*>(grad_weight));
    if (grad_bias)
      add_splits_kernel<T><<<general_blocks(problem.out_c), kGeneralThreads, 0, cuda_stream>>>(
          partial_bias, splits, problem.out_c, static_cast<T*>(grad_bias));
  });
  check_launch(cudaGetLastError());
}

}  // namespace depthwise
