// What csrc/kernels/hopper/instructions.h gives kernels, under the execution model.
#pragma once

#include <cstring>

#include "device.h"
#include "engine.h"
#include "shared_barriers.h"
#include "shared_memory.h"
#include "tensor_copies.h"
#include "warpgroup.h"

#undef __grid_constant__
#define __grid_constant__

namespace rankwise::kernels {

using cuda_model::barrier_arrive;
using cuda_model::barrier_expect;
using cuda_model::barrier_init;
using cuda_model::commit_stores;
using cuda_model::fence_shared_writes;
using cuda_model::load_box;
using cuda_model::store_box;
using cuda_model::TensorMap;

inline uint32_t shared_address(const void* shared) {
  return cuda_model::SharedMemory::instance().address(shared);
}

inline int make_tensor_map(TensorMap& map, bool, const void* data, int64_t rows, int64_t cols,
                           int64_t stride, int box_rows) {
  if (rows <= 0 || cols <= 0 || box_rows > 256 || stride * 2 % 16 != 0 ||
      reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  map = {static_cast<unsigned char*>(const_cast<void*>(data)), rows, cols, stride * 2, box_rows};
  return cudaSuccess;
}

inline void prefetch(const TensorMap&) {}
inline void barrier_init_fence() {}

inline void barrier_wait(uint32_t barrier, uint32_t parity,
                         const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::barrier_wait(barrier, parity, site);
}

template <int pending>
void wait_for_stores() {
  cuda_model::wait_for_stores(pending);
}

inline void store_matrices(uint32_t row, const uint32_t (&fragment)[4],
                           const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::store_matrices(row, fragment, site);
}

inline void products_fence(const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::products_fence(site);
}

inline void products_commit(const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::products_commit(site);
}

template <int pending>
void products_wait(const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::products_wait(pending, site);
}

template <typename T, bool right_by_row, int count>
void multiply_group(float (&sums)[count], uint64_t left, uint64_t right, bool keep,
                    const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::multiply_group<T>({sums, left, right, keep, right_by_row, 2 * count}, site);
}

template <typename T, bool by_row, int count>
void multiply_narrow(float (&sums)[count], uint64_t left, uint64_t right, bool keep,
                     const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::multiply_group<T>({sums, left, right, keep, by_row, 2 * count, by_row}, site);
}

// Blocks run one after another: who waits for one that has not begun waits for good.
inline uint32_t take_ticket(uint32_t* counter) {
  return (*counter)++;
}

inline void fence_device_writes() {}

inline void raise_flag(uint32_t* flag) {
  ++*flag;
}

inline void wait_for_flag(const uint32_t* flag, uint32_t times,
                          const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::wait_until(
      "a flag", [=] { return *flag >= times; }, site);
}

inline int zero_memory(void* memory, size_t bytes, const Stream&) {
  std::memset(memory, 0, bytes);
  return cudaSuccess;
}

template <int count>
void pin(float (&)[count]) {}

template <int count>
void give_registers() {}

template <int count>
void take_registers() {}

// Launches run one after another.
inline void wait_for_earlier_kernels() {}
inline void let_next_kernel_start() {}

template <typename... Parameters>
int launch_early(void (*kernel)(Parameters...), const dim3& grid, const dim3& block,
                 size_t shared_bytes, const Stream& stream,
                 const std::type_identity_t<Parameters>&... arguments) {
  return cuda_model::run_grid(
      grid, block, shared_bytes, stream.site, [&] { kernel(arguments...); },
      cuda_model::sm_90_shared);
}

}  // namespace rankwise::kernels
