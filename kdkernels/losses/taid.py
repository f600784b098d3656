"""TAID: a target that moves from the student to the teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..inputs import STUDENT, LogitMix
from .registry import register


@register(
    "taid",
    paper="Shing et al., TAID: Temporally Adaptive Interpolated Distillation, ICLR 2025",
    family="divergence",
)
class TAIDLoss(nn.Module):
    """Cross entropy to softmax((1 - t) sg(z) + t a); t goes from t_start to t_end.

    forward records its value (in training mode); step(), once an optimiser step, moves the buffer
    `t`. The first call only remembers the loss; the k-th has progress (k - 1) / total_steps and
    takes the larger of the linear t_start + (t_end - t_start) progress and t + alpha sigma(m) (1 -
    t), m the momentum (beta) of the loss's relative fall, at most t_end. `disable_adaptive` leaves
    the linear part alone.
    """

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        total_steps: int | None = None,
        disable_adaptive: bool = False,
    ):
        super().__init__()
        self.t_start, self.t_end, self.alpha, self.beta = t_start, t_end, alpha, beta
        self.total_steps = total_steps
        self.disable_adaptive = disable_adaptive
        for name, start in (("t", t_start), ("steps", 0.0), ("previous", 0.0), ("momentum", 0.0)):
            self.register_buffer(name, torch.tensor(start, dtype=torch.float64))
        self._recorded: Tensor | None = None

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        mix = LogitMix([(1.0 - self.t, STUDENT), (self.t.clone(), teacher.detach())])
        value = divergence(
            student, mix, "cross_entropy", labels=labels, mask=mask, num_items=num_items
        )
        if self.training:
            self._recorded = value.detach()
        return value

    def step(self) -> None:
        """Move t by the last recorded loss.

        Raises:
            ValueError: without total_steps, or before a forward in training mode.
        """
        if self.total_steps is None:
            raise ValueError("total_steps: taid needs it to move t, got None")
        if self._recorded is None:
            raise ValueError("taid: step() before a forward in training mode")
        value = self._recorded.to(self.previous)
        first = self.steps == 0
        fall = (self.previous - value) / (self.previous + 1e-15)
        momentum = self.beta * self.momentum + (1 - self.beta) * fall
        t = self.t_start + (self.t_end - self.t_start) * self.steps / self.total_steps
        if not self.disable_adaptive:
            moved = self.t + self.alpha * torch.sigmoid(momentum) * (1 - self.t)
            t = torch.maximum(t, moved)
            self.momentum.copy_(torch.where(first, self.momentum, momentum))
        t = t.clamp(min=self.t_start, max=self.t_end)
        self.t.copy_(torch.where(first, self.t, t))
        self.previous.copy_(value)
        self.steps += 1
