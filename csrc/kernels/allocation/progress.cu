// AdaLoRA's schedule and history on the device.
#include <cmath>

#include "../with_element_type.h"
#include "progress.h"
#include "progress_kernels.h"

namespace rankwise::kernels {
namespace {

constexpr int threads = 128, tile = 512;

__global__ void schedule_step(StepSchedule p) {
  bool left_out = false;
  if (p.found_inf) {
    with_element_type(p.type, [&](auto type) {
      using T = decltype(type);
      const auto value = static_cast<Wide<T>>(*static_cast<const T*>(p.found_inf));
      left_out = !(value == 0);
    });
  }
  *p.after = after_step(*p.before, p.found, left_out, p.budgets, p.count, p.freeze_step);
}

// Each adapter's kept directions into the row; whether any of this thread's differs from `last`.
__device__ inline bool count_kept(const ChoiceRecord& p, int64_t* row, const int64_t* last) {
  bool differs = false;
  for (int64_t m = threadIdx.x; m < p.adapters; m += threads) {
    int64_t kept = 0;
    for (int64_t i = p.offsets[m]; i < p.offsets[m + 1]; ++i) kept += p.kept[i];
    row[m] = kept;
    differs |= !last || last[m] != kept;
  }
  return differs;
}

// One block. The mean is summed in the order of directions, as on the CPU; each number by the first
// thread of a warp.
__global__ void record_choice(ChoiceRecord p) {
  __shared__ double scores[tile], shares[tile];
  __shared__ bool kept[tile], differs[threads];
  const Progress now = *p.progress;
  if (now.budget < 0) return;
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t width = 2 + p.adapters;
  int64_t* const row = p.choices + now.recorded * width;
  const int64_t* const last = now.recorded > 0 ? row - width : nullptr;
  differs[lane] = count_kept(p, row + 2, last ? last + 2 : nullptr);

  const int role = lane % 32 == 0 ? lane / 32 : -1;
  double number = role < 2 ? 0 : NAN;
  for (int64_t start = 0; start < p.triplets; start += tile) {
    const int count = static_cast<int>(p.triplets - start < tile ? p.triplets - start : tile);
    __syncthreads();
    for (int j = lane; j < count; j += threads) {
      scores[j] = p.scores[start + j];
      shares[j] = scores[j] / static_cast<double>(p.triplets);
      kept[j] = p.kept[start + j];
    }
    __syncthreads();
    for (int j = 0; role >= 0 && j < count; ++j) {
      if (role == 0) number += shares[j];
      if (role == 1 && number < scores[j]) number = scores[j];
      if (role == 2 && kept[j]) number = fmin(number, scores[j]);
      if (role == 3 && !kept[j]) number = fmax(number, scores[j]);
    }
  }
  if (role >= 0) p.summaries[4 * now.recorded + role] = number;
  __syncthreads();
  if (lane != 0) return;
  row[0] = now.steps;
  row[1] = now.budget;
  bool news = !last || last[1] != now.budget || now.steps == p.freeze_step;
  for (int i = 0; i < threads; ++i) news |= differs[i];
  if (news) ++p.progress->recorded;
}

}  // namespace

int launch_schedule_step(const StepSchedule& problem, void* stream) {
  return launch(schedule_step, 1, 1, 0, stream, problem);
}

int launch_record_choice(const ChoiceRecord& problem, void* stream) {
  return launch(record_choice, 1, threads, 0, stream, problem);
}

}  // namespace rankwise::kernels
