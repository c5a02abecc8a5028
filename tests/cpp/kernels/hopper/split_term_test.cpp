// Float32 factors as three bfloat16 parts: what the parts' product is, infinities, NaN and the
// largest numbers, and the product of a layer that takes the term so.
#include <kernels/split_term.h>

#include "linear_product_problem.h"

namespace rankwise::kernels {
namespace {

constexpr double term_error = 3 * 0x1p-16;  // of the sum of absolute products

// left [rows, rank] and right [rank, cols] or, by column, [cols, rank], and their parts.
struct Term {
  int64_t rows, cols, rank;
  bool by_row;
  std::mt19937 generator{3};
  Matrix<float> left, right;
  Matrix<__nv_bfloat16> left_parts, right_parts;

  Term(int64_t rows_, int64_t cols_, int64_t rank_, bool by_row_)
      : rows(rows_),
        cols(cols_),
        rank(rank_),
        by_row(by_row_),
        left(Matrix<float>::random(rows, rank, generator, {1})),
        right(by_row ? Matrix<float>::random(rank, cols, generator, {3})
                     : Matrix<float>::random(cols, rank, generator, {3})),
        left_parts(rows, directions(), {8}),
        right_parts(by_row ? directions() : cols, by_row ? cols : directions(), {8}) {}

  // A multiple of 8, so that rows lie at multiples of 16 bytes.
  int64_t directions() const { return split_parts * rank; }

  static SplitMatrix split(const Matrix<float>& from, const Matrix<__nv_bfloat16>& to,
                           int64_t part) {
    return {from.rows, from.cols, from.data(), from.stride, 1, to.data(), to.stride, part};
  }

  void run() const {
    const int64_t right_part = by_row ? rank * right_parts.stride : rank;
    ASSERT_EQ(launch_split_term(split(left, left_parts, rank),
                                split(right, right_parts, right_part), nullptr),
              0);
  }

  double right_at(int64_t k, int64_t j) const { return by_row ? right.at(k, j) : right.at(j, k); }

  Expected exact(int64_t i, int64_t j) const {
    Expected sum;
    for (int64_t k = 0; k < rank; ++k) sum.add(left.at(i, k) * right_at(k, j));
    return sum;
  }

  // Sums in float64, of what was written.
  double of_parts(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t k = 0; k < directions(); ++k) {
      const double b = by_row ? right_parts.written(k, j) : right_parts.written(j, k);
      sum += left_parts.written(i, k) * b;
    }
    return sum;
  }
};

void expect_close_parts(const Term& term) {
  for (int64_t i = 0; i < term.rows; ++i) {
    for (int64_t j = 0; j < term.cols; ++j) {
      const Expected e = term.exact(i, j);
      ASSERT_LE(std::fabs(term.of_parts(i, j) - e.value), 1.01 * term_error * e.absolute)
          << i << ", " << j;
    }
  }
}

TEST(SplitTerm, IsTheTermOfFloat32) {
  cuda_model::set_schedule({});
  for (const bool by_row : {false, true}) {
    for (const int64_t rank : {1, 5, 16}) {
      Term term(70, 24, rank, by_row);
      for (int64_t i = 0; i < term.rows; ++i) {  // each row of another magnitude
        for (int64_t k = 0; k < rank; ++k) {
          term.left.set(i, k, static_cast<float>(std::ldexp(term.left.at(i, k), i - 35)));
        }
      }
      term.run();
      expect_close_parts(term);
    }
  }
}

TEST(SplitTerm, WritesItsPartsAlone) {
  cuda_model::set_schedule({});
  for (const bool by_row : {false, true}) {
    const Term term(10, 16, 3, by_row);
    term.run();
    for (const Matrix<__nv_bfloat16>* parts : {&term.left_parts, &term.right_parts}) {
      for (int64_t i = 0; i + 1 < parts->rows; ++i) {
        ASSERT_TRUE(std::isnan(parts->written(i, parts->cols))) << "a store between the rows";
      }
    }
  }
}

// As in float32: an infinity times a number is infinite, times zero NaN, with its sign.
TEST(SplitTerm, NonfiniteNumbersAreThoseOfFloat32) {
  cuda_model::set_schedule({});
  for (const bool by_row : {false, true}) {
    Term term(6, 8, 4, by_row);
    const auto set_right = [&](int64_t k, int64_t j, float value) {
      by_row ? term.right.set(k, j, value) : term.right.set(j, k, value);
    };
    term.left.set(1, 2, INFINITY);
    term.left.set(2, 0, NAN);
    set_right(1, 3, -INFINITY);
    set_right(2, 5, 0.0f);
    set_right(2, 6, 0.5f);  // no low part
    term.run();
    for (int64_t i = 0; i < term.rows; ++i) {
      for (int64_t j = 0; j < term.cols; ++j) {
        const double wanted = term.exact(i, j).value, got = term.of_parts(i, j);
        if (std::isfinite(wanted)) continue;
        ASSERT_TRUE(std::isnan(wanted) ? std::isnan(got) : got == wanted) << i << ", " << j;
      }
    }
  }
}

TEST(SplitTerm, TheLargestNumbersStayFinite) {
  cuda_model::set_schedule({});
  Term term(1, 8, 1, false);
  term.left.set(0, 0, std::numeric_limits<float>::max());
  term.run();
  expect_close_parts(term);
}

// What the layer does: the split, then the product with three times as many directions.
TEST(SplitTerm, JoinsTheSumsOfTheProduct) {
  cuda_model::set_schedule({});
  for (const bool by_row : {false, true}) {
    Product<__nv_bfloat16> product(ProductCase{130, 264, 72, 8 * split_parts, by_row});
    const Term term(130, 264, 8, by_row);
    term.run();
    LinearProduct problem = product.problem();
    problem.tail_left = Product<__nv_bfloat16>::operand(term.left_parts);
    problem.tail_right = Product<__nv_bfloat16>::operand(term.right_parts);
    ASSERT_EQ(launch_linear_product(problem, nullptr), 0);
    product.c.rank = 0;
    for (int64_t i = 0; i < 130; ++i) {
      for (int64_t j = 0; j < 264; ++j) {
        const Expected base = product.expected(i, j), own = term.exact(i, j);
        const double wanted = base.value + own.value;
        const double bound = 1.01 * 0x1p-8 * std::fabs(wanted) + 1.01 * term_error * own.absolute +
                             100 * 0x1p-23 * (base.absolute + own.absolute);
        ASSERT_LE(std::fabs(product.out.written(i, j) - wanted), bound) << i << ", " << j;
      }
    }
  }
}

}  // namespace
}  // namespace rankwise::kernels
