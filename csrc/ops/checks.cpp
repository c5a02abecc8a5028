// Argument checks: one sentence each, naming op, argument, what was wanted and what came.
#include "checks.h"

#include <c10/core/SymBool.h>
#include <c10/core/SymIntArrayRef.h>

#include <cmath>

#include "dropout.h"

namespace rankwise {
namespace {

std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      return c10::toString(dtype);
  }
}

bool is_supported(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

bool is_compressed(at::Layout layout) {
  return layout == at::kSparseCsr || layout == at::kSparseCsc || layout == at::kSparseBsr ||
         layout == at::kSparseBsc;
}

void check_shape(const char* op, const char* name, const at::Tensor& tensor,
                 const c10::SymInt& rows, const char* rows_name, const c10::SymInt& cols,
                 const char* cols_name) {
  const auto wanted = [&] {
    std::ostringstream text;
    const auto put = [&text](const c10::SymInt& size, const char* symbol) {
      if (symbol != nullptr)
        text << symbol;
      else
        text << size;
    };
    text << '[';
    put(rows, rows_name);
    text << ", ";
    put(cols, cols_name);
    text << ']';
    return text.str();
  };
  TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " must be ", wanted(), ", got ",
              tensor.sym_sizes());
  TORCH_SYM_CHECK(tensor.sym_size(0).sym_eq(rows).sym_and(tensor.sym_size(1).sym_eq(cols)), op,
                  ": ", name, " must be ", wanted(), ", got ", tensor.sym_sizes());
}

void check_like(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), op, ": ", name, " must be on ", other.device(),
              " like ", other_name, ", got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": ", name, " must be ",
              dtype_name(other.scalar_type()), " like ", other_name, ", got ",
              dtype_name(tensor.scalar_type()));
}

void check_sizes(const char* op, const char* name, const at::Tensor& tensor,
                 c10::SymIntArrayRef wanted) {
  TORCH_CHECK(tensor.dim() == static_cast<int64_t>(wanted.size()), op, ": ", name, " must be ",
              wanted, ", got ", tensor.sym_sizes());
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    TORCH_SYM_CHECK(tensor.sym_size(i).sym_eq(wanted[i]), op, ": ", name, " must be ", wanted,
                    ", got ", tensor.sym_sizes());
  }
}

}  // namespace

void check_dense(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(!tensor.is_nested(), op, ": ", name, " must be dense, got a nested tensor");
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", name, " must be dense, got layout ",
              tensor.layout(), "; call to_dense() first");
}

void check_dense_factors(const char* op, const at::Tensor& lora_A, const at::Tensor& lora_B,
                         const std::optional<at::Tensor>& lora_E) {
  check_dense(op, "lora_A", lora_A);
  check_dense(op, "lora_B", lora_B);
  if (has(lora_E)) check_dense(op, "lora_E", *lora_E);
}

c10::SymInt active_rank(const char* op, const at::Tensor& lora_A, const c10::SymInt& in_features,
                        const std::optional<c10::SymInt>& rank) {
  TORCH_CHECK(lora_A.dim() == 2, op, ": lora_A must be [rank, ", in_features, "], got ",
              lora_A.sym_sizes());
  return rank.value_or(lora_A.sym_size(0));
}

void check_dropout_p(const char* op, double dropout_p) {
  TORCH_CHECK(dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be in [0, 1], got ",
              dropout_p);
}

void check_factors(const char* op, const char* like_name, const at::Tensor& like,
                   const c10::SymInt& in_features, const c10::SymInt& out_features,
                   const AdapterOperands& adapter) {
  const auto& [lora_A, lora_B, lora_E, scaling, dropout_p, rank] = adapter;
  check_dense_factors(op, lora_A, lora_B, lora_E);
  const c10::SymInt capacity = active_rank(op, lora_A, in_features, {});
  check_shape(op, "lora_A", lora_A, capacity, "rank", in_features, nullptr);
  check_shape(op, "lora_B", lora_B, out_features, nullptr, capacity, nullptr);
  TORCH_CHECK(lora_A.device() == like.device(), op, ": lora_A must be on ", like.device(), " like ",
              like_name, ", got ", lora_A.device());
  const bool is_master = lora_A.scalar_type() == at::kFloat &&
                         (like.scalar_type() == at::kBFloat16 || like.scalar_type() == at::kHalf);
  TORCH_CHECK(is_master || lora_A.scalar_type() == like.scalar_type(), op, ": lora_A must be ",
              dtype_name(like.scalar_type()), " like ", like_name, ", or float32 over a 16-bit ",
              like_name, ", got ", dtype_name(lora_A.scalar_type()));
  check_like(op, "lora_B", lora_B, "lora_A", lora_A);
  if (has(lora_E)) {
    check_shape(op, "lora_E", *lora_E, capacity, nullptr, 1, nullptr);
    check_like(op, "lora_E", *lora_E, "lora_A", lora_A);
  }
  TORCH_CHECK(std::isfinite(scaling), op, ": scaling must be finite, got ", scaling);
  TORCH_SYM_CHECK(rank.sym_ge(0).sym_and(rank.sym_le(capacity)), op, ": rank must be in [0, ",
                  capacity, "], got ", rank);
}

