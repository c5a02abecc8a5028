// Forward and backward from panel products, on types and then on tensors.
#include "lora_linear_panels.h"

#include <ATen/ATen.h>

#include "panel_products.h"
#include "token_sums.h"

namespace rankwise {
namespace {

template <typename F>
std::vector<float> gates(const ActiveAdapter& adapter) {
  std::vector<float> result(adapter.rank(), 1.0F);
  if (adapter.E.defined())
    for (int64_t i = 0; i < adapter.rank(); ++i) result[i] = Elements<F>(adapter.E)(i, 0);
  return result;
}

// A row of `count` numbers, followed by zeros up to `padded`.
template <typename F, typename Value>
void put_row(F* to, int64_t count, int64_t padded, const Value& value) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<F>(value(i));
  std::fill(to + count, to + padded, F(0));
}

// A member's part of `hidden`, scaled and gated.
template <typename F>
struct Gated {
  int64_t offset, rank, padded;
  float scale;
  std::vector<float> gate;
  at::Tensor values;  // [tokens, rank], rows padded
  F* to;

  Gated(const AdapterGroup& group, size_t member, int64_t tokens)
      : offset(group.offset(member)),
        rank(group.members[member].rank()),
        padded(inner_padded<F>(rank)),
        scale(static_cast<float>(group.members[member].scaling)),
        gate(gates<F>(group.members[member])),
        values(empty_like(group.shared.A, tokens, padded)),
        to(values.mutable_data_ptr<F>()) {}
};

// hidden = drop(x) A^T of all members, [tokens, rank], and each one's gated part.
template <typename T, typename F>
at::Tensor project(const AdapterGroup& group, const at::Tensor& x,
                   const std::vector<Gated<F>>& gated) {
  const ActiveAdapter& shared = group.shared;
  const int64_t rank = shared.rank();
  const at::Tensor hidden = empty_like(shared.A, x.size(0), rank);
  F* const hidden_to = hidden.mutable_data_ptr<F>();
  const auto keep = static_cast<float>(shared.keep_scale());
  const Kept kept(shared, x);
  shrink<T, F>(
      x, Elements<F>(shared.A).transposed(), rank, kept, kept, [&](Range rows, const float* sums) {
        for (int64_t k = rows.start; k < rows.start + rows.size; ++k, sums += rank) {
          const auto unscaled = [&](int64_t i) { return keep * sums[i]; };
          put_row(hidden_to + k * rank, rank, rank, unscaled);
          for (const Gated<F>& g : gated) {
            put_row(g.to + k * g.padded, g.rank, g.padded,
                    [&](int64_t i) { return g.scale * g.gate[i] * unscaled(g.offset + i); });
          }
        }
      });
  return hidden;
}

template <typename T, typename F>
at::Tensor expand(const ActiveAdapter& adapter, const at::Tensor& x, const BaseTerm& base,
                  const at::Tensor& gated) {
  const Sum<T, F> y{empty_like(x, x.size(0), adapter.B.size(0)),
                    {base.rows.defined() ? no_product<T>(x)
                                         : Product<T>{x, Elements<T>(base.weight).transposed()}},
                    base.rows,
                    gated,
                    Elements<F>(adapter.B).transposed(),
                    adapter.rank(),
                    base.bias.defined() ? base.bias.to(at::kFloat).contiguous() : at::Tensor(),
                    Kept()};
  const std::vector<Tile> tiles = y.tiles();
  run_products(static_cast<int64_t>(tiles.size()), y.products_of(tiles),
               [&](int64_t i) { y.compute(tiles[i]); });
  return y.out;
}

template <typename T, typename F>
Projected forward(const AdapterGroup& group, const at::Tensor& x,
                  const std::vector<BaseTerm>& bases) {
  std::vector<Gated<F>> gated;
  for (size_t m = 0; m < group.size(); ++m) gated.emplace_back(group, m, x.size(0));
  Projected result;
  result.hidden = project<T, F>(group, x, gated);
  for (size_t m = 0; m < group.size(); ++m)
    result.y.push_back(expand<T, F>(group.members[m], x, bases[m], gated[m].values));
  return result;
}

// dh: scaling * keep_scale * dy (B o E^T) of each member, beside one another in [tokens, rank] with
// padded rows; draws the bits of x, and calls then(rows, dh) for blocks of block_rows that are
// complete.
template <typename T, typename F, typename Then>
at::Tensor hidden_gradient(const AdapterGroup& group, const std::vector<OutputTerm>& outputs,
                           const Kept& drawn, const Then& then) {
  const int64_t all = group.shared.rank(), padded = inner_padded<F>(all);
  const at::Tensor dh = empty_like(group.shared.A, outputs[0].dy.size(0), padded);
  int64_t offset = 0;
  for (size_t m = 0; offset < all; offset += group.members[m++].rank()) {
    const ActiveAdapter& adapter = group.members[m];
    const int64_t rank = adapter.rank();
    const bool last = offset + rank == all;
    const at::Tensor gated_B = adapter.E.defined() ? adapter.B * adapter.E.t() : adapter.B;
    const auto scale = static_cast<float>(adapter.scaling * adapter.keep_scale());
    F* const to = dh.mutable_data_ptr<F>() + offset;
    shrink<T, F>(outputs[m].dy, Elements<F>(gated_B), rank, Kept(), offset == 0 ? drawn : Kept(),
                 [&](Range rows, const float* sums) {
                   for (int64_t k = rows.start; k < rows.start + rows.size; ++k, sums += rank)
                     put_row(to + k * padded, rank, last ? padded - offset : rank,
                             [&](int64_t i) { return scale * sums[i]; });
                   if (last) then(rows, dh);
                 });
  }
  return dh;
}

// The gradients of B and E: g = scaling * hidden^T dy, dB = (g o E)^T, dE_i = sum_n B[n, i] g[i,
// n].
template <typename T, typename F>
class OutputSide {
 public:
  OutputSide(const ActiveAdapter& adapter, const at::Tensor& hidden, const at::Tensor& dy,
             bool need_B, bool need_E)
      : adapter_(adapter),
        hidden_(hidden),
        dy_(dy),
        gate_(gates<F>(adapter)),
        cols_(token_blocks(dy.size(0), need_B || need_E ? dy.size(1) : 0)) {
    if (need_B || need_E) hidden_blocks_ = empty_blocks(adapter.A, dy.size(0), adapter.rank());
    if (need_B) dB_ = empty_like(adapter.B, dy.size(1), adapter.rank());
    if (need_E) dE_parts_.resize(cols_.count() * adapter.rank());
  }

