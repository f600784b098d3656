"""Which positions of a sequence count, and how they are brought to the front."""

from __future__ import annotations

import torch
from torch import Tensor


def selected(
    tensor: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    dims: int,
    ignore_index: int = -100,
) -> Tensor:
    """Bool of the tensor's first `dims` dimensions: labels != ignore_index and mask."""
    shape = tensor.shape[:dims]
    chosen = torch.ones(shape, dtype=torch.bool, device=tensor.device)
    for argument, given in (("labels", labels), ("mask", mask)):
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"{argument}: expected shape {tuple(shape)}, got {tuple(given.shape)}")
        chosen = chosen & (given != ignore_index if argument == "labels" else given.bool())
    return chosen


def to_front(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(order, count) of bool [B, L]: `order` lists each row's chosen positions first, in order."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True), chosen.sum(1)


def take(tensor: Tensor, order: Tensor) -> Tensor:
    """tensor [B, L, d] at positions [B, K]."""
    return tensor.gather(1, order.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))


def wide(tensor: Tensor) -> Tensor:
    """float32 for half precision."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
