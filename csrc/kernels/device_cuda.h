// Launches, asynchronous copies and tensor-core instructions (sm_80 and later) as functions, for
// files that nvcc compiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <type_traits>

#ifdef NDEBUG  // which hides this part of assert()
extern "C" __host__ __device__ void __assert_fail(const char*, const char*, unsigned,
                                                  const char*) noexcept;
#endif

namespace rankwise::kernels {

template <typename T>
struct Exactly {
  using type = T;
};

// Runs kernel(arguments...); returns the launch's cudaError_t, which stays nowhere else. `stream`
// is a cudaStream_t.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), const dim3& grid, const dim3& block, size_t shared_bytes,
           void* stream, typename Exactly<Parameters>::type... arguments) {
  constexpr size_t without_asking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > without_asking) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    void* pointers[] = {&arguments...};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                             shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Ends the kernel with a message unless the condition holds; what waits for the stream then gets
// cudaErrorAssert. As assert(), but in every build.
__device__ inline void require(bool condition, const char* message) {
  if (!condition) __assert_fail(message, __FILE__, __LINE__, __func__);
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of `bytes` (4, 8 or 16, both addresses multiples of it) to shared memory, of which
// the first `valid_bytes` are read and the others become zero.
template <int bytes>
__device__ inline void copy_async(void* shared, const void* global, int valid_bytes = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "");
  if constexpr (bytes == 16) {  // L1 would not be used again
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(bytes), "r"(valid_bytes)
                 : "memory");
  }
}

// Closes the group of the copies that this thread has started since the last call.
__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's groups are under way; its copies are then visible
// to itself alone.
template <int pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ldmatrix: `count` (1, 2 or 4) matrices of 8 x 8 16-bit elements from shared memory. Lane i gives
// the address of row i % 8 of matrix i / 8, a multiple of 16 bytes.
template <bool transposed, int count>
__device__ inline void load_matrices(uint32_t (&fragment)[count], const void* row) {
  static_assert(count == 1 || count == 2 || count == 4, "");
  const uint32_t address = shared_address(row);
  if constexpr (count == 4 && transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address));
  } else if constexpr (count == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address));
  } else if constexpr (count == 2 && transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address));
  } else if constexpr (count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address));
  } else if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(address));
  }
}

// mma.m16n8k16: c += a b with fragments of T (__nv_bfloat16 or __half) and sums in float32.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace rankwise::kernels
