// Adapted: several adapters by name over one base, of which one at most is active.
#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <rankwise/adapted.h>

#include <stdexcept>
#include <utility>

namespace rankwise::nn {
namespace {

void check_rank(const HeldAdapter& adapter, int64_t rank) {
  TORCH_CHECK(rank >= 0 && rank <= adapter.capacity(),
              "set_rank: rank must be from 0 to the capacity ", adapter.capacity(), ", got ", rank);
}

[[noreturn]] void fail_unknown(const char* operation, const Adapted& layer,
                               const std::string& name) {
  throw std::invalid_argument(c10::str(operation, ": adapters are [",
                                       c10::Join(", ", layer.adapter_names()), "], got ", name));
}

}  // namespace

void Adapted::set_rank(int64_t rank) {
  check_rank(active(), rank);
  rank_ = rank;
}

void Adapted::set_rank_of(const at::Tensor& factor, int64_t rank) {
  if (factor.is_same(lora_A)) return set_rank(rank);
  for (auto& [name, stored] : waiting_) {
    if (!factor.is_same(stored->held.lora_A)) continue;
    check_rank(stored->held, rank);
    stored->held.rank = rank;
  }
}

int64_t Adapted::rank_of(const at::Tensor& factor) const {
  if (factor.is_same(lora_A)) return rank_;
  for (const auto& [name, stored] : waiting_)
    if (factor.is_same(stored->held.lora_A)) return stored->held.rank;
  return -1;
}

void Adapted::separate_directions() {
  if (directions_) directions_ = std::make_shared<Directions>(*directions_);
}

void Adapted::set_directions(std::vector<int64_t> order, int64_t rank) {
  directions_->set_order(std::move(order));
  set_rank(rank);
}

std::vector<std::string> Adapted::adapter_names() const {
  std::vector<std::string> names;
  if (adapter_) names.push_back(*adapter_);
  for (const auto& [name, stored] : waiting_) names.push_back(name);
  return names;
}

bool Adapted::has_adapter(const std::string& name) const {
  return adapter_ == name || waiting_.contains(name);
}

HeldAdapter Adapted::held_adapter(const std::string& name) const {
  if (adapter_ == name) return active();
  const auto it = waiting_.find(name);
  if (it == waiting_.end()) fail_unknown("held_adapter", *this, name);
  return it->second->held;
}

void Adapted::check_new_name(const std::string& name) const {
  if (name.empty() || name.find('.') != std::string::npos)
    throw std::invalid_argument("add_adapter: name must be a word without '.', got '" + name + "'");
  if (has_adapter(name))
    throw std::invalid_argument("add_adapter: there is an adapter '" + name + "' already");
}

void Adapted::add_adapter(const std::string& name, HeldAdapter adapter) {
  check_new_name(name);
  const StoredAdapter stored(std::move(adapter));
  add_child(name, stored);
  waiting_.emplace(name, stored);
}

void Adapted::add_adapter(const std::string& name, const AdapterOptions& options) {
  add_adapter(name, new_adapter(options.settings()));
}

void Adapted::activate_adapter(const std::optional<std::string>& name) {
  if (name == adapter_) return;
  check_unmerged("activate_adapter");
  if (adapter_) {
    const std::string previous = *adapter_;
    const HeldAdapter held = active();
    set_active(std::nullopt, HeldAdapter());
    add_adapter(previous, held);
  }
  const auto chosen = name ? waiting_.find(*name) : waiting_.end();
  if (chosen != waiting_.end()) {
    remove_child(*name);
    set_active(name, chosen->second->held);
    waiting_.erase(chosen);
  }
  replace_tensors();
}

void Adapted::delete_adapter(const std::string& name) {
  if (!has_adapter(name)) fail_unknown("delete_adapter", *this, name);
  if (name == adapter_) activate_adapter(std::nullopt);
  remove_child(name);
  waiting_.erase(name);
}

void Adapted::set_active(const std::optional<std::string>& name, const HeldAdapter& adapter) {
  adapter_ = name;
  lora_A = adapter.lora_A;
  lora_B = adapter.lora_B;
  lora_E = adapter.lora_E;
  settings_ = adapter.settings;
  rank_ = adapter.rank;
  directions_ = adapter.directions;
  for (const at::Tensor& factor : adapter.factors())
    if (factor.defined()) factor.requires_grad_();
}

}  // namespace rankwise::nn
