// lora_linear on the CPU: in panels where they serve, else on ATen's products, tile by tile, the
// second accumulated onto the first (beta = 1): one pass less than adding two results, and no
// temporary as large as x or y. In 16 bits the LoRA
// term comes first, because the term that comes first is rounded and it is the smaller one; in
// float32 and float64 the base comes first, because a sum that starts from zero rounds less on its
// way.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dispatch.h"
#include "../dropout.h"
#include "../matrices.h"
#include "adapter.h"
#include "blocks.h"
#include "dropout.h"
#include "lora_linear_panels.h"
#include "micro_kernel.h"
#include "path_choice.h"
#include "products.h"

namespace rankwise {
namespace {

// Calls fill(block) for a block of `dtype` whose content then stands, rounded once, in out.
template <typename Fill>
void rounded_into(at::Tensor out, at::ScalarType dtype, const Fill& fill) {
  if (out.scalar_type() == dtype) return fill(out);
  const at::Tensor block = at::empty(out.sizes(), out.options().dtype(dtype));
  fill(block);
  out.copy_(block);
}

// hidden = drop(x) A^T, [tokens, rank].
at::Tensor project(const ActiveAdapter& adapter, const at::Tensor& x) {
  const at::Tensor hidden =
      at::empty({x.size(0), adapter.rank()}, x.options().dtype(adapter.dtype()));
  const Split rows(x.size(0), scratch_step(x.size(1)));
  run_blocks(adapter.rank() == 0 ? 0 : rows.count(), [&](int64_t i) {
    const Tile tile{rows[i], {0, x.size(1)}};
    multiply_into(rows[i].of(hidden, 0), adapter.dropped(x, tile), adapter.A.t(),
                  adapter.keep_scale());
  });
  return hidden;
}

// Which of the two terms of y and dx is computed first.
bool lora_first(const ActiveAdapter& adapter, const at::Tensor& result) {
  return adapter.rank() > 0 && result.element_size() == 2;
}

// y = scaling * gated B^T + bias + x W0^T.
at::Tensor expand_and_accumulate(const ActiveAdapter& adapter, const at::Tensor& x,
                                 const at::Tensor& w, const std::optional<at::Tensor>& bias,
                                 const at::Tensor& gated) {
  const at::Tensor y = at::empty({x.size(0), w.size(0)}, x.options());
  const std::vector<Tile> tiles = output_tiles(y, x.size(1));
  run_blocks(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const Tile& tile = tiles[i];
    at::Tensor out = tile.of(y);
    const at::Tensor base_x = tile.row.of(x, 0), base_w = tile.col.of(w, 0).t();
    const at::Tensor s = tile.row.of(gated, 0), b = tile.col.of(adapter.B, 0).t();
    const at::Tensor add = has(bias) ? tile.col.of(*bias, 0) : at::Tensor();
    if (lora_first(adapter, y)) {
      rounded_into(out, adapter.dtype(),
                   [&](at::Tensor lora) { multiply_into(lora, s, b, adapter.scaling, add); });
      multiply_into(out, base_x, base_w, 1.0, out);
    } else {
      multiply_into(out, base_x, base_w, 1.0, add);
      if (adapter.rank() > 0) multiply_into(out, s, b, adapter.scaling, out);
    }
  });
  return y;
}

Projected forward_on_aten(const ActiveAdapter& adapter, const at::Tensor& x,
                          const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const at::Tensor hidden = project(adapter, x);
  const at::Tensor gated = adapter.E.defined() ? hidden * adapter.E.t() : hidden;
  return {expand_and_accumulate(adapter, x, weight, bias, gated), hidden};
}

ForwardResult lora_linear_forward_cpu(const at::Tensor& input, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias,
                                      const AdapterOperands& operands) {
  check_lora_linear("lora_linear", input, weight, bias, operands);
  const at::Tensor seed = draw_seed_cpu(Dropout(operands.dropout_p));
  const ActiveAdapter adapter(operands, seed);
  const at::Tensor x = matrix(input);
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = weight.size(0);
  const auto [y, hidden] = on_cpu_path(Pass::forward, adapter, x, weight, [&](bool panels) {
    return panels ? forward_in_panels(adapter, x, weight, bias)
                  : forward_on_aten(adapter, x, weight, bias);
  });
  return {in_shape(y, shape), hidden, seed};
}

// scaling * keep_scale * dy (B o E^T), [tokens, rank]: the gradient of the unscaled mask(x) A^T.
at::Tensor hidden_gradient(const ActiveAdapter& adapter, const at::Tensor& dy) {
  const at::Tensor gated_B = adapter.E.defined() ? adapter.B * adapter.E.t() : adapter.B;
  const at::Tensor dh =
      at::empty({dy.size(0), adapter.rank()}, dy.options().dtype(adapter.dtype()));
  const Split rows(dy.size(0), scratch_step(dy.size(1)));
  run_blocks(adapter.rank() == 0 ? 0 : rows.count(), [&](int64_t i) {
    multiply_into(rows[i].of(dh, 0), adapter.cast(rows[i].of(dy, 0)), gated_B,
                  adapter.scaling * adapter.keep_scale());
  });
  return dh;
}

// alpha * factor^T m for factor [tokens, rank], m [tokens, features]: column blocks over all
// tokens, so that no sum is split between threads. `load` gives a block of m in the adapter's
// dtype.
template <typename Load>
at::Tensor reduce_tokens(const at::Tensor& factor, const at::Tensor& m, double alpha,
                         const Load& load) {
  const at::Tensor result = at::empty({factor.size(1), m.size(1)}, factor.options());
  const Split rows = runs(result, m.size(0), tokens_run);
  const Split cols(m.size(1), scratch_step(rows.step()));
  run_blocks(factor.size(1) == 0 ? 0 : cols.count(), [&](int64_t i) {
    at::Tensor out = cols[i].of(result, 1);
    if (rows.count() == 0) out.zero_();
    for (int64_t j = 0; j < rows.count(); ++j) {
      const at::Tensor left = rows[j].of(factor, 0).t(), right = load(Tile{rows[j], cols[i]});
      at::addmm_out(out, out, left, right, /*beta=*/j > 0, alpha);
    }
  });
  return result;
}

// dx = mask(dh A) + dy W0.
at::Tensor input_gradient(const ActiveAdapter& adapter, const at::Tensor& dy, const at::Tensor& w,
                          const at::Tensor& dh) {
  const at::Tensor dx = at::empty({dy.size(0), w.size(1)}, dy.options());
  const std::vector<Tile> tiles = output_tiles(dx, dy.size(1));
  run_blocks(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const Tile& tile = tiles[i];
    at::Tensor out = tile.of(dx);
    const at::Tensor base_dy = tile.row.of(dy, 0), base_w = tile.col.of(w, 1);
    const at::Tensor h = tile.row.of(dh, 0), a = tile.col.of(adapter.A, 1);
    const auto masked_product = [&](at::Tensor lora) {
      multiply_into(lora, h, a, 1.0);
      if (adapter.dropout.active()) {
        dropout_copy(lora, lora, {tile.row.start, tile.col.start, dx.size(1)}, adapter.seed,
                     adapter.dropout.threshold());
      }
    };
    if (lora_first(adapter, dx)) {
      rounded_into(out, adapter.dtype(), masked_product);
      multiply_into(out, base_dy, base_w, 1.0, out);
      return;
    }
    multiply_into(out, base_dy, base_w, 1.0);
    if (adapter.rank() == 0) return;
    if (adapter.dropout.active()) {
      const at::Tensor lora = at::empty(out.sizes(), out.options());
      masked_product(lora);
      out.add_(lora);
    } else {
      multiply_into(out, h, a, 1.0, out);
    }
  });
  return dx;
}

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x) {
  const at::Tensor dw = at::empty({dy.size(1), x.size(1)}, dy.options());
  const std::vector<Tile> tiles = output_tiles(dw, dy.size(0));
  run_blocks(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    multiply_into(tiles[i].of(dw), tiles[i].row.of(dy, 1).t(), tiles[i].col.of(x, 1), 1.0);
  });
  return dw;
}

