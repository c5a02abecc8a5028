// Forward and backward from panel products, on types and then on tensors.
#include "lora_linear_panels.h"

#include <ATen/ATen.h>

#include "panel_products.h"

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

template <typename T, typename F>
Projected forward(const ActiveAdapter& adapter, const at::Tensor& x, const BaseTerm& base) {
  const int64_t rank = adapter.rank(), padded = inner_padded<F>(rank);
  const at::Tensor hidden = empty_like(adapter.A, x.size(0), rank);
  const at::Tensor gated = empty_like(adapter.A, x.size(0), padded);
  F* const hidden_to = hidden.mutable_data_ptr<F>();
  F* const gated_to = gated.mutable_data_ptr<F>();
  const std::vector<float> gate = gates<F>(adapter);
  const auto keep = static_cast<float>(adapter.keep_scale());
  const auto scale = static_cast<float>(adapter.scaling);
  const Kept kept(adapter, x);
  shrink<T, F>(x, Elements<F>(adapter.A).transposed(), rank, kept, kept,
               [&](Range rows, const float* sums) {
                 for (int64_t k = rows.start; k < rows.start + rows.size; ++k, sums += rank) {
                   const auto unscaled = [&](int64_t i) { return keep * sums[i]; };
                   put_row(hidden_to + k * rank, rank, rank, unscaled);
                   put_row(gated_to + k * padded, rank, padded,
                           [&](int64_t i) { return scale * gate[i] * unscaled(i); });
                 }
               });
  const Sum<T, F> y{
      empty_like(x, x.size(0), adapter.B.size(0)),
      base.rows.defined() ? no_product<T>(x) : Product<T>{x, Elements<T>(base.weight).transposed()},
      base.rows,
      gated,
      Elements<F>(adapter.B).transposed(),
      rank,
      base.bias.defined() ? base.bias.to(at::kFloat).contiguous() : at::Tensor(),
      Kept()};
  const std::vector<Tile> tiles = y.tiles();
  run_products(static_cast<int64_t>(tiles.size()), y.products_of(tiles),
               [&](int64_t i) { y.compute(tiles[i]); });
  return {y.out, hidden};
}

// scaling * keep_scale * dy (B o E^T), [tokens, rank] with padded rows; draws the bits of x, and
// calls then(rows, result) after each block of block_rows.
template <typename T, typename F, typename Then>
at::Tensor hidden_gradient(const ActiveAdapter& adapter, const at::Tensor& dy, const Kept& drawn,
                           const Then& then) {
  const int64_t rank = adapter.rank(), padded = inner_padded<F>(rank);
  const at::Tensor dh = empty_like(adapter.A, dy.size(0), padded);
  const at::Tensor gated_B = adapter.E.defined() ? adapter.B * adapter.E.t() : adapter.B;
  const auto scale = static_cast<float>(adapter.scaling * adapter.keep_scale());
  F* const to = dh.mutable_data_ptr<F>();
  shrink<T, F>(dy, Elements<F>(gated_B), rank, Kept(), drawn, [&](Range rows, const float* sums) {
    for (int64_t k = rows.start; k < rows.start + rows.size; ++k, sums += rank)
      put_row(to + k * padded, rank, padded, [&](int64_t i) { return scale * sums[i]; });
    then(rows, dh);
  });
  return dh;
}

// The gradients of B and E: g = scaling * hidden^T dy, dB = (g o E)^T, dE_i = sum_n B[n, i] g[i,
// n].
template <typename T, typename F>
class OutputSide {
 public:
  // hidden: in transposed blocks, which compute() reads.
  OutputSide(const ActiveAdapter& adapter, const at::Tensor& hidden, const at::Tensor& dy,
             bool need_B, bool need_E)
      : adapter_(adapter),
        hidden_(hidden),
        dy_(dy),
        gate_(gates<F>(adapter)),
        cols_(token_blocks(dy.size(0), need_B || need_E ? dy.size(1) : 0)) {
    if (need_B) dB_ = empty_like(adapter.B, dy.size(1), adapter.rank());
    if (need_E) dE_parts_.resize(cols_.count() * adapter.rank());
  }

