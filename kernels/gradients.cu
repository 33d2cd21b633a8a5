// Grad of input and grad of weight at once, where a kernel reads grad_output for both of them. The weights' sums are split over
// blocks and added in a fixed order, as grad_weight.cu's are, in the same workspace.
#include "direct.cuh"
#include "dispatch.cuh"
#include "launch.h"

namespace depthwise {
namespace {

// Whether what is read is to leave the L2 cache first (cache_policy.cuh): no more than it holds. 3x3, channels_last, H200 with
// 60 MB: fp16, 32x144x56x56 (58 MB) 41.4 us, as others do 42.2; 128x240x28x28 (96 MB) 61.4, 53.6.
bool gradients_evict_first(const Problem& p) {
  return 2 * p.n * p.c * p.h * p.w * element_size(p.dtype) <= device_limits().l2_bytes;
}

}  // namespace

bool computes_gradients(const Problem& p) { return p.n > 0 && choose(p).config.kernel != Kernel::kGeneral; }

int64_t gradients_workspace(const Problem& p) { return choose(p).grad_weight_plan.splits * grad_weight_split_bytes(p); }

bool launch_gradients(const Problem& p, const void* grad_output, const void* input, const void* weight,
                      void* grad_input, void* grad_weight, void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Choice choice = choose(p);
  const Launcher launcher = obtain_launcher(p, choice, cuda_stream);
  if (launcher == nullptr) return false;
  const int splits = static_cast<int>(choice.grad_weight_plan.splits);
  GradientsArgs args{grad_weight_args(p), weight, grad_input, most_gradients_splits(p)};
  args.grad_output = grad_output;
  args.input = input;
  args.partial = static_cast<float*>(workspace);
  if (splits == 1) args.grad_weight = grad_weight;
  args.splits = splits;
  args.evict_first = gradients_evict_first(p);
  const int answer = launcher(&args, choice.config.tile, stream);
  if (is_refusal(answer)) {
    choose(p, answer);  // which throws where this variant is forced
    return false;
  }
  check_launch(answer);
  if (splits == 1) return true;
  with_types(p, [&](auto, auto weight_tag) {
    using W = typename decltype(weight_tag)::type;
    const int64_t weights = p.out_c * p.kernel_h * p.kernel_w;
    if constexpr (sizeof(W) < sizeof(double))
      check_launch(launch_second_pass(add_splits_kernel<W>, general_blocks(weights * kGeneralThreads / 32),
                                      dim3(32, split_shares(splits)), cuda_stream, args.partial, splits, weights,
                                      int64_t{0}, static_cast<W*>(grad_weight), static_cast<W*>(nullptr)));
  });
  return true;
}

}  // namespace depthwise
