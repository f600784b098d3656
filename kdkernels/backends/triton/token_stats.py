"""token_stats and label_log_probs in Triton: one program a row, blocks of columns.

    pass 1  largest logits, their ids and the normalisers of both rows
    pass 2  every sum, with log p - log q from the difference of the logits

The contract is csrc/divergence/token_stats.h; p, q and d are those of divergence_rows.entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch import selection
from .common import INTERPRETED
from .divergence import _ENTRIES, _block, _check, _device, _row_stride, _valid
from .divergence_math import INFINITY, expm1, kl_generator, small_gap, zero_times
from .divergence_rows import (
    LOG2E,
    entry,
    fill,
    load,
    log_ratio,
    reference,
    rescale,
    round_to,
    row_number,
)

_NUMBERS = tl.constexpr(18)
_NAN = tl.constexpr(float("nan"))


@triton.jit
def _is_temperature(tau):
    return (tau > 0) & (tau < INFINITY)


@triton.jit
def _push(x, columns, top, at, r, total, k2):
    """One block of a row into (largest, its id, reference, sums about it)."""
    highest = tl.max(x, 0)
    id = tl.min(tl.where(x == highest, columns, 2147483647), 0)
    at = tl.where(highest > top, id, at)
    higher = tl.maximum(top, highest)
    about = reference(higher)
    total = total * rescale(top != -INFINITY, r, about, k2) + tl.exp2((x - about) * k2)
    return higher, at, about, total


@triton.jit
def _label_log_prob(row_pointer, label, valid, r, log_sum, k):
    logit = load(row_pointer, label, valid)
    dead = logit == -INFINITY
    return tl.where(dead, -INFINITY, (tl.where(dead, r, logit) - r) * k - log_sum)


@triton.jit
def _stats_kernel(
    student, teacher, labels, selected, tau_s_rows, tau_t_rows, numbers, ids,
    stride_s, stride_t, rows, valid_s, valid_t, tau_s_number, tau_t_number,
    BLOCK: tl.constexpr,
):  # fmt: skip
    HAS_TEACHER: tl.constexpr = teacher is not None
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    if HAS_TEACHER:
        teacher += row * stride_t
    tau_s = row_number(tau_s_rows, tau_s_number, row)
    valid = _is_temperature(tau_s)
    if HAS_TEACHER:
        tau_t = row_number(tau_t_rows, tau_t_number, row)
        valid = valid & _is_temperature(tau_t)
    else:
        tau_t = tau_s
    label = tl.full((), 0, tl.int64)
    if labels is not None:
        label = tl.load(labels + row)
        valid = valid & (label >= 0) & (label < valid_s)
    chosen = tl.load(selected + row) != 0
    numbers += row
    ids += row
    if (chosen & valid) == 0:
        number = tl.where(chosen, _NAN, 0.0)
        for i in tl.static_range(_NUMBERS):
            tl.store(numbers + i * rows, number)
        tl.store(ids, tl.full((), 0, tl.int64))
        tl.store(ids + rows, tl.full((), 0, tl.int64))
    else:
        k_s, k_t = 1.0 / tau_s, 1.0 / tau_t
        lanes = tl.arange(0, BLOCK)
        end = valid_s
        if HAS_TEACHER:
            end = tl.maximum(valid_s, valid_t)
        top_s = tl.full((), -INFINITY, tl.float32)
        top_t = tl.full((), -INFINITY, tl.float32)
        at_s = tl.full((), 0, tl.int32)
        at_t = tl.full((), 0, tl.int32)
        r_s = tl.full((), 0.0, tl.float32)
        r_t = tl.full((), 0.0, tl.float32)
        total_s = tl.zeros((BLOCK,), tl.float32)
        total_t = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, end, BLOCK):
            columns = start + lanes
            z = load(student, columns, valid_s)
            top_s, at_s, r_s, total_s = _push(z, columns, top_s, at_s, r_s, total_s, k_s * LOG2E)
            if HAS_TEACHER:
                a = load(teacher, columns, valid_t)
                top_t, at_t, r_t, total_t = _push(
                    a, columns, top_t, at_t, r_t, total_t, k_t * LOG2E
                )
        sum_s, sum_t = tl.sum(total_s, 0), tl.sum(total_t, 0)
        one_s, one_t = tl.where(sum_s == 0, 1.0, sum_s), tl.where(sum_t == 0, 1.0, sum_t)
        log_s, log_t = tl.log(one_s), tl.log(one_t)
        gap = log_ratio(one_t, one_s)

        forward = tl.zeros((BLOCK,), tl.float32)
        reverse = tl.zeros((BLOCK,), tl.float32)
        distance = tl.zeros((BLOCK,), tl.float32)
        slope = tl.zeros((BLOCK,), tl.float32)  # of the total variation, by an error of all d
        excess = tl.zeros((BLOCK,), tl.float32)  # q - p: what rounding made of 0
        hellinger = tl.zeros((BLOCK,), tl.float32)
        entropy_s = tl.zeros((BLOCK,), tl.float32)
        entropy_t = tl.zeros((BLOCK,), tl.float32)
        dot = tl.zeros((BLOCK,), tl.float32)
        square_s = tl.zeros((BLOCK,), tl.float32)
        square_t = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, end, BLOCK):
            columns = start + lanes
            z = load(student, columns, valid_s)
            if HAS_TEACHER:
                a = load(teacher, columns, valid_t)
            else:
                a = z
            p, q, d, lp, lq = entry(
                z, a, r_s, r_t, 1.0 / one_s, 1.0 / one_t, log_s, log_t, gap, k_s, k_t, HAS_TEACHER
            )
            forward += kl_generator(p, q - p, d)
            reverse += kl_generator(q, p - q, -d)
            u = expm1(-0.5 * tl.abs(d))
            base = tl.where(d >= 0, p, q)
            distance += tl.where(base > 0, 0.5 * base * tl.abs(u * (2.0 + u)), 0.0)
            slope += tl.where(d > 0, 0.5 * q, tl.where(d < 0, -0.5 * p, 0.0))
            excess += tl.where(tl.abs(d) < 1.0, p * (small_gap(d) - d), q - p)
            hellinger += tl.where(base > 0, 0.5 * base * u * u, 0.0)
            entropy_s -= zero_times(q, lq)
            entropy_t -= zero_times(p, lp)
            dot += p * q
            square_s += q * q
            square_t += p * p
        broken = (sum_s != sum_s) | (sum_t != sum_t)
        nothing = sum_t == 0  # no teacher, or one that is impossible everywhere
        forward_kl = tl.where(nothing, 0.0, tl.sum(forward, 0))
        reverse_kl = tl.where(nothing, 0.0, tl.sum(reverse, 0))
        # The normalisers are rounded, so all d are off by one number, which the excess measures. It
        # moves the total variation by itself, the others by its square.
        variation = tl.sum(distance, 0)
        off = tl.sum(excess, 0)
        variation += tl.where(tl.abs(off) < 1e-3, off * tl.sum(slope, 0), 0.0)
        variation = tl.where(nothing, 0.0, tl.maximum(variation, 0.0))
        root = tl.where(nothing, 0.0, tl.sqrt(tl.sum(hellinger, 0)))
        both = tl.where(nothing, 0.0, tl.sum(dot, 0))
        label_s = tl.full((), 0.0, tl.float32)
        label_t = tl.full((), 0.0, tl.float32)
        if labels is not None:
            label_s = _label_log_prob(student, label, valid_s, r_s, log_s, k_s)
            if HAS_TEACHER:
                label_t = _label_log_prob(teacher, label, valid_t, r_t, log_t, k_t)
        lse_s = tl.where(sum_s == 0, -INFINITY, r_s * k_s + log_s)
        lse_t = tl.where(sum_t == 0, -INFINITY, r_t * k_t + log_t)
        prob_s = tl.where(sum_s == 0, 0.0, 1.0 / one_s)
        prob_t = tl.where(sum_t == 0, 0.0, 1.0 / one_t)
        same = tl.where(at_s == at_t, 1.0, 0.0)
        tl.store(numbers, tl.where(broken, _NAN, lse_s))
        tl.store(numbers + rows, tl.where(broken, _NAN, lse_t))
        tl.store(numbers + 2 * rows, tl.where(broken, _NAN, tl.sum(entropy_s, 0)))
        tl.store(numbers + 3 * rows, tl.where(broken, _NAN, tl.sum(entropy_t, 0)))
        tl.store(numbers + 4 * rows, tl.where(broken, _NAN, forward_kl))
        tl.store(numbers + 5 * rows, tl.where(broken, _NAN, reverse_kl))
        tl.store(numbers + 6 * rows, tl.where(broken, _NAN, variation))
        tl.store(numbers + 7 * rows, tl.where(broken, _NAN, root))
        tl.store(numbers + 8 * rows, tl.where(broken, _NAN, label_s))
        tl.store(numbers + 9 * rows, tl.where(broken, _NAN, label_t))
        tl.store(numbers + 10 * rows, tl.where(broken, _NAN, same))
        tl.store(numbers + 11 * rows, tl.where(broken, _NAN, top_s))
        tl.store(numbers + 12 * rows, tl.where(broken, _NAN, top_t))
        tl.store(numbers + 13 * rows, tl.where(broken, _NAN, prob_s))
        tl.store(numbers + 14 * rows, tl.where(broken, _NAN, prob_t))
        tl.store(numbers + 15 * rows, tl.where(broken, _NAN, both))
        tl.store(numbers + 16 * rows, tl.where(broken, _NAN, tl.sum(square_s, 0)))
        tl.store(numbers + 17 * rows, tl.where(broken, _NAN, tl.sum(square_t, 0)))
        tl.store(ids, tl.where(broken, 0, at_s).to(tl.int64))
        tl.store(ids + rows, tl.where(broken, 0, at_t).to(tl.int64))


@triton.jit
def _label_forward_kernel(
    logits, labels, selected, tau_rows, value, stats, stride, valid_columns, tau_number,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    tau = row_number(tau_rows, tau_number, row)
    label = tl.load(labels + row)
    chosen = tl.load(selected + row) != 0
    valid = _is_temperature(tau) & (label >= 0) & (label < valid_columns)
    out = tl.where(chosen, _NAN, 0.0)
    about = tl.full((), 0.0, tl.float32)
    total = tl.full((), -1.0, tl.float32)
    if chosen & valid:
        k = 1.0 / tau
        lanes = tl.arange(0, BLOCK)
        top = tl.full((), -INFINITY, tl.float32)
        about = tl.full((), 0.0, tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, valid_columns, BLOCK):
            z = load(logits, start + lanes, valid_columns)
            higher = tl.maximum(top, tl.max(z, 0))
            shifted = reference(higher)
            sums = sums * rescale(top != -INFINITY, about, shifted, k * LOG2E) + tl.exp2(
                (z - shifted) * (k * LOG2E)
            )
            top, about = higher, shifted
        total = tl.sum(sums, 0)
        log_sum = tl.log(tl.where(total == 0, 1.0, total))
        out = _label_log_prob(logits, label, valid_columns, about, log_sum, k)
        out = tl.where(total != total, _NAN, out)
    tl.store(value + row, out)
    tl.store(stats + row * 2, about)
    tl.store(stats + row * 2 + 1, total)


@triton.jit
def _label_backward_kernel(
    logits, labels, tau_rows, stats, upstream, gradient, grad_tau, stride, grad_stride, width,
    valid_columns, tau_number, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if gradient is not None:
        gradient += row * grad_stride
    about = tl.load(stats + row * 2)
    total = tl.load(stats + row * 2 + 1)
    g = tl.load(upstream + row)
    refused = (total < 0) | (g == 0)
    if refused | (total != total):
        number = tl.where(refused, 0.0, _NAN)
        if gradient is not None:
            fill(gradient, width, number, BLOCK)
        if grad_tau is not None:
            tl.store(grad_tau + row, number)
    else:
        k = 1.0 / row_number(tau_rows, tau_number, row)
        label = tl.load(labels + row)
        logit = load(logits, label, valid_columns)
        possible = logit != -INFINITY
        hot_column = tl.where(possible, label, -1)
        inverse = 1.0 / tl.where(total == 0, 1.0, total)
        lanes = tl.arange(0, BLOCK)
        moment = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + lanes
            z = load(logits, columns, valid_columns)
            q = tl.exp2((z - about) * (k * LOG2E)) * inverse
            if grad_tau is not None:
                moment += tl.where(q > 0, q * tl.where(z == -INFINITY, 0.0, z - about), 0.0)
            if gradient is not None:
                hot = tl.where(columns == hot_column, 1.0, 0.0)
                tl.store(
                    gradient + columns,
                    round_to(g * k * (hot - q), gradient.dtype.element_ty),
                    mask=columns < width,
                )
        if grad_tau is not None:
            apart = tl.where(possible, logit, about) - about - tl.sum(moment, 0)
            tl.store(grad_tau + row, tl.where(possible, -g * k * k * apart, 0.0))


def _options(width: int) -> dict:
    options = {"BLOCK": _block(width)}
    if not INTERPRETED:
        options["num_warps"] = max(1, options["BLOCK"] // (32 * _ENTRIES))
    return options


def _selected(labels, mask, logits: Tensor, ignore_index: float) -> Tensor:
    rows = logits.shape[0]
    return selection(labels, mask, rows, logits.device, ignore_index).view(torch.uint8)


def token_stats(
    student,
    teacher,
    labels,
    mask,
    student_temperature,
    teacher_temperature,
    numbers,
    ids,
    tau_s,
    tau_t,
    ignore_index,
    student_columns,
    teacher_columns,
) -> None:
    _check("student", student)
    width = student.shape[1]
    teacher_width = 0
    if teacher is not None:
        _check("teacher", teacher)
        teacher_width = teacher.shape[1]
    rows = student.shape[0]
    if rows == 0:
        return
    with _device(student):
        _stats_kernel[(rows,)](
            student, teacher, labels, _selected(labels, mask, student, ignore_index),
            student_temperature, teacher_temperature, numbers, ids, _row_stride(student),
            _row_stride(teacher), rows, _valid(student_columns, width),
            _valid(teacher_columns, teacher_width), float(tau_s), float(tau_t),
            **_options(max(width, teacher_width)),
        )  # fmt: skip


def label_log_probs_fwd(
    logits, labels, mask, temperature, value, stats, tau, ignore_index, columns
) -> None:
    _check("logits", logits)
    rows, width = logits.shape
    if rows == 0:
        return
    with _device(logits):
        _label_forward_kernel[(rows,)](
            logits, labels, _selected(labels, mask, logits, ignore_index), temperature, value,
            stats, _row_stride(logits), _valid(columns, width), float(tau), **_options(width),
        )  # fmt: skip


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
    _check("logits", logits)
    rows, width = logits.shape
    if rows == 0:
        return
    with _device(logits):
        _label_backward_kernel[(rows,)](
            logits, labels, temperature, stats, upstream, gradient, grad_temperature,
            _row_stride(logits), _row_stride(gradient), width, _valid(columns, width), float(tau),
            **_options(width),
        )  # fmt: skip
