// RankAllocator: AdaLoRA's importance, pruning and rank allocation between optimizer steps.
#pragma once

#include <rankwise/allocator.h>
#include <rankwise/budget_schedule.h>
#include <rankwise/ops.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace rankwise {

/// One choice of directions.
struct Allocation {
  int64_t step = 0;
  int64_t budget = 0;          ///< in the budget's unit
  std::vector<int64_t> ranks;  ///< kept directions, in the order of the adapters
  double mean_score = 0, largest_score = 0;
  double lowest_kept = 0, highest_pruned = 0;  ///< NaN where nothing is kept or pruned
};

/// Prunes adapters to a falling budget (AdaLoRA, arXiv 2303.10512, algorithm 1).
///
/// step() belongs after the optimizer's step and before the gradients are cleared: it averages
/// |w dL/dw| and its uncertainty, scores every triplet and, on the schedule's steps, sets lora_E of
/// all but the best to zero. A pruned direction keeps being trained and may return until
/// freeze_step. There the last choice is made and, with options.shrink, the kept directions move to
/// the front of the factors in place, with their gradients and the optimizer's state, and the ranks
/// are lowered: later steps compute and save only what is kept. Parameters keep their identity and
/// data pointers.
///
/// Until the pattern is frozen, a step whose gradients are infinite or NaN changes nothing but
/// skipped_steps(). Ties are decided by the order of adapters and directions; results do not depend
/// on the number of threads. Not thread-safe: one caller at a time.
///
/// step() throws c10::Error when no adapter has a gradient, std::invalid_argument when a factor or
/// a gradient is not in memory, before anything is changed; warns once of each adapter without one,
/// which keeps its scores, once when all gradients are zero (on CUDA some steps later), and in the
/// first step of factors that the optimizer does not hold. It throws c10::Error, too, when a state
/// with other ranks or another order of directions was loaded into a layer since, without the
/// allocator's own, or when another allocator took the adapters over.
///
/// In a group of processes (set_group) one that differs is an error of all, with averages, factors
/// and ranks as they were.
///
/// On CUDA the work goes to the current stream, which must be that of the optimizer's step, and a
/// step waits for nothing: whether gradients were finite, where the schedule stands, the choice and
/// the history stay on the device, and members that tell of them wait for it. One step of a
/// training waits, that of freeze_step, because ranks become numbers on the host there; where steps
/// were skipped immediately before it, each that might have been it. So does each step in which a
/// group compares. Adapters lie on one device.
class RankAllocator : public Allocator {
 public:
  /// Throws std::invalid_argument for wrong options, no adapters, repeated names, wrong shapes,
  /// factors that are not in memory (tensor_memory.h), or a target below what min_rank needs; also
  /// where an adapter has an allocator that has made steps (adapters with `directions`): it has one
  /// at a time. One that has made none gives way.
  RankAllocator(std::vector<Adapter> adapters, const AdaLoRAOptions& options);
  /// Over the AdaLoRA layers (rankwise/nn.h) of a tree of modules, by their dotted paths; their
  /// ranks follow, and they note the schedule, for save_adapter and adalora_options. Throws as
  /// above, also when there is none.
  RankAllocator(torch::nn::Module& model, const AdaLoRAOptions& options);

  /// Chooses the final directions now, as at freeze_step: for a training that ends early.
  void freeze(const OptimizerView& optimizer = {});

  /// The adapters' orthogonality_penalty (ops.h) over their active directions.
  at::Tensor orthogonality_penalty(OrthogonalityForm form = OrthogonalityForm::squared_sum) const;

  const AdaLoRAOptions& options() const { return options_; }
  const BudgetSchedule& schedule() const { return schedule_; }
  int64_t steps() const override;
  int64_t skipped_steps() const override;
  bool frozen() const override { return frozen_; }
  int64_t budget() const override;
  std::vector<std::pair<std::string, int64_t>> ranks() const override;
  /// Which of its initial directions each adapter keeps, bool [initial rank], on the CPU.
  std::vector<std::pair<std::string, at::Tensor>> pattern() const;
  /// The scores of all adapters' directions now, float64; undefined once frozen.
  at::Tensor scores();
  /// The allocations that changed the budget or a rank.
  std::vector<Allocation> history() const;

  /// Everything a bit-exact resume needs besides modules and optimizer.
  std::map<std::string, at::Tensor> state() const override;
  /// Puts the directions of the adapters in the state's order, and their ranks; the module's state
  /// may be loaded before or after. An allocator made over what an earlier schedule left takes a
  /// state of that schedule too, as it was before any pruning. Throws std::invalid_argument, and
  /// changes nothing, unless the state is of an allocator with the same options and adapters.
  /// `at_work`: the state's steps count as this allocator's own, so that it gives way to no other.
  void load_state(const std::map<std::string, at::Tensor>& state, bool at_work = true) override;

 private:
  void take_step(const OptimizerView& optimizer) override;
  int64_t calls() const override { return calls_; }
  const BudgetSchedule& plan() const override { return schedule_; }
  std::map<std::string, at::Tensor> options_state() const override;
  void freeze_now(const OptimizerView& optimizer);
  void meet(bool freezes, const at::Tensor& progress, const at::Tensor& scores,
            const at::Tensor& kept, const OptimizerView& optimizer);
  void warn_of_earlier_schedule() const;
  BudgetSchedule schedule_from(const std::vector<int64_t>& ranks) const;
  std::vector<int64_t> ranks_in(const std::map<std::string, at::Tensor>& state) const;
  void begin_with(const std::vector<int64_t>& first_ranks);
  void note_order(size_t adapter, const at::Tensor& kept);
  void arrange(size_t adapter, const at::Tensor& kept);
  Gradients none() const;
  at::Tensor take(const Gradients& gradients, bool score,
                  const std::optional<at::Tensor>& progress);
  void choose(bool freezes, const at::Tensor& scores, const at::Tensor& progress,
              const OptimizerView& optimizer);
  std::vector<at::Tensor> averages();
  void freeze_pattern(const OptimizerView& optimizer);
  void mask(const at::Tensor& progress);
  void shrink(const OptimizerView& optimizer);
  int64_t most_steps() const;
  void make_room(int64_t step);
  void set_progress(const at::Tensor& progress);
  void place();
  void warn_of_zeros();
  void allocate_averages();
  void fit_averages();

  std::vector<int64_t> initial_ranks_, costs_;
  AdaLoRAOptions options_;
  BudgetSchedule schedule_;
  std::vector<at::Tensor> sensitivity_, uncertainty_;  // of A, B, E of each adapter; until frozen
  // Where the adapters are: the kept of all initial directions, bool; where the schedule stands
  // (kernels/allocation/progress.h); the budgets of steps 0, 1, ..., negative where nothing is
  // chosen; and the history's rows (record_choice_ in ops/importance.h).
  at::Tensor kept_, progress_, budgets_, choices_, summaries_;
  at::Tensor heard_;   // on the CPU: progress_, or what has arrived of it
  int64_t calls_ = 0;  // steps, the skipped ones too
  bool frozen_ = false, shrunk_ = false, warned_of_zeros_ = false;
};

}  // namespace rankwise
