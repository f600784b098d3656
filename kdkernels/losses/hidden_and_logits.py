"""Losses that add a feature term on hidden states to a divergence of the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.feature import feature
from .needed import needed
from .registry import register
from .rows import chosen_rows, label_cross_entropy


def _hidden(kind, student_hidden, teacher_hidden, logits, labels, mask, loss):
    """The feature term of the selected rows."""
    mine = needed(student_hidden, "student_hidden", loss)
    theirs = needed(teacher_hidden, "teacher_hidden", loss)
    return feature(mine, theirs, kind, mask=chosen_rows(logits, labels, mask))


@register(
    "minitron",
    paper="Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, "
    "NeurIPS 2024",
    family="divergence",
)
class MinitronLoss(nn.Module):
    """tau^2 D(kind) + hidden_weight x MSE of the hidden states."""

    def __init__(
        self, kind: str = "forward_kl", temperature: float = 1.0, hidden_weight: float = 0.0
    ):
        super().__init__()
        self.kind, self.temperature, self.hidden_weight = kind, temperature, hidden_weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        student_hidden: Tensor | None = None,  # [..., d]
        teacher_hidden: Tensor | None = None,
    ) -> Tensor:
        loss = divergence(
            student, teacher, self.kind, temperature=self.temperature, temperature_squared=True,
            labels=labels, mask=mask, num_items=num_items,
        )  # fmt: skip
        if self.hidden_weight == 0:
            return loss
        states = student_hidden, teacher_hidden
        hidden = _hidden("mse", *states, student, labels, mask, "minitron")
        return loss + self.hidden_weight * hidden


@register(
    "distilbert",
    paper="Sanh et al., DistilBERT, 2019",
    family="divergence",
)
class DistilBERTLoss(nn.Module):
    """ce_weight tau^2 KL over the real tokens (mask) + mlm_weight CE over the labelled ones +
    cos_weight mean(1 - cos) of the hidden states over the real tokens."""

    def __init__(
        self,
        temperature: float = 2.0,
        ce_weight: float = 5.0,
        mlm_weight: float = 2.0,
        cos_weight: float = 1.0,
    ):
        super().__init__()
        self.temperature = temperature
        self.ce_weight, self.mlm_weight, self.cos_weight = ce_weight, mlm_weight, cos_weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,  # real tokens
        num_items: int | Tensor | None = None,
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
    ) -> Tensor:
        loss = self.ce_weight * divergence(
            student, teacher, "forward_kl", temperature=self.temperature,
            temperature_squared=True, mask=mask, num_items=num_items,
        )  # fmt: skip
        if self.mlm_weight:
            given = needed(labels, "labels", "distilbert")
            loss = loss + self.mlm_weight * label_cross_entropy(student, given, mask, num_items)
        if self.cos_weight:
            states = student_hidden, teacher_hidden
            hidden = _hidden("cosine", *states, student, None, mask, "distilbert")
            loss = loss + self.cos_weight * hidden
        return loss


@register(
    "falcon",
    paper="Gao et al., Falcon: Faster and Parallel Inference of Large Language Models through "
    "Enhanced Semi-Autoregressive Drafting, AAAI 2025",
    family="divergence",
)
class FalconLoss(nn.Module):
    """hidden_weight smooth L1 + logit_weight [soft_weight sum p (log p_tau - log q_tau), p at 1,
    + hard_weight CE with an id drawn from p]."""

    def __init__(
        self,
        temperature: float = 0.95,
        soft_weight: float = 0.9,
        hard_weight: float = 0.1,
        logit_weight: float = 0.1,
        hidden_weight: float = 1.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.temperature = temperature
        self.soft_weight, self.hard_weight = soft_weight, hard_weight
        self.logit_weight, self.hidden_weight = logit_weight, hidden_weight
        self.generator = generator

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
    ) -> Tensor:
        fixed = teacher.detach()
        options = {
            "kind": "cross_entropy", "temperature": self.temperature, "teacher_temperature": 1.0,
            "labels": labels, "mask": mask, "num_items": num_items,
        }  # fmt: skip
        soft = divergence(student, fixed, **options) - divergence(fixed, fixed, **options)
        loss = self.soft_weight * soft
        if self.hard_weight:
            # The largest of logits + Gumbel noise is a draw from their softmax.
            uniform = torch.rand(
                fixed.shape, generator=self.generator, device=fixed.device, dtype=torch.float32
            )
            noise = -torch.log(-torch.log(uniform.clamp(min=1e-20)))
            drawn = (fixed.float() + noise).argmax(-1)
            if labels is not None:
                drawn = torch.where(labels == -100, labels, drawn)
            loss = loss + self.hard_weight * label_cross_entropy(student, drawn, mask, num_items)
        loss = self.logit_weight * loss
        if self.hidden_weight:
            states = student_hidden, teacher_hidden
            hidden = _hidden("smooth_l1", *states, student, labels, mask, "falcon")
            loss = loss + self.hidden_weight * hidden
        return loss


@register(
    "fspad",
    paper="Gui et al., Boosting Lossless Speculative Decoding via Feature Sampling and Partial "
    "Alignment Distillation, AAAI 2025",
    family="divergence",
)
class FSPADLoss(nn.Module):
    """hidden_weight smooth L1 of the hidden states + logit_weight cross entropy."""

    def __init__(self, hidden_weight: float = 1.0, logit_weight: float = 0.1):
        super().__init__()
        self.hidden_weight, self.logit_weight = hidden_weight, logit_weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
    ) -> Tensor:
        loss = self.logit_weight * divergence(
            student, teacher, "cross_entropy", labels=labels, mask=mask, num_items=num_items
        )
        if self.hidden_weight == 0:
            return loss
        states = student_hidden, teacher_hidden
        hidden = _hidden("smooth_l1", *states, student, labels, mask, "fspad")
        return loss + self.hidden_weight * hidden
