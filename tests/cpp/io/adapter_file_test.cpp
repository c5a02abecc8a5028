// read_adapter and write_adapter: round trips, determinism, damaged folders, warnings.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/adapter_file.h>
#include <sys/wait.h>
#include <unistd.h>

#include "system_calls.h"
#include "temporary_folder.h"

namespace {

using rankwise::AdapterFile;
using rankwise::read_adapter;
using rankwise::write_adapter;
using rankwise::io::FileError;
using testing::ElementsAre;
using testing::HasSubstr;

const std::string model_name = "adapter_model.safetensors";
const std::string config_name = "adapter_config.json";
const std::string q = "base_model.model.layers.0.q";

AdapterFile adapter(at::ScalarType dtype = at::kFloat, double value = 1) {
  const auto values = [&](at::IntArrayRef shape) {
    return at::arange(c10::multiply_integers(shape)).view(shape).to(dtype).mul(value);
  };
  AdapterFile file;
  file.config.rank = 2;
  file.config.target_modules = {"q", "emb"};
  file.config.rank_pattern = {{"emb", 0}};
  file.tensors = {{q + ".lora_A.weight", values({2, 3})},
                  {q + ".lora_B.weight", values({5, 2})},
                  {"base_model.model.emb.lora_embedding_A", values({0, 7})},
                  {"base_model.model.emb.lora_embedding_B", values({3, 0})},
                  {"base_model.model.head.bias", values({3})}};
  file.metadata = {{"format", "pt"}, {"note", "x"}};
  return file;
}

void expect_equal(const AdapterFile& a, const AdapterFile& b) {
  EXPECT_EQ(a.config, b.config);
  EXPECT_EQ(a.metadata, b.metadata);
  ASSERT_EQ(a.tensors.size(), b.tensors.size());
  for (const auto& [name, tensor] : a.tensors) {
    const at::Tensor& other = b.tensors.at(name);
    EXPECT_EQ(tensor.scalar_type(), other.scalar_type()) << name;
    EXPECT_TRUE(at::equal(tensor, other)) << name;
  }
}

std::string read_error(const TemporaryFolder& folder) {
  return message_of<FileError>([&] { read_adapter(folder.path()); });
}

std::string write_error(const AdapterFile& file) {
  const TemporaryFolder folder;
  const std::string message = message_of<FileError>([&] { write_adapter(folder.path(), file); });
  EXPECT_TRUE(folder.names().empty());
  return message;
}

class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { text += warning.msg(); }
  std::string text;
};

TEST(AdapterFile, RoundTripInEveryType) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
    const TemporaryFolder folder;
    write_adapter(folder.path(), adapter(dtype));
    EXPECT_EQ(folder.names(), (std::set<std::string>{config_name, model_name}));
    expect_equal(read_adapter(folder.path()), adapter(dtype));
  }
}

AdapterFile adalora(at::ScalarType dtype) {
  const auto values = [&](at::IntArrayRef shape) { return at::rand(shape).to(dtype); };
  AdapterFile file;
  file.config.peft_type = "ADALORA";
  file.config.rank = 3;
  file.config.alpha = 7;
  file.config.target_modules = {"q", "dead"};
  file.config.kept_directions = {{"layers.0.q", {true, false, true}}, {"dead", {0, 0, 0}}};
  file.metadata = {{"format", "pt"}};
  file.tensors = {{q + ".lora_A", values({2, 4})},
                  {q + ".lora_B", values({5, 2})},
                  {q + ".lora_E", values({2, 1})},
                  {"base_model.model.dead.lora_A", values({0, 7})},
                  {"base_model.model.dead.lora_B", values({3, 0})},
                  {"base_model.model.dead.lora_E", values({0, 1})},
                  {"base_model.model.head.bias", values({3})}};
  return file;
}

TEST(AdapterFile, RoundTripOfAdaLoRAWithADeadModule) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
    const TemporaryFolder folder;
    const AdapterFile file = adalora(dtype);
    write_adapter(folder.path(), file);
    expect_equal(read_adapter(folder.path()), file);
  }
}

TEST(AdapterFile, WhatPeftDoesNotHaveOfAScheduleIsInTheMetadata) {
  const TemporaryFolder folder;
  AdapterFile file = adalora(at::kFloat);
  file.config.allocation =
      rankwise::AllocationSettings{.total_steps = 10,
                                   .budget_unit = rankwise::BudgetUnit::parameters,
                                   .min_rank = 2,
                                   .shrink = false};
  write_adapter(folder.path(), file);
  EXPECT_THAT(folder.read(model_name),
              HasSubstr(R"({\"budget_unit\":\"parameters\",\"min_rank\":2,\"shrink\":false})"));
  expect_equal(read_adapter(folder.path()), file);

  file.config.allocation->min_rank = 0;
  write_adapter(folder.path(), file);
  expect_equal(read_adapter(folder.path()), file);
  file.config.allocation = rankwise::AllocationSettings{.total_steps = 10};
  write_adapter(folder.path(), file);
  EXPECT_THAT(folder.read(model_name), testing::Not(HasSubstr("rankwise.allocation")));
}

