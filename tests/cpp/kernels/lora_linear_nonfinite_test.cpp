// Infinities and NaN in every operand of lora_linear's kernels: they arrive where sums in float64
// have them, and nowhere else.
#include <gtest/gtest.h>

#include <bit>

#include "kernel_checks.h"
#include "lora_linear_calls.h"

namespace rankwise::kernels {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
const float nan_of_device = std::bit_cast<float>(0x7FFFFFFFu);   // what a GPU's operations give
const float signalling_nan = std::bit_cast<float>(0x7F800001u);  // infinity but for its last bit

bool same_kind(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::isinf(a) || std::isinf(b) ? a == b : true;
}

// Elements [i, j] are to be what the sum of term(i, j, k) over k below n is.
template <typename T, typename Term>
void expect_kinds(const char* name, const Matrix<T>& written, int64_t n, const Term& term) {
  for (int64_t i = 0; i < written.rows; ++i) {
    for (int64_t j = 0; j < written.cols; ++j) {
      double exact = 0;
      for (int64_t k = 0; k < n; ++k) exact += term(i, j, k);
      ASSERT_TRUE(same_kind(written.written(i, j), exact))
          << name << " (" << i << ", " << j << "): wrote " << written.written(i, j) << ", wanted "
          << exact;
    }
  }
}

// Numbers of few and of many bits.
template <typename T>
Matrix<T> mixed(int64_t rows, int64_t cols, std::mt19937& random) {
  auto matrix = Matrix<T>::random(rows, cols, random);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      if ((i + j) % 3 == 0) matrix.set(i, j, j % 2 ? 1.0f : -0.5f);
      if ((i + j) % 3 == 1) matrix.set(i, j, 1.0f + 0x1p-9f);
    }
  }
  return matrix;
}

template <typename Pair>
class LoraLinearNonfinite : public testing::Test {
 protected:
  using Wide = typename Pair::first_type;
  using Factor = typename Pair::second_type;
  static constexpr int64_t rows = 70, cols = 72;

  void SetUp() override { cuda_model::set_schedule({}); }

  static void check(const Matrix<Wide>& wide, const Matrix<Factor>& A, const Matrix<Factor>& B,
                    const Matrix<Factor>& skinny) {
    const int64_t rank = A.rows;
    expect_kinds("hidden", shrunk(wide, A), cols,
                 [&](auto i, auto r, auto k) { return wide.at(i, k) * A.at(r, k); });
    const auto from_output = output_gradients(wide, B, skinny);
    expect_kinds("dh", from_output.dh, cols,
                 [&](auto i, auto r, auto k) { return wide.at(i, k) * B.at(k, r); });
    expect_kinds("dB", from_output.dB, rows,
                 [&](auto j, auto r, auto k) { return wide.at(k, j) * skinny.at(k, r); });
    expect_kinds("dA", input_factor_gradient(wide, skinny), rows,
                 [&](auto r, auto j, auto k) { return wide.at(k, j) * skinny.at(k, r); });
    expect_kinds("dx", expanded<Wide>(skinny, A, false, 0.5f), rank,
                 [&](auto i, auto j, auto k) { return skinny.at(i, k) * A.at(k, j); });
    const auto of_y = [&](auto i, auto j, auto k) { return skinny.at(i, k) * B.at(j, k); };
    expect_kinds("y", expanded<Wide>(skinny, B, true, 0.5f), rank, of_y);
    auto y = Matrix<Wide>(rows, cols);
    for (int64_t i = 0; i < rows * cols; ++i) y.memory[i] = wide.memory[i];
    add_expanded(y, skinny, B, 0.5f);
    expect_kinds("y on a base", y, rank,
                 [&](auto i, auto j, auto k) { return of_y(i, j, k) + wide.at(i, j); });
  }
};

TYPED_TEST_SUITE(LoraLinearNonfinite, TypePairs);

TYPED_TEST(LoraLinearNonfinite, InfinitiesAndNaNArrive) {
  using Wide = typename TestFixture::Wide;
  using Factor = typename TestFixture::Factor;
  constexpr int64_t rows = TestFixture::rows, cols = TestFixture::cols;
  for (const int64_t rank : {5, 40}) {
    for (const float special : {infinity, -infinity, nan_of_device, signalling_nan}) {
      SCOPED_TRACE(std::to_string(rank) + " " + std::to_string(special));
      std::mt19937 random(5);
      auto wide = mixed<Wide>(rows, cols, random);
      auto A = mixed<Factor>(rank, cols, random), B = mixed<Factor>(cols, rank, random);
      auto skinny = mixed<Factor>(rows, rank, random);
      wide.set(20, 31, special);
      A.set(1, 31, 0.0f);  // times infinity: NaN
      B.set(31, 2, -0.0f);
      skinny.set(20, 3, 0.0f);
      this->check(wide, A, B, skinny);
      A.set(2, 50, -infinity);
      A.set(3, 51, special);
      B.set(60, 1, special);
      skinny.set(9, 2, special);
      skinny.set(11, 3, -special);
      wide.set(12, 50, special);  // meets infinity
      this->check(wide, A, B, skinny);
    }
  }
}

}  // namespace
}  // namespace rankwise::kernels
