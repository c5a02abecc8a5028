// The kernel's own source with one instruction at a time that does not do its part: every fault is
// seen, by the model's rules or in the numbers.
#include <cuda_model/hopper.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

namespace rankwise::kernels {
namespace {

enum class Fault {
  none,
  early_release,
  operands_not_awaited,
  stage_not_awaited,
  sums_not_awaited,
  result_not_awaited,
  no_fence_of_results,
  no_fence_of_products,
  no_arrival,
  fewer_bytes,
  left_stride,
  right_stride,
  other_box,
  other_half,
  // beside the product
  narrow_stride,
  flag_not_raised,
  late_blocks,             // blocks that raise flags are the last to begin,
  late_blocks_not_awaited  // and nobody waits for them
};
Fault fault = Fault::none;

using Site = cuda_model::Site;

// Of the two barriers of a stage: those for what is there lie in front of those for what is read.
bool is_full_barrier(uint32_t barrier) {
  return barrier % 1024 < 4 * 8;
}

void faulty_barrier_wait(uint32_t barrier, uint32_t parity, const Site& site = Site::current()) {
  const Fault skipped =
      is_full_barrier(barrier) ? Fault::operands_not_awaited : Fault::stage_not_awaited;
  if (fault != skipped) barrier_wait(barrier, parity, site);
}

void faulty_barrier_arrive(uint32_t barrier) {
  if (fault != Fault::no_arrival || threadIdx.x != 128) barrier_arrive(barrier);
}

void faulty_barrier_expect(uint32_t barrier, uint32_t bytes) {
  barrier_expect(barrier, fault == Fault::fewer_bytes ? bytes - 8192 : bytes);
}

template <int pending>
void faulty_products_wait(const Site& site = Site::current()) {
  if (fault == (pending > 0 ? Fault::early_release : Fault::sums_not_awaited)) return;
  products_wait<pending>(site);
}

template <int pending>
void faulty_wait_for_stores() {
  if (pending == 0 || fault != Fault::result_not_awaited) wait_for_stores<pending>();
}

void faulty_fence_shared_writes() {
  if (fault != Fault::no_fence_of_results || threadIdx.x != 200) fence_shared_writes();
}

void faulty_products_fence(const Site& site = Site::current()) {
  if (fault != Fault::no_fence_of_products) products_fence(site);
}

void faulty_load_box(uint32_t shared, const TensorMap& map, uint32_t barrier, int col, int row) {
  load_box(shared, map, barrier, fault == Fault::other_box && col > 0 ? col - 8 : col, row);
}

template <typename T, bool right_by_row, int count>
void faulty_multiply_group(float (&sums)[count], uint64_t left, uint64_t right, bool keep,
                           const Site& site = Site::current()) {
  constexpr uint64_t stride = uint64_t{64} << 32;  // 1024 bytes between groups of 8 rows
  if (fault == Fault::left_stride) left -= stride / 2;
  if (fault == Fault::right_stride) right -= stride / 2;
  if (fault == Fault::other_half && threadIdx.x >= 256) left -= 8192 / 16;
  multiply_group<T, right_by_row>(sums, left, right, keep, site);
}

template <typename T, bool by_row, int count>
void faulty_multiply_narrow(float (&sums)[count], uint64_t left, uint64_t right, bool keep,
                            const Site& site = Site::current()) {
  constexpr uint64_t stride = uint64_t{64} << 32;
  if (fault == Fault::narrow_stride) right -= stride / 2;
  multiply_narrow<T, by_row>(sums, left, right, keep, site);
}

uint32_t faulty_take_ticket(uint32_t* counter) {
  const uint32_t ticket = take_ticket(counter);
  return fault < Fault::late_blocks ? ticket : gridDim.x - 1 - ticket;
}

void faulty_raise_flag(uint32_t* flag) {
  if (fault != Fault::flag_not_raised || threadIdx.x < 320) raise_flag(flag);
}

void faulty_wait_for_flag(const uint32_t* flag, uint32_t times,
                          const Site& site = Site::current()) {
  if (fault != Fault::late_blocks_not_awaited) wait_for_flag(flag, times, site);
}

}  // namespace
}  // namespace rankwise::kernels

#define barrier_wait faulty_barrier_wait
#define barrier_arrive faulty_barrier_arrive
#define barrier_expect faulty_barrier_expect
#define products_wait faulty_products_wait
#define wait_for_stores faulty_wait_for_stores
#define fence_shared_writes faulty_fence_shared_writes
#define products_fence faulty_products_fence
#define load_box faulty_load_box
#define multiply_group faulty_multiply_group
#define multiply_narrow faulty_multiply_narrow
#define take_ticket faulty_take_ticket
#define raise_flag faulty_raise_flag
#define wait_for_flag faulty_wait_for_flag
#include <kernels/hopper/linear_product.cu>

