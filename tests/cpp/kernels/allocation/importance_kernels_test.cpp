// The importance passes' kernels: averages with the bits of importance.h, scores against sums in
// long double.
#include <cuda_model/device_memory.h>
#include <cuda_model/schedule.h>
#include <gtest/gtest.h>
#include <kernels/allocation/importance.h>
#include <kernels/allocation/importance_kernels.h>

#include <cmath>
#include <cstring>
#include <random>

#include "../elements.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;
using cuda_model::Order;
using cuda_model::Schedule;

template <typename T>
DeviceArray<T> random_array(int64_t count, std::mt19937& random, bool positive = false) {
  std::normal_distribution<double> normal;
  DeviceArray<T> values(count);
  for (int64_t i = 0; i < count; ++i) {
    const double value = random() % 8 == 0 ? 0.0 : normal(random);
    values[i] = element<T>(positive ? std::fabs(value) : value);
  }
  return values;
}

template <typename T>
std::vector<unsigned char> bytes_of(const DeviceArray<T>& array) {
  const auto* first = reinterpret_cast<const unsigned char*>(array.data());
  return {first, first + array.size() * sizeof(T)};
}

std::vector<unsigned char> bytes_of(const std::vector<double>& values) {
  const auto* first = reinterpret_cast<const unsigned char*>(values.data());
  return {first, first + values.size() * sizeof(double)};
}

constexpr double beta1 = 0.85, beta2 = 0.8;

// A [capacity, in], B [out, capacity] or E [1, capacity], with what the averages shall become.
template <typename Stored>
struct Factor {
  using T = Wide<Stored>;
  int64_t rows, cols;
  bool directions_are_rows, has_gradient;
  DeviceArray<Stored> parameter, gradient;
  DeviceArray<T> sensitivity, uncertainty;
  std::vector<T> next_sensitivity, next_uncertainty;

  Factor(int64_t rows_, int64_t cols_, bool directions_are_rows_, std::mt19937& random)
      : rows(rows_),
        cols(cols_),
        directions_are_rows(directions_are_rows_),
        has_gradient(random() % 5 != 0),
        parameter(random_array<Stored>(rows * cols, random)),
        gradient(random_array<Stored>(rows * cols, random)),
        sensitivity(random_array<T>(rows * cols, random, true)),
        uncertainty(random_array<T>(rows * cols, random, true)) {
    if (rows * cols > 2) {  // the products overflow and underflow
      parameter[0] = gradient[0] = element<Stored>(sizeof(Stored) == 2 ? 6e4 : 1e30);
      parameter[1] = gradient[1] = element<Stored>(1e-30);
    }
    const Decay<T> decay(beta1, beta2);
    for (int64_t i = 0; i < rows * cols; ++i) {
      T s = sensitivity[i], u = uncertainty[i];
      if (has_gradient) {
        update_importance(static_cast<T>(parameter[i]), static_cast<T>(gradient[i]), decay, s, u);
      }
      next_sensitivity.push_back(s);
      next_uncertainty.push_back(u);
    }
  }

  FactorEntry entry() const {
    return {parameter.data(),
            has_gradient ? gradient.data() : nullptr,
            sensitivity.data(),
            uncertainty.data(),
            rows,
            cols,
            element_type_of<Stored>,
            directions_are_rows};
  }

  // The mean over a direction of s(w), of E its one element.
  long double mean(int64_t direction) const {
    const int64_t count = directions_are_rows ? cols : rows;
    long double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = directions_are_rows ? direction * cols + i : i * cols + direction;
      sum += static_cast<long double>(next_sensitivity[at]) * next_uncertainty[at];
    }
    return sum / static_cast<long double>(count);
  }
};

struct Shape {
  int64_t in, out, capacity, rank;
};

template <typename Stored>
class Adapters {
 public:
  Adapters(const std::vector<Shape>& shapes, uint32_t seed) : random_(seed), shapes_(shapes) {
    for (const auto& [in, out, capacity, rank] : shapes) {
      factors_.emplace_back(capacity, in, true, random_);
      factors_.emplace_back(out, capacity, false, random_);
      factors_.emplace_back(1, capacity, false, random_);
    }
  }

