// AdaLoRA's importance passes on the CPU: chunks of all tensors in one parallel loop. Sums have a
// fixed order, so that every number of threads gives the same bits.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../kernels/importance.h"
#include "cpu_blocks.h"
#include "importance.h"
#include "vector_clones.h"

namespace rankwise {
namespace {

constexpr int64_t chunk_elements = 8192;  // a few microseconds of work, 128 KiB of operands

struct Chunk {
  size_t tensor;
  int64_t start, size;
};

std::vector<Chunk> chunks_of(at::TensorList tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Split split(tensors[i].numel(), chunk_elements);
    for (int64_t j = 0; j < split.count(); ++j)
      chunks.push_back({i, split[j].start, split[j].size});
  }
  return chunks;
}

at::ScalarType average_dtype(at::ScalarType parameter) {
  return parameter == at::kDouble ? at::kDouble : at::kFloat;
}

// The averages' dtype: chunks of 16-bit tensors are widened, others are used where they lie.
template <class Stored, class T>
const T* widened(const at::Tensor& tensor, const Chunk& chunk, T* scratch) {
  const Stored* data = tensor.const_data_ptr<Stored>() + chunk.start;
  if constexpr (std::is_same_v<Stored, T>) {
    return data;
  } else {
    for (int64_t i = 0; i < chunk.size; ++i) scratch[i] = static_cast<T>(data[i]);
    return scratch;
  }
}

struct Found {
  bool not_finite, nonzero;
};

// 0 * (w g) is NaN where the product is not finite, so a sum tells it, in vectors.
template <class T>
[[gnu::always_inline]] inline Found inspect(const T* parameter, const T* gradient, int64_t size) {
  constexpr int64_t lanes = 64 / sizeof(T);
  T poison[lanes] = {}, largest[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      poison[lane] += parameter[i + lane] * gradient[i + lane] * T(0);
      const T magnitude = std::fabs(gradient[i + lane]);
      largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
    }
  }
  for (; i < size; ++i) {
    poison[0] += parameter[i] * gradient[i] * T(0);
    largest[0] = std::max(largest[0], std::fabs(gradient[i]));
  }
  Found found{false, false};
  for (int64_t lane = 0; lane < lanes; ++lane) {
    found.not_finite |= poison[lane] != 0;
    found.nonzero |= largest[lane] > 0;
  }
  return found;
}

template <class T>
[[gnu::always_inline]] inline void update(const T* parameter, const T* gradient, int64_t size,
                                          const kernels::Decay<T>& decay, T* sensitivity,
                                          T* uncertainty) {
  const kernels::Decay<T> local = decay;  // known not to overlap with what is written
  for (int64_t i = 0; i < size; ++i)
    kernels::update_importance(parameter[i], gradient[i], local, sensitivity[i], uncertainty[i]);
}

// Sum over a row of element scores, in eight fixed lanes.
template <class T>
[[gnu::always_inline]] inline double row_score(const T* sensitivity, const T* uncertainty,
                                               int64_t size) {
  constexpr int64_t lanes = 8;
  double sum[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane)
      sum[lane] += kernels::element_score(sensitivity[i + lane], uncertainty[i + lane]);
  for (; i < size; ++i) sum[i % lanes] += kernels::element_score(sensitivity[i], uncertainty[i]);
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// Sums over the columns of [rows, width] of element scores, for the first `cols` columns.
template <class T>
[[gnu::always_inline]] inline void column_scores(const T* sensitivity, const T* uncertainty,
                                                 int64_t rows, int64_t width, int64_t cols,
                                                 double* sums) {
  std::fill(sums, sums + cols, 0.0);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t i = 0; i < cols; ++i)
      sums[i] += kernels::element_score(sensitivity[j * width + i], uncertainty[j * width + i]);
}

// target_clones does not go with templates: the vector forms of the loops above for both types.
#define RANKWISE_VECTOR_LOOPS(T)                                                                 \
  RANKWISE_VECTOR_CLONES Found inspect_all(const T* p, const T* g, int64_t n) {                  \
    return inspect(p, g, n);                                                                     \
  }                                                                                              \
  RANKWISE_VECTOR_CLONES void update_all(const T* p, const T* g, int64_t n,                      \
                                         const kernels::Decay<T>& decay, T* s, T* u) {           \
    update(p, g, n, decay, s, u);                                                                \
  }                                                                                              \
  RANKWISE_VECTOR_CLONES double score_row(const T* s, const T* u, int64_t n) {                   \
    return row_score(s, u, n);                                                                   \
  }                                                                                              \
  RANKWISE_VECTOR_CLONES void score_columns(const T* s, const T* u, int64_t rows, int64_t width, \
                                            int64_t cols, double* sums) {                        \
    column_scores(s, u, rows, width, cols, sums);                                                \
  }
