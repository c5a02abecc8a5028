// Adapted: what all adapted layers share, whatever their base: factors, rank, merge and unmerge.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/nn_options.h>

#include <iosfwd>
#include <optional>

namespace rankwise::nn {

/// One merge: how far rounding moved the weight, and how much of it changed at all.
struct MergeReport {
  double max_rounding_error = 0;  ///< largest |rounded - exact| over the weight's elements
  int64_t changed = 0;            ///< elements that differ from the base
  int64_t total = 0;
};

/// A frozen base weight with a low-rank update. Mixed into the layers of rankwise/nn.h, whose
/// registered parameters these tensors are.
///
/// Forward passes may run in several threads at a time, as long as none trains, merges or changes
/// the rank.
/// The base is never written: merging puts a new tensor in the place of `weight` and keeps the old
/// one, so that unmerging restores every bit and tied weights are not touched.
class Adapted {
 public:
  virtual ~Adapted() = default;

  at::Tensor weight;  ///< the base's, frozen; while merged, a tensor of its own with the update
  at::Tensor lora_A;  ///< [capacity, in]
  at::Tensor lora_B;  ///< [out, capacity]
  at::Tensor lora_E;  ///< [capacity, 1] in AdaLoRA, else undefined

  const AdapterSettings& settings() const { return settings_; }
  /// Leading directions in use, 0 .. capacity; the others are zero and get zero gradients.
  int64_t rank() const { return rank_; }
  int64_t capacity() const { return lora_A.size(0); }
  /// The factor of the update; it counts the rank at creation, also after pruning.
  double scaling() const { return settings_.scaling(); }

  /// Changes rank() alone: whoever calls it (an allocator) has put the directions in place. Throws
  /// c10::Error unless 0 <= rank <= capacity.
  void set_rank(int64_t rank);

  bool merged() const { return base_.defined(); }

  /// Puts round(W0 + scaling * B diag(E) A), summed in float64 and rounded once, in the place of
  /// `weight`; nullopt, with a warning, when merged already. Throws c10::Error, and changes
  /// nothing, when the sum is not finite.
  std::optional<MergeReport> merge();

  /// Puts the base tensor back, bit for bit; when not merged, only warns.
  void unmerge();

  /// Whether the base is an embedding, with weight [num_embeddings = in, embedding_dim = out].
  virtual bool embedding() const = 0;

 protected:
  /// Freezes the base and adds zero factors on its device. Throws std::invalid_argument for wrong
  /// settings.
  void adapt(AdapterSettings settings);

  /// Gives the factors their first distributions anew, from torch's default generator.
  void reset_adapter();

  /// Throws c10::Error when the layer is merged and `training` would need it not to be.
  void check_trainable(bool training) const;

  /// Throws c10::Error when merged.
  void check_unmerged(const char* operation) const;

  /// The update as options to a layer's printed form: `rank=6, alpha=12, dropout=0.1`.
  void print_adapter(std::ostream& stream) const;

  virtual void initialise(const at::Tensor& A, const at::Tensor& B) const;
  virtual void replace_weight(const at::Tensor& weight) = 0;

  at::Tensor base_;  ///< while merged, what `weight` was

 private:
  at::Tensor matrix(const at::Tensor& weight) const { return embedding() ? weight.t() : weight; }

  AdapterSettings settings_;
  int64_t rank_ = 0;
};

}  // namespace rankwise::nn
