"""On-policy losses whose teacher knows more, or is a preference-tuned model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..inputs import Clip, LogitMix
from .needed import needed
from .registry import register
from .rows import chosen_rows


@register(
    "opsd",
    paper="Zhao et al., Self-Distilled Reasoner, 2026",
    family="divergence",
)
class OPSDLoss(nn.Module):
    """Jensen-Shannon divergence (beta 0 forward KL, 1 reverse KL), no tau^2.

    clip bounds every vocabulary entry's summand (kd.Clip(element=clip)); compat=True: the raw
    summand, as released. top_k: both rows renormalised on the teacher's top_k entries.
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.1,
        clip: float | None = None,
        top_k: int | None = None,
        compat: bool = False,
    ):
        super().__init__()
        self.beta, self.temperature, self.clip = beta, temperature, clip
        self.top_k, self.compat = top_k, compat

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        support = None
        if self.top_k is not None:
            support = (teacher.detach().topk(self.top_k, -1).indices, "renormalize_both")
        return divergence(
            student,
            teacher,
            "jensen_shannon",
            beta=self.beta,
            temperature=self.temperature,
            clip=None if self.clip is None else Clip(element=self.clip, signed=self.compat),
            support=support,
            labels=labels,
            mask=mask,
            num_items=num_items,
        )


MODES = ("aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive")


@register(
    "aligndistil",
    paper="Zhang et al., AlignDistil, ACL 2025",
    family="divergence",
)
class AlignDistilLoss(nn.Module):
    """Reverse KL to an extrapolation from the reference b through the preference-tuned teacher a.

    Rows: s KL(q, r), r = softmax(l / kd_temperature), w = beta2 sum |p_a - p_b| + 1e-3:
        aligndistil        l = a + w (a - b),      s = beta / w
        theorem1_adaptive  l = w a + (1 - w) b,    s = beta / w
        theorem1           l = v a + (1 - v) b,    s = beta2, v = beta / beta2
        theorem1_contrast  l = a + v (a - b),      s = beta2
    Mean (sum without length_normalize) over each sequence's rows, then over the sequences. No
    gradient through w and r.
    """

    def __init__(
        self,
        beta: float = 0.1,
        beta2: float = 10.0,
        kd_temperature: float = 1.0,
        mode: str = "aligndistil",
        length_normalize: bool = True,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.beta, self.beta2, self.kd_temperature = beta, beta2, kd_temperature
        self.mode, self.length_normalize = mode, length_normalize

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        reference: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: int | float | Tensor | None = None,  # in place of the number of sequences
    ) -> Tensor:
        teacher = teacher.detach()
        reference = needed(reference, "reference", "aligndistil").detach()
        chosen = chosen_rows(student, labels, mask)
        weight: float | Tensor = self.beta / self.beta2
        scale: float | Tensor = self.beta2
        if self.mode in ("aligndistil", "theorem1_adaptive"):
            apart = divergence(teacher, reference, "total_variation", mask=chosen, reduction="none")
            weight = self.beta2 * 2 * apart + 1e-3
            scale = self.beta / weight
        if self.mode in ("theorem1", "theorem1_adaptive"):
            mix = LogitMix([(weight, teacher), (1.0 - weight, reference)])
        else:
            mix = LogitMix([(1.0 + weight, teacher), (-weight, reference)])
        rows = divergence(
            student,
            mix,
            "reverse_kl",
            teacher_temperature=self.kd_temperature,
            mask=chosen,
            reduction="none",
        )
        rows = torch.where(chosen, scale * rows, 0.0).reshape(max(1, rows.shape[0]), -1)
        counts = chosen.reshape(rows.shape).sum(-1)
        totals = rows.sum(-1) / counts.clamp(min=1) if self.length_normalize else rows.sum(-1)
        if num_items is None:
            num_items = (counts > 0).sum().clamp(min=1) if self.length_normalize else len(rows)
        return totals.sum() / num_items
