// The execution model's part of sm_90a: boxes, barriers that count bytes, products of a warpgroup;
// and that breaches of their rules end the process or show in the numbers.
#include <cuda_model/device_memory.h>
#include <cuda_model/hopper.h>
#include <cuda_model/schedule.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace {

using namespace rankwise::kernels;
using cuda_model::DeviceArray;
using cuda_model::Order;
using cuda_model::Schedule;

const std::vector<Schedule> all_schedules = {
    {},
    {.threads = Order::backwards, .early_copies = true},
    {.threads = Order::shuffled, .seed = 7},
    {.threads = Order::shuffled, .warps_run_ahead = true, .seed = 3}};

constexpr size_t stage = 1024, shared_bytes = 200 * stage;

__device__ uint32_t stages() {
  return (shared_address(dynamic_shared<char>()) + stage - 1) / stage * stage;
}

// numbers [rows, cols], 0, 1, 2 ... in rows `stride` apart.
DeviceArray<uint16_t> counted(int rows, int cols, int stride) {
  DeviceArray<uint16_t> memory((rows - 1) * stride + cols);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) memory[i * stride + j] = static_cast<uint16_t>(i * cols + j + 1);
  }
  return memory;
}

TensorMap map_of(const DeviceArray<uint16_t>& memory, int rows, int cols, int stride, int box) {
  return {reinterpret_cast<unsigned char*>(memory.data()), rows, cols, int64_t{2} * stride, box};
}

// Loads two boxes, the second into the first one's place, and copies what came to `seen`.
__global__ void load_twice(TensorMap map, uint16_t* seen, bool wait) {
  const uint32_t box = stages(), barrier = box + 8 * stage;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) {
      barrier_expect(barrier, stage);
      load_box(box, map, barrier, 64 * i, 4 * i);
    }
    if (wait) barrier_wait(barrier, i);
    const auto* shared = reinterpret_cast<uint16_t*>(cuda_model::SharedMemory::instance().at(box));
    for (int j = static_cast<int>(threadIdx.x); j < 512; j += 32) seen[512 * i + j] = shared[j];
    __syncthreads();
    barrier_wait(barrier, i);
    __syncthreads();  // nobody is left a phase behind
  }
}

TEST(Boxes, LieSwizzledAndAreZeroBeyondTheMatrix) {
  const DeviceArray<uint16_t> memory = counted(9, 70, 72);
  for (const Schedule& schedule : all_schedules) {
    cuda_model::set_schedule(schedule);
    const DeviceArray<uint16_t> seen(1024);
    ASSERT_EQ(launch_early(load_twice, {1}, {32}, shared_bytes, nullptr,
                           map_of(memory, 9, 70, 72, 8), seen.data(), true),
              0);
    for (int i = 0; i < 2; ++i) {
      for (int row = 0; row < 8; ++row) {
        for (int col = 0; col < 64; ++col) {
          const int at_row = 4 * i + row, at_col = 64 * i + col;
          const int place = row * 64 + ((col / 8) ^ row) * 8 + col % 8;
          ASSERT_EQ(seen[512 * i + place],
                    at_row < 9 && at_col < 70 ? at_row * 70 + at_col + 1 : 0);
        }
      }
    }
  }
}

TEST(Boxes, ArePoisonUntilTheyAreWaitedFor) {
  const DeviceArray<uint16_t> memory = counted(9, 70, 72), seen(1024);
  cuda_model::set_schedule({});
  launch_early(load_twice, {1}, {32}, shared_bytes, nullptr, map_of(memory, 9, 70, 72, 8),
               seen.data(), false);
  EXPECT_EQ(seen[0], 0xFFFF);
}

