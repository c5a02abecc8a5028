// The launchers of lora_linear.h: passes over the wide matrices, then sums of their slices.
#include "lora_linear.h"
#include "skinny_products.h"

namespace rankwise::kernels {
namespace {

int64_t slice_bytes(const Chunks& chunks, int64_t length, int64_t rank) {
  return chunks.count * length * partial_pitch(rank) * static_cast<int64_t>(sizeof(float));
}

RowProducts products(const Shrink& p) {
  return {p.wide_type, p.factor_type, p.rows,     p.cols, p.rank,   p.x,
          p.x_stride,  p.A,           p.A_stride, false,  p.dropout};
}

RowProducts row_products(const OutputGradient& p) {
  return {p.wide_type, p.factor_type, p.rows,     p.cols, p.rank, p.dy,
          p.dy_stride, p.B,           p.B_stride, true,   {}};
}

ColumnProducts column_products(const OutputGradient& p) {
  return {p.wide_type, p.factor_type, p.rows, p.cols, p.rank, p.dy, p.dy_stride, p.hidden, {}};
}

ColumnProducts products(const InputFactorGradient& p) {
  return {p.wide_type, p.factor_type, p.rows, p.cols, p.rank, p.x, p.x_stride, p.dh, p.dropout};
}

// dh = scaling * keep_scale * (dy B) o E^T.
int launch_hidden_gradient(const OutputGradient& p, float* partial, void* stream) {
  const RowProducts pass = row_products(p);
  if (const int error = launch_row_products(pass, partial, stream)) return error;
  void* plain = p.E ? nullptr : p.dh;
  void* gated = p.E ? p.dh : nullptr;
  return launch_finish_rows({p.factor_type, p.rows, p.rank, row_product_chunks(pass).count, partial,
                             p.scaling * p.keep_scale, p.E, plain, gated},
                            stream);
}

// dB and dE from g = scaling * hidden^T dy, whose float32 values stay in the first slice for dE.
int launch_factor_gradient(const OutputGradient& p, float* partial, void* stream) {
  const ColumnProducts pass = column_products(p);
  if (const int error = launch_column_products(pass, partial, stream)) return error;
  const int error = launch_finish_columns(
      {p.factor_type, p.cols, p.rank, column_product_chunks(pass).count, partial, p.scaling, p.E,
       p.dB, p.dB_stride, /*by_rank=*/false, p.dE ? partial : nullptr},
      stream);
  if (error || !p.dE) return error;
  return launch_gate_gradient({p.factor_type, p.cols, p.rank, p.B, p.B_stride, partial, p.dE},
                              stream);
}

}  // namespace

int64_t shrink_scratch_bytes(const Shrink& problem) {
  return slice_bytes(row_product_chunks(products(problem)), problem.rows, problem.rank);
}

int launch_shrink(const Shrink& p, void* scratch, void* stream) {
  const RowProducts pass = products(p);
  auto* partial = static_cast<float*>(scratch);
  if (const int error = launch_row_products(pass, partial, stream)) return error;
  return launch_finish_rows({p.factor_type, p.rows, p.rank, row_product_chunks(pass).count, partial,
                             p.keep_scale, p.E, p.hidden, p.E ? p.gated : nullptr},
                            stream);
}

int64_t output_gradient_scratch_bytes(const OutputGradient& p) {
  int64_t bytes = 0;
  if (p.dh) bytes = slice_bytes(row_product_chunks(row_products(p)), p.rows, p.rank);
  if (p.dB || p.dE) {
    Chunks chunks = column_product_chunks(column_products(p));
    if (chunks.count == 0) chunks.count = 1;  // for g, which dE reads
    const int64_t more = slice_bytes(chunks, p.cols, p.rank);
    if (more > bytes) bytes = more;
  }
  return bytes;
}

int launch_output_gradient(const OutputGradient& p, void* scratch, void* stream) {
  auto* partial = static_cast<float*>(scratch);
  if (p.dh) {
    if (const int error = launch_hidden_gradient(p, partial, stream)) return error;
  }
  return p.dB || p.dE ? launch_factor_gradient(p, partial, stream) : 0;
}

int64_t input_factor_gradient_scratch_bytes(const InputFactorGradient& problem) {
  return slice_bytes(column_product_chunks(products(problem)), problem.cols, problem.rank);
}

int launch_input_factor_gradient(const InputFactorGradient& p, void* scratch, void* stream) {
  const ColumnProducts pass = products(p);
  auto* partial = static_cast<float*>(scratch);
  if (const int error = launch_column_products(pass, partial, stream)) return error;
  return launch_finish_columns(
      {p.factor_type, p.cols, p.rank, column_product_chunks(pass).count, partial, 1.0f, nullptr,
       p.dA, p.dA_stride, /*by_rank=*/true, nullptr},
      stream);
}

}  // namespace rankwise::kernels
