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

// Tiles of the product in kernels/hopper, and the rounds in which the multiprocessors go through
// them.
struct ProductRounds {
  int64_t tiles, count;

  constexpr ProductRounds(const ProductDevice& device, const ProductSizes& sizes)
      : tiles(((sizes.rows + 127) / 128) * ((sizes.cols + 255) / 256)),
        count((tiles + device.multiprocessors - 1) / device.multiprocessors) {}
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
  constexpr int64_t fewest_tiles = 256, shortest = 1024;
  constexpr int64_t longest = int64_t{1} << 24, most_directions = 256;
  const bool large = sizes.rows > 0 && sizes.rows <= longest && sizes.cols >= shortest &&
                     sizes.cols <= longest && sizes.depth >= shortest && sizes.depth <= longest;
  if (device.major != 9 || device.minor != 0 || !large) return false;
  if (sizes.rank < 1 || sizes.rank > most_directions) return false;
  if (sizes.cols % 8 != 0 || sizes.depth % 8 != 0) return false;
  const ProductRounds rounds(device, sizes);
  return rounds.tiles >= fewest_tiles &&
         10 * rounds.tiles >= 9 * rounds.count * device.multiprocessors;
}

// Multiprocessors that read a wide matrix beside such a product (kernels/hopper/beside_product.h):
// those without which it has no round more, if they are done before it is; else 0, and the matrix
// is read by all of them before or after. `reuse` is the side of the product that the matrix has
// not: it makes 2 * reuse operations of each of its elements.
//
// Measured on an H100 at rank 16: a multiprocessor beside the product reads 77-90 GB/s, the product
// makes 660 TFLOP/s. A layer with its passes beside costs 0.97-1.03 of the frozen layer at 8192 x
// 4096 x 4096 and 1.17 with passes before and after; at 8192 x 1024 x 1024, 5.4 and 2.1.
constexpr int multiprocessors_beside(const ProductDevice& device, const ProductSizes& sizes,
                                     int64_t rank, int64_t reuse) {
  constexpr int64_t highest_rank = 16, least_work = 8192;
  if (!sums_take_the_term(device, sizes) || rank > highest_rank) return 0;
  const ProductRounds rounds(device, sizes);
  const int64_t spare = device.multiprocessors - (rounds.tiles + rounds.count - 1) / rounds.count;
  return spare * reuse >= least_work ? static_cast<int>(spare) : 0;
}

}  // namespace rankwise
