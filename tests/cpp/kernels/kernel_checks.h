// What the tests of wide kernels share: the bound of an error, the types, the same bits whatever
// order blocks and threads run in.
//
// Bound of an error, for a sum of n terms with absolute values adding to S: rounding the result
// once, u |result|, and float32's own sums, n 2^-23 S (tensor cores round toward zero); the terms
// themselves are exact.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>

#include "matrices.h"

namespace rankwise::kernels {

// Types of wide matrices and of factors.
using TypePairs = testing::Types<std::pair<__nv_bfloat16, __nv_bfloat16>, std::pair<__half, __half>,
                                 std::pair<float, float>, std::pair<__nv_bfloat16, float>,
                                 std::pair<__half, float>>;
struct Expected {
  double value = 0, absolute = 0;  // the sum, and the sum of its terms' absolute values
  void add(double term) {
    value += term;
    absolute += std::fabs(term);
  }
};

// written[i, j] against expected(i, j), a sum of `terms` terms.
template <typename T>
void expect_close(const char* name, const Matrix<T>& written, int64_t terms,
                  const std::function<Expected(int64_t, int64_t)>& expected) {
  const Format format = format_of(type_of<T>);
  double worst = 0;
  std::string where;
  for (int64_t i = 0; i < written.rows; ++i) {
    for (int64_t j = 0; j < written.cols; ++j) {
      const Expected e = expected(i, j);
      const double bound = 1.01 * format.u * std::fabs(e.value) + format.tiny +
                           static_cast<double>(terms + 3) * 0x1p-23 * e.absolute;
      const double error = std::fabs(written.written(i, j) - e.value);
      if (error <= worst * bound) continue;
      worst = std::isnan(error) ? INFINITY : error / bound;
      where = "(" + std::to_string(i) + ", " + std::to_string(j) + "): wrote " +
              std::to_string(written.written(i, j)) + ", wanted " + std::to_string(e.value);
    }
  }
  EXPECT_LE(worst, 1.0) << name << where;
}

inline std::vector<float> gates(int64_t rank, bool gate) {
  std::vector<float> values(rank, 1.0f);
  for (int64_t i = 0; gate && i < rank; ++i) values[i] = static_cast<float>(i % 5) * 0.5f - 1.0f;
  return values;
}

constexpr float scaling = 0.75f;

// Problem(c).everything() writes the same bytes under each schedule.
template <typename Problem, typename Case>
void expect_same_bits_under_every_schedule(const Case& c) {
  using cuda_model::Order;
  const cuda_model::Schedule schedules[] = {
      {},
      {.blocks = Order::backwards, .threads = Order::backwards, .early_copies = true},
      {.threads = Order::forwards, .warps_run_ahead = true, .early_copies = true},
      {.threads = Order::backwards, .warps_run_ahead = true},
      {.blocks = Order::shuffled, .threads = Order::shuffled, .seed = 1},
      {Order::shuffled, Order::shuffled, true, true, 2}};
  std::vector<std::vector<unsigned char>> results;
  for (const cuda_model::Schedule& schedule : schedules) {
    cuda_model::set_schedule(schedule);
    Problem problem(c);
    problem.everything();
    results.push_back(problem.written());
  }
  for (const auto& result : results) EXPECT_TRUE(result == results[0]);
}

}  // namespace rankwise::kernels
