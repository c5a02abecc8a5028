// Adapters of a tree of modules in PEFT's folders: save, load, export.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include "../io/temporary_folder.h"

namespace {

using rankwise::io::FileError;
using rankwise::nn::AdaLoRALinear;
using rankwise::nn::LoRAEmbedding;
using rankwise::nn::LoRAEmbeddingOptions;
using rankwise::nn::LoRALinear;
using rankwise::nn::LoRALinearOptions;
using testing::HasSubstr;

const std::string start = "base_model.model.";

/// Layers whose paths are endings of each other, which patterns must tell apart.
template <class Linear>
struct NetImpl : torch::nn::Module {
  explicit NetImpl(const LoRALinearOptions& inner, const LoRALinearOptions& outer)
      : block(torch::nn::ModuleDict(
            std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>>{
                {"fc", std::make_shared<typename Linear::Impl>(inner)}})),
        fc(outer) {
    register_module("fc", fc);
    register_module("block", block);
  }
  typename Linear::Impl& inner() { return *block["fc"]->as<typename Linear::Impl>(); }
  at::Tensor forward(const at::Tensor& x) { return fc(inner().forward(x).tanh()); }

  torch::nn::ModuleDict block;
  Linear fc;
};

template <class Linear>
std::shared_ptr<NetImpl<Linear>> net_of(const LoRALinearOptions& inner,
                                        const LoRALinearOptions& outer, bool fill = true) {
  torch::manual_seed(5);  // the same base each time
  auto net = std::make_shared<NetImpl<Linear>>(inner, outer);
  net->to(torch::kDouble);
  const torch::NoGradGuard no_grad;
  for (const auto& item : net->named_parameters())
    if (fill && item.key().find("lora_") != std::string::npos) item.value().normal_(0, 0.3);
  net->eval();
  return net;
}

const auto x = [] { return torch::ones({2, 6}, torch::kDouble); };
const LoRALinearOptions small = LoRALinearOptions(6, 5).rank(2).alpha(3);
const LoRALinearOptions large = LoRALinearOptions(5, 4).rank(4).alpha(7);

/// The state as bytes that can be compared.
std::vector<at::Tensor> copy_of(torch::nn::Module& net) {
  std::vector<at::Tensor> values;
  for (const at::Tensor& parameter : net.parameters()) values.push_back(parameter.clone());
  return values;
}

TEST(AdapterFolder, LoRAWithDifferentRanksComesBack) {
  for (const bool rslora : {false, true}) {
    const auto inner = LoRALinearOptions(small).rslora(rslora);
    const auto outer = LoRALinearOptions(large).rslora(rslora);
    const TemporaryFolder folder;
    const auto saved = net_of<LoRALinear>(inner, outer);
    rankwise::save_adapter(*saved, folder.path());
    const auto loaded = net_of<LoRALinear>(inner, outer, false);
    EXPECT_FALSE(loaded->forward(x()).equal(saved->forward(x())));
    rankwise::load_adapter(*loaded, folder.path());
    EXPECT_TRUE(loaded->forward(x()).equal(saved->forward(x())));
    EXPECT_TRUE(loaded->fc->lora_A.requires_grad());
    const auto config = rankwise::read_adapter(folder.path()).config;
    EXPECT_EQ(config.scaling("fc"), saved->fc->scaling());
    EXPECT_EQ(config.scaling("block.fc"), saved->inner().scaling());
    EXPECT_EQ(config.rank_of("block.fc"), 2);
  }
}

TEST(AdapterFolder, PrunedAdaLoRAComesBackWithItsRanks) {
  const auto inner = LoRALinearOptions(small).rank(4).alpha(6);
  const auto outer = LoRALinearOptions(large).alpha(6);
  const TemporaryFolder folder;
  const auto saved = net_of<AdaLoRALinear>(inner, outer);
  saved->inner().set_rank(0);
  saved->fc->set_rank(3);
  rankwise::save_adapter(*saved, folder.path());
  EXPECT_EQ(rankwise::read_adapter(folder.path()).config.peft_type, "ADALORA");
  const auto loaded = net_of<AdaLoRALinear>(inner, outer);
  rankwise::load_adapter(*loaded, folder.path());
  EXPECT_EQ(loaded->inner().rank(), 0);
  EXPECT_EQ(loaded->fc->rank(), 3);
  EXPECT_EQ(loaded->fc->lora_B.narrow(1, 3, 1).abs().sum().item<double>(), 0);
  EXPECT_TRUE(loaded->forward(x()).equal(saved->forward(x())));
}

TEST(AdapterFolder, EmbeddingsAndLayersOfRankZero) {
  const auto make = [] {
    torch::manual_seed(1);
    return torch::nn::Sequential(LoRAEmbedding(LoRAEmbeddingOptions(9, 4).rank(2).alpha(2)),
                                 LoRALinear(LoRALinearOptions(4, 3).rank(0)));
  };
  torch::nn::Sequential saved = make(), loaded = make();
  {
    const torch::NoGradGuard no_grad;
    saved->at<rankwise::nn::LoRAEmbeddingImpl>(0).lora_A.normal_();
  }
  const TemporaryFolder folder;
  rankwise::save_adapter(*saved, folder.path());
  rankwise::load_adapter(*loaded, folder.path());
  const auto i = torch::arange(9);
  EXPECT_TRUE(loaded->forward(i).equal(saved->forward(i)));
}

TEST(AdapterFolder, EveryProblemIsListedAndNothingChanged) {
  const TemporaryFolder folder;
  rankwise::save_adapter(*net_of<LoRALinear>(small, large), folder.path());
  auto file = rankwise::read_adapter(folder.path());
  file.tensors[start + "gone.lora_A.weight"] = torch::ones({4, 3});
  file.tensors[start + "gone.lora_B.weight"] = torch::ones({3, 4});
  file.config.rank_pattern.push_back({"gone", 4});
  file.config.target_modules.push_back("gone");
  rankwise::write_adapter(folder.path(), file);

  const auto net = net_of<LoRALinear>(LoRALinearOptions(small).rank(1).alpha(1.5),
                                      LoRALinearOptions(7, 4).rank(4).alpha(8));
  net->to(torch::kFloat);
  const auto before = copy_of(*net);
  const std::string text =
      message_of<FileError>([&] { rankwise::load_adapter(*net, folder.path()); });
  EXPECT_THAT(text,
              HasSubstr("load_adapter: " + folder.path().string() + " does not fit the model:\n"));
  for (const char* line :
       {"\n  block.fc: rank must be at most the layer's capacity 1, got 2",
        "\n  fc: scaling must be 2, got 1.75",
        "\n  base_model.model.fc.lora_A.weight: must be [4, 7], got [4, 5]",
        "\n  base_model.model.fc.lora_B.weight: Double would be rounded to the layer's Float",
        "\n  base_model.model.gone.lora_A.weight: the model's layers have no place for it"})
    EXPECT_THAT(text, HasSubstr(line));
  const auto after = copy_of(*net);
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(before[i].equal(after[i])) << i;
  EXPECT_EQ(net->inner().rank(), 1);

  const auto other = net_of<AdaLoRALinear>(small, large);
  EXPECT_THAT(message_of<FileError>([&] { rankwise::load_adapter(*other, folder.path()); }),
              HasSubstr("\n  base_model.model.fc.lora_E: missing in the file"));
}

TEST(AdapterFolder, StoredBaseWeightsMustBeTheModelsOwn) {
  const TemporaryFolder folder;
  const auto saved = net_of<LoRALinear>(small, large);
  rankwise::save_adapter(*saved, folder.path());
  auto file = rankwise::read_adapter(folder.path());
  const auto load = [&](const std::string& key, const at::Tensor& tensor) {
    rankwise::AdapterFile changed = file;
    changed.tensors[start + key] = tensor;
    rankwise::write_adapter(folder.path(), changed);
    const auto loaded = net_of<LoRALinear>(small, large, false);
    rankwise::load_adapter(*loaded, folder.path());
    EXPECT_TRUE(loaded->forward(x()).equal(saved->forward(x())));
  };
  const at::Tensor own = saved->fc->weight.detach().clone();
  for (const char* key : {"fc.base_layer.weight", "fc.weight"}) {
    load(key, own);
    EXPECT_THAT(message_of<FileError>([&] { load(key, own + 1); }),
                HasSubstr(std::string(key) + ": differs from the model's own"));
    EXPECT_THAT(message_of<FileError>([&] { load(key, own.narrow(0, 0, 2)); }),
                HasSubstr(std::string(key) + ": must be [4, 5], got [2, 5]"));
  }
  load("block.fc.base_layer.bias", saved->inner().bias.detach());
  EXPECT_THAT(message_of<FileError>([&] { load("gone.base_layer.weight", own); }),
              HasSubstr("gone.base_layer.weight: the model's layers have no place for it"));
}

TEST(AdapterFolder, AMergedModelIsSavedButNotLoaded) {
  const TemporaryFolder folder;
  const auto net = net_of<LoRALinear>(small, large),
             other = net_of<LoRALinear>(small, large, false);
  net->fc->merge();
  rankwise::save_adapter(*net, folder.path());
  EXPECT_THAT(message_of<c10::Error>([&] { rankwise::load_adapter(*net, folder.path()); }),
              HasSubstr("load_adapter: fc is merged"));
  net->fc->unmerge();
  rankwise::load_adapter(*other, folder.path());
  EXPECT_TRUE(other->forward(x()).equal(net->forward(x())));
}

TEST(AdapterFolder, FactorsWithoutMemoryAreNamed) {
  const TemporaryFolder folder;
  const auto net = net_of<LoRALinear>(small, large);
  rankwise::save_adapter(*net, folder.path() / "whole");
  net->inner().lora_A = net->inner().lora_A.detach().to(torch::kMeta);
  const std::string got = "must be dense, with data, got meta";
  EXPECT_THAT(message_of<FileError>([&] { rankwise::save_adapter(*net, folder.path() / "half"); }),
              HasSubstr("block.fc.lora_A.weight\" " + got));
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { rankwise::export_lora(*net, folder.path() / "half"); }),
              HasSubstr("lora_A of \"block.fc\" " + got));
  EXPECT_THAT(message_of<FileError>([&] { rankwise::load_adapter(*net, folder.path() / "whole"); }),
              HasSubstr("block.fc.lora_A.weight: the layer's " + got));
  EXPECT_THAT(message_of<c10::Error>([&] { net->inner().merge(); }), HasSubstr(got));
}

