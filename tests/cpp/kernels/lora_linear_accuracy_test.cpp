// Errors of lora_linear's kernels beside those of float32 sums and of PEFT's roundings, on the
// tensor cores of every generation.
#include <cuda_model/tensor_core.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "kernel_checks.h"
#include "lora_linear_calls.h"

namespace rankwise::kernels {
namespace {

class Errors {
 public:
  void add(double error) {
    largest_ = std::max(largest_, std::fabs(error));
    squares_ += error * error;
  }
  double largest() const { return largest_; }
  double sum_of_squares() const { return squares_; }

 private:
  double largest_ = 0, squares_ = 0;
};

// rms and max are how many times the others' errors ours may be.
void expect_at_most(const std::string& name, const Errors& ours, const Errors& others, double rms,
                    double max) {
  const double rms_ratio = std::sqrt(ours.sum_of_squares() / others.sum_of_squares());
  const double max_ratio = ours.largest() / others.largest();
  EXPECT_LE(rms_ratio, rms) << name;
  EXPECT_LE(max_ratio, max) << name;
}

// Runs the body on the tensor cores of each generation.
template <typename Body>
void on_every_tensor_core(const Body& body) {
  cuda_model::set_schedule({});
  for (const auto& core : {cuda_model::sm_90_tensor_core, cuda_model::sm_80_tensor_core}) {
    cuda_model::set_tensor_core(core);
    SCOPED_TRACE(core.products == 16 ? "sm_90" : "sm_80");
    body();
  }
}

// A sum of n exact products a(k) b(k) in float32, the way of a BLAS that divides k: one rounding
// for each product, in runs of 128.
template <typename A, typename B>
float float32_sum(int64_t n, const A& a, const B& b) {
  float total = 0;
  for (int64_t first = 0; first < n; first += 128) {
    float run = 0;
    for (int64_t k = first; k < std::min(first + 128, n); ++k) {
      run = std::fma(static_cast<float>(a(k)), static_cast<float>(b(k)), run);
    }
    total += run;
  }
  return total;
}

// Float32 results [i, j] that are sums of `n` products a(i, k) b(j, k).
template <typename A, typename B>
void expect_errors_of_float32(const std::string& name, const Matrix<float>& written, int64_t n,
                              const A& a, const B& b) {
  Errors ours, plain;
  for (int64_t i = 0; i < written.rows; ++i) {
    for (int64_t j = 0; j < written.cols; ++j) {
      double exact = 0;
      for (int64_t k = 0; k < n; ++k) exact += a(i, k) * b(j, k);
      const auto of_i = [&](int64_t k) { return a(i, k); };
      const auto of_j = [&](int64_t k) { return b(j, k); };
      ours.add(written.written(i, j) - exact);
      plain.add(float32_sum(n, of_i, of_j) - exact);
    }
  }
  expect_at_most(name, ours, plain, 1.001, 1.01);
}

template <typename Wide>
class Float32Factors : public testing::Test {
 protected:
  static constexpr int64_t few = 64, many = 1024;

