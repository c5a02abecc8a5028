// Work on the CPU in blocks whose borders depend on shapes alone and which one thread computes
// whole: results are the same bits for every number of threads.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace rankwise {

// Elements of a converted or masked block: 1 MiB of float32, within a core's L2 cache.
constexpr int64_t scratch_elements = int64_t{1} << 18;

struct Range {
  int64_t start, size;

  at::Tensor of(const at::Tensor& tensor, int64_t dim) const {
    return tensor.narrow(dim, start, size);
  }
};

// A block as addresses: rows of adjacent elements, `stride` apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  T* operator[](int64_t i) const { return data + i * stride; }
  operator Rows<const T>() const { return {data, stride}; }
};

// [0, total) in steps of `step`.
class Split {
 public:
  Split(int64_t total, int64_t step) : total_(total), step_(step) {}
  int64_t step() const { return step_; }
  int64_t count() const { return (total_ + step_ - 1) / step_; }
  Range operator[](int64_t i) const { return {i * step_, std::min(step_, total_ - i * step_)}; }

 private:
  int64_t total_, step_;
};

// The blocks of a product with inner size `depth`: large enough for BLAS to be efficient, enough of
// them for many cores.
struct Tile {
  Range row, col;

  at::Tensor of(const at::Tensor& matrix) const { return col.of(row.of(matrix, 0), 1); }
};
std::vector<Tile> output_tiles(const at::Tensor& result, int64_t depth);

// Rows (or columns) of a block that has `width` elements across.
int64_t scratch_step(int64_t width);

// Calls body(i) for i in [0, count), each on one thread, with autograd and autocast off. BLAS
// inside uses one thread, whatever the number of blocks.
void run_blocks(int64_t count, const std::function<void(int64_t)>& body);

// The same for blocks of at most `products` multiplications each: on fewer threads where waking
// them would take longer than they save.
void run_products(int64_t count, int64_t products, const std::function<void(int64_t)>& body);

}  // namespace rankwise
