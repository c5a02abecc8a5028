// The operators as C++ functions. All are differentiable where autograd applies and run under the
// dispatcher, so autocast, torch.compile and functorch treat them as they do PyTorch's own.
//
// Arguments are never written; results are fresh tensors. Any thread may call them; on CUDA the
// work goes to the current stream and nothing waits for it. All throw c10::Error naming the
// operator, the argument, what was wanted and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rankwise {

// A linear layer with a low-rank update (LoRA, arXiv 2106.09685; with lora_E AdaLoRA's triplets,
// arXiv 2303.10512):
//
//   y = x W0^T + bias + scaling * ((drop(x) A^T) * E^T) B^T
//
//   input   [..., in]         weight  W0 [out, in], any strides     bias   [out] or none
//   lora_A  [capacity, in]    lora_B  [out, capacity]               lora_E [capacity, 1] or none
//
// Only the leading `rank` directions take part (default: all of capacity); the others get zero
// gradients. dtypes: all tensors float64, float32, bfloat16 or float16; or lora_* float32 over a
// 16-bit base. The result has input's dtype and shape [..., out].
// input may be a nested tensor (strided layout) of components [..., in]; so is the result then.
// dropout_p applies to the adapter's input alone; the mask is a function of a seed drawn from
// PyTorch's default generator and of the element's index, for every device and thread count.
at::Tensor lora_linear(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                       const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E = {},
                       double scaling = 1.0, double dropout_p = 0.0,
                       std::optional<int64_t> rank = {});

// A low-rank update alone, for a base that computes itself (quantised, hooked, offloaded):
//
//   y = base_output + scaling * ((drop(x) A^T) * E^T) B^T
//
//   base_output [..., out]    input  x [..., in], of base_output's dtype and device
//   lora_*, rank, dtypes and dropout as in lora_linear
//
// The result has base_output's shape and dtype; base_output's gradient is the result's.
at::Tensor lora_update(const at::Tensor& base_output, const at::Tensor& input,
                       const at::Tensor& lora_A, const at::Tensor& lora_B,
                       const std::optional<at::Tensor>& lora_E = {}, double scaling = 1.0,
                       double dropout_p = 0.0, std::optional<int64_t> rank = {});

// An embedding with a low-rank update: y[i] = W0[i] + scaling * (A^T[i] * E^T) B^T.
//
//   indices any shape, int64 or int32    weight W0 [num, dim]
//   lora_A  [capacity, num]              lora_B [dim, capacity]     lora_E [capacity, 1] or none
//
// dtypes and nested indices as in lora_linear; the result is [..., dim] in weight's dtype. An index
// outside of the table is an error, on CUDA a failed assertion of the device. Row `padding_idx`
// (negative: none) of the table and of A^T gets no gradient. Autocast changes nothing, as for an
// embedding.
at::Tensor lora_embedding(const at::Tensor& indices, const at::Tensor& weight,
                          const at::Tensor& lora_A, const at::Tensor& lora_B,
                          const std::optional<at::Tensor>& lora_E = {}, double scaling = 1.0,
                          int64_t padding_idx = -1, std::optional<int64_t> rank = {});

// The merged weight round(W0 + scaling * B diag(E) A), summed in float64 and rounded once to
// W0's dtype, with W0's strides. Also returned, as 0-d tensors: the largest |rounded - exact|
// (float64; not finite if the sum is not) and the number of elements that differ from W0 (int64).
// Shapes and dtypes as in lora_linear. Not differentiable.
std::tuple<at::Tensor, at::Tensor, at::Tensor> merged_weight(
    const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
    const std::optional<at::Tensor>& lora_E = {}, double scaling = 1.0,
    std::optional<int64_t> rank = {});

// How far factors are from orthonormal rows (A) and columns (B), with D = A A^T - I or B^T B - I.
enum class OrthogonalityForm {
  squared_sum,  // sum over all factors of ||D||_F^2 (arXiv 2303.10512, equation 4)
  mean_norm,    // mean over all factors of ||D||_F (the paper's code and PEFT)
};

// The penalty over all adapters' factors, lora_A[m] [capacity, in] and lora_B[m] [out, capacity],
// as one differentiable scalar, over the leading ranks[m] directions of each (default: all).
// Float32, or float64 when the factors are; 16-bit factors are widened first.
at::Tensor orthogonality_penalty(at::TensorList lora_A, at::TensorList lora_B,
                                 OrthogonalityForm form = OrthogonalityForm::squared_sum,
                                 std::optional<std::vector<int64_t>> ranks = {});

}  // namespace rankwise
