// Lifts a run-time dtype into a type, checks launches, and runs a specialisation.
#pragma once

#include <stdexcept>
#include <string>

#include "general.cuh"
#include "specialise.h"

namespace depthwise {

inline void check_launch(int error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("depthwise_inline: CUDA launch failed: ") +
                             cudaGetErrorString(static_cast<cudaError_t>(error)));
}

template <class T>
struct TypeTag {
  using type = T;
};

template <class Function>
void with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32: return function(TypeTag<float>{});
    case DType::kFloat16: return function(TypeTag<float16>{});
    case DType::kBFloat16: return function(TypeTag<bfloat16>{});
    case DType::kFloat64: return function(TypeTag<double>{});
  }
  throw std::runtime_error("depthwise_inline: unsupported dtype");
}

// As with_type, for the type of a problem's weight and bias too.
template <class Function>
void with_types(const Problem& p, Function&& function) {
  with_type(p.dtype, [&](auto tag) {
    if constexpr (sizeof(typename decltype(tag)::type) == 2) {
      if (p.float_weight) return function(tag, TypeTag<float>{});
    }
    function(tag, tag);
  });
}

inline GeneralArgs general_args(const Problem& p) {
  return {p.n,
          static_cast<int>(p.multiplier),
          static_cast<int>(p.kernel_h),
          static_cast<int>(p.kernel_w),
          static_cast<int>(p.stride_h),
          static_cast<int>(p.stride_w),
          static_cast<int>(p.padding_h),
          static_cast<int>(p.padding_w),
          static_cast<int>(p.dilation_h),
          static_cast<int>(p.dilation_w),
          dense_tensor(p.layout, p.c, p.h, p.w),
          dense_tensor(p.layout, p.out_c, p.out_h, p.out_w),
          output_steps(p.stride_h, p.dilation_h),
          output_steps(p.stride_w, p.dilation_w)};
}

inline unsigned general_blocks(int64_t threads) {
  const int64_t blocks = (threads + kGeneralThreads - 1) / kGeneralThreads;
  if (blocks > INT32_MAX) throw std::runtime_error("depthwise_inline: tensor too large");
  return static_cast<unsigned>(blocks);
}

// The launcher of a choice, built if need be. Null: the general kernel has to serve.
inline Launcher obtain_launcher(const Problem& p, const Choice& choice, cudaStream_t stream) {
  if (choice.launcher || choice.config.kernel == Kernel::kGeneral) return choice.launcher;
  // Nothing is built while a CUDA graph is being captured: compiling takes seconds and loading may synchronise.
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capturing);
  return capturing == cudaStreamCaptureStatusNone ? find_or_build_launcher(specialisation_of(p, choice.config))
                                                  : nullptr;
}

// Runs the specialisation that `p` deserves. False: the general kernel has to serve.
inline bool launch_specialised(const Problem& p, const void* input, const void* weight, const void* bias, void* out,
                               cudaStream_t stream) {
  DirectArgs args = direct_args(p);
  args.input = input;
  args.weight = weight;
  args.bias = bias;
  args.out = out;
  int answer = cudaSuccess;
  for (int choices = 0; choices < 2; ++choices) {
    const Choice choice = choose(p, answer);
    const Launcher launcher = obtain_launcher(p, choice, stream);
    if (launcher == nullptr) return false;
    answer = launcher(&args, choice.config.tile, stream);
    if (is_refusal(answer)) continue;
    check_launch(answer);
    return true;
  }
  return false;
}

}  // namespace depthwise
