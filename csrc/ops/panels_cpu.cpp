// Packing, and the loops around oneDNN's micro-kernel.
#include "panels_cpu.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "cpu_blocks.h"
#include "products_cpu.h"
#include "vector_clones.h"

namespace rankwise {
namespace {

constexpr int64_t panel_rows = 64;  // of a and out for one call of the kernel
// The kernel adds up one after the other: runs of 192 have the errors of MKL's sums, runs of 128
// have RMS errors a sixth smaller for 2 % of the time.
constexpr int64_t panel_run = 128;
constexpr int64_t longest_inner = 4096;  // a panel of 1 MiB, a core's cache
constexpr int64_t few_rows_run = 64;
constexpr int64_t least_rows = 32;  // fewer do not pay for packing

bool kernel_available() {
  static const bool available = [] {
    const float one = 1;
    float result = 0;
    try {
      at::native::cpublas::brgemm(1, 1, 1, 1, 1, 1, /*add_C=*/false, &one, &one, &result);
    } catch (const c10::Error&) {
      return false;
    }
    return result == 1;
  }();
  return available;
}

// This thread's scratch memory: at least `count` numbers of any content.
float* scratch(int64_t count) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

// A matrix as addresses.
struct Elements {
  explicit Elements(const at::Tensor& matrix)
      : data(matrix.const_data_ptr<float>()), down(matrix.stride(0)), across(matrix.stride(1)) {}
  const float* at(int64_t row, int64_t col) const { return data + row * down + col * across; }

  const float* data;
  int64_t down, across;
};

// panel[k][j] = alpha * b[k, j], contiguous. Where b's rows are not contiguous, sixteen columns at
// a time: each reads a cache line of its own to the end.
RANKWISE_VECTOR_CLONES
void pack(const float* b, int64_t down, int64_t across, int64_t inner, int64_t cols, float alpha,
          float* panel) {
  constexpr int64_t group = 16;
  if (across == 1) {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t j = 0; j < cols; ++j) panel[k * cols + j] = alpha * b[k * down + j];
    return;
  }
  for (int64_t first = 0; first < cols; first += group) {
    const int64_t count = std::min(group, cols - first);
    const float* const from = b + first * across;
    float* const to = panel + first;
    if (count == group) {
      for (int64_t k = 0; k < inner; ++k)
        for (int64_t j = 0; j < group; ++j) to[k * cols + j] = alpha * from[k * down + j * across];
    } else {
      for (int64_t k = 0; k < inner; ++k)
        for (int64_t j = 0; j < count; ++j) to[k * cols + j] = alpha * from[k * down + j * across];
    }
  }
}

// Calls body(start, size) for all rows. The kernel is generated anew for each size, so there are
// few of them: panel_rows and the powers of two below it.
template <typename Body>
void row_blocks(int64_t rows, const Body& body) {
  int64_t start = 0;
  for (int64_t size = panel_rows; start < rows; size /= 2)
    for (; start + size <= rows; start += size) body(start, size);
}

}  // namespace

bool panels_serve(at::ScalarType dtype) {
  return dtype == at::kFloat && kernel_available();
}

bool in_panels(const at::Tensor& out, int64_t inner) {
  return out.size(0) >= least_rows && inner > 0 && inner <= longest_inner &&
         panels_serve(out.scalar_type());
}

void multiply_panels(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double alpha,
                     const at::Tensor& start) {
  const int64_t inner = a.size(1);
  const Split parts(inner, panel_run), cols(out.size(1), panel_cols);
  const bool from_row = start.defined() && !start.is_same(out);
  const at::Tensor row = from_row ? start.to(at::kFloat).contiguous() : at::Tensor();
  float* const panel = scratch(inner * panel_cols);
  const Elements left(a), right(b);
  float* const result = out.mutable_data_ptr<float>();
  for (int64_t j = 0; j < cols.count(); ++j) {
    const auto [first_col, width] = cols[j];
    pack(right.at(0, first_col), right.down, right.across, inner, width, static_cast<float>(alpha),
         panel);
    row_blocks(out.size(0), [&](int64_t first_row, int64_t rows) {
      float* const block = result + first_row * out.stride(0) + first_col;
      if (from_row) {
        const float* const from = row.const_data_ptr<float>() + first_col;
        for (int64_t k = 0; k < rows; ++k) std::copy_n(from, width, block + k * out.stride(0));
      }
      for (int64_t k = 0; k < parts.count(); ++k) {
        at::native::cpublas::brgemm(rows, width, parts[k].size, left.down, width, out.stride(0),
                                    start.defined() || k > 0, left.at(first_row, parts[k].start),
                                    panel + parts[k].start * width, block);
      }
    });
  }
}

void multiply_few_rows(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double alpha,
                       bool accumulate) {
  const int64_t rows = a.size(0), inner = a.size(1);
  float* const packed = scratch(rows * inner);
  const Elements left(a), right(b);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < inner; ++k)
      packed[i * inner + k] = static_cast<float>(alpha) * *left.at(i, k);
  float* const result = out.mutable_data_ptr<float>();
  const Split cols(out.size(1), panel_cols), parts(inner, few_rows_run);
  for (int64_t j = 0; j < cols.count(); ++j) {
    const auto [first_col, width] = cols[j];
    row_blocks(rows, [&](int64_t first_row, int64_t count) {
      for (int64_t k = 0; k < parts.count(); ++k) {
        at::native::cpublas::brgemm(
            count, width, parts[k].size, inner, right.down, out.stride(0), accumulate || k > 0,
            packed + first_row * inner + parts[k].start, right.at(parts[k].start, first_col),
            result + first_row * out.stride(0) + first_col);
      }
    });
  }
}

}  // namespace rankwise
