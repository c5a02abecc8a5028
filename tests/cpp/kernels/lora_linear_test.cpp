// The device kernels of lora_linear against sums in float64, over sizes, ranks, types, layouts.
//
// Bound of an error, for a sum of n terms with absolute values adding to S: rounding the result
// once, u |result|, and float32's own sums, n 2^-23 S (tensor cores round toward zero); the terms
// themselves are exact. Results that are sums of rounded ones count both.
#include <gtest/gtest.h>
#include <kernels/dropout_mask.h>
#include <sys/mman.h>

#include <functional>
#include <string>

#include "matrices.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;
using cuda_model::Flush;
using cuda_model::Order;
using cuda_model::Schedule;

struct Case {
  int64_t rows, cols, rank;
  uint32_t threshold = 0;
  bool gate = false;
  Layout wide{}, factor{}, result{};
};

std::string name_of(const Case& c) {
  return std::to_string(c.rows) + " x " + std::to_string(c.cols) + ", rank " +
         std::to_string(c.rank) + ", threshold " + std::to_string(c.threshold) +
         (c.gate ? ", gated" : "") + ", gaps " + std::to_string(c.wide.gap) + " " +
         std::to_string(c.factor.gap) + ", offsets " + std::to_string(c.wide.offset) + " " +
         std::to_string(c.factor.offset);
}

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

std::vector<float> gates(int64_t rank, bool gate) {
  std::vector<float> values(rank, 1.0f);
  for (int64_t i = 0; gate && i < rank; ++i) values[i] = static_cast<float>(i % 5) * 0.5f - 1.0f;
  return values;
}

constexpr float keep_scale = 1.25f, scaling = 0.75f;
constexpr uint64_t seed_value = 0x123456789ABCDEFull;

// The inputs of every launcher for one case; each run starts from poisoned results and scratch.
template <typename Wide, typename Factor>
class Problem {
 public:
  explicit Problem(const Case& c)
      : c_(c),
        random_(static_cast<uint32_t>(c.rows * 1000003 + c.cols * 1009 + c.rank)),
        wide_(Matrix<Wide>::random(c.rows, c.cols, random_, c.wide)),
        A_(Matrix<Factor>::random(c.rank, c.cols, random_, c.factor)),
        B_(Matrix<Factor>::random(c.cols, c.rank, random_, c.factor)),
        skinny_(Matrix<Factor>::random(c.rows, c.rank, random_, {0, c.factor.offset})),
        gate_(gates(c.rank, c.gate)),
        E_(c.rank),
        seed_(std::vector<int64_t>{static_cast<int64_t>(seed_value)}),
        mask_(keep_mask(c.rows, c.cols, seed_value, c.threshold)) {
    for (int64_t i = 0; i < c.rank; ++i) E_[i] = Factor(gate_[i]);
  }

  void shrink() {
    Matrix<Factor> hidden(c_.rows, c_.rank), gated(c_.rows, c_.rank);
    Shrink p{c_.rows,      c_.cols,      c_.rank,       type_of<Wide>, type_of<Factor>,
             wide_.data(), wide_.stride, A_.data(),     A_.stride,     E(),
             keep_scale,   dropout(),    hidden.data(), gated.data()};
    const DeviceArray<float> scratch(shrink_scratch_bytes(p) / 4);
    ASSERT_EQ(launch_shrink(p, scratch.data(), nullptr), 0);
    const auto sum = [&](int64_t i, int64_t r, double scale) {
      Expected e;
      for (int64_t j = 0; j < c_.cols; ++j)
        e.add(scale * kept(i, j) * wide_.at(i, j) * A_.at(r, j));
      return e;
    };
    expect_close("hidden", hidden, c_.cols, [&](auto i, auto r) { return sum(i, r, keep_scale); });
    keep(hidden.bytes());
    if (!c_.gate) return;
    expect_close("gated", gated, c_.cols,
                 [&](auto i, auto r) { return sum(i, r, keep_scale * gate_[r]); });
    keep(gated.bytes());
  }

