// AdapterConfig: what adapter_config.json says about a LoRA or AdaLoRA adapter. No torch here.
#pragma once

#include <rankwise/allocation_settings.h>
#include <rankwise/pattern_index.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rankwise {

/// Ordered (pattern, value) pairs. The order counts: as in PEFT, the first pattern that matches
/// wins.
template <class Value>
using PatternList = std::vector<std::pair<std::string, Value>>;

/// The settings of an adapter, with the fields of PEFT's LoraConfig and AdaLoraConfig that change
/// what it computes or where. PEFT's file names are given where they differ. Defaults are PEFT's.
struct AdapterConfig {
  std::string peft_type = "LORA";  ///< or "ADALORA"
  int64_t rank = 8;                ///< `r`, 1 .. 2^20; of AdaLoRA the initial rank, `init_r`
  /// `lora_alpha`, finite. Of AdaLoRA positive, and such that scaling = alpha / rank: the file has
  /// alpha (rank + 1e-5) / rank, because PEFT divides by rank + 1e-5.
  double alpha = 8;
  double dropout = 0;   ///< `lora_dropout`, probability in [0, 1]
  bool rslora = false;  ///< `use_rslora`: scaling = alpha / sqrt(rank) in place of alpha / rank
  bool fan_in_fan_out = false;  ///< the base weight is stored [in, out] (GPT-2's Conv1D)

  std::vector<std::string>
      target_modules;                ///< names or name endings; exclusive with target_modules_regex
  std::string target_modules_regex;  ///< when the file has one string (or "all-linear")
  std::vector<std::string> exclude_modules;  ///< exclusive with exclude_modules_regex
  std::string exclude_modules_regex;
  std::vector<int64_t>
      layers_to_transform;  ///< empty: all layers. Carried, not applied, by the file layer
  std::vector<std::string> layers_pattern;  ///< carried like layers_to_transform
  std::vector<std::string> modules_to_save;

  PatternList<int64_t> rank_pattern;  ///< LoRA only: values 0 .. 2^20, instead of rank
  PatternList<double> alpha_pattern;  ///< LoRA only: finite values, instead of alpha

  /// AdaLoRA's `rank_pattern`: module -> which of its `rank` initial directions were kept. The file
  /// holds tensors of the kept ones alone. A module that is not named keeps all.
  std::map<std::string, std::vector<bool>, std::less<>> kept_directions;
  /// AdaLoRA's schedule where it is known. PEFT wants one in every file, so that without it a file
  /// has a placeholder: target_r = init_r, total_step = 1 and PEFT's defaults, which are read as
  /// none. So are schedules that PEFT refuses, for what an adapter computes needs none; others are
  /// taken as they are, and AdaLoRAOptions::check says what is wrong with them.
  std::optional<AllocationSettings> allocation;

  std::string base_model_name_or_path;  ///< empty: null in the file
  std::string revision;                 ///< of the base model; empty: null
  std::string task_type;                ///< e.g. "CAUSAL_LM"; empty: null
  /// `auto_mapping`, by which PEFT's AutoPeftModel finds the base model's class where there is no
  /// task_type: its name and its Python module; empty: null.
  std::string base_model_class;
  std::string parent_library;

  /// Rank of a module (path inside the base model): the directions it kept, where kept_directions
  /// names it, else the first matching rank_pattern, else rank.
  /// Patterns match as PEFT's get_pattern_key: Python `re.match(rf"(.*\.)?({key})$", module)`, else
  /// a key equal to the name. Throws std::invalid_argument for a pattern that cannot be matched
  /// exactly as Python would (look-around, back-references, inline flags, possessive quantifiers,
  /// non-ASCII regexes) or in bounded time. For many modules make one ModuleSettings.
  int64_t rank_of(std::string_view module) const;

  /// Alpha of a module: the first matching alpha_pattern, else alpha. Throws as rank_of.
  double alpha_of(std::string_view module) const;

  /// alpha / rank, or alpha / sqrt(rank) with rslora, patterns applied; 0 for a rank_pattern of 0.
  /// Directions that AdaLoRA gave up do not count: its scaling stays alpha / initial rank. Throws
  /// as rank_of.
  double scaling(std::string_view module) const;

  bool operator==(const AdapterConfig&) const = default;
};

/// What a configuration says of each of many modules: AdapterConfig's rank_of, alpha_of and scaling
/// with its patterns sorted once. The configuration must outlive it, unchanged.
class ModuleSettings {
 public:
  /// Throws std::invalid_argument as AdapterConfig::rank_of.
  explicit ModuleSettings(const AdapterConfig& config);

  int64_t rank_of(std::string_view module) const;
  double alpha_of(std::string_view module) const;
  double scaling(std::string_view module) const;

 private:
  int64_t initial_rank_of(std::string_view module) const;

  const AdapterConfig& config_;
  PatternIndex rank_pattern_;
  PatternIndex alpha_pattern_;
};

/// How a file names the adapted `layers` of a model with these `modules`, sorted: the last part of
/// a path where it ends the paths of adapted layers alone, else the whole path. PEFT matches a name
/// with every path that ends in it.
std::vector<std::string> target_names(const std::vector<std::string>& layers,
                                      const std::vector<std::string>& modules);

}  // namespace rankwise
