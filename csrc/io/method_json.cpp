// LoRA's and AdaLoRA's own fields. PEFT 0.21, src/peft/tuners/{lora,adalora}/config.py.
#include "method_json.h"

#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "adapter_config.h"
#include "bounded_json.h"
#include "message_text.h"

namespace rankwise::io {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view pattern_suffix = ".lora_E";

/// PEFT's AdaLoRA scales by lora_alpha / (init_r + 1e-5).
constexpr double rank_offset = 1e-5;

double rounded(double value, int significant_digits) {
  char text[32];
  const auto end = std::to_chars(std::begin(text), std::end(text), value,
                                 std::chars_format::scientific, significant_digits - 1);
  std::from_chars(text, end.ptr, value);
  return value;
}

/// Twelve digits undo the rounding errors of alpha_from_file, so that a file's 32 stays 32.
double alpha_to_file(double alpha, double rank) {
  return rounded(alpha / rank * (rank + rank_offset), 12);
}

/// The short number that alpha_to_file makes this of, else the exact quotient.
double alpha_from_file(double alpha, double rank) {
  const double exact = alpha / (rank + rank_offset) * rank;
  const double brief = rounded(exact, 9);
  return alpha_to_file(brief, rank) == alpha ? brief : exact;
}

/// PEFT declares alpha an integer; a whole number is written as one.
Json whole_or_real(double value) {
  const bool whole = std::abs(value) < 9e15 && value == std::floor(value);
  return whole ? Json(static_cast<int64_t>(value)) : Json(value);
}

/// Stands in a file for a schedule that is not known.
AllocationSettings no_allocation(int64_t rank) {
  return {.target_rank = rank, .total_steps = 1};
}

/// Members of the object as far as they are numbers.
class Numbers {
 public:
  explicit Numbers(const JsonFields& fields) : fields_(fields) {}

  /// Also a whole number with a point, as programs that divide write it.
  void read(const char* field, int64_t& value) {
    double real = static_cast<double>(value);
    read(field, real);
    if (real == std::floor(real) && std::abs(real) <= static_cast<double>(max_steps)) {
      value = static_cast<int64_t>(real);
    } else {
      all_ = false;
    }
  }
  void read(const char* field, double& value) {
    const auto* json = fields_.find(field);
    if (json && json->is_number()) {
      value = json->get<double>();
    } else if (json) {
      all_ = false;
    }
  }
  bool all() const { return all_; }

 private:
  const JsonFields& fields_;
  bool all_ = true;
};

std::optional<AllocationSettings> read_allocation(const JsonFields& fields, int64_t rank) {
  AllocationSettings allocation;
  Numbers numbers(fields);
  numbers.read("target_r", allocation.target_rank);
  numbers.read("tinit", allocation.warmup_steps);
  numbers.read("tfinal", allocation.final_steps);
  numbers.read("deltaT", allocation.allocation_interval);
  numbers.read("beta1", allocation.beta1);
  numbers.read("beta2", allocation.beta2);
  numbers.read("orth_reg_weight", allocation.orthogonality_weight);
  numbers.read("total_step", allocation.total_steps);
  const bool usable = numbers.all() && allocation_fault(allocation).empty();
  if (!usable || allocation == no_allocation(rank)) return std::nullopt;
  return allocation;
}

void read_lora(const JsonFields& fields, AdapterConfig& config) {
  config.rank = fields.integer("r", config.rank);
  config.alpha = fields.number("lora_alpha", config.alpha);
  config.rslora = fields.boolean("use_rslora");
  fields.members("rank_pattern", [&](auto& key, auto& name, auto& value) {
    config.rank_pattern.emplace_back(key, fields.to_integer(name, value));
  });
  fields.members("alpha_pattern", [&](auto& key, auto& name, auto& value) {
    config.alpha_pattern.emplace_back(key, fields.to_number(name, value));
  });
}

/// PEFT's AdaLoRA has r, use_rslora and alpha_pattern as well, and makes no use of them.
void read_adalora(const JsonFields& fields, AdapterConfig& config) {
  config.rank = fields.integer("init_r", 12);
  const double alpha = fields.number("lora_alpha", config.alpha);
  config.alpha = alpha_from_file(alpha, static_cast<double>(config.rank));
  config.allocation = read_allocation(fields, config.rank);
  fields.members("rank_pattern", [&](auto& key, auto& name, auto& value) {
    if (!key.ends_with(pattern_suffix) || key.size() == pattern_suffix.size()) {
      fields.fail("every key of rank_pattern", "<module>.lora_E", in_quotes(key));
    }
    config.kept_directions.emplace(key.substr(0, key.size() - pattern_suffix.size()),
                                   fields.to_booleans(name, value));
  });
}

JsonMembers lora_members(const AdapterConfig& config) {
  Json::object_t ranks;  // emplace_back: the keys are distinct, and operator[] looks for them
  for (const auto& [key, value] : config.rank_pattern) ranks.emplace_back(key, value);
  Json::object_t alphas;
  for (const auto& [key, value] : config.alpha_pattern) {
    alphas.emplace_back(key, whole_or_real(value));
  }
  return {{"alpha_pattern", std::move(alphas)},
          {"lora_alpha", whole_or_real(config.alpha)},
          {"r", config.rank},
          {"rank_pattern", std::move(ranks)},
          {"use_rslora", config.rslora}};
}

JsonMembers adalora_members(const AdapterConfig& config) {
  Json::object_t pattern;
  for (const auto& [module, kept] : config.kept_directions) {
    pattern.emplace_back(module + std::string(pattern_suffix), kept);
  }
  const AllocationSettings allocation = config.allocation.value_or(no_allocation(config.rank));
  return {
      {"beta1", allocation.beta1},
      {"beta2", allocation.beta2},
      {"deltaT", allocation.allocation_interval},
      {"init_r", config.rank},
      {"lora_alpha", whole_or_real(alpha_to_file(config.alpha, static_cast<double>(config.rank)))},
      {"orth_reg_weight", allocation.orthogonality_weight},
      // null: PEFT's allocator fails at an empty object
      {"rank_pattern", pattern.empty() ? Json() : Json(std::move(pattern))},
      {"target_r", allocation.target_rank},
      {"tfinal", allocation.final_steps},
      {"tinit", allocation.warmup_steps},
      {"total_step", allocation.total_steps}};
}

}  // namespace

void read_method(const JsonFields& fields, AdapterConfig& config) {
  config.peft_type == "ADALORA" ? read_adalora(fields, config) : read_lora(fields, config);
}

JsonMembers method_members(const AdapterConfig& config) {
  return config.peft_type == "ADALORA" ? adalora_members(config) : lora_members(config);
}

}  // namespace rankwise::io
