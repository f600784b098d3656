"""Losses on the Gram matrix of a batch or of channels: SP, ICKD, PKT, RKD, CKA, affinity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.relation import relation
from .registry import register


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@register(
    "similarity_preserving",
    aliases=("sp",),
    paper="Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019",
    family="relation",
)
class SimilarityPreservingLoss(nn.Module):
    """Mean over N^2 of the squared difference of row-normalised Gram matrices of the batch."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return relation(
            student.flatten(1),
            teacher.flatten(1),
            "gram_row_l2",
            student_scale=1.0,
            teacher_scale=1.0,
        )


@register(
    "ickd",
    aliases=("chsim",),
    paper="Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved KD, ICCV 2021",
    family="relation",
)
class ICKDLoss(nn.Module):
    """Squared difference of row-normalised channel Grams of maps [B, C, ...], sum / (C B)."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        total = relation(
            student.flatten(2),
            teacher.flatten(2),
            "gram_row_l2",
            student_scale=1.0,
            teacher_scale=1.0,
            reduction="sum",
        )
        return total / (student.shape[0] * student.shape[1])


@register(
    "pkt",
    paper="Passalis and Tefas, Learning Deep Representations with Probabilistic KT, ECCV 2018",
    family="relation",
)
class PKTLoss(nn.Module):
    """Mean over N^2 of P_t log(P_t / P_s), P the row-normalised (cos + 1) / 2 of [N, d]."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return relation(student, teacher, "gram_row_l1", similarity="cosine")


@register(
    "rkd", paper="Park et al., Relational Knowledge Distillation, CVPR 2019", family="relation"
)
class RKDLoss(nn.Module):
    """distance_weight x distances over their mean + angle_weight x angles, smooth-L1, of [N, d]."""

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0):
        super().__init__()
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        loss = self.distance_weight * relation(student, teacher, "distance")
        if self.angle_weight:
            loss = loss + self.angle_weight * relation(student, teacher, "angle")
        return loss


@register(
    "cka",
    paper="Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019",
    family="relation",
)
class CKALoss(nn.Module):
    """1 - linear CKA of [N, d]; unbiased: with the unbiased HSIC estimator (Song et al., 2012)."""

    def __init__(self, unbiased: bool = False):
        super().__init__()
        self.unbiased = unbiased

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        if not self.unbiased:
            return relation(student, teacher, "cka")
        if student.shape[0] < 4:
            raise ValueError(f"student: unbiased CKA needs N >= 4, got {student.shape[0]}")
        x, y = _wide(student).double(), _wide(teacher).double()
        cross = _unbiased_hsic(x, y)
        value = 1 - cross / (_unbiased_hsic(x, x) * _unbiased_hsic(y, y)).sqrt()
        return value.to(_wide(student).dtype)


def _unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_u of the linear kernels without their diagonals, in O(N d^2)."""
    m = x.shape[0]
    k, n = x.square().sum(-1), y.square().sum(-1)
    trace = (x.mT @ y).square().sum() - (k * n).sum()
    row_k, row_l = x @ x.sum(0) - k, y @ y.sum(0) - n
    ones = row_k.sum() * row_l.sum() / ((m - 1) * (m - 2))
    return (trace + ones - 2 * (row_k * row_l).sum() / (m - 2)) / (m * (m - 3))


@register(
    "affinity",
    paper="He et al., Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019",
    family="relation",
)
class AffinityLoss(nn.Module):
    """Mean over B of sum_c |s_c s_c^T - t_c t_c^T|_F / HW with unit channel maps s_c, t_c of
    [B, C, H, W], by its closed form sqrt(2 - 2 <s_c, t_c>^2)."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        s, t = (F.normalize(_wide(x).flatten(2), dim=-1) for x in (student, teacher))
        inner = (s * t).sum(-1)
        # 1 - <s, t>^2 from differences: exact where the maps are nearly equal or opposite.
        gap = ((s - t).square().sum(-1) / 2) * ((s + t).square().sum(-1) / 2)
        near = gap <= 1e-14
        root = torch.where(near, torch.ones_like(gap), 2 * gap).sqrt()
        root = torch.where(near, torch.zeros_like(inner), root)
        return root.sum(-1).mean() / s.shape[-1]
