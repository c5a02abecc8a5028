// AdaLoRA's importance passes over all adapters at once on the device: launchers over tables of
// tensors, no torch. Formulas: importance.h.
//
// A table is filled on the host, laid out by lay_out() and copied to the device; tensors in it are
// contiguous and on the device. Sums have a fixed order that depends on shapes alone; no atomics.
// `stream` is a cudaStream_t, nothing waits for the device, and launchers return the first launch's
// error (cudaError_t) or 0. Tensors and tables may be empty.
#pragma once

#include <cstdint>

#include "../element_type.h"
#include "progress.h"

namespace rankwise::kernels {

struct GradientEntry {
  const void* data;
  int64_t count;
  ElementType type;
  int64_t first_block = 0;  // by lay_out()
};

// Returns the blocks that the table needs.
int64_t lay_out(GradientEntry* gradients, int64_t count);

// found[0] becomes true when anything is infinite or NaN, found[1] when anything is not zero; else
// they stay as they are.
int launch_importance_check(const GradientEntry* gradients, int64_t count, int64_t blocks,
                            bool* found, void* stream);

// A factor [rows, cols] whose directions are rows (A) or columns (B, and E as [1, capacity]).
// Averages are double for double parameters and float for all others.
struct FactorEntry {
  const void* parameter;
  const void* gradient;  // null: the averages stay as they are
  void* sensitivity;
  void* uncertainty;
  int64_t rows, cols;
  ElementType type;
  bool directions_are_rows;
  int64_t first_block = 0, first_partial = 0;  // by lay_out()
};

struct FactorBlocks {
  int64_t blocks, partials;
};
FactorBlocks lay_out(FactorEntry* factors, int64_t count);

struct ImportanceStep {
  const FactorEntry* factors;
  int64_t count, blocks;
  double beta1, beta2;
  const Progress* progress;  // null, or whether averages are updated and scores are needed
  double* partials;          // null, or where the parts of the scores go
};
int launch_importance_step(const ImportanceStep& problem, void* stream);

// Scores from the parts, for factors A, B, E of each adapter in turn. Those of adapter m lie from
// offsets[m] to offsets[m + 1], one for each of its leading directions. Not written where
// `progress` is not null and chooses nothing.
int launch_importance_scores(const FactorEntry* factors, const int64_t* offsets, int64_t adapters,
                             const Progress* progress, const double* partials, double* scores,
                             void* stream);

}  // namespace rankwise::kernels
