// BudgetSchedule and AdaLoRAOptions: the cubic curve, its edges, and every refused option.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/budget_schedule.h>

#include <limits>
#include <stdexcept>

namespace {

using rankwise::AdaLoRAOptions;
using rankwise::BudgetSchedule;

AdaLoRAOptions options() {
  return AdaLoRAOptions().total_steps(100).warmup_steps(10).final_steps(20).allocation_interval(7);
}

TEST(BudgetSchedule, IsConstantOutsideOfTheWindow) {
  const BudgetSchedule schedule(120, 40, options());
  for (const int64_t step : {0, 1, 10}) EXPECT_EQ(schedule.budget(step), 120) << step;
  for (const int64_t step : {80, 81, 100, 1000}) EXPECT_EQ(schedule.budget(step), 40) << step;
}

TEST(BudgetSchedule, FallsAsTheCubeOfWhatRemains) {
  const BudgetSchedule schedule(120, 40, options());
  EXPECT_EQ(schedule.budget(45), 40 + 80 / 8);  // half of the window is left
  EXPECT_EQ(schedule.budget(11), 116);          // 40 + 80 (69/70)^3 = 116.6
  for (int64_t step = 10; step < 80; ++step)
    EXPECT_GE(schedule.budget(step), schedule.budget(step + 1)) << step;
}

TEST(BudgetSchedule, AllocatesEveryIntervalAndAtTheFreeze) {
  const BudgetSchedule schedule(120, 40, options());
  for (int64_t step = 0; step <= 120; ++step) {
    const bool expected = (step > 10 && step < 80 && step % 7 == 0) || step == 80;
    EXPECT_EQ(schedule.allocates(step), expected) << step;
  }
}

TEST(BudgetSchedule, AllocatesNothingInTheWarmup) {
  const BudgetSchedule schedule(120, 40, options().warmup_steps(14));
  for (int64_t step = 0; step <= 14; ++step) EXPECT_FALSE(schedule.allocates(step)) << step;
  EXPECT_TRUE(schedule.allocates(21));
}

TEST(BudgetSchedule, KeepsAnEqualBudget) {
  const BudgetSchedule schedule(40, 40, options());
  for (int64_t step = 0; step <= 100; ++step) EXPECT_EQ(schedule.budget(step), 40) << step;
}

void expect_refused(const AdaLoRAOptions& wrong, const std::string& message) {
  try {
    BudgetSchedule(120, 40, wrong);
    FAIL() << "accepted; expected: " << message;
  } catch (const std::invalid_argument& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr(message));
  }
}

TEST(AdaLoRAOptions, RefusesEachWrongOption) {
  expect_refused(options().initial_rank(0).target_rank(0),
                 "initial_rank must be at least 1, got 0");
  expect_refused(options().target_rank(13), "target_rank must be from 0 to initial_rank 12");
  expect_refused(options().target_rank(-1), "got -1");
  expect_refused(options().total_steps(0), "total_steps must be");
  expect_refused(options().warmup_steps(-1), "warmup_steps must be at least 0, got -1");
  expect_refused(options().final_steps(-5), "final_steps must be at least 0, got -5");
  expect_refused(options().warmup_steps(80), "got 80 + 20");
  expect_refused(options().final_steps(std::numeric_limits<int64_t>::max()), "must be less than");
  expect_refused(options().allocation_interval(0), "allocation_interval must be at least 1, got 0");
  expect_refused(options().beta1(1.0), "beta1 must be in [0, 1), got 1");
  expect_refused(options().beta2(-0.1), "beta2 must be in [0, 1), got -0.1");
  expect_refused(options().beta2(std::numeric_limits<double>::quiet_NaN()), "got nan");
  expect_refused(options().min_rank(9), "min_rank must be from 0 to target_rank 8, got 9");
}

TEST(AdaLoRAOptions, AcceptTheLeastAndTheMost) {
  const auto least = AdaLoRAOptions().initial_rank(1).target_rank(0).total_steps(1).warmup_steps(0);
  EXPECT_NO_THROW(BudgetSchedule(
      1, 0, AdaLoRAOptions(least).final_steps(0).allocation_interval(1).beta1(0).beta2(0)));
  EXPECT_NO_THROW(BudgetSchedule(120, 40, options().target_rank(12).min_rank(12)));
  EXPECT_NO_THROW(BudgetSchedule(120, 40, options().final_steps(89)));
}

TEST(BudgetSchedule, RefusesABudgetThatGrows) {
  EXPECT_THROW(BudgetSchedule(40, 41, options()), std::invalid_argument);
  EXPECT_THROW(BudgetSchedule(40, -1, options()), std::invalid_argument);
}

}  // namespace