#include "beside_problems.h"

namespace rankwise::kernels {
namespace {

// Ends the process when the product is wrong.
template <typename T>
void run(Fault with, bool right_by_row) {
  cuda_model::set_schedule({});
  Product<T> product({130, 136, 456, 17, right_by_row});
  fault = with;
  product.everything();
  fault = Fault::none;
  for (int64_t i = 0; i < product.c.rows; ++i) {
    for (int64_t j = 0; j < product.c.cols; ++j) {
      const Expected e = product.expected(i, j);
      const double error = std::fabs(product.out.written(i, j) - e.value);
      if (!(error <= 0.01 * e.absolute)) cuda_model::fail("a wrong result");
    }
  }
}

struct Planted {
  Fault fault;
  const char* message;
};

class LinearProductFaults : public testing::TestWithParam<Planted> {};

TEST_P(LinearProductFaults, AreSeen) {
  EXPECT_DEATH(run<__half>(GetParam().fault, false), GetParam().message);
  EXPECT_DEATH(run<__nv_bfloat16>(GetParam().fault, true), GetParam().message);
}

constexpr const char* wrong = "a wrong result";
constexpr const char* waits = "others that do not come";
INSTANTIATE_TEST_SUITE_P(
    Each, LinearProductFaults,
    testing::Values(Planted{Fault::early_release, wrong},
                    Planted{Fault::operands_not_awaited, "more than 1 arrivals"},
                    Planted{Fault::stage_not_awaited, "more than 1 arrivals"},
                    Planted{Fault::sums_not_awaited, "products under way"},
                    Planted{Fault::result_not_awaited, wrong},
                    Planted{Fault::no_fence_of_results, "thread 200 has written without a fence"},
                    Planted{Fault::no_fence_of_products, "without wgmma.fence"},
                    Planted{Fault::no_arrival, waits},
                    Planted{Fault::fewer_bytes, "do not come|boxes are loaded"},
                    Planted{Fault::left_stride, wrong}, Planted{Fault::right_stride, wrong},
                    Planted{Fault::other_box, wrong}, Planted{Fault::other_half, wrong}));

// As run(), with a pass over x beside the product.
template <typename Pass>
void run_beside(Fault with) {
  cuda_model::set_schedule({});
  Pass pass({{700, 136, 456, 12, Pass::by_row, false, 3}, 1, false, 6});
  fault = with;
  pass.everything();
  fault = Fault::none;
  if (!pass.is_right()) cuda_model::fail("a wrong result");
}

class FaultsBeside : public testing::TestWithParam<Planted> {};

TEST_P(FaultsBeside, AreSeen) {
  EXPECT_DEATH(run_beside<Forward<__half>>(GetParam().fault), GetParam().message);
  EXPECT_DEATH((run_beside<Forward<__nv_bfloat16, true>>(GetParam().fault)), GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Each, FaultsBeside,
    testing::Values(Planted{Fault::early_release, wrong}, Planted{Fault::narrow_stride, wrong},
                    Planted{Fault::sums_not_awaited, "products under way"},
                    Planted{Fault::no_fence_of_products, "without wgmma.fence"},
                    Planted{Fault::no_arrival, waits}, Planted{Fault::flag_not_raised, waits},
                    Planted{Fault::late_blocks, waits},
                    Planted{Fault::late_blocks_not_awaited, wrong}));

TEST(LinearProductFaults, AreSeenInAGradientBesideTheProduct) {
  EXPECT_DEATH(run_beside<Gradient<__half>>(Fault::early_release), wrong);
  EXPECT_DEATH(run_beside<Gradient<__half>>(Fault::narrow_stride), wrong);
  EXPECT_DEATH((run_beside<Gradient<__nv_bfloat16, true>>(Fault::narrow_stride)), wrong);
}

TEST(LinearProductFaults, TheKernelAroundThemIsRight) {
  run_beside<Forward<__half>>(Fault::none);
  run_beside<Gradient<__half>>(Fault::none);
  run_beside<Forward<__nv_bfloat16, true>>(Fault::none);
  run_beside<Gradient<__nv_bfloat16, true>>(Fault::none);
  run<__half>(Fault::none, false);
  run<__nv_bfloat16>(Fault::none, true);
}

}  // namespace
}  // namespace rankwise::kernels
