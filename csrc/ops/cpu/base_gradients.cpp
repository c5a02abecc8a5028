// Gradients of a base that is trained, block by block.
#include "base_gradients.h"

#include <ATen/ATen.h>

#include "blocks.h"
#include "products.h"

namespace rankwise {

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x) {
  const at::Tensor dw = at::empty({dy.size(1), x.size(1)}, dy.options());
  const std::vector<Tile> tiles = output_tiles(dw, dy.size(0));
  run_blocks(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    multiply_into(tiles[i].of(dw), tiles[i].row.of(dy, 1).t(), tiles[i].col.of(x, 1), 1.0);
  });
  return dw;
}

at::Tensor bias_gradient(const at::Tensor& dy) {
  const at::Tensor db = at::empty({dy.size(1)}, dy.options());
  const Split cols(dy.size(1), scratch_step(dy.size(0)));
  run_blocks(cols.count(), [&](int64_t i) {
    at::Tensor out = cols[i].of(db, 0);
    at::sum_out(out, cols[i].of(dy, 1), 0);
  });
  return db;
}

}  // namespace rankwise
