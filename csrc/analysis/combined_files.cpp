// The combination of whole adapters.
#include <rankwise/analysis.h>

#include <algorithm>
#include <random>

#include "adapter_modules.h"
#include "factors.h"

namespace rankwise::analysis {
namespace {

// One module's updates, of the adapters that have it.
struct Shares {
  std::vector<AdapterUpdate> updates;
  std::vector<double> weights;
  uint64_t seed = 0;
};

std::vector<Shares> shares_of(const std::vector<AdapterFile>& adapters,
                              const std::vector<double>& weights, uint64_t seed) {
  std::vector<Modules> modules;
  for (const AdapterFile& adapter : adapters) modules.push_back(modules_of(adapter));
  std::mt19937_64 seeds(seed);
  std::vector<Shares> shares;
  for (const std::string& name : names_in(modules)) {
    Shares& share = shares.emplace_back();
    share.seed = seeds();
    for (size_t i = 0; i < modules.size(); ++i) {
      const auto found = modules[i].find(name);
      if (found == modules[i].end()) continue;
      share.updates.push_back(found->second);
      share.weights.push_back(weights[i]);
    }
  }
  return shares;
}

AdapterUpdate combined(const Shares& shares, CombineOptions options) {
  options.seed = shares.seed;
  AdapterUpdate update = combine(shares.updates, shares.weights, options).update;
  at::ScalarType widest = shares.updates[0].lora_A.scalar_type();
  for (const AdapterUpdate& of : shares.updates)
    for (const at::Tensor& factor : {of.lora_A, of.lora_B, of.lora_E})
      if (factor.defined()) widest = c10::promoteTypes(widest, factor.scalar_type());
  update.lora_A = update.lora_A.to(widest);
  update.lora_B = update.lora_B.to(widest);
  return update;
}

// Adds the tensors that are not factors, which must be the same in all that have them.
void add_saved(const std::vector<AdapterFile>& adapters, AdapterFile& result) {
  for (size_t i = 0; i < adapters.size(); ++i) {
    for (const auto& [name, tensor] : saved_in(adapters[i])) {
      const at::Tensor& first = result.tensors.emplace(name, tensor).first->second;
      if (first.scalar_type() == tensor.scalar_type() && first.equal(tensor)) continue;
      fail("combine", "tensors that are not factors must be equal in all adapters, got another '" +
                          name + "' in adapters[" + std::to_string(i) + "]; leave it out of one");
    }
    auto& whole = result.config.modules_to_save;
    for (const std::string& name : adapters[i].config.modules_to_save)
      if (std::ranges::find(whole, name) == whole.end()) whole.push_back(name);
  }
}

}  // namespace

AdapterFile combine(const std::vector<AdapterFile>& adapters, const std::vector<double>& weights,
                    const CombineOptions& options) {
  if (weights.size() != adapters.size() || adapters.empty())
    fail("combine", "there must be at least one adapter and a weight for each, got " +
                        std::to_string(adapters.size()) + " and " + std::to_string(weights.size()));
  const std::vector<Shares> shares = shares_of(adapters, weights, options.seed);
  std::vector<AdapterUpdate> updates(shares.size());
  const auto one = [&](int64_t i) { updates[i] = combined(shares[i], options); };
  const auto count = static_cast<int64_t>(shares.size());
  if (options.method == Combination::linear) {
    run_blocks(count, one);
  } else {  // one module's dense updates at a time
    for (int64_t i = 0; i < count; ++i) one(i);
  }
  AdapterFile result = fold_adapter(updates, adapters[0].config);
  add_saved(adapters, result);
  return result;
}

}  // namespace rankwise::analysis
