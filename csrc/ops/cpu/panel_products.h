// lora_linear's products on the micro-kernel. T is the type of x, W0 and y, F that of the factors;
// sums are float32 and stay in the core's cache until a result is complete and rounded once.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "adapter.h"
#include "blocks.h"
#include "conversions.h"
#include "dropout.h"
#include "micro_kernel.h"
#include "panels.h"

namespace rankwise {

constexpr int64_t token_run = block_rows;  // tokens of a block of a sum over tokens

// Columns of a block of a sum over tokens: of one run, what the call costs counts.
inline Split token_blocks(int64_t tokens, int64_t cols) {
  return {cols, tokens > token_run ? 128 : 384};
}

// A matrix of m's type; without the dispatcher, whose work is a tenth of a small layer's.
inline at::Tensor empty_like(const at::Tensor& m, int64_t rows, int64_t cols) {
  return at::detail::empty_cpu({rows, cols}, m.scalar_type());
}

// The bits of an input's dropout, a row of words for each of its rows; nothing without dropout.
class Kept {
 public:
  Kept() = default;
  Kept(const ActiveAdapter& adapter, const at::Tensor& x)
      : adapter_(adapter.dropout.active() ? &adapter : nullptr), cols_(x.size(1)) {
    if (active()) bits_ = at::empty({x.size(0), kept_words(cols_)}, x.options().dtype(at::kLong));
  }

  bool active() const { return adapter_ != nullptr; }
  void draw(Range rows) const {
    if (!active()) return;
    draw_kept(adapter_->seed, adapter_->dropout.threshold(), {rows.start, 0, cols_}, rows.size,
              cols_, {bits()[rows.start], bits_.size(1)});
  }
  // Of the block from (row, col) on, for col a multiple of kept_word.
  KeptBits from(int64_t row, int64_t col) const {
    return {bits()[row] + col / kept_word, bits_.size(1)};
  }

 private:
  Rows<uint64_t> bits() const {
    return {reinterpret_cast<uint64_t*>(bits_.mutable_data_ptr<int64_t>()), bits_.size(1)};
  }

  const ActiveAdapter* adapter_ = nullptr;
  int64_t cols_ = 0;
  at::Tensor bits_;
};

// A block of m as `F` with dropped elements zero: m's own memory where that is it.
template <typename F, typename T>
Rows<const F> load(const at::Tensor& m, Range rows, Range cols, const Kept& kept) {
  const Elements<T> from = Elements<T>(m).from(rows.start, cols.start);
  const Rows<const T> whole{from.data, from.down};
  if constexpr (std::is_same_v<F, T>)
    if (!kept.active()) return whole;
  const Rows<F> to{scratch<F>(Slot::rows, rows.size * cols.size), cols.size};
  if (kept.active()) {
    copy_kept<T, F>(whole, kept.from(rows.start, cols.start), rows.size, cols.size, to);
  } else if constexpr (!std::is_same_v<F, T>) {
    for (int64_t i = 0; i < rows.size; ++i) widen_row(whole[i], to[i], cols.size);
  }
  return to;
}

// m factor, [tokens, rank]: calls use(rows, sums) for each block of block_rows, and first draws the
// bits of those rows that `drawn` is for; m's own dropout is `kept`.
template <typename T, typename F, typename Use>
void shrink(const at::Tensor& m, Elements<F> factor, int64_t rank, const Kept& kept,
            const Kept& drawn, const Use& use) {
  if (rank == 0) return;
  const int64_t inner = m.size(1);
  F* const packed = scratch<F>(Slot::factor, inner_padded<F>(inner) * rank);
  pack<F>(factor, inner, rank, packed, rank);
  const Split blocks(m.size(0), block_rows);
  run_products(blocks.count(), block_rows * inner * rank, [&](int64_t i) {
    const MicroKernelUse<F> use_of_kernel;
    drawn.draw(blocks[i]);
    const Rows<const F> rows = load<F, T>(m, blocks[i], {0, inner}, kept);
    float* const sums = scratch<float>(Slot::sums, block_rows * rank);
    multiply_block<F>(blocks[i].size, rank, inner, rows.data, rows.stride, packed, rank, sums, rank,
                      /*accumulate=*/false);
    use(blocks[i], sums);
  });
}

// Cuts the tiles that are left for fewer than all threads, so that these have work too. Where it
// cuts depends on the threads; results do not, since a row's blocks of block_rows stay as they are.
inline void share_last(std::vector<Tile>& tiles, int64_t threads) {
  const auto count = static_cast<int64_t>(tiles.size()), last = count % threads;
  if (last == 0) return;
  const std::vector<Tile> whole(tiles.end() - last, tiles.end());
  tiles.resize(count - last);
  for (const Tile& tile : whole) {
    const int64_t blocks = Split(tile.row.size, block_rows).count(), parts = threads / last;
    const Split rows(tile.row.size, Split(blocks, parts).count() * block_rows);
    for (int64_t i = 0; i < rows.count(); ++i)
      tiles.push_back({{tile.row.start + rows[i].start, rows[i].size}, tile.col});
  }
}

// The base's product of [tokens, inner] and [inner, features]; of no inner size where there is
// none.
template <typename T>
struct Product {
  at::Tensor left;
  Elements<T> right;
};

template <typename T>
Product<T> no_product(const at::Tensor& left) {
  return {left.narrow(1, 0, 0), {nullptr, 0, 0}};
}

// A result of bases and LoRA: out = the bases' sum + start + kept(lora factor) + bias.
template <typename T, typename F>
struct Sum {
  at::Tensor out;                 // [tokens, features]
  std::vector<Product<T>> bases;  // at least one
  at::Tensor start;    // [tokens, features], beside bases without inner size; undefined for zeros
  at::Tensor lora;     // [tokens, rank], rows padded to inner_multiple by zeros
  Elements<F> factor;  // [rank, features]
  int64_t rank;
  at::Tensor bias;  // [features], float32, or undefined
  Kept kept;

