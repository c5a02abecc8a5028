// Tiles of matrices in shared memory: copies from device memory, and dropout on what was copied.
#pragma once

#include "device.h"
#include "dropout_mask.h"
#include "lora_linear.h"

namespace rankwise::kernels {

// A row-major matrix in device memory whose rows start at multiples of `alignment` bytes: 16, 8,
// 4, 2.
template <typename T>
struct View {
  const T* data;
  int64_t rows, cols, stride;
  int alignment;
};

template <typename T>
View<T> view(const void* data, int64_t rows, int64_t cols, int64_t stride) {
  const uintptr_t starts = reinterpret_cast<uintptr_t>(data) | stride * sizeof(T) | 16;
  return {static_cast<const T*>(data), rows, cols, stride, static_cast<int>(starts & -starts)};
}

// The part of a matrix that starts at (row, col) and has a tile's size; less at the matrix's ends.
template <typename T>
struct Part {
  const View<T>& matrix;
  int64_t row, col;
};

// A tile in shared memory, worked on by `threads` threads, each with the same pieces in every call:
// what a thread does to its pieces before a barrier needs no other.
template <typename T, int tile_rows, int tile_cols, int threads>
struct Tile {
  // Elements of a row that one thread handles together: those of one Philox block.
  static constexpr int piece = elements_per_block;
  // Rows that lie 16 bytes apart in the banks: ldmatrix meets no bank twice.
  static constexpr int pitch = tile_cols + piece;
  static constexpr int bytes = tile_rows * pitch * static_cast<int>(sizeof(T));
  static constexpr int pieces = tile_rows * tile_cols / piece;

  // Calls visit(row, col) for the thread's pieces in the first rows and columns of the tile.
  template <typename Visit>
  __device__ static void for_pieces(int rows, int cols, const Visit& visit) {
#pragma unroll 1
    for (int first = 0; first < pieces; first += threads) {
      const int i = first + static_cast<int>(threadIdx.x);
      const int row = i / (tile_cols / piece), col = i % (tile_cols / piece) * piece;
      if (i < pieces && row < rows && col < cols) visit(row, col);
    }
  }

  __device__ static int valid(const Part<T>& part, int row, int col) {
    if (part.row + row >= part.matrix.rows) return 0;
    const int64_t left = part.matrix.cols - (part.col + col);
    return left < 0 ? 0 : left < piece ? static_cast<int>(left) : piece;
  }

  // Starts to copy the first rows and columns of the part; what the matrix lacks is zero.
  __device__ static void copy(T* tile, const Part<T>& part, int rows = tile_rows,
                              int cols = tile_cols) {
    for_pieces(rows, cols, [&](int row, int col) {
      const int count = valid(part, row, col);
      const int64_t offset = (part.row + row) * part.matrix.stride + part.col + col;
      const T* from = part.matrix.data + (count > 0 ? offset : 0);
      copy_piece(tile + row * pitch + col, from, count, part.matrix.alignment);
    });
  }

  // Starts to copy the first `count` elements of a piece; the others become zero. `from` is a
  // multiple of `alignment`, as a View has it.
  __device__ static void copy_piece(T* to, const T* from, int count, int alignment) {
    switch (alignment) {
      case 16:
        return copy_aligned<16>(to, from, count);
      case 8:
        return copy_aligned<8>(to, from, count);
      case 4:
        return copy_aligned<4>(to, from, count);
      default:
#pragma unroll
        for (int i = 0; i < piece; ++i) to[i] = i < count ? from[i] : T(0.0f);
    }
  }

  // Sets the dropped elements of a copied part to zero. Seed and threshold as in DropoutMask.
  __device__ static void drop(T* tile, const Part<T>& part, uint64_t seed, uint32_t threshold) {
    for_pieces(tile_rows, tile_cols, [&](int row, int col) {
      if (valid(part, row, col) == 0) return;
      const int64_t index = (part.row + row) * part.matrix.cols + part.col + col;
      drop_piece(tile + row * pitch + col, kept(index, seed, threshold));
    });
  }

  // Bit i is set when element index + i is kept.
  __device__ static uint32_t kept(int64_t index, uint64_t seed, uint32_t threshold) {
    const auto block = static_cast<uint64_t>(index) / piece;
    const auto shift = static_cast<unsigned>(index % piece);
    uint32_t bits = kept_in_block(philox(block, seed), threshold);
    if (shift > 0) bits |= kept_in_block(philox(block + 1, seed), threshold) << piece;
    return bits >> shift;
  }

  // Zeros where bits are not set.
  __device__ static void drop_piece(T* elements, uint32_t bits) {
    auto* words = reinterpret_cast<uint4*>(elements);
    constexpr int per_word = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < piece / (4 * per_word); ++i) {
      uint4 four = words[i];
      four.x &= word_mask(bits >> (4 * i + 0) * per_word);
      four.y &= word_mask(bits >> (4 * i + 1) * per_word);
      four.z &= word_mask(bits >> (4 * i + 2) * per_word);
      four.w &= word_mask(bits >> (4 * i + 3) * per_word);
      words[i] = four;
    }
  }

  // Writes a piece of the tile to its place in `out`, a matrix as `part` describes it.
  __device__ static void write(const T* tile, const Part<T>& part, int row, int col, T* out) {
    const int count = valid(part, row, col);
    if (count == 0) return;
    const T* from = tile + row * pitch + col;
    T* to = out + (part.row + row) * part.matrix.stride + part.col + col;
    if (part.matrix.alignment == 16 && count == piece) {
#pragma unroll
      for (int i = 0; i < piece * static_cast<int>(sizeof(T)) / 16; ++i) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
      }
    } else {
      for (int i = 0; i < count; ++i) to[i] = from[i];
    }
  }

 private:
  template <int bytes>
  __device__ static void copy_aligned(T* to, const T* from, int count) {
    constexpr int step = bytes / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < piece; i += step) {
      const int left = count < i ? 0 : count - i < step ? count - i : step;
      copy_async<bytes>(to + i, left > 0 ? from + i : from, left * static_cast<int>(sizeof(T)));
    }
  }

  __device__ static uint32_t kept_in_block(const Philox& numbers, uint32_t threshold) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < piece; ++i) {
      bits |= static_cast<uint32_t>(dropout_number(numbers, i) >= threshold) << i;
    }
    return bits;
  }

  __device__ static uint32_t word_mask(uint32_t bits) {
    if constexpr (sizeof(T) == 4) return bits & 1 ? 0xFFFFFFFFu : 0u;
    return (bits & 1 ? 0xFFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u);
  }
};

}  // namespace rankwise::kernels
