// The ops from a C++ program with no Python: values and gradients against plain formulas in
// float64.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

namespace rankwise {
namespace {

struct Sample {
  torch::Tensor x, weight, bias, A, B, E;

  explicit Sample(torch::Dtype dtype = torch::kDouble) {
    torch::manual_seed(0);
    const auto leaf = [&](std::vector<int64_t> sizes) {
      return torch::randn(sizes, torch::dtype(torch::kDouble)).to(dtype).requires_grad_();
    };
    x = leaf({3, 5, 17});
    weight = leaf({11, 17});
    bias = leaf({11});
    A = leaf({6, 17});
    B = leaf({11, 6});
    E = leaf({6, 1});
  }

  std::vector<torch::Tensor> leaves() const { return {x, weight, bias, A, B, E}; }

  torch::Tensor expected(double scaling, int64_t rank) const {
    const auto hidden = x.matmul(A.narrow(0, 0, rank).t()) * E.narrow(0, 0, rank).t();
    return x.matmul(weight.t()) + bias + scaling * hidden.matmul(B.narrow(1, 0, rank).t());
  }
};

// The largest |a - b|, for a failure's message.
double distance(const torch::Tensor& a, const torch::Tensor& b) {
  return (a.to(torch::kDouble) - b.to(torch::kDouble)).abs().max().item<double>();
}

TEST(LoraLinear, ValueAndGradientsFollowTheFormula) {
  for (const int64_t rank : {0, 1, 4, 6}) {
    const Sample sample;
    const auto y = lora_linear(sample.x, sample.weight, sample.bias, sample.A, sample.B, sample.E,
                               /*scaling=*/0.7, /*dropout_p=*/0.0, rank);
    const auto expected = sample.expected(0.7, rank);
    EXPECT_LT(distance(y, expected), 1e-12) << "rank " << rank;
    const auto dy = torch::randn_like(y);
    const auto got = torch::autograd::grad({y}, sample.leaves(), {dy});
    const auto wanted = torch::autograd::grad({expected}, sample.leaves(), {dy}, {}, false, true);
    for (size_t i = 0; i < got.size(); ++i) {
      const auto want = wanted[i].defined() ? wanted[i] : torch::zeros_like(got[i]);
      EXPECT_LT(distance(got[i], want), 1e-11) << "rank " << rank << ", gradient " << i;
    }
  }
}

TEST(LoraLinear, BackwardReachesParameters) {
  const Sample sample;
  lora_linear(sample.x, sample.weight, {}, sample.A, sample.B).sum().backward();
  EXPECT_TRUE(sample.A.grad().defined());
  EXPECT_FALSE(sample.bias.grad().defined());
}

TEST(LoraLinear, ThreadsDoNotChangeABit) {
  const Sample sample(torch::kFloat);
  const auto run = [&](int threads) {
    at::set_num_threads(threads);
    torch::manual_seed(3);
    const auto y = lora_linear(sample.x, sample.weight, sample.bias, sample.A, sample.B, sample.E,
                               2.0, /*dropout_p=*/0.3);
    auto all = torch::autograd::grad({y.sum()}, sample.leaves());
    all.push_back(y);
    return all;
  };
  const auto one = run(1), two = run(2);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(torch::equal(one[i], two[i])) << i;
}

TEST(LoraLinear, EveryCpuPathFollowsTheFormula) {
  const Sample sample(torch::kFloat);
  const auto expected = sample.expected(2.0, 6);
  for (const CpuPath path : {CpuPath::aten, CpuPath::measured, CpuPath::micro_kernel}) {
    set_cpu_path(path);
    EXPECT_EQ(cpu_path(), path);
    const auto y =
        lora_linear(sample.x, sample.weight, sample.bias, sample.A, sample.B, sample.E, 2.0);
    EXPECT_LT(distance(y, expected), 1e-4);
  }
  for (const MeasuredPath& kind : measured_paths()) EXPECT_EQ(kind.tokens, 16);  // 3 x 5, rounded
}

TEST(LoraLinear, ErrorsNameOpArgumentWantedAndGot) {
  const Sample sample;
  try {
    lora_linear(sample.x, sample.weight, sample.bias, sample.A.narrow(1, 0, 16), sample.B);
    FAIL() << "no error";
  } catch (const c10::Error& error) {
    EXPECT_STREQ(error.what_without_backtrace(),
                 "lora_linear: lora_A must be [rank, 17], got [6, 16]");
  }
}

TEST(LoraLinear, OfNestedTensorsIsThatOfTheirComponents) {
  const Sample sample;
  const auto components = sample.x.detach().split_with_sizes({2, 1});
  const auto nested = at::_nested_tensor_from_tensor_list(components).requires_grad_();
  const auto y = lora_linear(nested, sample.weight, sample.bias, sample.A, sample.B, sample.E, 0.7);
  ASSERT_TRUE(y.is_nested());
  const auto flat = torch::cat(y.unbind()), expected = sample.expected(0.7, 6);
  EXPECT_LT(distance(flat, expected), 1e-12);
  const auto dy = torch::randn_like(flat);
  std::vector<torch::Tensor> leaves = sample.leaves();
  const auto wanted = torch::autograd::grad({expected}, leaves, {dy});
  leaves[0] = nested;
  auto got = torch::autograd::grad({flat}, leaves, {dy});
  got[0] = torch::cat(got[0].unbind());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LT(distance(got[i], wanted[i]), 1e-11) << i;
}

TEST(LoraLinear, NamesNestedAndSparseArguments) {
  const Sample sample;
  const auto message = [&](const torch::Tensor& weight, const torch::Tensor& A) -> std::string {
    try {
      lora_linear(sample.x, weight, {}, A, sample.B);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  const auto nested = at::_nested_tensor_from_tensor_list(sample.weight.detach().chunk(2));
  EXPECT_EQ(message(nested, sample.A), "lora_linear: weight must be dense, got a nested tensor");
  EXPECT_EQ(message(sample.weight, sample.A.detach().to_sparse()),
            "lora_linear: lora_A must be dense, got layout Sparse; call to_dense() first");
}

TEST(LoraUpdate, IsAddedToTheRowsOfABase) {
  const Sample sample;
  const auto base = torch::randn({3, 5, 11}, torch::kDouble).requires_grad_();
  const auto y = lora_update(base, sample.x, sample.A, sample.B, sample.E, 0.7, 0.0, /*rank=*/4);
  const auto product = sample.x.matmul(sample.weight.t()) + sample.bias;
  const auto expected = sample.expected(0.7, 4) - product.detach() + base;
  EXPECT_LT(distance(y, expected), 1e-12);
  const auto dy = torch::randn_like(y);
  const std::vector<torch::Tensor> leaves = {sample.A, sample.B, sample.E, base};
  const auto got = torch::autograd::grad({y}, leaves, {dy});
  const auto wanted = torch::autograd::grad({expected}, leaves, {dy});
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LT(distance(got[i], wanted[i]), 1e-11) << i;
  const auto dx = dy.matmul(sample.B.narrow(1, 0, 4)) * 0.7 * sample.E.narrow(0, 0, 4).t();
  const auto again = lora_update(base, sample.x, sample.A, sample.B, sample.E, 0.7, 0.0, 4);
  const auto got_dx = torch::autograd::grad({again}, {sample.x}, {dy})[0];
  EXPECT_LT(distance(got_dx, dx.matmul(sample.A.narrow(0, 0, 4))), 1e-11);
}

TEST(LoraUpdate, ErrorsNameOpArgumentWantedAndGot) {
  const Sample sample;
  try {
    lora_update(torch::zeros({3, 5, 10}, torch::kDouble), sample.x, sample.A, sample.B);
    FAIL() << "no error";
  } catch (const c10::Error& error) {
    EXPECT_STREQ(error.what_without_backtrace(),
                 "lora_update: base_output must be [3, 5, 11], got [3, 5, 10]");
  }
}

TEST(LoraEmbedding, FollowsTheFormula) {
  const Sample sample;
  const auto indices = torch::tensor({0, 3, 3, 10});
  const auto A = torch::randn({6, 11}, torch::kDouble), B = torch::randn({17, 6}, torch::kDouble);
  const auto y = lora_embedding(indices, sample.weight, A, B, {}, /*scaling=*/0.5);
  const auto expected = sample.weight.index({indices}) + 0.5 * A.t().index({indices}).matmul(B.t());
  EXPECT_LT(distance(y, expected), 1e-12);
}

TEST(MergedWeight, IsRoundedOnce) {
  const Sample sample(torch::kBFloat16);
  const torch::NoGradGuard no_grad;
  const auto [merged, error, changed] =
      merged_weight(sample.weight, sample.A, sample.B, sample.E, 0.25);
  const auto exact = sample.weight.to(torch::kDouble) +
                     0.25 * sample.B.to(torch::kDouble)
                                .matmul(sample.A.to(torch::kDouble) * sample.E.to(torch::kDouble));
  EXPECT_TRUE(torch::equal(merged, exact.to(torch::kBFloat16)));
  EXPECT_EQ(error.item<double>(), distance(merged, exact));
  EXPECT_EQ(changed.item<int64_t>(), merged.ne(sample.weight).sum().item<int64_t>());
}

}  // namespace
}  // namespace rankwise
