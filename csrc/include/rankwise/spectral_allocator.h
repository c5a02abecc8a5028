// SpectralAllocator: ranks that fall and rise, by the singular values of the updates.
#pragma once

#include <rankwise/allocator.h>
#include <rankwise/budget_schedule.h>
#include <rankwise/spectral_options.h>

namespace torch::nn {
class Module;
}

namespace rankwise {

/// One event. sum of rank times cost + bank = budget.
struct SpectralEvent {
  int64_t step = 0;
  int64_t budget = 0, bank = 0;     ///< in parameters
  std::vector<int64_t> ranks = {};  ///< afterwards, in the order of the adapters
  int64_t dropped = 0, added = 0;
  double change = 0;  ///< of the updates scaling * B A, in Frobenius norm: of what was dropped
  double lowest_kept = 0, highest_dropped = 0;  ///< scores; NaN where nothing is kept or dropped
};

/// Moves ranks between plain LoRA adapters at a conserved number of parameters.
///
/// At events it finds the singular directions of every update scaling * B A from its factors,
/// scores each by its singular value s and by the moving average of |dL/ds|, and lets a RankRule
/// say how many directions every adapter gets. Where an adapter loses some, its factors become
/// B = U diag(s / a), A = diag(a) V^T of those that are kept, a the lengths that rows of A had,
/// with gradients and the optimizer's state in the new basis, of averages of squares the part that
/// a diagonal can tell. New directions have zeros in B, so that no output changes, and orthonormal
/// rows of the usual length in A; their optimizer state begins at zero. An adapter whose rank does
/// not fall keeps the bits it has. Parameters keep their identity: ranks move within the capacity.
///
/// With probes() adapters compute some directions more from the step before an event to the event:
/// zeros in A, so that no output changes, and small Gaussian columns in B, so that the gradient of
/// A's zero rows is a sketch of dL/dW. Layers' ranks count them, ranks() does not; detach() takes
/// them out.
///
/// step() throws c10::Error when no adapter has a gradient, when a state with another rank was
/// loaded into a layer since, without the allocator's own, when another allocator took the adapters
/// over, and at an event, naming the adapter, where the optimizer's state cannot follow; and
/// std::invalid_argument when a factor or a gradient is not in memory, or for ranks of a rule that
/// cannot be. Nothing is changed then. It warns once of each adapter without a gradient, and of
/// factors that the optimizer does not hold.
///
/// In a group of processes (set_group) one that differs is an error of all.
///
/// A step whose gradients are infinite or NaN changes nothing but skipped_steps(). Results do not
/// depend on the number of threads. Events are computed in float64 on the CPU; on other devices
/// each step waits for the gradients' check.
class SpectralAllocator : public Allocator {
 public:
  /// Throws std::invalid_argument for wrong options, no adapters, repeated names, wrong shapes,
  /// factors that are not in memory, ranks above min(in, out), or a budget below what the first or
  /// the lowest ranks need; also where an adapter has an allocator that has made steps.
  SpectralAllocator(std::vector<Adapter> adapters, const SpectralOptions& options);
  /// Over the plain LoRA layers (rankwise/nn.h) of a tree of modules, by their dotted paths. Throws
  /// as above, also when there is none.
  SpectralAllocator(torch::nn::Module& model, const SpectralOptions& options);

  void detach() override;

  const SpectralOptions& options() const { return options_; }
  /// Without budget_at().
  const BudgetSchedule& schedule() const { return schedule_; }
  int64_t steps() const override { return steps_; }
  int64_t skipped_steps() const override { return skipped_steps_; }
  bool frozen() const override { return steps_ >= options_.freeze_step(); }
  int64_t budget() const override { return budget_; }  ///< of the last event; in parameters
  int64_t bank() const;                                ///< what the present ranks leave of it

  std::vector<std::pair<std::string, int64_t>> ranks() const override;
  /// Of all events.
  const std::vector<SpectralEvent>& history() const { return history_; }

  /// Everything a bit-exact resume needs besides modules and optimizer.
  std::map<std::string, at::Tensor> state() const override;
  /// Also sets the adapters' ranks; the module's state may be loaded before or after. Throws
  /// std::invalid_argument, and changes nothing, unless the state is of an allocator with the same
  /// options and adapters. `at_work`: see RankAllocator::load_state.
  void load_state(const std::map<std::string, at::Tensor>& state, bool at_work = true) override;

 private:
  // What is known of an adapter's columns, in their order.
  struct Column {
    double sensitivity = 0;  // the average h
    int64_t events = 0;      // that it was averaged over
    int64_t birth = 0;       // the step that made it
  };
  struct Found;  // an adapter's singular directions at an event
  // A new direction: where it is, and what it was before the optimizer's next step.
  struct Young {
    size_t adapter = 0;
    int64_t column = 0;
    at::Tensor A, B;  // [in], [out]
  };

  void take_step(const OptimizerView& optimizer) override;
  int64_t calls() const override { return steps_ + skipped_steps_; }
  const BudgetSchedule& plan() const override { return schedule_; }
  std::map<std::string, at::Tensor> options_state() const override;
  int64_t highest(size_t adapter) const;
  int64_t lowest(size_t adapter) const;
  int64_t budget_at(int64_t step) const;
  void check_budget(int64_t budget, int64_t step) const;
  double part_of(const Young& young) const;
  at::Tensor row_of(const Young& young) const;
  at::Tensor column_of(const Young& young) const;
  std::vector<at::Tensor> ramped() const;
  void ramp();
  void end_ramps();
  void meet(const std::vector<Found>& found, const std::vector<int64_t>& ranks, int64_t budget);
  void event(const Gradients& gradients, const OptimizerView& optimizer);
  std::vector<Found> find(const Gradients& gradients) const;
  void smooth(std::vector<Found>& found) const;
  void score(std::vector<Found>& found) const;
  std::vector<int64_t> ask(const std::vector<Found>& found, int64_t budget) const;
  void check_optimizer(const std::vector<int64_t>& ranks, const OptimizerView& optimizer) const;
  void insert_probes();
  void remove_probes(const OptimizerView& optimizer);
  void change(size_t adapter, const Found& found, int64_t rank, const OptimizerView& optimizer);
  void add(size_t adapter, const Found& found, int64_t count);

  SpectralOptions options_;
  BudgetSchedule schedule_;
  RankRule rule_;
  std::vector<int64_t> first_ranks_, costs_;
  std::vector<std::vector<Column>> columns_;
  // Of each adapter's directions by their number, the score when it was last dropped; NaN: never.
  std::vector<std::vector<double>> former_;
  std::vector<Young> young_;
  std::vector<SpectralEvent> history_;
  int64_t steps_ = 0, skipped_steps_ = 0, budget_;
};

}  // namespace rankwise
