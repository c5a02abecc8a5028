// Products with passes beside them, and what those must be.
#pragma once

#include "linear_product_problem.h"

namespace rankwise::kernels {

struct BesideCase {
  ProductCase product;
  int blocks;
  bool gate = false;
  int chunk = 1;
};

constexpr float term_scale = 0.75f;

// A product whose term is made by the launch itself: tail_left is poison before it.
template <typename T>
struct Forward {
  Product<T> product;
  BesideCase c;
  Matrix<T> A, E, term, hidden;
  cuda_model::DeviceArray<uint32_t> flags;

  explicit Forward(const BesideCase& of)
      : product(of.product),
        c(of),
        A(Matrix<T>::random(of.product.rank, of.product.depth, product.generator, {8})),
        E(Matrix<T>::random(1, of.product.rank, product.generator)),
        term(of.product.rows, of.product.rank, {16 - of.product.rank % 8}),
        hidden(of.product.rows, of.product.rank),
        flags(std::vector<uint32_t>(static_cast<size_t>(beside_flags(of.product.rows)), 77)) {}

  LinearProduct problem() const {
    LinearProduct p = product.problem();
    p.tail_left = Product<T>::operand(term);
    p.beside.blocks = c.blocks;
    p.beside.A = Product<T>::operand(A);
    p.beside.E = c.gate ? E.data() : nullptr;
    p.beside.scale = term_scale;
    p.beside.hidden = hidden.data();
    p.beside.flags = flags.data();
    return p;
  }

  void everything() { ASSERT_EQ(launch_linear_product(problem(), nullptr), 0); }

  Expected projected(int64_t i, int64_t r, double scale) const {
    Expected e;
    for (int64_t k = 0; k < product.c.depth; ++k) {
      e.add(scale * product.left.at(i, k) * A.at(r, k));
    }
    return e;
  }

  // Roughly: all that was written.
  bool is_right() const {
    for (int64_t i = 0; i < product.c.rows; ++i) {
      Expected made[16];
      for (int64_t r = 0; r < product.c.rank; ++r) {
        made[r] = projected(i, r, term_scale * (c.gate ? E.at(0, r) : 1.0));
        if (!(std::fabs(term.written(i, r) - made[r].value) <= 0.01 * made[r].absolute))
          return false;
      }
      for (int64_t j = 0; j < product.c.cols; ++j) {
        Expected e = product.expected(i, j);  // with another term, of values that nobody has read
        for (int64_t r = 0; r < product.c.rank; ++r) {
          e.add(made[r].value * product.tail_right.at(j, r));
          e.value -= product.tail_left.at(i, r) * product.tail_right.at(j, r);
        }
        if (!(std::fabs(product.out.written(i, j) - e.value) <= 0.01 * e.absolute)) return false;
      }
    }
    return true;
  }

  void check() const {
    const int64_t depth = product.c.depth;
    expect_close<T>("hidden", hidden, depth, [&](auto i, auto r) { return projected(i, r, 1); });
    expect_close<T>("term", term, depth, [&](auto i, auto r) {
      return projected(i, r, term_scale * (c.gate ? E.at(0, r) : 1.0));
    });
    const Matrix<T> out(product.c.rows, product.c.cols, {16});
    LinearProduct alone = problem();
    alone.beside = {};
    alone.out = out.data();
    ASSERT_EQ(launch_linear_product(alone, nullptr), 0);
    EXPECT_TRUE(out.bytes() == product.out.bytes());
  }

  std::vector<unsigned char> written() const {
    std::vector<unsigned char> all = product.written();
    for (const auto& bytes : {hidden.bytes(), term.bytes()}) {
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  }
};

// dx, and slices of dA beside it.
template <typename T>
struct Gradient {
  Product<T> product;
  BesideCase c;
  Matrix<T> x;
  int64_t pitch, slices;
  cuda_model::DeviceArray<float> partial;

  explicit Gradient(const BesideCase& of)
      : product(of.product),
        c(of),
        x(Matrix<T>::random(of.product.rows, of.product.cols, product.generator, {8})),
        pitch((of.product.rank + 7) / 8 * 8),
        slices(beside_slices(of.product.rows, of.chunk)),
        partial(slices * of.product.cols * pitch) {}

  LinearProduct problem() const {
    LinearProduct p = product.problem();
    p.beside.blocks = c.blocks;
    p.beside.x = Product<T>::operand(x);
    p.beside.chunk = c.chunk;
    p.beside.partial = partial.data();
    return p;
  }

  void everything() { ASSERT_EQ(launch_linear_product(problem(), nullptr), 0); }

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
          for (int64_t i = first; r < product.c.rank && i < end; ++i) {
            e.add(x.at(i, j) * product.tail_left.at(i, r));
          }
          const double error = std::fabs(partial[(s * product.c.cols + j) * pitch + r] - e.value);
          if (!(error <= result * e.absolute)) result = error / e.absolute;
        }
      }
    }
    return result;
  }

  void check() const {
    EXPECT_LE(worst(), static_cast<double>(c.chunk * 128 + 3) * 0x1p-23);
    const Matrix<T> out(product.c.rows, product.c.cols, {16});
    LinearProduct alone = problem();
    alone.beside = {};
    alone.out = out.data();
    ASSERT_EQ(launch_linear_product(alone, nullptr), 0);
    EXPECT_TRUE(out.bytes() == product.out.bytes());
  }

  std::vector<unsigned char> written() const {
    std::vector<unsigned char> all = product.written();
    const auto* first = reinterpret_cast<const unsigned char*>(partial.data());
    all.insert(all.end(), first, first + partial.size() * sizeof(float));
    return all;
  }
};

}  // namespace rankwise::kernels