__global__ void write_and_store(TensorMap map, int fault) {
  const uint32_t box = stages(), lane = threadIdx.x;
  for (uint32_t piece = 0; piece < 2; ++piece) {
    uint32_t fragment[4];
    for (uint32_t i = 0; i < 4; ++i) {  // matrix i: rows 0-7, columns 8 (4 piece + i) onwards
      const uint32_t first = lane / 4 * 64 + 8 * (4 * piece + i) + 2 * (lane % 4);
      fragment[i] = first | (first + 1) << 16;
    }
    const uint32_t row = lane % 8, col = 4 * piece + lane / 8;
    store_matrices(box + row * 128 + ((col ^ row) << 4), fragment);
  }
  if (fault != 1) fence_shared_writes();
  __syncwarp();
  if (lane > 0) return;
  store_box(map, box, 64, 3);
  commit_stores();
  if (fault == 2) {
    *reinterpret_cast<uint16_t*>(cuda_model::SharedMemory::instance().at(box)) = 9999;
  }
  if (fault != 3) wait_for_stores<0>();
}

DeviceArray<uint16_t> stored(int fault) {
  DeviceArray<uint16_t> memory(9 * 80);
  cuda_model::set_schedule({});
  launch_early(write_and_store, {1}, {32}, shared_bytes, nullptr, map_of(memory, 9, 72, 80, 8),
               fault);
  return memory;
}

TEST(Boxes, AreStoredAsFarAsTheMatrixGoes) {
  const DeviceArray<uint16_t> memory = stored(0);
  for (int row = 0; row < 9; ++row) {
    for (int col = 0; col < 80; ++col) {
      const bool inside = row >= 3 && col >= 64 && col < 72;
      ASSERT_EQ(memory[row * 80 + col], inside ? (row - 3) * 64 + col - 64 : 0xFFFF);
    }
  }
}

TEST(Boxes, StoresNeedAFenceAndAWait) {
  EXPECT_DEATH(stored(1), "thread 0 has written without a fence");
  EXPECT_EQ(stored(2)[3 * 80 + 64], 9999) << "a change before the wait is seen";
  EXPECT_DEATH(stored(3), "stores of boxes it has not waited for");
}

// sums = left right for the boxes of a [64, 64] left and a right of 256 columns, 16 deep of 64.
template <typename T, bool right_by_row>
__global__ void multiply(TensorMap left, TensorMap right, float* out, int fault) {
  const uint32_t a = stages(), b = a + 8 * stage, barrier = b + 32 * stage;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_expect(barrier, 40 * stage);
    load_box(a, left, barrier, 0, 0);
    for (int i = 0; i < (right_by_row ? 4 : 1); ++i) {
      load_box(b + 8 * stage * i, right, barrier, 64 * i, 0);
    }
  }
  __syncthreads();
  if (fault != 1) barrier_wait(barrier, 0);
  float sums[128];
  constexpr uint64_t swizzle = uint64_t{1} << 62, stride = uint64_t{64} << 32;
  const uint64_t leading = uint64_t{fault == 5 ? 64u : 512u} << 16;
  const uint64_t of_left = swizzle | stride | a >> 4;
  const uint64_t of_right = swizzle | stride | (right_by_row ? leading : 0) | b >> 4;
  if (fault != 3) products_fence();
  for (int k = 0; k < 4; ++k) {
    multiply_group<T, right_by_row>(sums, of_left + 2 * k, of_right + (right_by_row ? 128 : 2) * k,
                                    k > 0);
  }
  products_commit();
  if (fault != 2) products_wait<0>();
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t i = 0; i < 128; ++i) {
    const uint32_t row = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
    out[row * 256 + i / 4 * 8 + 2 * (lane % 4) + i % 2] = sums[i];
  }
  if (fault == 2) products_wait<0>();
  if (fault == 1) barrier_wait(barrier, 0);
}

template <typename T>
T small(int i, int j) {
  return T(static_cast<float>((7 * i + 3 * j) % 11 - 5));
}