TEST(AdapterFile, AdaLoRAConfigThatDoesNotFitTheTensors) {
  AdapterFile file = adalora(at::kFloat);
  file.config.kept_directions.at("dead") = {true, false, false};
  EXPECT_THAT(write_error(file), HasSubstr("dead.lora_E\": must be [1, 1], got [0, 1]"));
  const TemporaryFolder folder;
  write_adapter(folder.path(), adalora(at::kFloat));
  std::string config = folder.read(config_name);
  config.replace(config.find("\"dead.lora_E\""), 13, "\"gone.lora_E\"");
  folder.write(config_name, config);
  EXPECT_THAT(read_error(folder), HasSubstr("\"gone.lora_E\": there is no such module"));
  EXPECT_THAT(read_error(folder), HasSubstr("dead.lora_A\": must be [3, in], got [0, 7]"));
}

TEST(AdapterFile, MixedTypesStridesAndFlags) {
  AdapterFile file = adapter();
  const at::Tensor A = at::arange(6, at::kDouble).view({3, 2}).t();
  file.tensors[q + ".lora_A.weight"] = A;
  file.tensors[q + ".lora_B.weight"] =
      at::arange(10, at::kHalf).view({5, 2}).slice(0, 0, 5).requires_grad_();
  file.tensors["base_model.model.head.bias"] = at::ones({1}).expand({3});
  const TemporaryFolder folder;
  write_adapter(folder.path(), file);
  const AdapterFile read = read_adapter(folder.path());
  expect_equal(read, file);
  EXPECT_TRUE(read.tensors.at(q + ".lora_A.weight").is_contiguous());
  EXPECT_FALSE(read.tensors.at(q + ".lora_B.weight").requires_grad());
}

TEST(AdapterFile, SameInputGivesSameBytes) {
  const TemporaryFolder a;
  const TemporaryFolder b;
  write_adapter(a.path(), adapter());
  write_adapter(b.path(), adapter());
  EXPECT_EQ(a.read(model_name), b.read(model_name));
  EXPECT_EQ(a.read(config_name), b.read(config_name));
}

TEST(AdapterFile, TargetModulesAndFormatAreFilledIn) {
  AdapterFile file = adapter();
  file.config.target_modules.clear();
  file.metadata.clear();
  const TemporaryFolder folder;
  write_adapter(folder.path(), file);
  const AdapterFile read = read_adapter(folder.path());
  EXPECT_THAT(read.config.target_modules, ElementsAre("emb", "layers.0.q"));
  EXPECT_EQ(read.metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
}

TEST(AdapterFile, EveryTruncationIsAnError) {
  const TemporaryFolder folder;
  write_adapter(folder.path(), adapter());
  for (const std::string& name : {model_name, config_name}) {
    const std::string content = folder.read(name);
    for (size_t size = 0; size + 1 < content.size(); ++size) {
      folder.write(name, content.substr(0, size));
      EXPECT_THAT(read_error(folder), HasSubstr(name)) << size;
    }
    folder.write(name, content);
  }
}

TEST(AdapterFile, EveryBitFlipIsAnErrorOrTheSameShapes) {
  const TemporaryFolder folder;
  write_adapter(folder.path(), adapter());
  const std::string content = folder.read(model_name);
  Warnings warnings;  // flips in the data make NaNs
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  for (size_t bit = 0; bit < 8 * content.size(); ++bit) {
    std::string changed = content;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << (bit % 8)));
    folder.write(model_name, changed);
    try {
      const AdapterFile read = read_adapter(folder.path());
      EXPECT_EQ(read.tensors.at(q + ".lora_A.weight").sizes(), at::IntArrayRef({2, 3})) << bit;
      EXPECT_EQ(read.tensors.at(q + ".lora_B.weight").sizes(), at::IntArrayRef({5, 2})) << bit;
    } catch (const FileError&) {
    } catch (const std::out_of_range&) {
      ADD_FAILURE() << "half an adapter was read at bit " << bit;
    }
  }
}

