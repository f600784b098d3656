"""Transport between the features of a batch: what is known of WCoRD's local part."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.sinkhorn import transport
from .registry import register


@register(
    "feature_transport",
    paper="after Chen et al., Wasserstein Contrastive Representation Distillation, CVPR 2021",
    family="transport",
    status="unseen",
)
class FeatureTransportLoss(nn.Module):
    """Sharp transport cost between student and teacher features [B, d], cosine ground cost, uniform
    marginals. With `student_dim` and `teacher_dim`, `projector` is applied to the student."""

    def __init__(
        self,
        epsilon: float = 0.1,
        iterations: int = 50,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ):
        super().__init__()
        if (student_dim is None) != (teacher_dim is None):
            raise ValueError("student_dim, teacher_dim: give both or neither")
        self.epsilon = epsilon
        self.iterations = iterations
        self.projector = None if student_dim is None else nn.Linear(student_dim, teacher_dim)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.projector is not None:
            student = self.projector(student)
        return transport(
            student, teacher, cost="cosine", epsilon=self.epsilon, iterations=self.iterations
        ).mean()
