// Adapters by name in a tree of modules: switching, folders, allocators.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include "../io/temporary_folder.h"

namespace {

using rankwise::nn::AdaLoRALinear;
using rankwise::nn::AdaLoRALinearImpl;
using rankwise::nn::AdapterOptions;
using rankwise::nn::LoRAEmbedding;
using rankwise::nn::LoRAEmbeddingOptions;
using rankwise::nn::LoRALinear;
using rankwise::nn::LoRALinearImpl;
using rankwise::nn::LoRALinearOptions;
using testing::ElementsAre;
using testing::HasSubstr;

const LoRALinearOptions first_options = LoRALinearOptions(6, 4).rank(3).alpha(6);
const AdapterOptions second_options = AdapterOptions().rank(2).alpha(8).dropout(0.25);

void fill(const rankwise::nn::HeldAdapter& adapter) {
  const torch::NoGradGuard no_grad;
  for (const at::Tensor& factor : adapter.factors())
    if (factor.defined()) factor.normal_();
}

struct NetImpl : torch::nn::Module {
  LoRAEmbedding words = register_module("words", LoRAEmbedding(LoRAEmbeddingOptions(9, 6).rank(2)));
  LoRALinear head = register_module("head", LoRALinear(first_options));
  at::Tensor forward(const at::Tensor& i) { return head(words(i)); }
};
TORCH_MODULE(Net);

Net filled_net() {
  torch::manual_seed(4);
  Net net;
  rankwise::add_adapter(*net, "second", AdapterOptions().rank(1).alpha(2));
  for (const auto& [path, layer] : rankwise::adapted_layers(*net))
    for (const std::string& name : layer->adapter_names()) fill(layer->held_adapter(name));
  return net;
}

TEST(TreeAdapters, ATreeSwitchesAsOne) {
  Net net = filled_net();
  const auto i = torch::arange(9);
  const auto first = net(i);
  EXPECT_THAT(rankwise::adapter_names(*net), ElementsAre("default", "second"));
  rankwise::activate_adapter(*net, "second");
  EXPECT_EQ(net->words->adapter(), "second");
  EXPECT_EQ(rankwise::adapters_of(*net)[1].rank, 1);
  EXPECT_FALSE(net(i).equal(first));
  net->words->delete_adapter("second");
  rankwise::activate_adapter(*net, "default");
  EXPECT_TRUE(net(i).equal(first));
  rankwise::activate_adapter(*net, "second");
  EXPECT_EQ(net->words->adapter(), std::nullopt) << "lacks it";
  EXPECT_EQ(rankwise::adapters_of(*net).size(), 1);
  EXPECT_EQ(message_of<std::invalid_argument>([&] { rankwise::activate_adapter(*net, "third"); }),
            "activate_adapter: adapters are [default, second], got third");
  EXPECT_EQ(message_of<std::invalid_argument>(
                [&] { rankwise::add_adapter(*net, "second", AdapterOptions()); }),
            "add_adapter: there is an adapter 'second' already");
  EXPECT_THAT(net->words->adapter_names(), ElementsAre("default")) << "all or none";
  net->head->merge();
  EXPECT_THAT(message_of<c10::Error>([&] { rankwise::activate_adapter(*net, "default"); }),
              HasSubstr("activate_adapter: head is merged"));
  net->head->unmerge();
  rankwise::delete_adapter(*net, "default");
  EXPECT_THAT(rankwise::adapter_names(*net), ElementsAre("second"));
}

TEST(TreeAdapters, FoldersByName) {
  Net net = filled_net();
  const auto i = torch::arange(9);
  const TemporaryFolder first, second, plain;
  rankwise::save_adapter(*net, first.path());
  rankwise::save_adapter(*net, second.path(), "second");
  rankwise::export_lora(*net, plain.path(), "second");
  const auto wanted_first = net(i);
  rankwise::activate_adapter(*net, "second");
  const auto wanted_second = net(i);

  torch::manual_seed(4);
  Net other;
  rankwise::load_adapter(*other, first.path());
  rankwise::load_adapter(*other, second.path(), "two");
  EXPECT_EQ(other->head->adapter(), "two");
  EXPECT_EQ(other->head->rank(), 1);
  EXPECT_EQ(other->head->scaling(), 2);
  EXPECT_TRUE(other->head->lora_A.requires_grad());
  EXPECT_TRUE(other(i).equal(wanted_second));
  rankwise::activate_adapter(*other, "default");
  EXPECT_TRUE(other(i).equal(wanted_first));
  rankwise::load_adapter(*other, second.path(), "two");  // into what is there, and activates it
  EXPECT_TRUE(other(i).equal(wanted_second));
  rankwise::load_adapter(*other, plain.path(), "plain");
  EXPECT_LT((other(i) - wanted_second).abs().max().item<double>(), 1e-5);
  EXPECT_EQ(message_of<std::invalid_argument>(
                [&] { rankwise::save_adapter(*other, first.path(), "four"); }),
            "save_adapter: adapters are [plain, default, two], got four");
  rankwise::activate_adapter(*other, {});
  EXPECT_EQ(
      message_of<std::invalid_argument>([&] { rankwise::save_adapter(*other, first.path()); }),
      "save_adapter: no adapter is active");
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { rankwise::load_adapter(*other, first.path(), "a.b"); }),
              HasSubstr("name must be a word"));
}

