// The dropout mask on the device: one thread per Philox block of eight elements.
#include "device.h"
#include "dropout_mask.h"

namespace rankwise::kernels {
namespace {

template <typename T>
__global__ void dropout_mask_kernel(const int64_t* seed, int64_t count, uint32_t threshold,
                                    T* mask) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = block * elements_per_block;
  if (first >= count) return;
  const Philox numbers = philox(static_cast<uint64_t>(block), static_cast<uint64_t>(*seed));
  for (int i = 0; i < elements_per_block && first + i < count; ++i) {
    mask[first + i] = static_cast<T>(dropout_number(numbers, i) < threshold ? 0.0f : 1.0f);
  }
}

}  // namespace

template <typename T>
int launch_dropout_mask(const int64_t* seed, int64_t count, uint32_t threshold, T* mask,
                        void* stream) {
  constexpr unsigned threads = 256;
  const int64_t blocks = (count + elements_per_block - 1) / elements_per_block;
  if (blocks == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>((blocks + threads - 1) / threads);
  return launch(dropout_mask_kernel<T>, grid, threads, 0, stream, seed, count, threshold, mask);
}

template int launch_dropout_mask(const int64_t*, int64_t, uint32_t, double*, void*);
template int launch_dropout_mask(const int64_t*, int64_t, uint32_t, float*, void*);
template int launch_dropout_mask(const int64_t*, int64_t, uint32_t, __nv_bfloat16*, void*);
template int launch_dropout_mask(const int64_t*, int64_t, uint32_t, __half*, void*);

}  // namespace rankwise::kernels
