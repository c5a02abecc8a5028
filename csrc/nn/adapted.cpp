// Adapted: settings, first values, merge and unmerge. Named adapters: named_adapters.cpp.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/adapted.h>
#include <rankwise/ops.h>
#include <rankwise/tensor_memory.h>
#include <torch/nn/init.h>

#include <cmath>
#include <memory>
#include <ostream>
#include <stdexcept>
#include <utility>

namespace rankwise::nn {
namespace {

void require(bool condition, const std::string& wanted, const std::string& got) {
  if (!condition) throw std::invalid_argument("adapter: " + wanted + ", got " + got);
}

std::string text_of(double value) {
  return c10::str(value);
}

}  // namespace

double AdapterSettings::scaling() const {
  if (rank == 0) return 0;
  const auto directions = static_cast<double>(rank);
  return alpha / (rslora ? std::sqrt(directions) : directions);
}

void AdapterSettings::check() const {
  require(rank >= 0, "rank must be at least 0", std::to_string(rank));
  require(std::isfinite(alpha), "alpha must be finite", text_of(alpha));
  require(dropout >= 0 && dropout <= 1, "dropout must be in [0, 1]", text_of(dropout));
  require(!capacity || *capacity >= rank,
          "capacity must be at least the rank " + std::to_string(rank),
          std::to_string(capacity.value_or(0)));
}

HeldAdapter Adapted::zero_adapter(AdapterSettings settings) const {
  settings.triplets = triplets_;
  settings.check();
  if (embedding() && settings.dropout != 0) {
    throw std::invalid_argument(
        "LoRAEmbedding: dropout must be 0, for indices cannot be dropped, got " +
        text_of(settings.dropout));
  }
  const at::Tensor shape = matrix(weight);
  const at::ScalarType base = weight.scalar_type();
  const bool narrow = base == at::kBFloat16 || base == at::kHalf;
  const at::ScalarType dtype = settings.adapter_dtype.value_or(narrow ? at::kFloat : base);
  require(dtype == base || (narrow && dtype == at::kFloat),
          c10::str("adapter_dtype must be ", base, " like the base's, or Float over a 16-bit base"),
          c10::str(dtype));
  const int64_t capacity = settings.capacity.value_or(settings.rank);
  const bool movable = triplets_ || capacity > settings.rank;  // by an allocator
  const auto factor = [&](int64_t rows, int64_t columns) {
    return at::zeros({rows, columns}, weight.options().dtype(dtype));
  };
  return {factor(capacity, shape.size(1)),
          factor(shape.size(0), capacity),
          triplets_ ? factor(capacity, 1) : at::Tensor(),
          settings,
          settings.rank,
          movable ? std::make_shared<Directions>(capacity, settings.rank) : nullptr};
}

void Adapted::adapt(AdapterSettings settings, bool triplets) {
  triplets_ = triplets;
  const HeldAdapter adapter = zero_adapter(std::move(settings));
  weight.requires_grad_(false);
  set_active("default", adapter);
}

HeldAdapter Adapted::new_adapter(AdapterSettings settings) const {
  const at::NoGradGuard no_grad;
  HeldAdapter adapter = zero_adapter(std::move(settings));
  draw(adapter);
  return adapter;
}

void Adapted::draw(const HeldAdapter& adapter) const {
  if (adapter.rank == 0) return;
  initialise(adapter.lora_A.narrow(0, 0, adapter.rank), adapter.lora_B.narrow(1, 0, adapter.rank),
             adapter.settings);
}

void Adapted::reset_adapter() {
  const at::NoGradGuard no_grad;
  for (const at::Tensor& factor : active().factors())
    if (factor.defined()) factor.zero_();
  draw(active());
}

void Adapted::initialise(const at::Tensor& A, const at::Tensor& B,
                         const AdapterSettings& settings) const {
  const double deviation = 1 / static_cast<double>(settings.rank);
  if (settings.triplets) {
    A.normal_(0, 0.02);
    B.normal_(0, 0.02);
    return;
  }
  switch (settings.init.value_or(LoRAInit::kaiming)) {
    case LoRAInit::kaiming:
      torch::nn::init::kaiming_uniform_(A, std::sqrt(5.0));
      break;
    case LoRAInit::gaussian:
      A.normal_(0, deviation);
      break;
    case LoRAInit::swapped:
      B.normal_(0, deviation);
      break;
  }
}

std::optional<MergeReport> Adapted::merge() {
  if (merged()) {
    TORCH_WARN("merge: the layer is merged already; nothing was done");
    return std::nullopt;
  }
  TORCH_CHECK(adapter_, "merge: no adapter is active");
  const at::NoGradGuard no_grad;
  std::optional<at::Tensor> E;
  if (lora_E.defined()) E = lora_E;
  for (const at::Tensor& tensor : {weight, lora_A, lora_B, E.value_or(lora_A)}) {
    const std::string kind = kind_without_memory(tensor);
    TORCH_CHECK(kind.empty(), "merge: the weight and the factors must be dense, with data, got ",
                kind, "; nothing was changed");
  }
  const auto [sum, error, changed] =
      merged_weight(matrix(weight), lora_A, lora_B, E, scaling(), rank_);
  const MergeReport report{error.item<double>(), changed.item<int64_t>(), sum.numel()};
  TORCH_CHECK(std::isfinite(report.max_rounding_error),
              "merge: the merged weight would not be finite; nothing was changed");
  base_ = std::exchange(weight, matrix(sum));
  replace_tensors();
  return report;
}

void Adapted::unmerge() {
  if (!merged()) {
    TORCH_WARN("unmerge: the layer is not merged; nothing was done");
    return;
  }
  weight = std::exchange(base_, {});
  replace_tensors();
}

void Adapted::check_trainable(bool training) const {
  TORCH_CHECK(!merged() || !training || !at::GradMode::is_enabled() || !lora_A.requires_grad(),
              "forward: a merged layer would train nothing; call unmerge() before training, or "
              "eval() or a NoGradGuard for inference");
}

void Adapted::check_unmerged(const char* operation) const {
  TORCH_CHECK(!merged(), operation, ": the layer is merged; call unmerge() first");
}

void Adapted::print_adapter(std::ostream& stream) const {
  if (!adapter_) {
    stream << "no active adapter";
    return;
  }
  stream << "rank=" << rank_ << ", alpha=" << settings_.alpha << ", dropout=" << settings_.dropout
         << ", adapter=" << *adapter_ << (merged() ? ", merged" : "");
}

}  // namespace rankwise::nn
