// Barriers in shared memory with counts of bytes (mbarrier): a phase ends when all its arrivals
// have come, and all the bytes that were announced.
#pragma once

#include "grid.h"

namespace cuda_model {

void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_arrive(uint32_t barrier);
void barrier_expect(uint32_t barrier, uint32_t bytes);  // announces bytes, and arrives
void barrier_bytes(uint32_t barrier, uint32_t bytes);   // bytes have come
// Returns when the phase of this parity has ended; phases count from 0.
void barrier_wait(uint32_t barrier, uint32_t parity, const Site& site);

}  // namespace cuda_model
