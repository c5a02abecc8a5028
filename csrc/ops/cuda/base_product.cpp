// cuBLASLt with beta = 1, or with the bias in its epilogue: of both at once it makes two roundings.
// It works on column-major matrices, so a row-major out = left right is computed as
// out^T = right^T left^T.
#include "base_product.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>

#include <algorithm>
#include <functional>
#include <map>
#include <mutex>
#include <string_view>
#include <type_traits>
#include <unordered_map>

#include "../checks.h"
#include "adapter.h"
#include "shape_bucket.h"

namespace rankwise {
namespace {

constexpr size_t largest_workspace = size_t{32} << 20;
constexpr int64_t bias_alignment = 16;

void check_cublas(cublasStatus_t status, const char* call) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "lora_linear: ", call, " failed with ",
              cublasLtGetStatusName(status), " (", cublasLtGetStatusString(status), ")");
}

// Tensor is contiguous along rows or along columns of a [rows, cols] matrix.
struct Layout {
  bool row_major;
  int64_t stride;
};

Layout layout(const at::Tensor& matrix) {
  if (matrix.stride(1) == 1 || matrix.size(1) == 1) {
    return {true, std::max(matrix.stride(0), matrix.size(1))};
  }
  return {false, std::max(matrix.stride(1), matrix.size(0))};
}

bool has_layout(const at::Tensor& matrix) {
  const auto along = [&](int64_t unit, int64_t other) {
    return (matrix.size(unit) == 1 || matrix.stride(unit) == 1) &&
           (matrix.size(other) == 1 || matrix.stride(other) >= matrix.size(unit));
  };
  return along(1, 0) || along(0, 1);
}

// What a plan depends on.
struct Problem {
  int64_t device, m, n, k, dtype, out_stride, left_stride, right_stride;
  int64_t right_row_major, bias, tf32;
  int64_t out_alignment, left_alignment, right_alignment;

  bool operator==(const Problem&) const = default;
};

struct HashOfProblem {
  size_t operator()(const Problem& problem) const {
    static_assert(std::has_unique_object_representations_v<Problem>);
    const auto* bytes = reinterpret_cast<const char*>(&problem);
    return std::hash<std::string_view>()({bytes, sizeof(problem)});
  }
};

// The largest power of two up to 256 that divides the address.
int64_t alignment(const at::Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return static_cast<int64_t>(std::min<uintptr_t>(address & (~address + 1), 256));
}

Problem describe(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right,
                 bool bias) {
  const Layout right_layout = layout(right);
  const bool tf32 =
      out.scalar_type() == at::kFloat &&
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
          at::Float32Precision::TF32;
  return {out.get_device(),
          out.size(0),
          out.size(1),
          left.size(1),
          static_cast<int64_t>(out.scalar_type()),
          layout(out).stride,
          layout(left).stride,
          right_layout.stride,
          right_layout.row_major,
          bias,
          tf32,
          alignment(out),
          alignment(left),
          alignment(right)};
}

cudaDataType_t data_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return CUDA_R_16BF;
    case at::kHalf:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// Never destroyed: the driver may be gone when static objects are.
cublasLtHandle_t handle(int64_t device) {
  static std::mutex mutex;
  static std::map<int64_t, cublasLtHandle_t> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  cublasLtHandle_t& found = handles[device];
  if (!found) check_cublas(cublasLtCreate(&found), "cublasLtCreate");
  return found;
}

// Plain values, copied for each call.
struct Descriptors {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t right, left, out;

  explicit Descriptors(const Problem& problem);
};

struct Algorithm {
  cublasLtMatmulAlgo_t value;
  size_t workspace;
  bool found;
};

struct Plan {
  Descriptors descriptors;
  Algorithm algorithm;
};

template <typename T>
void set(cublasLtMatmulDescOpaque_t& operation, cublasLtMatmulDescAttributes_t attribute,
         const T& value) {
  check_cublas(cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof(value)),
               "cublasLtMatmulDescSetAttribute");
}

template <typename T>
void set(cublasLtMatmulPreferenceOpaque_t& preference,
         cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  check_cublas(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)),
               "cublasLtMatmulPreferenceSetAttribute");
}

Descriptors::Descriptors(const Problem& problem) {
  const cudaDataType_t type = data_type(static_cast<at::ScalarType>(problem.dtype));
  const auto compute = problem.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
  check_cublas(cublasLtMatmulDescInit(&operation, compute, CUDA_R_32F), "cublasLtMatmulDescInit");
  const cublasOperation_t transposed = problem.right_row_major ? CUBLAS_OP_N : CUBLAS_OP_T;
  set(operation, CUBLASLT_MATMUL_DESC_TRANSA, transposed);
  if (problem.bias) {
    set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    // Any aligned address: the one of each call takes its place.
    set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, reinterpret_cast<const void*>(256));
  }
  const auto matrix = [&](cublasLtMatrixLayoutOpaque_t& layout, int64_t rows, int64_t cols,
                          int64_t stride) {
    check_cublas(cublasLtMatrixLayoutInit(&layout, type, static_cast<uint64_t>(rows),
                                          static_cast<uint64_t>(cols), stride),
                 "cublasLtMatrixLayoutInit");
  };
  if (problem.right_row_major) {
    matrix(right, problem.n, problem.k, problem.right_stride);
  } else {
    matrix(right, problem.k, problem.n, problem.right_stride);
  }
  matrix(left, problem.k, problem.m, problem.left_stride);
  matrix(out, problem.n, problem.m, problem.out_stride);
}

