"""Divergences in Triton: one program a row, blocks of columns.

    pass 1  running maxima and sums of both rows; for forward KL and cross entropy also the value
    pass 2  the sums of divergence_math.terms: value, S and T (for forward KL and cross entropy only
            where the value of pass 1 is too small to be accurate, or an entry is impossible)
    pass 3  the gradients that are wanted

The contract is csrc/divergence/divergence.h. Deterministic: fixed blocks, no atomics.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import spec as S
from ..spec import DivergenceSpec
from ..torch import selection, unit_factors
from .divergence_math import (
    ALPHA,
    INFINITY,
    NO_KIND,
    SKEW_REVERSE,
    log1p,
    outer_value,
    stopped_and_flowing,
    terms,
)

# Columns a tile, at 8 entries a thread: one 16-byte load of half logits. Compiled for sm_80 and sm_90
# this does not spill for any kind; 16 entries a thread do. Run times on a GPU are not measured yet.
_BLOCK = 2048
_ENTRIES = 8

LOG2E = tl.constexpr(1.4426950408889634)
# Below this one-pass value (nats) a row is finished by non-negative generators: the one-pass form is
# a difference of numbers of order 1, exact to about 1e-7 only.
SMALL = tl.constexpr(0.05)
STATS = tl.constexpr(S.STATS)
MAX_S, SUM_S = tl.constexpr(S.MAX_S), tl.constexpr(S.SUM_S)
MAX_T, SUM_T = tl.constexpr(S.MAX_T), tl.constexpr(S.SUM_T)
DIVERGENCE = tl.constexpr(S.DIVERGENCE)
CENTRE_S, CENTRE_T = tl.constexpr(S.CENTRE_S), tl.constexpr(S.CENTRE_T)
SLOPE, LABEL_LSE, VALUE = tl.constexpr(S.SLOPE), tl.constexpr(S.LABEL_LSE), tl.constexpr(S.VALUE)
FACTOR = tl.constexpr(S.FACTOR)


@triton.jit
def _row_number(pointer, number, row):
    """A row's parameter: its own, or the number of the call."""
    if pointer is None:
        return tl.full((), number, tl.float32)
    else:
        return tl.load(pointer + row)


@triton.jit
def _reference(base2):
    """The finite number that stands for a maximum of -inf (base 2)."""
    return tl.where(base2 == -INFINITY, 0.0, base2)


@triton.jit
def _rescale(old, new, k2):
    """What sums about the maximum `old` are multiplied by to stand about `new`; NaN sums stay NaN."""
    started = old != -INFINITY
    before = tl.where(started, _reference(old * k2) / k2, 0.0)
    after = _reference(new * k2) / k2
    return tl.where(started, tl.exp2((before - after) * k2), 1.0)


@triton.jit
def _load(row_pointer, columns, valid):
    return tl.load(row_pointer + columns, mask=columns < valid, other=-INFINITY).to(tl.float32)


@triton.jit
def _log_ratio(x, y):
    """log(x / y) of two sums: exactly 0 for equal ones, accurate for close ones."""
    small = (x - y) / y
    near = tl.abs(small) <= 0.5
    return tl.where(near, log1p(tl.where(near, small, 0.0)), tl.log(x) - tl.log(y))


@triton.jit
def _entry(z, a, r_s, r_t, inv_s, inv_t, log_s, log_t, log_ratio, k_s, k_t, HAS_TEACHER: tl.constexpr):
    """(p, q, d, lp, lq) of a block. r: reference logits; k = 1 / tau; inv, log: of the sums."""
    dead_s = z == -INFINITY
    x = tl.where(dead_s, 0.0, z - r_s)
    q = tl.where(dead_s, 0.0, tl.exp2(x * (k_s * LOG2E)) * inv_s)
    lq = tl.where(dead_s, -INFINITY, x * k_s - log_s)
    if HAS_TEACHER:
        dead_t = a == -INFINITY
        y = tl.where(dead_t, 0.0, a - r_t)
        p = tl.where(dead_t, 0.0, tl.exp2(y * (k_t * LOG2E)) * inv_t)
        lp = tl.where(dead_t, -INFINITY, y * k_t - log_t)
        # The difference of the logits first: it is exact for close rows. At different temperatures
        # the second term carries what is left.
        both = tl.where(dead_s | dead_t, 0.0, a) - tl.where(dead_s | dead_t, 0.0, z)
        d = (both - (r_t - r_s)) * k_t + tl.where(k_t == k_s, 0.0, x * (k_t - k_s)) - log_ratio
        d = tl.where(dead_s, tl.where(dead_t, 0.0, INFINITY), tl.where(dead_t, -INFINITY, d))
    else:
        p, lp, d = q * 0.0, lq, q * 0.0
    return p, q, d, lp, lq


