// Advice on ranks: of each matrix, from evidence, within a budget of parameters.
#pragma once

#include <rankwise/allocator.h>
#include <rankwise/analysis.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

/// A rank of an [out, in] matrix costs out + in parameters. All throw std::invalid_argument
/// (function, argument, wanted, got).
namespace rankwise::analysis {

/// What each rank of a matrix costs, and between which ranks it may be given some.
struct RankRoom {
  int64_t cost = 0, lowest = 0, highest = 0;
};

/// Ranks as the matrices' scores are, by the largest remainder.
///
/// The exact ranks are level * score within their rooms, at the level at which they cost the
/// budget. Rounded down, they leave some of it; in the order of what rounding took, largest first,
/// ties (in float) by order, each gets one more where that fits. So no rank is a whole one away
/// from exact. The lowest ranks must not cost more than the budget. Scores are finite, at least 0.
std::vector<int64_t> in_proportion(const std::vector<double>& scores,
                                   const std::vector<RankRoom>& rooms, int64_t budget);

/// How many of each matrix's directions are among the best for what they cost: the lowest ranks
/// first, then all directions in one order, by their score for each parameter, ties by order; each
/// is taken where it fits. Where all cost the same, no other choice within the budget has a larger
/// sum of scores. Scores of a matrix's first, second, ... direction, falling.
std::vector<int64_t> best_directions(const std::vector<std::vector<double>>& scores,
                                     const std::vector<RankRoom>& rooms, int64_t budget);

/// What speaks for a matrix's rank.
struct MatrixEvidence {
  std::string module;
  int64_t out = 0, in = 0;
  /// Finite, at least 0: the matrix's one, or those of its first, second, ... direction, falling.
  std::vector<double> scores;
};
struct RankEvidence {
  std::vector<MatrixEvidence> matrices;
  bool of_directions = false;  ///< else ranks are in proportion to the matrices' scores
};

/// What the subspaces of two updates of one matrix share.
struct Agreement {
  /// How many, of each on average, lie within the other's subspace by three standard deviations
  /// more than random ones do, of which one in about a hundred does.
  double directions = 0;
  double overlap = 0;  ///< ||U1^T U2||_F^2, 0 to the smaller rank
  double chance = 0;   ///< what random subspaces of these ranks, r1 and r2, have: r1 r2 / n
};
/// A direction's part in the other's subspace, of r directions among n, is r / n on average for a
/// random one, with the variance 2 r (n - r) / (n^2 (n + 2)). Where r is nearly n, every direction
/// is within, and nothing can be told: 0.
Agreement agreement(const AdapterUpdate& first, const AdapterUpdate& second,
                    Subspace of = Subspace::input);

/// How many directions two trainings of one model from different seeds agree on, matrix by matrix.
/// Both must adapt the same modules.
RankEvidence seed_agreement(const AdapterFile& first, const AdapterFile& second,
                            Subspace of = Subspace::input);

/// The squared singular values of a trained adapter's updates: ranks by them lose least of
/// sum ||dW||_F^2 of all truncations together.
RankEvidence update_energies(const AdapterFile& adapter);

/// The ranks that a RankAllocator or a SpectralAllocator gave, on average over its last `events`;
/// fewer where there were fewer, and the present ranks where there were none.
RankEvidence allocated_ranks(const Allocator& allocator, int64_t events = 1);

/// The mean square of dL/dW [out, in] of each module, over its elements and over batches: before
/// training, the empirical Fisher diagonal's mean, but of batches in the place of single examples.
/// One map {module: gradient} a batch, each of the same modules; of any floating dtype and device.
RankEvidence squared_gradients(const std::vector<std::map<std::string, at::Tensor>>& batches);

/// What a matrix of `out` rows was given: inputs [rows, in], of all batches.
struct MatrixInputs {
  std::string module;
  int64_t out = 0;
  at::Tensor inputs;
};
/// The shares of its inputs' variance along each matrix's principal directions, as in EVA (arXiv
/// 2410.07170), of `most` at most, of which there must be no more than rows. Takes an eigenvalue
/// problem of [in, in] each.
RankEvidence input_variances(const std::vector<MatrixInputs>& matrices, int64_t most = 64);

struct AdviceOptions {
  std::optional<int64_t> budget = {};    ///< in parameters
  std::optional<double> mean_rank = {};  ///< in its place: what all cost at this rank; > 0
  int64_t min_rank = 1;  ///< that every matrix gets, as far as its smaller side has directions
  /// None: a matrix's smaller side, or the directions with a score.
  std::optional<int64_t> max_rank = {};
};
struct RankAdvice {
  std::vector<std::pair<std::string, int64_t>> ranks;  ///< by module, in the evidence's order
  int64_t budget = 0;                                  ///< what was asked for
  /// What the ranks cost, never above the budget. The rest is less than a rank that would have been
  /// next, or what no matrix can have.
  int64_t spent = 0;
};
/// The ranks that the evidence speaks for, within the budget: in_proportion, or best_directions.
RankAdvice rank_advice(const RankEvidence& evidence, const AdviceOptions& options);

}  // namespace rankwise::analysis
