#include "grid.h"

#include <driver_types.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "engine.h"
#include "fibers.h"
#include "shared_memory.h"

namespace cuda_model {
namespace {

enum class State { ready, at_barrier, at_collective, until, ended };

struct Thread {
  State state = State::ready;
  Site site;  // where it waits
  Collective collective{};
  uint32_t mask = 0;
  const char* until_what = nullptr;
  std::function<bool()> until;
};

class Block {
 public:
  void run(const dim3& size, const std::function<void()>& body);
  void wait(State state, const Site& site);
  Thread& current() { return threads_[current_]; }
  int current_index() const { return current_; }
  void arrive_at_barrier();
  void arrive_at_collective();

 private:
  void sweep();
  bool run_thread(int i);
  bool run_warp(int i);
  [[noreturn]] void report_deadlock();

  Fibers fibers_;
  std::vector<Thread> threads_;
  std::vector<int> order_;
  int current_ = 0, at_barrier_ = 0, ended_ = 0;
};

Schedule schedule;
std::mt19937_64 random_numbers;
Block block;
const Site* launch_site = nullptr;
int grid_count = 0;

std::vector<Engine*>& engines() {
  static std::vector<Engine*> all;
  return all;
}

bool advance_engines() {
  for (Engine* engine : engines()) {
    if (engine->advance()) return true;
  }
  return false;
}

std::string place(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

void arrange(std::vector<int>& indices, Order order) {
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::backwards) std::reverse(indices.begin(), indices.end());
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), random_numbers);
}

uint3 position(uint64_t i, const dim3& size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

void Block::run(const dim3& size, const std::function<void()>& body) {
  const int count = static_cast<int>(size.x * size.y * size.z);
  fibers_.prepare(count, body);
  threads_.assign(count, Thread{});
  order_.resize(count);
  at_barrier_ = ended_ = 0;
  for (Engine* engine : engines()) engine->begin_block(count);
  while (ended_ < count) sweep();
  for (Engine* engine : engines()) engine->end_block();
}

// Runs every thread that may run, or every warp as far as it goes.
void Block::sweep() {
  arrange(order_, schedule.threads);
  bool progress = false;
  for (const int i : order_) progress |= schedule.warps_run_ahead ? run_warp(i) : run_thread(i);
  const bool now = schedule.threads == Order::shuffled && random_numbers() % 2 == 0;
  if ((now || !progress) && !advance_engines() && !progress) report_deadlock();
}

bool Block::run_thread(int i) {
  Thread& thread = threads_[i];
  if (thread.state == State::until && thread.until()) thread.state = State::ready;
  if (thread.state != State::ready) return false;
  current_ = i;
  threadIdx = position(i, blockDim);
  if (fibers_.resume(i)) {
    for (Engine* engine : engines()) engine->end_thread(i);
    thread.state = State::ended;
    ++ended_;
  }
  return true;
}

bool Block::run_warp(int i) {
  const int first = i / warp_size * warp_size;
  const int last = std::min<int>(first + warp_size, static_cast<int>(threads_.size()));
  bool any = false, progress = true;
  while (progress) {
    progress = false;
    for (int lane = first; lane < last; ++lane) progress |= run_thread(lane);
    any |= progress;
  }
  return any;
}

void Block::wait(State state, const Site& site) {
  Thread& thread = current();
  thread.state = state;
  thread.site = site;
  if (state == State::at_barrier) arrive_at_barrier();
  if (state == State::at_collective) arrive_at_collective();
  fibers_.give_way();
}

void Block::arrive_at_barrier() {
  if (++at_barrier_ < static_cast<int>(threads_.size())) return;
  at_barrier_ = 0;
  for (Thread& thread : threads_) {
    if (place(thread.site) != place(threads_[0].site)) {
      fail("threads of one block wait at different barriers: %s and %s",
           place(threads_[0].site).c_str(), place(thread.site).c_str());
    }
    thread.state = State::ready;
  }
}

void Block::arrive_at_collective() {
  const Thread& self = current();
  const int first = current_ / warp_size * warp_size;
  const int lanes_here = std::min<int>(warp_size, static_cast<int>(threads_.size()) - first);
  void* lanes[warp_size] = {};
  for (int lane = 0; lane < warp_size; ++lane) {
    if (!(self.mask >> lane & 1)) continue;
    if (lane >= lanes_here)
      fail("%s names lane %d, which the block lacks", self.collective.what, lane);
    const Thread& other = threads_[first + lane];
    const bool there = other.state == State::at_collective && other.mask == self.mask &&
                       other.collective.run == self.collective.run &&
                       other.site.line() == self.site.line() &&
                       other.site.file_name() == self.site.file_name();
    if (!there) return;
    lanes[lane] = other.collective.data;
  }
  self.collective.run(lanes, self.mask);
  for (int lane = 0; lane < lanes_here; ++lane) {
    if (self.mask >> lane & 1) threads_[first + lane].state = State::ready;
  }
}

void Block::report_deadlock() {
  std::string text;
  int shown = 0;
  const State* before = nullptr;
  for (size_t i = 0; i < threads_.size() && shown < 8; ++i) {
    const Thread& thread = threads_[i];
    if (before && *before == thread.state && place(threads_[i - 1].site) == place(thread.site)) {
      continue;
    }
    before = &thread.state;
    ++shown;
    text += "\n  from thread " + std::to_string(i) + " on: ";
    if (thread.state == State::ended) text += "ended";
    if (thread.state == State::at_barrier) text += "at __syncthreads, " + place(thread.site);
    if (thread.state == State::at_collective) {
      text += std::string("at ") + thread.collective.what + ", " + place(thread.site);
    }
    if (thread.state == State::until) {
      text += std::string("at ") + thread.until_what + ", " + place(thread.site);
    }
  }
  fail("threads wait for others that do not come:%s", text.c_str());
}

bool valid_launch(const dim3& grid, const dim3& size, size_t shared_bytes, size_t capacity) {
  const uint64_t threads = static_cast<uint64_t>(size.x) * size.y * size.z;
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7FFFFFFFu && grid.y <= 65535u &&
         grid.z <= 65535u && threads > 0 && threads <= 1024 && size.z <= 64 &&
         shared_bytes + SharedMemory::static_bytes() <= capacity;
}

}  // namespace

