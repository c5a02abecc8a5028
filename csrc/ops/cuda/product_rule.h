// Which product serves a layer on a device: a function of the layer's sizes, never of a timing.
#pragma once

#include <cstdint>

namespace rankwise {

struct ProductDevice {
  int major, minor, multiprocessors;
};

// out [rows, cols] = left [rows, depth] right, and a term of `rank` directions.
struct ProductSizes {
  int64_t rows, cols, depth, rank;
};

// Whether the LoRA term joins the product's own sums (kernels/hopper), instead of being written
// for cuBLASLt to add to, or added to what it wrote. Factors of float32 over bfloat16 have three
// times as many directions there.
//
// Measured on an H100, ranks 16 and 64, against cuBLASLt without any term: 0.95-1.03 at 8192 x 4096
// x 4096, 8192 x 8192 x 8192 and 8192 x 14336 x 4096, 1.00-1.02 at 2048 x 4096 x 4096, 1.05-1.08 at
// 8192 x 1024 x 1024; the term beside cuBLASLt costs 1.07 and more. All of these have 256 tiles or
// more, which fill the multiprocessors' last round too. What has less stays with cuBLASLt, which
// has smaller tiles.
constexpr bool sums_take_the_term(const ProductDevice& device, const ProductSizes& sizes) {
  constexpr int64_t tile_rows = 128, tile_cols = 256, fewest_tiles = 256, shortest = 1024;
  constexpr int64_t longest = int64_t{1} << 24, most_directions = 256;
  const bool large = sizes.rows > 0 && sizes.rows <= longest && sizes.cols >= shortest &&
                     sizes.cols <= longest && sizes.depth >= shortest && sizes.depth <= longest;
  if (device.major != 9 || device.minor != 0 || !large) return false;
  if (sizes.rank < 1 || sizes.rank > most_directions) return false;
  if (sizes.cols % 8 != 0 || sizes.depth % 8 != 0) return false;
  const int64_t tiles =
      ((sizes.rows + tile_rows - 1) / tile_rows) * ((sizes.cols + tile_cols - 1) / tile_cols);
  const int64_t rounds = (tiles + device.multiprocessors - 1) / device.multiprocessors;
  return tiles >= fewest_tiles && 10 * tiles >= 9 * rounds * device.multiprocessors;
}

}  // namespace rankwise
