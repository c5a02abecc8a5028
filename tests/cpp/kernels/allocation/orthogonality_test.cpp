// The orthogonality penalty's kernels against sums in long double.
#include <cuda_model/device_memory.h>
#include <cuda_model/schedule.h>
#include <gtest/gtest.h>
#include <kernels/allocation/orthogonality.h>

#include <cmath>
#include <random>

#include "../elements.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;
using cuda_model::Order;
using cuda_model::Schedule;

// The largest relative error of one rounding to the type.
template <typename T>
constexpr double rounding = std::is_same_v<T, double>          ? 0x1p-53
                            : std::is_same_v<T, float>         ? 0x1p-24
                            : std::is_same_v<T, __nv_bfloat16> ? 0x1p-8
                                                               : 0x1p-11;

// Half the least number of the type above zero, where that is not tiny.
template <typename T>
constexpr double least = std::is_same_v<T, __half> ? 0x1p-25 : 0;

struct Shape {
  int64_t rank, capacity, features;
  bool directions_are_rows = true;
  int64_t gap = 0;  // elements between a factor's rows beyond its columns
};

// A factor and what its penalty and gradient shall be.
template <typename T>
struct Factor {
  Shape shape;
  int64_t direction_stride, feature_stride;
  DeviceArray<T> data, gradient;
  std::vector<long double> deviation;  // [rank, rank]
  long double squares = 0;

  Factor(const Shape& s, std::mt19937& random)
      : shape(s),
        direction_stride(s.directions_are_rows ? s.features + s.gap : 1),
        feature_stride(s.directions_are_rows ? 1 : s.capacity + s.gap),
        data(s.capacity * s.features == 0
                 ? 0
                 : (s.capacity - 1) * direction_stride + (s.features - 1) * feature_stride + 1),
        gradient(s.capacity * s.features),
        deviation(s.rank * s.rank) {
    std::normal_distribution<double> normal(0, 1 / std::sqrt(static_cast<double>(s.features + 1)));
    for (int64_t i = 0; i < s.capacity; ++i)
      for (int64_t j = 0; j < s.features; ++j) data[at(i, j)] = element<T>(normal(random));
    for (int64_t i = 0; i < s.rank; ++i) {
      for (int64_t k = 0; k < s.rank; ++k) {
        long double sum = i == k ? -1 : 0;
        for (int64_t j = 0; j < s.features; ++j)
          sum += static_cast<long double>(value(i, j)) * value(k, j);
        deviation[i * s.rank + k] = sum;
        squares += sum * sum;
      }
    }
  }

  int64_t at(int64_t i, int64_t j) const { return i * direction_stride + j * feature_stride; }
  double value(int64_t i, int64_t j) const { return number(data[at(i, j)]); }
  double written(int64_t i, int64_t j) const {
    return number(
        gradient[shape.directions_are_rows ? i * shape.features + j : j * shape.capacity + i]);
  }

  OrthogonalityEntry entry() const {
    return {data.data(),      shape.rank,     shape.capacity,  shape.features,
            direction_stride, feature_stride, gradient.data(), shape.directions_are_rows};
  }

  // The gradient, of which every number is weight * sum_k D_ik F_kj.
  void expect_gradient(long double weight) const {
    const double unit = std::is_same_v<T, double> ? 0x1p-52 : 0x1p-23;
    const auto terms = static_cast<double>(shape.rank + shape.features + 8);
    for (int64_t i = 0; i < shape.capacity; ++i) {
      for (int64_t j = 0; j < shape.features; ++j) {
        if (i >= shape.rank) {
          ASSERT_EQ(written(i, j), 0) << "inactive direction " << i << ", " << j;
          continue;
        }
        long double sum = 0, absolute = 0;
        for (int64_t k = 0; k < shape.rank; ++k) {
          sum += deviation[i * shape.rank + k] * value(k, j);
          absolute += (std::fabs(deviation[i * shape.rank + k]) + 2) * std::fabs(value(k, j));
        }
        const long double relative = 1.01L * rounding<T> * std::fabs(sum) + unit * terms * absolute;
        const auto bound = static_cast<double>(std::fabs(weight) * relative) + least<T>;
        ASSERT_NEAR(written(i, j), static_cast<double>(weight * sum), bound)
            << "rank " << shape.rank << ", features " << shape.features << ": " << i << ", " << j;
      }
    }
  }
};

template <typename T>
class Penalty {
 public:
  Penalty(const std::vector<Shape>& shapes, bool squared, uint32_t seed = 1) : squared_(squared) {
    std::mt19937 random(seed);
    for (const Shape& shape : shapes) factors_.emplace_back(shape, random);
    for (const auto& factor : factors_) entries_.push_back(factor.entry());
    blocks_ = lay_out(entries_.data(), count());
  }

  // All bits that the kernels wrote.
  std::vector<unsigned char> run() {
    const DeviceArray<OrthogonalityEntry> table(entries_);
    const DeviceArray<Wide<T>> value(1);
    const DeviceArray<Wide<T>> grad_output(std::vector<Wide<T>>{grad});
    for (const bool backward : {false, true}) {
      const DeviceArray<Wide<T>> deviations(blocks_.sums);
      const DeviceArray<double> terms(count());
      const Orthogonality p{table.data(), count(),           blocks_,     element_type_of<T>,
                            squared_,     deviations.data(), terms.data()};
      EXPECT_EQ(backward ? launch_orthogonality_gradient(p, grad_output.data(), nullptr)
                         : launch_orthogonality_penalty(p, value.data(), nullptr),
                0);
    }
    value_ = value[0];
    std::vector<unsigned char> bytes;
    const auto keep = [&](const void* data, size_t size) {
      const auto* first = static_cast<const unsigned char*>(data);
      bytes.insert(bytes.end(), first, first + size);
    };
    keep(value.data(), sizeof(Wide<T>));
    for (const auto& f : factors_) keep(f.gradient.data(), f.gradient.size() * sizeof(T));
    return bytes;
  }