TEST(AdapterFolder, ExportIsPlainLoRAOfTheSameFunction) {
  const auto net = net_of<AdaLoRALinear>(small, large);
  net->fc->set_rank(1);
  const TemporaryFolder folder;
  rankwise::export_lora(*net, folder.path());
  const auto config = rankwise::read_adapter(folder.path()).config;
  EXPECT_EQ(config.peft_type, "LORA");
  EXPECT_TRUE(config.rank_pattern.empty());
  const auto plain = net_of<LoRALinear>(LoRALinearOptions(small).rank(2).alpha(2),
                                        LoRALinearOptions(large).rank(2).alpha(2));
  rankwise::load_adapter(*plain, folder.path());
  {
    const torch::NoGradGuard no_grad;
    for (const auto& item : net->named_parameters())
      if (item.key().find("lora_") == std::string::npos)
        plain->named_parameters()[item.key()].copy_(item.value());
  }
  EXPECT_LT((plain->forward(x()) - net->forward(x())).abs().max().item<double>(), 1e-14);
}

TEST(AdapterFolder, WhatCannotBeSaved) {
  const TemporaryFolder folder;
  const auto error = [&](torch::nn::Module& model) {
    return message_of<std::invalid_argument>([&] { rankwise::save_adapter(model, folder.path()); });
  };
  EXPECT_EQ(error(*net_of<AdaLoRALinear>(small, large)),
            "save_adapter: a PEFT folder has one initial rank for all layers, got 4 and 2; use "
            "export_lora");
  EXPECT_EQ(error(*net_of<LoRALinear>(small, LoRALinearOptions(large).rslora(true))),
            "save_adapter: a PEFT folder has one value of rslora for all layers, got true and "
            "false; use export_lora");
  torch::nn::Sequential mixed(LoRALinear{small}, AdaLoRALinear{large});
  EXPECT_EQ(error(*mixed),
            "save_adapter: a PEFT folder has one method for all layers, got LoRA and AdaLoRA; use "
            "export_lora");
  rankwise::export_lora(*mixed, folder.path());
  LoRALinear alone(small);
  EXPECT_THAT(error(*alone), HasSubstr("the model is an adapted layer and must contain it"));
  torch::nn::Sequential plain(torch::nn::Linear(2, 2));
  EXPECT_EQ(error(*plain), "save_adapter: the model has no adapted layer");
  const auto rank_zero = LoRALinearOptions(small).rank(0);
  torch::nn::Sequential empty(LoRALinear{rank_zero});
  EXPECT_EQ(error(*empty), "save_adapter: every layer has rank 0; there is nothing to save");
}

}  // namespace