  void output_gradient(bool want_dh, bool want_dB, bool want_dE) {
    Matrix<Factor> dh(c_.rows, c_.rank), dB(c_.cols, c_.rank, c_.result), dE(1, c_.rank);
    OutputGradient p{c_.rows,
                     c_.cols,
                     c_.rank,
                     type_of<Wide>,
                     type_of<Factor>,
                     wide_.data(),
                     wide_.stride,
                     B_.data(),
                     B_.stride,
                     E(),
                     skinny_.data(),
                     scaling,
                     keep_scale,
                     want_dh ? dh.data() : nullptr,
                     want_dB ? dB.data() : nullptr,
                     dB.stride,
                     want_dE ? dE.data() : nullptr};
    const DeviceArray<float> scratch(output_gradient_scratch_bytes(p) / 4);
    ASSERT_EQ(launch_output_gradient(p, scratch.data(), nullptr), 0);
    if (want_dh) {
      expect_close("dh", dh, c_.cols, [&](int64_t i, int64_t r) {
        Expected e;
        const double scale = static_cast<double>(scaling) * keep_scale * gate_[r];
        for (int64_t n = 0; n < c_.cols; ++n) e.add(scale * wide_.at(i, n) * B_.at(n, r));
        return e;
      });
    }
    const auto g = [&](int64_t n, int64_t r, double scale) {
      Expected e;
      for (int64_t i = 0; i < c_.rows; ++i) e.add(scale * wide_.at(i, n) * skinny_.at(i, r));
      return e;
    };
    if (want_dB) {
      expect_close("dB", dB, c_.rows, [&](auto n, auto r) { return g(n, r, scaling * gate_[r]); });
    }
    if (want_dE) {
      expect_close("dE", dE, c_.rows + c_.cols, [&](int64_t, int64_t r) {
        Expected e;
        for (int64_t n = 0; n < c_.cols; ++n) {
          const Expected one = g(n, r, scaling * B_.at(n, r));
          e.value += one.value;
          e.absolute += one.absolute;
        }
        return e;
      });
    }
    if (want_dh) keep(dh.bytes());
    if (want_dB) keep(dB.bytes());
    if (want_dE) keep(dE.bytes());
  }

  void input_factor_gradient() {
    Matrix<Factor> dA(c_.rank, c_.cols, c_.result);
    InputFactorGradient p{c_.rows,         c_.cols,      c_.rank,      type_of<Wide>,
                          type_of<Factor>, wide_.data(), wide_.stride, skinny_.data(),
                          dropout(),       dA.data(),    dA.stride};
    const DeviceArray<float> scratch(input_factor_gradient_scratch_bytes(p) / 4);
    ASSERT_EQ(launch_input_factor_gradient(p, scratch.data(), nullptr), 0);
    expect_close("dA", dA, c_.rows, [&](int64_t r, int64_t j) {
      Expected e;
      for (int64_t i = 0; i < c_.rows; ++i) {
        e.add(kept(i, j) * wide_.at(i, j) * skinny_.at(i, r));
      }
      return e;
    });
    keep(dA.bytes());
  }

  void expand(bool transposed) {
    Matrix<Wide> out(c_.rows, c_.cols, c_.result);
    const Matrix<Factor>& factor = transposed ? B_ : A_;
    Expand p{c_.rows,        c_.cols,       c_.rank,       type_of<Wide>, type_of<Factor>,
             skinny_.data(), factor.data(), factor.stride, transposed,    scaling,
             dropout(),      out.data(),    out.stride};
    ASSERT_EQ(launch_expand(p, nullptr), 0);
    // Factors of float32 keep 16 bits of each number beside results of 16 bits.
    constexpr bool cut = sizeof(Wide) == 2 && sizeof(Factor) == 4;
    expect_close("expand", out, cut ? c_.rank + 2 * 256 : c_.rank, [&](int64_t i, int64_t j) {
      Expected e;
      for (int64_t r = 0; r < c_.rank; ++r) {
        e.add(kept(i, j) * scaling * skinny_.at(i, r) * (transposed ? B_.at(j, r) : A_.at(r, j)));
      }
      return e;
    });
    keep(out.bytes());
  }

