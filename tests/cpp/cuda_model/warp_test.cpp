// Shuffles, votes, ldmatrix and mma of the execution model against the PTX ISA's definitions,
// written out here without the model's code.
#include <cuda_model/device.h>
#include <cuda_model/device_memory.h>
#include <cuda_model/tensor_core.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

namespace {

using cuda_model::DeviceArray;
using rankwise::kernels::launch;

__global__ void shuffle_kinds(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(0xFFFFFFFFu, lane, lane * 3);
  out[32 + lane] = __shfl_up_sync(0xFFFFFFFFu, lane, 3, 16);
  out[64 + lane] = __shfl_down_sync(0xFFFFFFFFu, lane, 5, 8);
  out[96 + lane] = __shfl_xor_sync(0xFFFFFFFFu, lane, 21);
  out[128 + lane] = static_cast<int>(__shfl_sync(0xFFFFFFFFu, lane * 1e10, 31) / 1e10);
  if (lane >= 8) return;
  out[160 + lane] = __shfl_sync(0xFFu, lane, lane + 1, 4);
}

TEST(Warp, Shuffles) {
  const DeviceArray<int> out(168);
  ASSERT_EQ(launch(shuffle_kinds, {1}, {32}, 0, nullptr, out.data()), 0);
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(out[lane], lane * 3 % 32);
    EXPECT_EQ(out[32 + lane], lane % 16 < 3 ? lane : lane - 3);
    EXPECT_EQ(out[64 + lane], lane % 8 + 5 > 7 ? lane : lane + 5);
    EXPECT_EQ(out[96 + lane], lane ^ 21);
    EXPECT_EQ(out[128 + lane], 31);
  }
  for (int lane = 0; lane < 8; ++lane) EXPECT_EQ(out[160 + lane], lane / 4 * 4 + (lane + 1) % 4);
}

__global__ void votes(uint32_t* out) {
  const unsigned lane = threadIdx.x % 32;
  const uint32_t odd = __ballot_sync(0xFFFFFFFFu, lane & 1);
  if (lane < 4) out[threadIdx.x / 32] = __ballot_sync(0xFu, lane != 2) | (odd & 0xFFFFFFF0u);
}

TEST(Warp, VotesWarpByWarp) {
  const DeviceArray<uint32_t> out(2);
  ASSERT_EQ(launch(votes, {1}, {64}, 0, nullptr, out.data()), 0);
  EXPECT_EQ(out[0], 0xAAAAAAABu);
  EXPECT_EQ(out[1], 0xAAAAAAABu);
}

template <bool transposed, int count>
__global__ void load_fragments(const uint16_t* in, uint32_t* out) {
  auto* shared = rankwise::kernels::dynamic_shared<uint16_t>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < count * 64; i += 32) shared[i] = in[i];
  __syncwarp();
  uint32_t fragment[count];
  rankwise::kernels::load_matrices<transposed>(fragment, shared + lane % (8 * count) * 8);
  for (int i = 0; i < count; ++i) out[lane * count + i] = fragment[i];
}

// PTX ISA, ldmatrix: thread i holds elements (i / 4, 2 (i % 4)) and the next one in its row; with
// .trans those of the transposed matrix.
template <bool transposed, int count>
void expect_fragments() {
  std::vector<uint16_t> values(count * 64);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(1000 + i);
  const DeviceArray<uint16_t> in(values);
  const DeviceArray<uint32_t> out(32 * count);
  ASSERT_EQ(launch(load_fragments<transposed, count>, {1}, {32}, count * 128, nullptr, in.data(),
                   out.data()),
            0);
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < count; ++matrix) {
      const int row = lane / 4, col = lane % 4 * 2;
      const auto element = [&](int i, int j) {
        return values[matrix * 64 + (transposed ? j * 8 + i : i * 8 + j)];
      };
      const uint32_t expected = element(row, col) | uint32_t{element(row, col + 1)} << 16;
      EXPECT_EQ(out[lane * count + matrix], expected) << lane << " " << matrix;
    }
  }
}

TEST(Warp, LoadsMatrices) {
  expect_fragments<false, 1>();
  expect_fragments<false, 2>();
  expect_fragments<false, 4>();
  expect_fragments<true, 1>();
  expect_fragments<true, 2>();
  expect_fragments<true, 4>();
}

uint32_t bits(__nv_bfloat16 value) {
  return __nv_bfloat16_raw(value).x;
}

uint32_t bits(__half value) {
  return __half_raw(value).x;
}

