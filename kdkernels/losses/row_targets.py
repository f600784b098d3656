"""Losses that change a row before or after its softmax: temperatures, targets, windows, cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.token_stats import label_log_probs
from ..ops.common import compute_dtype
from .needed import needed
from .registry import register
from .rows import chosen_rows, mean_rows, zero_rest


def _wide(logits: Tensor) -> Tensor:
    return logits.to(compute_dtype(logits))


@register(
    "confidence_weighted_labels",
    aliases=("cwtm",),
    paper="Furlanello et al., Born-Again Neural Networks, ICML 2018",
    family="divergence",
    status="secondary",
)
class ConfidenceWeightedLabelsLoss(nn.Module):
    """sum_i w_i CE_i with w_i = max p_i / sum of max p over the selected rows (or num_items)."""

    def forward(
        self,
        student: Tensor,  # [..., V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "confidence_weighted_labels")
        nll = -label_log_probs(student, labels, mask=mask)
        chosen = chosen_rows(student, labels, mask)
        top = torch.where(chosen, teacher.detach().argmax(-1), -100)
        confidence = torch.where(chosen, label_log_probs(teacher.detach(), top).exp(), 0.0)
        confidence = confidence.to(nll.dtype)
        total = (confidence * nll).sum()
        if num_items is not None:
            return total / num_items
        divisor = confidence.sum()
        return total / torch.where(divisor > 0, divisor, 1.0)


@register(
    "permuted_targets",
    aliases=("dkpp",),
    paper="Furlanello et al., Born-Again Neural Networks, ICML 2018",
    family="divergence",
    status="secondary",
)
class PermutedTargetsLoss(nn.Module):
    """Cross entropy to p with all entries of a row but the largest permuted at random."""

    def __init__(self, generator: torch.Generator | None = None):
        super().__init__()
        self.generator = generator

    def permuted(self, teacher: Tensor) -> Tensor:
        """The teacher's logits with all but each row's largest permuted."""
        width = teacher.shape[-1]
        top = teacher.argmax(-1, keepdim=True)
        noise = torch.rand(teacher.shape, generator=self.generator, device=teacher.device)
        order = noise.scatter(-1, top, -1.0).argsort(-1)  # the largest comes first and stays
        places = torch.arange(width - 1, device=teacher.device).expand(*top.shape[:-1], width - 1)
        places = places + (places >= top)
        return teacher.scatter(-1, places, teacher.gather(-1, order[..., 1:]))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        target = self.permuted(teacher.detach())
        return divergence(
            student, target, "cross_entropy", labels=labels, mask=mask, num_items=num_items
        )


@register(
    "dkd",
    paper="Zhao et al., Decoupled Knowledge Distillation, CVPR 2022",
    family="divergence",
)
class DKDLoss(nn.Module):
    """tau^2 mean of alpha KL of the two cells (label, rest) + beta KL of the rows renormalised
    without the label."""

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0):
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def _split(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(logits without the label's, the two cells' logits at tau 1)."""
        rest = logits.scatter(-1, index, -torch.inf)
        wide = _wide(logits) / self.temperature
        others = (_wide(rest) / self.temperature).logsumexp(-1, keepdim=True)
        return rest, torch.cat((wide.gather(-1, index), others), -1)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "dkd")
        index = labels.clamp(min=0)[..., None]
        rows = {"labels": labels, "mask": mask, "num_items": num_items}
        chosen = chosen_rows(student, labels, mask)
        rest, cells = self._split(zero_rest(student, chosen), index)
        teacher_rest, teacher_cells = self._split(teacher.detach(), index)
        target = divergence(cells, teacher_cells, "forward_kl", **rows)
        others = divergence(rest, teacher_rest, "forward_kl", temperature=self.temperature, **rows)
        return self.temperature**2 * (self.alpha * target + self.beta * others)


@register(
    "ctkd",
    paper="Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023",
    family="divergence",
)
class CTKDLoss(nn.Module):
    """tau^2 KL(p, q) at tau = start + span sigmoid(theta), where theta climbs the loss: its
    gradient is multiplied by -(1 - cos(pi min(k / ramp_steps, 1))) / 2 after k calls of step()."""

    def __init__(self, start: float = 1.0, span: float = 20.0, ramp_steps: int = 10):
        super().__init__()
        self.start, self.span, self.ramp_steps = start, span, ramp_steps
        self.theta = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def step(self) -> None:
        """Once an optimiser step."""
        self.steps += 1

    def temperature(self) -> Tensor:
        progress = (self.steps / self.ramp_steps).clamp(max=1.0)
        reversal = (-(1 - torch.cos(math.pi * progress)) / 2).to(self.theta.dtype)
        part = self.theta * reversal
        theta = part + (self.theta - part).detach()
        return self.start + self.span * torch.sigmoid(theta)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return divergence(
            student, teacher, "forward_kl", temperature=self.temperature(),
            temperature_squared=True, labels=labels, mask=mask, num_items=num_items,
        )  # fmt: skip


