// How far updates, and whole adapters, lie apart.
#include <ATen/ATen.h>
#include <rankwise/analysis.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "adapter_modules.h"
#include "factors.h"

namespace rankwise::analysis {
namespace {

constexpr Distance unbounded{std::numeric_limits<double>::infinity(),
                             std::numeric_limits<double>::infinity()};

Distance relative_to(double absolute, double first_norm, double second_norm) {
  const double larger = std::max(first_norm, second_norm);
  return {absolute, larger == 0 ? 0 : absolute / larger};
}

// Of the updates of one module, or of that of the only adapter that has it.
Distance of_updates(const AdapterUpdate* first, const AdapterUpdate* second) {
  if (first && second) {
    const bool fits = first->lora_A.size(1) == second->lora_A.size(1) &&
                      first->lora_B.size(0) == second->lora_B.size(0) &&
                      first->embedding == second->embedding;
    return fits ? distance(*first, *second) : unbounded;
  }
  const double norm = on_one_thread(
      [&] { return factors_of("distances", "an adapter", first ? *first : *second).norm(); });
  return relative_to(norm, norm, 0);
}

// Of tensors that are not factors, in pieces: they may be a vocabulary's.
Distance of_tensors(const at::Tensor& first, const at::Tensor& second) {
  if (first.sizes() != second.sizes()) return unbounded;
  return on_one_thread([&] {
    const Split pieces(first.numel(), scratch_elements);
    double apart = 0, one = 0, two = 0;
    for (int64_t i = 0; i < pieces.count(); ++i) {
      const at::Tensor a = pieces[i].of(first.flatten(), 0).to(at::kCPU, at::kDouble);
      const at::Tensor b = pieces[i].of(second.flatten(), 0).to(at::kCPU, at::kDouble);
      apart += std::pow(norm_of(a - b), 2);
      one += std::pow(norm_of(a), 2);
      two += std::pow(norm_of(b), 2);
    }
    return relative_to(std::sqrt(apart), std::sqrt(one), std::sqrt(two));
  });
}

}  // namespace

Distance distance(const AdapterUpdate& first, const AdapterUpdate& second) {
  return on_one_thread([&] {
    const Factors one = factors_of("distance", "first", first);
    const Factors two = factors_of("distance", "second", second);
    check_same_shape("distance", named("second", second), two, "first", one);
    if (one.A.equal(two.A) && one.B.equal(two.B)) return Distance{};  // without rounding
    const Factors between{at::cat({one.A, two.A}, 0), at::cat({one.B, -two.B}, 1)};
    return relative_to(between.norm(), one.norm(), two.norm());
  });
}

std::vector<ModuleDistance> distances(const AdapterFile& first, const AdapterFile& second) {
  const std::vector<Modules> modules = {modules_of(first), modules_of(second)};
  std::vector<ModuleDistance> found;
  for (const std::string& name : names_in(modules)) found.push_back({name, {}});
  run_blocks(static_cast<int64_t>(found.size()), [&](int64_t i) {
    const auto update = [&](const Modules& of) {
      const auto place = of.find(found[i].module);
      return place == of.end() ? nullptr : &place->second;
    };
    found[i].distance = of_updates(update(modules[0]), update(modules[1]));
  });
  const std::vector<Tensors> saved = {saved_in(first), saved_in(second)};
  for (const std::string& name : names_in(saved)) {
    const AdapterKey key = parse_adapter_key(name).value();
    const bool both = saved[0].contains(name) && saved[1].contains(name);
    found.push_back({key.module + "." + key.parameter,
                     both ? of_tensors(saved[0].at(name), saved[1].at(name)) : unbounded});
  }
  std::ranges::sort(found, {}, &ModuleDistance::module);
  return found;
}

bool same_function(const AdapterFile& first, const AdapterFile& second, double tolerance) {
  if (!(tolerance >= 0))
    fail("same_function", "tolerance must be at least 0, got " + std::to_string(tolerance));
  return std::ranges::all_of(distances(first, second), [&](const ModuleDistance& one) {
    return one.distance.relative <= tolerance;
  });
}

}  // namespace rankwise::analysis
