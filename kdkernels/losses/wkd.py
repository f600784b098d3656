"""WKD: Wasserstein distance between class distributions (L) and between feature Gaussians (F)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.sinkhorn import sinkhorn
from .registry import register
from .selection import wide

_PAPER = "Lv et al., Wasserstein Distance Rivals Kullback-Leibler Divergence, NeurIPS 2024"


@register("wkd_l", paper=_PAPER, family="transport", status="source")
class WKDLLoss(nn.Module):
    """- mean p_y log q_y (tau 1) + weight x mean transport cost between the softmaxes at tau over
    the other classes, ground cost relu(cost) + 1e-8 shared by the batch.

    The label's class is left out by a marginal of zero. `compat=True` adds the release's 1e-8 to
    the divisors, which moves gradients by up to a percent. Defaults: the ImageNet runs.
    """

    def __init__(
        self,
        cost: Tensor,  # (C, C)
        temperature: float = 2.0,
        weight: float = 30.0,
        epsilon: float = 0.05,
        iterations: int = 10,
        compat: bool = False,
    ):
        super().__init__()
        if cost.dim() != 2 or cost.shape[0] != cost.shape[1]:
            raise ValueError(f"cost: expected [C, C], got shape {tuple(cost.shape)}")
        self.register_buffer("cost", cost)
        self.temperature = temperature
        self.weight = weight
        self.epsilon = epsilon
        self.iterations = iterations
        self.compat = compat

    def forward(
        self,
        student: Tensor,  # (B, C)
        teacher: Tensor,  # (B, C)
        labels: Tensor | None = None,  # (B,)
    ) -> Tensor:
        if labels is None:
            raise ValueError("labels: needed, the label's class is left out of the transport")
        z, a = wide(student), wide(teacher)
        at = labels.unsqueeze(-1)
        target = -(a.softmax(-1).gather(1, at) * z.log_softmax(-1).gather(1, at)).mean()
        own = torch.zeros_like(z, dtype=torch.bool).scatter(1, at, True)
        q = (z.masked_fill(own, -torch.inf) / self.temperature).softmax(-1)
        p = (a.masked_fill(own, -torch.inf) / self.temperature).softmax(-1)
        rows = sinkhorn(
            self.cost.to(z.dtype).relu() + 1e-8,
            q,
            p,
            epsilon=self.epsilon,
            iterations=self.iterations,
            order="columns",
            denominator=1e-8 if self.compat else 0.0,
        )
        return target + self.weight * rows.mean()


@register("wkd_f", paper=_PAPER, family="transport", status="source")
class WKDFLoss(nn.Module):
    """weight x mean over the batch and grid x grid cells of mean_weight sum_c (mean difference)^2 +
    sum_c (standard deviation difference)^2: the Wasserstein distance of Gaussians with diagonal
    covariance. Deviations are sqrt(unbiased variance + 1e-5) over space.

    With `student_dim` and `teacher_dim`, `projector` is a 1 x 1 convolution on the student.
    """

    def __init__(
        self,
        mean_weight: float = 2.0,
        weight: float = 0.02,
        grid: int = 1,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ):
        super().__init__()
        if (student_dim is None) != (teacher_dim is None):
            raise ValueError("student_dim, teacher_dim: give both or neither")
        self.mean_weight = mean_weight
        self.weight = weight
        self.grid = grid
        self.projector = None if student_dim is None else nn.Conv2d(student_dim, teacher_dim, 1)

    def forward(
        self,
        student: Tensor,  # (B, C, H, W)
        teacher: Tensor,  # (B, C, H, W)
        labels: Tensor | None = None,
    ) -> Tensor:
        if self.projector is not None:
            student = self.projector(student)
        if student.shape != teacher.shape or student.dim() != 4:
            raise ValueError(
                f"teacher: expected maps [B, C, H, W] of the student's shape "
                f"{tuple(student.shape)}, got {tuple(teacher.shape)}"
            )
        mean_s, sd_s = self._moments(wide(student))
        mean_t, sd_t = self._moments(wide(teacher))
        cells = self.mean_weight * (mean_s - mean_t).square() + (sd_s - sd_t).square()
        return self.weight * cells.sum(1).mean()

    def _moments(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each cell, (B, C, cells)."""
        batch, channels, height, width = maps.shape
        g = self.grid
        if height % g or width % g:
            raise ValueError(f"grid: expected a divisor of the maps' {height} x {width}, got {g}")
        cells = maps.reshape(batch, channels, g, height // g, g, width // g)
        cells = cells.transpose(3, 4).reshape(batch, channels, g * g, -1)
        return cells.mean(-1), (cells.var(-1) + 1e-5).sqrt()
