"""Ranking losses by name: scores of candidates [B, N], or a vocabulary in the teacher's order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.divergence import divergence
from ..functional.ranking import plackett_luce, ranking, teacher_ranks
from ..functional.relation import relation
from .needed import needed
from .registry import register

_RANKNET = "Burges et al., Learning to Rank using Gradient Descent, ICML 2005"


def _ranknet(student: Tensor, teacher: Tensor, weighted: bool, soft: bool) -> Tensor:
    weight = None
    if weighted:
        ranks = teacher_ranks(teacher)
        weight = 1 / (ranks[..., :, None] + ranks[..., None, :])
    return ranking(student, teacher, "ranknet", soft=soft, weight=weight)


@register("ranknet", paper=_RANKNET, family="ranking")
class RankNetLoss(nn.Module):
    """Mean over pairs t_i > t_j of log(1 + exp(-(s_i - s_j))); weighted: each times 1 / (rank_i +
    rank_j), the same divisor; soft: BCE against sigmoid(t_i - t_j), mean over i < j."""

    def __init__(self, weighted: bool = False, soft: bool = False):
        super().__init__()
        self.weighted, self.soft = weighted, soft

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return _ranknet(student, teacher, self.weighted, self.soft)


@register(
    "listnet",
    paper="Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, ICML 2007",
    family="ranking",
)
class ListNetLoss(nn.Module):
    """KL of the softmaxes of the scores, mean over lists."""

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return divergence(student, teacher, "forward_kl", temperature=self.temperature)


@register("score_kl", family="ranking")
class ScoreKLLoss(nn.Module):
    """The same with a temperature a side, times the student's squared (sentence-transformers)."""

    def __init__(
        self,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        temperature_squared: bool = True,
    ):
        super().__init__()
        self.options = {
            "temperature": temperature,
            "teacher_temperature": teacher_temperature,
            "temperature_squared": temperature_squared,
        }

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return divergence(student, teacher, "forward_kl", **self.options)


class _Plain(nn.Module):
    kind = ""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return ranking(student, teacher, self.kind)


@register(
    "margin_mse",
    paper="Hofstaetter et al., Improving Efficient Neural Ranking Models with "
    "Cross-Architecture Knowledge Distillation, 2020",
    family="ranking",
)
class MarginMSELoss(_Plain):
    """Mean of ((s_0 - s_j) - (t_0 - t_j))^2; scores [B, 1 + n], positive first."""

    kind = "margin_mse"


@register("score_mse", family="ranking", status="-")
class ScoreMSELoss(_Plain):
    """Mean (s - t)^2 of scores."""

    kind = "score_mse"


@register("score_bce", family="ranking", status="-")
class ScoreBCELoss(_Plain):
    """Mean BCE of student scores as logits with teacher scores in [0, 1]."""

    kind = "score_bce"


@register("pairwise_hinge", family="ranking", status="-")
class PairwiseHingeLoss(nn.Module):
    """Mean over pairs t_i > t_j of max(margin - (s_i - s_j), 0)."""

    def __init__(self, margin: float = 1.0):
        super().__init__()
        self.margin = margin

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return ranking(student, teacher, "pairwise_hinge", margin=self.margin)


@register("adr_mse", paper="Schlatt et al., Rank-DistiLLM, ECIR 2025", family="ranking")
class ADRMSELoss(nn.Module):
    """Mean of (soft rank - teacher's rank)^2 / log2(1 + teacher's rank)."""

    def __init__(self, temperature: float = 1.0, discount: str | None = "log2"):
        super().__init__()
        self.temperature, self.discount = temperature, discount

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return ranking(
            student, teacher, "adr_mse", temperature=self.temperature, discount=self.discount
        )


