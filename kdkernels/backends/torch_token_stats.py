"""token_stats and label_log_probs in plain torch, float64 inside: the oracle of their tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch import _kl, _log_softmax, _per_row, _widen, autograd_on, selection


def _columns(columns: float, width: int) -> int:
    return int(columns) if 0 < columns < width else width


def _one_side(logits: Tensor, tau: Tensor, columns: float, labels: Tensor | None):
    """(log softmax, dead, lse, max logit, argmax, label log-probability) of rows (N, V)."""
    width = _columns(columns, logits.shape[-1])
    log_soft, dead = _log_softmax(logits, tau, width)
    valid = logits[:, :width]
    lse = torch.logsumexp(valid / tau[:, None], -1)
    # torch.argmax promises no order among ties, this does: the lowest id.
    top = valid.amax(-1, keepdim=True)
    at = (valid == top).to(torch.uint8).argmax(-1)
    label = torch.zeros_like(lse)
    if labels is not None:
        index = labels.clamp(0, log_soft.shape[-1] - 1)[:, None]
        gone = dead.gather(-1, index)[:, 0] | (labels >= log_soft.shape[-1])
        label = torch.where(gone, -torch.inf, log_soft.gather(-1, index)[:, 0])
    return log_soft, dead, lse, top[:, 0], at, label


def token_stats(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    student_temperature: Tensor | None,
    teacher_temperature: Tensor | None,
    numbers: Tensor,
    ids: Tensor,
    tau_s: float,
    tau_t: float,
    ignore_index: float,
    student_columns: float,
    teacher_columns: float,
) -> None:
    """csrc/divergence/token_stats.h."""
    numbers.zero_()
    ids.zero_()
    rows = student.shape[0]
    if rows == 0:
        return
    selected = selection(labels, mask, rows, student.device, ignore_index)
    first = _per_row(student_temperature, tau_s, student)
    second = _per_row(teacher_temperature, tau_t, student)
    valid = (first > 0) & (first < torch.inf)
    if teacher is not None:
        valid = valid & (second > 0) & (second < torch.inf)
    if labels is not None:
        width = _columns(student_columns, student.shape[-1])
        valid = valid & (labels >= 0) & (labels < width)
    one = torch.ones_like(first)
    usable = (selected & valid)[:, None]
    z = torch.where(usable, student.double(), 0.0)
    a = torch.full_like(z[:, :1], -torch.inf)
    if teacher is not None:
        a = torch.where(usable, teacher.double(), 0.0)
    tau_z, tau_a = torch.where(usable[:, 0], first, one), torch.where(usable[:, 0], second, one)
    log_q, dead_q, *of_student = _one_side(z, tau_z, student_columns, labels)
    log_p, dead_p, *of_teacher = _one_side(a, tau_a, teacher_columns, labels)
    width = max(log_q.shape[-1], log_p.shape[-1])
    log_q, dead_q = _widen(log_q, dead_q, width)
    log_p, dead_p = _widen(log_p, dead_p, width)
    q, p = log_q.exp(), log_p.exp()
    impossible = dead_p.all(-1)
    forward = torch.where((dead_q & (p > 0)).any(-1), torch.inf, _kl(log_p, log_q))
    reverse = torch.where((dead_p & (q > 0)).any(-1), torch.inf, _kl(log_q, log_p))
    root = (log_p / 2).exp() - (log_q / 2).exp()
    pair = (forward, reverse, (p - q).abs().sum(-1) / 2, ((root * root).sum(-1) / 2).sqrt())
    pair = [torch.where(impossible, 0.0, value) for value in pair]
    agreement = (of_student[2] == of_teacher[2]).double()
    fields = (
        *(of_student[0], of_teacher[0]),
        *(-(q * log_q).sum(-1), -(p * log_p).sum(-1)),
        *pair,
        *(of_student[3], of_teacher[3]),
        agreement,
        *(of_student[1], of_teacher[1]),
        *(q.amax(-1), p.amax(-1)),
        *(torch.where(impossible, 0.0, (p * q).sum(-1)), (q * q).sum(-1), (p * p).sum(-1)),
    )
    broken = q.isnan().any(-1) | p.isnan().any(-1) | ~valid
    out = torch.where(broken, torch.nan, torch.stack(fields))
    numbers.copy_(torch.where(selected, out, 0.0))
    keep = selected & ~broken
    ids.copy_(torch.where(keep, torch.stack((of_student[2], of_teacher[2])), 0))


def _label_values(
    z: Tensor, labels: Tensor, usable: Tensor, tau: Tensor, columns: float
) -> tuple[Tensor, Tensor]:
    """(log-probabilities (N,), which labels have a logit of -inf). Differentiable."""
    safe = torch.where(usable[:, None], z, 0.0)
    log_soft, dead = _log_softmax(safe, tau, _columns(columns, z.shape[-1]))
    index = torch.where(usable, labels, 0)[:, None]
    gone = dead.gather(-1, index)[:, 0]
    value = log_soft.gather(-1, index)[:, 0]
    return value - torch.where(gone, torch.inf, 0.0), gone


def _usable(logits, labels, mask, tau, ignore_index, columns):
    selected = selection(labels, mask, logits.shape[0], logits.device, ignore_index)
    valid = (tau > 0) & (tau < torch.inf)
    valid = valid & (labels >= 0) & (labels < _columns(columns, logits.shape[-1]))
    return selected, selected & valid


def label_log_probs_fwd(
    logits, labels, mask, temperature, value, stats, tau, ignore_index, columns
) -> None:
    """csrc/divergence/token_stats.h; the backward starts again from the logits."""
    stats.zero_()
    tau = _per_row(temperature, tau, logits)
    selected, usable = _usable(logits, labels, mask, tau, ignore_index, columns)
    safe_tau = torch.where(usable, tau, 1.0)
    out, _ = _label_values(logits.double(), labels, usable, safe_tau, columns)
    value.copy_(torch.where(usable, out, torch.where(selected, torch.nan, 0.0)))


def label_log_probs_bwd(
    logits,
    labels,
    mask,
    temperature,
    stats,
    upstream,
    gradient,
    grad_temperature,
    tau,
    ignore_index,
    columns,
) -> None:
    tau = _per_row(temperature, tau, logits)
    _, usable = _usable(logits, labels, mask, tau, ignore_index, columns)
    z = logits.detach().double().requires_grad_()
    tau = torch.where(usable, tau, 1.0).requires_grad_()
    with autograd_on():
        value, gone = _label_values(z, labels, usable, tau, columns)
        by_z, by_tau = torch.autograd.grad(value.sum(), (z, tau))
    by = torch.where(usable, upstream.double(), 0.0)
    broken = usable & value.isnan() & (by != 0)
    if gradient is not None:
        # Only the log-sum-exp of a label without a logit has a gradient.
        out = torch.where(by[:, None] == 0, 0.0, by_z * by[:, None])
        out = torch.where(z == -torch.inf, 0.0, out)
        gradient.copy_(torch.where(broken[:, None], torch.nan, out))
    if grad_temperature is not None:
        out = torch.where((by == 0) | gone, 0.0, by_tau * by)
        grad_temperature.copy_(torch.where(broken, torch.nan, out))
