// The choice of triplets and their masks on the device: exact, with ties in the order of
// directions.
#include <cstring>

#include "../device.h"
#include "triplet_selection.h"

namespace rankwise::kernels {
namespace {

constexpr int threads = 128, tile = 512;

// Integers in the order of the scores; 0 for NaN.
__device__ inline uint64_t key_of(double score) {
  if (score != score) return 0;
  const double value = score + 0.0;  // -0 equals 0
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  constexpr uint64_t sign = uint64_t{1} << 63;
  return bits & sign ? ~bits : bits | sign;
}

// The adapter of direction i; those of rank 0 have none.
__device__ inline int64_t adapter_of(const TripletSelection& p, int64_t i) {
  int64_t first = 0, last = p.adapters - 1;
  while (first < last) {
    const int64_t middle = (first + last + 1) / 2;
    if (p.offsets[middle] <= i) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// A thread has a direction and counts those before it: in all, which is its place in the order, and
// in its adapter. scratch: the directions in order, and the cost of each, or -1 where it is kept.
__global__ void order_triplets(TripletSelection p) {
  __shared__ uint64_t keys[tile];
  if (p.progress->budget < 0) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const bool any = i < p.triplets;
  const uint64_t key = any ? key_of(p.scores[i]) : 0;
  const int64_t adapter = any ? adapter_of(p, i) : 0;
  const int64_t first = p.offsets[adapter], last = p.offsets[adapter + 1];
  int64_t before = 0, before_in_adapter = 0;
  for (int64_t start = 0; start < p.triplets; start += tile) {
    __syncthreads();
    const int count = static_cast<int>(p.triplets - start < tile ? p.triplets - start : tile);
    for (int j = static_cast<int>(threadIdx.x); j < count; j += threads) {
      keys[j] = key_of(p.scores[start + j]);
    }
    __syncthreads();
    for (int j = 0; j < count; ++j) {
      const int64_t other = start + j;
      const bool better = keys[j] > key || (keys[j] == key && other < i);
      before += better;
      before_in_adapter += better && other >= first && other < last;
    }
  }
  if (!any) return;
  const bool kept = before_in_adapter < p.min_rank;
  p.kept[i] = kept;
  p.scratch[before] = i;
  p.scratch[p.triplets + before] = kept ? -1 : p.costs[adapter];
}

// One block: a direction's turn comes when it is known what those before it left of the budget.
__global__ void spend_budget(TripletSelection p) {
  __shared__ int64_t costs[tile];
  __shared__ bool taken[tile];
  __shared__ int64_t budget;
  if (p.progress->budget < 0) return;
  if (threadIdx.x == 0) budget = p.progress->budget - p.reserved;
  __syncthreads();
  for (int64_t start = 0; start < p.triplets && budget >= p.least_cost; start += tile) {
    const int count = static_cast<int>(p.triplets - start < tile ? p.triplets - start : tile);
    for (int j = static_cast<int>(threadIdx.x); j < count; j += threads) {
      costs[j] = p.scratch[p.triplets + start + j];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t left = budget;
      for (int j = 0; j < count; ++j) {
        taken[j] = costs[j] >= 0 && costs[j] <= left;
        if (taken[j]) left -= costs[j];
      }
      budget = left;
    }
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < count; j += threads) {
      if (taken[j]) p.kept[p.scratch[start + j]] = true;
    }
  }
}

// A block has an adapter. Zero is all bits zero in every type.
__global__ void mask_triplets(const MaskEntry* entries, const bool* kept,
                              const Progress* progress) {
  if (progress->budget < 0) return;
  const MaskEntry& entry = entries[blockIdx.x];
  for (int64_t i = threadIdx.x; i < entry.rank; i += blockDim.x) {
    if (kept[entry.first + i]) continue;
    const int64_t at = i * entry.stride;
    if (entry.bytes == 2) static_cast<uint16_t*>(entry.E)[at] = 0;
    if (entry.bytes == 4) static_cast<uint32_t*>(entry.E)[at] = 0;
    if (entry.bytes == 8) static_cast<uint64_t*>(entry.E)[at] = 0;
  }
}

}  // namespace

int launch_select_triplets(const TripletSelection& problem, void* stream) {
  if (problem.triplets == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((problem.triplets + threads - 1) / threads);
  const int error = launch(order_triplets, blocks, threads, 0, stream, problem);
  return error ? error : launch(spend_budget, 1, threads, 0, stream, problem);
}

int launch_mask_triplets(const MaskEntry* entries, int64_t count, const bool* kept,
                         const Progress* progress, void* stream) {
  if (count == 0) return cudaSuccess;
  return launch(mask_triplets, static_cast<unsigned>(count), 64, 0, stream, entries, kept,
                progress);
}

}  // namespace rankwise::kernels
