"""Losses on the log-probabilities of labels or sampled tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.token_stats import kl_estimate, label_log_probs
from ..ops.common import compute_dtype
from .needed import needed
from .registry import register
from .rows import chosen_rows, halves, mean_rows, sequence_means, zero_rest


def _both(student, teacher, labels, mask, loss):
    """(log q_y, log p_y, rows that count)."""
    labels = needed(labels, "labels", loss)
    chosen = chosen_rows(student, labels, mask)
    log_q = label_log_probs(student, labels, mask=mask)
    return log_q, label_log_probs(teacher.detach(), labels, mask=mask), chosen


def sampling_log_probs(
    old_log_probs: Tensor | None, chosen: Tensor, log_q: Tensor, loss: str
) -> Tensor:
    """The sampling policy's log-probabilities, constant, 0 on rows that do not count."""
    given = needed(old_log_probs, "old_log_probs", loss)
    if given.shape != chosen.shape:
        raise ValueError(
            f"old_log_probs: expected shape {tuple(chosen.shape)}, got {tuple(given.shape)}"
        )
    return torch.where(chosen, given.detach().to(log_q.dtype), torch.zeros_like(log_q))


def clipped_ratio(log_q: Tensor, old: Tensor, bound: float) -> Tensor:
    """min(exp(clamp(log q - old, -20, 20)), bound), a constant."""
    return (log_q.detach() - old).clamp(-20.0, 20.0).exp().clamp(max=bound)


