// What a SpectralAllocator finds of its adapters at an event.
#pragma once

#include <rankwise/spectral_allocator.h>

#include "gradient_sketch.h"
#include "spectrum.h"

namespace rankwise {

// On the CPU in float64, of the active directions alone.
struct SpectralAllocator::Found {
  at::Tensor A, B;    // [rank, in], [out, rank]
  at::Tensor gA, gB;  // undefined where a factor has no gradient
  at::Tensor unseen;  // the gradient of the probes' rows, likewise
  Spectrum spectrum;
  GradientSketch sketch;
  std::vector<double> gradients;      // |dL/ds| of scaling * B A; empty without gradients
  std::vector<Column> columns;        // of each direction, what its column knew, brought up to date
  std::vector<double> lengths;        // of each direction, that of its row of A
  std::vector<int64_t> direction_of;  // of each column
  std::vector<double> scores;         // of each direction
  std::vector<int64_t> order;         // directions, the young ones first, then by falling score
  int64_t young = 0;                  // how many of them are too young

  // Fills what the factors and their gradients tell, for a rank above 0.
  void look(double scaling);
};

}  // namespace rankwise