  int64_t blocks() const { return cols_.count(); }

  void compute(int64_t block) {
    const int64_t rank = adapter_.rank();
    const auto [first, count] = cols_[block];
    const float* const sums = sum_over_tokens<T, F>(hidden_, rank, dy_, cols_[block], Kept());
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
  const at::Tensor& hidden_;
  const at::Tensor& dy_;
  std::vector<float> gate_;
  Split cols_;
  at::Tensor dB_;
  std::vector<double> dE_parts_;  // [blocks, rank]
};

template <typename T, typename F>
FactorGradients backward(const ActiveAdapter& adapter, const at::Tensor& dy, const at::Tensor& x,
                         const at::Tensor& weight, const at::Tensor& hidden,
                         std::array<bool, 4> output_mask) {
  const auto [need_x, need_A, need_B, need_E] = output_mask;
  const int64_t rank = adapter.rank();
  const Kept kept(adapter, x);
  FactorGradients result;
  at::Tensor dh, dh_blocks, hidden_blocks;
  const int64_t tokens = dy.size(0);
  if (need_A) dh_blocks = empty_blocks(adapter.A, tokens, rank);
  if (need_B || need_E) hidden_blocks = empty_blocks(adapter.A, tokens, rank);
  if (need_x || need_A) {
    dh = hidden_gradient<T, F>(adapter, dy, kept, [&](Range rows, const at::Tensor& written) {
      transpose_block<F>(written, rows, rank, dh_blocks);
      transpose_block<F>(hidden, rows, rank, hidden_blocks);
    });
  } else {
    const Split blocks(tokens, token_run);
    run_products(blocks.count(), 16 * token_run * rank,
                 [&](int64_t i) { transpose_block<F>(hidden, blocks[i], rank, hidden_blocks); });
  }
  if (need_x) result.x = empty_like(x, x.size(0), x.size(1));
  if (need_A) result.A = empty_like(adapter.A, rank, x.size(1));
  const Sum<T, F> dx{result.x,
                     weight.defined() ? Product<T>{dy, Elements<T>(weight)} : no_product<T>(dy),
                     {},
                     dh,
                     Elements<F>(adapter.A),
                     rank,
                     {},
                     kept};
  const std::vector<Tile> tiles = need_x ? dx.tiles() : std::vector<Tile>();
  const Split in = token_blocks(x.size(0), need_A ? x.size(1) : 0);
  OutputSide<T, F> output_side(adapter, hidden_blocks, dy, need_B, need_E);

  const auto tile_count = static_cast<int64_t>(tiles.size());
  const int64_t blocks = tile_count + in.count() + output_side.blocks();
  const int64_t products = need_x ? dx.products_of(tiles) : x.size(0) * in.step() * rank;
  run_products(blocks, products, [&](int64_t i) {
    if (i < tile_count) {
      dx.compute(tiles[i]);
    } else if (i < tile_count + in.count()) {
      const Range cols = in[i - tile_count];
      const float* const sums = sum_over_tokens<T, F>(dh_blocks, rank, x, cols, kept);
      add_row<F>({sums, cols.size}, nullptr, rank, cols.size,
                 {result.A.mutable_data_ptr<F>() + cols.start, x.size(1)});
    } else {
      output_side.compute(i - tile_count - in.count());
    }
  });
  if (need_B) result.B = output_side.dB();
  if (need_E) result.E = output_side.dE();
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

Projected forward_in_panels(const ActiveAdapter& adapter, const at::Tensor& x,
                            const BaseTerm& base) {
  return with_types(x, adapter,
                    [&]<typename T, typename F>() { return forward<T, F>(adapter, x, base); });
}

FactorGradients backward_in_panels(const ActiveAdapter& adapter, const at::Tensor& dy,
                                   const at::Tensor& x, const at::Tensor& weight,
                                   const at::Tensor& hidden, std::array<bool, 4> output_mask) {
  return with_types(x, adapter, [&]<typename T, typename F>() {
    return backward<T, F>(adapter, dy, x, weight, hidden, output_mask);
  });
}

}  // namespace rankwise
