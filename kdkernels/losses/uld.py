"""Universal logit distillation: sorted probabilities of two vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.sorted_transport import sorted_transport
from .registry import register
from .selection import selected, take, to_front


@register(
    "uld",
    paper="Boizard et al., Towards Cross-Tokenizer Distillation, TMLR 2025",
    family="transport",
    status="source",
)
class ULDLoss(nn.Module):
    """Mean over sequences of the mean over k of sum_r |p_(r) - q_(r)|, between the k-th selected
    student row and the k-th selected teacher row, k below the smaller count.

    The last selected row is dropped first where EOS is skipped. A sequence without a pair does not
    count. No cross entropy. `num_items` replaces the number of sequences.
    """

    def __init__(
        self,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        skip_student_eos: bool = False,
        skip_teacher_eos: bool = False,
    ):
        super().__init__()
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.skip_student_eos = skip_student_eos
        self.skip_teacher_eos = skip_teacher_eos

    def forward(
        self,
        student: Tensor,  # (B, L, V)
        teacher: Tensor,  # (B, L', V')
        labels: Tensor | None = None,  # (B, L)
        *,
        teacher_labels: Tensor | None = None,  # (B, L')
        mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        if student.dim() != 3 or teacher.dim() != 3:
            raise ValueError(
                f"student, teacher: expected [B, L, V], got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}"
            )
        order_s, count_s = to_front(selected(student, labels, mask, 2))
        order_t, count_t = to_front(selected(teacher, teacher_labels, teacher_mask, 2))
        if self.skip_student_eos:
            count_s = (count_s - 1).clamp(min=0)
        if self.skip_teacher_eos:
            count_t = (count_t - 1).clamp(min=0)
        pairs = torch.minimum(count_s, count_t)  # (B,)
        length = min(student.shape[1], teacher.shape[1])
        inside = torch.arange(length, device=student.device) < pairs[:, None]
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        sequences = (pairs > 0).sum().clamp(min=1) if num_items is None else num_items
        share = 1.0 / (pairs.clamp(min=1).to(dtype) * sequences)
        return sorted_transport(
            take(student, order_s[:, :length]),
            take(teacher, order_t[:, :length]),
            temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            mask=inside,
            weight=share[:, None].expand(-1, length),
            reduction="sum",
        )
