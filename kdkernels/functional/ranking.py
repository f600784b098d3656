"""Losses on scores of candidates, and the Plackett-Luce likelihood of an order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import ranking as ops
from .checks import check_floats, check_number, same_device

RANKING_KINDS = (
    "ranknet",
    "listnet",
    "plackett_luce",
    "margin_mse",
    "adr_mse",
    "pairwise_hinge",
    "score_mse",
    "score_bce",
)


def ranking(
    student_scores: Tensor,
    teacher_scores: Tensor,
    kind: str = "ranknet",
    *,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    soft: bool = False,
    margin: float = 1.0,
    discount: str | None = "log2",
) -> Tensor:
    """Distance between two scorings s (student) and t (teacher) of the same candidates.

    Args:
        student_scores, teacher_scores: [..., n] of one shape, any float dtype; the teacher's carry
            no gradient.
        kind: "ranknet": mean over pairs t_i > t_j of log(1 + exp(-(s_i - s_j))) (Burges et al.,
            2005); with soft=True BCE of s_i - s_j against sigmoid(t_i - t_j) over i < j;
            "pairwise_hinge": mean over pairs t_i > t_j of max(margin - (s_i - s_j), 0);
            "listnet": KL(softmax(t / temperature), softmax(s / temperature)), mean over lists (Cao
            et al., 2007); "plackett_luce": -log-likelihood of the teacher's order, mean over lists
            (ListMLE, Xia et al., 2008); "margin_mse": ((s_0 - s_j) - (t_0 - t_j))^2 with the
            positive first (Hofstaetter et al., 2020); "adr_mse": (r'_i - r_i)^2 / log2(1 + r_i)
            with r the teacher's ranks from 1 and r'_i = 1 + sum_{j != i} sigmoid((s_j - s_i) /
            temperature) (Schlatt et al., 2024; discount=None: no divisor); "score_mse" (s - t)^2;
            "score_bce" BCE of s as a logit with t in [0, 1]. The last four are means over entries.
        labels: int64 [...]: the position of the best candidate of each list; "plackett_luce" puts
            it first.
        weight: float of the shape of what is averaged: [..., n, n] for pairs, [...] for lists,
            [..., n - 1] for margin_mse, else [..., n]. The divisor stays the count.
        temperature: > 0, see the kinds.
        mask: bool [..., n]: candidates that take part.
        reduction: "mean" over the selected pairs, lists or entries, "sum" or "none" (that shape,
            0 where not selected).

    Returns:
        float32 (float64 for float64 inputs). Pairs take O(n^2) memory for lists of n candidates.
    """
    s, t, mask = _scores(student_scores, teacher_scores, mask)
    if kind not in RANKING_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(RANKING_KINDS)}, got {kind!r}")
    temperature = check_number(temperature, "temperature", positive=True)
    if labels is not None and kind != "plackett_luce":
        raise ValueError(f"labels: for kind 'plackett_luce', got kind {kind!r}")
    values, on = _values(s, t, mask, kind, labels, temperature, soft, margin, discount)
    if weight is not None:
        check_floats(weight, "weight")
        if weight.shape != values.shape:
            raise ValueError(
                f"weight: expected shape {tuple(values.shape)}, got {tuple(weight.shape)}"
            )
        values = values * weight.to(values.dtype)
    values = torch.where(on, values, torch.zeros_like(values))
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction != "mean":
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
    return values.sum() / on.sum().clamp(min=1)


def _scores(student, teacher, mask):
    check_floats(student, "student_scores")
    check_floats(teacher, "teacher_scores")
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"student_scores: expected shape [..., n], got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_scores: expected shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    same_device(teacher, "teacher_scores", student)
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    if mask is None:
        mask = torch.ones(student.shape, dtype=torch.bool, device=student.device)
    elif mask.dtype != torch.bool or mask.shape != student.shape:
        raise ValueError(f"mask: expected bool of shape {tuple(student.shape)}")
    s, t = student.to(dtype), teacher.detach().to(dtype)
    return (
        torch.where(mask, s, torch.zeros_like(s)),
        torch.where(mask, t, torch.zeros_like(t)),
        mask,
    )


def teacher_ranks(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Ranks from 1 within each list, best first; candidates without mask come last."""
    if mask is not None:
        scores = torch.where(mask, scores, torch.full_like(scores, -torch.inf))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(-1) + 1).to(scores.dtype)


