"""Dual-space distillation: states of one model under the head of the other, both ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.feature import Projector
from .needed import needed
from .registry import register
from .rows import label_cross_entropy
from .selection import selected

_PAPER = "Zhang et al., Dual-Space Knowledge Distillation for Large Language Models, EMNLP 2024"


def _check_head(head, argument: str, width: int) -> None:
    """Hidden states [B, L, width] and the weight [V, width] of the vocabulary projection."""
    hidden, weight = getattr(head, "hidden", None), getattr(head, "weight", None)
    if not isinstance(hidden, Tensor) or not isinstance(weight, Tensor):
        raise TypeError(
            f"{argument}: expected a head (hidden states and the weight of the vocabulary "
            f"projection), got {type(head).__name__}"
        )
    if hidden.dim() != 3 or hidden.shape[-1] != width or weight.shape[-1] != width:
        raise ValueError(
            f"{argument}: expected hidden [B, L, {width}] and weight [V, {width}], got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )


def _logits(head, hidden: Tensor | None = None) -> Tensor:
    """Logits of the head's own states, or of others' under the frozen head."""
    weight, bias = head.weight, getattr(head, "bias", None)
    if hidden is not None:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    logits = F.linear(head.hidden if hidden is None else hidden.to(weight.dtype), weight, bias)
    logits = logits * getattr(head, "scale", 1.0)
    softcap = getattr(head, "softcap", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@register("dskd", paper=_PAPER, family="transport", status="source")
class DSKDLoss(nn.Module):
    """(1 - alpha) CE + alpha [CE(z') + D(student, z') + KL(teacher, z'')], each a mean over the
    selected rows.

    z' = the student's frozen head on `teacher_to_student`(teacher's states), which also learns from
    its own cross entropy and is a constant in D; z'' = the teacher's frozen head on
    `student_to_teacher`(student's states). No tau^2. `student` and `teacher` are heads: anything
    with `hidden` [B, L, d] and `weight` [V, d], and `bias`, `scale`, `softcap` where there are any;
    both models read the same tokens.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        kind: str = "forward_kl",
        temperature: float = 2.0,
        alpha: float = 0.5,
    ):
        super().__init__()
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.kind = kind
        self.temperature = temperature
        self.alpha = alpha
        self.teacher_to_student = Projector(teacher_dim, student_dim)
        self.student_to_teacher = Projector(student_dim, teacher_dim)

    def forward(
        self,
        student,
        teacher,
        labels: Tensor | None = None,  # (B, L)
        *,
        mask: Tensor | None = None,  # (B, L)
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "dskd")
        _check_head(student, "student", self.student_dim)
        _check_head(teacher, "teacher", self.teacher_dim)
        rows = selected(student.hidden, labels, mask, 2)
        count = rows.sum().clamp(min=1) if num_items is None else num_items
        own = _logits(student)
        in_student = _logits(student, self.teacher_to_student(teacher.hidden.detach()))
        in_teacher = _logits(teacher, self.student_to_teacher(student.hidden))
        options = {"temperature": self.temperature, "mask": rows, "num_items": count}
        space = label_cross_entropy(in_student, labels, rows, count)
        space = space + divergence(own, in_student.detach(), self.kind, **options)
        space = space + divergence(in_teacher, _logits(teacher).detach(), "forward_kl", **options)
        plain = label_cross_entropy(own, labels, rows, count)
        return (1 - self.alpha) * plain + self.alpha * space


@register("dskd_cma", paper=_PAPER, family="transport", status="source")
class DSKDCMALoss(DSKDLoss):
    """`DSKDLoss` for models with tokenizers of their own: attention between the two sequences takes
    the place of the projectors.

    With e = embeddings (input and target side by side, constants), attention is
    A = query(e_s) (e_t / std)' / sqrt(2 d_t) where both labels are valid. The teacher's states in
    the student's space are softmax_t(A) `teacher_to_student`(h_t / std + target embedding / std),
    the student's in the teacher's softmax_s(A') `student_to_teacher`(h_s). D counts only rows where
    z' names the label. Every term is a sum over tokens divided by the selected student rows.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        kind: str = "forward_kl",
        temperature: float = 2.0,
        alpha: float = 0.5,
    ):
        super().__init__(student_dim, teacher_dim, kind, temperature, alpha)
        self.query = Projector(2 * student_dim, 2 * teacher_dim)

    def forward(
        self,
        student,
        teacher,
        labels: Tensor | None = None,  # (B, L)
        *,
        teacher_labels: Tensor | None = None,  # (B, L')
        student_embeddings: Tensor | None = None,  # (B, L, 2 d)
        teacher_embeddings: Tensor | None = None,  # (B, L', 2 d')
        mask: Tensor | None = None,  # (B, L)
        teacher_mask: Tensor | None = None,  # (B, L')
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "dskd_cma")
        teacher_labels = needed(teacher_labels, "teacher_labels", "dskd_cma")
        e_s = needed(student_embeddings, "student_embeddings", "dskd_cma").detach()
        e_t = needed(teacher_embeddings, "teacher_embeddings", "dskd_cma").detach()
        _check_head(student, "student", self.student_dim)
        _check_head(teacher, "teacher", self.teacher_dim)
        for argument, given, side, width in (
            ("student_embeddings", e_s, student, 2 * self.student_dim),
            ("teacher_embeddings", e_t, teacher, 2 * self.teacher_dim),
        ):
            if given.shape != (*side.hidden.shape[:2], width):
                raise ValueError(
                    f"{argument}: expected [B, L, {width}] beside hidden "
                    f"{tuple(side.hidden.shape)}, got {tuple(given.shape)}"
                )
        rows = selected(student.hidden, labels, mask, 2)
        teacher_rows = selected(teacher.hidden, teacher_labels, teacher_mask, 2)
        count = rows.sum().clamp(min=1) if num_items is None else num_items
        scores = self.query(e_s) @ (e_t / e_t.std()).transpose(-1, -2)
        scores = scores / (2 * self.teacher_dim) ** 0.5
        scores = scores - 1e5 * ~(rows[:, :, None] & teacher_rows[:, None, :])
        h_t, target = teacher.hidden.detach(), e_t[..., self.teacher_dim :]
        values = self.teacher_to_student(h_t / h_t.std() + target / target.std())
        in_student = _logits(student, scores.softmax(-1) @ values)
        values = self.student_to_teacher(student.hidden)
        in_teacher = _logits(teacher, scores.transpose(-1, -2).softmax(-1) @ values)
        own = _logits(student)
        right = rows & (in_student.argmax(-1) == labels)
        options = {"temperature": self.temperature, "num_items": count}
        space = label_cross_entropy(in_student, labels, rows, count)
        space = space + divergence(own, in_student.detach(), self.kind, mask=right, **options)
        space = space + divergence(
            in_teacher, _logits(teacher).detach(), "forward_kl", mask=teacher_rows, **options
        )
        plain = label_cross_entropy(own, labels, rows, count)
        return (1 - self.alpha) * plain + self.alpha * space
