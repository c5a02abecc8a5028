// The passes that blocks do beside the product: their sums against float64, the product's bits
// those of a launch without them, in every order of blocks.
#include "beside_problems.h"

namespace rankwise::kernels {
namespace {

template <typename Pass>
void run(const BesideCase& c) {
  cuda_model::set_schedule({});
  Pass pass(c);
  pass.everything();
  pass.check();
}

const BesideCase forward_cases[] = {{{130, 264, 200, 5, false, true, 3}, 1},
                                    {{300, 264, 136, 16, false, true, 4}, 2, true},
                                    {{1, 8, 8, 1, false, false, 2}, 1},
                                    {{520, 16, 64, 12, false, true, 9}, 7, true}};

TEST(BesideTheProduct, TheTermIsMadeForIt) {
  for (const BesideCase& c : forward_cases) {
    run<Forward<__nv_bfloat16>>(c);
    run<Forward<__half>>(c);
    run<Forward<__nv_bfloat16, true>>(c);
  }
}

const BesideCase gradient_cases[] = {{{130, 264, 72, 5, true, false, 3}, 1},
                                     {{300, 264, 136, 16, true, false, 4}, 2, false, 2},
                                     {{1, 8, 8, 1, true, false, 2}, 1},
                                     {{520, 136, 64, 12, true, false, 9}, 7, false, 3}};

TEST(BesideTheProduct, SlicesOfAGradientAreAddedUp) {
  for (const BesideCase& c : gradient_cases) {
    run<Gradient<__nv_bfloat16>>(c);
    run<Gradient<__half>>(c);
    run<Gradient<__nv_bfloat16, true>>(c);
  }
}

// Blocks run to their end one after another: none may wait for one that has not begun.
TEST(BesideTheProduct, BlocksMayBeginInAnyOrder) {
  expect_same_bits_under_every_schedule<Forward<__nv_bfloat16>>(forward_cases[1]);
  expect_same_bits_under_every_schedule<Gradient<__nv_bfloat16>>(gradient_cases[1]);
  expect_same_bits_under_every_schedule<Forward<__nv_bfloat16, true>>(forward_cases[1]);
  expect_same_bits_under_every_schedule<Gradient<__nv_bfloat16, true>>(gradient_cases[1]);
}

TEST(BesideTheProduct, TheirNumberIsSeenNowhere) {
  cuda_model::set_schedule({});
  std::vector<std::vector<unsigned char>> forward, gradient;
  for (const int blocks : {1, 2, 5}) {
    Forward<__half> one({{300, 264, 136, 16, false, true, 6}, blocks});
    Gradient<__half> other({{300, 264, 136, 16, true, false, 6}, blocks});
    one.everything();
    other.everything();
    forward.push_back(one.written());
    gradient.push_back(other.written());
  }
  EXPECT_TRUE(forward[0] == forward[1] && forward[0] == forward[2]);
  EXPECT_TRUE(gradient[0] == gradient[1] && gradient[0] == gradient[2]);
}

template <typename Pass>
class NonfiniteBeside : public testing::Test {};
using Factors = testing::Types<Forward<__nv_bfloat16>, Forward<__nv_bfloat16, true>>;
TYPED_TEST_SUITE(NonfiniteBeside, Factors);

TYPED_TEST(NonfiniteBeside, NumbersReachTheirSumsAlone) {
  cuda_model::set_schedule({});
  TypeParam pass(forward_cases[0]);
  pass.A.set(2, 7, 1.0f);  // of one part
  pass.product.left.set(3, 7, INFINITY);
  pass.A.set(4, 100, NAN);
  pass.everything();
  for (int64_t i = 0; i < 130; ++i) {
    for (int64_t r = 0; r < 5; ++r) {
      ASSERT_EQ(std::isnan(pass.hidden.written(i, r)), r == 4);
      ASSERT_EQ(std::isinf(pass.hidden.written(i, r)), r != 4 && i == 3);
    }
  }
}

TEST(BesideTheProduct, WhatItCannotDoIsRefused) {
  const Forward<__half> forward(forward_cases[0]);
  const Gradient<__half> gradient(gradient_cases[0]);
  EXPECT_TRUE(takes(forward.problem()) && takes(gradient.problem()));
  const auto refused = [&](LinearProduct problem, const auto& change) {
    change(problem);
    return !takes(problem) && launch_linear_product(problem, nullptr) == cudaErrorInvalidValue;
  };
  const LinearProduct f = forward.problem(), g = gradient.problem();
  EXPECT_TRUE(refused(f, [](LinearProduct& p) { p.beside.blocks = 3; }));  // none for the tiles
  EXPECT_TRUE(refused(f, [](LinearProduct& p) { p.beside.hidden = nullptr; }));
  EXPECT_TRUE(refused(f, [](LinearProduct& p) { p.beside.flags = nullptr; }));
  EXPECT_TRUE(refused(f, [](LinearProduct& p) { p.beside.A.stride = 204; }));
  EXPECT_TRUE(refused(g, [](LinearProduct& p) { p.beside.partial = nullptr; }));
  EXPECT_TRUE(refused(g, [](LinearProduct& p) { p.beside.chunk = 0; }));
  EXPECT_TRUE(refused(g, [](LinearProduct& p) { p.beside.x.stride = 260; }));
  EXPECT_TRUE(refused(g, [](LinearProduct& p) { p.dropout.threshold = 1; }));
  EXPECT_TRUE(refused(g, [](LinearProduct& p) { p.rank = p.beside.rank = 17; }));
  EXPECT_TRUE(refused(g, [](LinearProduct& p) { p.beside.rank = 4; }));  // not the term's
  EXPECT_TRUE(refused(g, [](LinearProduct& p) { p.beside.dh.stride = 3; }));
  EXPECT_TRUE(refused(g, [](LinearProduct& p) { p.beside.cut = true; }));  // over float16
}

}  // namespace
}  // namespace rankwise::kernels
