// fold_adapter: any adapter as LoRA of one rank with scale 1 and the same function.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/adapter_fold.h>

#include <cmath>

#include "temporary_folder.h"

namespace {

using rankwise::AdapterConfig;
using rankwise::AdapterFile;
using rankwise::AdapterUpdate;
using rankwise::fold_adapter;
using rankwise::updates_of;
using rankwise::io::FileError;
using testing::ElementsAre;
using testing::HasSubstr;

const std::string start = "base_model.model.";

/// scaling * B diag(E) A by the configuration, in float64.
at::Tensor delta(const AdapterFile& file, const std::string& module) {
  const auto tensor = [&](const std::string& suffix) {
    const auto it = file.tensors.find(start + module + suffix);
    return it == file.tensors.end() ? at::Tensor() : it->second.to(at::kDouble);
  };
  const auto either = [&](const char* a, const char* b, const char* c) {
    for (const char* suffix : {a, b, c}) {
      if (tensor(suffix).defined()) return tensor(suffix);
    }
    throw std::runtime_error("no factor of " + module);
  };
  at::Tensor A = either(".lora_A.weight", ".lora_A", ".lora_embedding_A");
  const at::Tensor B = either(".lora_B.weight", ".lora_B", ".lora_embedding_B");
  if (tensor(".lora_E").defined()) A = A * tensor(".lora_E");
  return B.matmul(A) * file.config.scaling(module);
}

void expect_same_function(const AdapterFile& folded, const AdapterFile& file,
                          const std::vector<std::string>& modules, double tolerance) {
  for (const std::string& module : modules) {
    const at::Tensor wanted = delta(file, module);
    const double error = (delta(folded, module) - wanted).abs().max().item<double>();
    EXPECT_LE(error, tolerance * wanted.abs().max().item<double>()) << module;
    EXPECT_GT(wanted.abs().max().item<double>(), 0) << module;
  }
}

/// What every reader understands: one rank, scale exactly 1, nothing else.
void expect_plain(const AdapterFile& folded, int64_t rank) {
  AdapterConfig config;
  config.rank = rank;
  config.alpha = static_cast<double>(rank);
  config.target_modules = folded.config.target_modules;
  config.modules_to_save = folded.config.modules_to_save;
  config.dropout = folded.config.dropout;
  config.task_type = folded.config.task_type;
  EXPECT_EQ(folded.config, config);
  const TemporaryFolder folder;
  write_adapter(folder.path(), folded);
  EXPECT_EQ(rankwise::read_adapter(folder.path()).config, folded.config);
}

AdapterFile lora(at::ScalarType dtype) {
  at::manual_seed(1);
  const auto values = [&](at::IntArrayRef shape) {
    return at::randn(shape, at::kDouble).to(dtype);
  };
  AdapterFile file;
  file.config.rank = 2;
  file.config.alpha = 7;
  file.config.dropout = 0.1;
  file.config.task_type = "CAUSAL_LM";
  file.config.rank_pattern = {{"v", 5}, {"dead", 0}};
  file.config.alpha_pattern = {{"v", 3}};
  file.config.target_modules_regex = ".*";
  file.config.exclude_modules = {"x"};
  file.config.modules_to_save = {"head"};
  file.metadata = {{"lora_adapter_metadata", "{}"}};
  file.tensors = {{start + "q.lora_A.weight", values({2, 3})},
                  {start + "q.lora_B.weight", values({4, 2})},
                  {start + "h.v.lora_A.weight", values({5, 3})},
                  {start + "h.v.lora_B.weight", values({4, 5})},
                  {start + "dead.lora_A.weight", values({0, 3})},
                  {start + "dead.lora_B.weight", values({4, 0})},
                  {start + "emb.lora_embedding_A", values({2, 9})},
                  {start + "emb.lora_embedding_B", values({3, 2})},
                  {start + "head.weight", values({2, 3})}};
  return file;
}

TEST(FoldAdapter, LoRAWithPatternsAndEmbeddings) {
  for (const bool rslora : {false, true}) {
    AdapterFile file = lora(at::kDouble);
    file.config.rslora = rslora;
    const AdapterFile folded = fold_adapter(file);
    expect_plain(folded, 5);
    EXPECT_THAT(folded.config.target_modules, ElementsAre("emb", "h.v", "q"));
    EXPECT_TRUE(folded.metadata.empty()) << "it may tell other readers of the old scales";
    expect_same_function(folded, file, {"q", "h.v", "emb"}, 1e-15);
    EXPECT_TRUE(
        folded.tensors.at(start + "head.weight").equal(file.tensors.at(start + "head.weight")));
    EXPECT_EQ(folded.tensors.size(), 7);
    const at::Tensor A = folded.tensors.at(start + "q.lora_A.weight");
    EXPECT_EQ(A.sizes(), at::IntArrayRef({5, 3}));
    EXPECT_TRUE(A.slice(0, 0, 2).equal(file.tensors.at(start + "q.lora_A.weight")));
    EXPECT_TRUE(A.slice(0, 2).eq(0).all().item<bool>());
    EXPECT_TRUE(folded.tensors.at(start + "q.lora_B.weight").slice(1, 2).eq(0).all().item<bool>());
  }
}

TEST(FoldAdapter, AdaLoRAWithADeadModule) {
  at::manual_seed(2);
  const auto values = [](at::IntArrayRef shape) { return at::randn(shape, at::kDouble); };
  AdapterFile file;
  file.config.peft_type = "ADALORA";
  file.config.rank = 4;
  file.config.alpha = 32;
  file.config.kept_directions = {
      {"q", {true, false, false, true}}, {"dead", {0, 0, 0, 0}}, {"v", {true, false, true, true}}};
  file.config.allocation = rankwise::AllocationSettings{.total_steps = 9};
  file.tensors = {{start + "q.lora_A", values({2, 3})},    {start + "q.lora_B", values({4, 2})},
                  {start + "q.lora_E", values({2, 1})},    {start + "v.lora_A", values({3, 3})},
                  {start + "v.lora_B", values({4, 3})},    {start + "v.lora_E", values({3, 1})},
                  {start + "dead.lora_A", values({0, 3})}, {start + "dead.lora_B", values({4, 0})},
                  {start + "dead.lora_E", values({0, 1})}};
  const AdapterFile folded = fold_adapter(file);
  expect_plain(folded, 3);
  EXPECT_THAT(folded.config.target_modules, ElementsAre("q", "v"));
  expect_same_function(folded, file, {"q", "v"}, 1e-15);
}

TEST(FoldAdapter, RoundsOnceToTheStoredType) {
  const at::Tensor one = at::ones({1, 1}, at::kBFloat16);
  const double above_a_tie = 1 + 1.0 / 256 + 1e-9;  // a float32 on the way would end in the tie
  for (const at::Tensor& E : {one, at::Tensor()}) {
    const AdapterFile folded =
        fold_adapter(std::vector{AdapterUpdate{"q", one, one, E, above_a_tie, false}});
    const at::Tensor B = folded.tensors.at(start + "q.lora_B.weight");
    EXPECT_EQ(B.scalar_type(), at::kBFloat16);
    EXPECT_EQ(B.item<float>(), 1 + 1.0F / 128);
  }
  expect_same_function(fold_adapter(lora(at::kHalf)), lora(at::kHalf), {"q", "h.v", "emb"}, 2e-3);
}

TEST(FoldAdapter, FoldingAFoldedAdapterChangesNothing) {
  const AdapterFile once = fold_adapter(lora(at::kBFloat16));
  const AdapterFile twice = fold_adapter(once);
  EXPECT_EQ(twice.config, once.config);
  for (const auto& [name, tensor] : once.tensors) {
    EXPECT_TRUE(twice.tensors.at(name).equal(tensor)) << name;
  }
}

TEST(FoldAdapter, UpdatesOfAFolder) {
  const std::vector<AdapterUpdate> updates = updates_of(lora(at::kFloat));
  ASSERT_EQ(updates.size(), 4);
  EXPECT_EQ(updates[0].module, "dead");
  EXPECT_EQ(updates[0].scaling, 0);
  EXPECT_EQ(updates[1].module, "emb");
  EXPECT_TRUE(updates[1].embedding);
  EXPECT_EQ(updates[2].scaling, 3.0 / 5);
  EXPECT_EQ(updates[3].scaling, 7.0 / 2);
  EXPECT_FALSE(updates[3].lora_E.defined());
  AdapterFile broken = lora(at::kFloat);
  broken.tensors.erase(start + "q.lora_B.weight");
  EXPECT_THAT(message_of<FileError>([&] { fold_adapter(broken); }),
              HasSubstr("updates_of: not the adapter that its configuration describes:\n  "
                        "\"base_model.model.q.lora_B.weight\": missing"));
}

TEST(FoldAdapter, Errors) {
  const AdapterUpdate good{"q", at::ones({2, 3}), at::ones({4, 2}), at::ones({2, 1}), 1, false};
  const auto error = [&](const auto& change) {
    std::vector<AdapterUpdate> updates{good};
    change(updates);
    return message_of<std::invalid_argument>([&] { fold_adapter(updates); });
  };
  EXPECT_EQ(error([](auto& u) { u.clear(); }),
            "fold_adapter: every module has rank 0; there is nothing to write");
  EXPECT_EQ(error([](auto& u) {
              u[0].lora_A = at::ones({0, 3}), u[0].lora_B = at::ones({4, 0}), u[0].lora_E.reset();
            }),
            "fold_adapter: every module has rank 0; there is nothing to write");
  EXPECT_EQ(error([](auto& u) { u.push_back(u[0]); }), "fold_adapter: module \"q\" is given twice");
  EXPECT_THAT(error([](auto& u) {
                u[0].lora_B = at::ones({4, 3});
              }),
              HasSubstr("lora_B of \"q\" must be floating [any, 2], got"));
  EXPECT_THAT(error([](auto& u) { u[0].lora_E = at::ones({2}); }),
              HasSubstr("lora_E of \"q\" must be floating [2, 1], got"));
  EXPECT_THAT(error([](auto& u) { u[0].lora_A = at::Tensor(); }),
              HasSubstr("lora_A of \"q\" must be floating [any, any], got none"));
  EXPECT_THAT(error([](auto& u) {
                u[0].lora_A = at::ones({2, 3}, at::kLong);
              }),
              HasSubstr("lora_A of \"q\" must be floating"));
  EXPECT_THAT(
      error([](auto& u) {
        u[0].lora_B = at::full({4, 2}, 6e4, at::kHalf), u[0].lora_E.reset(), u[0].scaling = 2;
      }),
      HasSubstr("lora_B of \"q\" would not be finite in Half with scaling and lora_E"));
}

}  // namespace
