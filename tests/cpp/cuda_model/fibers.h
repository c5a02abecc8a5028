// Threads of execution with a stack of their own that run until they give way.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

namespace cuda_model {

// Fibers are started with makecontext once and keep their stacks; changes between them use
// _setjmp and _longjmp, which make no system call.
class Fibers {
 public:
  Fibers() = default;
  Fibers(const Fibers&) = delete;
  ~Fibers();

  // From now on fiber i, whenever it is resumed after its end, runs body() anew.
  void prepare(int count, std::function<void()> body);
  // Runs fiber i until it calls give_way() or its body ends; true if it ended.
  bool resume(int i);
  // Called by a fiber: returns when it is resumed.
  void give_way();

 private:
  struct Fiber {
    jmp_buf context;
    bool started = false, ended = true;
  };

  static void enter();
  void start(Fiber& fiber, int i);

  static constexpr size_t stack_bytes = 256 * 1024;
  static constexpr int capacity = 1024;
  char* stacks_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::function<void()> body_;
  jmp_buf scheduler_;
  ucontext_t entry_, return_;
  Fiber* current_ = nullptr;
};

}  // namespace cuda_model
