// The adapters of a tree of torch::nn modules: collected for allocators, switched, saved, loaded.
#pragma once

#include <rankwise/adapted.h>
#include <rankwise/adapter.h>
#include <rankwise/adapter_file.h>
#include <rankwise/budget_schedule.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rankwise {

/// (dotted path, layer) of the adapted layers in a tree, each once, in the order of registration;
/// the path of `model` itself is empty.
std::vector<std::pair<std::string, std::shared_ptr<nn::Adapted>>> adapted_layers(
    torch::nn::Module& model);

/// The active adapters of these layers as an allocator sees them: the factors are the layers' own,
/// and set_rank changes the adapter's rank as long as it lives, also while it is not active. LoRA
/// layers have no lora_E.
std::vector<Adapter> adapters_of(torch::nn::Module& model);

/// Freezes all parameters but the active adapters' factors, which it makes trainable.
void freeze_base(torch::nn::Module& model);

/// The names of all adapters in a tree, in the order in which its layers have them.
std::vector<std::string> adapter_names(torch::nn::Module& model);

/// Adds a new adapter, not active, to every adapted layer of a tree. Throws std::invalid_argument,
/// and changes nothing, when there is no such layer, a layer has an adapter of this name, or the
/// name or an option is wrong.
void add_adapter(torch::nn::Module& model, const std::string& name,
                 const nn::AdapterOptions& options);

/// Switches a tree to another adapter, or with none to the base alone; layers that lack the adapter
/// compute their base. Nothing is copied and the base is not written. Throws std::invalid_argument
/// when no layer has the adapter, and c10::Error when a layer is merged; nothing is then changed.
void activate_adapter(torch::nn::Module& model, const std::optional<std::string>& name);

/// Forgets an adapter; where it was active, layers compute their base. Throws as activate_adapter.
void delete_adapter(torch::nn::Module& model, const std::string& name);

/// Writes the tree's active adapters, or those called `name`, as PEFT's LoRA or AdaLoRA folder;
/// stock PEFT loads it into a Python model whose modules have the same paths. The model is not
/// changed.
///
/// Active directions alone are written. LoRA layers of rank 0 are left out, for PEFT knows none and
/// they compute their base. AdaLoRA's schedule is written where all layers know the same one, from
/// their RankAllocator or a folder; else the file has a placeholder (see AdapterConfig). Throws
/// std::invalid_argument when the tree has no adapters, or PEFT's format cannot hold them: it has
/// one method and one rslora; one for AdaLoRA one initial rank and alpha and no rslora. Throws
/// io::FileError when the folder cannot be written; the old adapter is then left. `beside`: see
/// AdapterFile.
void save_adapter(torch::nn::Module& model, const std::filesystem::path& directory,
                  const std::optional<std::string>& name = {},
                  const std::map<std::string, std::string>& beside = {});

/// Reads a PEFT folder into the adapters called `name` of a tree, and activates them.
///
/// Where no layer has that adapter, those in the file get one with the file's settings and ranks.
/// Else the layers that have it must fit: with the file's scalings and capacity for its ranks;
/// their ranks become the file's, and its schedule theirs where they know none. Factors are written
/// in place; the file's dtypes are widened to the layers', never rounded. Strict: every tensor must
/// have its place and the reverse; only an adapter of rank 0 may be missing, and weights of the
/// base may be there that are the tree's own (PEFT stores those of embeddings). Throws
/// io::FileError that lists all that does not fit, std::invalid_argument for a wrong name, and
/// c10::Error when a layer is merged; the model is then unchanged.
void load_adapter(torch::nn::Module& model, const std::filesystem::path& directory,
                  const std::string& name = "default");

/// The schedule of the active AdaLoRA adapters, or of those called `name`, and the largest initial
/// rank, for a RankAllocator that goes on. Throws std::invalid_argument when the tree has no such
/// adapters, their layers know none in common, or it is wrong (a folder's may be: see
/// AdaLoRAOptions::check).
AdaLoRAOptions adalora_options(torch::nn::Module& model,
                               const std::optional<std::string>& name = {});

/// Writes any adapters as a plain LoRA folder that PEFT, vLLM and llama.cpp read alike: see
/// fold_adapter (adapter_fold.h). The model is not changed. Throws std::invalid_argument when there
/// is no adapter, every rank is 0 or a value would not be finite, and io::FileError.
void export_lora(torch::nn::Module& model, const std::filesystem::path& directory,
                 const std::optional<std::string>& name = {},
                 const std::map<std::string, std::string>& beside = {});

}  // namespace rankwise
