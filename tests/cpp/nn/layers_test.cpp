// The adapted layers as torch::nn modules: values, gradients, first values, sharing, clones, moves.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include "../io/temporary_folder.h"

namespace {

using rankwise::nn::AdaLoRALinear;
using rankwise::nn::AdapterOptions;
using rankwise::nn::LoRAEmbedding;
using rankwise::nn::LoRAEmbeddingOptions;
using rankwise::nn::LoRAInit;
using rankwise::nn::LoRALinear;
using rankwise::nn::LoRALinearOptions;
using testing::ElementsAre;
using testing::HasSubstr;

/// Gives every factor values that are not zero, from the default generator.
void fill(rankwise::nn::Adapted& layer) {
  const torch::NoGradGuard no_grad;
  for (const at::Tensor& factor : {layer.lora_A, layer.lora_B, layer.lora_E})
    if (factor.defined()) factor.normal_(0, 0.5);
}

/// scaling * B diag(E) A over the active directions, in float64.
at::Tensor update_of(const rankwise::nn::Adapted& layer) {
  const auto wide = [&](const at::Tensor& factor, int64_t dim) {
    return factor.detach().to(at::kDouble).narrow(dim, 0, layer.rank());
  };
  at::Tensor A = wide(layer.lora_A, 0);
  if (layer.lora_E.defined()) A = wide(layer.lora_E, 0) * A;
  return layer.scaling() * wide(layer.lora_B, 1).matmul(A);
}

void expect_near(const at::Tensor& got, const at::Tensor& wanted, double tolerance) {
  ASSERT_EQ(got.sizes(), wanted.sizes());
  EXPECT_LE((got.to(at::kDouble) - wanted).abs().max().item<double>(),
            tolerance * wanted.abs().max().item<double>());
}

template <class Layer>
void expect_linear(Layer layer, double tolerance) {
  fill(*layer);
  const auto x = torch::randn({2, 5, 32}, layer->weight.options());
  const auto wide = [](const at::Tensor& tensor) { return tensor.detach().to(at::kDouble); };
  const auto wanted =
      at::linear(wide(x), wide(layer->weight) + update_of(*layer), wide(layer->bias));
  expect_near(layer->forward(x).detach(), wanted, tolerance);
}

TEST(Layers, LinearAgainstFloat64) {
  torch::manual_seed(0);
  const auto options = LoRALinearOptions(32, 64).rank(6).alpha(12).capacity(8);
  expect_linear(LoRALinear(options), 1e-6);
  expect_linear(AdaLoRALinear(options), 1e-6);
  AdaLoRALinear wide(options);
  wide->to(torch::kDouble);
  EXPECT_EQ(wide->lora_E.scalar_type(), torch::kDouble);
  expect_linear(wide, 1e-14);
}

TEST(Layers, EmbeddingAgainstFloat64) {
  torch::manual_seed(0);
  LoRAEmbedding layer(LoRAEmbeddingOptions(11, 6).rank(3).padding_idx(-1));
  EXPECT_EQ(layer->weight[10].abs().sum().item<double>(), 0);
  fill(*layer);
  const auto i = torch::randint(11, {4, 3}, torch::kLong);
  const auto wanted = at::embedding(layer->weight.to(at::kDouble) + update_of(*layer).t(), i);
  const auto got = layer->forward(i);
  expect_near(got.detach(), wanted, 1e-6);
  layer->forward(torch::full({2}, 10, torch::kLong)).sum().backward();
  EXPECT_EQ(layer->lora_A.grad().abs().sum().item<double>(), 0) << "the padding row";
}

TEST(Layers, NamesAndGradients) {
  AdaLoRALinear layer(LoRALinearOptions(5, 4).rank(2));
  std::vector<std::string> names;
  for (const auto& item : layer->named_parameters()) names.push_back(item.key());
  EXPECT_THAT(names, ElementsAre("weight", "bias", "lora_A", "lora_B", "lora_E"));
  fill(*layer);
  layer->forward(torch::randn({3, 5})).sum().backward();
  for (const auto& item : layer->named_parameters()) {
    EXPECT_EQ(item.value().grad().defined(), item.key().starts_with("lora_")) << item.key();
    EXPECT_EQ(item.value().requires_grad(), item.key().starts_with("lora_")) << item.key();
  }
  EXPECT_EQ(LoRALinear(LoRALinearOptions(5, 4).bias(false))->parameters().size(), 3);
}

TEST(Layers, DropoutInTrainingModeOnly) {
  torch::manual_seed(0);
  LoRALinear layer(LoRALinearOptions(16, 4).rank(2).dropout(0.5));
  fill(*layer);
  const auto x = torch::ones({8, 16});
  layer->eval();
  const auto calm = layer->forward(x);
  EXPECT_TRUE(calm.equal(layer->forward(x)));
  layer->train();
  EXPECT_FALSE(calm.equal(layer->forward(x)));
}

TEST(Layers, ScalingCountsTheFirstRank) {
  AdaLoRALinear layer(LoRALinearOptions(8, 8).rank(4).alpha(12));
  layer->set_rank(1);
  EXPECT_EQ(layer->scaling(), 3);
  EXPECT_EQ(layer->capacity(), 4);
  EXPECT_EQ(LoRALinear(LoRALinearOptions(8, 8).rank(4).alpha(12).rslora(true))->scaling(), 6);
  EXPECT_EQ(LoRALinear(LoRALinearOptions(8, 8).rank(0))->scaling(), 0);
  EXPECT_THAT(message_of<c10::Error>([&] { layer->set_rank(5); }),
              HasSubstr("set_rank: rank must be from 0 to the capacity 4, got 5"));
}

// As python: torch.nn.Linear's draws, then lora_A's, then lora_B's.
TEST(Layers, FirstValuesFromASeed) {
  const auto options = LoRALinearOptions(7, 5).rank(3).capacity(4);
  torch::manual_seed(3);
  AdaLoRALinear layer(options);
  torch::manual_seed(3);
  torch::nn::Linear linear(7, 5);
  const auto A = torch::empty({3, 7}).normal_(0, 0.02);
  EXPECT_TRUE(layer->weight.equal(linear->weight));
  EXPECT_TRUE(layer->bias.equal(linear->bias));
  EXPECT_TRUE(layer->lora_A.narrow(0, 0, 3).equal(A));
  EXPECT_EQ(layer->lora_A.narrow(0, 3, 1).abs().sum().item<double>(), 0);
  EXPECT_EQ(layer->lora_E.abs().sum().item<double>(), 0);

  torch::manual_seed(3);
  LoRALinear kaiming(options);
  torch::manual_seed(3);
  const torch::nn::Linear base(7, 5);
  const auto drawn = torch::empty({3, 7}).uniform_(-1 / std::sqrt(7.0), 1 / std::sqrt(7.0));
  EXPECT_TRUE(kaiming->weight.equal(base->weight));
  EXPECT_TRUE(kaiming->lora_A.narrow(0, 0, 3).allclose(drawn, 1e-6));
  EXPECT_EQ(kaiming->lora_B.abs().sum().item<double>(), 0);
  LoRALinear swapped(LoRALinearOptions(7, 5).init(LoRAInit::swapped));
  EXPECT_EQ(swapped->lora_A.abs().sum().item<double>(), 0);
  EXPECT_GT(swapped->lora_B.abs().sum().item<double>(), 0);
  const LoRALinear gaussian(LoRALinearOptions(700, 5).rank(4).init(LoRAInit::gaussian));
  EXPECT_NEAR(gaussian->lora_A.std().item<double>(), 0.25, 0.02);
  torch::manual_seed(3);
  layer->reset_parameters();
  EXPECT_TRUE(layer->weight.equal(linear->weight));
  EXPECT_TRUE(layer->lora_A.narrow(0, 0, 3).equal(A));
}

TEST(Layers, AroundALayerSharesItsTensors) {
  torch::nn::Linear linear(6, 4);
  linear->to(torch::kDouble);  // which both multiply by the same BLAS
  linear->eval();
  LoRALinear layer(linear, AdapterOptions().rank(2));
  EXPECT_TRUE(layer->weight.is_same(linear->weight));
  EXPECT_TRUE(layer->bias.is_same(linear->bias));
  EXPECT_FALSE(linear->weight.requires_grad());
  EXPECT_FALSE(layer->is_training());
  const auto x = torch::randn({3, 6}, torch::kDouble);
  EXPECT_TRUE(layer->forward(x).equal(linear->forward(x)));

  linear->to(torch::kBFloat16);
  AdaLoRALinear masters(linear, AdapterOptions().rank(2).adapter_dtype(at::kFloat));
  EXPECT_EQ(masters->lora_A.scalar_type(), at::kFloat);
  EXPECT_EQ(masters->forward(x.to(at::kBFloat16)).scalar_type(), at::kBFloat16);
  LoRALinear usual(linear, AdapterOptions().rank(2));
  EXPECT_EQ(usual->lora_A.scalar_type(), at::kFloat);
  LoRALinear narrow(linear, AdapterOptions().rank(2).adapter_dtype(at::kBFloat16));
  EXPECT_EQ(narrow->lora_A.scalar_type(), at::kBFloat16);

  torch::nn::Embedding embedding(torch::nn::EmbeddingOptions(9, 5).padding_idx(0));
  LoRAEmbedding adapted(embedding, AdapterOptions().rank(2));
  EXPECT_TRUE(adapted->weight.is_same(embedding->weight));
  EXPECT_THAT(c10::str(adapted), HasSubstr("padding_idx=0"));
}

TEST(Layers, ClonesAreIndependent) {
  AdaLoRALinear layer(LoRALinearOptions(6, 4).rank(3));
  fill(*layer);
  layer->set_rank(2);
  const auto copy = std::dynamic_pointer_cast<rankwise::nn::AdaLoRALinearImpl>(layer->clone());
  const auto x = torch::randn({3, 6});
  EXPECT_EQ(copy->rank(), 2);
  EXPECT_TRUE(copy->forward(x).equal(layer->forward(x)));
  for (const auto& item : copy->named_parameters()) {
    const at::Tensor own = layer->named_parameters()[item.key()];
    EXPECT_NE(item.value().data_ptr(), own.data_ptr()) << item.key();
    EXPECT_EQ(item.value().requires_grad(), own.requires_grad()) << item.key();
  }
  const torch::NoGradGuard no_grad;
  const auto before = layer->forward(x);
  for (at::Tensor& parameter : copy->parameters()) parameter.zero_();
  EXPECT_TRUE(layer->forward(x).equal(before));
  EXPECT_EQ(copy->forward(x).abs().sum().item<double>(), 0);
}

TEST(Layers, ClonesWithinASequential) {
  torch::nn::Sequential net(LoRALinear(LoRALinearOptions(6, 4)), torch::nn::Tanh(),
                            AdaLoRALinear(LoRALinearOptions(4, 2)));
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  const auto x = torch::randn({3, 6});
  EXPECT_TRUE(copy->forward(x).equal(net->forward(x)));
  std::stringstream stream;
  torch::save(net, stream);
  torch::nn::Sequential loaded(LoRALinear(LoRALinearOptions(6, 4)), torch::nn::Tanh(),
                               AdaLoRALinear(LoRALinearOptions(4, 2)));
  torch::load(loaded, stream);
  EXPECT_TRUE(loaded->forward(x).equal(net->forward(x)));
}

TEST(Layers, Print) {
  const AdaLoRALinear layer(LoRALinearOptions(32, 64).rank(6).alpha(12).dropout(0.1));
  EXPECT_EQ(c10::str(layer),
            "rankwise::nn::AdaLoRALinear(in_features=32, out_features=64, bias=true, rank=6, "
            "alpha=12, dropout=0.1, adapter=default)");
}

TEST(Layers, WrongOptions) {
  const auto error = [](const LoRALinearOptions& options) {
    return message_of<std::invalid_argument>([&] { LoRALinear layer(options); });
  };
  const LoRALinearOptions good(4, 4);
  EXPECT_EQ(error(LoRALinearOptions(good).rank(-1)), "adapter: rank must be at least 0, got -1");
  EXPECT_EQ(error(LoRALinearOptions(good).alpha(INFINITY)),
            "adapter: alpha must be finite, got inf");
  EXPECT_EQ(error(LoRALinearOptions(good).dropout(1.5)),
            "adapter: dropout must be in [0, 1], got 1.5");
  EXPECT_EQ(error(LoRALinearOptions(good).rank(4).capacity(3)),
            "adapter: capacity must be at least the rank 4, got 3");
  EXPECT_EQ(error(LoRALinearOptions(good).adapter_dtype(at::kHalf)),
            "adapter: adapter_dtype must be Float like the base's, or Float over a 16-bit base, "
            "got Half");
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [] { LoRAEmbedding layer(LoRAEmbeddingOptions(4, 4).dropout(0.1)); }),
              HasSubstr("LoRAEmbedding: dropout must be 0"));
  EXPECT_THAT(message_of<std::invalid_argument>([] {
                torch::nn::Embedding base(torch::nn::EmbeddingOptions(4, 4).max_norm(1));
                LoRAEmbedding layer(base, AdapterOptions());
              }),
              HasSubstr("max_norm"));
}

TEST(Layers, PaddingWithinTheTable) {
  const auto error = [](int64_t index) {
    return message_of<std::invalid_argument>(
        [&] { LoRAEmbedding layer(LoRAEmbeddingOptions(4, 2).padding_idx(index)); });
  };
  EXPECT_EQ(error(4), "LoRAEmbedding: padding_idx must be from -4 to 3, got 4");
  EXPECT_EQ(error(-5), "LoRAEmbedding: padding_idx must be from -4 to 3, got -5");
  const LoRAEmbedding last(LoRAEmbeddingOptions(4, 2).padding_idx(-1));
  EXPECT_TRUE(last->weight[3].eq(0).all().item<bool>());
  EXPECT_TRUE(last->weight.narrow(0, 0, 3).ne(0).all().item<bool>());
}

}  // namespace
