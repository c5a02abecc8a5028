// What an allocator reads must be in memory.
#pragma once

#include <rankwise/adapter.h>

namespace rankwise {

// Throws std::invalid_argument, naming owner and adapter, unless its factors can be read, and with
// `gradients` those of its gradients that are there (tensor_memory.h).
void check_memory(const std::string& owner, const Adapter& adapter, bool gradients);

}  // namespace rankwise
