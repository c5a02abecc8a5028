// AdaLoRA's importance passes on the CPU: pieces of all tensors in one parallel loop. The pieces
// depend on shapes alone, so every number of threads gives the same bits.
#include "../importance.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "../importance_checks.h"
#include "blocks.h"
#include "importance_loops.h"

namespace rankwise {
namespace {

constexpr int64_t piece_elements = 8192;  // operands and averages stay in a core's cache

// A factor's operands as addresses, looked up once: the tensors themselves lie all over the memory,
// and a step that moves much of it would find them in no cache.
struct Operands {
  at::ScalarType dtype;
  int64_t width;
  const void *parameter, *gradient;  // no gradient: null
  void *sensitivity, *uncertainty;
};

// Rows of a factor, and where their part of the scores goes: a number for each row of A and E, the
// column sums of B.
struct Piece {
  size_t factor;
  Range rows;
  int64_t partial;
};

bool is_B(size_t factor) {
  return factor % 3 == 1;
}

// Elements in the averages' type: 16-bit ones are widened, others are used where they lie.
template <class Stored, class T>
const T* widened(const Stored* data, int64_t size, T* scratch) {
  if constexpr (std::is_same_v<Stored, T>) {
    return data;
  } else {
    for (int64_t i = 0; i < size; ++i) scratch[i] = static_cast<T>(data[i]);
    return scratch;
  }
}

at::Tensor importance_check_cpu(at::TensorList gradients) {
  check_importance_gradients(gradients);
  struct Part {
    at::ScalarType dtype;
    const void* gradient;
    Range range;
  };
  std::vector<Part> parts;
  parts.reserve(2 * gradients.size());
  for (const at::Tensor& gradient : gradients) {
    const Split split(gradient.numel(), piece_elements);
    const void* const data = gradient.const_data_ptr();
    for (int64_t j = 0; j < split.count(); ++j)
      parts.push_back({gradient.scalar_type(), data, split[j]});
  }
  std::atomic<bool> not_finite = false, nonzero = false;
  run_blocks(static_cast<int64_t>(parts.size()), [&](int64_t i) {
    const Part& part = parts[i];
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, part.dtype, "importance", [&] {
      using T = at::opmath_type<scalar_t>;
      T scratch[piece_elements];
      const scalar_t* data = static_cast<const scalar_t*>(part.gradient) + part.range.start;
      const Found found = inspect_all(widened(data, part.range.size, scratch), part.range.size);
      if (found.not_finite) not_finite = true;
      if (found.nonzero) nonzero = true;
    });
  });
  const at::Tensor result = at::empty({2}, at::kBool);
  result.mutable_data_ptr<bool>()[0] = not_finite;
  result.mutable_data_ptr<bool>()[1] = nonzero;
  return result;
}

// All pieces of all factors; `partials` becomes the size of their parts of the scores.
std::vector<Piece> pieces_of(at::TensorList averages, int64_t& partials) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < averages.size(); ++i) {
    const int64_t rows = averages[i].size(0), width = averages[i].size(1);
    const int64_t step = piece_elements / std::max<int64_t>(width, 1);
    const Split split(rows, std::max<int64_t>(step, 1));
    for (int64_t j = 0; j < split.count(); ++j) {
      pieces.push_back({i, split[j], partials});
      partials += is_B(i) ? width : split[j].size;
    }
  }
  return pieces;
}

template <class Stored, class T>
void update_piece(const Stored* parameter, const Stored* gradient, int64_t size,
                  const kernels::Decay<T>& decay, T* sensitivity, T* uncertainty) {
  T p[piece_elements], g[piece_elements];
  const Split split(size, piece_elements);
  for (int64_t i = 0; i < split.count(); ++i) {
    const auto [start, count] = split[i];
    update_all(widened(parameter + start, count, p), widened(gradient + start, count, g), count,
               decay, sensitivity + start, uncertainty + start);
  }
}

