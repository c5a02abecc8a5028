// Right operands of the micro-kernel: some columns of a matrix, packed in the order in which the
// kernel reads them. They stay in a core's cache while all rows of the left operand pass by.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace rankwise {

constexpr int64_t panel_cols = 64;  // four AVX-512 registers

// A matrix as addresses, of any strides.
template <typename T>
struct Elements {
  Elements(const T* data_, int64_t down_, int64_t across_)
      : data(data_), down(down_), across(across_) {}
  explicit Elements(const at::Tensor& matrix)
      : Elements(matrix.const_data_ptr<T>(), matrix.stride(0), matrix.stride(1)) {}

  Elements from(int64_t row, int64_t col) const {
    return {data + row * down + col * across, down, across};
  }
  Elements transposed() const { return {data, across, down}; }
  const T& operator()(int64_t row, int64_t col) const { return data[row * down + col * across]; }

  const T* data;
  int64_t down, across;
};

// Packs b [inner, cols] into panel [inner_padded, stride]: float32 as it is, bfloat16 with rows
// 2 i and 2 i + 1 interleaved; a last odd row is followed by zeros.
template <typename T>
void pack(Elements<T> b, int64_t inner, int64_t cols, T* panel, int64_t stride);

// Brings `rows` rows of `cols` numbers to the core's cache before they are written.
template <typename T>
void prefetch_rows(const T* first, int64_t rows, int64_t cols, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, first += stride)
    for (int64_t j = 0; j < cols; j += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(first + j, /*for writing=*/1);
}

}  // namespace rankwise
