// AdapterConfig: ranks, scaling, and the checks on its values.
#include "adapter_config.h"

#include <rankwise/file_error.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "message_text.h"
#include "module_pattern.h"

namespace rankwise {
namespace {

template <class Value>
PatternIndex index_of(const PatternList<Value>& patterns) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : patterns) keys.push_back(key);
  return PatternIndex(std::move(keys));
}

}  // namespace

ModuleSettings::ModuleSettings(const AdapterConfig& config)
    : config_(config),
      rank_pattern_(index_of(config.rank_pattern)),
      alpha_pattern_(index_of(config.alpha_pattern)) {}

int64_t ModuleSettings::rank_of(std::string_view module) const {
  const auto kept = config_.kept_directions.find(module);
  if (kept == config_.kept_directions.end()) return initial_rank_of(module);
  return std::count(kept->second.begin(), kept->second.end(), true);
}

int64_t ModuleSettings::initial_rank_of(std::string_view module) const {
  const std::optional<size_t> place = rank_pattern_.find(module);
  return place ? config_.rank_pattern[*place].second : config_.rank;
}

double ModuleSettings::alpha_of(std::string_view module) const {
  const std::optional<size_t> place = alpha_pattern_.find(module);
  return place ? config_.alpha_pattern[*place].second : config_.alpha;
}

double ModuleSettings::scaling(std::string_view module) const {
  const auto rank = static_cast<double>(initial_rank_of(module));
  if (rank == 0) return 0;
  return alpha_of(module) / (config_.rslora ? std::sqrt(rank) : rank);
}

int64_t AdapterConfig::rank_of(std::string_view module) const {
  return ModuleSettings(*this).rank_of(module);
}

double AdapterConfig::alpha_of(std::string_view module) const {
  return ModuleSettings(*this).alpha_of(module);
}

double AdapterConfig::scaling(std::string_view module) const {
  return ModuleSettings(*this).scaling(module);
}

namespace io {
namespace {

template <class Value>
std::string text_of(Value value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

class ConfigCheck {
 public:
  ConfigCheck(const AdapterConfig& config, const std::string& file)
      : config_(config), file_(file) {}

  void run() {
    finite("lora_alpha", config_.alpha);
    if (!(config_.dropout >= 0 && config_.dropout <= 1)) {
      fail("lora_dropout", "in [0, 1]", text_of(config_.dropout));
    }
    exclusive("target_modules", config_.target_modules, config_.target_modules_regex);
    exclusive("exclude_modules", config_.exclude_modules, config_.exclude_modules_regex);
    if (config_.peft_type == "LORA") {
      lora();
    } else if (config_.peft_type == "ADALORA") {
      adalora();
    } else {
      fail("peft_type", "\"LORA\" or \"ADALORA\"", in_quotes(config_.peft_type));
    }
  }

 private:
  void lora() {
    integer("r", config_.rank, 1, max_rank);
    keys("rank_pattern", config_.rank_pattern);
    keys("alpha_pattern", config_.alpha_pattern);
    for (const auto& [key, value] : config_.rank_pattern) {
      integer("rank_pattern " + in_quotes(key), value, 0, max_rank);
    }
    for (const auto& [key, value] : config_.alpha_pattern) {
      finite("alpha_pattern " + in_quotes(key), value);
    }
    if (!config_.kept_directions.empty()) fail("kept_directions", "empty in LoRA", "some");
  }

  void adalora() {
    integer("init_r", config_.rank, 1, max_rank);
    // PEFT takes the rank in place of an alpha that is not.
    if (!(config_.alpha > 0 && config_.alpha < 1e300)) {
      fail("lora_alpha", "in (0, 1e300) in AdaLoRA", text_of(config_.alpha));
    }
    if (config_.rslora) fail("use_rslora", "false in AdaLoRA", "true");
    if (!config_.rank_pattern.empty()) fail("rank_pattern", "of booleans in AdaLoRA", "ranks");
    if (!config_.alpha_pattern.empty()) fail("alpha_pattern", "empty in AdaLoRA", "some");
    if (config_.allocation) {
      const std::string fault = allocation_fault(*config_.allocation);
      if (!fault.empty()) throw FileError(file_ + ": " + fault);
    }
    few("rank_pattern", config_.kept_directions.size());
    for (const auto& [module, kept] : config_.kept_directions) {
      if (static_cast<int64_t>(kept.size()) == config_.rank) continue;
      fail("rank_pattern " + in_quotes(module + ".lora_E"),
           "a list of init_r = " + text_of(config_.rank) + " booleans", text_of(kept.size()));
    }
  }

  [[noreturn]] void fail(const std::string& field, const std::string& wanted,
                         const std::string& got) {
    throw FileError(file_ + ": " + field + " must be " + wanted + ", got " + got);
  }

  void integer(const std::string& field, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    fail(field, "in " + text_of(least) + " .. " + text_of(most), text_of(value));
  }

  void finite(const std::string& field, double value) {
    if (!std::isfinite(value)) fail(field, "finite", text_of(value));
  }

  void exclusive(const std::string& field, const std::vector<std::string>& names,
                 const std::string& regex) {
    if (!names.empty() && !regex.empty()) fail(field, "a list or one string", "both");
  }

  void few(const std::string& field, size_t entries) {
    if (entries <= max_patterns) return;
    fail(field, "of at most " + text_of(max_patterns) + " entries", text_of(entries));
  }

  template <class Value>
  void keys(const std::string& field, const PatternList<Value>& patterns) {
    few(field, patterns.size());
    std::set<std::string_view> seen;
    size_t cost = 0;
    for (const auto& [key, value] : patterns) {
      if (!seen.insert(key).second) fail(field, "without repeated keys", in_quotes(key) + " twice");
      try {
        cost += pattern_cost(key);
      } catch (const std::invalid_argument& error) {
        throw FileError(file_ + ": " + field + ": " + error.what());
      }
      if (cost > max_pattern_cost)
        fail(field, "of fewer or simpler regular expressions", in_quotes(key));
    }
  }

  const AdapterConfig& config_;
  const std::string& file_;
};

}  // namespace

std::string allocation_fault(const AllocationSettings& settings) {
  for (const auto& [field, value] :
       {std::pair("target_r", settings.target_rank), std::pair("tinit", settings.warmup_steps),
        std::pair("tfinal", settings.final_steps),
        std::pair("deltaT", settings.allocation_interval),
        std::pair("total_step", settings.total_steps)}) {
    if (value < -max_steps || value > max_steps)
      return field + (" must be within 2^53, got " + text_of(value));
  }
  const int64_t fixed = settings.warmup_steps + settings.final_steps;
  if (settings.total_steps < 1 || settings.total_steps <= fixed) {
    return "total_step must be at least 1 and more than tinit + tfinal = " + text_of(fixed) +
           ", got " + text_of(settings.total_steps);
  }
  for (const auto& [field, value] :
       {std::pair("beta1", settings.beta1), std::pair("beta2", settings.beta2)}) {
    if (!std::isfinite(value)) return field + (" must be finite, got " + text_of(value));
  }
  const double weight = settings.orthogonality_weight;
  if (weight >= 0 && std::isfinite(weight)) return "";
  return "orth_reg_weight must be finite and at least 0, got " + text_of(weight);
}

void check_adapter_config(const AdapterConfig& config, const std::string& file) {
  ConfigCheck(config, file).run();
}

}  // namespace io
}  // namespace rankwise
