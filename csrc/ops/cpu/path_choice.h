// Whether a call of lora_linear on a CPU is served in panels or by ATen's products.
#pragma once

#include <rankwise/cpu_path.h>

#include <functional>

#include "adapter.h"
#include "lora_linear_panels.h"

namespace rankwise {

enum class Pass { forward, backward };

// The path of calls that begin now: what was set, or what deterministic algorithms ask for.
CpuPath path_in_effect();

// The path's choice for a call that panels can serve. run(panels) computes the call; it is called
// only to be timed, where the path is `measured` and no call like this one was timed before.
bool panels_chosen(Pass pass, const ActiveAdapter& adapter, const at::Tensor& x,
                   const std::function<void(bool)>& run);

// run(panels) on the chosen path.
template <typename Run>
auto on_cpu_path(Pass pass, const ActiveAdapter& adapter, const at::Tensor& x, const Run& run) {
  return run(in_panels(x, adapter) &&
             panels_chosen(pass, adapter, x, [&](bool panels) { run(panels); }));
}

}  // namespace rankwise
