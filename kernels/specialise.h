// Finds the launcher of a specialisation, and has it built on first use.
#pragma once

#include <string>

#include "select.h"

namespace depthwise {

// Called from any thread; compiles `source`, loads it and hands its launcher to add_launcher. 0: done.
using Builder = int (*)(const char* name, const char* source);

void set_builder(Builder builder);
void add_launcher(const std::string& name, Launcher launcher);
void add_built_in(const Specialisation& specialisation, Launcher launcher);

// Whether stage 1 compiled it.
bool is_built_in(const Specialisation& specialisation);

// Null while it is not built.
Launcher find_launcher(const Specialisation& specialisation);
// Builds it if need be; throws std::runtime_error where that fails.
Launcher find_or_build_launcher(const Specialisation& specialisation);

// "" leaves the choice to select_config.
void force_variant(const std::string& variant);
// The config to use: select_config's, or the forced one. Throws where the forced one cannot serve.
Config config_for(const Problem& problem);

}  // namespace depthwise
