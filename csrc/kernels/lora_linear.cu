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

ColumnProducts products(const InputFactorGradient& p) {
  return {p.wide_type, p.factor_type, p.rows, p.cols, p.rank, p.x, p.x_stride, p.dh, p.dropout};
}

// One pass over dy for both products, or one for each that is asked for.
struct OutputPasses {
  RowProducts rows;
  ColumnProducts columns;
  OutputProducts both;
  bool want_rows, want_columns, together;
  int64_t row_slices, column_slices;

  explicit OutputPasses(const OutputGradient& p)
      : rows{p.wide_type, p.factor_type, p.rows,     p.cols, p.rank, p.dy,
             p.dy_stride, p.B,           p.B_stride, true,   {}},
        columns{p.wide_type, p.factor_type, p.rows,   p.cols, p.rank,
                p.dy,        p.dy_stride,   p.hidden, {}},
        both{p.wide_type, p.factor_type, p.rows, p.cols,     p.rank,
             p.dy,        p.dy_stride,   p.B,    p.B_stride, p.hidden},
        want_rows(p.dh),
        want_columns(p.dB || p.dE),
        together(want_rows && want_columns && output_products_fit(both)) {
    const OutputChunks shared = output_product_chunks(both);
    row_slices = together ? shared.of_columns.count : row_product_chunks(rows).count;
    column_slices = together ? shared.of_rows.count : column_product_chunks(columns).count;
  }

  // The sums of the column products, from an OutputGradient's scratch on.
  float* columns_of(void* scratch) const {
    return static_cast<float*>(scratch) + row_bytes() / static_cast<int64_t>(sizeof(float));
  }

  int64_t row_bytes() const { return want_rows ? bytes(row_slices, rows.rows) : 0; }
  // At least one slice: dE is read from it.
  int64_t column_bytes() const {
    return want_columns ? bytes(column_slices > 0 ? column_slices : 1, rows.cols) : 0;
  }

  int launch(float* row_partial, float* column_partial, void* stream) const {
    if (together) return launch_output_products(both, row_partial, column_partial, stream);
    int error = want_rows ? launch_row_products(rows, row_partial, stream) : 0;
    if (!error && want_columns) error = launch_column_products(columns, column_partial, stream);
    return error;
  }

 private:
  int64_t bytes(int64_t slices, int64_t length) const {
    return slice_bytes({0, slices}, length, rows.rank);
  }
};

// dh = scaling * keep_scale * (dy B) o E^T.
FinishRows hidden_gradient(const OutputGradient& p, int64_t slices, const float* partial) {
  return {p.rows, p.rank, slices, partial, p.scaling * p.keep_scale, p.E, nullptr,
          p.dh,   1.0f,   p.term, p.dh_cut};
}

// dB from g = scaling * hidden^T dy, whose float32 values stay in the first slice for dE.
FinishColumns factor_gradient(const OutputGradient& p, int64_t slices, float* partial) {
  return {p.cols,
          p.rank,
          slices,
          partial,
          p.scaling,
          p.E,
          p.dB,
          p.dB_stride,
          /*by_rank=*/false,
          p.dE ? partial : nullptr};
}

}  // namespace

int64_t shrink_scratch_bytes(const Shrink& problem) {
  return slice_bytes(row_product_chunks(products(problem)), problem.rows, problem.rank);
}

int launch_shrink(const Shrink& p, void* scratch, void* stream) {
  const RowProducts pass = products(p);
  auto* partial = static_cast<float*>(scratch);
  if (const int error = launch_row_products(pass, partial, stream)) return error;
  const FinishRows rows{p.rows,   p.rank,       row_product_chunks(pass).count,
                        partial,  p.keep_scale, p.E,
                        p.hidden, p.gated,      p.gated_scale,
                        p.term};
  return launch_finish({p.factor_type, rows, {}, {}, p.term_right}, stream);
}

int64_t output_gradient_scratch_bytes(const OutputGradient& problem) {
  const OutputPasses passes(problem);
  return passes.row_bytes() + passes.column_bytes();
}

GateGradient gate_gradient(const OutputGradient& p, void* scratch) {
  return {p.cols, p.rank, p.B, p.B_stride, OutputPasses(p).columns_of(scratch), p.dE};
}

int launch_output_gradient(const OutputGradient& p, void* scratch, void* stream) {
  const OutputPasses passes(p);
  auto* row_partial = static_cast<float*>(scratch);
  float* column_partial = passes.columns_of(scratch);
  int error = passes.launch(row_partial, column_partial, stream);
  if (error) return error;
  Finish finish{p.factor_type, {}, {}, {}, p.term_right};
  if (passes.want_rows) finish.rows = hidden_gradient(p, passes.row_slices, row_partial);
  if (passes.want_columns) {
    finish.columns = factor_gradient(p, passes.column_slices, column_partial);
  }
  error = launch_finish(finish, stream);
  if (error || !p.dE || p.dE_later) return error;
  return launch_finish({p.factor_type, {}, {}, gate_gradient(p, scratch)}, stream);
}

int64_t input_factor_gradient_scratch_bytes(const InputFactorGradient& problem) {
  return slice_bytes(column_product_chunks(products(problem)), problem.cols, problem.rank);
}

int launch_input_factor_gradient(const InputFactorGradient& p, void* scratch, void* stream) {
  const ColumnProducts pass = products(p);
  auto* partial = static_cast<float*>(scratch);
  if (const int error = launch_column_products(pass, partial, stream)) return error;
  return launch_input_factor_end(p, partial, column_product_chunks(pass).count, stream);
}

int launch_input_factor_end(const InputFactorGradient& p, const float* partial, int64_t slices,
                            void* stream) {
  const FinishColumns columns{p.cols,  p.rank, slices,      partial,         1.0f,
                              nullptr, p.dA,   p.dA_stride, /*by_rank=*/true};
  return launch_finish({p.factor_type, {}, columns, p.gate}, stream);
}

}  // namespace rankwise::kernels