RANKWISE_VECTOR_LOOPS(float)
RANKWISE_VECTOR_LOOPS(double)
#undef RANKWISE_VECTOR_LOOPS

// Calls body(p, g, averages' type) for every chunk of every pair, in parallel.
template <class Body>
void for_each_chunk(at::TensorList parameters, at::TensorList gradients, const Body& body) {
  const std::vector<Chunk> chunks = chunks_of(parameters);
  run_blocks(static_cast<int64_t>(chunks.size()), [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const at::Tensor& parameter = parameters[chunk.tensor];
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, parameter.scalar_type(), "importance", [&] {
          using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
          T p[chunk_elements], g[chunk_elements];
          body(chunk, widened<scalar_t>(parameter, chunk, p),
               widened<scalar_t>(gradients[chunk.tensor], chunk, g));
        });
  });
}

void check_like(const char* what, const at::Tensor& tensor, const at::Tensor& parameter,
                at::ScalarType dtype) {
  TORCH_CHECK(tensor.sizes() == parameter.sizes() && tensor.scalar_type() == dtype &&
                  tensor.is_contiguous() && tensor.device() == parameter.device(),
              "importance: ", what, " must be contiguous ", parameter.sizes(), " of ", dtype,
              " on ", parameter.device(), ", got ", tensor.sizes(), " of ", tensor.scalar_type(),
              " on ", tensor.device());
}

void check_pairs(at::TensorList parameters, at::TensorList gradients) {
  TORCH_CHECK(parameters.size() == gradients.size(), "importance: there must be ",
              parameters.size(), " gradients, got ", gradients.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    TORCH_CHECK(parameters[i].is_contiguous(), "importance: parameters must be contiguous");
    check_like("a gradient", gradients[i], parameters[i], parameters[i].scalar_type());
  }
}

at::Tensor importance_check_cpu(at::TensorList parameters, at::TensorList gradients) {
  check_pairs(parameters, gradients);
  std::atomic<bool> not_finite = false, nonzero = false;
  for_each_chunk(parameters, gradients, [&](const Chunk& chunk, const auto* p, const auto* g) {
    const Found found = inspect_all(p, g, chunk.size);
    if (found.not_finite) not_finite = true;
    if (found.nonzero) nonzero = true;
  });
  const at::Tensor result = at::empty({2}, at::kBool);
  result.mutable_data_ptr<bool>()[0] = not_finite;
  result.mutable_data_ptr<bool>()[1] = nonzero;
  return result;
}

void importance_update_cpu_(at::TensorList parameters, at::TensorList gradients,
                            at::TensorList sensitivity, at::TensorList uncertainty, double beta1,
                            double beta2) {
  check_pairs(parameters, gradients);
  TORCH_CHECK(sensitivity.size() == parameters.size() && uncertainty.size() == parameters.size(),
              "importance: there must be ", parameters.size(), " averages of each kind, got ",
              sensitivity.size(), " and ", uncertainty.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::ScalarType dtype = average_dtype(parameters[i].scalar_type());
    check_like("sensitivity", sensitivity[i], parameters[i], dtype);
    check_like("uncertainty", uncertainty[i], parameters[i], dtype);
  }
  for_each_chunk(parameters, gradients, [&](const Chunk& chunk, const auto* p, const auto* g) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    update_all(p, g, chunk.size, kernels::Decay<T>(beta1, beta2),
               sensitivity[chunk.tensor].template mutable_data_ptr<T>() + chunk.start,
               uncertainty[chunk.tensor].template mutable_data_ptr<T>() + chunk.start);
  });
}

// Scores of one adapter's leading directions.
template <class T>
void score_adapter(at::TensorList s, at::TensorList u, int64_t rank, double* scores) {
  const int64_t in = s[0].size(1), out = s[1].size(0), capacity = s[0].size(0);
  const auto data = [](const at::Tensor& tensor) { return tensor.const_data_ptr<T>(); };
  score_columns(data(s[1]), data(u[1]), out, capacity, rank, scores);
  for (int64_t i = 0; i < rank; ++i) {
    const double row = score_row(data(s[0]) + i * in, data(u[0]) + i * in, in);
    const double own = kernels::element_score(data(s[2])[i], data(u[2])[i]);
    scores[i] = own + (row / static_cast<double>(in) + scores[i] / static_cast<double>(out));
  }
}