@register("pld", paper="Plackett-Luce Distillation, 2025", family="ranking", status="paper")
class PLDLoss(nn.Module):
    """Plackett-Luce loss of the order [label, the others by the teacher], weighted by the teacher's
    probabilities in that order, mean over rows with label != -100."""

    def forward(
        self,
        student: Tensor,  # [..., V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        labels = needed(labels, "labels", "pld")
        on = labels != -100 if mask is None else (labels != -100) & mask
        label = labels.clamp(min=0)[..., None]
        t = teacher.detach()
        t = t if t.dtype == torch.float64 else t.float()
        order = t.scatter(-1, label, torch.inf).argsort(dim=-1, descending=True, stable=True)
        weights = t.softmax(-1).gather(-1, order)
        rows = plackett_luce(student, order, weights, reduction="none")
        divisor = on.sum().clamp(min=1) if num_items is None else num_items
        return torch.where(on, rows, torch.zeros_like(rows)).sum() / divisor


@register(
    "dear",
    paper="DeAR: Dual-Stage Document Reranking with Reasoning Agents, 2025",
    family="ranking",
)
class DeARLoss(nn.Module):
    """(1 - alpha) x (soft RankNet, or label cross entropy) + alpha tau^2 KL of the scores."""

    def __init__(self, alpha: float = 0.1, temperature: float = 2.0, base: str = "ranknet"):
        super().__init__()
        if base not in ("ranknet", "ce"):
            raise ValueError(f"base: expected ranknet or ce, got {base!r}")
        self.alpha, self.temperature, self.base = alpha, temperature, base

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.base == "ce":
            base = F.cross_entropy(student, needed(labels, "labels", "dear"))
        else:
            base = _ranknet(student, teacher, False, True)
        listwise = divergence(
            student, teacher, "forward_kl", temperature=self.temperature, temperature_squared=True
        )
        return (1 - self.alpha) * base + self.alpha * listwise


@register(
    "first",
    paper="Reddy et al., FIRST: Faster Improved Listwise Reranking with Single "
    "Token Decoding, EMNLP 2024",
    family="ranking",
)
class FIRSTLoss(nn.Module):
    """rank_weight x (weighted) RankNet on identifier logits [B, N] + cross entropy where labels are
    given."""

    def __init__(self, rank_weight: float = 10.0, weighted: bool = True):
        super().__init__()
        self.rank_weight, self.weighted = rank_weight, weighted

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        loss = self.rank_weight * _ranknet(student, teacher, self.weighted, False)
        return loss if labels is None else loss + F.cross_entropy(student, labels)


@register(
    "disco",
    paper="Lupart et al., DiSCo: LLM Knowledge Distillation for Efficient Sparse "
    "Retrieval in Conversational Search, SIGIR 2025",
    family="ranking",
)
class DiSCoLoss(nn.Module):
    """kl_weight KL of the scores (mean over teachers) + contrastive_weight cross entropy of column
    0, the positive."""

    def __init__(self, kl_weight: float = 0.99, contrastive_weight: float = 0.01):
        super().__init__()
        self.kl_weight, self.contrastive_weight = kl_weight, contrastive_weight

    def forward(
        self, student: Tensor, teacher: Tensor | list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        listwise = sum(divergence(student, t, "forward_kl") for t in teachers) / len(teachers)
        first = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)
        return self.kl_weight * listwise + self.contrastive_weight * F.cross_entropy(student, first)


@register(
    "bialign",
    paper="Qin et al., Improving In-context Learning via Bidirectional Alignment",
    family="ranking",
    status="secondary",
)
class BiAlignLoss(nn.Module):
    """KL of the logits + weight x the ranking of demonstrations [B, n]: over pairs that the teacher
    orders, max(0, (s_worse - s_better) / (max s - min s) + (rank_worse - rank_better) / (n - 1))
    with scores as log-probabilities, mean over pairs."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        student_scores: Tensor | None = None,
        teacher_scores: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        kl = divergence(
            student, teacher, "forward_kl", labels=labels, mask=mask, num_items=num_items
        )
        s = needed(student_scores, "student_scores", "bialign").float()
        t = needed(teacher_scores, "teacher_scores", "bialign")
        spread = (s.amax(-1) - s.amin(-1)).clamp(min=1e-12)[..., None, None]
        ranks = teacher_ranks(t.float())
        behind = (s[..., None, :] - s[..., :, None]) / spread
        gap = (ranks[..., None, :] - ranks[..., :, None]) / (s.shape[-1] - 1)
        better = t[..., :, None] > t[..., None, :]
        values = torch.where(better, (behind + gap).clamp(min=0), torch.zeros_like(gap))
        return kl + self.weight * values.sum() / better.sum().clamp(min=1)


@register(
    "lead",
    paper="Sun et al., LEAD: Liberal Feature-based Distillation for Dense Retrieval, WSDM 2024",
    family="ranking",
)
class LEADLoss(nn.Module):
    """Weighted sum over layers of KL of softmax(Q P^T) between teacher (over its temperature) and
    student; weights softmax(-teacher_nll / layer_temperature), or 1."""

    def __init__(
        self, temperature: float = 1.0, layer_temperature: float = 1.0, reweight: bool = True
    ):
        super().__init__()
        self.temperature, self.layer_temperature = temperature, layer_temperature
        self.reweight = reweight

    def forward(
        self,
        student: list[tuple[Tensor, Tensor]],  # per layer (query [N, d], passage [M, d])
        teacher: list[tuple[Tensor, Tensor]],
        labels: Tensor | None = None,
        *,
        teacher_nll: Tensor | None = None,  # (layers,)
    ) -> Tensor:
        if len(student) != len(teacher) or not student:
            raise ValueError(f"student: expected {len(teacher)} layers, got {len(student)}")
        if self.reweight:
            nll = needed(teacher_nll, "teacher_nll", "lead")
            weights = (-nll.detach() / self.layer_temperature).softmax(-1)
        else:
            weights = [1.0] * len(student)
        return sum(
            w * relation(tuple(s), tuple(t), student_scale=1.0, teacher_scale=1 / self.temperature)
            for w, s, t in zip(weights, student, teacher)
        )
