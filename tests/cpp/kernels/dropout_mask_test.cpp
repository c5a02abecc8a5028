// The dropout mask's kernel against its definition, for every type and for counts with tails.
#include <cuda_model/schedule.h>
#include <gtest/gtest.h>
#include <kernels/dropout_mask.h>

#include "matrices.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;

using Elements = testing::Types<double, float, __nv_bfloat16, __half>;
template <typename T>
class DropoutMaskOf : public testing::Test {};
TYPED_TEST_SUITE(DropoutMaskOf, Elements);

TYPED_TEST(DropoutMaskOf, FollowsTheDefinition) {
  cuda_model::set_schedule({});
  for (const int64_t seed : {int64_t{0}, int64_t{-1}, int64_t{1} << 40}) {
    const DeviceArray<int64_t> device_seed(std::vector<int64_t>{seed});
    for (const int64_t count : {0, 1, 7, 8, 9, 2047, 2048, 2049, 5000}) {
      for (const uint32_t threshold : {0u, 1u, 6554u, 65536u}) {
        const DeviceArray<TypeParam> mask(count);
        ASSERT_EQ(launch_dropout_mask(device_seed.data(), count, threshold, mask.data(), nullptr),
                  0);
        const auto expected = keep_mask(1, count, static_cast<uint64_t>(seed), threshold);
        for (int64_t i = 0; i < count; ++i) {
          ASSERT_EQ(static_cast<float>(mask[i]), static_cast<float>(expected[i])) << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace rankwise::kernels
