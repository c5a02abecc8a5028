// AdaLoRA's schedule: noted by a RankAllocator, saved with the adapter, and had again.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include "../io/temporary_folder.h"

namespace {

using rankwise::adalora_options;
using rankwise::AdaLoRAOptions;
using rankwise::AllocationSettings;
using rankwise::nn::AdaLoRALinear;
using rankwise::nn::LoRALinear;
using rankwise::nn::LoRALinearOptions;
using testing::HasSubstr;

const LoRALinearOptions layer = LoRALinearOptions(4, 4).rank(3).alpha(6);

torch::nn::Sequential net_of(int64_t layers = 2) {
  torch::nn::Sequential net;
  for (int64_t i = 0; i < layers; ++i) net->push_back(AdaLoRALinear{layer});
  return net;
}

/// No value is the default.
AdaLoRAOptions schedule() {
  return AdaLoRAOptions()
      .initial_rank(3)
      .target_rank(2)
      .total_steps(90)
      .warmup_steps(10)
      .final_steps(20)
      .allocation_interval(5)
      .beta1(0.5)
      .beta2(0)
      .budget_unit(rankwise::BudgetUnit::parameters)
      .min_rank(1)
      .shrink(false);
}

std::string error_of(torch::nn::Module& model) {
  return message_of<std::invalid_argument>([&] { adalora_options(model); });
}

TEST(AdapterSchedule, TheAllocatorsComesBackFromAFolder) {
  const TemporaryFolder folder;
  auto saved = net_of(), loaded = net_of();
  rankwise::RankAllocator(*saved, schedule());
  EXPECT_EQ(adalora_options(*saved).settings(), schedule().settings());
  rankwise::save_adapter(*saved, folder.path());
  const auto file = rankwise::read_adapter(folder.path());
  EXPECT_EQ(file.config.allocation, schedule().settings());
  EXPECT_EQ(file.metadata, (std::map<std::string, std::string>{{"format", "pt"}}));

  rankwise::load_adapter(*loaded, folder.path());
  rankwise::load_adapter(*loaded, folder.path(), "copy");
  for (const char* name : {"default", "copy"}) {
    const AdaLoRAOptions options = adalora_options(*loaded, name);
    EXPECT_EQ(options.settings(), schedule().settings()) << name;
    EXPECT_EQ(options.initial_rank(), 3) << name;
  }
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(loaded->clone());
  EXPECT_EQ(adalora_options(*copy).settings(), schedule().settings());
}

TEST(AdapterSchedule, ALaterAllocatorCountsAndALoadDoesNotReplaceIt) {
  const TemporaryFolder folder;
  auto net = net_of();
  rankwise::RankAllocator(*net, schedule());
  rankwise::save_adapter(*net, folder.path());
  rankwise::RankAllocator(*net, schedule().total_steps(200));
  rankwise::load_adapter(*net, folder.path());
  EXPECT_EQ(adalora_options(*net).total_steps(), 200);
}

TEST(AdapterSchedule, UnknownIsAPlaceholderAndStaysUnknown) {
  const TemporaryFolder folder;
  auto net = net_of(), half = net_of();
  rankwise::RankAllocator(*half[0], schedule());  // of one layer alone
  for (auto model : {net, half}) {
    EXPECT_THAT(error_of(*model), HasSubstr("no schedule in common"));
    rankwise::save_adapter(*model, folder.path());
    EXPECT_FALSE(rankwise::read_adapter(folder.path()).config.allocation);
    auto loaded = net_of();
    rankwise::load_adapter(*loaded, folder.path());
    EXPECT_THAT(error_of(*loaded), HasSubstr("give AdaLoRAOptions"));
  }
}

TEST(AdapterSchedule, AFoldersOddScheduleLoadsAndIsRefusedWhereItIsWanted) {
  const TemporaryFolder folder;
  auto net = net_of();
  rankwise::save_adapter(*net, folder.path());
  auto file = rankwise::read_adapter(folder.path());
  file.config.allocation = AllocationSettings{.target_rank = 8, .total_steps = 10};
  rankwise::write_adapter(folder.path(), file);
  rankwise::load_adapter(*net, folder.path());
  EXPECT_EQ(
      error_of(*net),
      "AdaLoRA: target_rank must be from 0 to initial_rank 3 (ranks are pruned, never grown), "
      "got 8");
  rankwise::save_adapter(*net, folder.path());
  EXPECT_EQ(rankwise::read_adapter(folder.path()).config.allocation, file.config.allocation);
}

TEST(AdapterSchedule, OfNoAdaLoRA) {
  torch::nn::Sequential lora(LoRALinear{layer}), plain(torch::nn::Linear(2, 2));
  EXPECT_EQ(error_of(*lora), "adalora_options: 0 must have an AdaLoRA adapter, got LoRA");
  EXPECT_EQ(error_of(*plain), "adalora_options: the model has no adapted layer");
  auto net = net_of();
  EXPECT_EQ(message_of<std::invalid_argument>([&] { adalora_options(*net, "other"); }),
            "adalora_options: adapters are [default], got other");
}

TEST(AdapterSchedule, FilesNameLayersShortlyWhereThatIsClear) {
  EXPECT_EQ(
      rankwise::target_names({"a.q", "b.q", "a.fc"}, {"", "a", "b", "a.q", "b.q", "a.fc", "fc"}),
      (std::vector<std::string>{"a.fc", "q"}));
  const TemporaryFolder folder;
  torch::nn::ModuleList block(AdaLoRALinear{layer}, torch::nn::Tanh());
  torch::nn::ModuleListImpl net;  // not shared: nobody may ask it for a pointer to itself
  net.push_back(block);
  net.push_back(AdaLoRALinear{layer});
  rankwise::add_adapter(net, "q", rankwise::nn::AdapterOptions().rank(3));
  rankwise::save_adapter(net, folder.path());
  EXPECT_EQ(rankwise::read_adapter(folder.path()).config.target_modules,
            (std::vector<std::string>{"0.0", "1"}));
}

}  // namespace
