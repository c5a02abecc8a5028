// Every operator schema of the project. What each op computes: ops.h (public) and dispatch.h
// (inner).
#include <torch/library.h>

TORCH_LIBRARY(rankwise, m) {
  const std::vector<at::Tag> pure = {at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> random = {at::Tag::pt2_compliant_tag,
                                       at::Tag::nondeterministic_seeded};

  m.def(
      "lora_linear(Tensor input, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "Tensor? lora_E=None, *, float scaling, float dropout_p=0.0, SymInt? rank=None) -> Tensor",
      random);
  m.def(
      "_lora_linear_forward(Tensor input, Tensor weight, Tensor? bias, Tensor lora_A, "
      "Tensor lora_B, Tensor? lora_E, float scaling, float dropout_p, SymInt rank) "
      "-> (Tensor output, Tensor hidden, Tensor seed)",
      random);
  m.def(
      "_lora_linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor lora_A, "
      "Tensor lora_B, Tensor? lora_E, Tensor hidden, Tensor seed, float scaling, "
      "float dropout_p, SymInt rank, bool[6] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      pure);
  m.def(
      "lora_update(Tensor base_output, Tensor input, Tensor lora_A, Tensor lora_B, "
      "Tensor? lora_E=None, *, float scaling, float dropout_p=0.0, SymInt? rank=None) -> Tensor",
      random);
  m.def(
      "_lora_update_forward(Tensor base_output, Tensor input, Tensor lora_A, Tensor lora_B, "
      "Tensor? lora_E, float scaling, float dropout_p, SymInt rank) "
      "-> (Tensor output, Tensor hidden, Tensor seed)",
      random);
  m.def(
      "_lora_update_backward(Tensor grad_output, Tensor input, Tensor lora_A, Tensor lora_B, "
      "Tensor? lora_E, Tensor hidden, Tensor seed, float scaling, float dropout_p, SymInt rank, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      pure);
  m.def(
      "lora_linear_group(Tensor input, Tensor[] weights, Tensor?[] biases, Tensor[] lora_A, "
      "Tensor[] lora_B, Tensor?[] lora_E, *, float[] scaling, float dropout_p=0.0, "
      "SymInt[]? ranks=None) -> Tensor[]",
      random);
  m.def(
      "_lora_linear_group_forward(Tensor input, Tensor[] weights, Tensor?[] biases, "
      "Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_E, float[] scaling, float dropout_p, "
      "SymInt[] ranks) -> Tensor[]",
      random);
  m.def(
      "_lora_linear_group_backward(Tensor[] grad_outputs, Tensor input, Tensor[] weights, "
      "Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_E, Tensor hidden, Tensor seed, "
      "float[] scaling, float dropout_p, SymInt[] ranks, bool[6] output_mask) -> Tensor[]",
      pure);
  m.def(
      "_dropout_mask(Tensor seed, SymInt rows, SymInt cols, float dropout_p, *, "
      "ScalarType dtype) -> Tensor",
      pure);
  m.def(
      "lora_embedding(Tensor indices, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "Tensor? lora_E=None, *, float scaling, int padding_idx=-1, SymInt? rank=None) -> Tensor",
      pure);
  m.def(
      "_lora_embedding_forward(Tensor indices, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "Tensor? lora_E, float scaling, int padding_idx, SymInt rank) "
      "-> (Tensor output, Tensor hidden)",
      pure);
  m.def(
      "_lora_embedding_backward(Tensor grad_output, Tensor indices, Tensor weight, Tensor lora_A, "
      "Tensor lora_B, Tensor? lora_E, Tensor hidden, float scaling, int padding_idx, SymInt rank, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      pure);
  m.def(
      "merged_weight(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? lora_E=None, *, "
      "float scaling, SymInt? rank=None) "
      "-> (Tensor merged, Tensor max_rounding_error, Tensor changed)",
      pure);
  // AdaLoRA's passes over all adapters at once (importance.h).
  m.def("_importance_check(Tensor[] gradients) -> Tensor", pure);
  m.def(
      "_importance_step_(Tensor[] parameters, Tensor?[] gradients, Tensor(a!)[] sensitivity, "
      "Tensor(b!)[] uncertainty, int[] ranks, float beta1, float beta2, bool score, "
      "Tensor? progress=None) -> Tensor",
      pure);
  m.def(
      "_schedule_step(Tensor progress, Tensor? found, Tensor? found_inf, Tensor budgets, "
      "int freeze_step) -> Tensor",
      pure);
  m.def(
      "_select_triplets_(Tensor(a!) kept, Tensor scores, int[] ranks, int[] costs, int min_rank, "
      "Tensor progress) -> ()",
      pure);
  m.def("_mask_triplets_(Tensor(a!)[] lora_E, int[] ranks, Tensor kept, Tensor progress) -> ()",
        pure);
  m.def(
      "_record_choice_(Tensor(a!) choices, Tensor(b!) summaries, Tensor(c!) progress, "
      "Tensor scores, Tensor kept, int[] ranks, int freeze_step) -> ()",
      pure);
  m.def(
      "orthogonality_penalty(Tensor[] lora_A, Tensor[] lora_B, int[] ranks, bool squared) "
      "-> Tensor",
      pure);
  m.def(
      "_orthogonality_backward(Tensor grad_output, Tensor[] lora_A, Tensor[] lora_B, int[] ranks, "
      "bool squared) -> Tensor[]",
      pure);
  // The name of the implementation that serves a tensor's device, for summary() and doctor; with
  // (tokens, n_in, n_out, rank) that of a layer's forward.
  m.def("_lora_linear_path(Tensor tensor, int[] layer=[]) -> str", pure);
}
