"""SinKD: the samples of a batch are points, each one its class distribution."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.sinkhorn import transport
from .registry import register
from .selection import selected, wide


@register(
    "sinkd",
    paper="Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, COLING 2024",
    family="transport",
    status="source",
)
class SinKDLoss(nn.Module):
    """weight <P, C>, C_ij = ||softmax(z_i / tau) - softmax(a_j / tau)||_1 between all student and
    teacher rows of the batch, P after `iterations` of row and column normalisation to ones.

    No mean over the batch, no tau^2, no other term. Rows with label -100 or a false mask are no
    points. Defaults: the paper's BERT runs (its T0 runs use weight 0.0008).
    """

    def __init__(
        self,
        temperature: float = 2.0,
        epsilon: float = 0.1,
        iterations: int = 20,
        weight: float = 0.001,
    ):
        super().__init__()
        self.temperature = temperature
        self.epsilon = epsilon
        self.iterations = iterations
        self.weight = weight

    def forward(
        self,
        student: Tensor,  # (B, V)
        teacher: Tensor,  # (B, V)
        labels: Tensor | None = None,  # (B,)
        *,
        mask: Tensor | None = None,  # (B,)
    ) -> Tensor:
        if student.dim() != 2:
            raise ValueError(f"student: expected rows [B, V], got shape {tuple(student.shape)}")
        if labels is not None or mask is not None:
            chosen = selected(student, labels, mask, 1)
            student, teacher = student[chosen], teacher[chosen]
        p = (wide(student) / self.temperature).softmax(-1)
        q = (wide(teacher) / self.temperature).softmax(-1)
        ones = p.new_ones(p.shape[0])
        return self.weight * transport(
            p, q, ones, ones, cost="l1", epsilon=self.epsilon, iterations=self.iterations
        )
