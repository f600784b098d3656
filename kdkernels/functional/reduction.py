"""Row values to a loss in torch, by the rules of the divergence kernels: for calls that combine the
values of several kernels before they are reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.spec import REDUCTIONS
from .checks import check_number


def selected_rows(
    labels: Tensor | None, mask: Tensor | None, ignore_index: int, like: Tensor
) -> Tensor:
    """Bool of the shape of `like`: labels != ignore_index and mask."""
    chosen = torch.ones_like(like, dtype=torch.bool)
    if labels is not None:
        chosen = chosen & (labels != ignore_index)
    return chosen if mask is None else chosen & mask


def check_reduction(reduction: str, normalize: str, num_items: object) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalize not in ("rows", "weights"):
        raise ValueError(f"normalize: expected 'rows' or 'weights', got {normalize!r}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items: goes with reduction 'mean', got {reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0 or num_items.requires_grad:
            raise ValueError("num_items: expected a 0-d tensor that does not require grad")
    else:
        check_number(num_items, "num_items", positive=True)


def reduce_rows(
    rows: Tensor,
    selected: Tensor,
    weight: Tensor | None,
    reduction: str,
    normalize: str,
    num_items: int | float | Tensor | None,
) -> Tensor:
    """rows, selected [...]; weight [...] or 0-d. Unselected rows and rows of weight 0 are 0."""
    check_reduction(reduction, normalize, num_items)
    counted = selected.to(rows.dtype)
    if weight is not None:
        weight = torch.where(selected, weight.to(rows.dtype), 0.0)
        # 0 * inf = 0
        rows = torch.where(weight == 0, rows.detach().nan_to_num() * weight, rows * weight)
        if normalize == "weights":
            counted = weight.detach() if not weight.requires_grad else weight
    rows = torch.where(selected, rows, 0.0)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if num_items is not None:
        return total / num_items
    if reduction == "batchmean":
        return total / max(1, rows.shape[0] if rows.dim() else 1)
    if reduction == "mean" or rows.numel() == 0:
        return _divided(total, counted.sum())
    entries = rows.shape[0] if rows.dim() else 1
    per_entry = counted.reshape(entries, -1).sum(-1)
    values = _divided(rows.reshape(entries, -1).sum(-1), per_entry)
    return values.sum() / (per_entry > 0).sum().clamp(min=1)


def _divided(total: Tensor, count: Tensor) -> Tensor:
    """total / count, 0 where there is nothing."""
    return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0)
