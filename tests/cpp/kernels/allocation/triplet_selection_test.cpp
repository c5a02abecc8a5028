// The choice of triplets on the device against a plain one on the host, and the masks.
#include <cuda_model/device.h>
#include <cuda_model/device_memory.h>
#include <cuda_model/schedule.h>
#include <gtest/gtest.h>
#include <kernels/allocation/triplet_selection.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;
using cuda_model::Order;

struct Problem {
  std::vector<double> scores;
  std::vector<int64_t> ranks, costs;
  int64_t budget, min_rank;
};

std::vector<int64_t> offsets_of(const Problem& p) {
  std::vector<int64_t> offsets(p.ranks.size() + 1, 0);
  std::partial_sum(p.ranks.begin(), p.ranks.end(), offsets.begin() + 1);
  return offsets;
}

// As the definition says it: one direction after the other.
std::vector<bool> expected(const Problem& p) {
  std::vector<size_t> adapter, order(p.scores.size());
  for (size_t m = 0; m < p.ranks.size(); ++m) adapter.insert(adapter.end(), p.ranks[m], m);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return p.scores[a] > p.scores[b]; });
  std::vector<bool> kept(order.size(), false);
  std::vector<int64_t> count(p.ranks.size(), 0);
  int64_t budget = p.budget;
  for (const size_t i : order) {
    if (count[adapter[i]] >= p.min_rank) continue;
    kept[i] = true;
    ++count[adapter[i]];
    budget -= p.costs[adapter[i]];
  }
  for (const size_t i : order) {
    if (kept[i] || p.costs[adapter[i]] > budget) continue;
    kept[i] = true;
    budget -= p.costs[adapter[i]];
  }
  return kept;
}

std::vector<bool> selected(const Problem& p) {
  const auto triplets = static_cast<int64_t>(p.scores.size());
  const DeviceArray<double> scores(p.scores);
  const DeviceArray<int64_t> offsets(offsets_of(p)), costs(p.costs), scratch(2 * triplets);
  const DeviceArray<bool> kept(triplets);
  const DeviceArray<Progress> progress(std::vector<Progress>{{.budget = p.budget}});
  int64_t reserved = 0;
  for (size_t m = 0; m < p.ranks.size(); ++m)
    reserved += std::min(p.ranks[m], p.min_rank) * p.costs[m];
  EXPECT_EQ(launch_select_triplets(
                {static_cast<int64_t>(p.ranks.size()), triplets, scores.data(), offsets.data(),
                 costs.data(), *std::min_element(p.costs.begin(), p.costs.end()), reserved,
                 p.min_rank, progress.data(), scratch.data(), kept.data()},
                nullptr),
            0);
  return std::vector<bool>(kept.data(), kept.data() + triplets);
}

Problem random_problem(std::mt19937& random) {
  Problem p{{}, std::vector<int64_t>(1 + random() % 12), {}, 0, 0};
  const bool one_cost = random() % 2 == 0;
  const unsigned values = random() % 3 == 0 ? 4 : 1000000;  // few: ties
  int64_t all = 0;
  for (int64_t& rank : p.ranks) {
    rank = random() % 4 == 0 ? 0 : random() % 40;
    p.costs.push_back(one_cost ? 1 : 1 + random() % 100);
    all += rank * p.costs.back();
    for (int64_t i = 0; i < rank; ++i) p.scores.push_back(random() % values / 1e4);
  }
  p.budget = random() % 8 == 0 ? all : static_cast<int64_t>(random() % (all + 2));
  p.min_rank = random() % 4;
  return p;
}

TEST(TripletSelection, IsThatOfTheDefinition) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    cuda_model::set_schedule({.blocks = Order::shuffled,
                              .threads = Order::shuffled,
                              .warps_run_ahead = round % 2 == 0,
                              .seed = static_cast<uint64_t>(round)});
    const Problem p = random_problem(random);
    ASSERT_EQ(selected(p), expected(p)) << "round " << round;
  }
}

TEST(TripletSelection, ManyTriplets) {
  cuda_model::set_schedule({});
  std::mt19937 random(2);
  Problem p{{}, std::vector<int64_t>(200, 12), {}, 0, 1};
  for (size_t i = 0; i < 2400; ++i) p.scores.push_back(random() % 1000);
  for (size_t m = 0; m < 200; ++m) p.costs.push_back(m % 3 == 0 ? 8192 : 15104);
  for (const int64_t budget : {0, 3000000, 10000000, 40000000}) {
    p.budget = budget;
    EXPECT_EQ(selected(p), expected(p)) << budget;
  }
}

