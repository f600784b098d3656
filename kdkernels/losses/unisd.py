"""UniSD: self-distillation from several contexts, rows weighted by their agreement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.feature import feature
from ..functional.reduction import row_quantile
from .needed import needed
from .registry import register
from .selection import selected

AGREEMENTS = (None, "var", "range", "sequence")


@register("unisd", paper="UniSD, 2026", family="divergence")
class UniSDLoss(nn.Module):
    """Mean over sequences of sum_i w_i min(D_i, c) / max(sum_i w_i, 1) over the selected rows.

    Args:
        alpha: 0 forward_kl, 1 reverse_kl, else jensen_shannon with beta = alpha.
        clip: c; clip_quantile: c is that quantile of the selected D instead, at least 1e-6.
        agreement: w from sample_log_probs [K, B, L], the labels' log-probabilities under K
            contexts: "var" (unbiased) or "range" over K give d; w = 1 / (1 + gamma min(d / q, 10)),
            at least 0.01, q the `agreement_quantile` of d over the selected rows, at least 1e-6;
            "sequence": d = population variance over K of the sequences' mean log-probabilities, w =
            exp(-gamma d), at least 1e-6; None: w = 1. Weights are constants.
        hidden_weight: + hidden_weight x MSE(student_hidden, teacher_hidden) over the same rows.
    """

    def __init__(
        self,
        alpha: float = 0.0,
        clip: float | None = 10.0,
        clip_quantile: float | None = None,
        agreement: str | None = None,
        gamma: float = 1.0,
        agreement_quantile: float = 0.95,
        hidden_weight: float = 0.0,
    ):
        super().__init__()
        if agreement not in AGREEMENTS:
            raise ValueError(
                f"agreement: expected 'var', 'range', 'sequence' or None, got {agreement!r}"
            )
        self.alpha, self.clip, self.clip_quantile = alpha, clip, clip_quantile
        self.agreement, self.gamma = agreement, gamma
        self.agreement_quantile, self.hidden_weight = agreement_quantile, hidden_weight

    def forward(
        self,
        student: Tensor,  # (B, L, V)
        teacher: Tensor,
        labels: Tensor | None = None,  # (B, L)
        *,
        sample_log_probs: Tensor | None = None,  # (K, B, L)
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: int | float | Tensor | None = None,  # in place of the number of sequences
    ) -> Tensor:
        if student.dim() != 3:
            raise ValueError(f"student: unisd expects [B, L, V], got {tuple(student.shape)}")
        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(self.alpha), "jensen_shannon")
        chosen = selected(student, labels, mask, 2)
        rows = divergence(
            student,
            teacher,
            kind,
            beta=self.alpha if kind == "jensen_shannon" else None,
            mask=chosen,
            clip=self.clip if self.clip_quantile is None else None,
            reduction="none",
        )
        if self.clip_quantile is not None:
            bound = row_quantile(rows, chosen, self.clip_quantile).clamp(min=1e-6)
            rows = torch.where(rows > bound, bound, rows)
        weight = self._weights(sample_log_probs, chosen, rows)
        weight = torch.where(chosen, weight, 0.0)
        total = (rows * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        value = total.sum() / (max(1, rows.shape[0]) if num_items is None else num_items)
        if self.hidden_weight:
            value = value + self.hidden_weight * feature(
                needed(student_hidden, "student_hidden", "unisd"),
                needed(teacher_hidden, "teacher_hidden", "unisd"),
                "mse",
                mask=chosen,
            )
        return value

    def _weights(self, samples: Tensor | None, chosen: Tensor, rows: Tensor) -> Tensor:
        """w (B, L), or (B, 1)."""
        if self.agreement is None:
            return torch.ones_like(rows)
        samples = needed(samples, "sample_log_probs", "unisd").detach().to(rows.dtype)
        if samples.dim() != 3 or samples.shape[1:] != chosen.shape:
            raise ValueError(
                f"sample_log_probs: expected [K, {chosen.shape[0]}, {chosen.shape[1]}], got "
                f"{tuple(samples.shape)}"
            )
        samples = torch.where(chosen, samples, 0.0)
        if self.agreement == "sequence":
            means = samples.sum(-1) / chosen.sum(-1).clamp(min=1)  # (K, B)
            spread = means.var(0, correction=0)
            return (-self.gamma * spread).exp().clamp(min=1e-6).unsqueeze(-1)
        spread = samples.amax(0) - samples.amin(0)
        if self.agreement == "var":
            spread = samples.var(0)
        scale = row_quantile(spread, chosen, self.agreement_quantile).clamp(min=1e-6)
        return (1 / (1 + self.gamma * (spread / scale).clamp(max=10.0))).clamp(min=0.01)
