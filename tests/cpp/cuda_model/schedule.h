// How the execution model orders what a GPU leaves open. A correct kernel gives the same bits under
// every schedule.
#pragma once

#include <cstdint>

namespace cuda_model {

enum class Order { forwards, backwards, shuffled };

struct Schedule {
  Order blocks = Order::forwards;
  Order threads = Order::forwards;  // which of the threads that may run goes first
  // A warp runs as far as it can before the next one does; else all warps go on by turns.
  bool warps_run_ahead = false;
  // Asynchronous copies happen when they are waited for, the latest moment a GPU allows; or at
  // once, the earliest.
  bool early_copies = false;
  uint64_t seed = 0;  // of the shuffled orders
};

// Holds for all launches until the next call.
void set_schedule(const Schedule& schedule);

}  // namespace cuda_model