  // One step; the scores.
  std::vector<double> step(bool score, const Progress* progress = nullptr) {
    std::vector<FactorEntry> entries;
    for (const auto& factor : factors_) entries.push_back(factor.entry());
    const auto count = static_cast<int64_t>(entries.size());
    const FactorBlocks blocks = lay_out(entries.data(), count);
    std::vector<int64_t> offsets = {0};
    for (const Shape& shape : shapes_) offsets.push_back(offsets.back() + shape.rank);
    const DeviceArray<FactorEntry> table(entries);
    const DeviceArray<int64_t> firsts(offsets);
    const DeviceArray<double> partials(blocks.partials), scores(offsets.back());
    double* const parts = score ? partials.data() : nullptr;
    EXPECT_EQ(launch_importance_step(
                  {table.data(), count, blocks.blocks, beta1, beta2, progress, parts}, nullptr),
              0);
    if (!score) return {};
    EXPECT_EQ(
        launch_importance_scores(table.data(), firsts.data(), static_cast<int64_t>(shapes_.size()),
                                 progress, parts, scores.data(), nullptr),
        0);
    return {scores.data(), scores.data() + scores.size()};
  }

  void expect_averages() const {
    for (size_t f = 0; f < factors_.size(); ++f) {
      const auto& factor = factors_[f];
      const size_t bytes = factor.sensitivity.size() * sizeof(factor.sensitivity[0]);
      if (bytes == 0) continue;  // no pointers, which memcmp must have
      EXPECT_EQ(std::memcmp(factor.sensitivity.data(), factor.next_sensitivity.data(), bytes), 0)
          << "factor " << f;
      EXPECT_EQ(std::memcmp(factor.uncertainty.data(), factor.next_uncertainty.data(), bytes), 0)
          << "factor " << f;
    }
  }

  void expect_scores(const std::vector<double>& scores) const {
    size_t at = 0;
    for (size_t m = 0; m < shapes_.size(); ++m) {
      for (int64_t i = 0; i < shapes_[m].rank; ++i, ++at) {
        const auto expected = static_cast<double>(
            factors_[3 * m].mean(i) + factors_[3 * m + 1].mean(i) + factors_[3 * m + 2].mean(i));
        ASSERT_NEAR(scores[at], expected, 1e-13 * expected) << "adapter " << m << ", " << i;
      }
    }
    ASSERT_EQ(at, scores.size());
  }

