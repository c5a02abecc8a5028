// lora_directions, an entry of an AdaLoRA adapter's archive: the order of its directions, and with
// it the rank.
#pragma once

#include <rankwise/stored_adapter.h>
#include <torch/serialize/archive.h>

#include <optional>
#include <utility>
#include <vector>

namespace rankwise::nn {

// Nothing while the order cannot have changed.
void save_directions(torch::serialize::OutputArchive& archive, const HeldAdapter& adapter);

// The order and rank to take once the factors are loaded; without an entry those of a new adapter.
// Throws std::invalid_argument for an entry that is none of this adapter's.
std::optional<std::pair<std::vector<int64_t>, int64_t>> read_directions(
    torch::serialize::InputArchive& archive, const HeldAdapter& adapter);

}  // namespace rankwise::nn
