"""Token relationship graphs: local neighbourhoods, global matching, relations inside an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.contrastive import contrastive
from ..functional.relation import relation
from .needed import needed
from .registry import register


@register(
    "trg",
    paper="Zhang et al., Knowledge Distillation via Token-level Relationship Graph, 2023",
    family="relation",
    status="secondary",
)
class TRGLoss(nn.Module):
    """local_weight KL(student, teacher) of softmaxed k-nearest-neighbour graphs with weights
    exp(-|x_i - x_j|^2 / (2 sigma)), mean over tokens (the direction is unconfirmed) +
    global_weight InfoNCE of student against teacher tokens at 1 / temperature + inner_weight MSE of
    the softmaxed token relations of each image. O(N k) memory."""

    def __init__(
        self,
        k: int = 8,
        sigma: float = 1.0,
        temperature: float = 0.1,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        inner_weight: float = 1.0,
    ):
        super().__init__()
        self.k, self.sigma, self.temperature = k, sigma, temperature
        self.local_weight = local_weight
        self.global_weight = global_weight
        self.inner_weight = inner_weight

    def forward(
        self,
        student: Tensor,  # (N, d); for the global term as wide as the teacher's
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        student_hidden: Tensor | None = None,  # (B, T, d)
        teacher_hidden: Tensor | None = None,
    ) -> Tensor:
        loss = student.new_zeros((), dtype=torch.float32)
        if self.local_weight:
            loss = loss + self.local_weight * self._local(student, teacher.detach())
        if self.global_weight:
            loss = loss + self.global_weight * contrastive(
                F.normalize(student, dim=-1),
                F.normalize(teacher.detach(), dim=-1),
                scale=1.0 / self.temperature,
            )
        if self.inner_weight:
            loss = loss + self.inner_weight * relation(
                needed(student_hidden, "student_hidden", "trg"),
                needed(teacher_hidden, "teacher_hidden", "trg").detach(),
                "softmax_mse",
                normalization="pairs",
            )
        return loss

    def _local(self, student: Tensor, teacher: Tensor) -> Tensor:
        n = student.shape[0]
        if not 1 <= self.k < n:
            raise ValueError(f"k: expected 1 to {n - 1} neighbours of {n} tokens, got {self.k}")
        near_s, near_t = self._neighbours(student), self._neighbours(teacher)
        # Edges of either graph: the student's, then the teacher's that the student lacks.
        new = ~(near_t[:, :, None] == near_s[:, None, :]).any(-1)
        union = torch.cat([near_s, near_t], 1)
        counted = torch.cat([torch.ones_like(new), new], 1)
        in_s = torch.cat([torch.ones_like(new), ~new], 1)
        in_t = (union[:, :, None] == near_t[:, None, :]).any(-1)
        a_s = self._weights(student, union) * in_s
        a_t = self._weights(teacher, union) * in_t
        rest = n - counted.sum(-1)
        total_s = torch.where(counted, a_s.exp(), 0.0).sum(-1) + rest
        total_t = torch.where(counted, a_t.exp(), 0.0).sum(-1) + rest
        shift = (total_t / total_s).log()
        edges = a_s.exp() / total_s[:, None] * (a_s - a_t + shift[:, None])
        return (torch.where(counted, edges, 0.0).sum(-1) + rest / total_s * shift).mean()

    def _weights(self, x: Tensor, index: Tensor) -> Tensor:
        squared = (x[:, None, :] - x[index]).square().sum(-1)
        return (-squared / (2 * self.sigma)).exp()

    @torch.no_grad()
    def _neighbours(self, x: Tensor) -> Tensor:
        """(N, k) nearest others, 64 rows at a time."""
        out = []
        for start in range(0, x.shape[0], 64):
            distance = torch.cdist(x[start : start + 64], x)
            rows = torch.arange(distance.shape[0], device=x.device)
            distance[rows, rows + start] = torch.inf
            out.append(distance.topk(self.k, largest=False).indices)
        return torch.cat(out)