@triton.jit
def _fill(row_pointer, width, number, BLOCK: tl.constexpr):
    """Write one number over a row."""
    lanes = tl.arange(0, BLOCK)
    block = tl.zeros((BLOCK,), tl.float32) + number
    for start in range(0, width, BLOCK):
        columns = start + lanes
        tl.store(row_pointer + columns, block.to(row_pointer.dtype.element_ty), mask=columns < width)


@triton.jit
def _gradients(
    student, teacher, grad_student, grad_teacher, grad_tau,  # this row's; None: not wanted
    widths_s, widths_t, valid_s, valid_t, label,
    max_s, sum_s, max_t, sum_t, divergence, centre_s, centre_t, slope, lse, value, g,
    tau_s, tau_t, first, second, f, r, x, h, other, label_weight, clip,
    F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, SQUARED: tl.constexpr, CLIP: tl.constexpr, LABEL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 3: gradients of g times the row's value, from its statistics."""
    if (g == 0) | (value != value):
        # A row that does not count, NaN in the logits (slope NaN), or parameters out of range.
        number = tl.where(g == 0, 0.0, tl.where(slope != slope, float("nan"), 0.0))
        if grad_student is not None:
            _fill(grad_student, widths_s, number, BLOCK)
        if grad_teacher is not None:
            _fill(grad_teacher, widths_t, number, BLOCK)
        if grad_tau is not None:
            tl.store(grad_tau, number)
            tl.store(grad_tau + 1, number)
    else:
        k_s, k_t = 1.0 / tau_s, 1.0 / tau_t
        r_s, r_t = max_s / (k_s * LOG2E), max_t / (k_t * LOG2E)
        one_s, one_t = tl.where(sum_s > 0, sum_s, 1.0), tl.where(sum_t > 0, sum_t, 1.0)
        log_s, log_t = tl.log(one_s), tl.log(one_t)
        log_ratio = _log_ratio(one_t, one_s)
        flows_s = (slope != 0) & (tl.abs(centre_s) < INFINITY)
        flows_t = (slope != 0) & (tl.abs(centre_t) < INFINITY)
        moment_s = tl.zeros((BLOCK,), tl.float32)
        moment_t = tl.zeros((BLOCK,), tl.float32)
        lanes = tl.arange(0, BLOCK)
        hit = tl.where((label >= 0) & (label < widths_s) & (lse < INFINITY), label, -1).to(tl.int32)
        end = widths_s
        if teacher is not None:
            end = tl.maximum(widths_s, widths_t)
        for start in range(0, end, BLOCK):
            columns = start + lanes
            z = _load(student, columns, valid_s)
            if teacher is not None:
                a = _load(teacher, columns, valid_t)
            else:
                a = z
            p, q, d, lp, lq = _entry(z, a, r_s, r_t, 1.0 / one_s, 1.0 / one_t, log_s, log_t,
                                     log_ratio, k_s, k_t, teacher is not None)
            _, s, t, _, _ = terms(p, q, d, lp, lq, f, r, x, h, other, first, second, F, R, X, H,
                                  KIND, DETACH)
            dead = z == -INFINITY
            slant = tl.where(dead, 0.0, (s - q * centre_s) * (slope * k_s))
            slant = tl.where(flows_s, slant, 0.0)
            if grad_tau is not None:
                # The mean of the logits is free, as the gradient sums to 0.
                moment_s += slant * tl.where(dead, 0.0, z - r_s)
            if grad_student is not None:
                if LABEL:
                    soft = tl.exp2((tl.where(dead, -INFINITY, z) - lse) * LOG2E)
                    soft = tl.where(columns == hit, soft - 1.0, soft)
                    slant += tl.where(dead, 0.0, label_weight * soft)
                tl.store(grad_student + columns,
                         (g * slant).to(grad_student.dtype.element_ty), mask=columns < widths_s)
            if teacher is not None:
                dead = a == -INFINITY
                slant = tl.where(dead, 0.0, (t - p * centre_t) * (slope * k_t))
                slant = tl.where(flows_t, slant, 0.0)
                if grad_tau is not None:
                    moment_t += slant * tl.where(dead, 0.0, a - r_t)
                if grad_teacher is not None:
                    tl.store(grad_teacher + columns,
                             (g * slant).to(grad_teacher.dtype.element_ty), mask=columns < widths_t)
        if grad_tau is not None:
            by_s = -k_s * tl.sum(moment_s, 0)
            if SQUARED:
                bounded = divergence
                if CLIP:
                    bounded = tl.minimum(bounded, clip)
                by_s += 2.0 * tau_s * bounded
            tl.store(grad_tau, g * by_s)
            tl.store(grad_tau + 1, -g * k_t * tl.sum(moment_t, 0))


@triton.jit
def _forward_kernel(
    student, teacher, labels, selected, tau_s_rows, tau_t_rows, first_rows, second_rows,
    stats, grad_student, grad_teacher, grad_tau,
    stride_s, stride_t, grad_stride_s, grad_stride_t, width_s, width_t, valid_s, valid_t,
    tau_s_number, tau_t_number, first_number, second_number, f, r, x, h, other, label_weight, clip,
    F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, OUTER: tl.constexpr, SQUARED: tl.constexpr, CLIP: tl.constexpr,
    LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of a row (all but factor and unit, which are read), and the wanted gradients."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    if teacher is not None:
        teacher += row * stride_t
    stats += row * STATS
    if grad_student is not None:
        grad_student += row * grad_stride_s
    if grad_teacher is not None:
        grad_teacher += row * grad_stride_t
    if grad_tau is not None:
        grad_tau += row * 2
    if tl.load(selected + row) == 0:
        for i in tl.static_range(FACTOR):
            tl.store(stats + i, 0.0)
        if grad_student is not None:
            _fill(grad_student, width_s, 0.0, BLOCK)
        if grad_teacher is not None:
            _fill(grad_teacher, width_t, 0.0, BLOCK)
        if grad_tau is not None:
            tl.store(grad_tau, 0.0)
            tl.store(grad_tau + 1, 0.0)
    else:
        _selected_row(
            row, student, teacher, labels, tau_s_rows, tau_t_rows, first_rows, second_rows, stats,
            grad_student, grad_teacher, grad_tau, width_s, width_t, valid_s, valid_t,
            tau_s_number, tau_t_number, first_number, second_number, f, r, x, h, other,
            label_weight, clip, F, R, X, H, KIND, DETACH, OUTER, SQUARED, CLIP, LABEL, BLOCK,
        )  # fmt: skip


@triton.jit
def _selected_row(
    row, student, teacher, labels, tau_s_rows, tau_t_rows, first_rows, second_rows,
    stats, grad_student, grad_teacher, grad_tau, width_s, width_t, valid_s, valid_t,
    tau_s_number, tau_t_number, first_number, second_number, f, r, x, h, other, label_weight, clip,
    F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, OUTER: tl.constexpr, SQUARED: tl.constexpr, CLIP: tl.constexpr,
    LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HAS_TEACHER: tl.constexpr = teacher is not None
    # Forward KL and cross entropy come out of pass 1.
    ONE_PASS: tl.constexpr = HAS_TEACHER and KIND == NO_KIND and not R and not H
    tau_s = _row_number(tau_s_rows, tau_s_number, row)
    tau_t = _row_number(tau_t_rows, tau_t_number, row)
    first = _row_number(first_rows, first_number, row)
    if KIND == ALPHA:
        second = 1.0 - first
    else:
        second = _row_number(second_rows, second_number, row)
    # What only the data can tell: such a row is NaN with gradient 0.
    bad = (tau_s > 0) == 0
    if HAS_TEACHER:
        bad = bad | ((tau_t > 0) == 0)
    if KIND != NO_KIND and KIND <= SKEW_REVERSE:
        bad = bad | (((first >= 0) & (first <= 1)) == 0)
    k_s, k_t = 1.0 / tau_s, 1.0 / tau_t
    k2_s, k2_t = k_s * LOG2E, k_t * LOG2E
    lanes = tl.arange(0, BLOCK)
    end = valid_s
    if HAS_TEACHER:
        end = tl.maximum(valid_s, valid_t)

    # Pass 1.
    top_s = tl.full((), -INFINITY, tl.float32)
    top_t = tl.full((), -INFINITY, tl.float32)
    anchor_z = tl.full((), 0.0, tl.float32)
    anchor = tl.full((), 0.0, tl.float32)
    total_s = tl.zeros((BLOCK,), tl.float32)
    total_t = tl.zeros((BLOCK,), tl.float32)
    total_1 = tl.zeros((BLOCK,), tl.float32)  # at tau = 1, for the label term
    total_d = tl.zeros((BLOCK,), tl.float32)  # p-weighted differences of the logits less anchor
    total_x = tl.zeros((BLOCK,), tl.float32)  # p-weighted student logits less anchor_z
    lost = tl.full((BLOCK,), -INFINITY, tl.float32)  # teacher logits over impossible student ones
    for start in range(0, end, BLOCK):
        columns = start + lanes
        z = _load(student, columns, valid_s)
        new_s = tl.maximum(top_s, tl.max(z, 0))
        e_s = tl.exp2((z - _reference(new_s * k2_s) / k2_s) * k2_s)
        total_s = total_s * _rescale(top_s, new_s, k2_s) + e_s
        if LABEL:
            # About the same reference as the softmax at tau.
            shift = _reference(new_s * k2_s) / k2_s
            started = top_s != -INFINITY
            before = tl.where(started, _reference(top_s * k2_s) / k2_s, shift)
            total_1 = total_1 * tl.exp2((before - shift) * LOG2E) + tl.exp2((z - shift) * LOG2E)
        if HAS_TEACHER:
            a = _load(teacher, columns, valid_t)
            new_t = tl.maximum(top_t, tl.max(a, 0))
            e_t = tl.exp2((a - _reference(new_t * k2_t) / k2_t) * k2_t)
            moved = _rescale(top_t, new_t, k2_t)
            total_t = total_t * moved + e_t
            if ONE_PASS:
                known = (start == 0) & (new_s > -INFINITY) & (new_t > -INFINITY)
                anchor_z = tl.where(known, new_s, anchor_z)
                anchor = tl.where(known, new_t - new_s, anchor)
                gone = z == -INFINITY
                lost = tl.maximum(lost, tl.where(gone, a, -INFINITY))
                gone = gone | (a == -INFINITY)
                free_z = tl.where(gone, 0.0, z - anchor_z)
                free_d = tl.where(gone, 0.0, a) - tl.where(gone, 0.0, z) - anchor
                difference = free_d * k_t + tl.where(k_t == k_s, 0.0, free_z * (k_t - k_s))
                total_d = total_d * moved + tl.where(gone, 0.0, e_t * difference)
                if X:
                    total_x = total_x * moved + tl.where(gone, 0.0, e_t * free_z)
            top_t = new_t
        top_s = new_s
    max_s, max_t = _reference(top_s * k2_s), _reference(top_t * k2_t)
    r_s, r_t = max_s / k2_s, max_t / k2_t
    sum_s, sum_t = tl.sum(total_s, 0), tl.sum(total_t, 0)
    one_s, one_t = tl.where(sum_s == 0, 1.0, sum_s), tl.where(sum_t == 0, 1.0, sum_t)
    log_s, log_t = tl.log(one_s), tl.log(one_t)
    log_ratio = _log_ratio(one_t, one_s)

    # Pass 2.
    no_q = bad & (bad == 0)
    no_p = no_q
    value = tl.full((), 0.0, tl.float32)
    centre_s = tl.full((), 0.0, tl.float32)
    centre_t = tl.full((), 0.0, tl.float32)
    unfinished = tl.full((), 1, tl.int32)
    if ONE_PASS:
        no_q = tl.exp2((tl.max(lost, 0) - r_t) * k2_t) / one_t > 0
        shifts = (anchor - (r_t - r_s)) * k_t
        shifts += tl.where(k_t == k_s, 0.0, (anchor_z - r_s) * (k_t - k_s))
        small = tl.sum(total_d, 0) / one_t + shifts - log_ratio  # forward KL
        if F:
            value += f * small
            centre_t += f * small
        if X:
            cross = log_s - (tl.sum(total_x, 0) / one_t + anchor_z - r_s) * k_s
            value += x * cross
            centre_t += x * cross
            if not F:
                small = cross
        unfinished = tl.where((small < SMALL) | no_q, 1, 0)
    if unfinished != 0:
        sum_value = tl.zeros((BLOCK,), tl.float32)
        sum_cs = tl.zeros((BLOCK,), tl.float32)
        sum_ct = tl.zeros((BLOCK,), tl.float32)
        lost_p = tl.zeros((BLOCK,), tl.float32)  # p of entries with q = 0
        lost_q = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, end, BLOCK):
            columns = start + lanes
            z = _load(student, columns, valid_s)
            if HAS_TEACHER:
                a = _load(teacher, columns, valid_t)
            else:
                a = z
            p, q, d, lp, lq = _entry(z, a, r_s, r_t, 1.0 / one_s, 1.0 / one_t, log_s, log_t,
                                     log_ratio, k_s, k_t, HAS_TEACHER)
            v, s, t, cs, ct = terms(p, q, d, lp, lq, f, r, x, h, other, first, second, F, R, X, H,
                                    KIND, DETACH)
            sum_value += v
            # Impossible entries have no gradient, so they are not in the centres.
            sum_cs += tl.where(z == -INFINITY, 0.0, cs)
            if HAS_TEACHER:
                sum_ct += tl.where(a == -INFINITY, 0.0, ct)
                lost_p += tl.where(z == -INFINITY, p, 0.0)
                lost_q += tl.where(a == -INFINITY, q, 0.0)
        value = tl.sum(sum_value, 0)
        centre_s = tl.sum(sum_cs, 0)
        centre_t = tl.sum(sum_ct, 0)
        outside_p, outside_q = tl.sum(lost_p, 0), tl.sum(lost_q, 0)
        no_q = outside_p > 0
        no_p = outside_q > 0
        if F or X:
            centre_s += (f + x) * outside_p
        if R:
            centre_t += r * outside_q

    # The row's own arithmetic.
    stopped, flowing = stopped_and_flowing(no_q, no_p, first, second, F, R, X, KIND)
    divergence, slope = outer_value(value, first, OUTER)
    divergence = tl.where(stopped | flowing, INFINITY, divergence)
    slope = tl.where(stopped, 0.0, tl.where(flowing, 1.0, slope))
    centre_t = tl.where(flowing & (centre_t != centre_t), INFINITY, centre_t)
    if HAS_TEACHER:
        impossible = sum_t == 0
        broken = (sum_s != sum_s) | (sum_t != sum_t)
        divergence = tl.where(broken, float("nan"), divergence)
        divergence = tl.where(impossible, 0.0, divergence)
        slope = tl.where(impossible, 0.0, slope)
    value = divergence
    if CLIP:
        slope = tl.where(value > clip, 0.0, slope)
        value = tl.where(value > clip, clip, value)
    if SQUARED:
        value *= tau_s * tau_s
        slope *= tau_s * tau_s
    lse = tl.full((), 0.0, tl.float32)
    if LABEL:
        label = tl.load(labels + row)
        bad = bad | (label < 0) | (label >= width_s)
        there = (label >= 0) & (label < valid_s)
        z = tl.load(student + label, mask=there, other=-INFINITY).to(tl.float32)
        dead = z == -INFINITY
        sum_1 = tl.sum(total_1, 0)
        log_1 = tl.log(tl.where(sum_1 == 0, 1.0, sum_1))
        # An impossible label costs inf and has no gradient.
        lse = tl.where(dead, INFINITY, r_s + log_1)
        value += label_weight * tl.where(dead, INFINITY, r_s - tl.where(dead, 0.0, z) + log_1)
    else:
        label = tl.full((), -1, tl.int64)
    slope = tl.where(value != value, float("nan"), slope)
    value = tl.where(bad, float("nan"), value)
    slope = tl.where(bad, 0.0, slope)
    divergence = tl.where(bad, float("nan"), divergence)
    tl.store(stats + MAX_S, max_s)
    tl.store(stats + SUM_S, sum_s)
    tl.store(stats + MAX_T, max_t)
    tl.store(stats + SUM_T, sum_t)
    tl.store(stats + DIVERGENCE, divergence)
    tl.store(stats + CENTRE_S, centre_s)
    tl.store(stats + CENTRE_T, centre_t)
    tl.store(stats + SLOPE, slope)
    tl.store(stats + LABEL_LSE, lse)
    tl.store(stats + VALUE, value)
    if grad_student is not None or grad_teacher is not None or grad_tau is not None:
        g = tl.load(stats + FACTOR)
        _gradients(
            student, teacher, grad_student, grad_teacher, grad_tau, width_s, width_t, valid_s,
            valid_t, label, max_s, sum_s, max_t, sum_t, divergence, centre_s, centre_t, slope, lse,
            value, g, tau_s, tau_t, first, second, f, r, x, h, other, label_weight, clip,
            F, R, X, H, KIND, DETACH, SQUARED, CLIP, LABEL, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    student, teacher, labels, tau_s_rows, tau_t_rows, first_rows, second_rows,
    stats, factors, grad_student, grad_teacher, grad_tau,
    stride_s, stride_t, grad_stride_s, grad_stride_t, width_s, width_t, valid_s, valid_t,
    tau_s_number, tau_t_number, first_number, second_number, f, r, x, h, other, label_weight, clip,
    F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, SQUARED: tl.constexpr, CLIP: tl.constexpr, LABEL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    if teacher is not None:
        teacher += row * stride_t
    stats += row * STATS
    if grad_student is not None:
        grad_student += row * grad_stride_s
    if grad_teacher is not None:
        grad_teacher += row * grad_stride_t
    if grad_tau is not None:
        grad_tau += row * 2
    first = _row_number(first_rows, first_number, row)
    if KIND == ALPHA:
        second = 1.0 - first
    else:
        second = _row_number(second_rows, second_number, row)
    if LABEL:
        label = tl.load(labels + row)
    else:
        label = tl.full((), -1, tl.int64)
    _gradients(
        student, teacher, grad_student, grad_teacher, grad_tau, width_s, width_t, valid_s, valid_t,
        label, tl.load(stats + MAX_S), tl.load(stats + SUM_S), tl.load(stats + MAX_T),
        tl.load(stats + SUM_T), tl.load(stats + DIVERGENCE), tl.load(stats + CENTRE_S),
        tl.load(stats + CENTRE_T), tl.load(stats + SLOPE), tl.load(stats + LABEL_LSE),
        tl.load(stats + VALUE), tl.load(factors + row),
        _row_number(tau_s_rows, tau_s_number, row), _row_number(tau_t_rows, tau_t_number, row),
        first, second, f, r, x, h, other, label_weight, clip,
        F, R, X, H, KIND, DETACH, SQUARED, CLIP, LABEL, BLOCK,
    )  # fmt: skip


@triton.jit
def _scale_kernel(tensor, factor, stride, width, blocks, BLOCK: tl.constexpr):
    """rows of `width` times one number; nothing is touched where it is 1."""
    number = tl.load(factor).to(tl.float32)
    if number != 1.0:
        program = tl.program_id(0).to(tl.int64)
        columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        pointers = tensor + (program // blocks) * stride + columns
        inside = columns < width
        scaled = tl.load(pointers, mask=inside).to(tl.float32) * number
        tl.store(pointers, scaled.to(tensor.dtype.element_ty), mask=inside)


# The interpreter wraps kernels in a class of its own.
INTERPRETED = not isinstance(_forward_kernel, triton.runtime.JITFunction)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check(name: str, logits: Tensor) -> None:
    if logits.dtype not in _FLOATS:
        raise TypeError(
            f"backend 'triton': {name}: expected float32, float16 or bfloat16, got {logits.dtype}"
        )


def _device(tensor: Tensor):
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _block(width: int) -> int:
    return max(16, min(_BLOCK, triton.next_power_of_2(width)))


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _valid(columns: float, width: int) -> int:
    return int(columns) if 0 < columns < width else width


def _arguments(student: Tensor, teacher: Tensor | None, grad_student: Tensor | None,
               grad_teacher: Tensor | None, spec: DivergenceSpec) -> tuple[tuple, dict]:
    """What both kernels take after their pointers: numbers, and compile-time options."""
    width_s = student.shape[1]
    width_t = 0 if teacher is None else teacher.shape[1]
    numbers = (
        _row_stride(student), _row_stride(teacher), _row_stride(grad_student),
        _row_stride(grad_teacher), width_s, width_t, _valid(spec.student_columns, width_s),
        _valid(spec.teacher_columns, width_t), float(spec.student_temperature),
        float(spec.teacher_temperature), float(spec.first), float(spec.second),
        float(spec.forward_kl), float(spec.reverse_kl), float(spec.cross_entropy),
        float(spec.entropy), float(spec.other), float(spec.label_weight), float(spec.clip_token),
    )  # fmt: skip
    options = {
        "F": spec.forward_kl != 0, "R": spec.reverse_kl != 0, "X": spec.cross_entropy != 0,
        "H": spec.entropy != 0, "KIND": int(spec.kind), "DETACH": spec.detach_mixture != 0,
        "SQUARED": spec.temperature_squared != 0, "CLIP": spec.clip_token > 0,
        "LABEL": spec.label_weight != 0, "BLOCK": _block(max(width_s, width_t)),
    }  # fmt: skip
    if not INTERPRETED:
        options["num_warps"] = max(1, options["BLOCK"] // (32 * _ENTRIES))
    return numbers, options


def divergence_fwd(student, teacher, labels, mask, weight, student_temperature,
                   teacher_temperature, first, second, num_items, value, stats, grad_student,
                   grad_teacher, grad_temperature, spec) -> None:
    """Forward of csrc/divergence/divergence.h."""
    spec = DivergenceSpec(*spec)
    _check("student", student)
    if teacher is not None:
        _check("teacher", teacher)
    selected = selection(labels, mask, student.shape[0], student.device, spec.ignore_index)
    # The reduction is (N,) arithmetic on the device: no number comes back to the host.
    if weight is not None:
        weight = torch.where(selected, weight.double(), 0.0)
    items = None if num_items is None else num_items.double()
    unit = unit_factors(selected, weight, items, spec)
    factor = unit if weight is None else unit * weight
    stats[:, S.FACTOR] = factor.to(stats.dtype)
    stats[:, S.UNIT] = unit.to(stats.dtype)
    numbers, options = _arguments(student, teacher, grad_student, grad_teacher, spec)
    if student.shape[0] > 0:
        with _device(student):
            _forward_kernel[(student.shape[0],)](
                student, teacher, labels, selected.view(torch.uint8), student_temperature,
                teacher_temperature, first, second, stats, grad_student, grad_teacher,
                grad_temperature, *numbers, OUTER=int(spec.outer), **options,
            )
    rows = stats[:, S.VALUE].double()
    weighted = torch.where(factor == 0, 0.0, rows * factor)
    value.copy_(weighted if spec.reduction == S.NONE else weighted.sum())


def divergence_bwd(student, teacher, labels, mask, student_temperature, teacher_temperature, first,
                   second, stats, upstream, grad_student, grad_teacher, grad_temperature,
                   spec) -> None:
    """Backward of csrc/divergence/divergence.h, from the logits and the statistics."""
    spec = DivergenceSpec(*spec)
    _check("student", student)
    if teacher is not None:
        _check("teacher", teacher)
    factor = stats[:, S.FACTOR]
    factors = torch.where(factor == 0, 0.0, factor * upstream).contiguous()
    numbers, options = _arguments(student, teacher, grad_student, grad_teacher, spec)
    if student.shape[0] > 0:
        with _device(student):
            _backward_kernel[(student.shape[0],)](
                student, teacher, labels, student_temperature, teacher_temperature, first, second,
                stats, factors, grad_student, grad_teacher, grad_temperature, *numbers, **options,
            )


def scale(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-d), in place; tensor (N, V) of any row stride, or contiguous.

    A factor of 1, which is what `loss.backward()` sends, is seen on the device and writes nothing.
    """
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        rows, width, stride = 1, tensor.numel(), 0
    else:
        (rows, width), stride = tensor.shape, tensor.stride(0)
    block = _block(width)
    blocks = triton.cdiv(width, block)
    with _device(tensor):
        _scale_kernel[(rows * blocks,)](tensor, factor.contiguous(), stride, width, blocks,
                                        BLOCK=block)
