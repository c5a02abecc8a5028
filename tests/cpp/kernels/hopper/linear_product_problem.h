// The operands of a product with the LoRA term in its sums, and what it must be.
#pragma once

#include <cuda_model/hopper.h>
#include <cuda_model/tensor_core.h>
#include <kernels/hopper/linear_product.h>

#include "../kernel_checks.h"

namespace rankwise::kernels {

struct ProductCase {
  int64_t rows, cols, depth, rank;
  bool right_by_row, bias = true;
  int multiprocessors = 2;
  uint32_t threshold = 0;  // of the term's dropout
};

// Operands of a case, their rows further apart than they are long; the memory between is poison.
template <typename T>
struct Product {
  ProductCase c;
  std::mt19937 generator{5};
  Matrix<T> left, right, tail_left, tail_right, bias, out;
  cuda_model::DeviceArray<int64_t> seed{std::vector<int64_t>{-7}};
  std::vector<double> kept;

  explicit Product(const ProductCase& of)
      : c(of),
        left(Matrix<T>::random(c.rows, c.depth, generator, {8})),
        right(random_right(c.depth)),
        tail_left(Matrix<T>::random(c.rows, c.rank, generator, {padding(c.rank)})),
        tail_right(random_right(c.rank)),
        bias(Matrix<T>::random(1, c.cols, generator)),
        out(c.rows, c.cols, {16}),
        kept(keep_mask(c.rows, c.cols, static_cast<uint64_t>(seed[0]), c.threshold)) {
    cuda_model::set_tensor_core(cuda_model::sm_90_tensor_core);
  }
  ~Product() { cuda_model::set_tensor_core(cuda_model::sm_80_tensor_core); }

  // To the next multiple of 16 bytes, and as much again.
  static int64_t padding(int64_t cols) { return 16 - cols % 8; }

  Matrix<T> random_right(int64_t length) {
    return c.right_by_row ? Matrix<T>::random(length, c.cols, generator, {8})
                          : Matrix<T>::random(c.cols, length, generator, {padding(length)});
  }

  static Operand operand(const Matrix<T>& matrix) { return {matrix.data(), matrix.stride}; }

  LinearProduct problem() const {
    return {c.rows,
            c.cols,
            c.depth,
            c.rank,
            type_of<T>,
            c.right_by_row,
            operand(left),
            operand(right),
            operand(tail_left),
            operand(tail_right),
            c.bias ? bias.data() : nullptr,
            out.data(),
            out.stride,
            c.multiprocessors,
            {seed.data(), c.threshold}};
  }

  void everything() { ASSERT_EQ(launch_linear_product(problem(), nullptr), 0); }
  std::vector<unsigned char> written() const { return out.bytes(); }

  Expected expected(int64_t i, int64_t j) const {
    Expected sum;
    const auto add = [&](const Matrix<T>& a, const Matrix<T>& b, int64_t length) {
      for (int64_t k = 0; k < length; ++k) {
        sum.add(a.at(i, k) * (c.right_by_row ? b.at(k, j) : b.at(j, k)));
      }
    };
    add(left, right, c.depth);
    if (kept[i * c.cols + j] != 0) add(tail_left, tail_right, c.rank);
    if (c.bias) sum.add(bias.at(0, j));
    return sum;
  }
};

}  // namespace rankwise::kernels
