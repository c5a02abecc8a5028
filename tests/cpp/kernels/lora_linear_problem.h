// One call of every launcher of lora_linear.h, compared with sums in float64.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "kernel_checks.h"

namespace rankwise::kernels {

struct Case {
  int64_t rows, cols, rank;
  uint32_t threshold = 0;
  bool gate = false;
  Layout wide{}, factor{}, result{};
};

inline std::string name_of(const Case& c) {
  return std::to_string(c.rows) + " x " + std::to_string(c.cols) + ", rank " +
         std::to_string(c.rank) + ", threshold " + std::to_string(c.threshold) +
         (c.gate ? ", gated" : "") + ", gaps " + std::to_string(c.wide.gap) + " " +
         std::to_string(c.factor.gap) + ", offsets " + std::to_string(c.wide.offset) + " " +
         std::to_string(c.factor.offset);
}

constexpr float keep_scale = 1.25f;
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
             keep_scale,   dropout(),    hidden.data(), gated.data(),  scaling};
    const cuda_model::DeviceArray<float> scratch(shrink_scratch_bytes(p) / 4);
    ASSERT_EQ(launch_shrink(p, scratch.data(), nullptr), 0);
    const auto sum = [&](int64_t i, int64_t r, double scale) {
      Expected e;
      for (int64_t j = 0; j < c_.cols; ++j)
        e.add(scale * kept(i, j) * wide_.at(i, j) * A_.at(r, j));
      return e;
    };
    expect_close("hidden", hidden, c_.cols, [&](auto i, auto r) { return sum(i, r, keep_scale); });
    keep(hidden.bytes());
    expect_close("gated", gated, c_.cols,
                 [&](auto i, auto r) { return sum(i, r, scaling * keep_scale * gate_[r]); });
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
    const cuda_model::DeviceArray<float> scratch(output_gradient_scratch_bytes(p) / 4);
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
    const cuda_model::DeviceArray<float> scratch(input_factor_gradient_scratch_bytes(p) / 4);
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
    const Matrix<Factor>& factor = transposed ? B_ : A_;
    expand("expand", factor, transposed, dropout(), [&](int64_t i, int64_t j) {
      Expected e;
      for (int64_t r = 0; r < c_.rank; ++r) {
        e.add(kept(i, j) * scaling * skinny_.at(i, r) * (transposed ? B_.at(j, r) : A_.at(r, j)));
      }
      return e;
    });
  }

  void expand_on_bias() {
    const auto bias = Matrix<Wide>::random(1, c_.cols, random_, {0, c_.wide.offset, c_.wide.flush});
    expand_on("expand on bias", bias, [&](Expand& p) { p.bias = bias.data(); });
  }

  void expand_on_base() {
    expand_on("expand on base", wide_, [&](Expand& p) {
      p.base = wide_.data();
      p.base_stride = wide_.stride;
    });
  }

  void everything() {
    shrink();
    output_gradient(true, true, c_.gate);
    input_factor_gradient();
    expand(false);
    expand(true);
    expand_on_bias();
    expand_on_base();
  }

  // All that was written so far, as bytes.
  const std::vector<unsigned char>& written() const { return written_; }

 private:
  // On one row for all or on as many as the result has.
  void expand_on(const char* what, const Matrix<Wide>& top,
                 const std::function<void(Expand&)>& set_top) {
    const auto expected = [&](int64_t i, int64_t j) {
      Expected e;
      for (int64_t r = 0; r < c_.rank; ++r) e.add(scaling * skinny_.at(i, r) * B_.at(j, r));
      e.add(top.at(top.rows == 1 ? 0 : i, j));
      return e;
    };
    expand(what, B_, /*transposed=*/true, {}, expected, set_top);
  }

  void expand(
      const char* what, const Matrix<Factor>& factor, bool transposed, const DropoutMask& dropout,
      const std::function<Expected(int64_t, int64_t)>& expected,
      const std::function<void(Expand&)>& set_top = [](Expand&) {}) {
    Matrix<Wide> out(c_.rows, c_.cols, c_.result);
    Expand p{c_.rows,        c_.cols,       c_.rank,       type_of<Wide>, type_of<Factor>,
             skinny_.data(), factor.data(), factor.stride, transposed,    scaling,
             dropout,        out.data(),    out.stride};
    set_top(p);
    ASSERT_EQ(launch_expand(p, nullptr), 0);
    // Factors of float32 keep 16 bits of each number beside results of 16 bits.
    constexpr bool cut = sizeof(Wide) == 2 && sizeof(Factor) == 4;
    expect_close(what, out, cut ? c_.rank + 2 * 256 : c_.rank, expected);
    keep(out.bytes());
  }

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
  cuda_model::DeviceArray<Factor> E_;
  cuda_model::DeviceArray<int64_t> seed_;
  std::vector<double> mask_;
  std::vector<unsigned char> written_;
};

}  // namespace rankwise::kernels
