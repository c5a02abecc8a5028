// Blocks of CPU work: sizes and the parallel loop.
#include "blocks.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>

// In libtorch where torch was built with MKL, else null. Returns the thread's former setting.
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));
// Of torch's OpenMP, which oneDNN asks: also where this file was compiled without it.
extern "C" int omp_get_max_threads() __attribute__((weak));
extern "C" void omp_set_num_threads(int) __attribute__((weak));

namespace rankwise {
namespace {

// Measured with MKL and oneDNN: smaller tiles than these lose more to packing than cores win.
struct LeastTile {
  int64_t macs, rows, cols;
};
constexpr LeastTile least_tile{int64_t{1} << 25, 256, 384};  // 0.25 ms of float64 work, or more
constexpr LeastTile least_tile_16_bit{int64_t{1} << 25, 256, 1024};
constexpr int64_t least_products = int64_t{1} << 18;  // of a thread: about 10 microseconds
constexpr int64_t most_tiles = 64, col_multiple = 64;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Holds MKL and oneDNN to the calling thread. Being inside a parallel region is not enough for MKL
// once torch.set_num_threads() was called, and a lone block runs outside of one.
class OneThreadedMath {
 public:
  OneThreadedMath() {
    if (MKL_Set_Num_Threads_Local != nullptr) mkl_ = MKL_Set_Num_Threads_Local(1);
    if (omp_set_num_threads == nullptr) return;
    openmp_ = omp_get_max_threads();
    omp_set_num_threads(1);
  }
  ~OneThreadedMath() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(mkl_);
    if (omp_set_num_threads != nullptr) omp_set_num_threads(openmp_);
  }
  OneThreadedMath(const OneThreadedMath&) = delete;
  OneThreadedMath& operator=(const OneThreadedMath&) = delete;

 private:
  int mkl_ = 0, openmp_ = 1;
};

}  // namespace

std::vector<Tile> output_tiles(const at::Tensor& result, int64_t depth) {
  const int64_t rows = result.size(0), cols = result.size(1);
  if (rows == 0 || cols == 0) return {};
  const LeastTile& least = result.element_size() == 2 ? least_tile_16_bit : least_tile;
  const int64_t wanted = std::clamp<int64_t>(rows * cols * depth / least.macs, 1, most_tiles);
  const int64_t row_parts = std::clamp<int64_t>(rows / least.rows, 1, wanted);
  const int64_t col_parts = std::clamp<int64_t>(cols / least.cols, 1, divide_up(wanted, row_parts));
  const Split col_split(cols, divide_up(divide_up(cols, col_parts), col_multiple) * col_multiple);
  const Split row_split(rows, divide_up(rows, row_parts));
  std::vector<Tile> tiles;
  for (int64_t j = 0; j < col_split.count(); ++j) {
    for (int64_t i = 0; i < row_split.count(); ++i) tiles.push_back({row_split[i], col_split[j]});
  }
  return tiles;
}

int64_t scratch_step(int64_t width) {
  const int64_t step = scratch_elements / std::max<int64_t>(width, 1);
  return std::clamp<int64_t>(step / 16 * 16, 16, 512);
}

void run_blocks(int64_t count, const std::function<void(int64_t)>& body) {
  run_products(count, least_products, body);
}

void run_products(int64_t count, int64_t products, const std::function<void(int64_t)>& body) {
  const auto worth = static_cast<double>(count) * static_cast<double>(products) / least_products;
  const auto most = static_cast<double>(std::min<int64_t>(count, at::get_num_threads()));
  const auto threads = static_cast<int64_t>(std::min(std::max(worth, 1.0), most));
  std::atomic<int64_t> next = 0;  // blocks differ in length: a thread takes the next one left
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const OneThreadedMath one_thread;
    for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

}  // namespace rankwise
