"""Losses of classifiers and detectors: sigmoid scores, augmented labels, groups of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..ops.common import compute_dtype
from .needed import needed, pair
from .registry import register
from .rows import chosen_rows, label_cross_entropy, mean_rows, zero_rest


def _focal(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """|sigmoid(a) - sigmoid(z)|^beta BCE(z, sigmoid(a)) of each entry; the weight has gradient."""
    dtype = compute_dtype(student)
    z, target = student.to(dtype), teacher.detach().to(dtype).sigmoid()
    gap = (target - z.sigmoid()).abs()
    # The power's slope at 0 is infinite for beta < 1, and 0 * inf would be NaN.
    weight = torch.where(gap > 0, torch.where(gap > 0, gap, 1.0) ** beta, 0.0)
    return weight * F.binary_cross_entropy_with_logits(z, target, reduction="none")


@register(
    "binary_kd",
    aliases=("bckd",),
    paper="Yang et al., Bridging Cross-task Protocol Inconsistency for Distillation in Dense "
    "Object Detection, ICCV 2023",
    family="divergence",
)
class BinaryKDLoss(nn.Module):
    """Sum over classes of |p - q|^beta BCE(z, p), p and q sigmoids; sum / num_items (positives),
    else mean over rows."""

    def __init__(self, beta: float = 1.0):
        super().__init__()
        self.beta = beta

    def forward(
        self,
        student: Tensor,  # class scores [..., C]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        chosen = chosen_rows(student, labels, mask)
        return mean_rows(
            _focal(zero_rest(student, chosen), teacher, self.beta).sum(-1), chosen, num_items
        )


@register(
    "quality_focal",
    paper="Li et al., Generalized Focal Loss, NeurIPS 2020; as in CrossKD (Wang et al., CVPR 2024)",
    family="divergence",
)
class QualityFocalLoss(nn.Module):
    """Mean over entries of |p - q|^beta BCE(z, p), p and q sigmoids."""

    def __init__(self, beta: float = 1.0):
        super().__init__()
        self.beta = beta

    def forward(
        self,
        student: Tensor,  # class scores [..., C]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        chosen = chosen_rows(student, labels, mask)
        rows = _focal(zero_rest(student, chosen), teacher, self.beta)
        rows = rows.mean(-1) if num_items is None else rows.sum(-1)
        return mean_rows(rows, chosen, num_items)


@register(
    "label_augmentation_sd",
    aliases=("sla_sd",),
    paper="Lee et al., Self-supervised Label Augmentation via Input Transformations, ICML 2020",
    family="divergence",
)
class LabelAugmentationSDLoss(nn.Module):
    """CE(joint, n y + i) + CE(single, y) + tau^2 KL of single to the sg mean over i of
    joint[i::n, i::n]; student = (joint [n B, n C], single [B, C]), row n b + i of the joint being
    view i of example b."""

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        student: tuple[Tensor, Tensor],
        teacher: None = None,
        labels: Tensor | None = None,  # [B]
        *,
        mask: Tensor | None = None,  # [B]
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        joint, single = pair(student, "student", 2, "(joint, single)")
        labels = needed(labels, "labels", "label_augmentation_sd")
        batch, classes = single.shape
        n = joint.shape[0] // max(batch, 1)
        if joint.shape != (n * batch, n * classes):
            raise ValueError(
                f"student: expected joint logits (n B, n C) beside (B, C) = {tuple(single.shape)}, "
                f"got {tuple(joint.shape)}"
            )
        views = torch.arange(n, device=labels.device)
        spread = torch.where(labels[:, None] == -100, -100, n * labels[:, None] + views).reshape(-1)
        wide_mask = None if mask is None else mask[:, None].expand(batch, n).reshape(-1)
        apart = None if num_items is None else num_items * n
        target = torch.stack([joint[i::n, i::n] for i in range(n)]).to(compute_dtype(joint)).mean(0)
        distilled = divergence(
            single, target.detach(), "forward_kl", temperature=self.temperature,
            temperature_squared=True, labels=labels, mask=mask, num_items=num_items,
        )  # fmt: skip
        return (
            label_cross_entropy(joint, spread, wide_mask, apart)
            + label_cross_entropy(single, labels, mask, num_items)
            + distilled
        )


@register(
    "xded",
    paper="Lee et al., Cross-Domain Ensemble Distillation for Domain Generalization, ECCV 2022",
    family="divergence",
)
class XDEDLoss(nn.Module):
    """CE + weight tau^2 KL to the sg mean of the batch's logits of the same label; teacher None."""

    def __init__(self, temperature: float = 4.0, weight: float = 5.0):
        super().__init__()
        self.temperature, self.weight = temperature, weight

    def forward(
        self,
        student: Tensor,  # [N, V]
        teacher: None = None,
        labels: Tensor | None = None,  # [N]
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "xded")
        chosen = chosen_rows(student, labels, mask)
        same = (labels[:, None] == labels) & chosen & chosen[:, None]
        share = same.to(compute_dtype(student))
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        ensemble = share @ zero_rest(student.detach(), chosen).to(share.dtype)
        distilled = divergence(
            student, ensemble, "forward_kl", temperature=self.temperature,
            temperature_squared=True, labels=labels, mask=mask, num_items=num_items,
        )  # fmt: skip
        return label_cross_entropy(student, labels, mask, num_items) + self.weight * distilled


@register("subclass_kd", family="divergence", status="unseen")
class SubclassKDLoss(nn.Module):
    """alpha tau^2 KL over all C S subclasses + (1 - alpha) cross entropy of the classes, whose
    probabilities are summed over their `subclasses` neighbouring columns."""

    def __init__(self, subclasses: int, alpha: float = 0.5, temperature: float = 1.0):
        super().__init__()
        if subclasses < 1:
            raise ValueError(f"subclasses: expected a number >= 1, got {subclasses!r}")
        self.subclasses, self.alpha, self.temperature = subclasses, alpha, temperature

    def forward(
        self,
        student: Tensor,  # [..., C S]
        teacher: Tensor,
        labels: Tensor | None = None,  # classes [...]
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "subclass_kd")
        chosen = chosen_rows(student, labels, mask)
        wide = zero_rest(student, chosen).to(compute_dtype(student))
        classes = wide.unflatten(-1, (-1, self.subclasses)).logsumexp(-1)
        hard = label_cross_entropy(classes, labels, mask, num_items)
        soft = divergence(
            student, teacher, "forward_kl", temperature=self.temperature,
            temperature_squared=True, labels=labels, mask=mask, num_items=num_items,
        )  # fmt: skip
        return self.alpha * soft + (1 - self.alpha) * hard
