// The table of launchers. Lookups are on every call's path: a short vector, read under a shared lock.
#include "specialise.h"

#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <vector>

namespace depthwise {
namespace {

struct Entry {
  Specialisation specialisation;
  std::string name;
  Launcher launcher;
  bool built_in;
};

std::shared_mutex mutex;
std::vector<Entry>& entries() {
  static std::vector<Entry>* const all = new std::vector<Entry>;  // outlives threads that launch at exit
  return *all;
}
Builder builder = nullptr;
std::string forced;
bool is_forced = false;

}  // namespace

void set_builder(Builder new_builder) { builder = new_builder; }

void add_built_in(const Specialisation& specialisation, Launcher launcher) {
  const std::unique_lock lock(mutex);
  entries().push_back({specialisation, specialisation_name(specialisation), launcher, true});
}

void add_launcher(const std::string& name, Launcher launcher) {
  const std::unique_lock lock(mutex);
  for (Entry& entry : entries())
    if (entry.name == name) entry.launcher = launcher;
}

Launcher find_launcher(const Specialisation& specialisation) {
  const std::shared_lock lock(mutex);
  for (const Entry& entry : entries())
    if (entry.specialisation == specialisation) return entry.launcher;
  return nullptr;
}

bool is_built_in(const Specialisation& specialisation) {
  const std::shared_lock lock(mutex);
  for (const Entry& entry : entries())
    if (entry.specialisation == specialisation) return entry.built_in;
  return false;
}

Launcher find_or_build_launcher(const Specialisation& specialisation) {
  if (const Launcher launcher = find_launcher(specialisation)) return launcher;
  const std::string name = specialisation_name(specialisation);
  {
    const std::unique_lock lock(mutex);
    bool known = false;
    for (const Entry& entry : entries()) known = known || entry.specialisation == specialisation;
    if (!known) entries().push_back({specialisation, name, nullptr, false});
  }
  if (builder == nullptr || builder(name.c_str(), specialisation_source(specialisation).c_str()) != 0)
    throw std::runtime_error("depthwise_inline: could not build the specialisation " + name);
  if (const Launcher launcher = find_launcher(specialisation)) return launcher;
  throw std::runtime_error("depthwise_inline: the builder gave no launcher for " + name);
}

void force_variant(const std::string& variant) {
  const std::unique_lock lock(mutex);
  forced = variant;
  is_forced = !variant.empty();
}

Config config_for(const Problem& problem) {
  if (!is_forced) return select_config(problem);
  const std::shared_lock lock(mutex);
  Config config;
  if (!forced_config(problem, forced, &config))
    throw std::runtime_error("depthwise_inline: the forced variant '" + forced + "' cannot serve this problem");
  return config;
}

}  // namespace depthwise