at::Tensor bias_gradient(const at::Tensor& dy) {
  const at::Tensor db = at::empty({dy.size(1)}, dy.options());
  const Split cols(dy.size(1), scratch_step(dy.size(0)));
  run_blocks(cols.count(), [&](int64_t i) {
    at::Tensor out = cols[i].of(db, 0);
    at::sum_out(out, cols[i].of(dy, 1), 0);
  });
  return db;
}

// The active part's gradient inside a factor-shaped tensor whose other directions are zero.
at::Tensor in_capacity(const at::Tensor& active, const at::Tensor& factor, int64_t dim) {
  const bool whole = active.size(dim) == factor.size(dim);
  if (whole && active.is_contiguous() && active.scalar_type() == factor.scalar_type())
    return active;
  const at::Tensor full = whole ? at::empty(factor.sizes(), factor.options())
                                : at::zeros(factor.sizes(), factor.options());
  full.narrow(dim, 0, active.size(dim)).copy_(active);
  return full;
}

FactorGradients backward_on_aten(const ActiveAdapter& adapter, const at::Tensor& dy,
                                 const at::Tensor& x, const at::Tensor& weight,
                                 const at::Tensor& hidden, std::array<bool, 4> output_mask) {
  const auto [need_x, need_A, need_B, need_E] = output_mask;
  FactorGradients result;
  if (need_x || need_A) {
    const at::Tensor dh = hidden_gradient(adapter, dy);
    if (need_x) result.x = input_gradient(adapter, dy, weight, dh);
    if (need_A) {
      result.A =
          reduce_tokens(dh, x, 1.0, [&](const Tile& tile) { return adapter.dropped(x, tile); });
    }
  }
  if (need_B || need_E) {
    // g = scaling * hidden^T dy, [rank, out]: dB = (g o E)^T and dE_i = sum_n B[n, i] g[i, n].
    const at::Tensor g = reduce_tokens(hidden, dy, adapter.scaling,
                                       [&](const Tile& tile) { return adapter.cast(tile.of(dy)); });
    if (need_B) result.B = (adapter.E.defined() ? g * adapter.E : g).t();
    if (need_E) {
      const auto sum_dtype = at::toOpMathType(g.scalar_type());
      result.E = at::empty({adapter.rank(), 1}, g.options().dtype(sum_dtype));
      run_blocks(adapter.rank() == 0 ? 0 : 1, [&](int64_t) {
        at::sum_out(result.E, g.to(sum_dtype) * adapter.B.t(), 1, /*keepdim=*/true);
      });
    }
  }
  return result;
}

