// Products with passes beside them, and what those must be.
#pragma once

#include <kernels/skinny_products.h>

#include "linear_product_problem.h"

namespace rankwise::kernels {

// `product.rank` is the factors' own.
struct BesideCase {
  ProductCase product;
  int blocks;
  bool gate = false;
  int chunk = 1;
};

constexpr float term_scale = 0.75f;

template <bool cut>
ProductCase with_parts(ProductCase c) {
  if (cut) c.rank *= split_parts;
  return c;
}

// What the launch without passes writes, its term as they left it.
template <typename T>
std::vector<unsigned char> written_alone(LinearProduct problem) {
  const Matrix<T> out(problem.rows, problem.cols, {16});
  problem.beside = {};
  problem.out = out.data();
  EXPECT_EQ(launch_linear_product(problem, nullptr), 0);
  return out.bytes();
}

// A product whose term is made by the launch itself: tail_left is poison before it. `cut`, with
// factors of float32.
template <typename T, bool cut = false>
struct Forward {
  static constexpr bool by_row = false;
  using Factor = std::conditional_t<cut, float, T>;
  BesideCase c;
  int64_t rank;
  Product<T> product;
  Matrix<Factor> A, E, hidden;
  Matrix<T> A_parts, term;
  cuda_model::DeviceArray<uint32_t> flags;

  explicit Forward(const BesideCase& of)
      : c(of),
        rank(of.product.rank),
        product(with_parts<cut>(of.product)),
        A(Matrix<Factor>::random(rank, c.product.depth, product.generator, {8})),
        E(Matrix<Factor>::random(1, rank, product.generator)),
        hidden(c.product.rows, rank),
        A_parts(cut_rows, c.product.depth, {8}),
        term(c.product.rows, product.c.rank, {16 - product.c.rank % 8}),
        flags(std::vector<uint32_t>(static_cast<size_t>(beside_flags(c.product.rows)), 77)) {}

  LinearProduct problem() const {
    LinearProduct p = product.problem();
    p.tail_left = Product<T>::operand(term);
    p.beside.blocks = c.blocks;
    p.beside.rank = rank;
    p.beside.cut = cut;
    if constexpr (cut) {
      p.beside.A = Product<T>::operand(A_parts);
    } else {
      p.beside.A = Product<T>::operand(A);
    }
    p.beside.E = c.gate ? E.data() : nullptr;
    p.beside.scale = term_scale;
    p.beside.hidden = hidden.data();
    p.beside.flags = flags.data();
    return p;
  }

  void everything() {
    if constexpr (cut) {
      const CutFactor factor{rank, A.cols, A.data(), A.stride, A_parts.data(), A_parts.stride};
      ASSERT_EQ(launch_cut_factor(factor, {}, nullptr), 0);
    }
    ASSERT_EQ(launch_linear_product(problem(), nullptr), 0);
  }

  Expected projected(int64_t i, int64_t r, double scale) const {
    Expected e;
    for (int64_t k = 0; k < product.c.depth; ++k) e.add(scale * product.left.at(i, k) * A.at(r, k));
    return e;
  }
  Expected gated(int64_t i, int64_t r) const {
    return projected(i, r, term_scale * (c.gate ? E.at(0, r) : 1.0));
  }
  // What the term's left matrix says, its parts added up.
  double written_term(int64_t i, int64_t r) const {
    return term.written(i, r) + (cut ? term.written(i, r + rank) : 0.0);
  }

  // Roughly: all that was written.
  bool is_right() const {
    for (int64_t i = 0; i < product.c.rows; ++i) {
      for (int64_t r = 0; r < rank; ++r) {
        const Expected e = gated(i, r);
        if (!(std::fabs(written_term(i, r) - e.value) <= 0.01 * e.absolute)) return false;
      }
      for (int64_t j = 0; j < product.c.cols; ++j) {
        Expected e = product.expected(i, j);  // with another term, of values that nobody has read
        for (int64_t r = 0; r < product.c.rank; ++r) {
          e.add(term.written(i, r) * product.tail_right.at(j, r));
          e.value -= product.tail_left.at(i, r) * product.tail_right.at(j, r);
        }
        if (!(std::fabs(product.out.written(i, j) - e.value) <= 0.01 * e.absolute)) return false;
      }
    }
    return true;
  }