void set_schedule(const Schedule& next) {
  schedule = next;
  random_numbers.seed(next.seed);
}

int run_grid(const dim3& grid, const dim3& size, size_t shared_bytes, const Site& site,
             const std::function<void()>& body, size_t shared_capacity) {
  if (!valid_launch(grid, size, shared_bytes, shared_capacity))
    return cudaErrorInvalidConfiguration;
  launch_site = &site;
  gridDim = grid;
  blockDim = size;
  std::vector<int> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  arrange(order, schedule.blocks);
  for (const int i : order) {
    blockIdx = position(i, grid);
    SharedMemory::instance().begin_block(shared_bytes);
    block.run(size, body);
  }
  launch_site = nullptr;
  ++grid_count;
  return cudaSuccess;
}

int grids_run() {
  return grid_count;
}

void block_barrier(const Site& site) {
  block.wait(State::at_barrier, site);
}

void warp_collective(const Collective& collective, uint32_t mask, const Site& site) {
  Thread& thread = block.current();
  if (!(mask >> (block.current_index() % warp_size) & 1)) {
    fail("%s is called by a lane outside its mask 0x%08x, %s", collective.what, mask,
         place(site).c_str());
  }
  thread.collective = collective;
  thread.mask = mask;
  block.wait(State::at_collective, site);
}

Engine::Engine() {
  engines().push_back(this);
}

int current_thread() {
  return block.current_index();
}

void wait_until(const char* what, std::function<bool()> holds, const Site& site) {
  if (holds()) return;
  block.current().until_what = what;
  block.current().until = std::move(holds);
  block.wait(State::until, site);
}

const Schedule& current_schedule() {
  return schedule;
}

uint64_t random_number() {
  return random_numbers();
}

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cuda_model: ");
  if (launch_site) {
    std::fprintf(stderr, "kernel launched by %s (%s), block (%u, %u, %u), thread (%u, %u, %u): ",
                 launch_site->function_name(), place(*launch_site).c_str(), blockIdx.x, blockIdx.y,
                 blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  }
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::abort();
}

}  // namespace cuda_model
