// The device kernels of lora_linear against sums in float64, over sizes, ranks, types, layouts.
#include <gtest/gtest.h>
#include <kernels/dropout_mask.h>
#include <sys/mman.h>

#include "lora_linear_problem.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;
using cuda_model::Flush;

template <typename Pair>
class LoraLinearKernels : public testing::Test {
 protected:
  using Wide = typename Pair::first_type;
  using Factor = typename Pair::second_type;

  void SetUp() override { cuda_model::set_schedule({}); }

  static void check(const Case& c) {
    SCOPED_TRACE(name_of(c));
    Problem<Wide, Factor>(c).everything();
  }
};

TYPED_TEST_SUITE(LoraLinearKernels, TypePairs);

TYPED_TEST(LoraLinearKernels, EveryTailOfRowsAndColumns) {
  for (const int64_t rows : {1, 2, 7, 63, 64, 65, 127, 129}) {
    for (const int64_t cols : {1, 3, 8, 31, 33, 64, 65, 127, 130}) {
      this->check({rows, cols, 5, (rows + cols) % 2 ? 6554u : 0u, cols % 3 == 0});
    }
  }
}

TYPED_TEST(LoraLinearKernels, EveryRank) {
  for (int64_t rank = 1; rank <= 66; ++rank) {
    this->check({33, 40, rank, rank % 2 ? 6554u : 0u, rank % 3 == 0});
  }
  for (const int64_t rank : {128, 200, 256}) this->check({20, 72, rank, 6554u, true});
}

TYPED_TEST(LoraLinearKernels, SeveralChunks) {
  this->check({70, 1100, 8, 6554u, true});
  this->check({1100, 70, 8, 6554u, true});
  this->check({300, 530, 17, 0, true});
}

TYPED_TEST(LoraLinearKernels, StridesAndOffsets) {
  for (const int64_t gap : {0, 1, 2, 4, 8}) {
    for (const int offset : {0, 1, 2, 4}) {
      const Layout layout{gap, offset}, even{8, 0};
      this->check({40, 56, 8, 6554u, true, layout, even, even});
      this->check({40, 56, 8, 6554u, true, even, layout, even});
      this->check({40, 56, 8, 6554u, true, even, even, layout});
    }
  }
  const Layout from_start{8, 0, Flush::start};
  this->check({40, 56, 8, 6554u, true, from_start, from_start, from_start});
}

TYPED_TEST(LoraLinearKernels, EveryDropoutProbability) {
  for (const uint32_t threshold : {1u, 32768u, 65535u, 65536u}) {
    this->check({20, 37, 4, threshold});
  }
}

TYPED_TEST(LoraLinearKernels, EachGradientAlone) {
  const Case c{40, 50, 6, 0, true};
  for (const int wanted : {1, 2, 4, 3, 5, 6}) {
    SCOPED_TRACE(wanted);
    Problem<typename TestFixture::Wide, typename TestFixture::Factor>(c).output_gradient(
        wanted & 1, wanted & 2, wanted & 4);
  }
}

TYPED_TEST(LoraLinearKernels, NothingToSum) {
  this->check({0, 40, 6, 6554u, true});
  this->check({40, 0, 6, 6554u, true});
  this->check({40, 40, 0, 6554u, true});
  this->check({0, 0, 0, 0, true});
}

TYPED_TEST(LoraLinearKernels, SameBitsUnderEverySchedule) {
  for (const Case& c : {Case{130, 400, 12, 6554u, true}, Case{150, 40, 70, 6554u, true, {1, 1}},
                        Case{270, 140, 20, 0, false}}) {
    SCOPED_TRACE(name_of(c));
    expect_same_bits_under_every_schedule<
        Problem<typename TestFixture::Wide, typename TestFixture::Factor>>(c);
  }
}

