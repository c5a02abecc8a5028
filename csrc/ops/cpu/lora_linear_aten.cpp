// lora_linear and lora_update on ATen's products, tile by tile, the second term accumulated onto
// the first (beta = 1): one pass less than adding two results, and no temporary as large as x or y.
// In 16 bits the LoRA term comes first, because the term that comes first is rounded and it is the
// smaller one; in float32 and float64 the base comes first, because a sum that starts from zero
// rounds less on its way.
#include "lora_linear_aten.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "blocks.h"
#include "dropout.h"
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

// y = scaling * gated B^T + bias + x W0^T, or + the base's rows.
at::Tensor expand_and_accumulate(const ActiveAdapter& adapter, const at::Tensor& x,
                                 const BaseTerm& base, const at::Tensor& gated) {
  const at::Tensor y = at::empty({x.size(0), adapter.B.size(0)}, x.options());
  const std::vector<Tile> tiles = output_tiles(y, x.size(1));
  run_blocks(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const Tile& tile = tiles[i];
    at::Tensor out = tile.of(y);
    const at::Tensor s = tile.row.of(gated, 0), b = tile.col.of(adapter.B, 0).t();
    if (base.rows.defined()) {
      const at::Tensor rows = tile.of(base.rows);
      rounded_into(out, adapter.dtype(),
                   [&](at::Tensor sum) { multiply_into(sum, s, b, adapter.scaling, rows); });
      return;
    }
    const at::Tensor base_x = tile.row.of(x, 0), base_w = tile.col.of(base.weight, 0).t();
    const at::Tensor add = base.bias.defined() ? tile.col.of(base.bias, 0) : at::Tensor();
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

// dh = scaling * keep_scale * dy (B o E^T), [tokens, rank]: the gradient of the unscaled
// mask(x) A^T.
void hidden_gradient(const ActiveAdapter& adapter, const at::Tensor& dy, const at::Tensor& dh) {
  const at::Tensor gated_B = adapter.E.defined() ? adapter.B * adapter.E.t() : adapter.B;
  const Split rows(dy.size(0), scratch_step(dy.size(1)));
  run_blocks(adapter.rank() == 0 ? 0 : rows.count(), [&](int64_t i) {
    multiply_into(rows[i].of(dh, 0), adapter.cast(rows[i].of(dy, 0)), gated_B,
                  adapter.scaling * adapter.keep_scale());
  });
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

// dx = mask(dh A) + dy W0 of each layer, or without the second term.
at::Tensor input_gradient(const ActiveAdapter& adapter, const std::vector<OutputTerm>& outputs,
                          const at::Tensor& dh) {
  const at::Tensor& any = outputs[0].dy;
  const at::Tensor dx = at::empty({any.size(0), adapter.A.size(1)}, any.options());
  const std::vector<Tile> tiles = output_tiles(dx, any.size(1));
  run_blocks(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const Tile& tile = tiles[i];
    at::Tensor out = tile.of(dx);
    const at::Tensor h = tile.row.of(dh, 0), a = tile.col.of(adapter.A, 1);
    const auto masked_product = [&](at::Tensor lora) {
      multiply_into(lora, h, a, 1.0);
      if (adapter.dropout.active()) {
        dropout_copy(lora, lora, {tile.row.start, tile.col.start, dx.size(1)}, adapter.seed,
                     adapter.dropout.threshold());
      }
    };
    if (!outputs[0].weight.defined()) return rounded_into(out, adapter.dtype(), masked_product);
    const bool first = lora_first(adapter, dx);
    if (first) rounded_into(out, adapter.dtype(), masked_product);
    for (size_t m = 0; m < outputs.size(); ++m) {
      const auto& [dy, w] = outputs[m];
      multiply_into(out, tile.row.of(dy, 0), tile.col.of(w, 1), 1.0,
                    first || m > 0 ? out : at::Tensor());
    }
    if (first || adapter.rank() == 0) return;
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

// The gradients of a layer's B and E: g = scaling * hidden^T dy, [rank, out], dB = (g o E)^T and
// dE_i = sum_n B[n, i] g[i, n].
std::pair<at::Tensor, at::Tensor> output_side(const ActiveAdapter& adapter, const at::Tensor& dy,
                                              const at::Tensor& hidden, bool need_B, bool need_E) {
  if (!need_B && !need_E) return {};
  const at::Tensor g = reduce_tokens(hidden, dy, adapter.scaling,
                                     [&](const Tile& tile) { return adapter.cast(tile.of(dy)); });
  at::Tensor dB, dE;
  if (need_B) dB = (adapter.E.defined() ? g * adapter.E : g).t();
  if (need_E) {
    const auto sum_dtype = at::toOpMathType(g.scalar_type());
    dE = at::empty({adapter.rank(), 1}, g.options().dtype(sum_dtype));
    run_blocks(adapter.rank() == 0 ? 0 : 1, [&](int64_t) {
      at::sum_out(dE, g.to(sum_dtype) * adapter.B.t(), 1, /*keepdim=*/true);
    });
  }
  return {dB, dE};
}

}  // namespace

Projected forward_on_aten(const AdapterGroup& group, const at::Tensor& x,
                          const std::vector<BaseTerm>& bases) {
  Projected result{{}, project(group.shared, x)};
  for (size_t m = 0; m < group.size(); ++m) {
    const ActiveAdapter& adapter = group.members[m];
    const at::Tensor hidden = group.columns(result.hidden, m);
    const at::Tensor gated = adapter.E.defined() ? hidden * adapter.E.t() : hidden;
    result.y.push_back(expand_and_accumulate(adapter, x, bases[m], gated));
  }
  return result;
}

FactorGradients backward_on_aten(const AdapterGroup& group, const std::vector<OutputTerm>& outputs,
                                 const at::Tensor& x, const at::Tensor& hidden,
                                 std::array<bool, 4> output_mask) {
  const auto [need_x, need_A, need_B, need_E] = output_mask;
  const ActiveAdapter& shared = group.shared;
  FactorGradients result;
  if (need_x || need_A) {
    const at::Tensor dh = at::empty({x.size(0), shared.rank()}, x.options().dtype(shared.dtype()));
    for (size_t m = 0; m < group.size(); ++m)
      hidden_gradient(group.members[m], outputs[m].dy, group.columns(dh, m));
    if (need_x) result.x = input_gradient(shared, outputs, dh);
    if (need_A) {
      result.A =
          reduce_tokens(dh, x, 1.0, [&](const Tile& tile) { return shared.dropped(x, tile); });
    }
  }
  for (size_t m = 0; m < group.size(); ++m) {
    const ActiveAdapter& adapter = group.members[m];
    auto [dB, dE] = output_side(adapter, outputs[m].dy, group.columns(hidden, m), need_B,
                                need_E && adapter.E.defined());
    result.B.push_back(dB);
    result.E.push_back(dE);
  }
  return result;
}

}  // namespace rankwise