@register(
    "kdrl",
    paper="Xu et al., KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and "
    "Reinforcement Learning, 2025",
    family="divergence",
    status="secondary",
)
class KDRLLoss(nn.Module):
    """beta x the mean estimate of KL(q, p) on sampled tokens; step() lowers beta by beta_step down
    to beta_end. The policy-gradient part is the trainer's."""

    def __init__(
        self,
        kind: str = "k2",
        beta: float = 5e-3,
        beta_end: float = 1e-3,
        beta_step: float = 5e-5,
    ):
        super().__init__()
        self.kind, self.beta_end, self.beta_step = kind, beta_end, beta_step
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))

    def step(self) -> None:
        """Once an optimiser step."""
        lowered = (self.beta - self.beta_step).clamp(min=self.beta_end)
        self.beta.copy_(torch.where(self.beta > self.beta_end, lowered, self.beta))

    def forward(
        self,
        student: Tensor,  # [..., V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        log_q, log_p, chosen = _both(student, teacher, labels, mask, "kdrl")
        value = mean_rows(kl_estimate(log_q, log_p, self.kind), chosen, num_items)
        return self.beta.to(value.dtype) * value


@register(
    "importance_weighted_reverse_kl",
    aliases=("skill_sd",),
    family="divergence",
    status="secondary",
)
class ImportanceWeightedReverseKLLoss(nn.Module):
    """weight x mean rho k3, rho = q / sg(q_old): value and gradient of KL(q, p)."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        old_log_probs: Tensor | None = None,  # [...]
    ) -> Tensor:
        name = "importance_weighted_reverse_kl"
        log_q, log_p, chosen = _both(student, teacher, labels, mask, name)
        old = sampling_log_probs(old_log_probs, chosen, log_q, name)
        value = kl_estimate(log_q, log_p, "k3", old_log_q=old)
        return self.weight * mean_rows(value, chosen, num_items)


@register(
    "dpo",
    paper="Rafailov et al., Direct Preference Optimization, NeurIPS 2023",
    family="divergence",
)
class DPOLoss(nn.Module):
    """- mean log sigmoid(beta ((l_s - l_t) chosen - (l_s - l_t) rejected)), l the sum of a
    sequence's label log-probabilities; the first half of dim 0 is chosen, the teacher the reference
    model."""

    def __init__(self, beta: float = 0.1):
        super().__init__()
        self.beta = beta

    def forward(
        self,
        student: Tensor,  # [2 B, ..., V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        log_q, log_p, _ = _both(student, teacher, labels, mask, "dpo")
        chosen, rejected = halves((log_q - log_p).flatten(1).sum(1), "student")
        values = -F.logsigmoid(self.beta * (chosen - rejected))
        return values.mean() if num_items is None else values.sum() / num_items


@register(
    "sdpo",
    paper="SDPO, as in TRL",
    family="divergence",
)
class SDPOLoss(nn.Module):
    """Mean of sg(log q_y - log p_y) log q_y, times min(exp(clamp(log q_y - old, +-20)), is_clip)
    where old_log_probs are given."""

    def __init__(self, is_clip: float = 2.0):
        super().__init__()
        self.is_clip = is_clip

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        old_log_probs: Tensor | None = None,
    ) -> Tensor:
        log_q, log_p, chosen = _both(student, teacher, labels, mask, "sdpo")
        value = kl_estimate(log_q, log_p, "k1_policy")
        if old_log_probs is not None:
            old = sampling_log_probs(old_log_probs, chosen, log_q, "sdpo")
            value = value * clipped_ratio(log_q, old, self.is_clip)
        return mean_rows(value, chosen, num_items)


@register("iw_opd", paper="IW-OPD, as in TRL", family="divergence")
class IWOPDLoss(nn.Module):
    """- mean w_t A_t log q_y with A = sg(log p_y - old) and w_t = 1 + gamma (1 - sum_{s < t} |A_s|
    / sum |A|) in each sequence (entry of dim 0)."""

    def __init__(self, gamma: float = 0.5):
        super().__init__()
        self.gamma = gamma

    def forward(
        self,
        student: Tensor,  # [B, L, V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        old_log_probs: Tensor | None = None,  # [B, L]
    ) -> Tensor:
        log_q, log_p, chosen = _both(student, teacher, labels, mask, "iw_opd")
        advantage = log_p - sampling_log_probs(old_log_probs, chosen, log_q, "iw_opd")
        size = advantage.abs()
        total = size.sum(-1, keepdim=True)
        before = (size.cumsum(-1) - size) / torch.where(total > 0, total, 1.0)
        weight = 1 + self.gamma * (1 - before)
        return -mean_rows(weight * advantage * log_q, chosen, num_items)


@register(
    "rltf_sd",
    paper="RLTF-SD (lili-chen/rltf)",
    family="divergence",
)
class RLTFSDLoss(nn.Module):
    """- weight mean_seq exp(log q_y - old) advantages, over rows with old >= min_old_log_prob."""

    def __init__(self, min_old_log_prob: float = -5.0, weight: float = 0.1):
        super().__init__()
        self.min_old_log_prob, self.weight = min_old_log_prob, weight

    def forward(
        self,
        student: Tensor,  # [B, L, V]
        teacher: None = None,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        advantages: Tensor | None = None,  # [B, L] or [B]
        old_log_probs: Tensor | None = None,  # [B, L]
    ) -> Tensor:
        labels = needed(labels, "labels", "rltf_sd")
        chosen = chosen_rows(student, labels, mask)
        log_q = label_log_probs(student, labels, mask=mask)
        old = sampling_log_probs(old_log_probs, chosen, log_q, "rltf_sd")
        gain = needed(advantages, "advantages", "rltf_sd").detach().to(log_q.dtype)
        gain = gain[..., None] if gain.dim() == log_q.dim() - 1 else gain
        keep = chosen & (old >= self.min_old_log_prob)
        value = torch.where(keep, (log_q - old).exp() * gain, torch.zeros_like(log_q))
        if num_items is not None:
            return -self.weight * mean_rows(value, keep, num_items)
        means, present = sequence_means(value, keep)
        return -self.weight * means.sum() / present.sum().clamp(min=1)


@register(
    "curiosft",
    paper="CurioSFT (HaoooWang/CurioSFT)",
    family="divergence",
)
class CurioSFTLoss(nn.Module):
    """Mean of - log q_y + alpha / 2 (log q_y - log p_y at tau)^2, the teacher's tau of each token
    such that the entropy of its top_k is H(1) + sigmoid(2 (H(1) - 1.2)) / 2, by 20 bisections in
    temperature_range; tau is its lower end where the full entropy is at most 0.03."""

    def __init__(
        self,
        alpha: float = 1.0,
        temperature_range: tuple[float, float] = (1.1, 1.5),
        top_k: int = 512,
    ):
        super().__init__()
        low, high = temperature_range
        if not 0 < low <= high:
            raise ValueError(f"temperature_range: expected 0 < low <= high, got {(low, high)!r}")
        self.alpha, self.temperature_range, self.top_k = alpha, (low, high), top_k

    def temperature(self, teacher: Tensor, chosen: Tensor) -> Tensor:
        """tau of each row [...]."""
        low, high = self.temperature_range
        dtype = compute_dtype(teacher)
        safe = zero_rest(teacher, chosen)
        top = safe.topk(min(self.top_k, teacher.shape[-1]), dim=-1).values
        full = divergence(safe, None, "entropy", reduction="none")

        def entropy(tau):
            return divergence(top, None, "entropy", temperature=tau, reduction="none")

        below = torch.full(chosen.shape, low, dtype=dtype, device=teacher.device)
        above = torch.full_like(below, high)
        at_one = entropy(1.0)
        target = at_one + torch.sigmoid(2 * (at_one - 1.2)) / 2
        for _ in range(20):
            middle = (below + above) / 2
            short = entropy(middle) < target
            below, above = torch.where(short, middle, below), torch.where(short, above, middle)
        return torch.where(full <= 0.03, torch.full_like(below, low), (below + above) / 2)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "curiosft")
        chosen = chosen_rows(student, labels, mask)
        log_q = label_log_probs(student, labels, mask=mask)
        fixed = teacher.detach()
        tau = self.temperature(fixed, chosen)
        log_p = label_log_probs(fixed, labels, tau, mask=mask)
        value = self.alpha / 2 * (log_q - log_p) ** 2 - log_q
        return mean_rows(value, chosen, num_items)


@register(
    "distillm_2",
    aliases=("distillm2",),
    paper="Ko et al., DistiLLM-2, ICML 2025",
    family="divergence",
)
class DistiLLM2Loss(nn.Module):
    """(2 - weight) mean_seq KL(p, a p + (1-a) q) of the chosen half + weight mean_seq
    KL(q, (1-a) p + a sg q) of the rejected half of dim 0.

    adaptive: the a of a sequence is clip(1 - (1 - alpha) A / (D + 1e-5), alpha_min, alpha) with
    D = exp(mean log p_y) - exp(mean log q_y) on the chosen side, its negative on the rejected one,
    and A the side's mean D of the first call: step() keeps it in the buffers chosen_anchor and
    rejected_anchor. a is a constant; compat lets its gradient flow, as the release does.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        alpha_min: float = 0.01,
        weight: float = 1.0,
        adaptive: bool = True,
        compat: bool = False,
    ):
        super().__init__()
        self.alpha, self.alpha_min, self.weight = alpha, alpha_min, weight
        self.adaptive, self.compat = adaptive, compat
        for name in ("chosen_anchor", "rejected_anchor"):
            self.register_buffer(name, torch.tensor(torch.nan, dtype=torch.float64))
        self._seen: dict[str, Tensor] = {}

    def step(self) -> None:
        """Once an optimiser step: the first one keeps the anchors."""
        for name, seen in self._seen.items():
            anchor = getattr(self, name)
            anchor.copy_(torch.where(anchor.isnan(), seen.to(anchor), anchor))

    def _alpha(self, log_q: Tensor, log_p: Tensor, chosen: Tensor, side: str) -> Tensor:
        """a of each sequence (B,)."""
        means = [sequence_means(x, chosen)[0].exp() for x in (log_p, log_q)]
        gap = means[0] - means[1] if side == "chosen_anchor" else means[1] - means[0]
        seen = gap.detach().mean()
        if self.training:
            self._seen.setdefault(side, seen)
        anchor = getattr(self, side).to(gap.dtype)
        anchor = torch.where(anchor.isnan(), seen, anchor)
        a = (1 - (1 - self.alpha) * anchor / (gap + 1e-5)).clamp(self.alpha_min, self.alpha)
        return a if self.compat else a.detach()

    def _rows(self, student, teacher, kind, a, rows):
        """Row values with each sequence's a."""
        if not self.compat or not a.requires_grad:
            detach = {"detach_mixture": True} if kind == "skew_reverse_kl" else {}
            per_row = a.view(-1, *[1] * (student.dim() - 2)).expand(student.shape[:-1])
            return divergence(
                student, teacher, kind, alpha=per_row, reduction="none", **detach, **rows
            )
        # The gradient to a is no part of kd.divergence: plain torch.
        dtype = compute_dtype(student)
        on = chosen_rows(student, rows["labels"], rows["mask"])
        log_q = zero_rest(student, on).to(dtype).log_softmax(-1)
        log_p = zero_rest(teacher, on).to(dtype).log_softmax(-1)
        a = a.view(-1, *[1] * (student.dim() - 1)).to(dtype)
        if kind == "skew_forward_kl":
            mixed = torch.logaddexp(a.log() + log_p, (1 - a).log() + log_q)
            return (log_p.exp() * (log_p - mixed)).sum(-1)
        mixed = torch.logaddexp((1 - a).log() + log_p, a.log() + log_q.detach())
        return (log_q.exp() * (log_q - mixed)).sum(-1)

    def forward(
        self,
        student: Tensor,  # [2 B, L, V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "distillm_2")
        loss = 0.0
        parts = [halves(x, "student") for x in (student, teacher.detach(), labels, mask)]
        sides = (
            ("chosen_anchor", "skew_forward_kl", 2 - self.weight),
            ("rejected_anchor", "skew_reverse_kl", self.weight),
        )
        for (z, a, y, m), (side, kind, weight) in zip(zip(*parts), sides):
            chosen = chosen_rows(z, y, m)
            if self.adaptive:
                log_q = label_log_probs(z, y, mask=m)
                log_q = log_q if self.compat else log_q.detach()
                skew = self._alpha(log_q, label_log_probs(a, y, mask=m), chosen, side)
            else:
                skew = torch.full((z.shape[0],), self.alpha, dtype=compute_dtype(z)).to(z.device)
            rows = self._rows(z, a, kind, skew, {"labels": y, "mask": m})
            if num_items is not None:
                loss = loss + weight * mean_rows(rows, chosen, num_items)
            else:
                means, present = sequence_means(rows, chosen)
                loss = loss + weight * means.sum() / present.sum().clamp(min=1)
        return loss
