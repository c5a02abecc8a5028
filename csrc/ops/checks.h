// Argument checks of the ops, shared by every backend: Python, C++ and torch.compile enter by
// different doors, and each implementation calls these first.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

#include "dispatch.h"

namespace rankwise {

// Throws for sparse and nested tensors.
void check_dense(const char* op, const char* name, const at::Tensor& tensor);
void check_dense_factors(const char* op, const at::Tensor& lora_A, const at::Tensor& lora_B,
                         const std::optional<at::Tensor>& lora_E);

// Throws unless layouts, shapes, devices and dtypes fit (the contract stands in ops.h). Safe for
// symbolic sizes. `op` begins each message. Not dense may be: input, a COO matrix without dropout
// and gradients, and weight, in a compressed sparse layout.
void check_lora_linear(const char* op, const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, const AdapterOperands& adapter);

// Indices and table alone, and all that lora_embedding's forward takes.
void check_table(const char* op, const at::Tensor& indices, const at::Tensor& weight);
void check_lora_embedding(const char* op, const at::Tensor& indices, const at::Tensor& weight,
                          const AdapterOperands& adapter);

// lora_update's, in forward and backward: a base_output that is undefined is not looked at.
void check_lora_update(const char* op, const at::Tensor& base_output, const at::Tensor& input,
                       const AdapterOperands& adapter);

// The factors alone, against a base of [out, in] with the device and dtype of `like`.
void check_factors(const char* op, const char* like_name, const at::Tensor& like,
                   const c10::SymInt& in_features, const c10::SymInt& out_features,
                   const AdapterOperands& adapter);

// What backward gets besides the forward's arguments: grad_output like the output, `hidden` and
// `seed` as the forward returned them.
void check_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                    const AdapterOperands& adapter, const at::Tensor& hidden,
                    const at::Tensor& seed);

void check_embedding_backward(const char* op, const at::Tensor& grad_output,
                              const at::Tensor& indices, const at::Tensor& weight,
                              const AdapterOperands& adapter, const at::Tensor& hidden);

// int64 [1] on the op's device; [0] will do where nothing is dropped.
void check_seed(const char* op, const at::Tensor& seed, double dropout_p);

// `rank`, or all of lora_A's directions when it is not given.
c10::SymInt active_rank(const char* op, const at::Tensor& lora_A, const c10::SymInt& in_features,
                        const std::optional<c10::SymInt>& rank);

void check_dropout_p(const char* op, double dropout_p);

// The product of all sizes but the last: 1 for a vector.
c10::SymInt sym_token_count(const at::Tensor& tensor);
inline int64_t token_count(const at::Tensor& tensor) {
  return sym_token_count(tensor).guard_int(__FILE__, __LINE__);
}

// The dispatcher hands a default-constructed optional or an undefined tensor for None.
inline bool has(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

}  // namespace rankwise