def _values(s, t, mask, kind, labels, temperature, soft, margin, discount):
    """Values and which of them count."""
    if kind in ("ranknet", "pairwise_hinge"):
        ahead = s[..., :, None] - s[..., None, :]
        both = mask[..., :, None] & mask[..., None, :]
        if kind == "ranknet" and soft:
            target = (t[..., :, None] - t[..., None, :]).sigmoid()
            values = F.binary_cross_entropy_with_logits(ahead, target, reduction="none")
            return values, both & torch.ones_like(both).triu(1)
        better = both & (t[..., :, None] > t[..., None, :])
        if kind == "ranknet":
            return F.softplus(-ahead), better
        return (margin - ahead).clamp(min=0), better
    if kind == "listnet":
        some = mask.any(-1)
        low = torch.where(some[..., None], torch.where(mask, 0.0, -torch.inf), 0.0).to(s.dtype)
        log_q = (s / temperature + low).log_softmax(-1)
        log_p = (t / temperature + low).log_softmax(-1)
        terms = log_p.exp() * (log_p - log_q)
        return torch.where(mask, terms, torch.zeros_like(terms)).sum(-1), some
    if kind == "plackett_luce":
        low = torch.where(mask, t, torch.full_like(t, -torch.inf))
        if labels is not None:
            low = low.scatter(-1, labels[..., None], torch.inf)
        order = low.argsort(dim=-1, descending=True, stable=True)
        taken = mask.gather(-1, order).to(s.dtype)
        scores = torch.where(mask, s, torch.full_like(s, -torch.inf))
        return plackett_luce(scores, order, taken, reduction="none"), mask.any(-1)
    if kind == "margin_mse":
        if s.shape[-1] < 2:
            raise ValueError("student_scores: margin_mse needs [..., 1 + n], positive first")
        gap = (s[..., :1] - s[..., 1:]) - (t[..., :1] - t[..., 1:])
        return gap.square(), mask[..., :1] & mask[..., 1:]
    if kind == "adr_mse":
        over = ((s[..., None, :] - s[..., :, None]) / temperature).sigmoid()
        others = mask[..., None, :] & ~torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
        soft_ranks = 1 + torch.where(others, over, torch.zeros_like(over)).sum(-1)
        ranks = teacher_ranks(t, mask)
        values = (soft_ranks - ranks).square()
        if discount == "log2":
            values = values / (1 + ranks).log2()
        elif discount is not None:
            raise ValueError(f"discount: expected 'log2' or None, got {discount!r}")
        return values, mask
    if kind == "score_mse":
        return (s - t).square(), mask
    return F.binary_cross_entropy_with_logits(s, t, reduction="none"), mask


def plackett_luce(
    student: Tensor,
    order: Tensor,
    weights: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Weighted Plackett-Luce loss sum_k w_k (log sum_{j >= k} exp(s_{o_j}) - s_{o_k}).

    One scan over the order each way, in float64 inside; O(K) extra memory a row.

    Args:
        student: scores [..., V]; float32, float16, bfloat16 or float64.
        order: int64 [..., K], K <= V: item ids, the best first, each at most once.
        weights: float [..., K], default 1 (PLD takes the teacher's probabilities in that order);
            constants.
        reduction: "mean" over rows, "sum" or "none" [...].

    Returns:
        float32 (float64 for float64 scores). Ids out of range raise on CPU tensors; on CUDA the row
        is NaN with gradient 0.

    The Plackett-Luce model: Plackett, 1975; as a loss: ListMLE (Xia et al., 2008), PLD (2025).
    """
    check_floats(student, "student")
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"student: expected shape [..., V], V >= 1, got {tuple(student.shape)}")
    if not isinstance(order, Tensor) or order.dtype != torch.int64:
        raise TypeError("order: expected an int64 tensor")
    leading = student.shape[:-1]
    if order.shape[:-1] != leading or not 1 <= order.shape[-1] <= student.shape[-1]:
        raise ValueError(
            f"order: expected shape {(*leading, 'K')}, K from 1 to {student.shape[-1]}, got "
            f"{tuple(order.shape)}"
        )
    same_device(order, "order", student)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if weights is not None:
        check_floats(weights, "weights")
        if weights.requires_grad:
            raise ValueError("weights: constants of the loss; they must not require grad")
        if weights.shape != order.shape:
            raise ValueError(
                f"weights: expected shape {tuple(order.shape)}, got {tuple(weights.shape)}"
            )
        same_device(weights, "weights", student)
        weights = weights.to(dtype).reshape(-1, order.shape[-1]).contiguous()
    scores = student.reshape(-1, student.shape[-1])
    order = order.reshape(-1, order.shape[-1]).contiguous()
    values = ops.plackett_luce(scores, order, weights).to(dtype).view(leading)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / max(values.numel(), 1)
