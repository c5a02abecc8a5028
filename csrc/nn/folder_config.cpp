// Layers' settings as PEFT's configuration: one common value, and patterns for what differs.
#include "folder_config.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <sstream>
#include <stdexcept>

namespace rankwise {
namespace {

using Placed = std::vector<PlacedAdapter>;

[[noreturn]] void fail(const std::string& reason) {
  throw std::invalid_argument("save_adapter: " + reason + "; use export_lora");
}

template <class Of>
auto values_of(const Placed& layers, const Of& of) {
  std::vector<decltype(of(layers.front().adapter))> values;
  for (const PlacedAdapter& layer : layers) values.push_back(of(layer.adapter));
  return values;
}

template <class Value>
Value one(const std::string& what, const std::vector<Value>& values) {
  for (const Value& value : values) {
    if (value == values.front()) continue;
    std::ostringstream got;
    got << std::boolalpha << values.front() << " and " << value;
    fail("a PEFT folder has one " + what + " for all layers, got " + got.str());
  }
  return values.front();
}

// The first of the most frequent.
template <class Value>
Value most_common(const std::vector<Value>& values) {
  std::map<Value, size_t> times;
  for (const Value value : values) ++times[value];
  return *std::max_element(values.begin(), values.end(),
                           [&](Value a, Value b) { return times.at(a) < times.at(b); });
}

// Nothing when all are alike. Otherwise all layers: a pattern also matches the paths that end in
// it and the first match counts, so that the longest path must come first.
template <class Value>
PatternList<Value> patterns(const Placed& layers, const std::vector<Value>& values) {
  PatternList<Value> list;
  if (std::equal(values.begin() + 1, values.end(), values.begin())) return list;
  for (size_t i = 0; i < layers.size(); ++i) list.emplace_back(layers[i].path, values[i]);
  std::stable_sort(list.begin(), list.end(),
                   [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
  return list;
}

// The alpha that gives the layer's scaling at its present rank.
double alpha_now(const nn::HeldAdapter& adapter) {
  const nn::AdapterSettings& settings = adapter.settings;
  if (adapter.rank == settings.rank) return settings.alpha;
  const auto rank = static_cast<double>(adapter.rank);
  return adapter.scaling() * (settings.rslora ? std::sqrt(rank) : rank);
}

void add_lora(AdapterConfig& config, const Placed& layers) {
  const auto ranks = values_of(layers, [](const nn::HeldAdapter& adapter) { return adapter.rank; });
  const auto alphas = values_of(layers, alpha_now);
  config.rank = most_common(ranks);
  config.alpha = most_common(alphas);
  config.rank_pattern = patterns(layers, ranks);
  config.alpha_pattern = patterns(layers, alphas);
}

void add_adalora(AdapterConfig& config, const Placed& layers) {
  config.peft_type = "ADALORA";
  config.rank =
      one("initial rank",
          values_of(layers, [](const nn::HeldAdapter& adapter) { return adapter.settings.rank; }));
  config.alpha =
      one("alpha",
          values_of(layers, [](const nn::HeldAdapter& adapter) { return adapter.settings.alpha; }));
  if (config.rslora) fail("PEFT's AdaLoRA has no rslora");
  bool pruned = false;
  for (const auto& [path, adapter, embedding] : layers) {
    if (adapter.rank > config.rank) {
      fail("PEFT's AdaLoRA ranks are at most the initial " + std::to_string(config.rank) +
           ", got " + std::to_string(adapter.rank) + " in " + path);
    }
    pruned |= adapter.rank < config.rank;
  }
  // Which of the initial directions were kept is no longer known, nor does PEFT need it: the file
  // holds the kept ones alone, and their number is what counts.
  for (const auto& [path, adapter, embedding] : layers) {
    if (!pruned) break;
    std::vector<bool>& kept = config.kept_directions[path];
    kept.assign(config.rank, false);
    std::fill_n(kept.begin(), adapter.rank, true);
  }
  config.allocation = shared_allocation(layers);
}

}  // namespace

std::optional<AllocationSettings> shared_allocation(const Placed& layers) {
  const auto known =
      values_of(layers, [](const nn::HeldAdapter& adapter) { return adapter.settings.allocation; });
  const bool same = std::equal(known.begin() + 1, known.end(), known.begin());
  return same ? known.front() : std::nullopt;
}

AdapterConfig folder_config(const Placed& layers) {
  AdapterConfig config;
  config.dropout = most_common(
      values_of(layers, [](const nn::HeldAdapter& adapter) { return adapter.settings.dropout; }));
  config.rslora = one("value of rslora", values_of(layers, [](const nn::HeldAdapter& adapter) {
                        return adapter.settings.rslora;
                      }));
  const std::string method =
      one("method", values_of(layers, [](const nn::HeldAdapter& adapter) {
            return std::string(adapter.settings.triplets ? "AdaLoRA" : "LoRA");
          }));
  method == "AdaLoRA" ? add_adalora(config, layers) : add_lora(config, layers);
  return config;
}

}  // namespace rankwise