// PTX ISA, m16n8k16: with g = lane / 4 and t = lane % 4,
//   a0 (g, 2t)  a1 (g + 8, 2t)  a2 (g, 2t + 8)  a3 (g + 8, 2t + 8)   two elements along k each,
//   b0 (2t, g)  b1 (2t + 8, g)                                       two elements along k each,
//   c0 (g, 2t)  c1 (g, 2t + 1)  c2 (g + 8, 2t)  c3 (g + 8, 2t + 1).
template <typename T>
__global__ void multiply(const T* a, const T* b, float* c) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  uint32_t fragment_a[4], fragment_b[2];
  const int row[4] = {g, g + 8, g, g + 8}, col[4] = {2 * t, 2 * t, 2 * t + 8, 2 * t + 8};
  for (int i = 0; i < 4; ++i) {
    const T* pair = a + row[i] * 16 + col[i];
    fragment_a[i] = bits(pair[0]) | bits(pair[1]) << 16;
  }
  for (int i = 0; i < 2; ++i) {
    const T* pair = b + (2 * t + 8 * i) * 8 + g;
    fragment_b[i] = bits(pair[0]) | bits(pair[8]) << 16;
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  rankwise::kernels::multiply_add<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

template <typename T>
void expect_product() {
  std::mt19937 random(3);
  std::uniform_int_distribution<int> digit(-8, 8);
  const DeviceArray<T> a(256), b(128);
  const DeviceArray<float> c(128);
  std::vector<double> expected(128);
  for (size_t i = 0; i < 256; ++i) a[i] = T(static_cast<float>(digit(random)));
  for (size_t i = 0; i < 128; ++i) b[i] = T(static_cast<float>(digit(random)) / 4);
  for (size_t i = 0; i < 128; ++i) expected[i] = c[i] = static_cast<float>(digit(random));
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < 16; ++k) {
        expected[m * 8 + n] += static_cast<double>(static_cast<float>(a[m * 16 + k])) *
                               static_cast<double>(static_cast<float>(b[k * 8 + n]));
      }
    }
  }
  ASSERT_EQ(launch(multiply<T>, {1}, {32}, 0, nullptr, a.data(), b.data(), c.data()), 0);
  for (int i = 0; i < 128; ++i) EXPECT_EQ(c[i], expected[i]) << i;
}

TEST(Warp, MultipliesMatrices) {
  expect_product<__nv_bfloat16>();
  expect_product<__half>();
}

// c + a product in each of k's sixteen places, for c and the products in a whole matrix.
class TensorCoreSums : public testing::Test {
 protected:
  void TearDown() override { cuda_model::set_tensor_core(cuda_model::sm_80_tensor_core); }

  static float sum(float c, const std::vector<float>& products) {
    const DeviceArray<__nv_bfloat16> a(256), b(std::vector(128, __nv_bfloat16(1.0f)));
    const DeviceArray<float> out(std::vector(128, c));
    for (size_t i = 0; i < 256; ++i) {
      a[i] = __float2bfloat16(i % 16 < products.size() ? products[i % 16] : 0.0f);
    }
    EXPECT_EQ(
        launch(multiply<__nv_bfloat16>, {1}, {32}, 0, nullptr, a.data(), b.data(), out.data()), 0);
    for (int i = 1; i < 128; ++i)
      EXPECT_EQ(std::bit_cast<uint32_t>(out[i]), std::bit_cast<uint32_t>(out[0]));
    return out[0];
  }
};

// Sums drop what lies below float32's last bit, and never gain from rounding.
TEST_F(TensorCoreSums, AreCutTowardZero) {
  for (const auto& core : {cuda_model::sm_80_tensor_core, cuda_model::sm_90_tensor_core}) {
    cuda_model::set_tensor_core(core);
    EXPECT_EQ(sum(1.0f, {0x1.8p-24f}), 1.0f);  // 1 + 0.75 ulp
    EXPECT_EQ(sum(-1.0f, {0x1p-25f}), core.extra_bits == 1 ? -1.0f : -1.0f + 0x1p-24f);
  }
  EXPECT_EQ(sum(-1.0f, {0x1.8p-24f}), -1.0f + 0x1p-23f);  // nearer to zero, over the next one
}

// The terms are cut as well, each by itself, before they are added.
TEST_F(TensorCoreSums, LoseWhatEachTermHasBelowTheLastPlace) {
  const std::vector<float> quarters(8, 0x1p-25f), eighths(16, 0x1p-26f);
  EXPECT_EQ(sum(1.0f, quarters), 1.0f);  // of eight quarters of an ulp nothing is left
  EXPECT_EQ(sum(1.0f, {0x1p-24f, 0x1p-24f}), 1.0f + 0x1p-23f);
  EXPECT_EQ(sum(0.0f, {1.0f, 0x1p-25f, 0x1p-25f, 0x1p-25f, 0x1p-25f}), 1.0f);
  cuda_model::set_tensor_core(cuda_model::sm_90_tensor_core);
  EXPECT_EQ(sum(1.0f, quarters), 1.0f + 0x1p-22f);
  EXPECT_EQ(sum(1.0f, eighths), 1.0f);
}

// sm_80 takes two steps for one instruction, and its sum is cut after each.
TEST_F(TensorCoreSums, TakeAsManyProductsAtOnceAsTheDevice) {
  std::vector<float> products(16, 0.0f);
  products[0] = products[8] = 0x1p-24f;
  EXPECT_EQ(sum(1.0f, products), 1.0f);
  cuda_model::set_tensor_core(cuda_model::sm_90_tensor_core);
  EXPECT_EQ(sum(1.0f, products), 1.0f + 0x1p-23f);
}

TEST_F(TensorCoreSums, KeepInfinitiesAndNaN) {
  EXPECT_EQ(sum(1.0f, {-INFINITY, 1.0f}), -INFINITY);
  EXPECT_EQ(sum(INFINITY, {1.0f}), INFINITY);
  EXPECT_TRUE(std::isnan(sum(INFINITY, {-INFINITY})));
  EXPECT_TRUE(std::isnan(sum(0.0f, {NAN})));
  EXPECT_EQ(sum(0x1.8p127f, {0x1p127f}), INFINITY);
  EXPECT_EQ(sum(0.0f, {0x1p-133f}), 0x1p-133f);
}

}  // namespace
