// The execution model itself: threads, barriers, shared memory, copies, and that each breach of
// CUDA's rules ends the process with a message.
#include <cuda_model/device.h>
#include <cuda_model/device_memory.h>
#include <cuda_model/schedule.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace {

using cuda_model::DeviceArray;
using cuda_model::Flush;
using cuda_model::Order;
using cuda_model::Schedule;
using rankwise::kernels::copy_async;
using rankwise::kernels::copy_async_commit;
using rankwise::kernels::copy_async_wait;
using rankwise::kernels::dynamic_shared;
using rankwise::kernels::launch;

const std::vector<Schedule> all_schedules = {
    {},
    {.blocks = Order::backwards, .threads = Order::backwards, .early_copies = true},
    {.blocks = Order::shuffled, .threads = Order::shuffled, .seed = 7},
    {.threads = Order::shuffled, .warps_run_ahead = true, .seed = 3}};

__global__ void write_positions(uint32_t* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

TEST(Grid, RunsEveryThreadOfEveryBlockOnce) {
  for (const Schedule& schedule : all_schedules) {
    cuda_model::set_schedule(schedule);
    const DeviceArray<uint32_t> out(2 * 3 * 2 * 4 * 5 * 2);
    ASSERT_EQ(launch(write_positions, {2, 3, 2}, {4, 5, 2}, 0, nullptr, out.data()), 0);
    for (uint32_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], i / 40 * 1000 + i % 40);
  }
}

TEST(Grid, RefusesWhatNoDeviceTakes) {
  const DeviceArray<uint32_t> out(1);
  const int invalid = cudaErrorInvalidConfiguration;
  EXPECT_EQ(launch(write_positions, {0}, {1}, 0, nullptr, out.data()), invalid);
  EXPECT_EQ(launch(write_positions, {1, 65536}, {1}, 0, nullptr, out.data()), invalid);
  EXPECT_EQ(launch(write_positions, {1, 1, 65536}, {1}, 0, nullptr, out.data()), invalid);
  EXPECT_EQ(launch(write_positions, {1}, {1025}, 0, nullptr, out.data()), invalid);
  EXPECT_EQ(launch(write_positions, {1}, {1, 1, 65}, 0, nullptr, out.data()), invalid);
  EXPECT_EQ(launch(write_positions, {1}, {1}, 99 * 1024 + 1, nullptr, out.data()), invalid);
}

