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
      {"base_model.model.a.b.lora_A", {"a.b", Part::triplet_A, ""}},
      {"base_model.model.a.lora_B", {"a", Part::triplet_B, ""}},
      {"base_model.model.a.lora_E", {"a", Part::triplet_E, ""}},
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
        "base_model.model.a.lora_magnitude_vector", "base_model.model.lora_E",
        "base_model.model.a.lora_E.weight", "base_model.model.a.lora_E.default",
        "base_model.model.a.lora_F", "base_model.model.a\n.lora_A.weight",
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
            "F: not the adapter that its configuration describes:\n"
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
              HasSubstr("\"layers.0.q\": has both lora_A.weight and lora_B.weight and "
                        "lora_embedding_A and lora_embedding_B"));
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

AdapterConfig adalora() {
  AdapterConfig config;
  config.peft_type = "ADALORA";
  config.rank = 3;
  config.kept_directions = {{"layers.0.q", {true, false, true}}, {"dead", {false, false, false}}};
  return config;
}

std::vector<TensorInfo> triplets() {
  const std::string dead = "base_model.model.dead";
  const std::string full = "base_model.model.full";
  return {info(q + ".lora_A", {2, 5}),    info(q + ".lora_B", {6, 2}),
          info(q + ".lora_E", {2, 1}),    info(dead + ".lora_A", {0, 5}),
          info(dead + ".lora_B", {6, 0}), info(dead + ".lora_E", {0, 1}),
          info(full + ".lora_A", {3, 5}), info(full + ".lora_B", {6, 3}),
          info(full + ".lora_E", {3, 1}), info("base_model.model.head.weight", {3, 5})};
}

TEST(AdapterLayout, ValidAdaLoRA) {
  check_adapter_layout(triplets(), adalora(), "F");
  EXPECT_THAT(adapted_modules(triplets()), ElementsAre("dead", "full", "layers.0.q"));
}

TEST(AdapterLayout, EveryFaultOfAdaLoRAIsListed) {
  std::vector<TensorInfo> tensors = triplets();
  tensors[0].shape = {3, 5};                           // q's A, not cut
  tensors[5].shape = {0};                              // dead's E
  tensors[8].shape = {3, 2};                           // full's E
  tensors[9] = info(e + ".lora_embedding_A", {3, 5});  // PEFT's AdaLoRA knows no embeddings
  tensors.push_back(info("base_model.model.v.lora_A.weight", {3, 5}));
  tensors.push_back(info("base_model.model.w.lora_E", {3, 1}));
  AdapterConfig config = adalora();
  config.kept_directions["gone"] = {true, true, true};
  EXPECT_EQ(error_of(tensors, config),
            "F: not the adapter that its configuration describes:\n"
            "  \"base_model.model.dead.lora_E\": must be [0, 1], got [0]\n"
            "  \"emb\": ADALORA has no lora_embedding_A and lora_embedding_B\n"
            "  \"base_model.model.full.lora_E\": must be [3, 1], got [3, 2]\n"
            "  \"base_model.model.layers.0.q.lora_A\": must be [2, in], got [3, 5]\n"
            "  \"v\": ADALORA has no lora_A.weight and lora_B.weight\n"
            "  \"base_model.model.w.lora_A\": missing\n"
            "  \"base_model.model.w.lora_B\": missing\n"
            "  rank_pattern \"gone.lora_E\": there is no such module");
}

TEST(AdapterLayout, LoRAHasNoTriplets) {
  EXPECT_THAT(error_of(triplets()), HasSubstr("\"full\": LORA has no lora_A, lora_B and lora_E"));
}

TEST(AdapterLayout, LongListsAreCut) {
  std::vector<TensorInfo> tensors;
  for (int i = 0; i < 60; ++i) tensors.push_back(info("t" + std::to_string(i), {}));
  const std::string message = error_of(tensors);
  EXPECT_THAT(message, HasSubstr("\"t49\""));
  EXPECT_THAT(message, testing::Not(HasSubstr("\"t50\"")));
  EXPECT_THAT(message, HasSubstr("\n  and 11 more"));
}

TEST(AdapterLayout, ManyModulesNeedSimplePatterns) {
  std::vector<TensorInfo> tensors;
  for (int i = 0; i < 3000; ++i) {
    const std::string module =
        "base_model.model." + std::string(400, 'a') + "." + std::to_string(i);
    tensors.push_back(info(module + ".lora_A.weight", {8, 1}));
    tensors.push_back(info(module + ".lora_B.weight", {1, 8}));
  }
  AdapterConfig config;
  config.rank_pattern = {{"[b-z]{300}", 8}};
  EXPECT_EQ(error_of(tensors, config),
            "F: the regular expressions of rank_pattern and alpha_pattern must be fewer or simpler "
            "for 3000 modules");
  config.rank_pattern = {{"b|c", 8}, {"plain.name", 8}};
  check_adapter_layout(tensors, config, "F");
}

}  // namespace
