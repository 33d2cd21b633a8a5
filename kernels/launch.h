// What operators.cpp calls: one function a direction. All throw std::runtime_error where a launch fails.
#pragma once

#include <cstdint>

#include "problem.h"

namespace depthwise {

void launch_forward(const Problem& problem, const void* input, const void* weight, const void* bias, void* out,
                    void* stream);
void launch_grad_input(const Problem& problem, const void* grad_output, const void* weight, void* grad_input,
                       void* stream);

// Bytes of workspace that launch_grad_weight wants; bounded, see grad_weight.cu. Likewise of launch_gradients, below.
int64_t grad_weight_workspace(const Problem& problem);
// `grad_bias` null: not computed.
void launch_grad_weight(const Problem& problem, const void* grad_output, const void* input, void* grad_weight,
                        void* grad_bias, void* workspace, void* stream);

// Whether a kernel computes both gradients at once. `problem`: of kGradients.
bool computes_gradients(const Problem& problem);
int64_t gradients_workspace(const Problem& problem);
// False: nothing was launched, and each gradient has to be computed by itself.
bool launch_gradients(const Problem& problem, const void* grad_output, const void* input, const void* weight,
                      void* grad_input, void* grad_weight, void* workspace, void* stream);

}  // namespace depthwise
