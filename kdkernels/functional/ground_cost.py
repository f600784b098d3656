"""Ground costs between two clouds of points: one GEMM each, but for l1 and callables."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.clouds import square_distance

COSTS = ("sqeuclidean", "euclidean", "cosine", "l1", "dot_softmax")


def ground_cost(
    x: Tensor,
    y: Tensor,
    cost: str | Callable[[Tensor, Tensor], Tensor],
    teacher_lengths: Tensor | None = None,
) -> Tensor:
    """[.., N, M] of x [.., N, d] and y [.., M, d], float32 or float64."""
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected [N, d] or [B, N, d], got shape {tuple(x.shape)}")
    if y.dim() not in (2, 3):
        raise ValueError(f"y: expected [M, d] or [B, M, d], got shape {tuple(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"y: expected a tensor on {x.device} like x, got {y.device}")
    if x.dim() == 3 and y.dim() == 3 and x.shape[0] != y.shape[0]:
        raise ValueError(f"y: expected {x.shape[0]} clouds like x, got {y.shape[0]}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    if callable(cost):
        matrix = cost(x, y)
        if not isinstance(matrix, Tensor) or matrix.shape[-2:] != (x.shape[-2], y.shape[-2]):
            got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(
                f"cost: the callable should give [.., {x.shape[-2]}, {y.shape[-2]}], got {got}"
            )
        return matrix
    if cost not in COSTS:
        raise ValueError(f"cost: expected one of {', '.join(COSTS)} or a callable, got {cost!r}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected points of width {x.shape[-1]} like x, got {y.shape[-1]}")
    x, y = x.to(dtype), y.to(dtype)
    if x.dim() != y.dim():
        x = x if x.dim() == 3 else x.expand(y.shape[0], *x.shape)
        y = y if y.dim() == 3 else y.expand(x.shape[0], *y.shape)
    # Autocast would round the GEMM's operands to half: epsilon divides the cost's error.
    with torch.autocast(x.device.type, enabled=False):
        return _named_cost(x, y, cost, teacher_lengths)


def _named_cost(x: Tensor, y: Tensor, cost: str, teacher_lengths: Tensor | None) -> Tensor:
    """One of COSTS between clouds of one dtype and batch."""
    if cost == "sqeuclidean":
        return square_distance(x, y)
    if cost == "euclidean":
        return _root(square_distance(x, y))
    if cost == "l1":
        return torch.cdist(x, y, p=1.0)
    if cost == "cosine":
        unit_x = torch.nn.functional.normalize(x, dim=-1, eps=1e-12)
        unit_y = torch.nn.functional.normalize(y, dim=-1, eps=1e-12)
        return 1.0 - unit_x @ unit_y.transpose(-1, -2)
    scores = x @ y.transpose(-1, -2) / x.shape[-1] ** 0.5
    if isinstance(teacher_lengths, Tensor):
        inside = torch.arange(y.shape[-2], device=y.device) < teacher_lengths.reshape(-1, 1)
        scores = scores.masked_fill(~inside[:, None, :], torch.finfo(x.dtype).min)
    return 1.0 - scores.softmax(-1)


def _root(square: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
