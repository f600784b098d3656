"""Rows of a batch of tokens: which count, their mean, halves and sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.token_stats import label_log_probs
from .selection import selected


def chosen_rows(logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Bool [...] of the rows that count: labels != -100 and mask."""
    return selected(logits, labels, mask, logits.dim() - 1)


def zero_rest(logits: Tensor, chosen: Tensor) -> Tensor:
    """Logits with 0 in the rows that do not count, for plain torch: there 0 x NaN is NaN."""
    return torch.where(chosen[..., None], logits, torch.zeros_like(logits))


def mean_rows(values: Tensor, chosen: Tensor, num_items: int | Tensor | None = None) -> Tensor:
    """Sum over the chosen rows / their number (or num_items); 0 where there are none."""
    divisor = chosen.sum().clamp(min=1) if num_items is None else num_items
    return torch.where(chosen, values, torch.zeros_like(values)).sum() / divisor


def sequence_means(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the chosen rows of each entry of dim 0, and which entries have any."""
    on = chosen.flatten(1)
    count = on.sum(1)
    total = torch.where(on, values.flatten(1), torch.zeros((), dtype=values.dtype)).sum(1)
    return total / count.clamp(min=1), count > 0


def halves(tensor: Tensor | None, argument: str) -> tuple[Any, Any]:
    """The chosen and the rejected side: first and second half of dim 0."""
    if tensor is None:
        return None, None
    if tensor.dim() < 1 or tensor.shape[0] % 2:
        raise ValueError(
            f"{argument}: expected an even size of dim 0 (chosen half, rejected half), got shape "
            f"{tuple(tensor.shape)}"
        )
    return tuple(tensor.chunk(2))


def label_cross_entropy(
    student: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy with the labels at tau 1 over the selected rows; class_weight [V] weighs rows
    and divisor by label, as torch does."""
    nll = -label_log_probs(student, labels, mask=mask)
    chosen = chosen_rows(student, labels, mask)
    if class_weight is None:
        return mean_rows(nll, chosen, num_items)
    weight = class_weight.to(nll.dtype)[labels.clamp(min=0)]
    weight = torch.where(chosen, weight, torch.zeros_like(weight))
    total = torch.where(weight != 0, weight * nll, torch.zeros_like(nll)).sum()
    if num_items is not None:
        return total / num_items
    divisor = weight.sum()
    return torch.where(divisor > 0, total / torch.where(divisor > 0, divisor, 1.0), total)


def entropies(logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Entropy of each row at tau 1, constant, in the inputs' precision."""
    return divergence(logits.detach(), None, "entropy", labels=labels, mask=mask, reduction="none")


class RowLoss(nn.Module):
    """A loss that is `kd.divergence` with fixed options: the mean over the selected rows."""

    kind: Any = "forward_kl"

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(
        self,
        student: Tensor,  # [..., V]
        teacher: Tensor | None,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return divergence(
            student, teacher, self.kind, labels=labels, mask=mask, num_items=num_items,
            **self.options,
        )  # fmt: skip
