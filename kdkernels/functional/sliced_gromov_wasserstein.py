"""The sliced Gromov-Wasserstein distance between point clouds: sorting on lines."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_floats, same_device


def sliced_gromov_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    projections: int | Tensor = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sliced Gromov-Wasserstein between point clouds: mean over lines of the one-dimensional
    GW_2^2 of squared distances, each by sorting.

    On a line the points are matched in ascending or in descending order, whichever is cheaper. That
    is the best permutation for most data, but not always (counterexamples from n = 7 on: Beinert,
    Heiss, Steidl, 2022), so a line's value is an upper bound of its GW_2^2. O(L n (d + log n)).

    Args:
        x, y: points [..., n, d] and [..., n, d'], equal n, uniform weights; the lower dimension is
            padded with zeros.
        projections: number of lines, drawn uniformly from the sphere in max(d, d') dimensions; or
            the directions [L, max(d, d')], used as they are.
        generator: for the draw; on the device of `x`.

    Returns:
        [...], float32 (float64 for float64 points). Moments are centred and in float64: right also
        where the points are far from the origin (raw float32 moments return 0 or a large negative
        number at an offset of 100). Gradients reach the points and given directions.

    Vayer, Flamary, Courty, Tavenard, Chapel (2019).
    """
    for points, name in ((x, "x"), (y, "y")):
        check_floats(points, name)
        if points.dim() < 2 or points.shape[-2] < 1 or points.shape[-1] < 1:
            raise ValueError(f"{name}: expected shape [..., n, d], got {tuple(points.shape)}")
    same_device(y, "y", x)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"y: expected as many points and the same leading shape as x {tuple(x.shape)}, got "
            f"{tuple(y.shape)}; sample the larger cloud down"
        )
    width = max(x.shape[-1], y.shape[-1])
    directions = _directions(projections, width, generator, x)
    lines = []
    for points in (x, y):
        points = points.double()
        points = points - points.mean(-2, keepdim=True)
        lines.append((points @ directions[:, : points.shape[-1]].mT).sort(dim=-2).values)
    u, v = lines
    cost = torch.minimum(_line_cost(u, v), _line_cost(u, v.flip(-2)))
    out = cost.mean(-1)
    return out.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _directions(projections, width: int, generator, like: Tensor) -> Tensor:
    if isinstance(projections, Tensor):
        check_floats(projections, "projections")
        same_device(projections, "projections", like)
        if projections.dim() != 2 or projections.shape[0] < 1 or projections.shape[1] != width:
            raise ValueError(
                f"projections: expected directions of shape (L, {width}), got "
                f"{tuple(projections.shape)}"
            )
        return projections.double()
    if isinstance(projections, bool) or not isinstance(projections, int):
        raise TypeError(
            f"projections: expected an int or a tensor, got {type(projections).__name__}"
        )
    if projections < 1:
        raise ValueError(f"projections: expected at least 1, got {projections}")
    drawn = torch.randn(
        projections, width, dtype=torch.float64, device=like.device, generator=generator
    )
    return drawn / drawn.norm(dim=-1, keepdim=True)


def _line_cost(x: Tensor, y: Tensor) -> Tensor:
    """mean over i, j of ((x_i - x_j)^2 - (y_i - y_j)^2)^2 for paired points (..., n, L), from
    moments about the means (x and y are centred up to rounding, here exactly)."""
    n = x.shape[-2]
    x = x - x.mean(-2, keepdim=True)
    y = y - y.mean(-2, keepdim=True)
    xx, yy = x * x, y * y
    x2, y2, xy = xx.sum(-2), yy.sum(-2), (x * y).sum(-2)
    fourth = (xx * xx).sum(-2) + (yy * yy).sum(-2) - 2 * (xx * yy).sum(-2)
    return (2 * n * fourth + 6 * (x2 * x2 + y2 * y2) - 4 * x2 * y2 - 8 * xy * xy) / n**2
