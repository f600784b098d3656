"""Losses that are a divergence to one mixed target, or to several teachers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..inputs import ProbMix
from .needed import needed
from .registry import register
from .rows import RowLoss
from .selection import wide

Items = int | float | Tensor | None


def teachers_of(teacher: Any, loss: str) -> list:
    """The list of teachers, which must not be empty."""
    if not isinstance(teacher, (list, tuple)) or not teacher:
        raise ValueError(f"teacher: {loss} expects a list of logits, got {type(teacher).__name__}")
    return list(teacher)


@register(
    "mutual",
    paper="Zhang et al., Deep Mutual Learning, CVPR 2018",
    family="divergence",
)
class MutualLoss(nn.Module):
    """KL(p, q) with the gradient to the student + KL(q, p) with the gradient to the teacher, both
    over the same selected rows; no tau^2."""

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: Items = None,
    ) -> Tensor:
        rows = {
            "labels": labels,
            "mask": mask,
            "num_items": num_items,
            "temperature": self.temperature,
        }
        return divergence(student, teacher.detach(), "forward_kl", **rows) + divergence(
            teacher, student.detach(), "forward_kl", **rows
        )


@register("multi_teacher", family="divergence", status="-")
class MultiTeacherLoss(nn.Module):
    """sum_k w_k D(p_k, q); teacher = list. teacher_weights: numbers or a tensor [K] or [..., K],
    with gradient; 1/K each by default."""

    def __init__(self, kind: str = "forward_kl", temperature: float = 1.0):
        super().__init__()
        self.kind = kind
        self.temperature = temperature

    def forward(
        self,
        student: Tensor,
        teacher: Sequence[Any],
        labels: Tensor | None = None,
        *,
        teacher_weights: Tensor | Sequence[float] | None = None,
        mask: Tensor | None = None,
        num_items: Items = None,
    ) -> Tensor:
        teachers = teachers_of(teacher, "multi_teacher")
        if teacher_weights is None:
            teacher_weights = [1.0 / len(teachers)] * len(teachers)
        return divergence(
            student,
            teachers,
            self.kind,
            temperature=self.temperature,
            teacher_weights=teacher_weights,
            labels=labels,
            mask=mask,
            num_items=num_items,
        )


@register(
    "meal_v2",
    paper="Shen and Savvides, MEAL V2, 2020",
    family="divergence",
)
class MEALV2Loss(nn.Module):
    """Cross entropy to the mean of the teachers' softmaxes; teacher = list. The discriminator of
    the release is left to the trainer."""

    def forward(
        self,
        student: Tensor,
        teacher: Sequence[Any],
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: Items = None,
    ) -> Tensor:
        teachers = teachers_of(teacher, "meal_v2")
        mix = ProbMix([(1.0 / len(teachers), logits) for logits in teachers])
        return divergence(
            student, mix, "cross_entropy", labels=labels, mask=mask, num_items=num_items
        )


@register(
    "ps_kd",
    paper="Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV "
    "2021",
    family="divergence",
)
class PSKDLoss(nn.Module):
    """Cross entropy to c softmax(a) + (1 - c) onehot(label), where the teacher's logits a are the
    model's own past prediction.

    c = alpha (k + 1) / total_steps after k calls of step() (at most alpha); alpha without
    total_steps. Rows need a label.
    """

    def __init__(self, alpha: float = 0.8, total_steps: int | None = None):
        super().__init__()
        self.alpha = alpha
        self.total_steps = total_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: Items = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "ps_kd")
        share: float | Tensor = self.alpha
        if self.total_steps is not None:
            share = self.alpha * ((self.steps + 1) / self.total_steps).clamp(max=1.0)
        mix = ProbMix([(share, teacher)], labels, 1.0 - share)
        return divergence(
            student, mix, "cross_entropy", labels=labels, mask=mask, num_items=num_items
        )

    def step(self) -> None:
        self.steps += 1


@register(
    "mft",
    paper="Belcak et al., Minifinetuning, 2025",
    family="divergence",
)
class MFTLoss(nn.Module):
    """tau^2 KL(r, q) to the corrected target r = (1 - m) p + m onehot(label), p at tau.

    m brings the label `threshold` above the teacher's largest entry where the teacher is wrong, and
    itself up by `threshold` where it is right: (p_max - p_y + threshold) / (1 + p_max - p_y) if
    argmax p is not the label, else (min(1, p_y + threshold) - p_max) / (1 - p_max). 1e-7 stands in
    both denominators, as released. No gradient through r.
    """

    def __init__(self, threshold: float = 0.2, temperature: float = 1.0):
        super().__init__()
        self.threshold = threshold
        self.temperature = temperature

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: Items = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "mft")
        teacher = teacher.detach()
        share = self.label_share(teacher, labels)
        return divergence(
            student,
            ProbMix([(1.0 - share, teacher)], labels, share),
            "forward_kl",
            temperature=self.temperature,
            temperature_squared=True,
            labels=labels,
            mask=mask,
            num_items=num_items,
        )

    def label_share(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """m [...]; 0 where there is no label."""
        scaled = wide(teacher) / self.temperature
        top, best = scaled.max(-1)
        lse = scaled.logsumexp(-1)
        known = labels != -100
        index = labels.clamp(min=0, max=teacher.shape[-1] - 1).unsqueeze(-1)
        largest = (top - lse).exp()
        own = (scaled.gather(-1, index).squeeze(-1) - lse).exp()
        wrong = (largest - own + self.threshold) / (1 + largest - own + 1e-7)
        right = ((own + self.threshold).clamp(max=1.0) - largest) / (1 - largest + 1e-7)
        share = torch.where(best == labels, right, wrong)
        return torch.where(known & share.isfinite(), share, 0.0)


@register(
    "logit_standardization",
    aliases=("lsr",),
    paper="Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024",
    family="divergence",
)
class LogitStandardizationLoss(RowLoss):
    """tau^2 KL of both rows z-scored first (population deviation, no epsilon; the release divides
    by the unbiased deviation + 1e-7). The recipe's factor 9 is the caller's."""

    def __init__(self, temperature: float = 2.0):
        super().__init__(standardize=True, temperature=temperature, temperature_squared=True)
