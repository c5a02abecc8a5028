// merged_weight: round(W0 + scaling * B diag(E) A), summed in float64 by row blocks, rounded once.
#include <ATen/ATen.h>
#include <rankwise/ops.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/blocks.h"
#include "find_op.h"

namespace rankwise {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
           const std::optional<at::Tensor>& lora_E, double scaling, const c10::SymInt& rank) {
  TORCH_CHECK(weight.dim() == 2, "merged_weight: weight must be [out_features, in_features], got ",
              weight.sym_sizes());
  check_factors("merged_weight", "weight", weight, weight.sym_size(1), weight.sym_size(0),
                {lora_A, lora_B, lora_E, scaling, 0.0, rank});
}

// float64 to `out`'s dtype, rounded once. ATen goes to 16 bits through float32; that step is taken
// to odd here (Boldo and Melquiond, 2008), which leaves the second one right.
void round_into(const at::Tensor& out, const at::Tensor& exact) {
  if (out.element_size() > 2) {
    out.copy_(exact);
    return;
  }
  const at::Tensor nearest = exact.to(at::kFloat), bits = nearest.view(at::kInt);
  const at::Tensor wide = nearest.to(at::kDouble);
  const at::Tensor towards_zero = at::where(wide.abs().gt(exact.abs()), bits - 1, bits);
  const at::Tensor odd = at::where(wide.ne(exact), towards_zero.bitwise_or(1), bits);
  out.copy_(odd.view(at::kFloat));
}

Result merged_weight_kernel(const at::Tensor& weight, const at::Tensor& lora_A,
                            const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                            double scaling, std::optional<c10::SymInt> rank) {
  const c10::SymInt active = active_rank("merged_weight", lora_A, weight.sym_size(-1), rank);
  check(weight, lora_A, lora_B, lora_E, scaling, active);
  const int64_t directions = active.guard_int(__FILE__, __LINE__);
  at::Tensor A = lora_A.narrow(0, 0, directions).to(at::kDouble);
  if (has(lora_E)) A = A * lora_E->narrow(0, 0, directions).to(at::kDouble);
  const at::Tensor B = lora_B.narrow(1, 0, directions).to(at::kDouble);

  const at::Tensor merged = at::empty_like(weight);
  const Split rows(weight.size(0), scratch_step(weight.size(1)));
  const at::Tensor errors = at::zeros({rows.count() + 1}, weight.options().dtype(at::kDouble));
  const at::Tensor changes = at::zeros({rows.count() + 1}, weight.options().dtype(at::kLong));
  const auto merge_rows = [&](int64_t i) {
    const at::Tensor base = rows[i].of(weight, 0), out = rows[i].of(merged, 0);
    const at::Tensor exact = base.to(at::kDouble).addmm(rows[i].of(B, 0), A, 1, scaling);
    round_into(out, exact);
    if (out.numel() == 0) return;
    errors[i].copy_((out.to(at::kDouble) - exact).abs().max());
    changes[i].copy_(out.ne(base).sum());
  };
  if (weight.is_cpu()) {
    run_blocks(rows.count(), merge_rows);
  } else {
    for (int64_t i = 0; i < rows.count(); ++i) merge_rows(i);
  }
  return {merged, errors.max(), changes.sum()};
}

Result merged_weight_meta(const at::Tensor& weight, const at::Tensor& lora_A,
                          const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                          double scaling, std::optional<c10::SymInt> rank) {
  check(weight, lora_A, lora_B, lora_E, scaling,
        active_rank("merged_weight", lora_A, weight.sym_size(-1), rank));
  return {at::empty_like(weight), at::empty({}, weight.options().dtype(at::kDouble)),
          at::empty({}, weight.options().dtype(at::kLong))};
}

}  // namespace

Result merged_weight(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                     const std::optional<at::Tensor>& lora_E, double scaling,
                     std::optional<int64_t> rank) {
  static const auto op = find_op<decltype(merged_weight_kernel)>("rankwise::merged_weight");
  std::optional<c10::SymInt> symbolic_rank;
  if (rank) symbolic_rank = *rank;
  return op.call(weight, lora_A, lora_B, lora_E, scaling, symbolic_rank);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("merged_weight", &rankwise::merged_weight_kernel);
}

TORCH_LIBRARY_IMPL(rankwise, Meta, m) {
  m.impl("merged_weight", &rankwise::merged_weight_meta);
}
