// The safetensors metadata "rankwise.allocation": a JSON object in a string.
#include "allocation_metadata.h"

#include <nlohmann/json.hpp>

#include "bounded_json.h"
#include "json_fields.h"
#include "message_text.h"

namespace rankwise::io {
namespace {

const std::string key = "rankwise.allocation";

}  // namespace

void store_allocation(const std::optional<AllocationSettings>& allocation,
                      std::map<std::string, std::string>& metadata) {
  metadata.erase(key);
  const AllocationSettings settings = allocation.value_or(AllocationSettings());
  nlohmann::json json = nlohmann::json::object();
  if (settings.budget_unit == BudgetUnit::parameters) json["budget_unit"] = "parameters";
  if (settings.min_rank != 0) json["min_rank"] = settings.min_rank;
  if (!settings.shrink) json["shrink"] = false;
  if (!json.empty()) metadata[key] = json.dump();
}

void take_allocation(std::map<std::string, std::string>& metadata,
                     std::optional<AllocationSettings>& allocation, const std::string& file) {
  const auto node = metadata.extract(key);
  if (node.empty() || !allocation) return;
  const std::string where = file + ": " + key;
  const JsonObject json = parse_json_object(node.mapped(), where);
  const JsonFields fields(json, where);
  const std::string unit = fields.string("budget_unit");
  if (!unit.empty() && unit != "parameters")
    fields.fail("budget_unit", "\"parameters\"", in_quotes(unit));
  if (!unit.empty()) allocation->budget_unit = BudgetUnit::parameters;
  allocation->min_rank = fields.integer("min_rank", 0);
  if (fields.find("shrink")) allocation->shrink = fields.boolean("shrink");
}

}  // namespace rankwise::io
