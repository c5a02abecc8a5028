// The choice between the two products of a layer, at the sizes that were measured and around them.
#include "ops/cuda/product_rule.h"

#include <gtest/gtest.h>

namespace rankwise {
namespace {

constexpr ProductDevice h100{9, 0, 132};

TEST(ProductRule, TakesTheSizesThatWereMeasured) {
  constexpr ProductSizes measured[] = {{8192, 4096, 4096, 16},  {8192, 8192, 8192, 16},
                                       {8192, 14336, 4096, 16}, {8192, 4096, 14336, 16},
                                       {2048, 4096, 4096, 16},  {8192, 1024, 1024, 16},
                                       {8192, 4096, 4096, 64},  {8192, 4096, 4096, 12}};
  for (const ProductSizes& sizes : measured) {
    EXPECT_TRUE(sums_take_the_term(h100, sizes)) << sizes.rows << " x " << sizes.cols;
  }
}

TEST(ProductRule, LeavesSmallProductsAndOddSizesToCublas) {
  constexpr ProductSizes others[] = {
      {1, 4096, 4096, 16},     // one token
      {2048, 1024, 4096, 16},  // 64 tiles
      {8192, 1000, 1024, 16},  // narrow
      {8192, 4096, 512, 16},   // shallow
      {8192, 4100, 4096, 16},  // rows of no whole 16 bytes
      {8192, 4096, 4100, 16}, {8192, 4096, 4096, 257},           {8192, 4096, 4096, 0},
      {0, 4096, 4096, 16},    {int64_t{1} << 40, 4096, 4096, 16}};
  for (const ProductSizes& sizes : others) {
    EXPECT_FALSE(sums_take_the_term(h100, sizes)) << sizes.rows << " x " << sizes.cols;
  }
}

// Of 272 tiles on 132 multiprocessors eight are left for a third round.
TEST(ProductRule, WantsTheLastRoundFull) {
  EXPECT_FALSE(sums_take_the_term(h100, {17 * 128, 4096, 4096, 16}));
  EXPECT_TRUE(sums_take_the_term(h100, {23 * 128, 4096, 4096, 16}));  // 368 of 396
  EXPECT_FALSE(sums_take_the_term({9, 0, 114}, {2048, 4096, 4096, 16}));
}

// 1,024 tiles are eight rounds of 128.
TEST(ProductRule, PassesGoBesideWhereTheyEndBeforeTheProduct) {
  const auto beside = [](const ProductSizes& sizes, int64_t reuse) {
    return multiprocessors_beside(h100, sizes, sizes.rank, reuse);
  };
  EXPECT_EQ(multiprocessors_beside(h100, {8192, 4096, 4096, 48}, 16, 4096), 4);  // float32 factors
  EXPECT_EQ(beside({8192, 4096, 4096, 16}, 4096), 4);
  EXPECT_EQ(beside({8192, 8192, 8192, 16}, 8192), 4);
  EXPECT_EQ(beside({8192, 14336, 4096, 16}, 14336), 4);  // y of 4096 -> 14336
  EXPECT_EQ(beside({2048, 4096, 4096, 16}, 4096), 4);
  EXPECT_EQ(beside({8192, 1024, 1024, 16}, 1024), 0);
  EXPECT_EQ(beside({8192, 4096, 4096, 17}, 4096), 0);
  EXPECT_EQ(beside({132 * 128, 2048, 4096, 16}, 2048), 0);  // 1,056 tiles leave none
  EXPECT_EQ(beside({2048, 1024, 4096, 16}, 8192), 0);       // cuBLASLt's
}

TEST(ProductRule, IsForOneArchitecture) {
  for (const ProductDevice& device : {ProductDevice{8, 0, 108}, ProductDevice{8, 9, 128},
                                      ProductDevice{10, 0, 132}, ProductDevice{12, 0, 132}}) {
    EXPECT_FALSE(sums_take_the_term(device, {8192, 4096, 4096, 16})) << device.major;
  }
}

}  // namespace
}  // namespace rankwise
