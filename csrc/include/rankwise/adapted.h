// Adapted: what all adapted layers share, whatever their base: named adapters, merge and unmerge.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/nn_options.h>
#include <rankwise/stored_adapter.h>

#include <iosfwd>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace rankwise::nn {

/// One merge: how far rounding moved the weight, and how much of it changed at all.
struct MergeReport {
  double max_rounding_error = 0;  ///< largest |rounded - exact| over the weight's elements
  int64_t changed = 0;            ///< elements that differ from the base
  int64_t total = 0;
};

/// A frozen base weight with low-rank updates. Mixed into the layers of rankwise/nn.h, whose
/// registered parameters these tensors are.
///
/// At most one adapter is active; its factors are the layer's own. The others wait, frozen, as
/// child modules `adapter_<name>`. A layer starts with one, "default", active.
///
/// Forward passes may run in several threads at a time, as long as none trains, merges or changes
/// the rank.
///
/// The base is never written: merging puts a new tensor in the place of `weight` and keeps the old
/// one, so that unmerging restores every bit and tied weights are not touched.
class Adapted {
 public:
  virtual ~Adapted() = default;

  at::Tensor weight;  ///< the base's, frozen; while merged, a tensor of its own with the update
  // The active adapter's; all undefined when none is.
  at::Tensor lora_A;  ///< [capacity, in]
  at::Tensor lora_B;  ///< [out, capacity]
  at::Tensor lora_E;  ///< [capacity, 1] in AdaLoRA, else undefined

  /// Of the active adapter; the defaults when none is.
  const AdapterSettings& settings() const { return settings_; }
  /// Leading directions in use, 0 .. capacity; the others are zero and get zero gradients.
  int64_t rank() const { return rank_; }
  int64_t capacity() const { return adapter_ ? lora_A.size(0) : 0; }
  /// The factor of the update; it counts the rank at creation, also after pruning.
  double scaling() const { return adapter_ ? settings_.scaling() : 0; }

  /// Changes rank() alone: whoever calls it (an allocator) has put the directions in place. Throws
  /// c10::Error unless 0 <= rank <= capacity.
  void set_rank(int64_t rank);
  /// The same for the adapter that has this lora_A, active or not; nothing when it was deleted.
  void set_rank_of(const at::Tensor& lora_A, int64_t rank);
  /// The rank of the adapter that has this lora_A, active or not; -1 when it was deleted.
  int64_t rank_of(const at::Tensor& lora_A) const;

  /// Notes the active adapter's schedule, settings().allocation.
  void set_allocation(const std::optional<AllocationSettings>& allocation) {
    settings_.allocation = allocation;
  }

  /// The active adapter's name; none: the layer computes its base alone.
  const std::optional<std::string>& adapter() const { return adapter_; }
  /// All adapters, the active one first, the others by name.
  std::vector<std::string> adapter_names() const;
  bool has_adapter(const std::string& name) const;
  /// An adapter by name, active or not. Throws std::invalid_argument when there is none.
  HeldAdapter held_adapter(const std::string& name) const;

  /// An adapter for this layer, with first values from torch's default generator, not attached to
  /// it; lora_E is there in AdaLoRA layers. Throws std::invalid_argument for wrong settings.
  HeldAdapter new_adapter(AdapterSettings settings) const;
  /// Throws std::invalid_argument for a name that is empty, has a '.', or is taken.
  void check_new_name(const std::string& name) const;
  /// Attaches an adapter that new_adapter of this layer made, not active. Throws as check_new_name.
  void add_adapter(const std::string& name, HeldAdapter adapter);
  /// A new adapter, not active. Throws as both.
  void add_adapter(const std::string& name, const AdapterOptions& options);

  /// Makes `name` the active adapter; none, or a name not here, leaves the base alone. Factors keep
  /// their identity; the active ones require gradients, the others do not. Throws c10::Error while
  /// merged.
  void activate_adapter(const std::optional<std::string>& name);

  /// Forgets an adapter; when it was active, the layer computes its base alone. Throws
  /// std::invalid_argument when there is none, and c10::Error when it is merged.
  void delete_adapter(const std::string& name);

  bool merged() const { return base_.defined(); }

  /// Puts round(W0 + scaling * B diag(E) A), summed in float64 and rounded once, in the place of
  /// `weight`; nullopt, with a warning, when merged already. Throws c10::Error, and changes
  /// nothing, when no adapter is active or the sum is not finite.
  std::optional<MergeReport> merge();

  /// Puts the base tensor back, bit for bit; when not merged, only warns.
  void unmerge();

  /// Whether the base is an embedding, with weight [num_embeddings = in, embedding_dim = out].
  virtual bool embedding() const = 0;

 protected:
  /// Freezes the base and makes "default", its factors zero, the active adapter. `triplets`: of
  /// AdaLoRA, as all adapters added later. Throws std::invalid_argument for wrong settings.
  void adapt(AdapterSettings settings, bool triplets);

  /// Gives the active adapter's factors their first distributions anew, from torch's generator.
  void reset_adapter();

  /// Throws c10::Error when the layer is merged and `training` would need it not to be.
  void check_trainable(bool training) const;

  /// Throws c10::Error when merged.
  void check_unmerged(const char* operation) const;

  /// The update as options to a layer's printed form: `rank=6, alpha=12, dropout=0.1, adapter=...`.
  void print_adapter(std::ostream& stream) const;

  HeldAdapter active() const { return {lora_A, lora_B, lora_E, settings_, rank_, directions_}; }
  /// For a copy of a layer: directions of its own, which no allocator moves.
  void separate_directions();
  /// Notes in which order the active adapter's directions lie, and how many are in use.
  void set_directions(std::vector<int64_t> order, int64_t rank);

  /// First values of an adapter's active directions, which are zero.
  virtual void initialise(const at::Tensor& A, const at::Tensor& B,
                          const AdapterSettings& settings) const;
  /// Registers the tensors as they are now, in the place of those registered.
  virtual void replace_tensors() = 0;
  virtual void add_child(const std::string& name, const StoredAdapter& adapter) = 0;
  virtual void remove_child(const std::string& name) = 0;

  at::Tensor base_;  ///< while merged, what `weight` was
  std::map<std::string, StoredAdapter> waiting_;

 private:
  at::Tensor matrix(const at::Tensor& weight) const { return embedding() ? weight.t() : weight; }
  HeldAdapter zero_adapter(AdapterSettings settings) const;
  void draw(const HeldAdapter& adapter) const;
  void set_active(const std::optional<std::string>& name, const HeldAdapter& adapter);

  std::optional<std::string> adapter_;
  AdapterSettings settings_;
  int64_t rank_ = 0;
  std::shared_ptr<Directions> directions_;
  bool triplets_ = false;
};

}  // namespace rankwise::nn