// How many elements are wrong.
template <typename T, bool right_by_row>
int wrong(int fault) {
  const DeviceArray<uint16_t> left(64 * 64), right(256 * 64);
  const DeviceArray<float> out(64 * 256);
  const auto a = reinterpret_cast<T*>(left.data()), b = reinterpret_cast<T*>(right.data());
  for (int k = 0; k < 64; ++k) {
    for (int i = 0; i < 64; ++i) a[i * 64 + k] = small<T>(i, k);
    for (int j = 0; j < 256; ++j) b[right_by_row ? k * 256 + j : j * 64 + k] = small<T>(k, j);
  }
  const TensorMap map_b =
      right_by_row ? map_of(right, 64, 256, 256, 64) : map_of(right, 256, 64, 64, 256);
  launch_early(multiply<T, right_by_row>, {1}, {128}, shared_bytes, nullptr,
               map_of(left, 64, 64, 64, 64), map_b, out.data(), fault);
  int count = 0;
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 256; ++j) {
      float sum = 0;
      for (int k = 0; k < 64; ++k) {
        sum += static_cast<float>(small<T>(i, k)) * static_cast<float>(small<T>(k, j));
      }
      count += out[i * 256 + j] != sum;
    }
  }
  return count;
}

TEST(Warpgroup, MultipliesBothLayoutsOfTheRightOperand) {
  for (const Schedule& schedule : all_schedules) {
    cuda_model::set_schedule(schedule);
    EXPECT_EQ((wrong<__nv_bfloat16, false>(0)), 0);
    EXPECT_EQ((wrong<__half, true>(0)), 0);
  }
}

TEST(Warpgroup, FaultsShow) {
  cuda_model::set_schedule({});
  EXPECT_GT((wrong<__half, false>(1)), 0) << "operands that were not waited for";
  EXPECT_GT((wrong<__half, false>(2)), 0) << "sums that were not waited for";
  EXPECT_DEATH((wrong<__half, false>(3)), "wgmma without wgmma.fence");
  EXPECT_GT((wrong<__half, true>(5)), 0) << "another stride between groups of columns";
}

__global__ void misuse_barriers(int breach, TensorMap map) {
  const uint32_t box = stages(), barrier = box + 8 * stage;
  if (breach != 0) barrier_init(barrier, 2);
  if (breach == 1) barrier_init(barrier, 2);
  barrier_arrive(barrier);
  if (breach == 2) {
    barrier_expect(barrier, stage);
    barrier_wait(barrier, 0);  // bytes that never come
  }
  if (breach == 3) {
    barrier_expect(barrier, stage);
    barrier_arrive(barrier);
  }
  if (breach == 4) load_box(box + 16, map, barrier, 0, 0);
  if (breach == 5) {
    barrier_expect(barrier, stage);
    load_box(box, map, barrier, 0, 0);
  }
  if (breach == 6) load_box(box + 200 * stage, map, barrier, 0, 0);
}

TEST(Barriers, BreachesEndTheProcess) {
  cuda_model::set_schedule({});
  const DeviceArray<uint16_t> memory = counted(9, 70, 72);
  const char* messages[] = {"no barrier was made",
                            "is made twice",
                            "others that do not come:(.|\n)*at a barrier in shared memory",
                            "more than 2 arrivals",
                            "no multiple of 1024",
                            "the block ends while boxes are loaded",
                            "outside the block's shared memory"};
  for (int breach = 0; breach < 7; ++breach) {
    EXPECT_DEATH(launch_early(misuse_barriers, {1}, {1}, shared_bytes, nullptr, breach,
                              map_of(memory, 9, 70, 72, 8)),
                 testing::ContainsRegex(messages[breach]));
  }
}

TEST(Launch, HasTheSharedMemoryOfItsDevice) {
  const DeviceArray<uint16_t> memory = counted(9, 70, 72);
  EXPECT_EQ(launch_early(misuse_barriers, {1}, {1}, 227 * stage + 1, nullptr, 0,
                         map_of(memory, 9, 70, 72, 8)),
            cudaErrorInvalidConfiguration);
}

}  // namespace
