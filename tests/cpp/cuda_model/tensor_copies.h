// The copy engine of sm_90 (TMA): boxes of a matrix of 16-bit elements to shared memory and back.
//
// A box has rows of 64 elements, 128 bytes, which lie one after another in shared memory; bits 4 to
// 6 of a byte's address are changed by bits 7 to 9 (128-byte swizzle). What the matrix lacks is
// zero, and is not written.
#pragma once

#include "grid.h"

namespace cuda_model {

// Row-major, rows `stride` bytes apart.
struct TensorMap {
  unsigned char* data;
  int64_t rows, cols, stride;
  int box_rows;
};

constexpr uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

// The bytes come to `barrier`.
void load_box(uint32_t shared, const TensorMap& map, uint32_t barrier, int col, int row);

// The box is read some time before wait_for_stores lets its group go.
void store_box(const TensorMap& map, uint32_t shared, int col, int row);
void commit_stores();
void wait_for_stores(int pending_groups);

// A thread has written to shared memory, which the copy engine sees after the thread's fence.
void note_shared_write(uint32_t address, uint32_t size);
void fence_shared_writes();

}  // namespace cuda_model
