// Allocator: what all allocators share: their adapters, their optimizer, and who is in charge.
#pragma once

#include <ATen/core/List.h>
#include <c10/util/Exception.h>
#include <rankwise/adapter.h>
#include <rankwise/budget_schedule.h>

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace torch::serialize {
class InputArchive;
class OutputArchive;
}  // namespace torch::serialize

namespace rankwise {

/// A parameter's optimizer state, by how it follows a change of the directions' basis.
struct Moments {
  std::vector<at::Tensor> first;   ///< averages of gradients: they change as gradients do
  std::vector<at::Tensor> second;  ///< averages of their squares

  std::vector<at::Tensor> all() const {
    std::vector<at::Tensor> tensors = first;
    tensors.insert(tensors.end(), second.begin(), second.end());
    return tensors;
  }
};

/// What an allocator needs to know of the optimizer that just stepped.
struct OptimizerView {
  /// A parameter's state tensors of the parameter's shape, which move with its directions; nullopt
  /// when there is state that cannot be moved. Empty function: no state.
  std::function<std::optional<std::vector<at::Tensor>>(const at::Tensor& parameter)> state_of = {};
  /// Not zero when the optimizer left the parameters alone (fused optimizers under a GradScaler).
  at::Tensor found_inf = {};
  /// Whether it trains a parameter. Empty function: nothing is known.
  std::function<bool(const at::Tensor& parameter)> holds = {};
  /// The same state by kind; nullopt when some of it is of no kind. Empty function: no state.
  std::function<std::optional<Moments>(const at::Tensor& parameter)> moments_of = {};
};

/// Gathers an int64 tensor on the CPU, of one size everywhere: that of every process, in one order.
/// It waits for all of them, and throws where it cannot.
using AllGather = std::function<std::vector<at::Tensor>(const at::Tensor& mine)>;

/// Changes the ranks of adapters between optimizer steps. An adapter has one allocator at a time.
/// Not thread-safe: one caller at a time.
class Allocator {
 public:
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;
  virtual ~Allocator() = default;

  /// What belongs after each step of the optimizer and before gradients are cleared.
  void step(const OptimizerView& optimizer = {});

  /// Calls back at the end of every step(), also of one that was skipped, and of freeze(): with
  /// this allocator, as the step left it, in the thread of the step, in the order of the calls
  /// here. An exception leaves the step taken.
  void on_step(std::function<void(const Allocator&)> callback);

  /// Makes it one of a group of processes that train the same adapters and so must decide alike,
  /// which all of them call; an empty function ends it. At the first step from now on or from
  /// load_state(), at every step that may change ranks or masks, and in freeze(), all compare where
  /// they stand and what they decided, and all throw c10::Error where it differs, naming the step,
  /// the first adapter and the processes, before anything is changed. A process that throws for
  /// another reason there ends the step of all others too. Nothing is gathered in other steps.
  void set_group(AllGather all_gather);

  virtual int64_t steps() const = 0;          ///< with finite gradients; the schedule's position
  virtual int64_t skipped_steps() const = 0;  ///< with gradients not finite
  virtual bool frozen() const = 0;            ///< whether the final directions are chosen
  virtual int64_t budget() const = 0;         ///< of now, in the schedule's unit
  /// Directions by adapter name, in the adapters' order.
  virtual std::vector<std::pair<std::string, int64_t>> ranks() const = 0;
  /// (out, in) of each adapter, in their order.
  std::vector<std::pair<int64_t, int64_t>> sizes() const;

  /// Everything a bit-exact resume needs besides modules and optimizer.
  virtual std::map<std::string, at::Tensor> state() const = 0;
  /// Takes a state() back, and with it the adapters' ranks. Throws std::invalid_argument, and
  /// changes nothing, for that of another allocator.
  virtual void load_state(const std::map<std::string, at::Tensor>& state, bool at_work = true) = 0;