// Sums of blocks in a tree, one warp's last steps by shuffles.
__global__ void sum_blocks(const float* in, int count, float* out) {
  __shared__ float sums[128];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  sums[threadIdx.x] = static_cast<int>(i) < count ? in[i] : 0.0f;
  __syncthreads();
  for (unsigned half = 64; half >= 32; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x >= 32) return;
  float sum = sums[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

TEST(Grid, SumsTheSameUnderEverySchedule) {
  std::vector<float> values(300);
  for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i));
  std::vector<std::vector<float>> results;
  for (const Schedule& schedule : all_schedules) {
    cuda_model::set_schedule(schedule);
    const DeviceArray<float> in(values), out(3);
    ASSERT_EQ(launch(sum_blocks, {3}, {128}, 0, nullptr, in.data(), 300, out.data()), 0);
    results.push_back({out[0], out[1], out[2]});
    double expected = 0;
    for (int i = 0; i < 128; ++i) expected += values[i];
    EXPECT_NEAR(out[0], expected, 1e-5);
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
  EXPECT_EQ(results[0], results[3]);
}

__global__ void reverse_without_barrier(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[63 - threadIdx.x];
}

TEST(Grid, OtherOrdersShowAMissingBarrier) {
  std::vector<std::vector<int>> results;
  for (const Schedule& schedule : all_schedules) {
    cuda_model::set_schedule(schedule);
    const DeviceArray<int> out(64);
    launch(reverse_without_barrier, {1}, {64}, 0, nullptr, out.data());
    results.emplace_back(out.data(), out.data() + 64);
  }
  EXPECT_NE(results[0], results[1]);
  EXPECT_NE(results[0], results[2]);
}

__global__ void read_what_another_block_left(float* out) {
  __shared__ float fixed;
  if (blockIdx.x == 0) fixed = *dynamic_shared<float>() = 1.0f;
  out[2 * blockIdx.x] = fixed;
  out[2 * blockIdx.x + 1] = *dynamic_shared<float>();
}

// Two warps that go on by turns after each shuffle never show that the barrier is missing.
__global__ void overwrite_without_barrier(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 1;
  __syncthreads();
  for (int i = 0; i < 4; ++i) __syncwarp();
  out[threadIdx.x] = value;
  for (int i = 0; i < 4; ++i) __syncwarp();
  if (threadIdx.x == 0) value = 2;
}

TEST(Grid, WarpsThatRunAheadShowAMissingBarrier) {
  std::vector<std::vector<int>> results;
  for (const Order order : {Order::forwards, Order::backwards}) {
    cuda_model::set_schedule({.threads = order, .warps_run_ahead = true});
    const DeviceArray<int> out(64);
    launch(overwrite_without_barrier, {1}, {64}, 0, nullptr, out.data());
    results.emplace_back(out.data(), out.data() + 64);
  }
  EXPECT_NE(results[0], results[1]);
}

TEST(Grid, PoisonsSharedMemoryBetweenBlocks) {
  cuda_model::set_schedule({});
  const DeviceArray<float> out(4);
  launch(read_what_another_block_left, {2}, {1}, 16, nullptr, out.data());
  EXPECT_EQ(out[0], 1.0f);
  EXPECT_TRUE(std::isnan(out[2]) && std::isnan(out[3]));
}

__global__ void copy_through_shared(const float* in, float* out, bool wait) {
  auto* shared = dynamic_shared<float>();
  for (int i = 0; i < 2; ++i) {
    copy_async<16>(shared + 4 * i, in + 4 * i, i == 0 ? 16 : 8);
    copy_async_commit();
  }
  if (wait) copy_async_wait<1>();
  for (int i = 0; i < 8; ++i) out[i] = shared[i];
  copy_async_wait<0>();
  for (int i = 0; i < 8; ++i) out[8 + i] = shared[i];
}

TEST(AsyncCopy, HappensWhenItsGroupIsWaitedFor) {
  const DeviceArray<float> in(std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8});
  for (const bool wait : {true, false}) {
    cuda_model::set_schedule({});
    const DeviceArray<float> out(16);
    ASSERT_EQ(launch(copy_through_shared, {1}, {1}, 32, nullptr, in.data(), out.data(), wait), 0);
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(wait ? out[i] == i + 1.0f : std::isnan(out[i]));
    for (int i = 4; i < 8; ++i) EXPECT_TRUE(std::isnan(out[i])) << "the second group came too soon";
    const std::vector<float> last(out.data() + 8, out.data() + 16);
    EXPECT_EQ(last, std::vector<float>({1, 2, 3, 4, 5, 6, 0, 0}));
  }
}

TEST(AsyncCopy, HappensAtOnceWhenTheScheduleSaysSo) {
  cuda_model::set_schedule({.early_copies = true});
  const DeviceArray<float> in(8), out(16);
  for (int i = 0; i < 8; ++i) in[i] = static_cast<float>(i);
  launch(copy_through_shared, {1}, {1}, 32, nullptr, in.data(), out.data(), false);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(out[i], static_cast<float>(i));
}

