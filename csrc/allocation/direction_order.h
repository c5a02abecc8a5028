// Moving an adapter's kept directions to the front, in place, with all that belongs to them.
#pragma once

#include <rankwise/rank_allocator.h>

namespace rankwise {

// Whether all of the optimizer's state for these factors can follow their directions.
bool can_move(const Adapter& adapter, const OptimizerView& optimizer);

// Puts the factors' rows from one order of all directions (rankwise/directions.h) into another.
void order_directions(const Adapter& adapter, const std::vector<int64_t>& before,
                      const std::vector<int64_t>& after);

// Whether the factors are zero behind the leading `rank` directions.
bool zero_behind(const Adapter& adapter, int64_t rank);

// Puts the directions `kept` (int64, ascending) first and zeros behind them, up to the adapter's
// rank: in the factors, in their gradients and in the optimizer's state.
void keep_directions(const Adapter& adapter, const at::Tensor& kept,
                     const OptimizerView& optimizer);

}  // namespace rankwise
