// Adapters of a tree of modules: names, freezing, and an AdaLoRA training over the tree.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include "../io/temporary_folder.h"

namespace {

using rankwise::nn::AdaLoRALinear;
using rankwise::nn::LoRAEmbedding;
using rankwise::nn::LoRAEmbeddingOptions;
using rankwise::nn::LoRALinearOptions;
using testing::ElementsAre;
using testing::HasSubstr;

struct BlockImpl : torch::nn::Module {
  AdaLoRALinear up = register_module("up", AdaLoRALinear(LoRALinearOptions(8, 16).rank(4)));
  AdaLoRALinear down = register_module("down", AdaLoRALinear(LoRALinearOptions(16, 8).rank(4)));

  at::Tensor forward(const at::Tensor& x) { return x + down(up(x).tanh()); }
};
TORCH_MODULE(Block);

struct NetImpl : torch::nn::Module {
  LoRAEmbedding words = register_module("words", LoRAEmbedding(LoRAEmbeddingOptions(20, 8)));
  torch::nn::Sequential blocks = register_module("blocks", torch::nn::Sequential(Block(), Block()));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(8, 3));
  LoRAEmbedding again = register_module("again", words);

  at::Tensor forward(const at::Tensor& i) { return head(blocks->forward(words(i))); }
};
TORCH_MODULE(Net);

std::vector<std::string> names_of(const std::vector<rankwise::Adapter>& adapters) {
  std::vector<std::string> names;
  for (const auto& adapter : adapters) names.push_back(adapter.name);
  return names;
}

TEST(ModuleAdapters, NamesAreDottedPathsAndEachLayerComesOnce) {
  Net net;
  const auto adapters = rankwise::adapters_of(*net);
  EXPECT_THAT(names_of(adapters),
              ElementsAre("words", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"));
  EXPECT_TRUE(adapters[0].lora_A.is_same(net->words->lora_A));
  EXPECT_FALSE(adapters[0].lora_E.defined());
  adapters[0].set_rank(3);
  EXPECT_EQ(net->words->rank(), 3);
  EXPECT_EQ(rankwise::adapters_of(*net)[0].rank, 3);
  net = nullptr;
  adapters[0].set_rank(2);  // the layer is gone, the factors are not
  EXPECT_EQ(adapters[0].lora_A.size(0), 8);
}

TEST(ModuleAdapters, FreezesAllButFactors) {
  Net net;
  rankwise::freeze_base(*net);
  for (const auto& item : net->named_parameters())
    EXPECT_EQ(item.value().requires_grad(), item.key().find("lora_") != std::string::npos)
        << item.key();
}

std::vector<at::Tensor> trainable(torch::nn::Module& model) {
  std::vector<at::Tensor> result = model.parameters();
  std::erase_if(result, [](const at::Tensor& parameter) { return !parameter.requires_grad(); });
  return result;
}

TEST(ModuleAdapters, AdaLoRATrainingOverATree) {
  torch::manual_seed(0);
  Net net;
  rankwise::freeze_base(*net);
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(trainable(*net),
                                                                torch::optim::AdamWOptions(1e-2));
  rankwise::RankAllocator allocator(*net, rankwise::AdaLoRAOptions()
                                              .initial_rank(4)
                                              .target_rank(2)
                                              .total_steps(60)
                                              .warmup_steps(10)
                                              .final_steps(20));
  allocator.attach(optimizer);
  const auto i = torch::randint(20, {64}, torch::kLong);
  const auto wanted = torch::randint(3, {64}, torch::kLong);
  std::vector<double> losses;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::nn::functional::cross_entropy(net(i), wanted);
    (loss + 0.01 * allocator.orthogonality_penalty()).backward();
    optimizer.step();
    losses.push_back(loss.item<double>());
  }
  EXPECT_LT(losses.back(), 0.7 * losses.front());
  int64_t sum = 0;
  const auto adapters = rankwise::adapters_of(*net);
  for (const auto& [name, rank] : allocator.ranks()) {
    const auto it = std::find_if(adapters.begin(), adapters.end(),
                                 [&](const auto& adapter) { return adapter.name == name; });
    ASSERT_NE(it, adapters.end()) << name;
    EXPECT_EQ(it->rank, rank) << name;
    sum += rank;
  }
  EXPECT_EQ(sum, 8);
  EXPECT_EQ(net->words->rank(), 8) << "not the allocator's";
}

TEST(ModuleAdapters, OneLayerIsATreeToo) {
  AdaLoRALinear layer(LoRALinearOptions(8, 8).rank(4));
  const rankwise::RankAllocator allocator(
      *layer, rankwise::AdaLoRAOptions().initial_rank(4).target_rank(2).total_steps(10));
  EXPECT_EQ(allocator.ranks()[0].second, 4);
  torch::nn::Linear plain(4, 4);
  EXPECT_THAT(message_of<std::invalid_argument>([&] {
                rankwise::RankAllocator none(*plain, rankwise::AdaLoRAOptions().total_steps(10));
              }),
              HasSubstr("the model has no AdaLoRA layer"));
}

}  // namespace
