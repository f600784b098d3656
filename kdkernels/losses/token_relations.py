"""Cosine relations of tokens and pixels: DINOv3, VideoREPA, CIRKD, pairwise SKD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.relation import relation
from .registry import register


@register("dinov3_gram", paper="Simeoni et al., DINOv3, 2025", family="relation")
class DINOv3GramLoss(nn.Module):
    """MSE of cosine Grams of tokens [B, N, d]; remove_neg bounds both maps at 0;
    remove_only_teacher_neg the teacher's alone (the release's student rule is dead code)."""

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ):
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError("remove_neg, remove_only_teacher_neg: expected one of them at most")
        self.apply_norm = apply_norm
        self.img_level = img_level
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        if not self.img_level:
            student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        similarity = "cosine" if self.apply_norm else "dot"
        if self.remove_only_teacher_neg:
            return _teacher_bounded(student, teacher, self.apply_norm)
        return relation(
            student,
            teacher,
            "mse",
            similarity=similarity,
            student_scale=1.0,
            teacher_scale=1.0,
            clamp=0.0 if self.remove_neg else None,
        )


def _teacher_bounded(student: Tensor, teacher: Tensor, unit: bool) -> Tensor:
    """MSE of the student's Gram with max(teacher's Gram, 0), 64 rows at a time, recomputed in
    backward so that no Gram is kept."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t = student.to(dtype), teacher.to(dtype)
    if unit:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)

    def part(rows: Tensor, s: Tensor, others: Tensor, t: Tensor) -> Tensor:
        return (rows @ s.mT - (others @ t.mT).clamp(min=0)).square().sum()

    total = s.new_zeros(())
    for rows, others in zip(s.split(64, -2), t.split(64, -2)):
        total = total + torch.utils.checkpoint.checkpoint(
            part, rows, s, others, t, use_reentrant=False
        )
    return total / (s.shape[-2] * s[..., 0].numel())


@register(
    "token_relation_distillation",
    aliases=("trd", "videorepa"),
    paper="Zhang et al., VideoREPA, 2025",
    family="relation",
)
class TokenRelationDistillationLoss(nn.Module):
    """Mean of max(|cos_s - cos_t| - margin, 0) over pairs of tokens of a video [B, F, HW, d]: all,
    of one frame ("spatial") or of different frames ("temporal")."""

    def __init__(self, margin: float = 0.1, mode: str = "full"):
        super().__init__()
        if mode not in ("full", "spatial", "temporal"):
            raise ValueError(f"mode: expected full, spatial or temporal, got {mode!r}")
        self.margin = margin
        self.mode = mode

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        if student.dim() != 4:
            raise ValueError(f"student: expected tokens [B, F, HW, d], got {tuple(student.shape)}")
        frames, pixels = student.shape[1:3]
        options = {}
        if self.mode != "full":
            frame = torch.arange(frames, device=student.device).repeat_interleave(pixels)
            options["block"] = frame
            options["block_mode"] = "same" if self.mode == "spatial" else "different"
        return relation(
            student.flatten(1, 2),
            teacher.flatten(1, 2),
            "margin_l1",
            similarity="cosine",
            margin=self.margin,
            **options,
        )


@register(
    "cirkd",
    paper="Yang et al., Cross-Image Relational Knowledge Distillation, CVPR 2022",
    family="relation",
)
class CIRKDLoss(nn.Module):
    """Mean over ordered pairs (i, j) of images of KL of softmax(cos(X_i, X_j) / temperature), mean
    over the pixels of image i; maps [B, C, H, W]."""

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        s, t = (x.flatten(2).mT for x in (student, teacher))  # (B, HW, C)
        scale = 1.0 / self.temperature
        total = 0.0
        for shift in range(s.shape[0]):
            total = total + relation(
                (s, s.roll(-shift, 0)),
                (t, t.roll(-shift, 0)),
                similarity="cosine",
                student_scale=scale,
                teacher_scale=scale,
            )
        return total / s.shape[0]


@register(
    "structured_pairwise",
    aliases=("skd_pairwise",),
    paper="Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019",
    family="relation",
)
class StructuredPairwiseLoss(nn.Module):
    """MSE of cosine Grams of pixels after max-pooling maps [B, C, H, W] into 1 / scale cells a
    side; the student's norms carry no gradient."""

    def __init__(self, scale: float = 0.5):
        super().__init__()
        if not 0 < scale <= 1:
            raise ValueError(f"scale: expected a number in (0, 1], got {scale!r}")
        self.scale = scale

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        def nodes(x: Tensor) -> Tensor:
            kernel = (int(x.shape[2] * self.scale), int(x.shape[3] * self.scale))
            pooled = F.max_pool2d(x, kernel, kernel, ceil_mode=True)
            return pooled.flatten(2).mT

        return relation(
            nodes(student), nodes(teacher), "mse", similarity="cosine", detach_norm=True
        )
