#include "fibers.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

namespace cuda_model {
namespace {

Fibers* entering = nullptr;

// Kept out of line: a caller's local variables must not change between _setjmp and _longjmp.
__attribute__((noinline)) void change(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

}  // namespace

Fibers::~Fibers() {
  if (stacks_) munmap(stacks_, capacity * stack_bytes);
}

void Fibers::prepare(int count, std::function<void()> body) {
  body_ = std::move(body);
  if (!stacks_) {
    void* memory = mmap(nullptr, capacity * stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("cuda_model: stacks");
      std::abort();
    }
    stacks_ = static_cast<char*>(memory);
    // The lowest page of each stack stays closed: an overflow ends the process.
    for (int i = 0; i < capacity; ++i) mprotect(stacks_ + i * stack_bytes, 4096, PROT_NONE);
  }
  while (static_cast<int>(fibers_.size()) < count) fibers_.push_back(std::make_unique<Fiber>());
}

bool Fibers::resume(int i) {
  Fiber& fiber = *fibers_[i];
  current_ = &fiber;
  fiber.ended = false;
  if (fiber.started) {
    change(scheduler_, fiber.context);
  } else {
    start(fiber, i);
  }
  return fiber.ended;
}

void Fibers::give_way() {
  change(current_->context, scheduler_);
}

void Fibers::start(Fiber& fiber, int i) {
  fiber.started = true;
  getcontext(&entry_);
  entry_.uc_stack.ss_sp = stacks_ + i * stack_bytes;
  entry_.uc_stack.ss_size = stack_bytes;
  entry_.uc_link = nullptr;
  makecontext(&entry_, &Fibers::enter, 0);
  entering = this;
  if (_setjmp(scheduler_) == 0) swapcontext(&return_, &entry_);
}

void Fibers::enter() {
  Fibers* fibers = entering;
  for (;;) {
    fibers->body_();
    fibers->current_->ended = true;
    fibers->give_way();
  }
}

}  // namespace cuda_model