TEST(AdapterFile, MismatchesAreErrors) {
  AdapterFile file = adapter();
  file.config.rank = 3;
  EXPECT_THAT(write_error(file), HasSubstr("lora_A.weight\": must be [3, in], got [2, 3]"));
  const TemporaryFolder folder;
  write_adapter(folder.path(), adapter());
  std::string config = folder.read(config_name);
  config.replace(config.find("\"r\": 2"), 6, "\"r\": 3");
  folder.write(config_name, config);
  EXPECT_THAT(read_error(folder), HasSubstr("lora_A.weight\": must be [3, in], got [2, 3]"));
  folder.write(config_name, std::string((4 << 20) + 1, ' '));
  EXPECT_THAT(read_error(folder), HasSubstr("must be at most 4194304 bytes, got 4194305"));
}

TEST(AdapterFile, TensorsThatCannotBeWritten) {
  const auto error = [](const at::Tensor& bias) {
    AdapterFile file = adapter();
    file.tensors["base_model.model.head.bias"] = bias;
    return write_error(file);
  };
  EXPECT_THAT(error(at::ones({3}, at::kLong)),
              HasSubstr("head.bias\" must be float64, float32, float16 or bfloat16, got Long"));
  EXPECT_THAT(error(at::Tensor()), HasSubstr("must be defined, got an undefined tensor"));
  EXPECT_THAT(error(at::ones({3}).to_sparse()), HasSubstr("must be dense"));
  EXPECT_THAT(error(at::ones({3}, at::TensorOptions().device(at::kMeta))),
              HasSubstr("must be dense"));
  AdapterFile file = adapter();
  file.tensors["other"] = at::ones({1});
  EXPECT_THAT(write_error(file), HasSubstr("\"other\": not a tensor of a PEFT LoRA adapter"));
}

TEST(AdapterFile, TensorsWithoutMemoryAreNamed) {
  const at::Tensor one = at::ones({3, 4});
  at::Tensor freed = at::ones({3, 4});
  freed.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(at::DataPtr());
  const std::vector<std::pair<at::Tensor, std::string>> kinds = {
      {one.to_sparse(), "Sparse"},
      {one.to_sparse_csr(), "SparseCsr"},
      {one.to_mkldnn(), "Mkldnn"},
      {one.to(at::kMeta), "meta"},
      {at::_nested_tensor_from_tensor_list({one}), "a nested tensor"},
      {at::_efficientzerotensor({3, 4}), "a zero tensor"},
      {freed, "freed memory"}};
  for (const auto& [tensor, kind] : kinds) {
    AdapterFile file = adapter();
    const std::string key = file.tensors.begin()->first;
    file.tensors[key] = tensor;
    EXPECT_THAT(write_error(file), HasSubstr(key + "\" must be dense, with data, got " + kind));
  }
}

TEST(AdapterFile, PickleFilesAreRefused) {
  const TemporaryFolder folder;
  folder.write("adapter_model.bin", "x");
  folder.write(config_name, "{}");
  EXPECT_THAT(read_error(folder), HasSubstr("adapter_model.bin: pickle files are not read"));
  EXPECT_THAT(message_of<FileError>([&] { read_adapter(folder.path() / "none"); }),
              HasSubstr("none: cannot open the folder"));
  folder.write(model_name, "x");
  EXPECT_THAT(read_error(folder), HasSubstr("peft_type must be"));
}

TEST(AdapterFile, NonFiniteValuesAreReported) {
  for (const double value :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const TemporaryFolder folder;
    AdapterFile file = adapter(at::kBFloat16);
    file.tensors[q + ".lora_A.weight"][0][0] = value;
    write_adapter(folder.path(), file);
    Warnings warnings;
    const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
    read_adapter(folder.path());
    EXPECT_THAT(warnings.text, HasSubstr("layers.0.q.lora_A.weight\" has NaN or infinite values"));
    EXPECT_THAT(warnings.text, testing::Not(HasSubstr("lora_B")));
  }
}

TEST(AdapterFile, KillAtEveryCallLeavesOldOrNew) {
  AdapterFile changed = adapter(at::kFloat, 3);
  changed.config.alpha = 99;
  for (int at = 1;; ++at) {
    const TemporaryFolder folder;
    write_adapter(folder.path(), adapter());
    const pid_t child = ::fork();
    if (child == 0) {
      system_calls::kill_at(at);
      write_adapter(folder.path(), changed);
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    const AdapterFile read = read_adapter(folder.path());
    expect_equal(read, read.config.alpha == 99 ? changed : adapter());
    if (WEXITSTATUS(status) != system_calls::killed_status) break;
    ASSERT_LT(at, 100);
  }
}

}  // namespace
