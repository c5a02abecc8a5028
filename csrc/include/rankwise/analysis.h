// What adapters are, seen through their factors: spectra, subspaces, distances, combinations.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/adapter_fold.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

/// dW = scaling * lora_B diag(lora_E) lora_A, [out, in], is seen by way of QRs of its factors and
/// an SVD of [rank, rank]; it is formed only where that is said. Tensors may have any floating
/// dtype and device; results are float64 on the CPU, and the same bits for every number of threads.
/// All throw std::invalid_argument (function, argument, wanted, got), also for factors that are
/// infinite or NaN.
namespace rankwise::analysis {

/// dW = U diag(S) V^T, k = min(rank, in, out).
struct DeltaSpectrum {
  at::Tensor U;  ///< [out, k], orthonormal columns
  at::Tensor S;  ///< [k], falling
  at::Tensor V;  ///< [in, k]
};
DeltaSpectrum delta_spectrum(const AdapterUpdate& update);

/// Whose singular directions: of the update in the input's space (V) or the output's (U), or of one
/// factor alone (the right ones of lora_A, the left ones of lora_B).
enum class Subspace { input, output, lora_A, lora_B };

/// phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j) in [0, 1] for the first i and j directions, at
/// [i - 1, j - 1] (LoRA, arXiv 2106.09685, section 7.2). [k1, k2]: directions with singular values
/// below 1e-12 of the largest are rounding and are left out, so that of a zero update none are
/// left. Within equal singular values directions, and so phi, depend on the basis.
at::Tensor subspace_similarity(const AdapterUpdate& first, const AdapterUpdate& second,
                               Subspace of = Subspace::input);

/// How many directions matter in a spectrum; all 0 for one of zeros.
struct EffectiveRanks {
  double entropy = 0;  ///< exp(-sum p log p), p = s / sum s (Roy and Vetterli, EUSIPCO 2007)
  double stable = 0;   ///< sum s^2 / max s^2
  /// The fewest directions with 90, 95, 99 % of sum s^2.
  int64_t energy_90 = 0, energy_95 = 0, energy_99 = 0;
};
/// `singular_values` [k], not negative, in any order.
EffectiveRanks effective_ranks(const at::Tensor& singular_values);

/// How much of a weight lies along an update (LoRA, arXiv 2106.09685, section 7.3).
struct Amplification {
  double factor = 0;        ///< update_norm / along_update; 0 for a zero update
  double update_norm = 0;   ///< ||dW||_F
  double weight_norm = 0;   ///< ||W||_F
  double along_update = 0;  ///< ||U^T W V||_F, U and V the first directions of dW
  double along_weight = 0;  ///< the same of W's own: the norm of its first singular values; or NaN
  double along_random = 0;  ///< the same of random orthonormal ones
  int64_t rank = 0;         ///< how many directions
};
/// `weight` [out, in]. `rank` directions, all of dW's where there are fewer. W's own take the
/// eigenvalues of W W^T or W^T W, the smaller, dense, and so by far the longest; without `own`
/// along_weight is NaN.
Amplification amplification_factor(const at::Tensor& weight, const AdapterUpdate& update,
                                   std::optional<int64_t> rank = {}, uint64_t seed = 0,
                                   bool own = true);

/// New directions among the first ones of W + dW (Shuttleworth et al., arXiv 2410.21228).
struct IntruderDirections {
  at::Tensor cosines;            ///< [count]: the largest |u^T w| with W's left singular vectors w
  at::Tensor singular_values;    ///< [count], of W + dW
  std::vector<int64_t> indices;  ///< those whose cosine is below the threshold
};
/// Of the first `count` left singular vectors. Takes the dense SVDs of W and W + dW in float64:
/// minutes for [4096, 4096].
IntruderDirections intruder_directions(const at::Tensor& weight, const AdapterUpdate& update,
                                       double threshold = 0.5, int64_t count = 10);

/// An update and how far it is from the one that was asked for, in Frobenius norm.
struct Approximation {
  AdapterUpdate update;  ///< lora_A = diag(sqrt S) V^T, lora_B = U diag(sqrt S), scaling 1
  double error = 0;
  double relative_error = 0;  ///< of the exact update's norm; 0 where that is 0
};
/// The best update of this rank at most; its error is the norm of the singular values dropped.
Approximation truncate(const AdapterUpdate& update, int64_t rank);

/// Of the names and definitions of PEFT's add_weighted_adapter, on updates, never on factors.
enum class Combination {
  linear,       ///< sum w_i dW_i, exact (PEFT's "svd" and "cat"; its "linear" has cross terms)
  ties,         ///< arXiv 2306.01708: trimmed by magnitude, a sign elected, means of those of it
  dare_linear,  ///< arXiv 2311.03099: elements dropped at random, others / density, then linear
  dare_ties,    ///< the same, then a sign elected and means of those of it
  magnitude_prune,  ///< trimmed by magnitude, then linear
};
struct CombineOptions {
  Combination method = Combination::linear;
  /// Of the result at most; none: every direction, of linear combinations alone.
  std::optional<int64_t> rank = {};
  double density = 0.5;        ///< the part of the elements that are kept, in (0, 1]; not linear's
  bool sign_by_count = false;  ///< ties: signs are counted ("frequency"), not summed ("total")
  uint64_t seed = 0;           ///< dare: of the elements dropped
};
/// All but linear form dense updates, one at a time beside two or three sums, and take an SVD of
/// their combination. Updates of rank 0 take part as zeros.
Approximation combine(const std::vector<AdapterUpdate>& updates, const std::vector<double>& weights,
                      const CombineOptions& options = {});

/// The same for whole adapters, module by module: those that lack a module add nothing there. The
/// result is fold_adapter's of the first one's configuration, in the widest of the factors' dtypes.
/// Tensors that are not factors must be equal in all that have them.
AdapterFile combine(const std::vector<AdapterFile>& adapters, const std::vector<double>& weights,
                    const CombineOptions& options = {});

/// How far two updates lie apart.
struct Distance {
  double absolute = 0;  ///< ||dW1 - dW2||_F
  double relative = 0;  ///< of the larger of both norms, 0 to 2; 0 where both are 0
};
Distance distance(const AdapterUpdate& first, const AdapterUpdate& second);

/// Of one module of two adapters, or of a tensor that is no factor, `module.parameter`.
struct ModuleDistance {
  std::string module;
  Distance distance;
};
/// Of all modules of both, sorted. One that lacks a module adds nothing there. Infinite: shapes
/// differ, or a tensor that is no factor is in one alone, for then the base's, which is not known,
/// counts in the other.
std::vector<ModuleDistance> distances(const AdapterFile& first, const AdapterFile& second);

/// Whether every relative distance is at most `tolerance`: the adapters compute the same function
/// over every base.
bool same_function(const AdapterFile& first, const AdapterFile& second, double tolerance = 1e-6);

}  // namespace rankwise::analysis
