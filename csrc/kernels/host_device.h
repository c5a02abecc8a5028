// Marks functions that compile for the CPU and, under nvcc, for the GPU as well.
#pragma once

#ifdef __CUDACC__
#define RANKWISE_HOST_DEVICE __host__ __device__
#else
#define RANKWISE_HOST_DEVICE
#endif
