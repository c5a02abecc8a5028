// LoRALinearGroup and lora_linear_group: what the layers give one by one.
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

namespace rankwise::nn {
namespace {

// q, k and v of different kinds, ranks and sizes, whose updates are not zero.
struct Attention {
  LoRALinear q, v;
  AdaLoRALinear k;
  LoRALinearGroup group;

  explicit Attention(double dropout = 0, torch::Dtype dtype = torch::kDouble)
      : q(LoRALinearOptions(8, 10).rank(3).dropout(dropout)),
        v(LoRALinearOptions(8, 4).bias(false).rank(2).dropout(dropout)),
        k(LoRALinearOptions(8, 4).rank(5).dropout(dropout)),
        group({q, k, v}) {
    torch::NoGradGuard no_grad;
    for (const auto& parameter : parameters()) parameter.normal_();
    q->to(dtype);
    k->to(dtype);
    v->to(dtype);
  }

  std::vector<torch::Tensor> parameters() const {
    std::vector<torch::Tensor> result;
    for (const auto& all : {q->parameters(), k->parameters(), v->parameters()})
      for (const torch::Tensor& parameter : all)
        if (parameter.requires_grad()) result.push_back(parameter);
    return result;
  }

  std::vector<torch::Tensor> alone(const torch::Tensor& x) {
    return {q->forward(x), k->forward(x), v->forward(x)};
  }
};

torch::Tensor loss(const std::vector<torch::Tensor>& outputs) {
  torch::Tensor sum = outputs[0].sin().sum();
  for (size_t i = 1; i < outputs.size(); ++i) sum = sum + outputs[i].sin().sum();
  return sum;
}

void expect_close(const std::vector<torch::Tensor>& got, const std::vector<torch::Tensor>& wanted) {
  ASSERT_EQ(got.size(), wanted.size());
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_TRUE(got[i].sizes() == wanted[i].sizes() && got[i].allclose(wanted[i], 1e-10, 1e-10))
        << "tensor " << i;
}

TEST(LoRALinearGroup, GivesTheOutputsAndGradientsOfItsLayers) {
  torch::manual_seed(1);
  Attention attention;
  const auto x = torch::randn({2, 3, 8}, torch::kDouble).requires_grad_();
  const auto outputs = attention.group(x), wanted = attention.alone(x);
  expect_close(outputs, wanted);
  auto inputs = attention.parameters();
  EXPECT_EQ(inputs.size(), 7U);
  inputs.push_back(x);
  expect_close(torch::autograd::grad({loss(outputs)}, inputs),
               torch::autograd::grad({loss(wanted)}, inputs));
  EXPECT_EQ(outputs[0].grad_fn(), outputs[2].grad_fn());
}

TEST(LoRALinearGroup, HasOneDropoutMaskForAllLayers) {
  LoRALinear layer(LoRALinearOptions(8, 4).rank(2).dropout(0.5));
  const LoRALinearGroup group({layer, layer});
  torch::nn::init::normal_(layer->lora_B.requires_grad_(false));
  const auto x = torch::randn({5, 8});
  const auto outputs = group(x);
  EXPECT_TRUE(outputs[0].equal(outputs[1]));
  layer->eval();
  EXPECT_FALSE(outputs[0].equal(layer(x)));
}

TEST(LoRALinearGroup, CallsLayersThatAreNotAlikeOneByOne) {
  const auto x = torch::randn({5, 8}, torch::kDouble);
  Attention merged, without, modes(0.5);
  merged.v->merge();
  merged.v->eval();
  without.k->delete_adapter("default");
  modes.k->eval();
  for (Attention* attention : {&merged, &without, &modes}) {
    torch::manual_seed(2);
    const auto outputs = attention->group(x);
    torch::manual_seed(2);
    expect_close(outputs, attention->alone(x));
    EXPECT_NE(outputs[0].grad_fn(), outputs[2].grad_fn());
  }
}

TEST(LoRALinearGroup, RefusesNoLayersAndOtherInputSizes) {
  EXPECT_THROW(LoRALinearGroup({}), std::invalid_argument);
  LoRALinear eight(LoRALinearOptions(8, 4)), nine(LoRALinearOptions(9, 4));
  EXPECT_THROW(LoRALinearGroup({eight, nine}), std::invalid_argument);
  const LoRALinearGroup group({eight});
  EXPECT_THROW(group(torch::randn({5, 9})), c10::Error);
}

TEST(LoraLinearGroup, DefaultsAreThoseOfLoraLinear) {
  const auto x = torch::randn({5, 8}), weight = torch::randn({4, 8});
  const auto A = torch::randn({3, 8}), B = torch::randn({4, 3});
  const auto outputs = lora_linear_group(x, {{.weight = weight, .lora_A = A, .lora_B = B}});
  EXPECT_TRUE(outputs.at(0).equal(lora_linear(x, weight, {}, A, B)));
}

}  // namespace
}  // namespace rankwise::nn
