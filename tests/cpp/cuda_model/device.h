// CUDA C++ for the CPU: what csrc/kernels/device.h gives kernels, under the execution model.
#pragma once

// The CUDA headers would mark functions with attributes that a host compiler does not know.
#define __host__
#define __device__
#define __global__
#define __constant__
#define __shared__ static __attribute__((section("cuda_model_shared")))

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>

#include <type_traits>

#include "grid.h"
#include "warp.h"

#undef __launch_bounds__
#define __launch_bounds__(...)

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline void __syncthreads(const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::block_barrier(site);
}

inline void __syncwarp(uint32_t mask = cuda_model::full_warp,
                       const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::warp_collective({"__syncwarp", [](void* const*, uint32_t) {}, nullptr}, mask, site);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = cuda_model::warp_size,
              const cuda_model::Site& site = cuda_model::Site::current()) {
  return cuda_model::shuffle<T>(cuda_model::Shuffle::index, mask, value, source, width, site);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = cuda_model::warp_size,
                 const cuda_model::Site& site = cuda_model::Site::current()) {
  return cuda_model::shuffle<T>(cuda_model::Shuffle::up, mask, value, delta, width, site);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = cuda_model::warp_size,
                   const cuda_model::Site& site = cuda_model::Site::current()) {
  return cuda_model::shuffle<T>(cuda_model::Shuffle::down, mask, value, delta, width, site);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = cuda_model::warp_size,
                  const cuda_model::Site& site = cuda_model::Site::current()) {
  return cuda_model::shuffle<T>(cuda_model::Shuffle::exclusive_or, mask, value, lanes, width, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              const cuda_model::Site& site = cuda_model::Site::current()) {
  return cuda_model::ballot(mask, predicate != 0, site);
}

inline int __any_sync(uint32_t mask, int predicate,
                      const cuda_model::Site& site = cuda_model::Site::current()) {
  return cuda_model::ballot(mask, predicate != 0, site) != 0;
}

inline int __all_sync(uint32_t mask, int predicate,
                      const cuda_model::Site& site = cuda_model::Site::current()) {
  return cuda_model::ballot(mask, predicate != 0, site) == mask;
}

inline int __popc(uint32_t bits) {
  return __builtin_popcount(bits);
}

inline int __ffs(uint32_t bits) {
  return __builtin_ffs(static_cast<int>(bits));
}

// Threads change only where they wait, so an operation in one piece needs no more than this.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "sums of floating-point atomics depend on their order");
  const T before = *address;
  *address = before + value;
  return before;
}

inline void __threadfence() {}

namespace rankwise::kernels {

// The stream, and where the launch is written: a pack of parameters leaves no room behind it.
struct Stream {
  Stream(void*, const cuda_model::Site& launch_site = cuda_model::Site::current())
      : site(launch_site) {}
  cuda_model::Site site;
};

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), const dim3& grid, const dim3& block, size_t shared_bytes,
           const Stream& stream, std::type_identity_t<Parameters>... arguments) {
  return cuda_model::run_grid(grid, block, shared_bytes, stream.site,
                              [&] { kernel(arguments...); });
}

inline void require(bool condition, const char* message) {
  if (!condition) cuda_model::fail("%s", message);
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cuda_model::dynamic_shared());
}

template <int bytes>
void copy_async(void* shared, const void* global, int valid_bytes = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  cuda_model::copy_async(shared, global, bytes, valid_bytes);
}

inline void copy_async_commit() {
  cuda_model::copy_async_commit();
}

template <int pending>
void copy_async_wait() {
  cuda_model::copy_async_wait(pending);
}

template <bool transposed, int count>
void load_matrices(uint32_t (&fragment)[count], const void* row,
                   const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::load_matrices(fragment, count, row, transposed, site);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const cuda_model::Site& site = cuda_model::Site::current()) {
  cuda_model::multiply_add<T>(c, a, b, site);
}

}  // namespace rankwise::kernels
