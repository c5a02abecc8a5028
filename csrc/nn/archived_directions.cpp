// lora_directions, an entry of an AdaLoRA adapter's archive.
#include "archived_directions.h"

namespace rankwise::nn {
namespace {

constexpr const char* entry = "lora_directions";

}  // namespace

void save_directions(torch::serialize::OutputArchive& archive, const HeldAdapter& adapter) {
  if (adapter.directions && adapter.directions->in_state(adapter.rank))
    archive.write(entry, adapter.directions->state(adapter.rank));
}

std::optional<std::pair<std::vector<int64_t>, int64_t>> read_directions(
    torch::serialize::InputArchive& archive, const HeldAdapter& adapter) {
  if (!adapter.directions) return std::nullopt;
  at::Tensor state;
  if (archive.try_read(entry, state)) return adapter.directions->read(state);
  const Directions first(adapter.capacity(), adapter.directions->first_rank());
  return std::pair(first.order(), first.first_rank());
}

}  // namespace rankwise::nn
