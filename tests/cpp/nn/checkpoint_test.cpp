// save_checkpoint and load_checkpoint: going on bit for bit, kills, what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../io/system_calls.h"
#include "checkpoint_training.h"

namespace {

using namespace checkpoint_training;
using rankwise::io::FileError;
using testing::AllOf;
using testing::HasSubstr;

template <class Make>
void resumes_at_each_stop(const Make& make, Method method, const std::vector<int64_t>& stops) {
  for (const int64_t stop : stops) {
    SCOPED_TRACE(stop);
    const TemporaryFolder folder;
    auto whole = make(method);
    whole.train(stop);
    whole.save(folder.path(), stop);
    const std::vector<double> wanted = whole.train(steps - stop);

    auto again = make(method);
    again.train(stop % 3);  // what it has of its own is forgotten
    ASSERT_EQ(again.load(folder.path()), stop);
    EXPECT_EQ(again.train(steps - stop), wanted);
    EXPECT_EQ(again.everything(), whole.everything());
    ASSERT_EQ(again.load(folder.path()), stop);  // back, from where ranks have moved
    EXPECT_EQ(again.train(steps - stop), wanted);
  }
}

TEST(Checkpoint, LoRAGoesOnToTheBit) {
  resumes_at_each_stop(adamw, Method::lora, {0, 1, 7});
  resumes_at_each_stop(sgd, Method::lora, {0, 1, 7});
}

TEST(Checkpoint, AdaLoRAGoesOnToTheBit) {
  const std::vector<int64_t> stops = {1, 3, 4, 9, 13, 14, 15, 19};  // frozen in step 14
  resumes_at_each_stop(adamw, Method::adalora, stops);
  resumes_at_each_stop(sgd, Method::adalora, stops);
}

TEST(Checkpoint, RanksThatMoveGoOnToTheBit) {
  const std::vector<int64_t> stops = {3, 4, 5, 8, 9, 13, 19};
  resumes_at_each_stop(adamw, Method::spectral, stops);
  resumes_at_each_stop(sgd, Method::spectral, stops);
}

template <class Optimizer, class Options>
void goes_on(const Options& options) {
  const auto make = [&](Method method) { return Training<Optimizer>(method, options); };
  resumes_at_each_stop(make, Method::adalora, {5, 16});
}

TEST(Checkpoint, OtherOptimizersOfTorch) {
  goes_on<torch::optim::Adam>(torch::optim::AdamOptions(2e-2));
  goes_on<torch::optim::RMSprop>(torch::optim::RMSpropOptions(1e-3).centered(true).momentum(0.5));
  goes_on<torch::optim::Adagrad>(torch::optim::AdagradOptions(1e-1).lr_decay(1e-3));
}

TEST(Checkpoint, RatesGroupsAndParametersOutsideOfTheModel) {
  using torch::optim::SGDOptions;
  const TemporaryFolder folder;
  auto net = net_of(Method::lora), other = net_of(Method::lora);
  const auto optimizer_of = [](torch::nn::Sequential& model, const torch::Tensor& own) {
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(model->parameters(), std::make_unique<SGDOptions>(0.5));
    groups.emplace_back(std::vector{own}, std::make_unique<SGDOptions>(0.25));
    return std::make_unique<torch::optim::SGD>(groups, SGDOptions(1.0));
  };
  const auto own = torch::ones({3}).requires_grad_(), read = torch::zeros({3}).requires_grad_();
  const auto optimizer = optimizer_of(net, own), again = optimizer_of(other, read);
  dynamic_cast<SGDOptions&>(optimizer->param_groups()[1].options()).lr(0.125);
  rankwise::save_checkpoint(folder.path(), *net, *optimizer, nullptr, 3);
  EXPECT_EQ(rankwise::load_checkpoint(folder.path(), *other, *again), 3);
  EXPECT_TRUE(read.equal(own));
  EXPECT_EQ(again->param_groups()[0].options().get_lr(), 0.5);
  EXPECT_EQ(again->param_groups()[1].options().get_lr(), 0.125);
}

TEST(Checkpoint, AdaptersThatWaitAreInIt) {
  const TemporaryFolder folder;
  auto saved = adamw(Method::adalora), loaded = adamw(Method::adalora);
  for (auto* training : {&saved, &loaded})
    rankwise::add_adapter(*training->net, "other", rankwise::nn::AdapterOptions().rank(2));
  EXPECT_NE(saved.everything(), loaded.everything());
  saved.train(16);
  saved.save(folder.path(), 16);
  loaded.load(folder.path());
  EXPECT_EQ(saved.everything(), loaded.everything());
  for (const auto& [path, layer] : rankwise::adapted_layers(*loaded.net))
    EXPECT_EQ(layer->held_adapter("other").rank, 2);
  rankwise::activate_adapter(*loaded.net, "other");
  EXPECT_THAT(message_of<FileError>([&] { loaded.load(folder.path()); }),
              HasSubstr("adapters of 0: the checkpoint has default of default, other, the training "
                        "here other of other, default"));
}

TEST(Checkpoint, TheAdapterIsPEFTs) {
  const TemporaryFolder folder;
  auto training = sgd(Method::adalora);
  training.train(5);
  training.save(folder.path(), 5);
  EXPECT_EQ(rankwise::read_adapter(folder.path()).config.peft_type, "ADALORA");
  auto net = net_of(Method::adalora);
  rankwise::load_adapter(*net, folder.path());
  EXPECT_TRUE(net->parameters()[2].equal(training.net->parameters()[2]));
}

TEST(Checkpoint, KillAtEveryCallLeavesOldOrNew) {
  int olds = 0, news = 0;
  auto training = sgd(Method::lora), read = sgd(Method::lora);
  for (int at = 1;; ++at) {
    const TemporaryFolder folder;
    training.save(folder.path(), 1);
    const auto before = training.net->parameters()[1].clone();
    const pid_t child = ::fork();
    if (child == 0) {
      torch::NoGradGuard no_grad;
      training.net->parameters()[1].add_(1);
      system_calls::kill_at(at);
      training.save(folder.path(), 2);
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    const int64_t step = read.load(folder.path());
    EXPECT_TRUE(read.net->parameters()[1].equal(step == 2 ? before + 1 : before)) << "call " << at;
    ++(step == 2 ? news : olds);
    if (WEXITSTATUS(status) != system_calls::killed_status) break;
    ASSERT_LT(at, 200);
  }
  EXPECT_GE(olds, 20);
  EXPECT_GE(news, 8);
}

// What loading a folder into a training says; it must change nothing.
template <class Error, class Trained>
std::string refusal(Trained& training, const TemporaryFolder& folder) {
  const std::string before = training.everything();
  std::string message = message_of<Error>([&] { training.load(folder.path()); });
  EXPECT_EQ(training.everything(), before);
  return message;
}

TEST(Checkpoint, OtherTrainingsAreRefusedByTheirParts) {
  const TemporaryFolder folder;
  auto saved = adamw(Method::adalora);
  saved.train(4);
  saved.save(folder.path(), 4);
  auto other = sgd(Method::adalora);
  other.train(2);
  EXPECT_THAT(refusal<FileError>(other, folder),
              HasSubstr("optimizer: the checkpoint has AdamW, the training here SGD"));
  auto lora = adamw(Method::lora);
  EXPECT_THAT(refusal<FileError>(lora, folder),
              AllOf(HasSubstr("allocator: the checkpoint has rankwise::RankAllocator, the training "
                              "here none"),
                    HasSubstr("0.lora_E: the model has no such tensor that trains")));
  auto wide = adamw(Method::adalora);
  wide.allocator->detach();
  wide.allocator = std::make_unique<rankwise::RankAllocator>(*wide.net, schedule().beta1(0.5));
  EXPECT_THAT(refusal<std::invalid_argument>(wide, folder), HasSubstr("options.beta1"));
}

TEST(Checkpoint, AnotherModelIsRefusedByItsTensors) {
  const TemporaryFolder folder;
  auto saved = sgd(Method::lora);
  saved.save(folder.path(), 0);
  auto net = net_of(Method::lora, /*width=*/10);
  rankwise::freeze_base(*net);
  torch::optim::SGD optimizer(net->parameters(),
                              torch::optim::SGDOptions(5e-2).momentum(0.9).nesterov(true));
  const auto before = net->parameters()[2].clone();
  EXPECT_THAT(
      message_of<FileError>([&] { rankwise::load_checkpoint(folder.path(), *net, optimizer); }),
      AllOf(HasSubstr("0.lora_B: must be Float [10, 3], got Float [12, 3]"),
            HasSubstr("1.running_mean: must be Float [10]")));
  EXPECT_TRUE(net->parameters()[2].equal(before));
}

TEST(Checkpoint, MissingAndDamagedFilesAreNamed) {
  const TemporaryFolder folder;
  auto training = adamw(Method::lora);
  training.train(1);
  for (const std::string name : {"training.json", "training.safetensors"}) {
    training.save(folder.path(), 1);
    const std::string bytes = folder.read(name);
    folder.write(name, bytes.substr(0, bytes.size() / 2));
    EXPECT_THAT(refusal<FileError>(training, folder), HasSubstr(name + ": damaged"));
    ::unlink((folder.path() / name).c_str());
    EXPECT_THAT(refusal<FileError>(training, folder), HasSubstr(name + ": no such file"));
  }
  const TemporaryFolder adapter;
  rankwise::save_adapter(*training.net, adapter.path());
  EXPECT_THAT(refusal<FileError>(training, adapter), HasSubstr("training.json: no such file"));
}

// A folder whose checksums are right, with other tensors beside the adapter.
template <class Change>
void rewrite(const TemporaryFolder& folder, const Change& change) {
  auto file = rankwise::read_adapter(folder.path(), {"training.json", "training.safetensors"});
  std::string& bytes = file.beside["training.safetensors"];
  auto tensors = rankwise::parse_tensors(bytes, "");
  change(tensors, file.beside["training.json"]);
  bytes = rankwise::format_tensors(tensors, "");
  rankwise::write_adapter(folder.path(), file);
}

TEST(Checkpoint, EveryMissingExtraOrOtherTensorIsNamed) {
  auto training = adamw(Method::adalora);
  training.train(3);
  const TemporaryFolder whole;
  training.save(whole.path(), 3);
  const auto file = rankwise::read_adapter(whole.path(), {"training.safetensors"});
  for (const auto& [name, tensor] :
       rankwise::parse_tensors(file.beside.at("training.safetensors"), "")) {
    if (name.starts_with("allocator.")) continue;  // its own load_state's to refuse
    if (name.find("max_exp_avg_sq") != name.npos) continue;
    const std::string last = name.substr(name.find('.') + 1);
    const TemporaryFolder folder;
    training.save(folder.path(), 3);
    rewrite(folder, [&](auto& tensors, std::string&) { tensors.erase(name); });
    EXPECT_THAT(refusal<FileError>(training, folder), HasSubstr(last)) << name;
    rewrite(folder, [&](auto& tensors, std::string&) {
      tensors[name] = torch::zeros({2, 1, 2});
      tensors["model.extra"] = tensors["optimizer.extra"] = torch::zeros({1});
    });
    EXPECT_THAT(refusal<FileError>(training, folder),
                AllOf(HasSubstr(last), HasSubstr("optimizer.extra: the optimizer has no such"),
                      HasSubstr("extra: the model has no such tensor")))
        << name;
  }
}

TEST(Checkpoint, PythonsAreForPython) {
  const TemporaryFolder folder;
  auto training = adamw(Method::lora);
  training.save(folder.path(), 0);
  rewrite(folder, [](auto&, std::string& json) { json = "{\n \"dict\": [[\"format\", 1]]\n}"; });
  EXPECT_THAT(refusal<FileError>(training, folder),
              HasSubstr("training.json: must be what save_checkpoint writes in C++"));
}

TEST(Checkpoint, WhatCannotBeSavedIsNamedAndNothingIsWritten) {
  const TemporaryFolder folder;
  auto net = net_of(Method::lora);
  torch::optim::LBFGS lbfgs(net->parameters());
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { rankwise::save_checkpoint(folder.path(), *net, lbfgs); }),
              HasSubstr("save_checkpoint: optimizer must be torch::optim's AdamW, Adam, SGD, "
                        "RMSprop or Adagrad, got one with torch::optim::LBFGSOptions"));
  torch::optim::SGD optimizer(net->parameters(), 0.1);
  rankwise::adapted_layers(*net)[0].second->merge();
  EXPECT_THROW(rankwise::save_checkpoint(folder.path(), *net, optimizer), c10::Error);
  torch::nn::Sequential plain(torch::nn::Linear(2, 2));
  EXPECT_THROW(rankwise::save_checkpoint(folder.path(), *plain, optimizer), std::invalid_argument);
  EXPECT_TRUE(folder.names().empty());
}

}  // namespace
