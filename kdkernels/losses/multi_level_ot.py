"""Multi-Level-OT: token-wise and sequence-wise transport on the most probable columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.sinkhorn import transport
from .registry import register
from .selection import selected, take, to_front, wide


@register(
    "multi_level_ot",
    paper="Cui et al., Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge "
    "Distillation, AAAI 2025",
    family="transport",
    status="source",
)
class MultiLevelOTLoss(nn.Module):
    """Rows are paired as in `ULDLoss`, brought to the front, zeros behind up to the longest answer
    of both sides; logits are divided by (their standard deviation + 1e-4) before softmax(/ tau).
    On the `columns` columns of largest total probability of either side,

        mean over sequences of the mean row L1
        + log_weight mean(- softmax(s) log softmax(t))           over all positions, padding too
        + sinkhorn_weight sum over sequences of the Sinkhorn cost of softmax(s / 2), softmax(t / 2)

    with L1 ground cost between positions, epsilon 0.1 and 10 iterations that end on the rows.

    `presort=True` sorts every row by itself first, as releases before 2026-02 did. Reading the
    longest answer synchronises on CUDA.
    """

    def __init__(
        self,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        columns: int = 50,
        log_weight: float = 0.1,
        sinkhorn_weight: float = 1e-4,
        presort: bool = False,
    ):
        super().__init__()
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.columns = columns
        self.log_weight = log_weight
        self.sinkhorn_weight = sinkhorn_weight
        self.presort = presort

    def forward(
        self,
        student: Tensor,  # (B, L, V)
        teacher: Tensor,  # (B, L', V')
        labels: Tensor | None = None,
        *,
        teacher_labels: Tensor | None = None,
        mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        order_s, count_s = to_front(selected(student, labels, mask, 2))
        order_t, count_t = to_front(selected(teacher, teacher_labels, teacher_mask, 2))
        longest = max(1, int(torch.maximum(count_s.max(), count_t.max())))
        width = min(self.columns, student.shape[-1], teacher.shape[-1])
        s = self._columns(student, order_s, count_s, longest, self.student_temperature, width)
        t = self._columns(teacher, order_t, count_t, longest, self.teacher_temperature, width)
        pairs = torch.minimum(count_s, count_t)
        inside = torch.arange(longest, device=s.device) < pairs[:, None]
        rows = torch.where(inside, (s - t).abs().sum(-1), 0.0)
        absolute = (rows.sum(1) / pairs.clamp(min=1)).sum() / (pairs > 0).sum().clamp(min=1)
        cross = -(s.softmax(-1) * t.log_softmax(-1)).sum(-1).mean()
        ones = s.new_ones(longest)
        plan_cost = transport(
            (s / 2).softmax(-1),
            (t / 2).softmax(-1),
            ones,
            ones,
            cost="l1",
            epsilon=0.1,
            iterations=10,
            order="columns",
        )
        return absolute + self.log_weight * cross + self.sinkhorn_weight * plan_cost.sum()

    def _columns(self, logits, order, count, longest: int, tau: float, width: int) -> Tensor:
        """(B, longest, width): probabilities of the largest columns, zeros behind the answer."""
        rows = wide(take(logits, order[:, :longest]))
        rows = rows / (rows.std(-1, keepdim=True) + 1e-4)
        p = (rows / tau).softmax(-1)
        if p.shape[1] < longest:
            p = torch.nn.functional.pad(p, (0, 0, 0, longest - p.shape[1]))
        inside = torch.arange(longest, device=p.device) < count[:, None]
        p = torch.where(inside[:, :, None], p, 0.0)
        if self.presort:
            p = p.sort(-1, descending=True).values
        best = p.detach().sum((0, 1)).argsort(dim=0, descending=True, stable=True)[:width]
        return p[:, :, best]