  /// Its state() to and from an archive: torch::save(allocator, file) and
  /// torch::load(allocator, file), as for modules and optimizers. Loading throws as load_state, and
  /// c10::Error for an archive that holds no such allocator.
  friend torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                                     const Allocator& allocator);
  friend torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive,
                                                    Allocator& allocator);

  /// Runs step() after each of the optimizer's (rankwise/optim.h) until the handle is removed or
  /// the allocator is destroyed. Throws c10::Error when it is attached already: the schedule would
  /// run at double speed.
  template <class Optimizer>
  auto attach(Optimizer& optimizer);

  /// Lets go of the adapters, so that another allocator can be made over what is left of them.
  virtual void detach();
  /// Whether detach() was not called, and no other allocator took an adapter over.
  bool in_charge() const;

  /// Goes on with other tensors in the place of an adapter's factors; lora_E is undefined where
  /// the adapter has none. Throws std::invalid_argument, and changes nothing, unless they have the
  /// same shapes and are contiguous.
  void replace_factors(const std::string& adapter, const at::Tensor& lora_A,
                       const at::Tensor& lora_B, const at::Tensor& lora_E);

 protected:
  using Gradients = c10::List<std::optional<at::Tensor>>;

  virtual void take_step(const OptimizerView& optimizer) = 0;
  void call_back() const;

  /// What this process decided in a step.
  struct Decision {
    bool freezes = false;  // by freeze()
    int64_t steps = 0, skipped_steps = 0, budget = -1;
    // Digests, of each adapter alone what it is decided by, and then what came of all together;
    // empty where nothing was decided.
    std::vector<int64_t> scores = {}, choices = {};
  };
  virtual int64_t calls() const = 0;  // of step(), without waiting for a device
  virtual const BudgetSchedule& plan() const = 0;
  virtual std::map<std::string, at::Tensor> options_state() const = 0;
  /// Runs a step, or freeze(), of which the group hears also where it throws.
  void in_group(bool meets, const std::function<void()>& take);
  /// Whether the group has yet to compare its decisions in this step.
  bool meets() const { return meets_; }
  /// Throws c10::Error unless all processes of the group decided this.
  void agree(const Decision& mine);
  /// Runs a change that ends in agree(); where it throws, these tensors are as they were before.
  void unless_agreed(const std::vector<at::Tensor>& tensors, const std::function<void()>& change);
  void meet_anew() { met_before_ = false; }

  /// `owner`: the class, for messages; `entry`: its name in archives. Throws std::invalid_argument
  /// for no adapters, repeated names, wrong shapes, with or without lora_E other than `triplets`
  /// says, or factors that are not in memory.
  Allocator(std::string owner, std::string entry, std::vector<Adapter> adapters, bool triplets);

  /// Throws std::invalid_argument where an adapter has an allocator that has made steps; one that
  /// has made none gives way. `moves`: states must tell how directions lie from now on.
  void take_charge(bool moves);
  /// Throws c10::Error unless it is in charge and all layers are as this allocator left them.
  void check_adapters() const;
  void check_order(size_t adapter) const;
  /// Throws std::invalid_argument unless factors and gradients can be read.
  void check_all_memory() const;
  /// Warns, once, of factors that the optimizer does not hold.
  void warn_of_untrained(const OptimizerView& optimizer);
  /// The gradients of all factors, contiguous; nullopt where there is none, of which it warns once
  /// for each adapter. Throws c10::Error when there is none at all.
  Gradients gather(int64_t step);
  std::vector<int64_t> ranks_of_adapters() const;
  /// Those that are there.
  static std::vector<at::Tensor> present(const Gradients& gradients);

  const std::string owner_, entry_;
  std::vector<Adapter> adapters_;
  std::vector<at::Tensor> factors_;                            // A, B, E of each adapter
  std::vector<std::vector<int64_t>> initial_orders_, orders_;  // of adapters with `directions`
  std::shared_ptr<bool> stepped_ =
      std::make_shared<bool>(false);  // what Directions::allocator sees

 private:
  bool meets_now() const;
  void tell_failure() const;
  std::vector<int64_t> digests_of(const Decision& decision) const;
  std::string first_difference(const std::vector<int64_t>& own) const;

  std::set<std::string> warned_;
  bool looked_at_optimizer_ = false;
  std::weak_ptr<bool> attachment_;
  AllGather all_gather_;
  bool meets_ = false, met_before_ = false;
  int64_t agreed_skipped_ = 0;  // by the group, at its last meeting
  std::list<std::function<void(const Allocator&)>> callbacks_;
};

template <class Optimizer>
auto Allocator::attach(Optimizer& optimizer) {
  TORCH_CHECK(
      attachment_.expired(),
      "attach: the allocator is attached already, and twice its schedule would run at double "
      "speed; call remove() of the first handle before");
  const auto attachment = std::make_shared<bool>(true);  // lives as long as the callback
  attachment_ = attachment;
  return optimizer.add_callback(
      [this, attachment, alive = std::weak_ptr<bool>(stepped_)](const OptimizerView& view) {
        if (!alive.expired() && in_charge()) step(view);
      });
}

}  // namespace rankwise
