// Several adapters by name over one base: switching, clones, moves, archives, merging.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include "../io/temporary_folder.h"

namespace {

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

/// y with the update of an adapter written out.
at::Tensor expected(const LoRALinearImpl& layer, const std::string& name, const at::Tensor& x) {
  const auto adapter = layer.held_adapter(name);
  const auto update = adapter.scaling() * adapter.lora_B.matmul(adapter.lora_A);
  return at::linear(x, layer.weight + update, layer.bias).detach();
}

/// In eval mode, with "default" active and "second" waiting, all factors random.
LoRALinear two_adapters() {
  torch::manual_seed(0);
  LoRALinear layer(first_options);
  layer->add_adapter("second", second_options);
  for (const std::string& name : layer->adapter_names()) fill(layer->held_adapter(name));
  layer->eval();
  return layer;
}

std::vector<std::string> names_of_parameters(const torch::nn::Module& module) {
  std::vector<std::string> names;
  for (const auto& item : module.named_parameters()) names.push_back(item.key());
  return names;
}

TEST(NamedAdapters, SwitchingComputesEachAndTheBase) {
  LoRALinear layer = two_adapters();
  const at::Tensor bits = layer->weight.clone();
  const auto x = torch::randn({5, 6});
  const auto held = layer->held_adapter("default");
  for (int round = 0; round < 3; ++round) {
    layer->activate_adapter("second");
    EXPECT_EQ(layer->adapter(), "second");
    EXPECT_EQ(layer->rank(), 2);
    EXPECT_EQ(layer->scaling(), 4);
    EXPECT_EQ(layer->settings().dropout, 0.25);
    EXPECT_LT((layer->forward(x) - expected(*layer, "second", x)).abs().max().item<double>(), 1e-5);
    layer->activate_adapter({});
    EXPECT_EQ(layer->adapter(), std::nullopt);
    EXPECT_EQ(layer->rank(), 0);
    EXPECT_EQ(layer->capacity(), 0);
    EXPECT_EQ(layer->scaling(), 0);
    EXPECT_TRUE(layer->forward(x).equal(at::linear(x, bits, layer->bias)));
    layer->activate_adapter("default");
    EXPECT_LT((layer->forward(x) - expected(*layer, "default", x)).abs().max().item<double>(),
              1e-5);
    EXPECT_TRUE(layer->lora_A.is_same(held.lora_A)) << "factors keep their identity";
  }
  EXPECT_TRUE(layer->weight.equal(bits));
}

TEST(NamedAdapters, ParametersAndWhoIsTrained) {
  LoRALinear layer = two_adapters();
  EXPECT_THAT(layer->adapter_names(), ElementsAre("default", "second"));
  EXPECT_THAT(names_of_parameters(*layer),
              ElementsAre("weight", "bias", "lora_A", "lora_B", "adapter_second.lora_A",
                          "adapter_second.lora_B"));
  layer->activate_adapter("second");
  EXPECT_THAT(layer->adapter_names(), ElementsAre("second", "default"));
  EXPECT_THAT(names_of_parameters(*layer),
              ElementsAre("weight", "bias", "lora_A", "lora_B", "adapter_default.lora_A",
                          "adapter_default.lora_B"));
  for (const auto& item : layer->named_parameters())
    EXPECT_EQ(item.value().requires_grad(), item.key().starts_with("lora_")) << item.key();
  layer->train();
  layer->forward(torch::ones({2, 6})).sum().backward();
  EXPECT_TRUE(layer->lora_A.grad().defined());
  EXPECT_FALSE(layer->held_adapter("default").lora_A.grad().defined());
  layer->activate_adapter({});
  EXPECT_THAT(c10::str(layer), HasSubstr("no active adapter"));
  EXPECT_THAT(c10::str(layer), HasSubstr("(adapter_second): rankwise::nn::StoredAdapter(rank=2"));
}

TEST(NamedAdapters, ClonesAndMovesTakeAllAlong) {
  LoRALinear layer = two_adapters();
  const auto copy = std::dynamic_pointer_cast<LoRALinearImpl>(layer->clone());
  const auto x = torch::randn({5, 6});
  EXPECT_TRUE(copy->forward(x).equal(layer->forward(x)));
  layer->activate_adapter("second");
  const auto wanted = layer->forward(x);
  const auto waiting = copy->held_adapter("second");
  EXPECT_FALSE(waiting.lora_A.is_same(layer->lora_A));
  EXPECT_FALSE(waiting.lora_A.requires_grad());
  {
    const torch::NoGradGuard no_grad;
    layer->lora_B.zero_();
  }
  copy->activate_adapter("second");
  EXPECT_TRUE(copy->forward(x).equal(wanted)) << "the clone's adapter is its own";
  copy->to(torch::kDouble);
  copy->activate_adapter("default");
  EXPECT_EQ(copy->lora_A.scalar_type(), torch::kDouble);
  EXPECT_EQ(copy->forward(x.to(torch::kDouble)).scalar_type(), torch::kDouble);
}

TEST(NamedAdapters, ArchivesHoldAllAdapters) {
  LoRALinear saved = two_adapters();
  std::stringstream stream;
  torch::save(saved, stream);
  torch::manual_seed(1);
  LoRALinear loaded(first_options), alone(first_options);
  loaded->add_adapter("second", second_options);
  loaded->eval();
  const std::string bytes = stream.str();
  torch::load(loaded, stream);
  const auto x = torch::randn({5, 6});
  for (const std::string name : {"default", "second"}) {
    saved->activate_adapter(name);
    loaded->activate_adapter(name);
    EXPECT_TRUE(loaded->forward(x).equal(saved->forward(x))) << name;
  }
  std::istringstream again(bytes);
  EXPECT_THROW(torch::load(loaded, again), c10::Error) << "another adapter is active";
}

TEST(NamedAdapters, MergingBelongsToTheActiveOne) {
  LoRALinear layer = two_adapters();
  layer->activate_adapter("second");
  const at::Tensor base = layer->weight;
  const auto x = torch::randn({5, 6});
  const auto wanted = layer->forward(x).detach();
  layer->merge();
  EXPECT_LT((layer->forward(x) - wanted).abs().max().item<double>(), 1e-5);
  EXPECT_THAT(message_of<c10::Error>([&] { layer->activate_adapter("default"); }),
              HasSubstr("activate_adapter: the layer is merged; call unmerge() first"));
  EXPECT_THAT(message_of<c10::Error>([&] { layer->delete_adapter("second"); }),
              HasSubstr("is merged"));
  layer->unmerge();
  EXPECT_TRUE(layer->weight.is_same(base));
  layer->activate_adapter({});
  EXPECT_THAT(message_of<c10::Error>([&] { layer->merge(); }), HasSubstr("no adapter is active"));
}

TEST(NamedAdapters, Errors) {
  LoRALinear layer = two_adapters();
  const auto add = [&](const std::string& name, const AdapterOptions& options) {
    return message_of<std::invalid_argument>([&] { layer->add_adapter(name, options); });
  };
  EXPECT_EQ(add("second", second_options), "add_adapter: there is an adapter 'second' already");
  EXPECT_EQ(add("a.b", second_options), "add_adapter: name must be a word without '.', got 'a.b'");
  EXPECT_EQ(add("", second_options), "add_adapter: name must be a word without '.', got ''");
  EXPECT_EQ(add("third", AdapterOptions().rank(-1)), "adapter: rank must be at least 0, got -1");
  EXPECT_EQ(message_of<std::invalid_argument>([&] { layer->held_adapter("third"); }),
            "held_adapter: adapters are [default, second], got third");
  EXPECT_EQ(message_of<std::invalid_argument>([&] { layer->delete_adapter("third"); }),
            "delete_adapter: adapters are [default, second], got third");
  EXPECT_THAT(layer->adapter_names(), ElementsAre("default", "second"));
  layer->delete_adapter("default");
  EXPECT_THAT(layer->adapter_names(), ElementsAre("second"));
  EXPECT_FALSE(layer->lora_A.defined());
  layer->delete_adapter("second");
  EXPECT_THAT(names_of_parameters(*layer), ElementsAre("weight", "bias"));
  LoRAEmbedding table(LoRAEmbeddingOptions(5, 4).rank(2));
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { table->add_adapter("wet", AdapterOptions().dropout(0.1)); }),
              HasSubstr("LoRAEmbedding: dropout must be 0"));
}

}  // namespace
