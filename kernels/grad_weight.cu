// Grad of weight and bias: sums over n, out_h, out_w of grad_output * input, split over blocks and added in a fixed
// order. Workspace: splits * out_channels * (taps + 1) accumulators, at most kMaxWorkspace bytes unless one split needs
// more.
#include "direct.cuh"
#include "dispatch.cuh"
#include "grad_weight_plan.h"
#include "launch.h"

namespace depthwise {
namespace {

template <class T>
void launch_general(const Problem& p, int splits, const void* grad_output, const void* input, accumulator_t<T>* partial,
                    accumulator_t<T>* partial_bias, const GeneralGrads& grads, cudaStream_t stream) {
  const int64_t channels = p.layout == Layout::kNhwc ? divide_up(p.out_c, 32) : p.out_c;
  const int64_t taps = p.kernel_h * divide_up(p.kernel_w, general_taps(p));
  if (taps > 65535) throw std::runtime_error("depthwise_inline: kernel too large");
  const auto launch = [&](auto kernel) {
    kernel<<<dim3(channels, taps, splits), dim3(32, kGeneralThreads / 32), 0, stream>>>(
        general_args(p), static_cast<const T*>(grad_output), static_cast<const T*>(input), partial, partial_bias,
        grads);
  };
  const auto launch_layout = [&](auto count) {
    constexpr int kTaps = count.value;
    p.layout == Layout::kNhwc ? launch(general_grad_weight_kernel<T, true, kTaps>)
                              : launch(general_grad_weight_kernel<T, false, kTaps>);
  };
  if (general_taps(p) == 8)
    launch_layout(std::integral_constant<int, 8>{});
  else if constexpr (sizeof(T) < sizeof(double))
    launch_layout(std::integral_constant<int, 16>{});
  check_launch(cudaGetLastError());
}

// Whether tensors are to leave the L2 cache first (cache_policy.cuh): up to four times its size. H100: 3x3 at stride 2,
// 32x96x112x112, fp32 (193 MB): 91.3 -> 90.4 us in NCHW, 93.9 -> 89.5 in channels_last; 3x1, 64x8x512x512, fp16 (537 MB):
// 193.5 -> 199.6 and 205.8 -> 209.5.
bool evicts_first(const Problem& p) {
  const int64_t elements = p.n * (p.c * p.h * p.w + p.out_c * p.out_h * p.out_w);
  return elements * element_size(p.dtype) <= 4 * int64_t{device_limits().l2_bytes};
}

}  // namespace

// Room for the general kernel too: it serves where a specialisation is missing while a CUDA graph is captured.
int64_t grad_weight_workspace(const Problem& p) {
  if (p.n == 0) return 0;
  const int64_t general = general_grad_weight_plan(p).splits, chosen = choose(p).grad_weight_plan.splits;
  return (general > chosen ? general : chosen) * grad_weight_split_bytes(p);
}

void launch_grad_weight(const Problem& p, const void* grad_output, const void* input, void* grad_weight,
                        void* grad_bias, void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (p.n == 0) {  // sums of nothing
    const int64_t bytes = p.float_weight ? sizeof(float) : element_size(p.dtype);
    check_launch(cudaMemsetAsync(grad_weight, 0, p.out_c * p.kernel_h * p.kernel_w * bytes, cuda_stream));
    if (grad_bias) check_launch(cudaMemsetAsync(grad_bias, 0, p.out_c * bytes, cuda_stream));
    return;
  }
  const Choice choice = choose(p);
  const Config& config = choice.config;
  const Launcher launcher = obtain_launcher(p, choice, cuda_stream);
  const GradWeightPlan plan = launcher ? choice.grad_weight_plan : general_grad_weight_plan(p);
  const int splits = static_cast<int>(plan.splits);
  with_types(p, [&](auto tag, auto weight_tag) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    using Sum = accumulator_t<T>;
    const int64_t weights = p.out_c * p.kernel_h * p.kernel_w;
    Sum* const partial = static_cast<Sum*>(workspace);
    Sum* const partial_bias = grad_bias ? partial + splits * weights : nullptr;
    const bool stores = splits == 1;  // the kernel itself, without a second pass
    if constexpr (sizeof(T) < sizeof(double)) {
      if (launcher) {
        GradWeightArgs args = grad_weight_args(p);
        args.grad_output = grad_output;
        args.input = input;
        args.partial = partial;
        args.partial_bias = partial_bias;
        if (stores) {
          args.grad_weight = grad_weight;
          args.grad_bias = grad_bias;
        }
        args.splits = splits;
        args.rows = plan.rows;
        args.evict_first = evicts_first(p);
        check_launch(launcher(&args, config.tile, stream));
      }
    }
    if (!launcher) {
      const GeneralGrads grads =
          stores ? GeneralGrads{grad_weight, grad_bias, p.float_weight} : GeneralGrads{nullptr, nullptr, false};
      launch_general<T>(p, splits, grad_output, input, partial, partial_bias, grads, cuda_stream);
    }
    if (stores) return;
    const int64_t count = weights + (grad_bias ? p.out_c : 0);
    check_launch(launch_second_pass(add_splits_kernel<W>, general_blocks(count * kGeneralThreads / 32),
                                    dim3(32, split_shares(splits)), cuda_stream, partial, splits, weights,
                                    count - weights, static_cast<W*>(grad_weight), static_cast<W*>(grad_bias)));
  });
}

}  // namespace depthwise