  // Of all tokens before compute().
  void transpose_hidden(Range rows) const {
    transpose_block<F>(hidden_, rows, adapter_.rank(), hidden_blocks_);
  }

  int64_t blocks() const { return cols_.count(); }

  void compute(int64_t block) {
    const int64_t rank = adapter_.rank();
    const auto [first, count] = cols_[block];
    const float* const sums =
        sum_over_tokens<T, F>(hidden_blocks_, rank, dy_, cols_[block], Kept());
    const auto scale = static_cast<float>(adapter_.scaling);
    const Elements<F> B(adapter_.B);
    F* const to = dB_.defined() ? dB_.mutable_data_ptr<F>() + first * rank : nullptr;
    for (int64_t i = 0; to != nullptr && i < rank; ++i) {
      const float gate = scale * gate_[i];
      for (int64_t n = 0; n < count; ++n)
        to[n * rank + i] = static_cast<F>(gate * sums[i * count + n]);
    }
    for (int64_t i = 0; !dE_parts_.empty() && i < rank; ++i) {
      double part = 0;
      for (int64_t n = 0; n < count; ++n)
        part += double{scale * sums[i * count + n]} * static_cast<float>(B(first + n, i));
      dE_parts_[block * rank + i] = part;
    }
  }

  at::Tensor dB() const { return dB_; }
  at::Tensor dE() const {
    const int64_t rank = adapter_.rank();
    const at::Tensor result = empty_like(adapter_.A, rank, 1);
    for (int64_t i = 0; i < rank; ++i) {
      double sum = 0;
      for (int64_t block = 0; block < blocks(); ++block) sum += dE_parts_[block * rank + i];
      result.mutable_data_ptr<F>()[i] = static_cast<F>(static_cast<float>(sum));
    }
    return result;
  }

