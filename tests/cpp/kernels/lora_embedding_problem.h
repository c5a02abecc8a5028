// One call of every launcher of lora_embedding.h, compared with sums in float64.
#pragma once

#include <gtest/gtest.h>
#include <kernels/lora_embedding.h>

#include <algorithm>
#include <numeric>
#include <string>

#include "kernel_checks.h"

namespace rankwise::kernels {

struct EmbeddingCase {
  int64_t rows, table_rows, cols, rank;
  bool gate = false;
  bool wide = true;      // int64 indices
  int64_t distinct = 0;  // only these first rows of the table are asked for; 0: any
  int64_t padding_idx = -1;
  Layout table{}, factor{}, result{};
};

inline std::string name_of(const EmbeddingCase& c) {
  return std::to_string(c.rows) + " of " + std::to_string(c.distinct) + " of " +
         std::to_string(c.table_rows) + " rows x " + std::to_string(c.cols) + ", rank " +
         std::to_string(c.rank) + (c.gate ? ", gated" : "") + (c.wide ? ", int64" : ", int32") +
         ", padding " + std::to_string(c.padding_idx) + ", gaps " + std::to_string(c.table.gap) +
         " " + std::to_string(c.factor.gap) + ", offsets " + std::to_string(c.table.offset) + " " +
         std::to_string(c.factor.offset);
}

// Row numbers in device memory in one of the two types.
class DeviceIndices {
 public:
  DeviceIndices(const std::vector<int64_t>& values, bool wide, int64_t table_rows)
      : wide_(wide),
        table_rows_(table_rows),
        longs_(wide ? values : std::vector<int64_t>()),
        ints_(wide ? std::vector<int32_t>() : std::vector<int32_t>(values.begin(), values.end())) {}

  RowIndices get() const {
    const void* data = wide_ ? static_cast<const void*>(longs_.data()) : ints_.data();
    return {data, wide_, table_rows_};
  }

 private:
  bool wide_;
  int64_t table_rows_;
  cuda_model::DeviceArray<int64_t> longs_;
  cuda_model::DeviceArray<int32_t> ints_;
};

// The places of the indices in ascending order, equal ones in their own.
inline std::vector<int64_t> sorted_positions(const std::vector<int64_t>& indices) {
  std::vector<int64_t> positions(indices.size());
  std::iota(positions.begin(), positions.end(), 0);
  std::stable_sort(positions.begin(), positions.end(),
                   [&](int64_t i, int64_t j) { return indices[i] < indices[j]; });
  return positions;
}

template <typename T>
std::vector<T> in_order(const std::vector<T>& values, const std::vector<int64_t>& positions) {
  std::vector<T> result;
  for (const int64_t i : positions) result.push_back(values[i]);
  return result;
}

// The inputs of every launcher for one case; each run starts from poisoned results and scratch.
template <typename Wide, typename Factor>
class EmbeddingProblem {
 public:
  explicit EmbeddingProblem(const EmbeddingCase& c)
      : c_(c),
        random_(static_cast<uint32_t>(c.rows * 1000003 + c.cols * 1009 + c.rank)),
        table_(Matrix<Wide>::random(c.table_rows, c.cols, random_, c.table)),
        A_(Matrix<Factor>::random(c.rank, c.table_rows, random_, c.factor)),
        B_(Matrix<Factor>::random(c.cols, c.rank, random_, c.factor)),
        skinny_(Matrix<Factor>::random(c.rows, c.rank, random_, {0, c.factor.offset})),
        gate_(gates(c.rank, c.gate)),
        E_(c.rank),
        indices_(c.rows) {
    for (int64_t i = 0; i < c.rank; ++i) E_[i] = Factor(gate_[i]);
    std::uniform_int_distribution<int64_t> row(0, (c.distinct ? c.distinct : c.table_rows) - 1);
    for (int64_t& index : indices_) index = row(random_);
  }

