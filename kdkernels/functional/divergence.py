"""Divergences between softmaxed rows: the public functions, and which way a call goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..inputs import Clip, LogitMix, Mapped, ProbMix, TopK
from ..ops import divergence as ops
from .composed import composed
from .kinds import KindTuple, splits
from .plain_call import call

if TYPE_CHECKING:
    from .token_stats import TokenStats


def divergence(
    student: Tensor,
    teacher: Tensor | LogitMix | ProbMix | Mapped | TopK | Sequence | None,
    kind: str | KindTuple = "forward_kl",
    *,
    beta: float | Tensor | None = None,
    alpha: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    temperature_squared: bool = False,
    standardize: bool = False,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    label_weight: float = 0.0,
    clip: float | Clip | None = None,
    support: Tensor | tuple[Tensor, str] | None = None,
    detach_mixture: bool = False,
    reduction: str = "mean",
    normalize: str = "rows",
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    class_dim: int = -1,
    teacher_weights: Tensor | Sequence[float] | None = None,
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Divergence D(p, q) between p = softmax(teacher / tau_t) and q = softmax(student / tau_s).

    For each selected row, in this order: D, clip, x tau_s^2 if asked, + label_weight x cross
    entropy of softmax(student) with the label, x weight, reduction. With a scalar reduction and a
    student that requires grad, the gradient is made in the same pass as the loss.

    Args:
        student: logits [..., V]; float32, float16, bfloat16 or float64.
        teacher: logits [..., V] of any of these dtypes (float64 with float64), or None for kind
            "entropy"; also kd.LogitMix, kd.ProbMix or kd.Mapped (one temporary row tensor),
            kd.TopK (as `support` on its ids; at another temperature than its own, stored entries
            are raised to their ratio and "bucket"'s rest as one of them, which is inexact; a floor
            is refused), or a list of any of them: the sum of their divergences, in one pass where
            docs/divergence.md says so. Gets a gradient only where it requires one.
        kind: a name, or a tuple of (name, coefficient): a weighted sum, where the linear ones
            (forward_kl, reverse_kl, cross_entropy, jeffreys, entropy) combine with one of the
            others in one pass (two with hellinger, bhattacharyya, renyi: functions of a whole
            sum). Names, with p the teacher, q the student and sums over the vocabulary:
            "forward_kl" sum p log(p/q); "cross_entropy" -sum p log q; "reverse_kl" sum q log(q/p);
            "jeffreys" forward_kl + reverse_kl; "entropy" -sum q log q;
            "jensen_shannon" beta KL(p,M) + (1-beta) KL(q,M), M = beta p + (1-beta) q, where beta
            exactly 0 is forward_kl and exactly 1 reverse_kl (Agarwal et al., 2024, GKD, as in TRL);
            "skew_forward_kl" KL(p, alpha p + (1-alpha) q) and "skew_reverse_kl"
            KL(q, (1-alpha) p + alpha q) (Ko et al., 2024, DistiLLM);
            "total_variation" sum |p-q| / 2; "squared_hellinger" 1 - sum sqrt(pq); "hellinger" its
            root; "bhattacharyya" -log sum sqrt(pq); "triangular" sum (p-q)^2/(p+q);
            "chi_squared" sum (p-q)^2/q; "alpha" (sum p^alpha q^(1-alpha) - 1)/(alpha(alpha-1))
            (Amari); "renyi" log(sum p^alpha q^(1-alpha))/(alpha-1); "alpha_beta" the AB divergence
            with teacher exponent alpha and student exponent beta (Wang et al., 2025, ABKD).
        beta, alpha: the kind's parameter, a number or a constant tensor [...]. Defaults: beta 0.5
            (jensen_shannon, alpha_beta), alpha 0.1 (skew kinds), 0.5 (alpha, renyi, alpha_beta).
        temperature: tau_s > 0, a number or a tensor [...] (or 0-d), with gradient.
        teacher_temperature: tau_t > 0 likewise; defaults to `temperature`.
        temperature_squared: multiply D by tau_s^2 (Hinton et al., 2015).
        standardize: z-score each row first (population standard deviation over its possible
            entries, no epsilon), both sides, gradient through mean and deviation (Sun et al., 2024,
            logit standardization): a softmax does not see the mean, so this is a temperature of
            tau x deviation. A constant row counts as deviation 1. tau^2 stays tau^2.
        teacher_bias: [V], added to the teacher's logits (one temporary tensor); gets a gradient
            where it requires one. -center is DINO's centring.
        labels: int64 [...]; rows with `ignore_index` are not selected. Aligned with the logits: no
            shift is done here.
        mask: bool [...]; False rows are not selected (ANDed with the labels).
        weight: float [...]; multiplies row values, with gradient. Weight 0 rows still count.
        label_weight: coefficient of the cross entropy with `labels` at tau = 1, in the same pass.
        clip: upper bound of each row's D, where the gradient is 0 above it, or kd.Clip. With
            several teachers `token` and `quantile` bound their sum, `element` each one's entries.
        support: ids [..., K], or (ids, tail): both rows restricted to these columns; -1 = absent.
            Tails: "bucket" (default; one more cell with the rest of each row), "renormalize"
            (teacher p/P_K on them and 0 elsewhere, student whole), "renormalize_both", "ignore"
            (teacher p on them, not renormalised; forward_kl and cross_entropy only). The rows'
            log-sum-exps and a boolean [..., V] are made by torch; the kernel sees K + 1 cells.
        detach_mixture: "skew_reverse_kl" only: the mixture's student part carries no gradient.
        reduction: "none" (values [...]), "sum", "mean", "batchmean" (sum / size of dim 0),
            "sequence_mean" (mean over the rows of each entry of dim 0, then over entries that have
            any).
        normalize: what "mean" and "sequence_mean" divide by: "rows" (selected rows) or "weights".
        num_items: divisor of "mean" instead: a number > 0 or a 0-d tensor (gradient accumulation,
            data parallel).
        vocab_size, teacher_vocab_size: valid columns of padded heads; beyond them a logit counts as
            -inf. Needed where student and teacher have different widths.
        class_dim: the class dimension, e.g. 1 for [B, C, H, W]; the leading shape is the rest. The
            kernels read rows of classes: where classes are not next to each other in memory, each
            side is copied once (channels_last is not copied), and the gradient is a view of rows.
        teacher_weights: with a list of teachers their coefficients: numbers or a tensor [K], or
            [..., K], with gradient; 1 each otherwise.
        inplace: the gradient may overwrite `student` (saves one logits tensor; backward runs once).
        return_stats: return (loss, `TokenStats`): `token_stats` of the same call, without gradient.

    Returns:
        float32 (float64 for float64 logits): 0-d, or [...] for reduction "none". A row value has a
        relative error of at most 1e-5 at any student-teacher gap. 0 * inf = 0, -inf logits are
        legal, a teacher row of only -inf gives 0, NaN stays in its row; "mean" over no rows is 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. What only data can
            tell (label range, tensor parameters) raises on CPU tensors in eager mode, and on CUDA
            under `kdkernels.debug()`; otherwise that row is NaN with gradient 0.
    """
    stats = None
    if return_stats:  # before the gradient may overwrite the logits
        restated = standardize or teacher_bias is not None or support is not None
        dense = teacher is None or isinstance(teacher, Tensor)
        if restated or class_dim != -1 or not dense:
            raise ValueError(
                "return_stats: goes with one dense teacher or None, without standardize, "
                "teacher_bias, support and class_dim; call kd.token_stats on the rows you mean"
            )
        from .token_stats import token_stats

        stats = token_stats(
            student,
            teacher,
            labels,
            temperature,
            teacher_temperature,
            mask,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            teacher_vocab_size=teacher_vocab_size,
        )
    if (
        (teacher is not None and not isinstance(teacher, Tensor))
        or standardize
        or teacher_bias is not None
        or support is not None
        or class_dim != -1
        or teacher_weights is not None
        or (clip is not None and isinstance(clip, Clip) and clip.quantile is not None)
        or (not isinstance(kind, str) and splits(kind))
    ):
        value = composed(
            divergence,
            student,
            teacher,
            kind,
            beta=beta,
            alpha=alpha,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            temperature_squared=temperature_squared,
            standardize=standardize,
            teacher_bias=teacher_bias,
            labels=labels,
            ignore_index=ignore_index,
            mask=mask,
            weight=weight,
            label_weight=label_weight,
            clip=clip,
            support=support,
            detach_mixture=detach_mixture,
            reduction=reduction,
            normalize=normalize,
            num_items=num_items,
            vocab_size=vocab_size,
            teacher_vocab_size=teacher_vocab_size,
            class_dim=class_dim,
            teacher_weights=teacher_weights,
            inplace=inplace,
        )
        return (value, stats) if return_stats else value
    teacher, weight, tau_s, tau_t, rest, batch = call(
        student,
        teacher,
        kind,
        beta,
        alpha,
        temperature,
        teacher_temperature,
        temperature_squared,
        labels,
        ignore_index,
        mask,
        weight,
        label_weight,
        clip,
        detach_mixture,
        reduction,
        normalize,
        num_items,
        vocab_size,
        teacher_vocab_size,
        inplace,
    )
    value = ops.divergence(student, teacher, weight, tau_s, tau_t, rest, batch)[0]
    value = value.view(student.shape[:-1]) if reduction == "none" else value
    return (value, stats) if return_stats else value


def forward_kl(student: Tensor, teacher: Tensor, **options) -> Tensor:
    """KL(p, q) = sum p log(p/q); options as in `divergence`."""
    return divergence(student, teacher, "forward_kl", **options)


def reverse_kl(student: Tensor, teacher: Tensor, **options) -> Tensor:
    """KL(q, p) = sum q log(q/p); options as in `divergence`."""
    return divergence(student, teacher, "reverse_kl", **options)


def jensen_shannon(student: Tensor, teacher: Tensor, **options) -> Tensor:
    """Generalised Jensen-Shannon divergence (beta=0.5); options as in `divergence`."""
    return divergence(student, teacher, "jensen_shannon", **options)


def total_variation(student: Tensor, teacher: Tensor, **options) -> Tensor:
    """sum |p - q| / 2; options as in `divergence`."""
    return divergence(student, teacher, "total_variation", **options)