 private:
  const ActiveAdapter& adapter_;
  at::Tensor hidden_, hidden_blocks_, dy_;
  std::vector<float> gate_;
  Split cols_;
  at::Tensor dB_;
  std::vector<double> dE_parts_;  // [blocks, rank]
};

// Of each layer, dy W0.
template <typename T>
std::vector<Product<T>> base_products(const std::vector<OutputTerm>& outputs) {
  std::vector<Product<T>> result;
  for (const auto& [dy, weight] : outputs) {
    result.push_back(weight.defined() ? Product<T>{dy, Elements<T>(weight)} : no_product<T>(dy));
  }
  return result;
}

template <typename T, typename F>
FactorGradients backward(const AdapterGroup& group, const std::vector<OutputTerm>& outputs,
                         const at::Tensor& x, const at::Tensor& hidden,
                         std::array<bool, 4> output_mask) {
  const auto [need_x, need_A, need_B, need_E] = output_mask;
  const ActiveAdapter& shared = group.shared;
  const int64_t rank = shared.rank(), tokens = x.size(0);
  const Kept kept(shared, x);
  std::vector<OutputSide<T, F>> sides;
  for (size_t m = 0; m < group.size(); ++m) {
    const ActiveAdapter& member = group.members[m];
    sides.emplace_back(member, group.columns(hidden, m), outputs[m].dy, need_B,
                       need_E && member.E.defined());
  }
  const auto transpose_hidden = [&](Range rows) {
    for (const OutputSide<T, F>& side : sides) side.transpose_hidden(rows);
  };
  FactorGradients result;
  at::Tensor dh, dh_blocks;
  if (need_A) dh_blocks = empty_blocks(shared.A, tokens, rank);
  if (need_x || need_A) {
    dh = hidden_gradient<T, F>(group, outputs, kept, [&](Range rows, const at::Tensor& written) {
      transpose_block<F>(written, rows, rank, dh_blocks);
      transpose_hidden(rows);
    });
  } else {
    const Split blocks(tokens, token_run);
    run_products(blocks.count(), 16 * token_run * rank,
                 [&](int64_t i) { transpose_hidden(blocks[i]); });
  }
  if (need_x) result.x = empty_like(x, x.size(0), x.size(1));
  if (need_A) result.A = empty_like(shared.A, rank, x.size(1));
  const Sum<T, F> dx{result.x, base_products<T>(outputs), {}, dh, Elements<F>(shared.A), rank, {},
                     kept};
  const std::vector<Tile> tiles = need_x ? dx.tiles() : std::vector<Tile>();
  const Split in = token_blocks(x.size(0), need_A ? x.size(1) : 0);

  const auto tile_count = static_cast<int64_t>(tiles.size());
  int64_t blocks = tile_count + in.count();
  for (const OutputSide<T, F>& side : sides) blocks += side.blocks();
  const int64_t products = need_x ? dx.products_of(tiles) : x.size(0) * in.step() * rank;
  run_products(blocks, products, [&](int64_t i) {
    if (i < tile_count) return dx.compute(tiles[i]);
    i -= tile_count;
    if (i < in.count()) {
      const Range cols = in[i];
      const float* const sums = sum_over_tokens<T, F>(dh_blocks, rank, x, cols, kept);
      return add_row<F>({sums, cols.size}, nullptr, rank, cols.size,
                        {result.A.mutable_data_ptr<F>() + cols.start, x.size(1)});
    }
    i -= in.count();
    auto side = sides.begin();
    for (; i >= side->blocks(); ++side) i -= side->blocks();
    side->compute(i);
  });
  for (size_t m = 0; m < group.size(); ++m) {
    result.B.push_back(sides[m].dB());
    const bool gated = need_E && group.members[m].E.defined();
    result.E.push_back(gated ? sides[m].dE() : at::Tensor());
  }
  return result;
}

// Calls body.template operator()<T, F>() for the types of base and factors.
template <typename Body>
auto with_types(const at::Tensor& x, const ActiveAdapter& adapter, const Body& body) {
  if (x.scalar_type() == at::kFloat) return body.template operator()<float, float>();
  if (adapter.dtype() == at::kFloat) return body.template operator()<at::BFloat16, float>();
  return body.template operator()<at::BFloat16, at::BFloat16>();
}

}  // namespace

bool in_panels(const at::Tensor& x, const ActiveAdapter& adapter) {
  const int64_t out_features = adapter.B.size(0);
  const bool even = x.size(1) % 2 == 0 && out_features % 2 == 0;
  return x.numel() > 0 && out_features > 0 && (x.scalar_type() == at::kFloat || even) &&
         micro_kernel_serves(x.scalar_type()) && micro_kernel_serves(adapter.dtype());
}

Projected forward_in_panels(const AdapterGroup& group, const at::Tensor& x,
                            const std::vector<BaseTerm>& bases) {
  return with_types(x, group.shared,
                    [&]<typename T, typename F>() { return forward<T, F>(group, x, bases); });
}

FactorGradients backward_in_panels(const AdapterGroup& group,
                                   const std::vector<OutputTerm>& outputs, const at::Tensor& x,
                                   const at::Tensor& hidden, std::array<bool, 4> output_mask) {
  return with_types(x, group.shared, [&]<typename T, typename F>() {
    return backward<T, F>(group, outputs, x, hidden, output_mask);
  });
}

}  // namespace rankwise
