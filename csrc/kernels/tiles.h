// Tiles of matrices in shared memory: copies from device memory, and dropout on what was copied.
#pragma once

#include "device.h"
#include "dropout_bits.h"
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

// Elements of a row that one thread handles together: those of one Philox block.
constexpr int piece = elements_per_block;

// `value` between 0 and `limit`.
__device__ inline int clamped(int64_t value, int limit) {
  return value < 0 ? 0 : value < limit ? static_cast<int>(value) : limit;
}

// A pair of 16-bit numbers, those below a threshold set to zero; `limit` is dropout_limit()'s.
__device__ inline uint32_t drop_pair(uint32_t pair, uint32_t numbers, uint32_t limit) {
  const uint32_t high = numbers > limit ? 0xFFFF0000u : 0u;
  const uint32_t low = numbers << 16 > limit ? 0xFFFFu : 0u;
  return pair & (high | low);
}

// Bit i is set when element index + i is kept.
__device__ inline uint32_t kept(int64_t index, uint64_t seed, uint32_t limit) {
  const auto block = static_cast<uint64_t>(index) / piece;
  const auto shift = static_cast<unsigned>(index % piece);
  uint32_t bits = kept_in_block(philox(block, seed), limit);
  if (shift > 0) bits |= kept_in_block(philox(block + 1, seed), limit) << piece;
  return bits >> shift;
}

// 16 bytes of T, those of elements whose bits are not set becoming zero.
template <typename T>
__device__ inline uint4 drop_words(uint4 words, uint32_t bits) {
  constexpr int per_word = 4 / static_cast<int>(sizeof(T));
  const auto mask = [&](int i) {
    const uint32_t word = bits >> i * per_word;
    if constexpr (sizeof(T) == 4) return word & 1 ? 0xFFFFFFFFu : 0u;
    return (word & 1 ? 0xFFFFu : 0u) | (word & 2 ? 0xFFFF0000u : 0u);
  };
  return {words.x & mask(0), words.y & mask(1), words.z & mask(2), words.w & mask(3)};
}

// A piece of 16 * words / sizeof(T) elements, those that a Philox block drops becoming zero.
template <typename T, int words>
__device__ inline void drop_block(uint4 (&values)[words], const Philox& numbers, uint32_t limit) {
  if constexpr (sizeof(T) == 2) {
    values[0].x = drop_pair(values[0].x, numbers.word[0], limit);
    values[0].y = drop_pair(values[0].y, numbers.word[1], limit);
    values[0].z = drop_pair(values[0].z, numbers.word[2], limit);
    values[0].w = drop_pair(values[0].w, numbers.word[3], limit);
  } else {
    const uint32_t bits = kept_in_block(numbers, limit);
#pragma unroll
    for (int i = 0; i < words; ++i) values[i] = drop_words<T>(values[i], bits >> 4 * i);
  }
}

