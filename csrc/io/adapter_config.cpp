// AdapterConfig: ranks, scaling, and the checks on its values.
#include "adapter_config.h"

#include <rankwise/file_error.h>

#include <cmath>
#include <set>
#include <sstream>
#include <stdexcept>

#include "message_text.h"
#include "module_pattern.h"

namespace rankwise {
namespace {

/// PEFT: pattern.get(get_pattern_key(pattern.keys(), module), otherwise).
template <class Value>
Value lookup(const PatternList<Value>& patterns, std::string_view module, Value otherwise) {
  for (const auto& [key, value] : patterns) {
    if (io::pattern_matches(key, module)) return value;
  }
  for (const auto& [key, value] : patterns) {
    if (key == module) return value;  // a name that, read as a regex, does not match itself
  }
  return otherwise;
}

}  // namespace

int64_t AdapterConfig::rank_of(std::string_view module) const {
  return lookup(rank_pattern, module, rank);
}

double AdapterConfig::alpha_of(std::string_view module) const {
  return lookup(alpha_pattern, module, alpha);
}

double AdapterConfig::scaling(std::string_view module) const {
  const auto r = static_cast<double>(rank_of(module));
  if (r == 0) return 0;
  return alpha_of(module) / (rslora ? std::sqrt(r) : r);
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
    if (config_.peft_type != "LORA") fail("peft_type", "\"LORA\"", in_quotes(config_.peft_type));
    integer("r", config_.rank, 1);
    finite("lora_alpha", config_.alpha);
    if (!(config_.dropout >= 0 && config_.dropout <= 1)) {
      fail("lora_dropout", "in [0, 1]", text_of(config_.dropout));
    }
    exclusive("target_modules", config_.target_modules, config_.target_modules_regex);
    exclusive("exclude_modules", config_.exclude_modules, config_.exclude_modules_regex);
    keys("rank_pattern", config_.rank_pattern);
    keys("alpha_pattern", config_.alpha_pattern);
    for (const auto& [key, value] : config_.rank_pattern) {
      integer("rank_pattern " + in_quotes(key), value, 0);
    }
    for (const auto& [key, value] : config_.alpha_pattern) {
      finite("alpha_pattern " + in_quotes(key), value);
    }
  }

 private:
  [[noreturn]] void fail(const std::string& field, const std::string& wanted,
                         const std::string& got) {
    throw FileError(file_ + ": " + field + " must be " + wanted + ", got " + got);
  }

  void integer(const std::string& field, int64_t value, int64_t least) {
    if (value >= least && value <= max_rank) return;
    fail(field, "in " + std::to_string(least) + " .. " + std::to_string(max_rank), text_of(value));
  }

  void finite(const std::string& field, double value) {
    if (!std::isfinite(value)) fail(field, "finite", text_of(value));
  }

  void exclusive(const std::string& field, const std::vector<std::string>& names,
                 const std::string& regex) {
    if (!names.empty() && !regex.empty()) fail(field, "a list or one string", "both");
  }

  template <class Value>
  void keys(const std::string& field, const PatternList<Value>& patterns) {
    if (patterns.size() > max_patterns) {
      fail(field, "of at most " + std::to_string(max_patterns) + " entries",
           text_of(patterns.size()));
    }
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

void check_adapter_config(const AdapterConfig& config, const std::string& file) {
  ConfigCheck(config, file).run();
}

}  // namespace io
}  // namespace rankwise
