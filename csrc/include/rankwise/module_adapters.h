// The adapters of a tree of torch::nn modules: collected for allocators, saved and loaded.
#pragma once

#include <rankwise/adapted.h>
#include <rankwise/adapter.h>
#include <rankwise/adapter_file.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace rankwise {

/// (dotted path, layer) of the adapted layers in a tree, each once, in the order of registration;
/// the path of `model` itself is empty.
std::vector<std::pair<std::string, std::shared_ptr<nn::Adapted>>> adapted_layers(
    torch::nn::Module& model);

/// The same layers as an allocator sees them: the factors are the layers' own, and set_rank changes
/// the layer's rank as long as it lives. LoRA layers have no lora_E.
std::vector<Adapter> adapters_of(torch::nn::Module& model);

/// Freezes all parameters but the adapters' factors, which it makes trainable.
void freeze_base(torch::nn::Module& model);

/// Writes the tree's adapters as PEFT's LoRA or AdaLoRA folder; stock PEFT loads it into a Python
/// model whose modules have the same paths. The model is not changed.
///
/// Active directions alone are written. LoRA layers of rank 0 are left out, for PEFT knows none and
/// they compute their base. AdaLoRA's training settings (target rank, steps) are placeholders.
/// Throws std::invalid_argument when the tree has no adapters, or PEFT's format cannot hold them:
/// it has one method and one rslora; one for AdaLoRA one initial rank and alpha and no rslora.
/// Throws io::FileError when the folder cannot be written; the old adapter is then left.
void save_adapter(torch::nn::Module& model, const std::filesystem::path& directory);

/// Reads a PEFT folder into the adapters of a tree.
///
/// The layers must be there, with the file's scalings and capacity for its ranks; their ranks
/// become the file's. Factors are written in place; the file's dtypes are widened to the layers',
/// never rounded. Strict: every tensor must have its place and the reverse; only a layer of rank 0
/// may be missing. Throws io::FileError that lists all that does not fit, and c10::Error when a
/// layer is merged; the model is then unchanged.
void load_adapter(torch::nn::Module& model, const std::filesystem::path& directory);

/// Writes any adapters as a plain LoRA folder that PEFT, vLLM and llama.cpp read alike: see
/// fold_adapter (adapter_fold.h). The model is not changed. Throws std::invalid_argument when every
/// rank is 0 or a value would not be finite, and io::FileError.
void export_lora(torch::nn::Module& model, const std::filesystem::path& directory);

}  // namespace rankwise