  std::vector<Tile> tiles() const;
  // The longest tile's time, in multiplications: reading a weight takes as long as eight.
  int64_t products_of(const std::vector<Tile>& tiles) const {
    int64_t inner = 0;
    for (const Product<T>& base : bases) inner += base.left.size(1);
    return (tiles[0].row.size + 8) * tiles[0].col.size * std::max(inner, rank);
  }
  void compute(const Tile& tile) const;
  // What a tile multiplies by while it is in the core's cache: chunks of the bases' inner sizes, at
  // least one.
  struct Part {
    const Product<T>* base;
    Range inner;
  };
  std::vector<Part> parts(int64_t chunk) const;
  // Writes the start of a block as float32.
  void begin(const Tile& block, Rows<float> sums) const;
};

// Rows so few that reading the weight is what takes the time.
constexpr int64_t few_rows = block_rows / 2;

template <typename T, typename F>
std::vector<Tile> Sum<T, F>::tiles() const {
  constexpr int64_t rows_a_panel = 1024;
  const int64_t width = out.size(0) > few_rows ? panel_cols : 3 * panel_cols;
  const Split rows(out.size(0), rows_a_panel), cols(out.size(1), width);
  std::vector<Tile> result;
  for (int64_t j = 0; j < cols.count(); ++j)
    for (int64_t i = 0; i < rows.count(); ++i) result.push_back({rows[i], cols[j]});
  share_last(result, at::get_num_threads());
  return result;
}

template <typename T, typename F>
void Sum<T, F>::begin(const Tile& block, Rows<float> sums) const {
  const auto [row, col] = block;
  for (int64_t i = 0; i < row.size; ++i) {
    if (!start.defined()) {
      std::fill_n(sums[i], col.size, 0.0F);
      continue;
    }
    const T* const from = &Elements<T>(start)(row.start + i, col.start);
    if constexpr (std::is_same_v<T, float>) {
      std::copy_n(from, col.size, sums[i]);
    } else {
      widen_row(from, sums[i], col.size);
    }
  }
}

template <typename T, typename F>
std::vector<typename Sum<T, F>::Part> Sum<T, F>::parts(int64_t chunk) const {
  std::vector<Part> result;
  for (const Product<T>& base : bases) {
    const Split chunks(base.left.size(1), chunk);
    for (int64_t i = 0; i < chunks.count(); ++i) result.push_back({&base, chunks[i]});
  }
  if (result.empty()) result.push_back({bases.data(), {0, 0}});
  return result;
}

template <typename T, typename F>
void Sum<T, F>::compute(const Tile& tile) const {
  const MicroKernelUse<T> use_of_kernel;
  const auto [first_col, width] = tile.col;
  constexpr bool in_place = std::is_same_v<T, float>;
  const bool few = in_place && tile.row.size <= few_rows;
  // What many blocks of rows read stays in the core's cache; what few rows read once passes through
  // its first level. Whole runs, so that both give the same bits.
  constexpr int64_t many_chunk = (int64_t{1} << 18) / (panel_cols * int64_t{sizeof(T)});
  constexpr int64_t few_chunk = in_place ? 2 * sum_run<T> : many_chunk;
  static_assert(!in_place || (many_chunk % sum_run<T> == 0 && few_chunk % sum_run<T> == 0));
  const int64_t chunk = few ? few_chunk : many_chunk;
  const std::vector<Part> all = parts(chunk);
  const Split blocks(tile.row.size, block_rows);
  const bool in_one = all.size() == 1;
  int64_t longest = 0;
  for (const Part& part : all) longest = std::max(longest, part.inner.size);
  T* const panel = scratch<T>(Slot::panel, inner_padded<T>(longest) * width);
  F* const lora_panel = scratch<F>(Slot::lora_panel, inner_padded<F>(rank) * width);
  pack<F>(factor.from(0, first_col), rank, width, lora_panel, width);
  // Sums grow where the result lies if that has their type, else in the thread's memory.
  const int64_t stride = in_place ? out.size(1) : width;
  float* const memory =
      in_place ? nullptr
               : scratch<float>(Slot::sums, (in_one ? block_rows : tile.row.size) * width);
  const auto sums_of = [&](int64_t block, T* to) -> float* {
    if constexpr (in_place) return to;
    return memory + (in_one ? 0 : blocks[block].start * width);
  };
  const bool masked = kept.active() && rank > 0;
  float* const update = masked ? scratch<float>(Slot::rows, block_rows * width) : nullptr;
  const float* const row = bias.defined() ? bias.const_data_ptr<float>() + first_col : nullptr;
  for (size_t c = 0; c < all.size(); ++c) {
    const bool last = c + 1 == all.size();
    const auto [start_of_part, inner] = all[c].inner;
    const Elements<T> left(all[c].base->left);
    const Elements<T> part = all[c].base->right.from(start_of_part, first_col);
    const bool as_it_is = few && part.across == 1;
    if (!as_it_is) pack<T>(part, inner, width, panel, width);
    for (int64_t b = 0; b < blocks.count(); ++b) {
      const int64_t first = tile.row.start + blocks[b].start, count = blocks[b].size;
      T* const to = out.mutable_data_ptr<T>() + first * out.size(1) + first_col;
      float* const sums = sums_of(b, to);
      if (last || in_place) prefetch_rows(to, count, width, out.size(1));  // else storing waits
      if (inner == 0) begin({{first, count}, tile.col}, {sums, stride});
      multiply_block<T>(count, width, inner, &left(first, start_of_part), left.down,
                        as_it_is ? part.data : panel, as_it_is ? part.down : width, sums, stride,
                        /*accumulate=*/c > 0);
      if (!last) continue;
      // Last, because a sum that starts from zero rounds less on its way.
      if (rank > 0) {
        multiply_block<F>(count, width, inner_padded<F>(rank),
                          lora.const_data_ptr<F>() + first * lora.size(1), lora.size(1), lora_panel,
                          width, masked ? update : sums, masked ? width : stride,
                          /*accumulate=*/!masked);
      }
      const Rows<T> result{to, out.size(1)};
      if (masked) {
        add_kept<T>({sums, stride}, {update, width}, kept.from(first, first_col), count, width,
                    result);
      } else if (!in_place || row != nullptr) {
        add_row<T>({sums, stride}, row, count, width, result);
      }
    }
  }
}

}  // namespace rankwise