template <class T>
void score_piece(bool by_rows, const T* sensitivity, const T* uncertainty, int64_t rows,
                 int64_t width, double* partial) {
  if (by_rows) {
    for (int64_t i = 0; i < rows; ++i)
      partial[i] = score_row(sensitivity + i * width, uncertainty + i * width, width);
  } else {
    std::vector<double> sums(row_group * width);
    score_columns(sensitivity, uncertainty, rows, width, sums.data());
    std::copy_n(sums.begin(), width, partial);
  }
}

// Adds up the pieces' parts, in their order.
at::Tensor combine(const std::vector<Piece>& pieces, const std::vector<double>& partials,
                   at::TensorList averages, at::IntArrayRef ranks) {
  std::vector<int64_t> offsets(ranks.size() + 1, 0);
  std::partial_sum(ranks.begin(), ranks.end(), offsets.begin() + 1);
  const at::Tensor scores = at::zeros({offsets.back()}, at::kDouble);
  double* const data = scores.mutable_data_ptr<double>();
  for (const Piece& piece : pieces) {
    const size_t m = piece.factor / 3;
    const at::Tensor& average = averages[piece.factor];
    const auto mean_over = static_cast<double>(average.size(is_B(piece.factor) ? 0 : 1));
    const int64_t first = is_B(piece.factor) ? 0 : piece.rows.start;
    const int64_t count = is_B(piece.factor) ? average.size(1) : piece.rows.size;
    for (int64_t i = 0; i < std::min(count, ranks[m] - first); ++i)
      data[offsets[m] + first + i] += partials[piece.partial + i] / mean_over;
  }
  return scores;
}

at::Tensor importance_step_cpu_(at::TensorList parameters,
                                const c10::List<std::optional<at::Tensor>>& gradients,
                                at::TensorList sensitivity, at::TensorList uncertainty,
                                at::IntArrayRef ranks, double beta1, double beta2, bool score,
                                const std::optional<at::Tensor>& progress) {
  const std::vector<at::Tensor> gradient =
      check_importance_step(parameters, gradients, sensitivity, uncertainty, ranks);
  bool update = true;
  if (progress) {
    check_progress("importance", *progress);
    const kernels::Progress now = progress_of(*progress);
    update = now.updates;
    score = score && now.budget >= 0;
  }
  const int64_t directions = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
  if (!update && !score) return at::empty({directions}, at::kDouble);
  std::vector<Operands> operands;
  operands.reserve(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    operands.push_back({parameters[i].scalar_type(), parameters[i].size(1),
                        parameters[i].const_data_ptr(),
                        update && gradient[i].defined() ? gradient[i].const_data_ptr() : nullptr,
                        sensitivity[i].mutable_data_ptr(), uncertainty[i].mutable_data_ptr()});
  }
  int64_t size = 0;
  const std::vector<Piece> pieces = pieces_of(sensitivity, size);
  std::vector<double> partials(score ? size : 0);
  run_blocks(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[i];
    const Operands& of = operands[piece.factor];
    const int64_t start = piece.rows.start * of.width;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, of.dtype, "importance", [&] {
      using T = at::opmath_type<scalar_t>;
      T* const sensitivity_at = static_cast<T*>(of.sensitivity) + start;
      T* const uncertainty_at = static_cast<T*>(of.uncertainty) + start;
      if (of.gradient != nullptr) {
        update_piece(static_cast<const scalar_t*>(of.parameter) + start,
                     static_cast<const scalar_t*>(of.gradient) + start, piece.rows.size * of.width,
                     kernels::Decay<T>(beta1, beta2), sensitivity_at, uncertainty_at);
      }
      if (score) {
        score_piece(!is_B(piece.factor), sensitivity_at, uncertainty_at, piece.rows.size, of.width,
                    partials.data() + piece.partial);
      }
    });
  });
  return score ? combine(pieces, partials, sensitivity, ranks)
               : at::empty({directions}, at::kDouble);
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_importance_check", &rankwise::importance_check_cpu);
  m.impl("_importance_step_", &rankwise::importance_step_cpu_);
}
