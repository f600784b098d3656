"""Losses on attention maps and on assignments to a codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.relation import relation
from .needed import needed, pair
from .registry import register


@register(
    "align_to_distill",
    aliases=("a2d",),
    paper="Jin et al., Align-to-Distill, LREC-COLING 2024",
    family="relation",
)
class AlignToDistillLoss(nn.Module):
    """weight decay^epoch KL, summed, of the teacher's maps with a 1x1 convolution of the student's,
    each map flattened into one softmax (as released the teacher's probabilities are softmaxed
    again). step() counts optimiser steps; without steps_per_epoch the epoch stays 0."""

    def __init__(
        self,
        student_maps: int,
        teacher_maps: int = 24,
        decay: float = 0.9,
        weight: float = 1.0,
        steps_per_epoch: int | None = None,
    ):
        super().__init__()
        self.projector = nn.Conv2d(student_maps, teacher_maps, 1)
        self.decay, self.weight, self.steps_per_epoch = decay, weight, steps_per_epoch
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(
        self,
        student: Tensor | None = None,
        teacher: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_attention: Tensor | None = None,  # (B, L A, T, S)
        teacher_attention: Tensor | None = None,
    ) -> Tensor:
        maps = self.projector(needed(student_attention, "student_attention", "align_to_distill"))
        target = needed(teacher_attention, "teacher_attention", "align_to_distill")
        value = divergence(maps.flatten(-2), target.flatten(-2), "forward_kl", reduction="sum")
        epoch = 0.0
        if self.steps_per_epoch:
            epoch = torch.floor(self.steps / self.steps_per_epoch)
        return (self.weight * self.decay**epoch * value).to(value.dtype)

    def step(self) -> None:
        self.steps += 1


@register("cross_modal_attention", family="relation", status="unseen")
class CrossModalAttentionLoss(nn.Module):
    """KL of image-to-text attention rows + of text-to-image ones. student, teacher =
    ((q_image, k_text), (q_text, k_image)); mask: image tokens, teacher_mask: text tokens."""

    def forward(
        self,
        student: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        teacher: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,  # (B, image tokens)
        teacher_mask: Tensor | None = None,  # (B, text tokens)
    ) -> Tensor:
        s = pair(student, "student", 2, "two pairs (Q, K)")
        t = pair(teacher, "teacher", 2, "two pairs (Q, K)")

        def masks(rows, columns, side):
            if rows is None and columns is None:
                return None
            q, k = side
            ones = [x.new_ones(x.shape[0], x.shape[-2], dtype=torch.bool) for x in (q, k)]
            return (ones[0] if rows is None else rows, ones[1] if columns is None else columns)

        first = relation(s[0], t[0], mask=masks(mask, teacher_mask, s[0]))
        return first + relation(s[1], t[1], mask=masks(teacher_mask, mask, s[1]))


@register(
    "soft_code_assignment",
    aliases=("vqgraph",),
    paper="Yang et al., VQGraph, ICLR 2024",
    family="relation",
)
class SoftCodeAssignmentLoss(nn.Module):
    """tau^2 KL between the teacher's assignment logits [N, M] and minus the Euclidean distances of
    the student's states [N, d] from the codebook [M, d]."""

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        codebook: Tensor | None = None,
    ) -> Tensor:
        codes = needed(codebook, "codebook", "soft_code_assignment")
        return divergence(
            -torch.cdist(student, codes),
            teacher,
            "forward_kl",
            temperature=self.temperature,
            temperature_squared=True,
        )


@register("attention", family="relation", status="-")
class AttentionLoss(nn.Module):
    """ "mse": mean squared difference of attention maps as given over the selected pairs; "kl": KL
    of their rows as logits. Maps [B, A, T, S], mask [B, T] (both axes where T = S)."""

    def __init__(self, kind: str = "mse"):
        super().__init__()
        if kind not in ("mse", "kl"):
            raise ValueError(f"kind: expected mse or kl, got {kind!r}")
        self.kind = kind

    def forward(
        self,
        student: Tensor | None = None,
        teacher: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_attention: Tensor | None = None,
        teacher_attention: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        s = needed(student_attention, "student_attention", "attention")
        t = needed(teacher_attention, "teacher_attention", "attention")
        rows = None if mask is None else mask[:, None, :].expand(s.shape[:-1])
        if self.kind == "kl":
            if mask is not None and s.shape[-1] == s.shape[-2]:
                outside = ~mask[:, None, None, :]
                s, t = (x.masked_fill(outside, -torch.inf) for x in (s, t))
            return divergence(s, t, "forward_kl", mask=rows)
        squared = (s.float() - t.float()).square()
        if mask is None:
            return squared.mean()
        on = rows[..., None].expand(squared.shape)
        if s.shape[-1] == s.shape[-2]:
            on = on & mask[:, None, None, :]
        return torch.where(on, squared, 0.0).sum() / on.sum().clamp(min=1)
