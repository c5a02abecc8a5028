// Philox4x32-7 against the known answers published with Random123 (kat_vectors).
#include <gtest/gtest.h>
#include <kernels/dropout_mask.h>

namespace rankwise::kernels {
namespace {

struct KnownAnswer {
  uint64_t counter_low, counter_high, key;
  uint32_t words[4];
};

TEST(Philox, KnownAnswers) {
  const KnownAnswer answers[] = {
      {0, 0, 0, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
      {~0ull, ~0ull, ~0ull, {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
      {0x85a308d3243f6a88,
       0x0370734413198a2e,
       0x299f31d0a4093822,
       {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
  };
  for (const KnownAnswer& answer : answers) {
    const Philox block = philox(answer.counter_low, answer.key, answer.counter_high);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(block.word[i], answer.words[i]) << "word " << i;
  }
}

TEST(DropoutNumber, TakesHalvesLowFirst) {
  const Philox block{{0x00020001, 0x00040003, 0x00060005, 0x00080007}};
  for (int i = 0; i < elements_per_block; ++i) {
    EXPECT_EQ(dropout_number(block, i), static_cast<uint32_t>(i + 1));
  }
}

}  // namespace
}  // namespace rankwise::kernels