  void check() const {
    const int64_t depth = product.c.depth;
    expect_close<Factor>("hidden", hidden, depth,
                         [&](auto i, auto r) { return projected(i, r, 1); });
    const double rounding = cut ? 0x1p-16 : format_of(type_of<T>).u;
    for (int64_t i = 0; i < product.c.rows; ++i) {
      for (int64_t r = 0; r < rank; ++r) {
        const Expected e = gated(i, r);
        const double bound = 1.01 * rounding * std::fabs(e.value) + format_of(type_of<T>).tiny +
                             static_cast<double>(depth + 3) * 0x1p-23 * e.absolute;
        ASSERT_LE(std::fabs(written_term(i, r) - e.value), bound) << "term " << i << ", " << r;
        const int64_t third = cut ? r + 2 * rank : r;
        ASSERT_EQ(term.written(i, third), term.written(i, r));
      }
    }
    EXPECT_TRUE(product.out.bytes() == written_alone<T>(problem()));
  }

  std::vector<unsigned char> written() const {
    std::vector<unsigned char> all = product.written();
    for (const auto& bytes : {hidden.bytes(), term.bytes()}) {
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  }
};

// dx, and slices of dA beside it. dh of 16 bits is the term's left matrix; of float32 its parts lie
// by themselves.
template <typename T, bool cut = false>
struct Gradient {
  static constexpr bool by_row = true;
  using Factor = std::conditional_t<cut, float, T>;
  BesideCase c;
  int64_t rank;
  Product<T> product;
  Matrix<T> x, dh_parts;
  Matrix<Factor> dh;
  int64_t pitch, slices;
  cuda_model::DeviceArray<float> partial;

  explicit Gradient(const BesideCase& of)
      : c(of),
        rank(of.product.rank),
        product(with_parts<cut>(of.product)),
        x(Matrix<T>::random(c.product.rows, c.product.cols, product.generator, {8})),
        dh_parts(c.product.rows, cut_rows),
        dh(Matrix<Factor>::random(c.product.rows, rank, product.generator)),
        pitch((rank + 7) / 8 * 8),
        slices(beside_slices(c.product.rows, c.chunk)),
        partial(slices * c.product.cols * pitch) {}

  LinearProduct problem() const {
    LinearProduct p = product.problem();
    p.beside.blocks = c.blocks;
    p.beside.rank = rank;
    p.beside.cut = cut;
    p.beside.x = Product<T>::operand(x);
    p.beside.dh = cut ? Product<T>::operand(dh_parts) : p.tail_left;
    p.beside.chunk = c.chunk;
    p.beside.partial = partial.data();
    return p;
  }

  void everything() {
    if constexpr (cut) {  // as a pass over dy writes them
      const Matrix<float> plain(dh.rows, rank);
      const int64_t step = (rank + 7) / 8 * 8;
      cuda_model::DeviceArray<float> sums(dh.rows * step);
      for (int64_t i = 0; i < dh.rows; ++i)
        for (int64_t r = 0; r < rank; ++r) sums[i * step + r] = static_cast<float>(dh.at(i, r));
      FinishRows rows{dh.rows, rank, 1, sums.data()};
      rows.gated = plain.data();
      rows.cut = dh_parts.data();
      ASSERT_EQ(launch_finish({Type::float32, rows}, nullptr), 0);
    }
    ASSERT_EQ(launch_linear_product(problem(), nullptr), 0);
  }

  double dh_at(int64_t i, int64_t r) const {
    return cut ? dh.at(i, r) : product.tail_left.at(i, r);
  }

  bool is_right() const { return worst() <= 0.01; }

  // The largest error of a slice, by its sum of absolute products; NaN where one was not written.
  double worst() const {
    double result = 0;
    for (int64_t s = 0; s < slices; ++s) {
      const int64_t first = s * c.chunk * 128,
                    end = std::min(product.c.rows, first + c.chunk * 128);
      for (int64_t j = 0; j < product.c.cols; ++j) {
        for (int64_t r = 0; r < pitch; ++r) {
          Expected e;
          for (int64_t i = first; r < rank && i < end; ++i) e.add(x.at(i, j) * dh_at(i, r));
          const double error = std::fabs(partial[(s * product.c.cols + j) * pitch + r] - e.value);
          if (!(error <= result * e.absolute)) result = error / e.absolute;
        }
      }
    }
    return result;
  }

  void check() const {
    EXPECT_LE(worst(), static_cast<double>(c.chunk * 128 + 3) * 0x1p-23);
    EXPECT_TRUE(product.out.bytes() == written_alone<T>(problem()));
  }

  std::vector<unsigned char> written() const {
    std::vector<unsigned char> all = product.written();
    const auto* first = reinterpret_cast<const unsigned char*>(partial.data());
    all.insert(all.end(), first, first + partial.size() * sizeof(float));
    return all;
  }
};

}  // namespace rankwise::kernels
