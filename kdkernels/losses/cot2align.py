"""CoT2Align: transport between the states of two sequences of different length."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.sinkhorn import transport
from .registry import register
from .selection import selected, take, to_front


@register(
    "cot2align",
    paper="Le et al., CoT2Align, arXiv 2502.16806",
    family="transport",
    status="source",
)
class CoT2AlignLoss(nn.Module):
    """weight x mean over sequences of the sharp transport cost between valid student and teacher
    states, uniform marginals; columns first, 1e-9 in the divisors.

    With `student_dim` and `teacher_dim`, `projector` maps teacher states to the student's width.
    A label of -100 or a false mask takes a position out. The defaults' epsilon of 10 against a cost
    in [0, 1] makes the plan nearly uniform, as in the release.
    """

    def __init__(
        self,
        epsilon: float = 10.0,
        iterations: int = 100,
        cost: str = "dot_softmax",
        weight: float = 0.25,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ):
        super().__init__()
        if (student_dim is None) != (teacher_dim is None):
            raise ValueError("student_dim, teacher_dim: give both or neither")
        self.epsilon = epsilon
        self.iterations = iterations
        self.cost = cost
        self.weight = weight
        self.projector = None if student_dim is None else nn.Linear(teacher_dim, student_dim)

    def forward(
        self,
        student: Tensor,  # (B, N, d)
        teacher: Tensor,  # (B, M, d')
        labels: Tensor | None = None,  # (B, N)
        *,
        mask: Tensor | None = None,  # (B, N)
        teacher_mask: Tensor | None = None,  # (B, M)
    ) -> Tensor:
        if student.dim() != 3 or teacher.dim() != 3:
            raise ValueError(
                f"student, teacher: expected states [B, N, d], got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}"
            )
        if self.projector is not None:
            teacher = self.projector(teacher)
        order_s, count_s = to_front(selected(student, labels, mask, 2))
        order_t, count_t = to_front(selected(teacher, None, teacher_mask, 2))
        values = transport(
            take(student, order_s),
            take(teacher, order_t),
            cost=self.cost,
            epsilon=self.epsilon,
            iterations=self.iterations,
            order="columns",
            denominator=1e-9,
            student_lengths=count_s,
            teacher_lengths=count_t,
        )
        return self.weight * values.mean()
