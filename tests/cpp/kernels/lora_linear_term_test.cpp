// The passes of a layer whose term joins the large product: what they write for it, what they leave
// for later, and how many kernels a layer launches.
#include <gtest/gtest.h>

#include "hopper/beside_problems.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;

template <typename Pair>
class LoraLinearTerm : public testing::Test {
 protected:
  using Wide = typename Pair::first_type;
  using Factor = typename Pair::second_type;
  static constexpr bool splits =
      std::is_same_v<Factor, float> && std::is_same_v<Wide, __nv_bfloat16>;
  using Part = std::conditional_t<splits, __nv_bfloat16, Factor>;
  static constexpr int64_t parts = splits ? split_parts : 1;

  void SetUp() override { cuda_model::set_schedule({}); }

  static SplitMatrix split(const Matrix<Factor>& from, const Matrix<Part>& to, int64_t part) {
    if constexpr (!splits) return {};
    return {from.rows,   from.cols, reinterpret_cast<const float*>(from.data()),
            from.stride, 1,         to.data(),
            to.stride,   part};
  }

  // A layer's operands and results; `rows` of dy are x's, and both are [rows, cols].
  struct Layer {
    int64_t rows = 70, cols = 200, rank;
    std::mt19937 random{7};
    Matrix<Wide> x = Matrix<Wide>::random(rows, cols, random, {8});
    Matrix<Factor> A, B, E, hidden, gated, plain_dh, dh, dA, dB, dE;
    Matrix<Part> left, A_parts, B_parts;

    explicit Layer(int64_t rank_)
        : rank(rank_),
          A(Matrix<Factor>::random(rank, cols, random)),
          B(Matrix<Factor>::random(cols, rank, random)),
          E(Matrix<Factor>::random(1, rank, random)),
          hidden(rows, rank),
          gated(rows, rank),
          plain_dh(rows, rank),
          dh(rows, rank),
          dA(rank, cols),
          dB(cols, rank),
          dE(1, rank),
          left(rows, parts * rank, {8}),
          A_parts(parts * rank, cols, {8}),
          B_parts(cols, parts * rank, {8}) {}

    TermLeft term() const { return {left.data(), left.stride, splits}; }

    Shrink shrink() const {
      return {rows,     cols,     rank,          type_of<Wide>, type_of<Factor>,
              x.data(), x.stride, A.data(),      A.stride,      E.data(),
              1.25f,    {},       hidden.data(), gated.data(),  0.75f};
    }
    OutputGradient output_gradient() const {
      return {rows,     cols,      rank,      type_of<Wide>, type_of<Factor>, x.data(),
              x.stride, B.data(),  B.stride,  E.data(),      hidden.data(),   0.75f,
              1.25f,    dh.data(), dB.data(), dB.stride,     dE.data()};
    }
    InputFactorGradient input_factor_gradient() const {
      return {rows,     cols,      rank, type_of<Wide>, type_of<Factor>, x.data(),
              x.stride, dh.data(), {},   dA.data(),     dA.stride};
    }

    static void run(const Shrink& p) {
      const DeviceArray<float> scratch(shrink_scratch_bytes(p) / 4);
      ASSERT_EQ(launch_shrink(p, scratch.data(), nullptr), 0);
    }
    // dA from dh, and what the first launch left.
    void run(const OutputGradient& p, InputFactorGradient of_x) const {
      const DeviceArray<float> scratch(output_gradient_scratch_bytes(p) / 4);
      ASSERT_EQ(launch_output_gradient(p, scratch.data(), nullptr), 0);
      if (p.dE_later) of_x.gate = gate_gradient(p, scratch.data());
      const DeviceArray<float> more(input_factor_gradient_scratch_bytes(of_x) / 4);
      ASSERT_EQ(launch_input_factor_gradient(of_x, more.data(), nullptr), 0);
    }

    // `written` for the product is `plain`: the same numbers, or the parts that launch_split_term
    // makes of them and of `right`.
    void expect_term(const Matrix<Factor>& plain, const Matrix<Factor>& right,
                     const Matrix<Part>& right_parts, int64_t right_part) const {
      if constexpr (splits) {
        const Matrix<Part> wanted(left.rows, left.cols, {8});
        const Matrix<Part> wanted_right(right_parts.rows, right_parts.cols, {8});
        ASSERT_EQ(launch_split_term(split(plain, wanted, rank),
                                    split(right, wanted_right, right_part), nullptr),
                  0);
        EXPECT_TRUE(left.bytes() == wanted.bytes());
        EXPECT_TRUE(right_parts.bytes() == wanted_right.bytes());
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < rank; ++j)
            ASSERT_EQ(left.written(i, j), plain.written(i, j)) << i << ", " << j;
          ASSERT_TRUE(i + 1 == rows || std::isnan(left.written(i, rank))) << "between the rows";
        }
      }
    }
  };
};

TYPED_TEST_SUITE(LoraLinearTerm, TypePairs);

TYPED_TEST(LoraLinearTerm, ShrinkWritesWhatTheProductTakes) {
  for (const int64_t rank : {5, 16, 40}) {
    SCOPED_TRACE(rank);
    typename TestFixture::Layer layer(rank);
    Shrink p = layer.shrink();
    layer.run(p);
    const std::vector<unsigned char> hidden = layer.hidden.bytes();
    p.gated = nullptr;
    p.term = layer.term();
    p.term_right = this->split(layer.B, layer.B_parts, rank);
    layer.run(p);
    layer.expect_term(layer.gated, layer.B, layer.B_parts, rank);
    EXPECT_TRUE(layer.hidden.bytes() == hidden);
  }
}

