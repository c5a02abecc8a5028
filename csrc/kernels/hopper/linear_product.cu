// The kernel of linear_product.h: one block on each multiprocessor goes through tiles of the
// output, or does what goes on beside them (beside_product.h).
//
//   warpgroup 0       one thread: loads operands into the ring of stages      load_operands.h
//   warpgroups 1, 2   multiply what is there, 64 rows each                    multiply_operands.h
//                     and write the tile                                      store_result.h
#include "../skinny_products.h"
#include "beside_product.h"
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
                                      uint32_t group, const Share& share) {
  // Equal in all lanes, which the compiler is to know.
  const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x % warpgroup / 32, 0);
  const int first_row = static_cast<int>(group * group_rows + warp * result_rows);
  Ring ring;
  float sums[sums_each];
  for (int tile = share.first; tile < p.tiles_down * p.tiles_across; tile += share.step) {
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

enum class Form { plain, dropped, beside, beside_cut };

template <typename T, bool right_by_row, Form form>
__global__ void __launch_bounds__(product_threads, 1)
    linear_product(const __grid_constant__ ProductArguments p) {
  constexpr bool dropped = form == Form::dropped, cut = form == Form::beside_cut;
  constexpr bool beside = form == Form::beside || cut;
  const SharedTiles shared = SharedTiles::of_block();
  const uint32_t group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / warpgroup, 0);
  if (threadIdx.x == 0) prepare(p, shared);
  __syncthreads();
  wait_for_earlier_kernels();
  Role role{false, {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)}};
  if constexpr (beside) role = role_of_block<!right_by_row>(p.beside);
  if (group == 0) {
    give_registers<loading_registers>();
    if (threadIdx.x > 0) return;
    let_next_kernel_start();
    if (beside && role.beside) {
      load_beside<right_by_row, cut>(p, shared, role.share);
    } else {
      load_operands<right_by_row, dropped, beside && !right_by_row>(p, shared, role.share);
    }
  } else {
    take_registers<multiplying_registers>();
    if (beside && role.beside) {
      multiply_beside<T, right_by_row, cut>(p, shared, group - 1, role.share);
    } else {
      multiply_tiles<T, right_by_row, dropped>(p, shared, group - 1, role.share);
    }
  }
}

bool drops(const LinearProduct& p) {
  return p.rank > 0 && p.dropout.threshold > 0;
}

template <typename T>
int launch_typed(const LinearProduct& problem, const ProductArguments& arguments, void* stream) {
  const int tiles = arguments.tiles_down * arguments.tiles_across;
  const int free = problem.multiprocessors - arguments.beside.blocks;
  const auto blocks =
      static_cast<unsigned>((tiles < free ? tiles : free) + arguments.beside.blocks);
  const auto launch = [&](auto kernel) {
    return launch_early(kernel, blocks, product_threads, product_shared_bytes, stream, arguments);
  };
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (problem.beside.blocks > 0 && problem.beside.cut) {
      return launch(problem.right_by_row ? linear_product<T, true, Form::beside_cut>
                                         : linear_product<T, false, Form::beside_cut>);
    }
  }
  if (problem.beside.blocks > 0) {
    return launch(problem.right_by_row ? linear_product<T, true, Form::beside>
                                       : linear_product<T, false, Form::beside>);
  }
  if (!problem.right_by_row) return launch(linear_product<T, false, Form::plain>);
  return launch(drops(problem) ? linear_product<T, true, Form::dropped>
                               : linear_product<T, true, Form::plain>);
}

template <typename Map>
int make_maps(BesideArguments& arguments, const LinearProduct& p, const Map& map) {
  const Beside& b = p.beside;
  const int directions = b.cut ? beside_rows(true) : static_cast<int>(b.rank);
  if (!p.right_by_row) {
    return map(arguments.skinny, b.A, directions, p.depth, beside_rows(b.cut));
  }
  const int error = map(arguments.x, b.x, p.rows, p.cols, tile_rows);
  return error ? error : map(arguments.skinny, b.dh, p.rows, directions, tile_rows);
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
  if (!error && p.beside.blocks > 0) error = make_maps(arguments.beside, p, map);
  if (!error) error = map(arguments.out, {p.out, p.out_stride}, p.rows, p.cols, result_rows);
  return error;
}

int whole_parts(int64_t value, int64_t by) {
  return static_cast<int>(divide_up(value, by));
}

// Rows of `length` elements.
bool lies_well(const Operand& matrix, int64_t length) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride * 2 % 16 == 0 &&
         matrix.stride >= length;
}

bool takes_beside(const LinearProduct& p) {
  const Beside& b = p.beside;
  if (b.blocks == 0) return true;
  const int64_t directions = b.cut ? cut_rows : b.rank;
  if (b.blocks < 0 || b.blocks >= p.multiprocessors || drops(p) || b.rank < 1 ||
      b.rank > beside_directions || p.rank != (b.cut ? split_parts * b.rank : b.rank) ||
      (b.cut && p.type != Type::bfloat16))
    return false;
  if (!p.right_by_row) return b.hidden && b.flags && lies_well(b.A, p.depth);
  return b.partial && b.chunk > 0 && lies_well(b.x, p.cols) && lies_well(b.dh, directions);
}

BesideArguments beside_of(const LinearProduct& p) {
  const Beside& b = p.beside;
  BesideArguments of{};
  of.blocks = b.blocks;
  of.chunk = b.chunk;
  of.rank = static_cast<int>(b.rank);
  of.hidden = b.hidden;
  of.term = const_cast<void*>(p.tail_left.data);
  of.term_stride = p.tail_left.stride;
  of.scale = b.scale;
  of.E = b.E;
  of.flags = b.flags;
  of.partial = b.partial;
  return of;
}

}  // namespace

int64_t beside_flags(int64_t rows) {
  return 1 + whole_parts(rows, tile_rows);
}

int64_t beside_slices(int64_t rows, int chunk) {
  return whole_parts(whole_parts(rows, tile_rows), chunk);
}

int64_t beside_partial_bytes(int64_t slices, int64_t cols, int64_t rank) {
  return slices * cols * partial_pitch(rank) * static_cast<int64_t>(sizeof(float));
}

int beside_chunk(int64_t rows) {
  constexpr int slices = 4;
  return whole_parts(whole_parts(rows, tile_rows), slices);
}

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
         (p.right_by_row || !drops(p)) && lies_well({p.out, p.out_stride}, p.cols) &&
         takes_beside(p);
}

int launch_linear_product(const LinearProduct& problem, void* stream) {
  if (!takes(problem)) return cudaErrorInvalidValue;
  ProductArguments arguments{};
  arguments.beside = beside_of(problem);
  int error = make_maps(arguments, problem);
  if (!error && problem.beside.flags) {
    error =
        zero_memory(problem.beside.flags, beside_flags(problem.rows) * sizeof(uint32_t), stream);
  }
  if (error) return error;
  arguments.bias = problem.bias;
  arguments.dropout = problem.dropout;
  arguments.rows = static_cast<int>(problem.rows);
  arguments.cols = static_cast<int>(problem.cols);
  arguments.depth_blocks = whole_parts(problem.depth, tile_depth);
  arguments.tail_steps = whole_parts(problem.rank, step_depth);
  arguments.tiles_down = whole_parts(problem.rows, tile_rows);
  arguments.tiles_across = whole_parts(problem.cols, tile_cols);
  return problem.type == Type::bfloat16 ? launch_typed<__nv_bfloat16>(problem, arguments, stream)
                                        : launch_typed<__half>(problem, arguments, stream);
}

}  // namespace rankwise::kernels
