// The instructions of sm_90a for files that nvcc compiles; PTX ISA 8.0 and later.
#pragma once

#include <cuda.h>

#include "../device.h"
#include "wgmma_cuda.h"

namespace rankwise::kernels {

using TensorMap = CUtensorMap;

// The map of a row-major matrix [rows, cols] of bfloat16 or float16 in boxes [box_rows, 64] with
// the 128-byte swizzle; data and the rows, `stride` elements apart, are multiples of 16 bytes. On
// the host; returns a cudaError_t: cudaErrorNotSupported where the driver has no such maps.
int make_tensor_map(TensorMap& map, bool bfloat16, const void* data, int64_t rows, int64_t cols,
                    int64_t stride, int box_rows);

// Fetches the map before its first use.
__device__ inline void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A barrier is 8 bytes of shared memory. Its phase ends when `arrivals` threads have arrived and
// all the bytes that they announced have come; then the next one begins. Phases count from 0.
__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Shows new barriers to the copy engine; other threads see them after __syncthreads().
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns when the phase of this parity has ended: at once on a new barrier for parity 1.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Starts to load the map's box that begins at (row, col); its bytes come to the barrier. `shared`
// is a multiple of 1024. What the matrix lacks is zero.
__device__ inline void load_box(uint32_t shared, const TensorMap& map, uint32_t barrier, int col,
                                int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(col), "r"(row)
      : "memory");
}

// Starts to store a box from shared memory; what the matrix lacks is left out.
__device__ inline void store_box(const TensorMap& map, uint32_t shared, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared), "r"(col), "r"(row)
      : "memory");
}

// Closes the group of this thread's stores since the last call.
__device__ inline void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but `pending` of this thread's groups have been read from shared memory.
template <int pending>
__device__ inline void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Shows this thread's writes to shared memory to the copy engine.
__device__ inline void fence_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// stmatrix: four matrices of 8 x 8 16-bit elements; lane i gives the address of row i % 8 of matrix
// i / 8, a multiple of 16.
__device__ inline void store_matrices(uint32_t row, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

// Before a warpgroup's first product, and after its sums were touched.
__device__ inline void products_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of the products since the last call.
__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` groups are under way.
template <int pending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving uses of the sums over this point: it knows nothing of products
// that run by themselves.
template <int count>
__device__ inline void pin(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// The number of earlier calls for the same counter on the device.
__device__ inline uint32_t take_ticket(uint32_t* counter) {
  return atomicAdd(counter, 1u);
}

// What this thread has written to the device's memory is there, for copy engines too, before it
// raises a flag.
__device__ inline void fence_device_writes() {
  asm volatile("fence.proxy.async;" ::: "memory");
  __threadfence();
}

__device__ inline void raise_flag(uint32_t* flag) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// Returns when the flag has been raised `times` times; copies that start later read what was
// written before.
__device__ inline void wait_for_flag(const uint32_t* flag, uint32_t times) {
  uint32_t raised = 0;
  while (raised < times) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  }
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Sets memory to zero on the stream, a cudaStream_t.
inline int zero_memory(void* memory, size_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Registers of a thread, of all threads of a warpgroup at once.
template <int count>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// With launch_early: what the stream's earlier kernels wrote is there from here on.
__device__ inline void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel may start, as far as its own wait_for_earlier_kernels().
__device__ inline void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// As launch(), but the kernel may start before the stream's earlier one has ended.
template <typename... Parameters>
int launch_early(void (*kernel)(Parameters...), const dim3& grid, const dim3& block,
                 size_t shared_bytes, void* stream,
                 const typename Exactly<Parameters>::type&... arguments) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early;
    config.numAttrs = 1;
    const void* pointers[] = {&arguments...};
    error = cudaLaunchKernelExC(&config, function, const_cast<void**>(pointers));
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace rankwise::kernels