void check_lora_linear(const char* op, const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, const AdapterOperands& adapter) {
  const bool coo = input.layout() == at::kSparse && input.dim() == 2 && adapter.dropout_p == 0;
  if (!coo) check_dense(op, "input", input);
  if (!is_compressed(weight.layout())) check_dense(op, "weight", weight);
  if (has(bias)) check_dense(op, "bias", *bias);
  TORCH_CHECK(is_supported(input.scalar_type()), op,
              ": input must be float64, float32, bfloat16 or float16, got ",
              dtype_name(input.scalar_type()));
  TORCH_CHECK(weight.dim() == 2, op, ": weight must be [out_features, in_features], got ",
              weight.sym_sizes());
  check_like(op, "weight", weight, "input", input);
  const c10::SymInt out_features = weight.sym_size(0);
  const c10::SymInt in_features = weight.sym_size(1);
  TORCH_CHECK(input.dim() >= 1, op, ": input must be [..., ", in_features, "], got a scalar");
  TORCH_SYM_CHECK(input.sym_size(-1).sym_eq(in_features), op, ": input must be [..., ", in_features,
                  "], got ", input.sym_sizes());
  if (has(bias)) {
    TORCH_CHECK(bias->dim() == 1, op, ": bias must be [", out_features, "], got ",
                bias->sym_sizes());
    TORCH_SYM_CHECK(bias->sym_size(0).sym_eq(out_features), op, ": bias must be [", out_features,
                    "], got ", bias->sym_sizes());
    check_like(op, "bias", *bias, "input", input);
  }
  check_factors(op, "weight", weight, in_features, out_features, adapter);
  check_dropout_p(op, adapter.dropout_p);
}

void check_lora_update(const char* op, const at::Tensor& base_output, const at::Tensor& input,
                       const AdapterOperands& adapter) {
  check_dense(op, "input", input);
  if (base_output.defined()) check_dense(op, "base_output", base_output);
  TORCH_CHECK(is_supported(input.scalar_type()), op,
              ": input must be float64, float32, bfloat16 or float16, got ",
              dtype_name(input.scalar_type()));
  TORCH_CHECK(input.dim() >= 1, op, ": input must be [..., in_features], got a scalar");
  TORCH_CHECK(adapter.lora_B.dim() == 2, op, ": lora_B must be [out_features, rank], got ",
              adapter.lora_B.sym_sizes());
  check_factors(op, "input", input, input.sym_size(-1), adapter.lora_B.sym_size(0), adapter);
  check_dropout_p(op, adapter.dropout_p);
  if (!base_output.defined()) return;
  auto wanted = input.sym_sizes().vec();
  wanted.back() = adapter.lora_B.sym_size(0);
  check_sizes(op, "base_output", base_output, wanted);
  check_like(op, "base_output", base_output, "input", input);
}

void check_table(const char* op, const at::Tensor& indices, const at::Tensor& weight) {
  TORCH_CHECK(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, op,
              ": indices must be int64 or int32, got ", indices.scalar_type());
  check_dense(op, "indices", indices);
  check_dense(op, "weight", weight);
  TORCH_CHECK(weight.dim() == 2, op, ": weight must be [num_embeddings, embedding_dim], got ",
              weight.sym_sizes());
  TORCH_CHECK(indices.device() == weight.device(), op, ": indices must be on ", weight.device(),
              " like weight, got ", indices.device());
}

void check_lora_embedding(const char* op, const at::Tensor& indices, const at::Tensor& weight,
                          const AdapterOperands& adapter) {
  check_table(op, indices, weight);
  check_factors(op, "weight", weight, weight.sym_size(0), weight.sym_size(1), adapter);
}

void check_embedding_backward(const char* op, const at::Tensor& grad_output,
                              const at::Tensor& indices, const at::Tensor& weight,
                              const AdapterOperands& adapter, const at::Tensor& hidden) {
  auto wanted = indices.sym_sizes().vec();
  wanted.push_back(weight.sym_size(1));
  check_sizes(op, "grad_output", grad_output, wanted);
  check_like(op, "grad_output", grad_output, "weight", weight);
  check_shape(op, "hidden", hidden, indices.sym_numel(), nullptr, adapter.rank, nullptr);
  check_like(op, "hidden", hidden, "lora_A", adapter.lora_A);
}

void check_seed(const char* op, const at::Tensor& seed, double dropout_p) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.dim() == 1, op,
              ": seed must be int64 [1], got ", dtype_name(seed.scalar_type()), " ",
              seed.sym_sizes());
  if (!Dropout(dropout_p).active()) return;
  TORCH_SYM_CHECK(seed.sym_size(0).sym_eq(1), op, ": seed must be int64 [1], got int64 ",
                  seed.sym_sizes());
}

void check_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                    const AdapterOperands& adapter, const at::Tensor& hidden,
                    const at::Tensor& seed) {
  check_dense(op, "input", input);  // the forward takes sparse ones
  auto wanted = input.sym_sizes().vec();
  wanted.back() = adapter.lora_B.sym_size(0);
  check_sizes(op, "grad_output", grad_output, wanted);
  check_like(op, "grad_output", grad_output, "input", input);
  check_shape(op, "hidden", hidden, sym_token_count(input), nullptr, adapter.rank, nullptr);
  check_like(op, "hidden", hidden, "lora_A", adapter.lora_A);
  check_seed(op, seed, adapter.dropout_p);
  TORCH_CHECK(seed.device() == input.device(), op, ": seed must be on ", input.device(),
              " like input, got ", seed.device());
}

c10::SymInt sym_token_count(const at::Tensor& tensor) {
  c10::SymInt count = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) count *= tensor.sym_size(i);
  return count;
}

}  // namespace rankwise