__global__ void broken_kernel(int breach, float* memory, int count) {
  __shared__ float fixed[32];
  auto* shared = dynamic_shared<float>();
  const auto i = static_cast<int>(threadIdx.x);
  switch (breach) {
    case 0:  // a barrier that a thread does not reach
      if (i == 3) return;
      __syncthreads();
      break;
    case 1:  // two barriers at the same time
      if (i < 16) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 2:  // a shuffle without one of its lanes
      if (i != 5) memory[0] = __shfl_sync(0xFFFFFFFFu, 1.0f, 0);
      break;
    case 3:  // a lane that calls with a mask without itself
      __syncwarp(0xFFFFu);
      break;
    case 4:  // a shuffle from a lane outside the mask
      if (i < 8) memory[0] = __shfl_sync(0xFFu, 1.0f, 9);
      break;
    case 5:
      if (i == 0) memory[count] = 1.0f;
      break;
    case 6:
      if (i == 0) memory[0] = memory[-1];
      break;
    case 7:
      if (i == 0) shared[32] = 1.0f;
      break;
    case 8:  // a copy that is not waited for
      if (i == 0) copy_async<4>(shared, memory);
      break;
    case 9:
      if (i == 0) copy_async<16>(shared + 1, memory);
      break;
    case 10:
      if (i == 0) copy_async<8>(shared, memory + 1);
      break;
    case 11:  // a copy to the stack
      if (i == 0) {
        float local[1];
        copy_async<4>(local, memory);
      }
      break;
    case 12: {  // a row of ldmatrix outside shared memory
      uint32_t fragment[1];
      rankwise::kernels::load_matrices<false>(fragment, shared + 4 * (i % 8) + 28);
      break;
    }
    case 13: {  // mma in part of a warp
      float c[4] = {};
      const uint32_t a[4] = {}, b[2] = {};
      if (i != 31) rankwise::kernels::multiply_add<__half>(c, a, b);
      break;
    }
    default:
      fixed[i] = shared[i];
      memory[i] = fixed[i];
  }
}

struct Breach {
  int number;
  const char* message;
};

class BrokenKernel : public testing::TestWithParam<Breach> {};

TEST_P(BrokenKernel, EndsTheProcessWithAMessage) {
  cuda_model::set_schedule({});
  const DeviceArray<float> memory(1024);  // 4096 bytes: a closed page at each end with Flush::start
  const DeviceArray<float> from_start(1024, 0, Flush::start);
  float* data = GetParam().number == 6 ? from_start.data() : memory.data();
  const std::string message =
      std::string("launched by .*grid_test.cpp.*block \\(0, 0, 0\\), thread.*") +
      GetParam().message;
  EXPECT_DEATH(launch(broken_kernel, {1}, {32}, 128, nullptr, GetParam().number, data, 1024),
               testing::ContainsRegex(message));
}

INSTANTIATE_TEST_SUITE_P(
    Each, BrokenKernel,
    testing::Values(Breach{0, "others that do not come:(.|\n)*thread 3 on: ended"},
                    Breach{1, "at different barriers"},
                    Breach{2, "others that do not come:(.|\n)*at a shuffle"},
                    Breach{3, "outside its mask 0x0000ffff"}, Breach{4, "a shuffle reads lane 9"},
                    Breach{5, "outside device memory"}, Breach{6, "outside device memory"},
                    Breach{7, "outside device memory"}, Breach{8, "has not waited for"},
                    Breach{9, "no multiple of 16"}, Breach{10, "unaligned address"},
                    Breach{11, "outside the block's shared memory"},
                    Breach{12, "ldmatrix touches 16 bytes"},
                    Breach{13, "others that do not come:(.|\n)*at mma"}));

TEST(BrokenKernel, TheKernelAroundTheBreachesIsSound) {
  const DeviceArray<float> memory(1024);
  EXPECT_EQ(launch(broken_kernel, {1}, {32}, 128, nullptr, -1, memory.data(), 1024), 0);
}

TEST(DeviceMemory, NoticesAStoreIntoItsMargins) {
  const auto store_before = [] {
    const DeviceArray<float> memory(3, 1);
    memory.data()[-1] = 0.0f;
  };
  EXPECT_DEATH(store_before(), "a store -4 bytes from the start of device memory of 12 bytes");
}

}  // namespace
