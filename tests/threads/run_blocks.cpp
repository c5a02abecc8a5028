// run_blocks with threads of its own and the caller's, which take the next block as soon as they
// are free.
#include "run_blocks.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ops/cpu/blocks.h>

#include <atomic>
#include <thread>

namespace rankwise {

int block_threads = 1;

void run_blocks(int64_t count, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next = 0;
  const auto work = [&] {
    at::set_num_threads(1);  // of the products inside
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (int64_t i = next++; i < count; i = next++) body(i);
  };
  std::vector<std::jthread> others;
  for (int i = 1; i < block_threads; ++i) others.emplace_back(work);
  work();
}

void run_products(int64_t count, int64_t /*products*/, const std::function<void(int64_t)>& body) {
  run_blocks(count, body);
}

}  // namespace rankwise
