// Directions: in which order an adapter's directions lie in its factors, and who moves them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace rankwise {

/// An adapter's directions have the numbers of the rows in which they were made. A RankAllocator
/// moves them, so that a model's state is restored only with their order: from then on that it has
/// an allocator it holds one more tensor. Shared by a layer and its allocator.
class Directions {
 public:
  /// `capacity` directions in their first order, of which `first_rank` are in use.
  Directions(int64_t capacity, int64_t first_rank);
  /// As those of a copy; throws as set_order.
  Directions(std::vector<int64_t> order, int64_t first_rank, uint64_t origin, bool movable);
  /// A copy is another adapter's: it has the order and the origin, and no allocator.
  Directions(const Directions& other)
      : movable(other.movable),
        origin_(other.origin_),
        first_rank_(other.first_rank_),
        order_(other.order_) {}
  Directions& operator=(const Directions&) = delete;

  int64_t capacity() const { return static_cast<int64_t>(order_.size()); }
  int64_t first_rank() const { return first_rank_; }
  /// Equal in copies of one adapter, and in no others.
  uint64_t origin() const { return origin_; }

  /// The direction in each row of lora_A, for all of the capacity.
  const std::vector<int64_t>& order() const { return order_; }
  /// Notes an order in which the rows were put. Throws std::invalid_argument unless each direction
  /// comes once.
  void set_order(std::vector<int64_t> order);

  /// Whether a state must say how they lie: they may have been moved, or fewer are in use.
  bool in_state(int64_t rank) const { return movable || rank != first_rank_; }
  /// What a state says of the order when the leading `rank` directions are in use: float [capacity]
  /// on the CPU, the direction in each row, -1 in the other rows. Numbers in floating point, so
  /// that an average of states with different orders shows in them.
  at::Tensor state(int64_t rank) const;
  /// The order and rank in a state(). Throws std::invalid_argument for a tensor that is none.
  std::pair<std::vector<int64_t>, int64_t> read(const at::Tensor& state) const;

  /// Whether they have had an allocator that moves them, or a state that says how they lie.
  bool movable = false;
  /// Of the allocator that moves them: whether it has made a step. Expired: there is none.
  std::weak_ptr<const bool> allocator;

 private:
  uint64_t origin_;
  int64_t first_rank_;
  std::vector<int64_t> order_;
};

}  // namespace rankwise