  void gather() {
    const DeviceIndices indices(indices_, c_.wide, c_.table_rows);
    Matrix<Factor> hidden(c_.rows, c_.rank), gated(c_.rows, c_.rank);
    const Gather p{c_.rows,
                   c_.rank,
                   type_of<Factor>,
                   indices.get(),
                   A_.data(),
                   A_.stride,
                   c_.gate ? E_.data() : nullptr,
                   hidden.data(),
                   c_.gate ? gated.data() : nullptr};
    ASSERT_EQ(launch_gather(p, nullptr), 0);
    for (int64_t i = 0; i < c_.rows; ++i) {
      for (int64_t r = 0; r < c_.rank; ++r) {
        ASSERT_EQ(hidden.written(i, r), A_.at(r, indices_[i])) << i << " " << r;
      }
    }
    keep(hidden.bytes());
    if (!c_.gate) return;
    expect_close("gated", gated, 1, [&](int64_t i, int64_t r) {
      Expected e;
      e.add(A_.at(r, indices_[i]) * gate_[r]);
      return e;
    });
    keep(gated.bytes());
  }

  void output() {
    const DeviceIndices indices(indices_, c_.wide, c_.table_rows);
    Matrix<Wide> out(c_.rows, c_.cols, c_.result);
    const EmbeddingOutput p{c_.rows,         c_.cols,       c_.rank,       type_of<Wide>,
                            type_of<Factor>, indices.get(), table_.data(), table_.stride,
                            skinny_.data(),  B_.data(),     B_.stride,     scaling,
                            out.data(),      out.stride};
    ASSERT_EQ(launch_embedding_output(p, nullptr), 0);
    // Factors of float32 keep 16 bits of each number beside results of 16 bits.
    constexpr bool cut = sizeof(Wide) == 2 && sizeof(Factor) == 4;
    expect_close("y", out, cut ? c_.rank + 2 * 256 : c_.rank + 1, [&](int64_t i, int64_t n) {
      Expected e;
      e.add(table_.at(indices_[i], n));
      for (int64_t r = 0; r < c_.rank; ++r) e.add(scaling * skinny_.at(i, r) * B_.at(n, r));
      return e;
    });
    keep(out.bytes());
  }

  void column_sums() {
    constexpr float before = 42.0f;
    const std::vector<int64_t> positions = sorted_positions(indices_);
    const DeviceIndices sorted(in_order(indices_, positions), c_.wide, c_.table_rows);
    const cuda_model::DeviceArray<int64_t> places(positions);
    Matrix<Factor> dA(c_.rank, c_.table_rows, c_.result);
    for (size_t i = 0; i < dA.memory.size(); ++i) dA.memory[i] = Factor(before);
    const ColumnSums p{c_.rows,        c_.rank,        type_of<Factor>, sorted.get(), places.data(),
                       skinny_.data(), c_.padding_idx, dA.data(),       dA.stride};
    const cuda_model::DeviceArray<int64_t> scratch(column_sums_scratch_bytes(p) / 8);
    ASSERT_EQ(launch_column_sums(p, scratch.data(), nullptr), 0);

    std::vector<Expected> sums(c_.rank * c_.table_rows);
    std::vector<bool> asked(c_.table_rows);
    for (int64_t i = 0; i < c_.rows; ++i) {
      asked[indices_[i]] = true;
      for (int64_t r = 0; r < c_.rank; ++r) {
        sums[r * c_.table_rows + indices_[i]].add(skinny_.at(i, r));
      }
    }
    expect_close("dA", dA, c_.rows, [&](int64_t r, int64_t v) {
      return asked[v] && v != c_.padding_idx ? sums[r * c_.table_rows + v] : Expected{before, 0};
    });
    keep(dA.bytes());
  }

  void everything() {
    gather();
    output();
    column_sums();
  }

  // All that was written so far, as bytes.
  const std::vector<unsigned char>& written() const { return written_; }

 private:
  void keep(const std::vector<unsigned char>& bytes) {
    written_.insert(written_.end(), bytes.begin(), bytes.end());
  }

  EmbeddingCase c_;
  std::mt19937 random_;
  Matrix<Wide> table_;
  Matrix<Factor> A_, B_, skinny_;
  std::vector<float> gate_;
  cuda_model::DeviceArray<Factor> E_;
  std::vector<int64_t> indices_;
  std::vector<unsigned char> written_;
};

}  // namespace rankwise::kernels
