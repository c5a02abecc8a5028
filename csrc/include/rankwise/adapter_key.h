// AdapterKey: the meaning of a tensor name in a PEFT adapter file. No tensors here, and no torch.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace rankwise {

/// `base_model.model.<module>.lora_A.weight` and its relatives, taken apart.
struct AdapterKey {
  enum class Part {
    lora_A,       ///< `<module>.lora_A.weight`, [rank, in]
    lora_B,       ///< `<module>.lora_B.weight`, [out, rank]
    embedding_A,  ///< `<module>.lora_embedding_A`, [rank, num_embeddings]
    embedding_B,  ///< `<module>.lora_embedding_B`, [embedding_dim, rank]
    triplet_A,    ///< AdaLoRA: `<module>.lora_A`, [rank, in]
    triplet_B,    ///< AdaLoRA: `<module>.lora_B`, [out, rank]
    triplet_E,    ///< AdaLoRA: `<module>.lora_E`, [rank, 1]
    saved,  ///< `<module>.<parameter>`: a whole weight kept beside the adapter (modules_to_save)
  };

  std::string module;  ///< path inside the base model, e.g. `encoder.layer.0.query`
  Part part = Part::lora_A;
  std::string parameter;  ///< only for `saved`: `weight`, `bias`, ...

  bool operator==(const AdapterKey&) const = default;
};

/// Takes a tensor name apart; nullopt when it is not one this library understands (no
/// `base_model.model.` prefix, or a `lora_...` component of another method, e.g. DoRA's
/// `lora_magnitude_vector`).
std::optional<AdapterKey> parse_adapter_key(std::string_view name);

/// The tensor name of a key: the inverse of parse_adapter_key.
std::string to_string(const AdapterKey& key);

}  // namespace rankwise