  std::vector<unsigned char> state() const {
    std::vector<unsigned char> all;
    for (const auto& factor : factors_) {
      for (const auto& bytes : {bytes_of(factor.sensitivity), bytes_of(factor.uncertainty)})
        all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  }

 private:
  std::mt19937 random_;
  std::vector<Shape> shapes_;
  std::vector<Factor<Stored>> factors_;
};

const std::vector<Shape> mixed = {{7, 5, 3, 3},      {33, 1, 4, 2},        {1, 17, 1, 1},
                                  {40, 9, 0, 0},     {8200, 70, 5, 5},     {6, 6, 6, 0},
                                  {40, 700, 13, 13}, {255, 257, 256, 255}, {20, 40, 300, 290}};

template <typename T>
class ImportanceKernels : public testing::Test {
 protected:
  void SetUp() override { cuda_model::set_schedule({}); }
};
using Elements = testing::Types<double, float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(ImportanceKernels, Elements);

TYPED_TEST(ImportanceKernels, AveragesHaveTheBitsOfTheDefinition) {
  Adapters<TypeParam> adapters(mixed, 1);
  EXPECT_TRUE(adapters.step(false).empty());
  adapters.expect_averages();
}

TYPED_TEST(ImportanceKernels, ScoresAreTheSumsOverDirections) {
  Adapters<TypeParam> adapters(mixed, 2);
  const std::vector<double> scores = adapters.step(true);
  adapters.expect_averages();
  adapters.expect_scores(scores);
}

TYPED_TEST(ImportanceKernels, RandomShapes) {
  std::mt19937 random(3);
  for (int round = 0; round < 40; ++round) {
    std::vector<Shape> shapes(1 + random() % 4);
    for (auto& [in, out, capacity, rank] : shapes) {
      in = 1 + random() % 90, out = 1 + random() % 90, capacity = random() % 20;
      rank = capacity - (capacity > 0 ? random() % capacity : 0);
    }
    Adapters<TypeParam> adapters(shapes, round);
    const std::vector<double> scores = adapters.step(true);
    adapters.expect_averages();
    adapters.expect_scores(scores);
  }
}

TYPED_TEST(ImportanceKernels, ProgressSaysWhatAStepDoes) {
  Adapters<TypeParam> adapters(mixed, 4);
  const auto before = adapters.state();
  const DeviceArray<Progress> progress(std::vector<Progress>{{.budget = -1, .updates = 0}});
  adapters.step(false, progress.data());  // skipped
  EXPECT_TRUE(adapters.state() == before);
  const auto poison = adapters.step(true, progress.data());
  EXPECT_TRUE(adapters.state() == before);
  progress[0].updates = 1;  // averages alone: the scores are not written
  EXPECT_EQ(bytes_of(adapters.step(true, progress.data())), bytes_of(poison));
  adapters.expect_averages();
}

TYPED_TEST(ImportanceKernels, TheLastChoiceScoresWithoutAnUpdate) {
  Adapters<TypeParam> adapters(mixed, 5);
  const DeviceArray<Progress> progress(std::vector<Progress>{{.budget = 0, .updates = 1}});
  const std::vector<double> scores = adapters.step(true, progress.data());
  adapters.expect_averages();
  progress[0].updates = 0;
  EXPECT_EQ(adapters.step(true, progress.data()), scores);
  adapters.expect_averages();
}

TYPED_TEST(ImportanceKernels, SameBitsUnderEverySchedule) {
  const Schedule schedules[] = {{},
                                {.blocks = Order::backwards, .threads = Order::backwards},
                                {.threads = Order::backwards, .warps_run_ahead = true},
                                {.blocks = Order::shuffled, .threads = Order::shuffled, .seed = 1},
                                {Order::shuffled, Order::shuffled, true, true, 2}};
  std::vector<double> first;
  for (const Schedule& schedule : schedules) {
    cuda_model::set_schedule(schedule);
    Adapters<TypeParam> adapters(mixed, 5);
    const std::vector<double> scores = adapters.step(true);
    adapters.expect_averages();
    if (first.empty()) first = scores;
    EXPECT_EQ(scores, first);
  }
}

TYPED_TEST(ImportanceKernels, ChecksFindOneElement) {
  for (const int64_t count : {1, 255, 257, 8192, 8193, 20000}) {
    const DeviceArray<TypeParam> small(std::vector<TypeParam>(3, element<TypeParam>(0)));
    const DeviceArray<TypeParam> large(std::vector<TypeParam>(count, element<TypeParam>(-0.0)));
    const DeviceArray<float> other(std::vector<float>(9, 0.0f));
    std::vector<GradientEntry> entries = {{small.data(), 3, element_type_of<TypeParam>},
                                          {nullptr, 0, element_type_of<TypeParam>},
                                          {large.data(), count, element_type_of<TypeParam>},
                                          {other.data(), 9, ElementType::float32}};
    const int64_t blocks = lay_out(entries.data(), 4);
    const DeviceArray<GradientEntry> table(entries);
    const auto facts = [&] {
      const DeviceArray<bool> found(std::vector<bool>{false, false});
      EXPECT_EQ(launch_importance_check(table.data(), 4, blocks, found.data(), nullptr), 0);
      return std::pair(found[0], found[1]);
    };
    EXPECT_EQ(facts(), std::pair(false, false));
    for (const int64_t at : {int64_t{0}, count / 2, count - 1}) {
      large[at] = element<TypeParam>(-1e-7);
      EXPECT_EQ(facts(), std::pair(false, true)) << at;
      for (const double bad : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
        large[at] = element<TypeParam>(bad);
        EXPECT_EQ(facts(), std::pair(true, true)) << at << " " << bad;
      }
      large[at] = element<TypeParam>(0);
    }
    other[8] = INFINITY;
    EXPECT_EQ(facts(), std::pair(true, true));
  }
}

TEST(ImportanceKernelsEmpty, NothingIsLaunched) {
  EXPECT_EQ(launch_importance_check(nullptr, 0, lay_out(static_cast<GradientEntry*>(nullptr), 0),
                                    nullptr, nullptr),
            0);
  EXPECT_EQ(launch_importance_step({nullptr, 0, 0, beta1, beta2, nullptr, nullptr}, nullptr), 0);
  EXPECT_EQ(launch_importance_scores(nullptr, nullptr, 0, nullptr, nullptr, nullptr, nullptr), 0);
}

}  // namespace
}  // namespace rankwise::kernels
