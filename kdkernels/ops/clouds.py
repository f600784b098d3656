"""Squared distances between two clouds of points."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this many differences the points are subtracted, which loses nothing to cancellation.
_DIRECT = 1 << 20


def square_distance(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||^2 of [N, d] and [M, d], or batches of them; by a GEMM on centred points where they
    are many."""
    if x.shape[-2] * y.numel() <= _DIRECT:
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    centre = y.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    multiply = torch.baddbmm if x.dim() == 3 else torch.addmm
    return multiply(squares, x, y.transpose(-1, -2), alpha=-2.0).clamp(min=0.0)
