"""Losses that weigh, temper or choose rows by statistics of the rows themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.ranking import plackett_luce
from ..functional.reduction import row_quantile
from ..ops.common import compute_dtype
from .needed import needed
from .registry import register
from .rows import chosen_rows, entropies, label_cross_entropy, mean_rows, zero_rest


@register(
    "akl",
    paper="Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large "
    "Language Models, COLING 2025",
    family="divergence",
)
class AKLLoss(nn.Module):
    """Mean of w KL(p, q) + (1 - w) KL(q, p), w = sg gap_head / (gap_head + gap_tail) with gaps
    sum |p - q|; the head is the teacher's descending prefix of mass <= mu, its first id always."""

    def __init__(self, mu: float = 0.5):
        super().__init__()
        self.mu = mu

    def forward(
        self,
        student: Tensor,  # [..., V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        dtype = compute_dtype(student)
        chosen = chosen_rows(student, labels, mask)
        p = teacher.detach().to(dtype).softmax(-1)
        gap = (p - student.detach().to(dtype).softmax(-1)).abs()
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        head = ordered.cumsum(-1) <= self.mu
        head[..., 0] = True
        total = gap.sum(-1)
        in_head = (gap.gather(-1, order) * head).sum(-1)
        share = torch.where(total > 0, in_head / torch.where(total > 0, total, 1.0), 0.5)
        share = torch.where(chosen, share, torch.zeros_like(share))
        rows = {"labels": labels, "mask": mask, "num_items": num_items}
        forward = divergence(student, teacher.detach(), "forward_kl", weight=share, **rows)
        return forward + divergence(
            student, teacher.detach(), "reverse_kl", weight=1 - share, **rows
        )


@register(
    "bdkd",
    paper="Amara et al., BD-KD: Balancing the Divergences for Online Knowledge Distillation, 2022",
    family="divergence",
)
class BDKDLoss(nn.Module):
    """Mean of u cross_entropy + v KL(q, p): u 1 and v `weight` where the student's entropy is
    larger than the teacher's, else u `weight` and v 1."""

    def __init__(self, weight: float = 3.0):
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
    ) -> Tensor:
        wider = entropies(student, labels, mask) > entropies(teacher, labels, mask)
        one = torch.ones(wider.shape, dtype=compute_dtype(student), device=wider.device)
        u, v = torch.where(wider, one, self.weight), torch.where(wider, self.weight, one)
        rows = {"labels": labels, "mask": mask, "num_items": num_items}
        forward = divergence(student, teacher, "cross_entropy", weight=u, **rows)
        return forward + divergence(student, teacher, "reverse_kl", weight=v, **rows)


@register(
    "adakd",
    paper="LLM-Oriented Token-Adaptive Knowledge Distillation (SassyRong/AdaKD)",
    family="divergence",
)
class AdaKDLoss(nn.Module):
    """Tokens chosen and tempered by their Hellinger distance s at tau 1.

    The max(1, floor(n selection_ratio)) largest s are kept; T = temperature exp(-temperature_scale
    tanh log max(s / med, 1e-8)) (+ if `soften`) with med the lower median of the kept; the loss is
    the mean over the kept of T^2 D(kind at T). s and T are constants unless `compat`, as in the
    release. step() moves `selection_ratio`: with an EMA of the loss (ema_decay), after
    warmup_steps, a rise by more than ratio_tolerance since the last change multiplies it by
    1 + ratio_step, a fall by 1 - ratio_step, within [ratio_min, 1].
    """

    def __init__(
        self,
        kind: str = "reverse_kl",
        selection_ratio: float = 1.0,
        temperature: float = 1.0,
        temperature_scale: float = 0.5,
        soften: bool = False,
        ratio_step: float = 0.05,
        ratio_tolerance: float = 0.05,
        ratio_min: float = 0.1,
        ema_decay: float = 0.99,
        warmup_steps: int = 0,
        compat: bool = False,
    ):
        super().__init__()
        self.kind, self.temperature = kind, temperature
        self.temperature_scale = temperature_scale if soften else -temperature_scale
        self.ratio_step, self.ratio_tolerance = ratio_step, ratio_tolerance
        self.ratio_min, self.ema_decay = ratio_min, ema_decay
        self.warmup_steps, self.compat = warmup_steps, compat
        for name, value in (
            ("selection_ratio", selection_ratio),
            ("ema", torch.nan),
            ("previous", torch.nan),
            ("steps", 0.0),
        ):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self._seen: Tensor | None = None  # the last training loss, for step()

    def step(self) -> None:
        """Once an optimiser step."""
        if self._seen is None:
            return
        seen = self._seen.to(self.ema)
        fresh = self.ema.isnan()
        self.ema.copy_(
            torch.where(fresh, seen, self.ema_decay * self.ema + (1 - self.ema_decay) * seen)
        )
        self.steps += 1
        started = ~self.previous.isnan()
        fall = self.previous - self.ema
        bound = self.ratio_tolerance * self.previous
        warm = started & (self.steps > self.warmup_steps)
        rises, falls = warm & (fall < -bound), warm & (fall > bound)
        factor = torch.where(rises, 1 + self.ratio_step, torch.where(falls, 1 - self.ratio_step, 1))
        moved = (self.selection_ratio * factor).clamp(self.ratio_min, 1.0)
        self.selection_ratio.copy_(torch.where(rises | falls, moved, self.selection_ratio))
        renew = rises | falls | ((self.steps >= self.warmup_steps) & ~started)
        self.previous.copy_(torch.where(renew, self.ema, self.previous))

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
        source = student if self.compat else student.detach()
        score = divergence(source, teacher, "hellinger", labels=labels, mask=mask, reduction="none")
        flat = torch.where(chosen, score.detach(), -torch.inf).flatten()
        order = flat.argsort(descending=True, stable=True)
        count = (chosen.sum() * self.selection_ratio).floor().long().clamp(min=1)
        keep = (order.argsort() < count).view(chosen.shape) & chosen
        # The lower median of a descending list of `count`; no rows: 0, which nothing reads.
        middle = torch.nn.functional.pad(order, (0, 1))[count - 1 - (count - 1) // 2]
        median = torch.nn.functional.pad(score.flatten(), (0, 1))[middle]
        possible = keep & (median > 0)
        ratio = torch.where(possible, score, 1.0) / torch.where(median > 0, median, 1.0)
        ratio = torch.where(possible, ratio, torch.ones_like(ratio)).clamp(min=1e-8)
        tau = self.temperature * (self.temperature_scale * torch.tanh(ratio.log())).exp()
        loss = divergence(
            student, teacher, self.kind, temperature=tau, temperature_squared=True,
            mask=keep, num_items=num_items,
        )  # fmt: skip
        if self.training:
            self._seen = loss.detach()
        return loss


@register(
    "adaspec",
    paper="Hu et al., AdaSPEC: Selective Knowledge Distillation for Efficient Speculative "
    "Decoders, NeurIPS 2025",
    family="divergence",
)
class AdaSPECLoss(nn.Module):
    """KL(p, q) over the rows with d >= quantile(d, 1 - k), d = sg(KL(p, q) - KL(p, reference))."""

    def __init__(self, k: float = 0.4):
        super().__init__()
        self.k = k

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        reference: Tensor | None = None,  # logits of a reference student [..., V]
    ) -> Tensor:
        reference = needed(reference, "reference", "adaspec").detach()
        chosen = chosen_rows(student, labels, mask)
        rows = {"labels": labels, "mask": mask, "reduction": "none"}
        gain = divergence(student.detach(), teacher, "forward_kl", **rows) - divergence(
            reference, teacher, "forward_kl", **rows
        )
        keep = chosen & (gain >= row_quantile(gain, chosen, 1 - self.k))
        return divergence(student, teacher, "forward_kl", mask=keep, num_items=num_items)