  void everything() {
    shrink();
    output_gradient(true, true, c_.gate);
    input_factor_gradient();
    expand(false);
    expand(true);
  }

  // All that was written so far, as bytes.
  const std::vector<unsigned char>& written() const { return written_; }

 private:
  const void* E() const { return c_.gate ? E_.data() : nullptr; }
  DropoutMask dropout() const { return {c_.threshold > 0 ? seed_.data() : nullptr, c_.threshold}; }
  double kept(int64_t i, int64_t j) const { return mask_[i * c_.cols + j]; }
  void keep(const std::vector<unsigned char>& bytes) {
    written_.insert(written_.end(), bytes.begin(), bytes.end());
  }

  Case c_;
  std::mt19937 random_;
  Matrix<Wide> wide_;
  Matrix<Factor> A_, B_, skinny_;
  std::vector<float> gate_;
  DeviceArray<Factor> E_;
  DeviceArray<int64_t> seed_;
  std::vector<double> mask_;
  std::vector<unsigned char> written_;
};

template <typename Pair>
class LoraLinearKernels : public testing::Test {
 protected:
  using Wide = typename Pair::first_type;
  using Factor = typename Pair::second_type;

  void SetUp() override { cuda_model::set_schedule({}); }

  static void check(const Case& c) {
    SCOPED_TRACE(name_of(c));
    Problem<Wide, Factor>(c).everything();
  }
};

using Pairs = testing::Types<std::pair<__nv_bfloat16, __nv_bfloat16>, std::pair<__half, __half>,
                             std::pair<float, float>, std::pair<__nv_bfloat16, float>,
                             std::pair<__half, float>>;
TYPED_TEST_SUITE(LoraLinearKernels, Pairs);

TYPED_TEST(LoraLinearKernels, EveryTailOfRowsAndColumns) {
  for (const int64_t rows : {1, 2, 7, 63, 64, 65, 127, 129}) {
    for (const int64_t cols : {1, 3, 8, 31, 33, 64, 65, 127, 130}) {
      this->check({rows, cols, 5, (rows + cols) % 2 ? 6554u : 0u, cols % 3 == 0});
    }
  }
}

TYPED_TEST(LoraLinearKernels, EveryRank) {
  for (int64_t rank = 1; rank <= 66; ++rank) {
    this->check({33, 40, rank, rank % 2 ? 6554u : 0u, rank % 3 == 0});
  }
  for (const int64_t rank : {128, 200, 256}) this->check({20, 72, rank, 6554u, true});
}

TYPED_TEST(LoraLinearKernels, SeveralChunks) {
  this->check({70, 1100, 8, 6554u, true});
  this->check({1100, 70, 8, 6554u, true});
  this->check({300, 530, 17, 0, true});
}

TYPED_TEST(LoraLinearKernels, StridesAndOffsets) {
  for (const int64_t gap : {0, 1, 2, 4, 8}) {
    for (const int offset : {0, 1, 2, 4}) {
      const Layout layout{gap, offset}, even{8, 0};
      this->check({40, 56, 8, 6554u, true, layout, even, even});
      this->check({40, 56, 8, 6554u, true, even, layout, even});
      this->check({40, 56, 8, 6554u, true, even, even, layout});
    }
  }
  const Layout from_start{8, 0, Flush::start};
  this->check({40, 56, 8, 6554u, true, from_start, from_start, from_start});
}