// A tile in shared memory, worked on by `threads` threads, each with the same pieces in every call:
// what a thread does to its pieces before a barrier needs no other.
template <typename T, int tile_rows, int tile_cols, int threads>
struct Tile {
  // Rows that lie 16 bytes apart in the banks: ldmatrix meets no bank twice.
  static constexpr int pitch = tile_cols + piece;
  static constexpr int bytes = tile_rows * pitch * static_cast<int>(sizeof(T));
  static constexpr int pieces = tile_rows * tile_cols / piece;
  static constexpr int per_row = tile_cols / piece;
  // A thread's pieces lie in one column, `row_step` rows apart.
  static constexpr int row_step = threads / per_row;
  static constexpr int each = (pieces + threads - 1) / threads;
  static constexpr int words = piece * static_cast<int>(sizeof(T)) / 16;
  static_assert(threads % per_row == 0);

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / per_row; }
  __device__ static int first_col() { return static_cast<int>(threadIdx.x) % per_row * piece; }
  // Whether the thread has an i-th piece.
  __device__ static bool has(int i) {
    return pieces % threads == 0 || i * threads + static_cast<int>(threadIdx.x) < pieces;
  }

  // Starts to copy the part; what the matrix lacks is zero.
  __device__ static void copy(T* tile, const Part<T>& part) {
    if (part.matrix.alignment == 16) {
      copy_pieces<16>(tile, part);
    } else {
      copy_slowly(tile, part);
    }
  }

  // Sets the dropped elements of a copied part to zero.
  __device__ static void drop(T* tile, const Part<T>& part, uint64_t seed, uint32_t limit) {
    if (part.matrix.cols % piece == 0) {
      drop_blocks(tile, part, seed, limit);
    } else {
      drop_slowly(tile, part, seed, limit);
    }
  }

 private:
  template <int bytes>
  __device__ static void copy_piece(T* to, const T* from, int count) {
    constexpr int step = bytes / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < piece; i += step) {
      const int left = count < i ? 0 : count - i < step ? count - i : step;
      copy_async<bytes>(to + i, left > 0 ? from + i : from, left * static_cast<int>(sizeof(T)));
    }
  }

  template <int bytes>
  __device__ static void copy_pieces(T* tile, const Part<T>& part) {
    const int row = first_row(), col = first_col();
    const int rows = clamped(part.matrix.rows - part.row, tile_rows);
    const int count = clamped(part.matrix.cols - part.col - col, piece);
    const T* from = part.matrix.data + (part.row + row) * part.matrix.stride + part.col + col;
    const int64_t step = row_step * part.matrix.stride;
    T* to = tile + row * pitch + col;
    if (rows == tile_rows && part.col + tile_cols <= part.matrix.cols) {
#pragma unroll
      for (int i = 0; i < each; ++i) {
        if (has(i)) copy_piece<bytes>(to + i * row_step * pitch, from, piece);
        from += step;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < each; ++i) {
      if (has(i)) {
        const bool valid = row + i * row_step < rows && count > 0;
        copy_piece<bytes>(to + i * row_step * pitch, valid ? from : part.matrix.data,
                          valid ? count : 0);
      }
      from += step;
    }
  }

  __device__ static void copy_slowly(T* tile, const Part<T>& part) {
    const int row = first_row(), col = first_col();
    const int rows = clamped(part.matrix.rows - part.row, tile_rows);
    const int count = clamped(part.matrix.cols - part.col - col, piece);
#pragma unroll 1
    for (int i = 0; i < each; ++i) {
      if (!has(i)) break;
      const int at = row + i * row_step;
      const int valid = at < rows ? count : 0;
      const T* from = part.matrix.data;
      if (valid > 0) from += (part.row + at) * part.matrix.stride + part.col + col;
      T* to = tile + at * pitch + col;
      if (part.matrix.alignment == 8) {
        copy_piece<8>(to, from, valid);
      } else if (part.matrix.alignment == 4) {
        copy_piece<4>(to, from, valid);
      } else {
#pragma unroll
        for (int j = 0; j < piece; ++j) to[j] = j < valid ? from[j] : T(0.0f);
      }
    }
  }

  // Where rows are whole Philox blocks.
  __device__ static void drop_blocks(T* tile, const Part<T>& part, uint64_t seed, uint32_t limit) {
    constexpr int batch = each < 4 ? each : 4;
    const int row = first_row(), col = first_col();
    const int64_t blocks = part.matrix.cols / piece;
    auto block = static_cast<uint64_t>((part.row + row) * blocks + (part.col + col) / piece);
    const auto step = static_cast<uint64_t>(row_step * blocks);
    T* to = tile + row * pitch + col;
#pragma unroll
    for (int i = 0; i < each; i += batch) {
      uint4 values[batch][words];
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        if (i + j >= each || !has(i + j)) continue;
        const auto* from = reinterpret_cast<const uint4*>(to + (i + j) * row_step * pitch);
#pragma unroll
        for (int k = 0; k < words; ++k) values[j][k] = from[k];
      }
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        if (i + j >= each || !has(i + j)) continue;
        drop_block<T>(values[j], philox(block + (i + j) * step, seed), limit);
      }
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        if (i + j >= each || !has(i + j)) continue;
        auto* words_of = reinterpret_cast<uint4*>(to + (i + j) * row_step * pitch);
#pragma unroll
        for (int k = 0; k < words; ++k) words_of[k] = values[j][k];
      }
    }
  }

  __device__ static void drop_slowly(T* tile, const Part<T>& part, uint64_t seed, uint32_t limit) {
    const int row = first_row(), col = first_col();
    const int rows = clamped(part.matrix.rows - part.row, tile_rows);
    if (part.col + col >= part.matrix.cols) return;
#pragma unroll 1
    for (int i = 0; i < each; ++i) {
      const int at = row + i * row_step;
      if (!has(i) || at >= rows) break;
      const int64_t index = (part.row + at) * part.matrix.cols + part.col + col;
      const uint32_t bits = kept(index, seed, limit);
      auto* values = reinterpret_cast<uint4*>(tile + at * pitch + col);
#pragma unroll
      for (int k = 0; k < words; ++k) {
        values[k] = drop_words<T>(values[k], bits >> k * (piece / words));
      }
    }
  }
};

// 16 bytes at once: of plain assignments nvcc at times makes four stores.
__device__ inline void store_words(void* to, const uint4& words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = words;
#endif
}

template <typename T>
using PairOf =
    std::conditional_t<std::is_same_v<T, float>, float2,
                       std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>>;

// A piece of a matrix in registers: the first `count` elements from `from` on, then zeros.
template <typename T>
struct Piece {
  static constexpr int words = piece * static_cast<int>(sizeof(T)) / 16;
  union {
    uint4 word[words];
    T value[piece];
    PairOf<T> pair[piece / 2];
  };
  __device__ Piece() {}

  __device__ void load(const T* from, int count, int alignment) {
    if (alignment == 16 && count == piece) {
#pragma unroll
      for (int i = 0; i < words; ++i) word[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
#pragma unroll
      for (int i = 0; i < piece; ++i) value[i] = i < count ? from[i] : T(0.0f);
    }
  }

  __device__ void store(T* to, int count, int alignment) const {
    if (alignment == 16 && count == piece) {
#pragma unroll
      for (int i = 0; i < words; ++i) store_words(reinterpret_cast<uint4*>(to) + i, word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < piece; ++i) {
        if (i < count) to[i] = value[i];
      }
    }
  }
};

}  // namespace rankwise::kernels