TEST(TreeAdapters, ANewAdapterFromAPrunedAdaLoRAFolder) {
  const auto make = [] {
    torch::manual_seed(2);
    return torch::nn::Sequential(AdaLoRALinear(first_options));
  };
  torch::nn::Sequential saved = make(), loaded = make(), plain(LoRALinear{first_options});
  auto& layer = saved->at<AdaLoRALinearImpl>(0);
  fill(layer.held_adapter("default"));
  layer.set_rank(2);
  const TemporaryFolder folder;
  rankwise::save_adapter(*saved, folder.path());
  rankwise::load_adapter(*loaded, folder.path(), "pruned");
  auto& copy = loaded->at<AdaLoRALinearImpl>(0);
  EXPECT_EQ(copy.rank(), 2);
  EXPECT_EQ(copy.capacity(), 3);
  EXPECT_EQ(copy.scaling(), 2);
  const auto x = torch::randn({5, 6});
  EXPECT_TRUE(loaded->forward(x).equal(saved->forward(x)));
  EXPECT_THAT(message_of<rankwise::io::FileError>(
                  [&] { rankwise::load_adapter(*plain, folder.path(), "pruned"); }),
              HasSubstr("base_model.model.0.lora_A: the model's layers have no place for it"));
  EXPECT_THAT(plain->at<LoRALinearImpl>(0).adapter_names(), ElementsAre("default"));
}

TEST(TreeAdapters, AnAllocatorFollowsItsAdapter) {
  AdaLoRALinear layer(first_options);
  layer->add_adapter("second", second_options);
  rankwise::RankAllocator allocator(
      *layer, rankwise::AdaLoRAOptions().initial_rank(3).target_rank(1).total_steps(4));
  layer->activate_adapter("second");
  allocator.freeze();
  EXPECT_EQ(layer->rank(), 2) << "another adapter's";
  EXPECT_EQ(layer->held_adapter("default").rank, 1);
  layer->activate_adapter("default");
  EXPECT_EQ(layer->rank(), 1);
  layer->delete_adapter("default");
  layer->set_rank_of(torch::ones({3, 6}), 7);  // nobody's
}

TEST(TreeAdapters, MastersOverA16BitBaseFromAFile) {
  torch::nn::Sequential saved(LoRALinear{first_options}), half(LoRALinear{first_options});
  const TemporaryFolder folder;
  rankwise::save_adapter(*saved, folder.path());
  half->to(torch::kBFloat16);
  rankwise::load_adapter(*half, folder.path(), "master");
  EXPECT_EQ(half->at<LoRALinearImpl>(0).lora_A.scalar_type(), torch::kFloat);
}

}  // namespace
