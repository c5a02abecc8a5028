// Instructions of sm_90a as functions: boxes of matrices copied by the copy engine, barriers in
// shared memory that count bytes, products of a warpgroup.
//
// Operands in shared memory are named by 32-bit addresses (shared_address); sums and copies run by
// themselves until they are waited for. Tests compile kernels for the CPU against an execution
// model.
#pragma once

#ifdef RANKWISE_CUDA_MODEL
#include <cuda_model/hopper.h>
#else
#include "instructions_cuda.h"
#endif