at::Tensor triplet_scores_cpu(at::TensorList sensitivity, at::TensorList uncertainty,
                              at::IntArrayRef ranks) {
  TORCH_CHECK(sensitivity.size() == 3 * ranks.size() && uncertainty.size() == sensitivity.size(),
              "triplet_scores: there must be 3 averages of each kind for each of ", ranks.size(),
              " adapters, got ", sensitivity.size(), " and ", uncertainty.size());
  std::vector<int64_t> offsets(ranks.size() + 1, 0);
  std::partial_sum(ranks.begin(), ranks.end(), offsets.begin() + 1);
  const at::Tensor scores = at::empty({offsets.back()}, at::kDouble);
  double* const data = scores.mutable_data_ptr<double>();
  run_blocks(static_cast<int64_t>(ranks.size()), [&](int64_t m) {
    const at::TensorList s = sensitivity.slice(3 * m, 3), u = uncertainty.slice(3 * m, 3);
    AT_DISPATCH_FLOATING_TYPES(s[0].scalar_type(), "triplet_scores",
                               [&] { score_adapter<scalar_t>(s, u, ranks[m], data + offsets[m]); });
  });
  return scores;
}

at::Tensor select_triplets_cpu(const at::Tensor& scores, at::IntArrayRef ranks,
                               at::IntArrayRef costs, int64_t budget, int64_t min_rank) {
  TORCH_CHECK(scores.scalar_type() == at::kDouble && scores.is_contiguous() && scores.dim() == 1,
              "select_triplets: scores must be a float64 vector");
  TORCH_CHECK(costs.size() == ranks.size(), "select_triplets: there must be ", ranks.size(),
              " costs, got ", costs.size());
  std::vector<size_t> adapter;
  for (size_t m = 0; m < ranks.size(); ++m) adapter.insert(adapter.end(), ranks[m], m);
  TORCH_CHECK(scores.numel() == static_cast<int64_t>(adapter.size()),
              "select_triplets: there must be ", adapter.size(), " scores, got ", scores.numel());
  const double* const score = scores.const_data_ptr<double>();
  std::vector<int64_t> order(adapter.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return score[a] != score[b] ? score[a] > score[b] : a < b;
  });

  const at::Tensor kept = at::zeros({scores.numel()}, at::kBool);
  bool* const keep = kept.mutable_data_ptr<bool>();
  std::vector<int64_t> count(ranks.size(), 0);
  const auto take = [&](int64_t i) {
    keep[i] = true;
    ++count[adapter[i]];
    budget -= costs[adapter[i]];
  };
  for (const int64_t i : order)
    if (count[adapter[i]] < min_rank) take(i);
  for (const int64_t i : order)
    if (!keep[i] && costs[adapter[i]] <= budget) take(i);
  return kept;
}

void mask_triplets_cpu_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept) {
  TORCH_CHECK(lora_E.size() == ranks.size(), "mask_triplets: there must be ", ranks.size(),
              " tensors, got ", lora_E.size());
  const bool* keep = kept.const_data_ptr<bool>();
  for (size_t m = 0; m < ranks.size(); keep += ranks[m], ++m) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, lora_E[m].scalar_type(),
                                    "mask_triplets", [&] {
                                      auto* const e = lora_E[m].mutable_data_ptr<scalar_t>();
                                      const int64_t stride = lora_E[m].stride(0);
                                      for (int64_t i = 0; i < ranks[m]; ++i)
                                        if (!keep[i]) e[i * stride] = scalar_t(0);
                                    });
    lora_E[m].unsafeGetTensorImpl()->bump_version();  // a graph that saved it will say so
  }
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_importance_check", &rankwise::importance_check_cpu);
  m.impl("_importance_update_", &rankwise::importance_update_cpu_);
  m.impl("_triplet_scores", &rankwise::triplet_scores_cpu);
  m.impl("_select_triplets", &rankwise::select_triplets_cpu);
  m.impl("_mask_triplets_", &rankwise::mask_triplets_cpu_);
}