// Elements of a wide row of ones times ones count what was kept: bit-equal masks for any tiling.
TEST(LoraLinearDropout, MasksAreThoseOfTheDefinition) {
  cuda_model::set_schedule({});
  for (const int64_t cols : {5, 64, 129, 200}) {
    const int64_t rows = 70;
    const uint32_t threshold = 20000;
    const DeviceArray<int64_t> seed(std::vector<int64_t>{-5});
    const DeviceArray<float> hidden(std::vector<float>(rows, 1.0f));
    const DeviceArray<float> factor(std::vector<float>(cols, 1.0f)), out(rows * cols);
    const DeviceArray<float> mask(rows * cols);
    const DropoutMask dropout{seed.data(), threshold};
    const Expand p{rows, cols,  1,    Type::float32, Type::float32, hidden.data(), factor.data(),
                   cols, false, 1.0f, dropout,       out.data(),    cols};
    ASSERT_EQ(launch_expand(p, nullptr), 0);
    ASSERT_EQ(launch_dropout_mask(seed.data(), rows * cols, threshold, mask.data(), nullptr), 0);
    const std::vector<double> expected =
        keep_mask(rows, cols, static_cast<uint64_t>(int64_t{-5}), threshold);
    for (int64_t i = 0; i < rows * cols; ++i) {
      ASSERT_EQ(out[i], expected[i]) << cols << " " << i;
      ASSERT_EQ(mask[i], expected[i]) << cols << " " << i;
    }
  }
}

// Largest error of a long sum of exact products, beside that of a float32 sum written out here.
template <typename Wide>
void expect_errors_of_float32() {
  constexpr int64_t rows = 40, cols = 4096;
  std::mt19937 random(11);
  const auto x = Matrix<Wide>::random(rows, cols, random);
  const auto A = Matrix<float>::random(1, cols, random);
  Matrix<float> hidden(rows, 1);
  const Shrink p{rows,    cols, 1,  type_of<Wide>, Type::float32, x.data(), cols, A.data(), cols,
                 nullptr, 1.0f, {}, hidden.data(), nullptr};
  const DeviceArray<float> scratch(shrink_scratch_bytes(p) / 4);
  ASSERT_EQ(launch_shrink(p, scratch.data(), nullptr), 0);
  double worst = 0, worst_plain = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double exact = 0;
    float plain = 0;
    for (int64_t j = 0; j < cols; ++j) {
      exact += x.at(i, j) * A.at(0, j);
      plain = std::fma(static_cast<float>(x.at(i, j)), static_cast<float>(A.at(0, j)), plain);
    }
    worst = std::max(worst, std::fabs(hidden.written(i, 0) - exact));
    worst_plain = std::max(worst_plain, std::fabs(plain - exact));
  }
  EXPECT_LE(worst, worst_plain);
}

TEST(LoraLinearAccuracy, Float32FactorsGiveErrorsOfFloat32) {
  cuda_model::set_schedule({});
  expect_errors_of_float32<float>();
  expect_errors_of_float32<__nv_bfloat16>();
  expect_errors_of_float32<__half>();
}

