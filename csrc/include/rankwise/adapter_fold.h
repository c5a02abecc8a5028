// Any adapter as one that every program reads alike: LoRA of one rank with scale 1.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/adapter_file.h>

#include <string>
#include <vector>

namespace rankwise {

/// What an adapter adds to the weight of one module: scaling * lora_B diag(lora_E) lora_A.
struct AdapterUpdate {
  std::string module;  ///< path inside the base model
  at::Tensor lora_A;   ///< [rank, in]; of an embedding [rank, num_embeddings]
  at::Tensor lora_B;   ///< [out, rank]; of an embedding [embedding_dim, rank]
  at::Tensor lora_E;   ///< [rank, 1], or undefined: ones
  double scaling = 1;
  bool embedding = false;  ///< the module is an embedding
};

/// The updates of an adapter folder's modules, sorted by module; the tensors are shared. Throws
/// io::FileError when the tensors are not those that the configuration describes.
std::vector<AdapterUpdate> updates_of(const AdapterFile& adapter);

/// An adapter of these updates that every reader of LoRA folders understands alike (PEFT, vLLM,
/// llama.cpp): one rank for all modules, the largest, reached with zeros; lora_alpha = r, so that
/// the scale is 1; no patterns, no rsLoRA.
///
/// lora_B becomes scaling * lora_B diag(lora_E), computed in float64 and rounded once to its type
/// (a wider one of lora_E's); lora_A keeps its values. Modules of rank 0 are left out, and
/// target_modules names the others. All else is taken from `config`. The tensors are on the CPU.
/// Throws std::invalid_argument when shapes do not fit, a module is given twice, every rank is 0,
/// or a value would not be finite.
AdapterFile fold_adapter(const std::vector<AdapterUpdate>& updates, AdapterConfig config = {});

/// The same function as `adapter`, as above; tensors that are not factors are kept. Throws as both.
AdapterFile fold_adapter(const AdapterFile& adapter);

}  // namespace rankwise
