// StoredAdapter: registration, clone, print.
#include <rankwise/stored_adapter.h>

#include <ostream>
#include <utility>

#include "archived_directions.h"

namespace rankwise::nn {

StoredAdapterImpl::StoredAdapterImpl(HeldAdapter adapter) : held(std::move(adapter)) {
  register_factors();
}

void StoredAdapterImpl::register_factors() {
  register_parameter("lora_A", held.lora_A, /*requires_grad=*/false);
  register_parameter("lora_B", held.lora_B, /*requires_grad=*/false);
  register_parameter("lora_E", held.lora_E, /*requires_grad=*/false);
}

void StoredAdapterImpl::reset() {
  for (at::Tensor* factor : {&held.lora_A, &held.lora_B, &held.lora_E})
    if (factor->defined()) *factor = at::empty_like(factor->detach());
  if (held.directions) held.directions = std::make_shared<Directions>(*held.directions);
  register_factors();
}

void StoredAdapterImpl::save(torch::serialize::OutputArchive& archive) const {
  Module::save(archive);
  save_directions(archive, held);
}

void StoredAdapterImpl::load(torch::serialize::InputArchive& archive) {
  const auto arrangement = read_directions(archive, held);
  Module::load(archive);
  if (!arrangement) return;
  held.directions->set_order(arrangement->first);
  held.rank = arrangement->second;
}

void StoredAdapterImpl::pretty_print(std::ostream& stream) const {
  stream << "rankwise::nn::StoredAdapter(rank=" << held.rank << ", alpha=" << held.settings.alpha
         << ", dropout=" << held.settings.dropout << ")";
}

}  // namespace rankwise::nn
