// The schedule's and the history's kernels against plain loops on the host.
#include <cuda_model/device.h>
#include <cuda_model/device_memory.h>
#include <cuda_model/schedule.h>
#include <gtest/gtest.h>
#include <kernels/allocation/progress_kernels.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "../elements.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;
using cuda_model::Order;

std::vector<int64_t> fields(const Progress& p) {
  return {p.steps, p.skipped_steps, p.budget, p.updates, p.zeros, p.recorded};
}

// A training whose steps are skipped at random, beside a schedule that the host keeps.
TEST(ScheduleStep, FollowsTheHostsCount) {
  cuda_model::set_schedule({});
  std::mt19937 random(1);
  constexpr int64_t freeze_step = 40;
  std::vector<int64_t> budgets;
  for (int64_t t = 0; t <= freeze_step; ++t) budgets.push_back(t % 3 == 1 ? 90 - t : -1);
  const DeviceArray<int64_t> table(budgets);
  Progress expected{.recorded = 5};
  const DeviceArray<Progress> now(std::vector<Progress>{expected}), next(1);
  for (int call = 0; call < 200; ++call) {
    const bool bad = random() % 4 == 0, zero = random() % 16 == 0, left_out = random() % 4 == 0;
    const bool checked = random() % 4 != 0, told = random() % 2 == 0;
    const DeviceArray<bool> found(std::vector<bool>{bad, !zero});
    const DeviceArray<float> inf(std::vector<float>{left_out ? (random() % 2 ? 1.0f : NAN) : 0.0f});
    expected.budget = -1;
    expected.updates = 0;
    if ((checked && bad) || (told && left_out)) {
      ++expected.skipped_steps;
    } else {
      ++expected.steps;
      expected.budget = budgets[std::min(expected.steps, freeze_step)];
      expected.updates = expected.steps < freeze_step ? 1 : 0;
      if (checked && zero) expected.zeros = 1;
    }
    ASSERT_EQ(launch_schedule_step(
                  {now.data(), checked ? found.data() : nullptr, told ? inf.data() : nullptr,
                   ElementType::float32, table.data(), freeze_step + 1, freeze_step, next.data()},
                  nullptr),
              0);
    ASSERT_EQ(fields(next[0]), fields(expected)) << call;
    now[0] = next[0];
  }
  EXPECT_GT(expected.steps, freeze_step);
}

template <typename T>
class FoundInf : public testing::Test {};
using Elements = testing::Types<double, float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(FoundInf, Elements);

TYPED_TEST(FoundInf, OfEveryType) {
  cuda_model::set_schedule({});
  const DeviceArray<int64_t> budgets(std::vector<int64_t>{-1, -1});
  const DeviceArray<Progress> now(std::vector<Progress>{{}}), next(1);
  for (const double value : {0.0, -0.0, 1.0, -3.0, HUGE_VAL, 1e-7}) {
    const DeviceArray<TypeParam> inf(std::vector<TypeParam>{element<TypeParam>(value)});
    ASSERT_EQ(launch_schedule_step({now.data(), nullptr, inf.data(), element_type_of<TypeParam>,
                                    budgets.data(), 2, 9, next.data()},
                                   nullptr),
              0);
    EXPECT_EQ(next[0].skipped_steps, value != 0) << value;
    EXPECT_EQ(next[0].steps, value == 0) << value;
  }
}

struct History {
  std::vector<int64_t> choices;
  std::vector<double> summaries;
};

// What one more choice makes of the history, as the definition says it.
void record(History& history, const std::vector<int64_t>& offsets, int64_t step, int64_t budget,
            const std::vector<double>& scores, const std::vector<bool>& kept, int64_t freeze_step) {
  const size_t width = offsets.size() + 1;
  std::vector<int64_t> row = {step, budget};
  for (size_t m = 0; m + 1 < offsets.size(); ++m)
    row.push_back(std::count(kept.begin() + offsets[m], kept.begin() + offsets[m + 1], true));
  auto& all = history.choices;
  if (!all.empty() && step != freeze_step &&
      std::equal(row.begin() + 1, row.end(), all.end() - static_cast<int64_t>(width) + 1)) {
    return;
  }
  all.insert(all.end(), row.begin(), row.end());
  double mean = 0, largest = 0, lowest = NAN, highest = NAN;
  for (size_t i = 0; i < scores.size(); ++i) {
    mean += scores[i] / static_cast<double>(scores.size());
    largest = std::max(largest, scores[i]);
    if (kept[i]) lowest = std::fmin(lowest, scores[i]);
    if (!kept[i]) highest = std::fmax(highest, scores[i]);
  }
  for (const double number : {mean, largest, lowest, highest}) history.summaries.push_back(number);
}

TEST(RecordChoice, IsTheHostsHistory) {
  std::mt19937 random(2);
  for (int round = 0; round < 60; ++round) {
    cuda_model::set_schedule({.blocks = Order::shuffled,
                              .threads = Order::shuffled,
                              .warps_run_ahead = round % 2 == 0,
                              .seed = static_cast<uint64_t>(round)});
    std::vector<int64_t> offsets = {0};
    const size_t adapters = 1 + random() % (round % 10 == 0 ? 300 : 9);
    for (size_t m = 0; m < adapters; ++m) offsets.push_back(offsets.back() + random() % 14);
    const int64_t n = offsets.back(), width = static_cast<int64_t>(adapters) + 2, steps = 8;
    const DeviceArray<int64_t> table(offsets), choices(steps * width);
    const DeviceArray<double> summaries(steps * 4);
    const DeviceArray<Progress> progress(std::vector<Progress>{{}});
    std::vector<bool> kept(n, true);
    History expected;
    for (int64_t step = 1; step <= steps; ++step) {
      std::vector<double> scores(n);
      for (double& score : scores) score = static_cast<double>(random() % 1000) / 7;
      if (random() % 2 == 0)
        for (int64_t i = 0; i < n; ++i) kept[i] = random() % 3 != 0;
      progress[0].steps = step;
      progress[0].budget = random() % 4 == 0 ? -1 : static_cast<int64_t>(random() % 3);
      if (progress[0].budget >= 0)
        record(expected, offsets, step, progress[0].budget, scores, kept, steps);
      const DeviceArray<double> given(scores);
      const DeviceArray<bool> keep(kept);
      ASSERT_EQ(launch_record_choice(
                    {static_cast<int64_t>(adapters), n, given.data(), keep.data(), table.data(),
                     steps, progress.data(), choices.data(), summaries.data()},
                    nullptr),
                0);
      ASSERT_EQ(progress[0].recorded * width, static_cast<int64_t>(expected.choices.size()));
    }
    EXPECT_EQ(std::vector<int64_t>(choices.data(), choices.data() + expected.choices.size()),
              expected.choices)
        << round;
    EXPECT_EQ(std::memcmp(summaries.data(), expected.summaries.data(),
                          expected.summaries.size() * sizeof(double)),
              0)
        << round;
  }
}

}  // namespace
}  // namespace rankwise::kernels
