// Names of adapter tensors, and which tensors an adapter must hold.
#include "io/adapter_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/adapter_key.h>
#include <rankwise/file_error.h>

#include "temporary_folder.h"

namespace {

using rankwise::AdapterConfig;
using rankwise::AdapterKey;
using rankwise::parse_adapter_key;
using rankwise::io::adapted_modules;
using rankwise::io::check_adapter_layout;
using rankwise::io::DType;
using rankwise::io::FileError;
using rankwise::io::TensorInfo;
using testing::ElementsAre;
using testing::HasSubstr;
using Part = AdapterKey::Part;

const std::string q = "base_model.model.layers.0.q";
const std::string e = "base_model.model.emb";

TensorInfo info(const std::string& name, std::vector<int64_t> shape, DType dtype = DType::f32) {
  return {name, dtype, std::move(shape), 0, 0};
}

std::vector<TensorInfo> valid() {
  return {info(q + ".lora_A.weight", {8, 5}),      info(q + ".lora_B.weight", {6, 8}),
          info(e + ".lora_embedding_A", {8, 100}), info(e + ".lora_embedding_B", {5, 8}),
          info("base_model.model.head.bias", {3}), info("base_model.model.head.weight", {3, 5})};
}

std::string error_of(const std::vector<TensorInfo>& tensors, const AdapterConfig& config = {}) {
  return message_of<FileError>([&] { check_adapter_layout(tensors, config, "F"); });
}

TEST(AdapterKey, TakesNamesApartAndTogether) {
  const std::pair<const char*, AdapterKey> rows[] = {
      {"base_model.model.a.b.lora_A.weight", {"a.b", Part::lora_A, ""}},
      {"base_model.model.a.lora_B.weight", {"a", Part::lora_B, ""}},
      {"base_model.model.e.lora_embedding_A", {"e", Part::embedding_A, ""}},
      {"base_model.model.e.lora_embedding_B", {"e", Part::embedding_B, ""}},
      {"base_model.model.head.dense.bias", {"head.dense", Part::saved, "bias"}},
  };
  for (const auto& [name, key] : rows) {
    ASSERT_TRUE(parse_adapter_key(name)) << name;
    EXPECT_EQ(*parse_adapter_key(name), key);
    EXPECT_EQ(to_string(key), name);
  }
}

TEST(AdapterKey, OtherNamesAreNotUnderstood) {
  for (const char* name :
       {"", "base_model.model.", "base_model.model.a", "base_model.model..a", "base_model.model.a.",
        "a.lora_A.weight", "base_model.model.lora_A.weight",
        "base_model.model.a.lora_A.default.weight", "base_model.model.a.lora_A.bias",
        "base_model.model.a.lora_magnitude_vector", "base_model.model.a.lora_A",
        "base_model.model.a.lora_E", "base_model.model.a\n.lora_A.weight",
        "base_model.model.a\x7F.weight"}) {
    EXPECT_FALSE(parse_adapter_key(name)) << name;
  }
}

TEST(AdapterLayout, ValidAdapters) {
  check_adapter_layout(valid(), {}, "F");
  EXPECT_THAT(adapted_modules(valid()), ElementsAre("emb", "layers.0.q"));
  AdapterConfig config;
  config.rank_pattern = {{"q", 0}};
  check_adapter_layout({info(q + ".lora_A.weight", {0, 5}), info(q + ".lora_B.weight", {6, 0})},
                       config, "F");
}

TEST(AdapterLayout, EveryFaultIsListed) {
  AdapterConfig config;
  config.rank_pattern = {{"layers.0.q", 4}};
  EXPECT_EQ(error_of({info(q + ".lora_A.weight", {8, 5}),
                      info("base_model.model.v.lora_B.weight", {6, 9}),
                      info("base_model.model.w.lora_magnitude_vector", {6}),
                      info("base_model.model.head.weight", {6}, DType::i64),
                      info(e + ".lora_embedding_A", {8}), info(e + ".lora_embedding_B", {8, 5})},
                     config),
            "F: not a LoRA adapter as its configuration describes it:\n"
            "  \"base_model.model.w.lora_magnitude_vector\": not a tensor of a PEFT LoRA adapter "
            "(base_model.model.<module>.lora_A.weight, ...)\n"
            "  \"base_model.model.head.weight\": dtype must be F64, F32, F16 or BF16, got I64\n"
            "  \"base_model.model.emb.lora_embedding_A\": must be [8, num_embeddings], got [8]\n"
            "  \"base_model.model.emb.lora_embedding_B\": must be [embedding_dim, 8], got [8, 5]\n"
            "  \"base_model.model.layers.0.q.lora_A.weight\": must be [4, in], got [8, 5]\n"
            "  \"base_model.model.layers.0.q.lora_B.weight\": missing\n"
            "  \"base_model.model.v.lora_A.weight\": missing\n"
            "  \"base_model.model.v.lora_B.weight\": must be [out, 8], got [6, 9]");
}

TEST(AdapterLayout, OtherFaults) {
  auto both = valid();
  both.push_back(info(q + ".lora_embedding_A", {8, 5}));
  EXPECT_THAT(error_of(both),
              HasSubstr("\"layers.0.q\": has both lora_A/lora_B and lora_embedding_A/B"));
  EXPECT_THAT(error_of({info("base_model.model.head.weight", {6})}), HasSubstr("no LoRA factors"));
  EXPECT_THAT(error_of({}), HasSubstr("no LoRA factors"));
  EXPECT_THAT(error_of({info(q + ".lora_A.weight", {8, 5, 1, 1}),
                        info(q + ".lora_B.weight", {6, 8, 1, 1})}),
              HasSubstr("must be [8, in], got [8, 5, 1, 1]"));
  AdapterConfig config;
  config.rank_pattern = {{"[a-z]+", 4}};
  EXPECT_THAT(error_of({info("base_model.model.\xC3\xA9.lora_A.weight", {8, 5})}, config),
              HasSubstr("can only be matched with ASCII names"));
}

TEST(AdapterLayout, LongListsAreCut) {
  std::vector<TensorInfo> tensors;
  for (int i = 0; i < 60; ++i) tensors.push_back(info("t" + std::to_string(i), {}));
  const std::string message = error_of(tensors);
  EXPECT_THAT(message, HasSubstr("\"t49\""));
  EXPECT_THAT(message, testing::Not(HasSubstr("\"t50\"")));
  EXPECT_THAT(message, HasSubstr("\n  and 11 more"));
}

}  // namespace