  static void check(int64_t rank) {
    SCOPED_TRACE(rank);
    std::mt19937 random(static_cast<uint32_t>(rank));
    const std::string of_rank = "_" + std::to_string(rank);
    const auto broad = Matrix<Wide>::random(few, many, random);
    const auto tall = Matrix<Wide>::random(many, few, random);
    const auto A = Matrix<float>::random(rank, many, random);
    const auto B = Matrix<float>::random(many, rank, random);
    const auto few_B = Matrix<float>::random(few, rank, random);
    const auto of_few = Matrix<float>::random(few, rank, random);
    const auto of_many = Matrix<float>::random(many, rank, random);
    const auto at = [](const auto& m) { return [&m](int64_t i, int64_t k) { return m.at(i, k); }; };
    const auto by_column = [](const auto& m) {
      return [&m](int64_t i, int64_t k) { return m.at(k, i); };
    };
    on_every_tensor_core([&] {
      expect_errors_of_float32("hidden" + of_rank, shrunk(broad, A), many, at(broad), at(A));
      expect_errors_of_float32("dh" + of_rank, output_gradients(broad, B, of_few).dh, many,
                               at(broad), by_column(B));
      expect_errors_of_float32("dB" + of_rank, output_gradients(tall, few_B, of_many).dB, many,
                               by_column(tall), by_column(of_many));
      expect_errors_of_float32("dA" + of_rank, input_factor_gradient(tall, of_many), many,
                               by_column(of_many), by_column(tall));
    });
  }
};

using WideTypes = testing::Types<float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(Float32Factors, WideTypes);

TYPED_TEST(Float32Factors, LongSumsAreNoWorseThanFloat32s) {
  this->check(16);
  this->check(20);
}

// Sums over the directions, of which there may be many.
TEST(Float32Accuracy, ExpandedRowsAreNoWorseThanFloat32s) {
  for (const int64_t rank : {1, 2, 4, 8, 16, 64, 200}) {
    SCOPED_TRACE(rank);
    std::mt19937 random(static_cast<uint32_t>(rank));
    const auto hidden = Matrix<float>::random(140, rank, random);
    const auto A = Matrix<float>::random(rank, 130, random);
    const auto B = Matrix<float>::random(130, rank, random);
    const auto at = [](const auto& m) { return [&m](int64_t i, int64_t k) { return m.at(i, k); }; };
    on_every_tensor_core([&] {
      expect_errors_of_float32("y", expanded<float>(hidden, B, true, 1.0f), rank, at(hidden),
                               at(B));
      expect_errors_of_float32("dx", expanded<float>(hidden, A, false, 1.0f), rank, at(hidden),
                               [&](int64_t j, int64_t k) { return A.at(k, j); });
    });
  }
}

template <typename Wide>
class Float32FactorsOver16Bits : public testing::Test {};

using NarrowTypes = testing::Types<__nv_bfloat16, __half>;
TYPED_TEST_SUITE(Float32FactorsOver16Bits, NarrowTypes);

// PEFT's layer has the base product with its bias in 16 bits, adds the LoRA term in float32 to it,
// and rounds.
TYPED_TEST(Float32FactorsOver16Bits, OutputIsNoWorseThanPefts) {
  constexpr int64_t rows = 256, cols = 512;
  for (const int64_t rank : {8, 40}) {
    for (const float scale : {0.5f, 4.0f}) {  // of the LoRA term beside the base's
      SCOPED_TRACE(std::to_string(rank) + " " + std::to_string(scale));
      std::mt19937 random(static_cast<uint32_t>(rank));
      const float of_sum = scale / std::sqrt(static_cast<float>(rank));
      const auto hidden = Matrix<float>::random(rows, rank, random);
      const auto B = Matrix<float>::random(cols, rank, random);
      const auto product = Matrix<float>::random(rows, cols, random);
      const auto bias = Matrix<TypeParam>::random(1, cols, random);
      Matrix<TypeParam> base(rows, cols);
      const auto on_base = [&](int64_t i, int64_t j) { return product.at(i, j) + bias.at(0, j); };
      for (int64_t i = 0; i < rows * cols; ++i) {
        base.memory[i] = TypeParam(static_cast<float>(on_base(i / cols, i % cols)));
      }
      on_every_tensor_core([&] {
        auto y = Matrix<TypeParam>(rows, cols);
        for (int64_t i = 0; i < rows * cols; ++i) y.memory[i] = base.memory[i];
        add_expanded(y, hidden, B, of_sum);
        Errors ours, pefts;
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < cols; ++j) {
            const auto of_i = [&](int64_t k) { return hidden.at(i, k); };
            const auto of_j = [&](int64_t k) { return B.at(j, k); };
            double exact = on_base(i, j);
            for (int64_t k = 0; k < rank; ++k) exact += of_sum * of_i(k) * of_j(k);
            const float term = of_sum * float32_sum(rank, of_i, of_j);
            const auto peft = TypeParam(static_cast<float>(base.written(i, j)) + term);
            ours.add(y.written(i, j) - exact);
            pefts.add(static_cast<float>(peft) - exact);
          }
        }
        expect_at_most("y", ours, pefts, 1.001, 1.01);
      });
    }
  }
}

}  // namespace
}  // namespace rankwise::kernels
