// The device kernels of lora_embedding against sums in float64, over sizes, ranks, types, indices.
#include <gtest/gtest.h>
#include <kernels/lora_embedding.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>

#include "lora_linear_problem.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;
using cuda_model::Flush;
using cuda_model::Order;
using cuda_model::Schedule;

struct EmbeddingCase {
  int64_t rows, table_rows, cols, rank;
  bool gate = false;
  bool wide = true;      // int64 indices
  int64_t distinct = 0;  // only these first rows of the table are asked for; 0: any
  int64_t padding_idx = -1;
  Layout table{}, factor{}, result{};
};

std::string name_of(const EmbeddingCase& c) {
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
  DeviceArray<int64_t> longs_;
  DeviceArray<int32_t> ints_;
};

// The places of the indices in ascending order, equal ones in their own.
std::vector<int64_t> sorted_positions(const std::vector<int64_t>& indices) {
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
    const DeviceArray<int64_t> places(positions);
    Matrix<Factor> dA(c_.rank, c_.table_rows, c_.result);
    for (size_t i = 0; i < dA.memory.size(); ++i) dA.memory[i] = Factor(before);
    const ColumnSums p{c_.rows,        c_.rank,        type_of<Factor>, sorted.get(), places.data(),
                       skinny_.data(), c_.padding_idx, dA.data(),       dA.stride};
    const DeviceArray<int64_t> scratch(column_sums_scratch_bytes(p) / 8);
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
  DeviceArray<Factor> E_;
  std::vector<int64_t> indices_;
  std::vector<unsigned char> written_;
};

template <typename Pair>
class LoraEmbeddingKernels : public testing::Test {
 protected:
  using Problem = EmbeddingProblem<typename Pair::first_type, typename Pair::second_type>;

  void SetUp() override { cuda_model::set_schedule({}); }

  static void check(const EmbeddingCase& c) {
    SCOPED_TRACE(name_of(c));
    Problem(c).everything();
  }
};

using Pairs = testing::Types<std::pair<__nv_bfloat16, __nv_bfloat16>, std::pair<__half, __half>,
                             std::pair<float, float>, std::pair<__nv_bfloat16, float>,
                             std::pair<__half, float>>;
TYPED_TEST_SUITE(LoraEmbeddingKernels, Pairs);

TYPED_TEST(LoraEmbeddingKernels, EveryTailOfRowsAndColumns) {
  for (const int64_t rows : {1, 2, 7, 63, 64, 65, 127, 129}) {
    for (const int64_t cols : {1, 3, 8, 31, 33, 64, 65, 127, 130}) {
      this->check({rows, 50, cols, 5, (rows + cols) % 2 == 0, cols % 3 == 0});
    }
  }
}

TYPED_TEST(LoraEmbeddingKernels, EveryRank) {
  for (int64_t rank = 1; rank <= 66; ++rank) {
    this->check({33, 20, 40, rank, rank % 3 == 0, rank % 2 == 0});
  }
  for (const int64_t rank : {128, 200, 256}) this->check({20, 7, 72, rank, true});
}

TYPED_TEST(LoraEmbeddingKernels, IndicesThatOccurOften) {
  for (const int64_t rows : {64, 65, 128, 200, 1000, 4096, 5001}) {
    for (const int64_t distinct : {1, 2, 3, 40, 1000}) {
      EmbeddingCase c{rows, 1000, 4, 3};
      c.wide = rows % 2 == 0;
      c.distinct = distinct;
      this->check(c);
    }
  }
}

TYPED_TEST(LoraEmbeddingKernels, PaddingIsReadButGetsNoGradient) {
  for (const int64_t padding_idx : {0, 3, 9}) {
    for (const int64_t distinct : {0, 1, 4}) {
      EmbeddingCase c{300, 10, 12, 4, true};
      c.distinct = distinct;
      c.padding_idx = padding_idx;
      this->check(c);
    }
  }
}

TYPED_TEST(LoraEmbeddingKernels, StridesAndOffsets) {
  for (const int64_t gap : {0, 1, 2, 4, 8}) {
    for (const int offset : {0, 1, 2, 4}) {
      const Layout layout{gap, offset}, even{8, 0};
      this->check({40, 30, 56, 8, true, true, 0, -1, layout, even, even});
      this->check({40, 30, 56, 8, true, true, 0, -1, even, layout, even});
      this->check({40, 30, 56, 8, true, true, 0, -1, even, even, layout});
    }
  }
  const Layout from_start{8, 0, Flush::start};
  this->check({40, 30, 56, 8, true, true, 0, -1, from_start, from_start, from_start});
}

TYPED_TEST(LoraEmbeddingKernels, NothingToDo) {
  this->check({0, 9, 40, 6, true});
  this->check({40, 9, 0, 6, true});
  this->check({40, 9, 40, 0, true});  // the table's rows alone
  this->check({0, 9, 0, 0, true});
}

