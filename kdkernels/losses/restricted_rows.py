"""Losses on a part of the vocabulary: stored teachers, the student's or teacher's top entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.mixed_teacher import log_softmax
from ..functional.support import Cells
from ..functional.token_stats import label_log_probs
from .needed import needed
from .policy import clipped_ratio, sampling_log_probs
from .registry import register
from .rows import RowLoss, chosen_rows, mean_rows

Items = int | float | Tensor | None


@register(
    "random_sampling_kd",
    paper="Anshumann et al., Sparse Logit Sampling, ACL 2025",
    family="divergence",
    status="paper",
)
class RandomSamplingKDLoss(RowLoss):
    """Cross entropy to sampled teacher entries that are not renormalised (kd.TopK(form="probs",
    tail="ignore")), + label_weight x label cross entropy."""

    kind = "cross_entropy"

    def __init__(self, label_weight: float = 0.0):
        super().__init__(label_weight=label_weight)


@register("text2token", paper="Text2Token, 2025", family="divergence", status="secondary")
class Text2TokenLoss(RowLoss):
    """Forward KL to a stored distribution over tokens, kd.TopK(form="probs",
    tail="renormalize")."""

    def __init__(self):
        super().__init__()


@register("sdft", paper="SDFT, as in TRL", family="divergence")
class SDFTLoss(nn.Module):
    """Jensen-Shannon divergence (beta = alpha) on the student's top_k entries, both rows
    renormalised on them, or with a tail cell (add_tail).

    With old_log_probs, the labels' log-probabilities under the model that drew them, each row times
    min(exp(clamp(log q_y - old, +-20)), is_clip), a constant.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        top_k: int = 100,
        add_tail: bool = False,
        is_clip: float = 2.0,
    ):
        super().__init__()
        self.alpha, self.top_k = alpha, top_k
        self.add_tail, self.is_clip = add_tail, is_clip

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        old_log_probs: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: Items = None,
    ) -> Tensor:
        rows = {"labels": labels, "mask": mask}
        ids = student.detach().topk(min(self.top_k, student.shape[-1]), -1).indices
        weight = None
        if old_log_probs is not None:
            needed(labels, "labels", "sdft with old_log_probs")
            log_q = label_log_probs(student.detach(), labels, mask=mask)
            old = sampling_log_probs(
                old_log_probs, chosen_rows(student, labels, mask), log_q, "sdft"
            )
            weight = clipped_ratio(log_q, old, self.is_clip)
        return divergence(
            student,
            teacher,
            "jensen_shannon",
            beta=self.alpha,
            support=(ids, "bucket" if self.add_tail else "renormalize_both"),
            weight=weight,
            num_items=num_items,
            **rows,
        )


SD_ZERO_KINDS = ("mixed", "forward", "reverse")


@register("sd_zero", paper="Self-Distillation Zero, 2026", family="divergence")
class SDZeroLoss(nn.Module):
    """weight KL(p, q) + (1 - weight) KL(q, p) on the teacher's k largest entries, both rows
    renormalised on them; kind "forward" or "reverse" is one of the two alone.

    zero_outside: the student whole, and log p of every other entry = floor in the reverse part:
    sum q log q - sum_K q log p - floor (1 - Q_K), p renormalised on the k entries.
    """

    def __init__(
        self,
        k: int = 64,
        kind: str = "mixed",
        weight: float = 0.5,
        zero_outside: bool = False,
        floor: float = -100.0,
    ):
        super().__init__()
        if kind not in SD_ZERO_KINDS:
            raise ValueError(f"kind: expected one of {', '.join(SD_ZERO_KINDS)}, got {kind!r}")
        self.k, self.kind, self.weight = k, kind, weight
        self.zero_outside, self.floor = zero_outside, floor

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: Items = None,
    ) -> Tensor:
        forward = {"mixed": self.weight, "forward": 1.0, "reverse": 0.0}[self.kind]
        ids = teacher.detach().topk(min(self.k, teacher.shape[-1]), -1).indices
        rows = {"labels": labels, "mask": mask, "num_items": num_items}
        if not self.zero_outside:
            kind = (("forward_kl", forward), ("reverse_kl", 1.0 - forward))
            return divergence(student, teacher, kind, support=(ids, "renormalize_both"), **rows)
        total = None
        if forward:
            total = forward * divergence(
                student, teacher, "forward_kl", support=(ids, "renormalize"), **rows
            )
        if forward == 1.0:
            return total
        chosen = chosen_rows(student, labels, mask)
        cells = Cells(ids, "bucket", student.shape[-1], chosen)
        keep = chosen.unsqueeze(-1)  # torch's derivative of other rows must not be 0 * NaN
        log_q = log_softmax(cells.logits(torch.where(keep, student, 0.0), 1.0, True))
        log_p = torch.where(keep, teacher, 0.0).gather(-1, ids).to(log_q.dtype).log_softmax(-1)
        outside = torch.full_like(log_q[..., log_p.shape[-1] :], self.floor)
        target = torch.cat([log_p, outside], -1)
        entropy = divergence(student, None, "entropy", mask=chosen, reduction="none")
        reverse = -entropy - (log_q.exp() * target).sum(-1)
        reverse = (1.0 - forward) * mean_rows(reverse, chosen, num_items)
        return reverse if total is None else total + reverse