BackwardResult lora_linear_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                        const at::Tensor& weight, const AdapterOperands& operands,
                                        const at::Tensor& hidden, const at::Tensor& seed,
                                        std::array<bool, 6> output_mask) {
  check_lora_linear("lora_linear", input, weight, {}, operands);
  check_backward("lora_linear", grad_output, input, weight, operands, hidden, seed);
  const ActiveAdapter adapter(operands, seed);
  const at::Tensor dy = matrix(grad_output), x = matrix(input);
  const auto [need_x, need_w, need_b, need_A, need_B, need_E] = output_mask;
  const std::array<bool, 4> needed = {need_x, need_A, need_B, need_E};
  at::Tensor dx, dw, db, dA, dB, dE;
  if (need_w) dw = weight_gradient(dy, x);
  if (need_b) db = bias_gradient(dy);
  const FactorGradients d = on_cpu_path(Pass::backward, adapter, x, weight, [&](bool panels) {
    return panels ? backward_in_panels(adapter, dy, x, weight, hidden, needed)
                  : backward_on_aten(adapter, dy, x, weight, hidden, needed);
  });
  if (need_x) dx = in_shape(d.x, input.sizes());
  if (need_A) dA = in_capacity(d.A, operands.lora_A, 0);
  if (need_B) dB = in_capacity(d.B, operands.lora_B, 1);
  if (need_E) dE = in_capacity(d.E, *operands.lora_E, 0);
  return {dx, dw, db, dA, dB, dE};
}

std::string path_cpu(const at::Tensor& tensor) {
  if (!micro_kernel_serves(tensor.scalar_type())) return "cpu (ATen)";
  return std::string("cpu (") + name_of(path_in_effect()) + ")";
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_lora_linear_forward", &rankwise::linear_forward<rankwise::lora_linear_forward_cpu>);
  m.impl("_lora_linear_backward", &rankwise::linear_backward<rankwise::lora_linear_backward_cpu>);
  m.impl("_lora_linear_path", &rankwise::path_cpu);
}
