// SpectralAllocator: how good each direction is.
#include <rankwise/spectral_allocator.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "spectral_directions.h"

namespace rankwise {

// Takes |dL/ds| into the averages that the directions' columns have.
void SpectralAllocator::smooth(std::vector<Found>& found) const {
  for (size_t m = 0; m < found.size(); ++m) {
    Found& own = found[m];
    own.columns.resize(columns_[m].size());
    for (size_t column = 0; column < columns_[m].size(); ++column) {
      const int64_t i = own.direction_of[column];
      Column known = columns_[m][column];
      if (!own.gradients.empty() && std::isfinite(own.gradients[i])) {
        known.sensitivity =
            options_.beta() * known.sensitivity + (1 - options_.beta()) * own.gradients[i];
        ++known.events;
      }
      own.columns[i] = known;
    }
  }
}

void SpectralAllocator::score(std::vector<Found>& found) const {
  std::vector<std::vector<double>> sizes(found.size()), sensitivities(found.size());
  double size_sum = 0, sensitivity_sum = 0;
  int64_t count = 0;
  for (size_t m = 0; m < found.size(); ++m) {
    for (size_t i = 0; i < found[m].columns.size(); ++i) {
      const Column& column = found[m].columns[i];
      const double grown = 1 - std::pow(options_.beta(), static_cast<double>(column.events));
      sizes[m].push_back(std::abs(adapters_[m].scaling) *
                         found[m].spectrum.S.const_data_ptr<double>()[i]);
      sensitivities[m].push_back(column.events > 0 ? column.sensitivity / grown : 0);
      size_sum += sizes[m].back();
      sensitivity_sum += sensitivities[m].back();
      ++count;
    }
  }
  const bool normalised = options_.score() == SpectralScore::normalised;
  const auto over = [&](double sum) {
    if (!normalised) return 1.0;
    return sum > 0 ? static_cast<double>(count) / sum : 0.0;
  };
  const double per_size = over(size_sum), per_sensitivity = over(sensitivity_sum);
  for (size_t m = 0; m < found.size(); ++m) {
    Found& own = found[m];
    const auto is_young = [&](int64_t i) {
      const int64_t birth = own.columns[i].birth;
      return birth > 0 && steps_ + 1 - birth < options_.min_age();
    };
    for (size_t i = 0; i < sizes[m].size(); ++i)
      own.scores.push_back(per_size * sizes[m][i] +
                           options_.sensitivity_weight() * per_sensitivity * sensitivities[m][i]);
    own.order.resize(own.scores.size());
    std::iota(own.order.begin(), own.order.end(), int64_t{0});
    std::ranges::stable_sort(own.order, [&](int64_t a, int64_t b) {
      if (is_young(a) != is_young(b)) return is_young(a);
      return own.scores[a] > own.scores[b];
    });
    own.young = std::ranges::count_if(own.order, is_young);
  }
}

}  // namespace rankwise
