"""Row values to a loss in torch, by the rules of the divergence kernels: for calls that combine the
values of several kernels before they are reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.spec import REDUCTIONS
from .checks import check_number, same_device


def selected_rows(
    labels: Tensor | None, mask: Tensor | None, ignore_index: int, like: Tensor
) -> Tensor:
    """Bool of the shape of `like`: labels != ignore_index and mask."""
    chosen = torch.ones_like(like, dtype=torch.bool)
    for argument, given in (("labels", labels), ("mask", mask)):
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{argument}: expected a tensor, got {type(given).__name__}")
        same_device(given, argument, like)
        if given.shape != like.shape:
            raise ValueError(
                f"{argument}: expected shape {tuple(like.shape)} (the student's without the class "
                f"dimension), got {tuple(given.shape)}"
            )
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


def row_quantile(values: Tensor, selected: Tensor, fraction: float) -> Tensor:
    """Quantile of the selected values (linear interpolation), inf where none is; a constant."""
    values = torch.where(selected & ~values.isnan(), values.detach(), float("inf")).reshape(-1)
    if values.numel() == 0:
        return values.new_full((), float("inf"))
    ordered = values.sort().values
    count = (selected.reshape(-1) & ~values.isnan()).sum()
    position = fraction * (count - 1).clamp(min=0).to(torch.float64)
    below = position.floor()
    place = below.long().reshape(1)  # gathered, not indexed: no number comes to the host
    low = ordered.gather(0, place)[0]
    high = ordered.gather(0, (place + 1).clamp(max=values.numel() - 1))[0]
    share = (position - below).to(values.dtype)
    # Between a number and inf lies inf, but only where the share is not 0.
    return torch.where((share == 0) | (low == high), low, low + share * (high - low))


def _divided(total: Tensor, count: Tensor) -> Tensor:
    """total / count, 0 where there is nothing."""
    return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0)
