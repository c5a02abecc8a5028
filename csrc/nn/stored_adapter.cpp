// StoredAdapter: registration, clone, print.
#include <rankwise/stored_adapter.h>

#include <ostream>
#include <utility>

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
  register_factors();
}

void StoredAdapterImpl::pretty_print(std::ostream& stream) const {
  stream << "rankwise::nn::StoredAdapter(rank=" << held.rank << ", alpha=" << held.settings.alpha
         << ", dropout=" << held.settings.dropout << ")";
}

}  // namespace rankwise::nn
