// The kernel of linear_product.h: one block on each multiprocessor goes through tiles of the
// output.
//
//   warpgroup 0       one thread: loads operands into the ring of stages      load_operands.h
//   warpgroups 1, 2   multiply what is there, 64 rows each                    multiply_operands.h
//                     and write the tile                                      store_result.h
#include "drop_sums.h"
#include "linear_product.h"
#include "load_operands.h"
#include "multiply_operands.h"
#include "store_result.h"

namespace rankwise::kernels {
namespace {

// Of a thread: 64 Ki registers are shared among 128 that load and 256 that multiply.
constexpr int loading_registers = 40, multiplying_registers = 232;

__device__ inline void prepare(const ProductArguments& p, const SharedTiles& shared) {
  prefetch(p.left);
  prefetch(p.right);
  prefetch(p.out);
  if (p.tail_steps > 0) {
    prefetch(p.tail_left);
    prefetch(p.tail_right);
  }
  for (uint32_t i = 0; i < stages; ++i) {
    barrier_init(shared.full(i), 1);
    barrier_init(shared.empty(i), multiplying_warps);
  }
  barrier_init_fence();
}

template <typename T, bool right_by_row, bool dropped>
__device__ inline void multiply_tiles(const ProductArguments& p, const SharedTiles& shared,
                                      uint32_t group) {
  // Equal in all lanes, which the compiler is to know.
  const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x % warpgroup / 32, 0);
  const int first_row = static_cast<int>(group * group_rows + warp * result_rows);
  Ring ring;
  float sums[sums_each];
  for (int tile = blockIdx.x; tile < p.tiles_down * p.tiles_across; tile += gridDim.x) {
    const TilePlace of_block = place_of(p, tile);
    const TilePlace place{of_block.row + first_row, of_block.col};
    TileProducts<T, right_by_row> products(shared, group, ring, sums);
    if constexpr (dropped) {
      products.start_term(p);
      products.finish();
      drop_sums(p, place, sums);
    }
    products.start_product(p);
    if constexpr (!dropped) products.start_term(p);
    uint32_t bias[column_pairs];
    load_bias(bias, p, place.col);
    products.finish();
    store_result<T>(p, shared, group * 4 + warp, place, sums, bias);
  }
  if (threadIdx.x % 32 == 0) wait_for_stores<0>();
}

template <typename T, bool right_by_row, bool dropped>
__global__ void __launch_bounds__(product_threads, 1)
    linear_product(const __grid_constant__ ProductArguments p) {
  const SharedTiles shared = SharedTiles::of_block();
  const uint32_t group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / warpgroup, 0);
  if (threadIdx.x == 0) prepare(p, shared);
  __syncthreads();
  wait_for_earlier_kernels();
  if (group == 0) {
    give_registers<loading_registers>();
    if (threadIdx.x == 0) {
      let_next_kernel_start();
      load_operands<right_by_row, dropped>(p, shared);
    }
  } else {
    take_registers<multiplying_registers>();
    multiply_tiles<T, right_by_row, dropped>(p, shared, group - 1);
  }
}

bool drops(const LinearProduct& p) {
  return p.rank > 0 && p.dropout.threshold > 0;
}

template <typename T>
int launch_typed(const LinearProduct& problem, const ProductArguments& arguments, void* stream) {
  const int tiles = arguments.tiles_down * arguments.tiles_across;
  const auto blocks =
      static_cast<unsigned>(tiles < problem.multiprocessors ? tiles : problem.multiprocessors);
  const auto launch = [&](auto kernel) {
    return launch_early(kernel, blocks, product_threads, product_shared_bytes, stream, arguments);
  };
  if (!problem.right_by_row) return launch(linear_product<T, false, false>);
  return launch(drops(problem) ? linear_product<T, true, true> : linear_product<T, true, false>);
}

int make_maps(ProductArguments& arguments, const LinearProduct& p) {
  const auto map = [&](TensorMap& to, const Operand& of, int64_t rows, int64_t cols, int box_rows) {
    return make_tensor_map(to, p.type == Type::bfloat16, of.data, rows, cols, of.stride, box_rows);
  };
  // right or tail_right, `length` along the depth.
  const auto map_right = [&](TensorMap& to, const Operand& of, int64_t length) {
    return p.right_by_row ? map(to, of, length, p.cols, tile_depth)
                          : map(to, of, p.cols, length, tile_cols);
  };
  int error = map(arguments.left, p.left, p.rows, p.depth, tile_rows);
  if (!error) error = map_right(arguments.right, p.right, p.depth);
  if (!error && p.rank > 0)
    error = map(arguments.tail_left, p.tail_left, p.rows, p.rank, tile_rows);
  if (!error && p.rank > 0) error = map_right(arguments.tail_right, p.tail_right, p.rank);
  if (!error) error = map(arguments.out, {p.out, p.out_stride}, p.rows, p.cols, result_rows);
  return error;
}

int divide_up(int64_t value, int64_t by) {
  return static_cast<int>((value + by - 1) / by);
}

// Rows of `length` elements.
bool lies_well(const Operand& matrix, int64_t length) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride * 2 % 16 == 0 &&
         matrix.stride >= length;
}

}  // namespace

bool takes(const LinearProduct& p) {
  constexpr int64_t longest = int64_t{1} << 30;
  const bool sizes = p.rows > 0 && p.cols > 0 && p.depth > 0 && p.rows <= longest &&
                     p.cols <= longest && p.depth <= longest && p.rank >= 0 && p.rank <= max_rank &&
                     p.cols % 8 == 0 && p.depth % 8 == 0 && p.multiprocessors > 0 &&
                     (p.rows / tile_rows + 1) * (p.cols / tile_cols + 1) <= longest;
  const auto right_lies_well = [&](const Operand& right, int64_t length) {
    return lies_well(right, p.right_by_row ? p.cols : length);
  };
  const bool tail =
      p.rank == 0 || (lies_well(p.tail_left, p.rank) && right_lies_well(p.tail_right, p.rank));
  return sizes && p.type != Type::float32 && tail && lies_well(p.left, p.depth) &&
         right_lies_well(p.right, p.depth) && lies_well({p.bias, 0}, 0) &&
         (p.right_by_row || !drops(p)) && lies_well({p.out, p.out_stride}, p.cols);
}

int launch_linear_product(const LinearProduct& problem, void* stream) {
  if (!takes(problem)) return cudaErrorInvalidValue;
  ProductArguments arguments{};
  const int error = make_maps(arguments, problem);
  if (error) return error;
  arguments.bias = problem.bias;
  arguments.dropout = problem.dropout;
  arguments.rows = static_cast<int>(problem.rows);
  arguments.cols = static_cast<int>(problem.cols);
  arguments.depth_blocks = divide_up(problem.depth, tile_depth);
  arguments.tail_steps = divide_up(problem.rank, step_depth);
  arguments.tiles_down = divide_up(problem.rows, tile_rows);
  arguments.tiles_across = divide_up(problem.cols, tile_cols);
  return problem.type == Type::bfloat16 ? launch_typed<__nv_bfloat16>(problem, arguments, stream)
                                        : launch_typed<__half>(problem, arguments, stream);
}

}  // namespace rankwise::kernels