TEST(TripletSelection, EqualScoresAndZerosOfBothSigns) {
  cuda_model::set_schedule({});
  Problem p{std::vector<double>(700, 0.0), {300, 0, 400}, {1, 1, 1}, 350, 2};
  for (size_t i = 0; i < 700; i += 3) p.scores[i] = -0.0;
  const std::vector<bool> kept = selected(p);
  EXPECT_EQ(kept, expected(p));
  EXPECT_EQ(std::count(kept.begin(), kept.end(), true), 350);
}

TEST(TripletSelection, InfiniteScoresComeFirstAndNaNLast) {
  cuda_model::set_schedule({});
  const Problem p{{NAN, -1.0, 2.0, INFINITY, 5e-324}, {5}, {1}, 3, 0};
  EXPECT_EQ(selected(p), (std::vector<bool>{false, false, true, true, true}));
}

TEST(TripletSelection, AStepThatChoosesNothingLeavesThePatternAndTheGates) {
  cuda_model::set_schedule({});
  const DeviceArray<Progress> progress(std::vector<Progress>{{.budget = -1}});
  const std::vector<bool> before = {true, false, true};
  const DeviceArray<double> scores(std::vector<double>{1, 2, 3});
  const DeviceArray<int64_t> offsets(std::vector<int64_t>{0, 3}), costs(std::vector<int64_t>{1});
  const DeviceArray<int64_t> scratch(6);
  const DeviceArray<bool> kept(before);
  ASSERT_EQ(launch_select_triplets({1, 3, scores.data(), offsets.data(), costs.data(), 1, 1, 1,
                                    progress.data(), scratch.data(), kept.data()},
                                   nullptr),
            0);
  EXPECT_EQ(std::vector<bool>(kept.data(), kept.data() + 3), before);
  const DeviceArray<float> E(std::vector<float>{1, 2, 3});
  const DeviceArray<MaskEntry> entries(std::vector<MaskEntry>{{E.data(), 1, 3, 0, 4}});
  ASSERT_EQ(launch_mask_triplets(entries.data(), 1, kept.data(), progress.data(), nullptr), 0);
  EXPECT_EQ(std::vector<float>(E.data(), E.data() + 3), (std::vector<float>{1, 2, 3}));
}

TEST(TripletSelection, Nothing) {
  EXPECT_EQ(launch_select_triplets({}, nullptr), 0);
  EXPECT_EQ(launch_mask_triplets(nullptr, 0, nullptr, nullptr, nullptr), 0);
}

template <typename T>
class TripletMasks : public testing::Test {};
using Elements = testing::Types<double, float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(TripletMasks, Elements);

TYPED_TEST(TripletMasks, SetWhatIsNotKeptToZero) {
  cuda_model::set_schedule({});
  const std::vector<int64_t> ranks = {3, 0, 150, 1}, strides = {1, 1, 3, 1};
  std::mt19937 random(4);
  std::vector<DeviceArray<TypeParam>> tensors;
  std::vector<MaskEntry> entries;
  int64_t first = 0;
  for (size_t m = 0; m < ranks.size(); ++m) {
    tensors.emplace_back(std::vector<TypeParam>((ranks[m] + 1) * strides[m], TypeParam(1.5f)));
    entries.push_back({tensors[m].data(), strides[m], ranks[m], first, sizeof(TypeParam)});
    first += ranks[m];
  }
  const DeviceArray<bool> kept(first);
  for (int64_t i = 0; i < first; ++i) kept[i] = random() % 2;
  const DeviceArray<MaskEntry> table(entries);
  const DeviceArray<Progress> progress(std::vector<Progress>{{.budget = 0}});
  ASSERT_EQ(launch_mask_triplets(table.data(), 4, kept.data(), progress.data(), nullptr), 0);
  for (size_t m = 0; m < ranks.size(); ++m) {
    for (size_t i = 0; i < tensors[m].size(); ++i) {
      const auto direction = static_cast<int64_t>(i) / strides[m];
      const bool masked = static_cast<int64_t>(i) % strides[m] == 0 && direction < ranks[m] &&
                          !kept[entries[m].first + direction];
      EXPECT_EQ(static_cast<float>(tensors[m][i]), masked ? 0.0f : 1.5f) << m << " " << i;
    }
  }
}

}  // namespace
}  // namespace rankwise::kernels
