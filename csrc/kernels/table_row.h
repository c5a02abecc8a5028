// Indices of a table's rows, read on the device and refused there.
#pragma once

#include "device.h"
#include "lora_embedding.h"

namespace rankwise::kernels {

__device__ inline int64_t index_at(const RowIndices& indices, int64_t i) {
  return indices.wide ? static_cast<const int64_t*>(indices.data)[i]
                      : static_cast<const int32_t*>(indices.data)[i];
}

__device__ inline void require_row(const RowIndices& indices, int64_t index) {
  require(index >= 0 && index < indices.table_rows, "an index lies outside of the table");
}

__device__ inline int64_t row_at(const RowIndices& indices, int64_t i) {
  const int64_t index = index_at(indices, i);
  require_row(indices, index);
  return index;
}

}  // namespace rankwise::kernels