TYPED_TEST(LoraLinearTerm, OutputGradientWritesWhatTheProductTakes) {
  for (const int64_t rank : {5, 16, 40}) {
    SCOPED_TRACE(rank);
    typename TestFixture::Layer layer(rank);
    layer.run(layer.shrink());
    OutputGradient p = layer.output_gradient();
    p.term = layer.term();
    const int64_t part = rank * layer.A_parts.stride;
    p.term_right = this->split(layer.A, layer.A_parts, part);
    layer.run(p, layer.input_factor_gradient());
    layer.expect_term(layer.dh, layer.A, layer.A_parts, part);
  }
}

TYPED_TEST(LoraLinearTerm, TheGateGradientMayComeWithTheInputsPass) {
  for (const int64_t rank : {1, 16, 40}) {
    SCOPED_TRACE(rank);
    const typename TestFixture::Layer at_once(rank), later(rank);
    for (const auto* layer : {&at_once, &later}) {
      layer->run(layer->shrink());
      OutputGradient p = layer->output_gradient();
      p.dE_later = layer == &later;
      layer->run(p, layer->input_factor_gradient());
    }
    EXPECT_TRUE(later.dE.bytes() == at_once.dE.bytes());
    EXPECT_TRUE(later.dA.bytes() == at_once.dA.bytes());
  }
}

// Beside a product, whatever the factors' type.
TYPED_TEST(LoraLinearTerm, TwoKernelsForwardAndFourBackward) {
  typename TestFixture::Layer layer(16);
  Shrink forward = layer.shrink();
  forward.term = layer.term();
  forward.term_right = this->split(layer.B, layer.B_parts, layer.rank);
  const int before = cuda_model::grids_run();
  layer.run(forward);
  const int between = cuda_model::grids_run();
  EXPECT_EQ(between - before, 2);
  OutputGradient backward = layer.output_gradient();
  backward.dE_later = true;
  backward.term = layer.term();
  backward.term_right = this->split(layer.A, layer.A_parts, layer.rank * layer.A_parts.stride);
  layer.run(backward, layer.input_factor_gradient());
  const bool once = sizeof(typename TestFixture::Wide) == 2;  // dy is read for dh and dB together
  EXPECT_EQ(cuda_model::grids_run() - between, once ? 4 : 5);
}

// With passes beside its products a layer launches one kernel forward and four backward.
TEST(LoraLinearBeside, OneKernelForwardAndFourBackward) {
  cuda_model::set_schedule({});
  using T = __nv_bfloat16;
  constexpr int64_t rows = 300, cols = 264, rank = 16;
  const Forward<T> forward({{rows, cols, 136, rank, false, true, 4}, 2, true});
  int before = cuda_model::grids_run();
  ASSERT_EQ(launch_linear_product(forward.problem(), nullptr), 0);
  EXPECT_EQ(cuda_model::grids_run() - before, 1);

  Gradient<T> gradient({{rows, cols, 136, rank, true, false, 4}, 2, false, 2});
  std::mt19937 random{9};
  const auto B = Matrix<T>::random(136, rank, random),
             hidden = Matrix<T>::random(rows, rank, random), E = Matrix<T>::random(1, rank, random);
  const Matrix<T> dB(136, rank), dE(1, rank), dA(rank, cols);
  const Product<T>& dx = gradient.product;  // its left is dy, and its tail_left takes dh
  OutputGradient of_dy{
      rows,           136,      rank,      Type::bfloat16, Type::bfloat16, dx.left.data(),
      dx.left.stride, B.data(), B.stride,  E.data(),       hidden.data(),  0.75f,
      1.0f,           nullptr,  dB.data(), dB.stride,      dE.data()};
  const Matrix<T> dh(rows, rank);
  of_dy.dh = dh.data();
  of_dy.term = {dx.tail_left.data(), dx.tail_left.stride, false};
  of_dy.dE_later = true;
  const DeviceArray<float> scratch(output_gradient_scratch_bytes(of_dy) / 4);
  before = cuda_model::grids_run();
  ASSERT_EQ(launch_output_gradient(of_dy, scratch.data(), nullptr), 0);
  ASSERT_EQ(launch_linear_product(gradient.problem(), nullptr), 0);
  InputFactorGradient end{};
  end.cols = cols;
  end.rank = rank;
  end.factor_type = Type::bfloat16;
  end.dA = dA.data();
  end.dA_stride = dA.stride;
  end.gate = gate_gradient(of_dy, scratch.data());
  ASSERT_EQ(launch_input_factor_end(end, gradient.partial.data(), gradient.slices, nullptr), 0);
  EXPECT_EQ(cuda_model::grids_run() - before, 4);

  expect_close<T>("dA", dA, rows, [&](int64_t r, int64_t j) {
    Expected e;
    for (int64_t i = 0; i < rows; ++i) e.add(gradient.x.at(i, j) * dh.written(i, r));
    return e;
  });
  expect_close<T>("dE", dE, rows + 136, [&](int64_t, int64_t r) {
    Expected e;
    for (int64_t n = 0; n < 136; ++n) {
      for (int64_t i = 0; i < rows; ++i)
        e.add(0.75 * dx.left.at(i, n) * hidden.at(i, r) * B.at(n, r));
    }
    return e;
  });
}

}  // namespace
}  // namespace rankwise::kernels
