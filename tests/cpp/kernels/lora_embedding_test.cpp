// The device kernels of lora_embedding against sums in float64, over sizes, ranks, types, indices.
#include <gtest/gtest.h>
#include <kernels/lora_embedding.h>
#include <sys/mman.h>

#include <limits>

#include "lora_embedding_problem.h"

namespace rankwise::kernels {
namespace {

using cuda_model::DeviceArray;
using cuda_model::Flush;

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

TYPED_TEST_SUITE(LoraEmbeddingKernels, TypePairs);

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
  for (const EmbeddingCase& c :
       {EmbeddingCase{130, 40, 400, 12, true}, EmbeddingCase{2100, 9, 40, 70, true, false, 3},
        EmbeddingCase{270, 140, 20, 20, false, true, 0, 2}}) {
    SCOPED_TRACE(name_of(c));
    expect_same_bits_under_every_schedule<typename TestFixture::Problem>(c);
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
