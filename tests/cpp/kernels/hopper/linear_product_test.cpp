// The product with the LoRA term in its sums, against float64 and under every schedule, at sizes
// that fill no tile.
#include "linear_product_problem.h"

namespace rankwise::kernels {
namespace {

using Case = ProductCase;

template <typename T>
class LinearProductOf : public testing::Test {};
using Types = testing::Types<__nv_bfloat16, __half>;
TYPED_TEST_SUITE(LinearProductOf, Types);

TYPED_TEST(LinearProductOf, IsTheSumOfBothProductsAndTheBias) {
  cuda_model::set_schedule({});
  const Case cases[] = {{130, 264, 200, 5, false},          {130, 264, 200, 5, true, false},
                        {1, 8, 8, 1, false, false},         {1, 8, 8, 0, true},
                        {70, 248, 320, 65, false, true, 1}, {70, 248, 320, 40, true, true, 1},
                        {40, 16, 72, 256, false},           {40, 16, 72, 250, true}};
  for (const Case& c : cases) {
    Product<TypeParam> product(c);
    product.everything();
    expect_close<TypeParam>("out", product.out, c.depth + c.rank,
                            [&](int64_t i, int64_t j) { return product.expected(i, j); });
    for (int64_t i = 0; i + 1 < c.rows; ++i) {
      ASSERT_TRUE(std::isnan(product.out.written(i, c.cols))) << "a store between the rows";
    }
  }
}

TYPED_TEST(LinearProductOf, DropsFromTheTermAlone) {
  cuda_model::set_schedule({});
  for (const uint32_t threshold : {1u, 6554u, 32768u, 65536u}) {
    for (const int64_t rank : {5, 80}) {
      Product<TypeParam> product({300, 296, 136, rank, true, false, 2, threshold});
      product.everything();
      expect_close<TypeParam>("out", product.out, 136 + rank,
                              [&](int64_t i, int64_t j) { return product.expected(i, j); });
    }
  }
}

// Zero, and not zero times what it was.
TEST(LinearProduct, WhatIsDroppedOfAnInfiniteTermIsZero) {
  cuda_model::set_schedule({});
  Product<__half> product({70, 264, 72, 3, true, false, 2, 20000});
  product.tail_left.set(65, 1, INFINITY);
  product.everything();
  for (int64_t j = 0; j < 264; ++j) {
    ASSERT_EQ(std::isinf(product.out.written(65, j)), product.kept[65 * 264 + j] != 0) << j;
  }
}

TEST(LinearProduct, HasTheSameBitsUnderEverySchedule) {
  for (const bool right_by_row : {false, true}) {
    expect_same_bits_under_every_schedule<Product<__nv_bfloat16>>(
        Case{300, 264, 72, 17, right_by_row});
  }
  expect_same_bits_under_every_schedule<Product<__nv_bfloat16>>(
      Case{300, 264, 72, 17, true, false, 2, 6554});
}

// A block that goes through several tiles gives each the bits of a block of its own.
TEST(LinearProduct, DoesNotDependOnTheNumberOfBlocks) {
  cuda_model::set_schedule({});
  std::vector<std::vector<unsigned char>> results;
  for (const int multiprocessors : {1, 2, 100}) {
    Product<__half> product(Case{300, 264, 136, 3, false, true, multiprocessors});
    product.everything();
    results.push_back(product.written());
  }
  EXPECT_TRUE(results[0] == results[1] && results[0] == results[2]);
}

// Infinities and NaN stay in their rows and columns; what is read beyond the matrices is zero.
TEST(LinearProduct, NonfiniteNumbersReachTheirSumsAlone) {
  cuda_model::set_schedule({});
  Product<__nv_bfloat16> product(Case{20, 24, 40, 5, false});
  product.left.set(3, 7, INFINITY);
  product.tail_left.set(6, 4, NAN);
  product.everything();
  for (int64_t i = 0; i < 20; ++i) {
    for (int64_t j = 0; j < 24; ++j) {
      const double written = product.out.written(i, j);
      ASSERT_EQ(std::isnan(written), i == 6);
      ASSERT_EQ(std::isinf(written), i == 3);
    }
  }
}

TEST(LinearProduct, RefusesWhatTheCopyEngineCannotRead) {
  const Product<__half> product(Case{16, 16, 16, 3, false});
  const LinearProduct good = product.problem();
  EXPECT_TRUE(takes(good));
  const auto refused = [&](const auto& change) {
    LinearProduct problem = good;
    change(problem);
    return !takes(problem) && launch_linear_product(problem, nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_TRUE(refused([](LinearProduct& p) { p.rows = 0; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.cols = 12; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.depth = 12; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.rank = 257; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.type = Type::float32; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.left.stride = 20; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.tail_left.stride = 3; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.out_stride = 20; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.right.stride = 0; }));
  EXPECT_TRUE(refused([](LinearProduct& p) { p.dropout.threshold = 1; }));  // by column
  EXPECT_TRUE(refused(
      [](LinearProduct& p) { p.right.data = static_cast<const __half*>(p.right.data) + 1; }));
}

}  // namespace
}  // namespace rankwise::kernels