// Three rows that lie further apart than 32-bit offsets reach; only their pages are ever touched.
TEST(LoraLinearOffsets, ReachBeyond32Bits) {
  cuda_model::set_schedule({});
  constexpr int64_t rows = 3, cols = 16, stride = (int64_t{1} << 30) + 8;
  constexpr size_t bytes = ((rows - 1) * stride + cols) * sizeof(__half);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* wide = static_cast<__half*>(memory);
  const DeviceArray<__half> factor(std::vector<__half>(cols, __float2half(1.0f)));
  DeviceArray<__half> hidden(rows);
  for (int i = 0; i < 3; ++i) hidden[i] = __float2half(static_cast<float>(i + 1));

  const Expand expand{
      rows,  cols, 1,  Type::float16, Type::float16, hidden.data(), factor.data(), cols,
      false, 1.0f, {}, wide,          stride};
  ASSERT_EQ(launch_expand(expand, nullptr), 0);
  for (int64_t i = 0; i < rows * cols; ++i) {
    ASSERT_EQ(__half2float(wide[i / cols * stride + i % cols]), static_cast<float>(i / cols + 1));
  }

  DeviceArray<__half> out(rows), dA(cols);
  const Shrink shrink{rows,       cols,          1,    Type::float16, Type::float16, wide,
                      stride,     factor.data(), cols, nullptr,       1.0f,          {},
                      out.data(), nullptr};
  const DeviceArray<float> scratch(shrink_scratch_bytes(shrink) / 4);
  ASSERT_EQ(launch_shrink(shrink, scratch.data(), nullptr), 0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(__half2float(out[i]), 16.0f * static_cast<float>(i + 1));

  const InputFactorGradient gradient{rows,   cols,          1,  Type::float16, Type::float16, wide,
                                     stride, hidden.data(), {}, dA.data(),     cols};
  const DeviceArray<float> more(input_factor_gradient_scratch_bytes(gradient) / 4);
  ASSERT_EQ(launch_input_factor_gradient(gradient, more.data(), nullptr), 0);
  for (int j = 0; j < cols; ++j) EXPECT_EQ(__half2float(dA[j]), 1.0f + 4.0f + 9.0f);
  munmap(memory, bytes);
}

TEST(LoraLinearTypes, OthersAreRefused) {
  Shrink p{};
  p.rows = p.cols = p.rank = 1;
  p.wide_type = Type::float32;
  p.factor_type = Type::bfloat16;
  EXPECT_EQ(launch_shrink(p, nullptr, nullptr), static_cast<int>(cudaErrorInvalidValue));
}

// A sum far smaller than the bias changes it by what one rounding leaves of it.
TEST(LoraLinearBias, IsAddedBeforeTheRounding) {
  cuda_model::set_schedule({});
  constexpr int64_t rows = 2, cols = 24;
  const DeviceArray<__nv_bfloat16> hidden(std::vector(rows, __nv_bfloat16(1.0f)));
  // 1 + 2^-8 is halfway to the next bfloat16: a little more decides, which 16 bits of the sum lose.
  const DeviceArray<__nv_bfloat16> factor(std::vector(cols, __nv_bfloat16(0x1p-8f)));
  const DeviceArray<__nv_bfloat16> bias(std::vector(cols, __nv_bfloat16(1.0f)));
  const DeviceArray<__nv_bfloat16> out(rows * cols);
  const Expand p{rows,
                 cols,
                 1,
                 Type::bfloat16,
                 Type::bfloat16,
                 hidden.data(),
                 factor.data(),
                 1,
                 true,
                 1.0f + 0x1p-12f,
                 {},
                 out.data(),
                 cols,
                 bias.data()};
  ASSERT_EQ(launch_expand(p, nullptr), 0);
  for (int64_t i = 0; i < rows * cols; ++i) ASSERT_EQ(__bfloat162float(out[i]), 1.0f + 0x1p-7f);
}

// What is added to the sum is added to all of it, so not where elements are dropped, nor for A, nor
// twice.
TEST(LoraLinearTop, IsRefusedWhereElementsAreDroppedForAAndTwice) {
  const auto refused = [](bool bias, bool base, bool transposed, uint32_t threshold) {
    Expand p{};
    p.rows = p.cols = p.rank = 1;
    p.wide_type = p.factor_type = Type::float32;
    p.transposed = transposed;
    p.dropout.threshold = threshold;
    if (bias) p.bias = &p;
    if (base) p.base = &p;
    return launch_expand(p, nullptr) == static_cast<int>(cudaErrorInvalidValue);
  };
  for (const bool bias : {false, true}) {
    EXPECT_TRUE(refused(bias, !bias, /*transposed=*/false, 0));
    EXPECT_TRUE(refused(bias, !bias, /*transposed=*/true, 1));
  }
  EXPECT_TRUE(refused(true, true, /*transposed=*/true, 0));
}

}  // namespace
}  // namespace rankwise::kernels
