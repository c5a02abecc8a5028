// The kernels of lora_embedding on the device, beside the skinny products of lora_linear.h, whose
// contract holds here too. With v_i the indices:
//   gather            hidden[i] = A^T[v_i],   gated = hidden o E^T
//   embedding_output  y[i] = W0[v_i] + scaling * gated[i] B^T
//   output_gradient   dh, dB and dE, in lora_linear.h
//   column_sums       dA^T[v] = the sum of dh[i] over all i with v_i = v
//
// An index outside of the table ends the kernel with a message, as a failed assertion does.
#pragma once

#include "lora_linear.h"

namespace rankwise::kernels {

struct RowIndices {
  const void* data;
  bool wide;           // int64, else int32
  int64_t table_rows;  // each index is in [0, table_rows)
};

struct Gather {
  int64_t rows, rank;
  Type factor_type;
  RowIndices indices;  // [rows]
  const void* A;       // [rank, table_rows]
  int64_t A_stride;
  const void* E;  // [rank], or null
  void* hidden;   // written, [rows, rank]
  void* gated;    // written, [rows, rank]; null without E
};
int launch_gather(const Gather& problem, void* stream);

struct EmbeddingOutput {
  int64_t rows, cols, rank;
  Type wide_type, factor_type;
  RowIndices indices;  // [rows]
  const void* table;   // [table_rows, cols]
  int64_t table_stride;
  const void* gated;  // [rows, rank]
  const void* B;      // [cols, rank]
  int64_t B_stride;
  float scaling;
  void* out;  // written, [rows, cols]
  int64_t out_stride;
};
int launch_embedding_output(const EmbeddingOutput& problem, void* stream);

struct ColumnSums {
  int64_t rows, rank;
  Type factor_type;
  RowIndices sorted;         // [rows]: the indices in ascending order,
  const int64_t* positions;  // [rows]: and the rows of dh they belong to
  const void* dh;            // [rows, rank]
  int64_t padding_idx;       // a column that is not written; negative: none
  void* dA;                  // [rank, table_rows]; columns of other indices are not written
  int64_t dA_stride;
};
int64_t column_sums_scratch_bytes(const ColumnSums& problem);
int launch_column_sums(const ColumnSums& problem, void* scratch, void* stream);

}  // namespace rankwise::kernels
