// The part of the execution model that kernels' threads call: launch, barriers, warp collectives.
//
// One launch runs its blocks one after another; the threads of a block are fibers on one CPU
// thread, which change only at barriers, warp collectives and the thread's end. What breaks CUDA's
// rules ends the process with a sentence that names the launch, the block and the thread.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

// The built-in variables of CUDA C++, kept up to date for the thread that runs.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

namespace cuda_model {

using Site = std::source_location;

constexpr int warp_size = 32;
constexpr uint32_t full_warp = 0xFFFFFFFFu;

// Runs body() once for each thread of the grid. Returns a cudaError_t:
// cudaErrorInvalidConfiguration for a grid, a block or a size of shared memory that no sm_80 device
// takes, else 0. The shared memory is that of a block on sm_86, the least of sm_80 and later, or on
// sm_90.
constexpr size_t sm_86_shared = 99 * 1024, sm_90_shared = 227 * 1024;
int run_grid(const dim3& grid, const dim3& block, size_t shared_bytes, const Site& site,
             const std::function<void()>& body, size_t shared_capacity = sm_86_shared);

// Grids that have run so far.
int grids_run();

// The block's dynamic shared memory.
unsigned char* dynamic_shared();
// Fails unless the bytes lie in the block's shared memory and start at a multiple of `alignment`.
void check_shared(const void* bytes, size_t size, size_t alignment, const char* what);

void block_barrier(const Site& site);

// One lane's part of an operation of several lanes of a warp: run(lanes, mask) is called once, when
// every lane of the mask has come to the same operation at the same place with the same mask;
// lanes[i] is lane i's `data`, null for lanes outside the mask.
struct Collective {
  using Run = void (*)(void* const* lanes, uint32_t mask);
  const char* what;
  Run run;
  void* data;
};
void warp_collective(const Collective& collective, uint32_t mask, const Site& site);

// Asynchronous copies to shared memory: `valid` bytes are copied, the rest of `size` is zero.
void copy_async(void* shared, const void* global, int size, int valid);
void copy_async_commit();
void copy_async_wait(int pending_groups);

// Ends the process with a message about the launch, block and thread at hand.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace cuda_model
