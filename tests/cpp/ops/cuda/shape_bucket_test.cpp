// Buckets of sizes: close, ordered, and their own largest size.
#include "ops/cuda/shape_bucket.h"

#include <gtest/gtest.h>

namespace rankwise {
namespace {

TEST(ShapeBucket, SmallSizesAreAlone) {
  for (int64_t size = 0; size <= 16; ++size) EXPECT_EQ(largest_of_bucket(size), size);
}

TEST(ShapeBucket, HoldsAtMostAnEighthMore) {
  for (int64_t size = 1; size < 100'000; ++size) {
    const int64_t largest = largest_of_bucket(size);
    ASSERT_GE(largest, size);
    ASSERT_LE(8 * (largest - size), size) << size;
    ASSERT_EQ(largest_of_bucket(largest), largest);
    ASSERT_LE(largest_of_bucket(size - 1), largest);
  }
}

TEST(ShapeBucket, HasEightInEachOctave) {
  for (const int64_t octave : {16, 1024, 8192, 1 << 20}) {
    int64_t buckets = 0;
    for (int64_t size = octave + 1; size <= 2 * octave; size = largest_of_bucket(size) + 1)
      ++buckets;
    EXPECT_EQ(buckets, 8) << octave;
  }
}

TEST(ShapeBucket, UsualBatchesAreTheLargestOfTheirs) {
  for (const int64_t size : {512, 2048, 8192, 12288, 16384}) {
    EXPECT_EQ(largest_of_bucket(size), size);
    EXPECT_EQ(largest_of_bucket(size - 1), size);
  }
}

}  // namespace
}  // namespace rankwise
