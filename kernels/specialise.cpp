// The table of launchers, and what each thread remembers of it: selection, plan and lookup are on every call's path.
#include "specialise.h"

#include <array>
#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

namespace depthwise {
namespace {

std::shared_mutex mutex;
std::map<std::string, Launcher>& launchers() {
  static std::map<std::string, Launcher>* const all = new std::map<std::string, Launcher>;  // outlives threads at exit
  return *all;
}
Builder builder = nullptr;
std::string forced;
bool is_forced = false;
std::atomic<unsigned> generation{1};  // of all that choices depend on

Launcher find_launcher(const Specialisation& specialisation) {
  const std::shared_lock lock(mutex);
  const auto found = launchers().find(specialisation_name(specialisation));
  return found == launchers().end() ? nullptr : found->second;
}

Config config_for(const Problem& problem, int refusal) {
  if (!is_forced) return select_config(problem, is_refusal(refusal));
  const std::shared_lock lock(mutex);
  if (is_refusal(refusal))
    throw std::runtime_error("depthwise_inline: the forced variant '" + forced + "' needs " +
                             (refusal == kBeforeSm80 ? "a GPU of compute capability 8.0 or higher"
                                                     : "more shared memory than this GPU has"));
  Config config;
  if (!forced_config(problem, forced, &config))
    throw std::runtime_error("depthwise_inline: the forced variant '" + forced + "' cannot serve this problem");
  return config;
}

constexpr size_t kFirstSize = offsetof(Problem, n), kSizes = offsetof(Problem, aligned) - kFirstSize;

bool same(const Problem& a, const Problem& b) {
  return a.direction == b.direction && a.dtype == b.dtype && a.layout == b.layout && a.aligned == b.aligned &&
         a.float_weight == b.float_weight && std::memcmp(&a.n, &b.n, kSizes) == 0;
}

size_t slot_of(const Problem& p, size_t slots) {
  int64_t sizes[kSizes / sizeof(int64_t)];
  std::memcpy(sizes, &p.n, kSizes);
  uint64_t hash = static_cast<uint64_t>(p.direction) * 16 + static_cast<uint64_t>(p.dtype) * 4 +
                  static_cast<uint64_t>(p.layout) * 2 + p.aligned + p.float_weight * 64;
  for (const int64_t size : sizes) hash = (hash ^ static_cast<uint64_t>(size)) * 0x9e3779b97f4a7c15u;
  return (hash >> 32) % slots;
}

}  // namespace

Choice choose(const Problem& problem, int refusal) {
  struct Remembered {
    Problem problem;
    bool frugal;
    Choice choice;
    unsigned generation = 0;
  };
  constexpr size_t kSlots = 256;
  const bool frugal = is_refusal(refusal);
  thread_local const std::unique_ptr<std::array<Remembered, kSlots>> all{new std::array<Remembered, kSlots>()};
  Remembered& remembered = (*all)[(slot_of(problem, kSlots) + frugal) % kSlots];
  const unsigned now = generation.load(std::memory_order_acquire);
  if (remembered.generation == now && remembered.frugal == frugal && same(remembered.problem, problem))
    return remembered.choice;

  const Config config = config_for(problem, refusal);
  const bool general = config.kernel == Kernel::kGeneral;
  const bool sums = problem.direction == Direction::kGradWeight || is_gradients_kernel(config.kernel);
  const Choice choice{config, general ? nullptr : find_launcher(specialisation_of(problem, config)),
                      sums ? grad_weight_plan(problem, config) : GradWeightPlan{}};
  remembered = {problem, frugal, choice, now};
  return choice;
}

bool serves_in_nchw(const Problem& problem) {
  // Of fewer taps the general kernel takes less than copies and launches might: not measured.
  constexpr int64_t kFewestTaps = 17 * 17;
  if (problem.layout == Layout::kNchw || problem.kernel_h * problem.kernel_w < kFewestTaps || is_forced) return false;
  if (choose(problem).config.kernel != Kernel::kGeneral) return false;
  Problem nchw = problem;
  nchw.layout = Layout::kNchw;
  return choose(nchw).config.kernel != Kernel::kGeneral;
}

void set_builder(Builder new_builder) { builder = new_builder; }

void add_launcher(const std::string& name, Launcher launcher) {
  const std::unique_lock lock(mutex);
  launchers()[name] = launcher;
  ++generation;
}

Launcher find_or_build_launcher(const Specialisation& specialisation) {
  if (const Launcher launcher = find_launcher(specialisation)) return launcher;
  const std::string name = specialisation_name(specialisation);
  if (builder == nullptr) throw std::runtime_error("depthwise_inline: nothing is there to build " + name);
  std::array<char, 4096> message{};
  if (builder(name.c_str(), specialisation_source(specialisation).c_str(), message.data(), message.size()) != 0)
    throw std::runtime_error(message.data());
  if (const Launcher launcher = find_launcher(specialisation)) return launcher;
  throw std::runtime_error("depthwise_inline: the builder gave no launcher for " + name);
}

void force_variant(const std::string& variant) {
  const std::unique_lock lock(mutex);
  forced = variant;
  is_forced = !variant.empty();
  ++generation;
}

}  // namespace depthwise