TYPED_TEST(LoraLinearKernels, EveryDropoutProbability) {
  for (const uint32_t threshold : {1u, 32768u, 65535u, 65536u}) {
    this->check({20, 37, 4, threshold});
  }
}

TYPED_TEST(LoraLinearKernels, EachGradientAlone) {
  const Case c{40, 50, 6, 0, true};
  for (const int wanted : {1, 2, 4, 3, 5, 6}) {
    SCOPED_TRACE(wanted);
    Problem<typename TestFixture::Wide, typename TestFixture::Factor>(c).output_gradient(
        wanted & 1, wanted & 2, wanted & 4);
  }
}

TYPED_TEST(LoraLinearKernels, NothingToSum) {
  this->check({0, 40, 6, 6554u, true});
  this->check({40, 0, 6, 6554u, true});
  this->check({40, 40, 0, 6554u, true});
  this->check({0, 0, 0, 0, true});
}

TYPED_TEST(LoraLinearKernels, SameBitsUnderEverySchedule) {
  const Schedule schedules[] = {
      {},
      {.blocks = Order::backwards, .threads = Order::backwards, .early_copies = true},
      {.threads = Order::forwards, .warps_run_ahead = true, .early_copies = true},
      {.threads = Order::backwards, .warps_run_ahead = true},
      {.blocks = Order::shuffled, .threads = Order::shuffled, .seed = 1},
      {Order::shuffled, Order::shuffled, true, true, 2}};
  for (const Case& c : {Case{130, 400, 12, 6554u, true}, Case{150, 40, 70, 6554u, true, {1, 1}},
                        Case{270, 140, 20, 0, false}}) {
    SCOPED_TRACE(name_of(c));
    std::vector<std::vector<unsigned char>> results;
    for (const Schedule& schedule : schedules) {
      cuda_model::set_schedule(schedule);
      Problem<typename TestFixture::Wide, typename TestFixture::Factor> problem(c);
      problem.everything();
      results.push_back(problem.written());
    }
    for (const auto& result : results) EXPECT_TRUE(result == results[0]);
  }
}

// Elements of a wide row of ones times ones count what was kept: bit-equal masks for any tiling.
TEST(LoraLinearDropout, MasksAreThoseOfTheDefinition) {
  cuda_model::set_schedule({});
  for (const int64_t cols : {5, 64, 129, 200}) {
    const int64_t rows = 70;
    const uint32_t threshold = 20000;
    const DeviceArray<int64_t> seed(std::vector<int64_t>{-5});
    const DeviceArray<float> hidden(std::vector<float>(rows, 1.0f));
    const DeviceArray<float> factor(std::vector<float>(cols, 1.0f)), out(rows * cols);
    const DeviceArray<float> mask(rows * cols);
    const DropoutMask dropout{seed.data(), threshold};
    const Expand p{rows, cols,  1,    Type::float32, Type::float32, hidden.data(), factor.data(),
                   cols, false, 1.0f, dropout,       out.data(),    cols};
    ASSERT_EQ(launch_expand(p, nullptr), 0);
    ASSERT_EQ(launch_dropout_mask(seed.data(), rows * cols, threshold, mask.data(), nullptr), 0);
    const std::vector<double> expected =
        keep_mask(rows, cols, static_cast<uint64_t>(int64_t{-5}), threshold);
    for (int64_t i = 0; i < rows * cols; ++i) {
      ASSERT_EQ(out[i], expected[i]) << cols << " " << i;
      ASSERT_EQ(mask[i], expected[i]) << cols << " " << i;
    }
  }
}

