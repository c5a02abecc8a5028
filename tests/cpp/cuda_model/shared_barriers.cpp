#include "shared_barriers.h"

#include <map>

#include "engine.h"
#include "shared_memory.h"

namespace cuda_model {
namespace {

struct Barrier {
  uint32_t arrivals, pending, phase = 0;
  int64_t bytes = 0;

  void end_phase() {
    if (pending > 0 || bytes != 0) return;
    ++phase;
    pending = arrivals;
  }
};

class Barriers : public Engine {
 public:
  void begin_block(int) override { of_.clear(); }

  void init(uint32_t address, uint32_t arrivals) {
    check_shared(SharedMemory::instance().at(address), 8, 8, "a barrier");
    if (!of_.emplace(address, Barrier{arrivals, arrivals}).second) {
      fail("the barrier at %u is made twice", address);
    }
  }

  Barrier& at(uint32_t address) {
    const auto found = of_.find(address);
    if (found == of_.end()) fail("no barrier was made at %u", address);
    return found->second;
  }

 private:
  std::map<uint32_t, Barrier> of_;
};

Barriers barriers;

}  // namespace

void barrier_init(uint32_t barrier, uint32_t arrivals) {
  barriers.init(barrier, arrivals);
}

void barrier_arrive(uint32_t address) {
  barrier_expect(address, 0);
}

void barrier_expect(uint32_t address, uint32_t bytes) {
  Barrier& barrier = barriers.at(address);
  if (barrier.pending == 0) {
    fail("more than %u arrivals in a phase of the barrier at %u", barrier.arrivals, address);
  }
  --barrier.pending;
  barrier.bytes += bytes;
  barrier.end_phase();
}

void barrier_bytes(uint32_t address, uint32_t bytes) {
  Barrier& barrier = barriers.at(address);
  barrier.bytes -= bytes;
  barrier.end_phase();
}

void barrier_wait(uint32_t address, uint32_t parity, const Site& site) {
  const Barrier& barrier = barriers.at(address);
  wait_until(
      "a barrier in shared memory", [&barrier, parity] { return (barrier.phase & 1) != parity; },
      site);
}

}  // namespace cuda_model
