// Finds the launcher of a specialisation, and has it built on first use.
#pragma once

#include <string>

#include "grad_weight_plan.h"
#include "select.h"
#include "specialisation.h"

namespace depthwise {

// Called from any thread; compiles `source`, loads it and hands its launcher to add_launcher. 0: done; else `message`,
// of `capacity` bytes, says why not.
using Builder = int (*)(const char* name, const char* source, char* message, int capacity);

void set_builder(Builder builder);
void add_launcher(const std::string& name, Launcher launcher);

// Builds it if need be; throws std::runtime_error where that fails.
Launcher find_or_build_launcher(const Specialisation& specialisation);

// "" leaves the choice to select_config.
void force_variant(const std::string& variant);

struct Choice {
  Config config;                    // select_config's, or the forced one
  Launcher launcher;                // of its specialisation; null: not built yet, or the general kernel
  GradWeightPlan grad_weight_plan;  // of that direction, and of both gradients at once
};
// What serves a problem; throws where the forced variant cannot. `refusal`: what the launcher of the first choice answered
// where its kernel is not for this GPU; then what select_config says for such GPUs, and throws where a variant is forced.
Choice choose(const Problem& problem, int refusal = 0);
// Whether a channels_last problem of forward or grad of input is better served as one of NCHW, between two copies: where a
// kernel for many taps has room for one channel, but not for eight, or serves a depth multiplier.
bool serves_in_nchw(const Problem& problem);

}  // namespace depthwise