// The heuristic's first answer.
Algorithm ask(const Problem& problem) {
  Descriptors of(problem);
  cublasLtMatmulPreferenceOpaque_t preference;
  check_cublas(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, largest_workspace);
  // The other schemes add partial sums in the output's type, or in an order that may change.
  set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  const auto out_alignment = static_cast<uint32_t>(problem.out_alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
      static_cast<uint32_t>(problem.right_alignment));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
      static_cast<uint32_t>(problem.left_alignment));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out_alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_alignment);
  cublasLtMatmulHeuristicResult_t result{};
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle(problem.device), &of.operation, &of.right, &of.left,
                                     &of.out, &of.out, &preference, 1, &result, &count);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) {
    check_cublas(status, "cublasLtMatmulAlgoGetHeuristic");
  }
  return {result.algo, result.workspaceSize, status == CUBLAS_STATUS_SUCCESS && count > 0};
}

// The algorithm with the workspace that this problem takes; not found where it does not serve it.
Algorithm checked(const Algorithm& algorithm, Descriptors of, int64_t device) {
  if (!algorithm.found) return algorithm;
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(handle(device), &of.operation, &of.right, &of.left, &of.out, &of.out,
                              &algorithm.value, &result);
  const bool serves = status == CUBLAS_STATUS_SUCCESS && result.state == CUBLAS_STATUS_SUCCESS &&
                      result.workspaceSize <= largest_workspace;
  return {algorithm.value, result.workspaceSize, serves};
}

template <typename Value>
class Cache {
 public:
  template <typename Make>
  const Value& get(const Problem& problem, const Make& make) {
    if (const auto known = values_.find(problem); known != values_.end()) return known->second;
    if (values_.size() >= kept) values_.clear();
    return values_.emplace(problem, make(problem)).first->second;
  }

 private:
  static constexpr size_t kept = 4096;
  std::unordered_map<Problem, Value, HashOfProblem> values_;
};

// The heuristic is asked once for a bucket, and about its largest problem, so that no earlier call
// changes a result's bits; about this very problem where the bucket's algorithm does not serve it.
Plan plan(const Problem& problem) {
  static std::mutex mutex;
  static Cache<Algorithm> algorithms;
  static Cache<Plan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  return plans.get(problem, [](const Problem& fresh) {
    const Descriptors descriptors(fresh);
    Problem largest = fresh;
    largest.m = largest_of_bucket(fresh.m);
    const Algorithm common = checked(algorithms.get(largest, ask), descriptors, fresh.device);
    return Plan{descriptors, common.found ? common : ask(fresh)};
  });
}

void multiply_aten(at::Tensor out, const at::Tensor& left, const at::Tensor& right,
                   const at::Tensor& bias, bool accumulate) {
  const double beta = accumulate || bias.defined() ? 1.0 : 0.0;
  at::addmm_out(out, bias.defined() ? bias : out, left, right, beta);
}

// out = left right + bias where there is a bias, or out += left right.
void multiply(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right_view,
              const at::Tensor& bias, bool accumulate) {
  const at::Tensor right = has_layout(right_view) ? right_view : right_view.contiguous();
  const Problem problem = describe(out, left, right, bias.defined());
  Plan found = plan(problem);
  auto& [of, algorithm] = found;
  if (!algorithm.found) return multiply_aten(out, left, right, bias, accumulate);
  if (bias.defined()) {
    set(of.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.const_data_ptr());
  }
  c10::DataPtr workspace = scratch(static_cast<int64_t>(algorithm.workspace));
  const float alpha = 1.0f, beta = accumulate ? 1.0f : 0.0f;
  void* result = out.mutable_data_ptr();
  check_cublas(cublasLtMatmul(handle(problem.device), &of.operation, &alpha, right.const_data_ptr(),
                              &of.right, left.const_data_ptr(), &of.left, &beta, result, &of.out,
                              result, &of.out, &algorithm.value, workspace.mutable_get(),
                              algorithm.workspace, c10::cuda::getCurrentCUDAStream().stream()),
               "cublasLtMatmul");
}

}  // namespace

void multiply_base(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right,
                   const std::optional<at::Tensor>& bias_view) {
  at::Tensor bias;
  if (has(bias_view)) {
    bias = bias_view->contiguous();
    if (alignment(bias) < bias_alignment) bias = bias.clone();
  }
  multiply(out, left, right, bias, /*accumulate=*/false);
}

void add_base(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  multiply(out, left, right, {}, /*accumulate=*/true);
}

}  // namespace rankwise