  void expect_right() const {
    long double sum = 0;
    for (const auto& f : factors_) sum += squared_ ? f.squares : std::sqrt(f.squares);
    const auto expected = static_cast<double>(squared_ ? sum : sum / count());
    EXPECT_NEAR(value_, expected, (std::is_same_v<T, double> ? 1e-13 : 2e-5) * expected);
    for (const auto& f : factors_) {
      const long double norm = std::sqrt(f.squares);
      f.expect_gradient(squared_ ? 4.0L * grad : norm == 0 ? 0.0L : 2.0L * grad / count() / norm);
    }
  }

  static constexpr auto grad = static_cast<Wide<T>>(0.75);

 private:
  int64_t count() const { return static_cast<int64_t>(entries_.size()); }

  bool squared_;
  std::vector<Factor<T>> factors_;
  std::vector<OrthogonalityEntry> entries_;
  OrthogonalityBlocks blocks_;
  double value_ = 0;
};

const std::vector<Shape> mixed = {
    {3, 3, 7}, {0, 4, 9}, {5, 8, 65, false}, {16, 16, 64, false, 3}, {17, 20, 130, true, 5},
    {1, 1, 1}, {2, 2, 0}, {0, 0, 5},         {40, 41, 33, false}};

template <typename T>
class OrthogonalityKernels : public testing::Test {
 protected:
  void SetUp() override { cuda_model::set_schedule({}); }
  static void check(const std::vector<Shape>& shapes, uint32_t seed = 1) {
    for (const bool squared : {false, true}) {
      Penalty<T> penalty(shapes, squared, seed);
      penalty.run();
      penalty.expect_right();
    }
  }
};
using Elements = testing::Types<double, float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(OrthogonalityKernels, Elements);

TYPED_TEST(OrthogonalityKernels, ManyFactorsAtOnce) {
  this->check(mixed);
}

TYPED_TEST(OrthogonalityKernels, RanksAroundTheTiles) {
  for (const int64_t rank : {1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33})
    this->check({{rank, rank + rank % 3, 30, rank % 2 == 0}});
  this->check({{100, 130, 20, false}});
}

TYPED_TEST(OrthogonalityKernels, RandomShapes) {
  std::mt19937 random(6);
  for (uint32_t round = 0; round < 10; ++round) {
    std::vector<Shape> shapes(1 + random() % 6);
    for (Shape& s : shapes) {
      s.capacity = random() % 24;
      s.rank = s.capacity - (s.capacity > 0 ? random() % s.capacity : 0);
      s.features = random() % 140;
      s.directions_are_rows = random() % 2 == 0;
      s.gap = random() % 3;
    }
    this->check(shapes, round);
  }
}

TYPED_TEST(OrthogonalityKernels, OrthogonalRowsHaveNoGradient) {
  std::mt19937 random(1);
  Factor<TypeParam> factor({4, 4, 6}, random);
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 6; ++j) factor.data[factor.at(i, j)] = element<TypeParam>(i == j);
  std::vector<OrthogonalityEntry> entries = {factor.entry()};
  const OrthogonalityBlocks blocks = lay_out(entries.data(), 1);
  const DeviceArray<OrthogonalityEntry> table(entries);
  const DeviceArray<Wide<TypeParam>> deviations(blocks.sums), value(1);
  const DeviceArray<Wide<TypeParam>> grad(std::vector<Wide<TypeParam>>{1});
  const DeviceArray<double> terms(1);
  const Orthogonality p{table.data(),      1,           blocks, element_type_of<TypeParam>, false,
                        deviations.data(), terms.data()};
  ASSERT_EQ(launch_orthogonality_penalty(p, value.data(), nullptr), 0);
  ASSERT_EQ(launch_orthogonality_gradient(p, grad.data(), nullptr), 0);
  EXPECT_EQ(value[0], 0);
  for (int64_t i = 0; i < 24; ++i) EXPECT_EQ(number(factor.gradient[i]), 0);
}

TYPED_TEST(OrthogonalityKernels, SameBitsUnderEverySchedule) {
  const Schedule schedules[] = {{},
                                {.blocks = Order::backwards, .threads = Order::backwards},
                                {.threads = Order::backwards, .warps_run_ahead = true},
                                {.blocks = Order::shuffled, .threads = Order::shuffled, .seed = 1},
                                {Order::shuffled, Order::shuffled, true, true, 2}};
  std::vector<unsigned char> first;
  for (const Schedule& schedule : schedules) {
    cuda_model::set_schedule(schedule);
    Penalty<TypeParam> penalty(mixed, false);
    const std::vector<unsigned char> bits = penalty.run();
    if (first.empty()) first = bits;
    EXPECT_TRUE(bits == first);
  }
}

TEST(OrthogonalityKernelsEmpty, NothingIsLaunched) {
  EXPECT_EQ(launch_orthogonality_penalty({}, nullptr, nullptr), 0);
  EXPECT_EQ(launch_orthogonality_gradient({}, nullptr, nullptr), 0);
}

}  // namespace
}  // namespace rankwise::kernels