@register(
    "dtkd",
    paper="Wei and Bai, Dynamic Temperature Knowledge Distillation, 2024",
    family="divergence",
)
class DTKDLoss(nn.Module):
    """D(kind) at tau_s = 2 max z / (max z + max a), tau_t = 2 max a / (max z + max a), with
    gradient through the maxima, which must be positive; no tau^2."""

    def __init__(self, kind: str = "forward_kl"):
        super().__init__()
        self.kind = kind

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        chosen = chosen_rows(student, labels, mask)
        top = _wide(zero_rest(student, chosen).amax(-1))
        other = _wide(teacher.detach().amax(-1))
        one = torch.ones((), dtype=top.dtype, device=top.device)
        top, other = torch.where(chosen, top, one), torch.where(chosen, other, one)
        total = top + other
        return divergence(
            student, teacher, self.kind, temperature=2 * top / total,
            teacher_temperature=2 * other / total, labels=labels, mask=mask, num_items=num_items,
        )  # fmt: skip


@register(
    "dist",
    paper="Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022",
    family="divergence",
)
class DISTLoss(nn.Module):
    """beta mean over rows of 1 - Pearson(q, p) + gamma mean over columns of the same; rows [N, V],
    no tau^2."""

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0):
        super().__init__()
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    @staticmethod
    def _distance(x: Tensor, y: Tensor) -> Tensor:
        """1 - cosine over the last dimension; the release's 1e-8 beside the norms."""
        norms = (x * x).sum(-1).sqrt() * (y * y).sum(-1).sqrt()
        return 1 - (x * y).sum(-1) / (norms + 1e-8)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        chosen = chosen_rows(student, labels, mask).reshape(-1)
        zero = torch.zeros((), dtype=compute_dtype(student), device=student.device)

        def softmax(logits):
            wide = _wide(logits).reshape(-1, logits.shape[-1]) / self.temperature
            return torch.where(chosen[:, None], wide, zero).softmax(-1)

        q, p = softmax(student), softmax(teacher.detach())
        rows = self._distance(q - q.mean(-1, keepdim=True), p - p.mean(-1, keepdim=True))
        loss = self.beta * mean_rows(rows, chosen, num_items)
        count = chosen.sum().clamp(min=1)

        def columns(x):
            x = torch.where(chosen[:, None], x, zero)
            return torch.where(chosen[:, None], x - x.sum(0) / count, zero).mT

        between = self._distance(columns(q), columns(p)).mean()
        return loss + torch.where(chosen.any(), self.gamma * between, zero)


@register(
    "ofa_kd",
    paper="Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures in "
    "Knowledge Distillation, NeurIPS 2023",
    family="divergence",
)
class OFAKDLoss(nn.Module):
    """Mean over rows of - sum t log q, t_j = (p_j + 1[j=y])^exponent - 1[j=y]; no tau^2. The
    student may be a list of stages, which are summed."""

    def __init__(self, exponent: float = 1.0, temperature: float = 1.0):
        super().__init__()
        self.exponent, self.temperature = exponent, temperature

    def forward(
        self,
        student: Tensor | list[Tensor],
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "ofa_kd")
        stages = list(student) if isinstance(student, (tuple, list)) else [student]
        chosen = chosen_rows(stages[0], labels, mask)
        index = labels.clamp(min=0)[..., None]
        p = (_wide(teacher.detach()) / self.temperature).softmax(-1)
        hot = torch.zeros_like(p).scatter(-1, index, 1.0)
        target = (p + hot) ** self.exponent - hot
        loss = 0.0
        for stage in stages:
            log_q = (_wide(zero_rest(stage, chosen)) / self.temperature).log_softmax(-1)
            terms = torch.where(target != 0, target * log_q, torch.zeros_like(log_q))
            loss = loss - mean_rows(terms.sum(-1), chosen, num_items)
        return loss


@register(
    "windowed_kl",
    paper="after Liu et al., Multi-Granularity Semantic Revision for Large Language Model "
    "Distillation, 2024 (which learns the bounds)",
    family="divergence",
    status="unseen",
)
class WindowedKLLoss(nn.Module):
    """KL(p, q) with both rows renormalised on the entries with lower <= p <= upper and the label's;
    bounds are numbers or tensors [...], constants."""

    def __init__(self, lower: float | Tensor = 0.0, upper: float | Tensor = 1.0):
        super().__init__()
        self.lower, self.upper = lower, upper

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        p = _wide(teacher.detach()).softmax(-1)
        lower, upper = (
            bound.detach()[..., None] if isinstance(bound, Tensor) else bound
            for bound in (self.lower, self.upper)
        )
        inside = (p >= lower) & (p <= upper)
        if labels is not None:
            index = labels.clamp(min=0)[..., None]
            inside = inside.scatter(-1, index, True)
        return divergence(
            student.masked_fill(~inside, -torch.inf),
            teacher.detach().masked_fill(~inside, -torch.inf),
            "forward_kl", labels=labels, mask=mask, num_items=num_items,
        )  # fmt: skip
