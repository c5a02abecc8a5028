// Columns of A by index, and their gradients: sums over equal indices in a fixed order.
#include "lora_embedding.h"
#include "skinny_products.h"
#include "table_row.h"

namespace rankwise::kernels {
namespace {

constexpr int threads = 256;

template <typename T>
__global__ void gather(Gather p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= p.rows * p.rank) return;
  const int64_t row = i / p.rank, direction = i % p.rank;
  const int64_t at = direction * p.A_stride + row_at(p.indices, row);
  const T value = static_cast<const T*>(p.A)[at];
  static_cast<T*>(p.hidden)[i] = value;
  if (!p.gated) return;
  const float gate = static_cast<float>(static_cast<const T*>(p.E)[direction]);
  static_cast<T*>(p.gated)[i] = T(static_cast<float>(value) * gate);
}

// Sums over equal indices are taken chunk by chunk. What a chunk begins or ends with may go on in
// its neighbours: these two sums of each chunk, in order, are the rows of the next level, until one
// chunk is left. A token that occurs a million times costs no thread more than a few chunks.
constexpr int64_t chunk_size = 64;

struct Level {
  int64_t count;
  RowIndices indices;        // ascending
  const int64_t* positions;  // in `rows`; null: those of the indices
  const void* rows;
  int64_t* next_indices;  // written, two for each chunk; null at the last level
  float* next_rows;
};

int64_t chunks_of(int64_t count) {
  return divide_up(count, chunk_size);
}

// A thread has a chunk and a direction.
template <typename T, typename Row>
struct ChunkSums {
  const ColumnSums& p;
  const Level& level;
  int64_t chunk, direction;

  __device__ float value(int64_t i) const {
    const int64_t row = level.positions ? level.positions[i] : i;
    return static_cast<float>(static_cast<const Row*>(level.rows)[row * p.rank + direction]);
  }

  __device__ void write(int64_t index, float sum) const {
    require_row(p.sorted, index);
    if (index == p.padding_idx) return;
    static_cast<T*>(p.dA)[direction * p.dA_stride + index] = T(sum);
  }

  // The chunk's first sum (place 0) or its last one (1).
  __device__ void pass_on(int place, int64_t index, float sum) const {
    const int64_t to = 2 * chunk + place;
    level.next_rows[to * p.rank + direction] = sum;
    if (direction == 0) level.next_indices[to] = index;
  }
};

template <typename T, typename Row>
__global__ void __launch_bounds__(threads) column_sums(ColumnSums p, Level level) {
  constexpr int batch = 8;  // loads under way at once
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t first = i / p.rank * chunk_size;
  if (first >= level.count) return;
  const int64_t last = level.count - first < chunk_size ? level.count : first + chunk_size;
  const ChunkSums<T, Row> sums{p, level, i / p.rank, i % p.rank};
  int64_t index = index_at(level.indices, first);
  float sum = 0.0f;
  bool is_first = level.next_rows;
  for (int64_t start = first; start < last; start += batch) {
    int64_t indices[batch];
    float values[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const int64_t at = start + j < last ? start + j : last - 1;
      indices[j] = index_at(level.indices, at);
      values[j] = sums.value(at);
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (start + j >= last) break;
      if (indices[j] != index) {
        if (is_first) {
          sums.pass_on(0, index, sum);
        } else {
          sums.write(index, sum);
        }
        is_first = false;
        index = indices[j];
        sum = 0.0f;
      }
      sum += values[j];
    }
  }
  if (!level.next_rows) return sums.write(index, sum);
  if (is_first) sums.pass_on(0, index, 0.0f);
  sums.pass_on(1, index, sum);
}

template <typename T, typename Row>
int launch_level(const ColumnSums& p, const Level& level, void* stream) {
  const int64_t blocks = divide_up(chunks_of(level.count) * p.rank, threads);
  return launch(column_sums<T, Row>, static_cast<unsigned>(blocks), threads, 0, stream, p, level);
}

// The level below `from`, whose rows lie at `scratch`.
Level next_level(const ColumnSums& p, const Level& from) {
  return {2 * chunks_of(from.count),
          {from.next_indices, true, p.sorted.table_rows},
          nullptr,
          from.next_rows,
          nullptr,
          nullptr};
}

// Gives `level` room for what it passes on; returns what is left.
unsigned char* take_room(const ColumnSums& p, Level& level, unsigned char* scratch) {
  if (level.count <= chunk_size) return scratch;
  const int64_t count = 2 * chunks_of(level.count);
  level.next_indices = reinterpret_cast<int64_t*>(scratch);
  level.next_rows = reinterpret_cast<float*>(level.next_indices + count);
  return reinterpret_cast<unsigned char*>(level.next_rows + count * p.rank);
}

}  // namespace

int launch_gather(const Gather& problem, void* stream) {
  const int64_t blocks = divide_up(problem.rows * problem.rank, threads);
  if (blocks == 0) return cudaSuccess;
  return with_factor_type(problem.factor_type, [&](auto type) {
    return launch(gather<decltype(type)>, static_cast<unsigned>(blocks), threads, 0, stream,
                  problem);
  });
}

int64_t column_sums_scratch_bytes(const ColumnSums& problem) {
  const int64_t row_bytes =
      static_cast<int64_t>(sizeof(int64_t)) + problem.rank * static_cast<int64_t>(sizeof(float));
  int64_t bytes = 0;
  for (int64_t count = problem.rows; count > chunk_size;) {
    count = 2 * chunks_of(count);
    bytes += count * row_bytes;
  }
  return bytes;
}

int launch_column_sums(const ColumnSums& p, void* scratch, void* stream) {
  if (p.rows == 0 || p.rank == 0) return cudaSuccess;
  return with_factor_type(p.factor_type, [&](auto type) {
    using T = decltype(type);
    Level level{p.rows, p.sorted, p.positions, p.dh, nullptr, nullptr};
    unsigned char* room = take_room(p, level, static_cast<unsigned char*>(scratch));
    int error = launch_level<T, T>(p, level, stream);
    while (!error && level.next_rows) {
      level = next_level(p, level);
      room = take_room(p, level, room);
      error = launch_level<T, float>(p, level, stream);
    }
    return error;
  });
}

}  // namespace rankwise::kernels
