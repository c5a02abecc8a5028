// Matrices for kernel tests: random values in device memory, and the same values as float64.
#pragma once

#include <cuda_model/device.h>
#include <cuda_model/device_memory.h>
#include <cuda_model/schedule.h>
#include <kernels/dropout_mask.h>
#include <kernels/lora_linear.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace rankwise::kernels {

// u, the largest relative error of one rounding to the type, and the least number above zero.
struct Format {
  double u, tiny;
};

inline Format format_of(Type type) {
  if (type == Type::bfloat16) return {0x1p-8, 0x1p-133};
  return type == Type::float16 ? Format{0x1p-11, 0x1p-24} : Format{0x1p-24, 0x1p-149};
}

template <typename T>
constexpr Type type_of = std::is_same_v<T, float>           ? Type::float32
                         : std::is_same_v<T, __nv_bfloat16> ? Type::bfloat16
                                                            : Type::float16;

// How a matrix lies in memory: elements between its rows beyond the columns, and elements of offset
// from a multiple of 16 bytes.
struct Layout {
  int64_t gap = 0;
  int offset = 0;
  cuda_model::Flush flush = cuda_model::Flush::end;
};

// [rows, cols] in device memory, and its values. The memory between rows is poison.
template <typename T>
struct Matrix {
  int64_t rows, cols, stride;
  cuda_model::DeviceArray<T> memory;
  std::vector<double> values;

  // Poison, to be written by a kernel.
  Matrix(int64_t rows_, int64_t cols_, const Layout& layout = {})
      : rows(rows_),
        cols(cols_),
        stride(cols_ + layout.gap),
        memory(rows_ > 0 ? (rows_ - 1) * stride + cols_ : 0,
               layout.flush == cuda_model::Flush::start ? 0 : layout.offset, layout.flush) {}

  static Matrix random(int64_t rows, int64_t cols, std::mt19937& generator,
                       const Layout& layout = {}) {
    Matrix matrix(rows, cols, layout);
    std::normal_distribution<float> normal;
    matrix.values.resize(rows * cols);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        matrix.set(i, j, normal(generator));
      }
    }
    return matrix;
  }

  // Of a matrix with values.
  void set(int64_t i, int64_t j, float value) {
    const T rounded = T(value);
    memory[i * stride + j] = rounded;
    values[i * cols + j] = static_cast<double>(static_cast<float>(rounded));
  }

  T* data() const { return memory.data(); }
  double at(int64_t i, int64_t j) const { return values[i * cols + j]; }
  // What a kernel wrote.
  double written(int64_t i, int64_t j) const {
    return static_cast<double>(static_cast<float>(memory[i * stride + j]));
  }
  std::vector<unsigned char> bytes() const {
    const auto* first = reinterpret_cast<const unsigned char*>(memory.data());
    return {first, first + memory.size() * sizeof(T)};
  }
};

// 0 or 1 for each element of [rows, cols], by the definition in dropout_mask.h.
inline std::vector<double> keep_mask(int64_t rows, int64_t cols, uint64_t seed,
                                     uint32_t threshold) {
  std::vector<double> mask(rows * cols);
  for (int64_t i = 0; i < rows * cols; ++i) {
    const Philox block = philox(static_cast<uint64_t>(i / elements_per_block), seed);
    mask[i] = dropout_number(block, static_cast<int>(i % elements_per_block)) >= threshold;
  }
  return mask;
}

}  // namespace rankwise::kernels
