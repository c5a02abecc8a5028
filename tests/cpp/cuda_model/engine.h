// What goes on beside the threads of a block: copies and products that run by themselves.
#pragma once

#include <cstdint>
#include <functional>

#include "grid.h"
#include "schedule.h"

namespace cuda_model {

// An engine registers itself for good when it is made.
class Engine {
 public:
  Engine();
  Engine(const Engine&) = delete;
  virtual ~Engine() = default;

  virtual void begin_block(int /*threads*/) {}
  // Fails when the thread leaves work behind that it had to wait for.
  virtual void end_thread(int /*thread*/) {}
  virtual void end_block() {}
  // Does one thing it has been given, as late as a GPU may: called when no thread can go on, and
  // now and then under shuffled orders. False when there is nothing to do.
  virtual bool advance() { return false; }
};

// The thread that runs, counted within its block.
int current_thread();

// The thread goes on when holds() is true.
void wait_until(const char* what, std::function<bool()> holds, const Site& site);

const Schedule& current_schedule();
uint64_t random_number();

}  // namespace cuda_model