// Largest error of a long sum of exact products, beside that of a float32 sum written out here.
template <typename Wide>
void expect_errors_of_float32() {
  constexpr int64_t rows = 40, cols = 4096;
  std::mt19937 random(11);
  const auto x = Matrix<Wide>::random(rows, cols, random);
  const auto A = Matrix<float>::random(1, cols, random);
  Matrix<float> hidden(rows, 1);
  const Shrink p{rows,    cols, 1,  type_of<Wide>, Type::float32, x.data(), cols, A.data(), cols,
                 nullptr, 1.0f, {}, hidden.data(), nullptr};
  const DeviceArray<float> scratch(shrink_scratch_bytes(p) / 4);
  ASSERT_EQ(launch_shrink(p, scratch.data(), nullptr), 0);
  double worst = 0, worst_plain = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double exact = 0;
    float plain = 0;
    for (int64_t j = 0; j < cols; ++j) {
      exact += x.at(i, j) * A.at(0, j);
      plain = std::fma(static_cast<float>(x.at(i, j)), static_cast<float>(A.at(0, j)), plain);
    }
    worst = std::max(worst, std::fabs(hidden.written(i, 0) - exact));
    worst_plain = std::max(worst_plain, std::fabs(plain - exact));
  }
  EXPECT_LE(worst, worst_plain);
}

TEST(LoraLinearAccuracy, Float32FactorsGiveErrorsOfFloat32) {
  cuda_model::set_schedule({});
  expect_errors_of_float32<float>();
  expect_errors_of_float32<__nv_bfloat16>();
  expect_errors_of_float32<__half>();
}

// Three rows that lie further apart than 32-bit offsets reach; only their pages are ever touched.
TEST(LoraLinearOffsets, ReachBeyond32Bits) {
  cuda_model::set_schedule({});
  constexpr int64_t rows = 3, cols = 16, stride = (int64_t{1} << 30) + 8;
  constexpr size_t bytes = ((rows - 1) * stride + cols) * sizeof(__half);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* wide = static_cast<__half*>(memory);
  const DeviceArray<__half> factor(std::vector<__half>(cols, __float2half(1.0f)));
  DeviceArray<__half> hidden(rows);
  for (int i = 0; i < 3; ++i) hidden[i] = __float2half(static_cast<float>(i + 1));

  const Expand expand{
      rows,  cols, 1,  Type::float16, Type::float16, hidden.data(), factor.data(), cols,
      false, 1.0f, {}, wide,          stride};
  ASSERT_EQ(launch_expand(expand, nullptr), 0);
  for (int64_t i = 0; i < rows * cols; ++i) {
    ASSERT_EQ(__half2float(wide[i / cols * stride + i % cols]), static_cast<float>(i / cols + 1));
  }

  DeviceArray<__half> out(rows), dA(cols);
  const Shrink shrink{rows,       cols,          1,    Type::float16, Type::float16, wide,
                      stride,     factor.data(), cols, nullptr,       1.0f,          {},
                      out.data(), nullptr};
  const DeviceArray<float> scratch(shrink_scratch_bytes(shrink) / 4);
  ASSERT_EQ(launch_shrink(shrink, scratch.data(), nullptr), 0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(__half2float(out[i]), 16.0f * static_cast<float>(i + 1));

  const InputFactorGradient gradient{rows,   cols,          1,  Type::float16, Type::float16, wide,
                                     stride, hidden.data(), {}, dA.data(),     cols};
  const DeviceArray<float> more(input_factor_gradient_scratch_bytes(gradient) / 4);
  ASSERT_EQ(launch_input_factor_gradient(gradient, more.data(), nullptr), 0);
  for (int j = 0; j < cols; ++j) EXPECT_EQ(__half2float(dA[j]), 1.0f + 4.0f + 9.0f);
  munmap(memory, bytes);
}

TEST(LoraLinearTypes, OthersAreRefused) {
  Shrink p{};
  p.rows = p.cols = p.rank = 1;
  p.wide_type = Type::float32;
  p.factor_type = Type::bfloat16;
  EXPECT_EQ(launch_shrink(p, nullptr, nullptr), static_cast<int>(cudaErrorInvalidValue));
}

}  // namespace
}  // namespace rankwise::kernels
