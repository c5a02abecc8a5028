// The choice of triplets and their masks on the device: launchers over raw pointers, no torch. All
// pointers are device pointers, `stream` is a cudaStream_t, and nothing waits for the device.
// Launchers return the first launch's error (cudaError_t) or 0.
#pragma once

#include <cstdint>

#include "progress.h"

namespace rankwise::kernels {

// Keeps the best `min_rank` directions of every adapter, then the best of all that fit into the
// budget, each as it comes; equal scores in the order of directions. The same set as the CPU's. A
// step that chooses nothing leaves `kept` as it is. Compares every score with every other one: a
// tenth of a millisecond for ten thousand.
struct TripletSelection {
  int64_t adapters, triplets;
  const double* scores;    // [triplets]; a NaN is below all numbers
  const int64_t* offsets;  // [adapters + 1], of each adapter's scores
  const int64_t* costs;    // [adapters], of one direction
  int64_t least_cost;      // of all adapters
  int64_t reserved;        // what the best `min_rank` of every adapter cost
  int64_t min_rank;
  const Progress* progress;
  int64_t* scratch;  // [2 * triplets]
  bool* kept;        // written, [triplets]
};
int launch_select_triplets(const TripletSelection& problem, void* stream);

// E of one adapter: `rank` elements, `stride` elements apart, of `bytes` (2, 4 or 8) each.
struct MaskEntry {
  void* E;
  int64_t stride, rank;
  int64_t first;  // of its directions in `kept`
  int64_t bytes;
};
// Sets elements to zero whose direction is not kept, unless the step chooses nothing.
int launch_mask_triplets(const MaskEntry* entries, int64_t count, const bool* kept,
                         const Progress* progress, void* stream);

}  // namespace rankwise::kernels