@register(
    "tsd_kd",
    paper="TSD-KD (kmswin1/TSD-KD)",
    family="divergence",
)
class TSDKDLoss(nn.Module):
    """Jensen-Shannon weighted by sg sigmoid(H(q) - H(p)), + mean H(q) over the selected rows with
    H(q) at or above its quantile at the threshold, + indirect_kd_alpha x the mean Plackett-Luce
    loss of the student's top_k ids in the teacher's order over the opener rows.

    The opener of a sequence (entry of dim 0) ends before the first row at which the student's
    entropy, summed over the selected rows so far, reaches the share `opener` of its total. compat:
    Plackett-Luce by prefix sums, which is the reversed order, as in the release.
    """

    def __init__(
        self,
        beta: float = 0.9,
        token_entropy_percentile_threshold: float = 0.1,
        indirect_kd_alpha: float = 0.1,
        top_k: int = 10,
        opener: float = 0.1,
        compat: bool = False,
    ):
        super().__init__()
        self.beta, self.threshold = beta, token_entropy_percentile_threshold
        self.indirect_kd_alpha, self.top_k = indirect_kd_alpha, top_k
        self.opener, self.compat = opener, compat

    def forward(
        self,
        student: Tensor,  # [B, L, V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        rows = {"labels": labels, "mask": mask}
        chosen = chosen_rows(student, labels, mask)
        entropy = divergence(student, None, "entropy", reduction="none", **rows)
        fixed = entropy.detach()
        weight = torch.sigmoid(fixed - entropies(teacher, labels, mask))
        loss = divergence(
            student, teacher, "jensen_shannon", beta=self.beta, weight=weight,
            num_items=num_items, **rows,
        )  # fmt: skip
        uncertain = chosen & (fixed >= row_quantile(fixed, chosen, self.threshold))
        loss = loss + mean_rows(entropy, uncertain, num_items)
        if self.indirect_kd_alpha == 0:
            return loss
        ids = student.detach().topk(min(self.top_k, student.shape[-1]), dim=-1).indices
        best = teacher.detach().gather(-1, ids).argsort(dim=-1, descending=True, stable=True)
        order = best.flip(-1) if self.compat else best
        scores = student.gather(-1, ids)
        scores = zero_rest(scores, chosen)
        ranked = plackett_luce(scores, order, reduction="none")
        spent = fixed.cumsum(-1) / fixed.sum(-1, keepdim=True).clamp(min=1e-12)
        early = chosen & ((spent >= self.opener).cumsum(-1) == 0)
        return loss + self.indirect_kd_alpha * mean_rows(ranked, early, num_items)


@register(
    "dparallel",
    paper="Chen et al., dParallel: Learnable Parallel Decoding for dLLMs, 2025",
    family="divergence",
)
class DParallelLoss(nn.Module):
    """CE + entropy_weight x the mean entropy of softmax(z / temperature) over the rows whose argmax
    is the label; teacher None, labels at the masked tokens."""

    def __init__(self, temperature: float = 0.5, entropy_weight: float = 1.0):
        super().__init__()
        self.temperature, self.entropy_weight = temperature, entropy_weight

    def forward(
        self,
        student: Tensor,
        teacher: None = None,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "dparallel")
        right = chosen_rows(student, labels, mask) & (student.detach().argmax(-1) == labels)
        certainty = divergence(
            student, None, "entropy", temperature=self.temperature, mask=right, num_items=num_items
        )
        hard = label_cross_entropy(student, labels, mask, num_items)
        return hard + self.entropy_weight * certainty
