// Merging an adapted layer: one rounding, and every bit back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cmath>

#include "../io/temporary_folder.h"

namespace {

using rankwise::nn::AdaLoRALinear;
using rankwise::nn::AdapterOptions;
using rankwise::nn::LoRAEmbedding;
using rankwise::nn::LoRAEmbeddingOptions;
using rankwise::nn::LoRALinearOptions;
using testing::HasSubstr;

AdaLoRALinear filled(const LoRALinearOptions& options) {
  torch::manual_seed(0);
  AdaLoRALinear layer(options);
  const torch::NoGradGuard no_grad;
  layer->lora_E.normal_();
  return layer;
}

TEST(Merge, EveryBitComesBack) {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kDouble}) {
    AdaLoRALinear layer = filled(LoRALinearOptions(12, 7).rank(3).alpha(30));
    layer->to(dtype);
    layer->eval();
    const at::Tensor base = layer->weight, bits = base.clone();
    const auto x = torch::randn({4, 12}).to(dtype);
    const auto before = layer->forward(x).detach();
    const auto report = layer->merge();
    ASSERT_TRUE(report);
    EXPECT_TRUE(layer->merged());
    EXPECT_EQ(report->total, 84);
    EXPECT_GT(report->changed, 0);
    const auto exact =
        bits.to(at::kDouble) +
        10 * layer->lora_B.to(at::kDouble).matmul(layer->lora_E.to(at::kDouble) * layer->lora_A);
    const double last_bits = dtype == torch::kDouble ? 1e-15 : 0;  // of sums in another order
    EXPECT_TRUE(layer->weight.allclose(exact.to(dtype), last_bits, last_bits)) << dtype;
    EXPECT_TRUE(layer->named_parameters()["weight"].is_same(layer->weight));
    EXPECT_TRUE(base.equal(bits)) << "the base is never written";
    const double tolerance = dtype == torch::kBFloat16 ? 0.05 : 1e-5;
    EXPECT_LT((layer->forward(x) - before).abs().max().item<double>(), tolerance);
    layer->unmerge();
    EXPECT_TRUE(layer->weight.is_same(base));
    EXPECT_TRUE(layer->weight.equal(bits));
    EXPECT_TRUE(layer->forward(x).equal(before));
  }
}

TEST(Merge, Embedding) {
  torch::manual_seed(0);
  LoRAEmbedding layer(LoRAEmbeddingOptions(9, 5).rank(2));
  {
    const torch::NoGradGuard no_grad;
    layer->lora_A.normal_();
  }
  layer->eval();
  const auto i = torch::arange(9);
  const auto before = layer->forward(i).detach(), bits = layer->weight.clone();
  layer->merge();
  EXPECT_EQ(layer->weight.sizes(), bits.sizes());
  EXPECT_LT((layer->forward(i) - before).abs().max().item<double>(), 1e-5);
  layer->unmerge();
  EXPECT_TRUE(layer->weight.equal(bits));
}

TEST(Merge, ATiedWeightIsNotTouched) {
  torch::nn::Linear linear(6, 4);
  AdaLoRALinear layer(linear, AdapterOptions().rank(2));
  {
    const torch::NoGradGuard no_grad;
    layer->lora_E.fill_(1);
  }
  const auto bits = linear->weight.clone();
  layer->merge();
  EXPECT_TRUE(linear->weight.equal(bits));
  EXPECT_FALSE(layer->weight.equal(bits));
}

TEST(Merge, ClonesAndMovesWhileMerged) {
  AdaLoRALinear layer = filled(LoRALinearOptions(6, 4).rank(2));
  const auto bits = layer->weight.clone();
  layer->merge();
  const auto copy = std::dynamic_pointer_cast<rankwise::nn::AdaLoRALinearImpl>(layer->clone());
  EXPECT_TRUE(copy->merged());
  EXPECT_TRUE(copy->weight.equal(layer->weight));
  copy->to(torch::kDouble);
  copy->unmerge();
  EXPECT_TRUE(copy->weight.equal(bits.to(torch::kDouble)));
  copy->weight.zero_();
  layer->unmerge();
  EXPECT_TRUE(layer->weight.equal(bits));
}

TEST(Merge, Errors) {
  AdaLoRALinear layer = filled(LoRALinearOptions(6, 4).rank(2));
  const auto x = torch::ones({1, 6});
  layer->merge();
  EXPECT_FALSE(layer->merge()) << "twice";
  EXPECT_THAT(message_of<c10::Error>([&] { layer->forward(x); }),
              HasSubstr("a merged layer would train nothing"));
  {
    const torch::NoGradGuard no_grad;
    layer->forward(x);
  }
  layer->eval();
  layer->forward(x);
  std::stringstream stream;
  EXPECT_THAT(message_of<c10::Error>([&] { torch::save(layer, stream); }),
              HasSubstr("save: the layer is merged"));
  EXPECT_THAT(message_of<c10::Error>([&] { layer->reset_parameters(); }),
              HasSubstr("reset_parameters: the layer is merged"));
  layer->unmerge();
  layer->unmerge();
  const at::Tensor base = layer->weight;
  {
    const torch::NoGradGuard no_grad;
    layer->lora_E.fill_(INFINITY);
  }
  EXPECT_THAT(message_of<c10::Error>([&] { layer->merge(); }), HasSubstr("would not be finite"));
  EXPECT_FALSE(layer->merged());
  EXPECT_TRUE(layer->weight.is_same(base));
}

}  // namespace