TYPED_TEST(LoraEmbeddingKernels, SameBitsUnderEverySchedule) {
  const Schedule schedules[] = {
      {},
      {.blocks = Order::backwards, .threads = Order::backwards, .early_copies = true},
      {.threads = Order::forwards, .warps_run_ahead = true, .early_copies = true},
      {.threads = Order::backwards, .warps_run_ahead = true},
      {.blocks = Order::shuffled, .threads = Order::shuffled, .seed = 1},
      {Order::shuffled, Order::shuffled, true, true, 2}};
  for (const EmbeddingCase& c :
       {EmbeddingCase{130, 40, 400, 12, true}, EmbeddingCase{2100, 9, 40, 70, true, false, 3},
        EmbeddingCase{270, 140, 20, 20, false, true, 0, 2}}) {
    SCOPED_TRACE(name_of(c));
    std::vector<std::vector<unsigned char>> results;
    for (const Schedule& schedule : schedules) {
      cuda_model::set_schedule(schedule);
      typename TestFixture::Problem problem(c);
      problem.everything();
      results.push_back(problem.written());
    }
    for (const auto& result : results) EXPECT_TRUE(result == results[0]);
  }
}

// One index outside of a table of three rows, in each of the launchers.
class OutsideOfTheTable : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { cuda_model::set_schedule({}); }

  const DeviceArray<float> table{std::vector<float>(12, 1.0f)}, room{12};
  const DeviceArray<int64_t> index{std::vector<int64_t>{GetParam()}};
  const DeviceArray<int64_t> place{std::vector<int64_t>{0}};
  const RowIndices indices{index.data(), true, 3};
  static constexpr const char* message = "launched by.*an index lies outside of the table";
};

TEST_P(OutsideOfTheTable, IsNotGathered) {
  const Gather p{1, 1, Type::float32, indices, table.data(), 3, nullptr, room.data(), nullptr};
  EXPECT_DEATH(launch_gather(p, nullptr), message);
}

TEST_P(OutsideOfTheTable, HasNoOutput) {
  const EmbeddingOutput p{1,
                          4,
                          1,
                          Type::float32,
                          Type::float32,
                          indices,
                          table.data(),
                          4,
                          table.data(),
                          table.data(),
                          1,
                          1.0f,
                          room.data(),
                          4};
  EXPECT_DEATH(launch_embedding_output(p, nullptr), message);
}

TEST_P(OutsideOfTheTable, HasNoGradient) {
  const ColumnSums p{1, 1, Type::float32, indices, place.data(), table.data(), -1, room.data(), 3};
  EXPECT_DEATH(launch_column_sums(p, nullptr, nullptr), message);
}

INSTANTIATE_TEST_SUITE_P(Each, OutsideOfTheTable,
                         testing::Values(-1, 3, int64_t{1} << 32,
                                         std::numeric_limits<int64_t>::min()));

// Rows that lie further apart than 32-bit offsets reach; only their pages are ever touched.
TEST(LoraEmbeddingOffsets, ReachBeyond32Bits) {
  cuda_model::set_schedule({});
  constexpr int64_t rows = 3, stride = (int64_t{1} << 30) + 8;
  constexpr size_t bytes = (rows * stride) * sizeof(__half);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* const table = static_cast<__half*>(memory);
  const auto number = [](__half value) { return __half2float(value); };
  const DeviceArray<int64_t> three(std::vector<int64_t>{0, 1, 2});
  const RowIndices indices{three.data(), true, rows};
  const DeviceArray<__half> values(std::vector<__half>(rows * rows, __float2half(2.0f)));
  const DeviceArray<__half> written(rows * rows);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j)
      table[i * stride + j] = __float2half(static_cast<float>(10 * i + j));

  const Gather gather{rows,   rows,    Type::float16,  indices, table,
                      stride, nullptr, written.data(), nullptr};
  ASSERT_EQ(launch_gather(gather, nullptr), 0);
  for (int64_t i = 0; i < rows * rows; ++i)
    EXPECT_EQ(number(written[i]), static_cast<float>(10 * (i % rows) + i / rows));

  const EmbeddingOutput output{
      rows,          rows,          1, Type::float16, Type::float16,  indices, table, stride,
      values.data(), values.data(), 1, 1.0f,          written.data(), rows};
  ASSERT_EQ(launch_embedding_output(output, nullptr), 0);
  for (int64_t i = 0; i < rows * rows; ++i)
    EXPECT_EQ(number(written[i]), static_cast<float>(10 * (i / rows) + i % rows + 4));

  const ColumnSums sums{rows,          rows, Type::float16, indices, three.data(),
                        values.data(), -1,   table,         stride};
  ASSERT_EQ(launch_column_sums(sums, nullptr, nullptr), 0);
  for (int64_t i = 0; i < rows * rows; ++i)
    EXPECT_EQ(number(table[i / rows * stride + i % rows]), 2.0f);
  munmap(memory, bytes);
}

}  // namespace
}  // namespace rankwise::kernels
