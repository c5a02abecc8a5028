// save_checkpoint and load_checkpoint: a whole training in one folder, to go on bit for bit.
#pragma once

#include <rankwise/allocator.h>
#include <rankwise/file_error.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <cstdint>
#include <filesystem>

namespace rankwise {

/// Writes a training as it stands: the adapter's folder, and beside it what it goes on from.
///
/// The folder is save_adapter's, or export_lora's where PEFT's AdaLoRA cannot hold the adapter.
/// `training.safetensors` and `training.json` beside it have all that trains, directions that are
/// not in use and adapters that wait too, the model's buffers, the optimizer's options and state,
/// the allocator's state, the step, and the states of torch's default generators (CPU, and CUDA
/// where the model is there). Atomic as a set: a process killed at any moment leaves the folder's
/// old checkpoint or the new one. Nothing is pickled. Python's load_checkpoint refuses it; PEFT and
/// load_adapter read its adapter.
///
/// `optimizer`: AdamW, Adam, SGD, RMSprop or Adagrad of torch::optim, or WithCallbacks of one.
/// `allocator`: that runs after the optimizer's steps, if one does. `step`: for the program, which
/// gets it back. torch::optim's schedulers tell no state: their rates are in the options, where
/// they stand follows from the step. Throws std::invalid_argument for another optimizer or a model
/// whose adapter cannot be saved (see export_lora), c10::Error when a layer is merged, and
/// io::FileError when a tensor is not in memory or the folder cannot be written.
void save_checkpoint(const std::filesystem::path& directory, torch::nn::Module& model,
                     const torch::optim::Optimizer& optimizer, const Allocator* allocator = nullptr,
                     int64_t step = 0);

/// Takes a training back to where save_checkpoint was called, and returns the step.
///
/// Make model, optimizer and allocator as they were made for the training, in this process or
/// another; ranks that have moved since come from the checkpoint. All is read and checked before
/// anything changes. Throws io::FileError when the folder is no checkpoint of C++, is damaged, or
/// does not fit: every part and tensor that is missing, extra or other is listed. Throws as
/// Allocator::load_state, std::invalid_argument for another optimizer, and c10::Error when a layer
/// is merged.
int64_t load_checkpoint(const std::filesystem::path& directory, torch::nn::Module& model,
                        torch::optim::Optimizer& optimizer, Allocator* allocator = nullptr);

}  // namespace rankwise
