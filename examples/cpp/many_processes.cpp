// AdaLoRA in several processes, in C++ alone: each has batches of its own, the gradients are
// averaged, and the allocators compare what they decide, over a c10d store. For two of them:
//
//   many_processes FILE 0 2 & many_processes FILE 1 2
//
// FILE must be new. A store is enough for a small training, and across machines c10d::TCPStore has
// the same functions; programs that have a c10d::ProcessGroup gather by its allgather.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <torch/csrc/distributed/c10d/FileStore.hpp>

namespace {

class Processes {
 public:
  Processes(const std::string& file, int64_t rank, int64_t size)
      : store_(file, static_cast<int>(size)), rank_(rank), size_(size) {
    store_.setTimeout(std::chrono::seconds(60));  // then a process that waits throws
  }

  /// A tensor on the CPU, of every process.
  std::vector<at::Tensor> all_gather(const at::Tensor& mine) {
    const std::string place = std::to_string(calls_++) + "/";
    const at::Tensor own = mine.contiguous();
    const auto* const bytes = static_cast<const uint8_t*>(own.const_data_ptr());
    store_.set(place + std::to_string(rank_), {bytes, bytes + own.nbytes()});
    std::vector<at::Tensor> all;
    for (int64_t rank = 0; rank < size_; ++rank) {
      const std::vector<uint8_t> theirs = store_.get(place + std::to_string(rank));  // waits
      TORCH_CHECK(theirs.size() == own.nbytes(), "process ", rank, " sent another tensor");
      all.push_back(at::empty_like(own));
      std::memcpy(all.back().mutable_data_ptr(), theirs.data(), theirs.size());
    }
    return all;
  }

  void average_gradients(const std::vector<at::Tensor>& parameters) {
    std::vector<at::Tensor> gradients;
    for (const at::Tensor& parameter : parameters) gradients.push_back(parameter.grad().flatten());
    const at::Tensor mean = at::stack(all_gather(at::cat(gradients))).mean(0);
    int64_t place = 0;
    for (const at::Tensor& parameter : parameters) {
      const at::Tensor part = mean.narrow(0, place, parameter.numel());
      parameter.grad().copy_(part.view_as(parameter));
      place += parameter.numel();
    }
  }

 private:
  c10d::FileStore store_;
  int64_t rank_, size_, calls_ = 0;
};

constexpr int64_t in = 16, hidden = 24, out = 4, steps = 60;

void train(Processes& processes, int64_t rank) {
  torch::manual_seed(0);  // the same factors in all
  const auto options = rankwise::nn::LoRALinearOptions(in, hidden).rank(6).alpha(12);
  torch::nn::Sequential model(
      rankwise::nn::AdaLoRALinear(options), torch::nn::Tanh(),
      rankwise::nn::AdaLoRALinear(rankwise::nn::LoRALinearOptions(hidden, out).rank(6).alpha(12)));
  rankwise::freeze_base(*model);
  std::vector<at::Tensor> factors;
  for (const at::Tensor& parameter : model->parameters())
    if (parameter.requires_grad()) factors.push_back(parameter);
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(factors,
                                                                torch::optim::AdamWOptions(1e-2));
  rankwise::RankAllocator allocator(*model, rankwise::AdaLoRAOptions()
                                                .initial_rank(6)
                                                .target_rank(3)
                                                .total_steps(steps)
                                                .warmup_steps(5)
                                                .final_steps(20)
                                                .allocation_interval(5));
  allocator.attach(optimizer);
  allocator.set_group([&](const at::Tensor& mine) { return processes.all_gather(mine); });
  for (int64_t step = 0; step < steps; ++step) {
    torch::manual_seed(1 + steps * rank + step);
    const auto x = torch::randn({16, in});
    optimizer.zero_grad();
    torch::mse_loss(model->forward(x), x.narrow(1, 0, out)).backward();
    processes.average_gradients(factors);
    optimizer.step();
  }
  std::printf("process %lld:", static_cast<long long>(rank));
  for (const auto& [name, kept] : allocator.ranks())
    std::printf(" %s %lld", name.c_str(), static_cast<long long>(kept));
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s FILE RANK SIZE\n", argv[0]);
    return 2;
  }
  try {
    const int64_t rank = std::atoll(argv[2]);
    Processes processes(argv[1], rank, std::atoll(argv[3]));
    train(processes, rank);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
