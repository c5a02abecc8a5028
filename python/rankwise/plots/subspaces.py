"""Grids of what two adapters' subspaces share."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from .look import MAP, add_scale, dress, literal, new_figure, say


def similarity_grid(
    phi: Tensor | Mapping[str, Tensor], first: str = "first", second: str = "second"
) -> Figure:
    """phi(i, j) for all i and j at once, as figure 3 of LoRA's paper (arXiv 2106.09685).

    Right of the dashed line i = j: how much of the first's i directions is among the second's j;
    left of it how much of the second's j is among the first's i. Where the two have different
    ranks, the square part is drawn beside the whole.

    Args:
        phi: ``[k1, k2]`` of rankwise.analysis.subspace_similarity; or {title: phi}, row by row.
        first, second: what the two adapters are called.

    Raises:
        ValueError: there are none, or one is not a matrix.
    """
    grids = {"": phi} if isinstance(phi, Tensor) else dict(phi)
    if not grids:
        raise ValueError("similarity_grid: phi must have at least one grid, got none")
    for grid in grids.values():
        if grid.dim() != 2:
            raise ValueError(f"similarity_grid: phi must be [k1, k2], got {list(grid.shape)}")
    zoomed = any(grid.shape[0] != grid.shape[1] for grid in grids.values())
    figure, axes = new_figure(0.5 + 2.9 * len(grids), (len(grids), 2 if zoomed else 1))
    for row, (title, grid) in enumerate(grids.items()):
        title = f"{literal(title)}  φ(i, j)".strip()
        own = axes[row * (1 + zoomed) : (row + 1) * (1 + zoomed)]
        least = min(grid.shape)
        parts = [grid, grid[:least, :least]]
        for place, part, more in zip(own, parts, ("", f", both to {least}"), strict=False):
            _draw(place, part)
            dress(place, title + more, f"j, directions of {literal(second)}",
                  f"i, directions of {literal(first)}")  # fmt: skip
    scale = ScalarMappable(Normalize(0, 1), cmap=MAP)
    add_scale(figure, scale, axes, "shared: 0 none, 1 all", [0, 0.25, 0.5, 0.75, 1])
    return figure


def _draw(axes: Axes, grid: Tensor) -> None:
    rows, columns = grid.shape
    if not rows or not columns:
        return say(axes, "no directions:\nan update is zero")
    axes.imshow(grid.tolist(), cmap=MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
                extent=(0.5, columns + 0.5, rows + 0.5, 0.5))  # fmt: skip
    least = min(rows, columns) + 0.5
    axes.plot([0.5, least], [0.5, least], color="white", linewidth=1, linestyle=(0, (4, 3)))
    axes.locator_params(integer=True, nbins=8)
