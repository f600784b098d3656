"""What the divergence kernels are made of: reading a row, its probabilities, and pass 3."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import spec as S
from .common import IN_PYTHON
from .divergence_math import BHATTACHARYYA, INFINITY, log1p, overlap_terms, terms

LOG2E = tl.constexpr(1.4426950408889634)
# Below this one-pass value (nats) a row is finished by non-negative generators: the one-pass form
# is a difference of numbers of order 1, exact to about 1e-7 only.
SMALL = tl.constexpr(0.05)
HUGE = tl.constexpr(1e30)
STATS = tl.constexpr(S.STATS)
MAX_S, SUM_S = tl.constexpr(S.MAX_S), tl.constexpr(S.SUM_S)
MAX_T, SUM_T = tl.constexpr(S.MAX_T), tl.constexpr(S.SUM_T)
DIVERGENCE = tl.constexpr(S.DIVERGENCE)
CENTRE_S, CENTRE_T = tl.constexpr(S.CENTRE_S), tl.constexpr(S.CENTRE_T)
SLOPE, LABEL_LSE, VALUE = tl.constexpr(S.SLOPE), tl.constexpr(S.LABEL_LSE), tl.constexpr(S.VALUE)
FACTOR = tl.constexpr(S.FACTOR)


@triton.jit
def row_number(pointer, number, row):
    """A row's parameter: its own, or the number of the call."""
    if pointer is None:
        return tl.full((), number, tl.float32)
    else:
        return tl.load(pointer + row)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round to nearest even; the interpreter truncates to bfloat16, so its bits are rounded."""
    if IN_PYTHON and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def reference(top):
    """The logit that a row's exponentials are taken about: its largest, or 0 for a row of -inf."""
    return tl.where(top == -INFINITY, 0.0, top)


@triton.jit
def reference_again(stored, k2, row_pointer, valid, BLOCK: tl.constexpr):
    """reference() in the backward, from the stored base-2 maximum.

    Half logits come back exactly, float32 ones within an ulp; a maximum that overflowed is looked
    up in the row.
    """
    logit = round_to(stored / k2, row_pointer.dtype.element_ty).to(tl.float32)
    if tl.abs(stored) == INFINITY:
        lanes = tl.arange(0, BLOCK)
        top = tl.full((BLOCK,), -INFINITY, tl.float32)
        for start in range(0, valid, BLOCK):
            top = tl.maximum(top, load(row_pointer, start + lanes, valid))
        logit = tl.max(top, 0)
    return logit


@triton.jit
def rescale(started, before, after, k2):
    """What sums about `before` are multiplied by to stand about `after`; NaN sums stay NaN."""
    return tl.where(started, tl.exp2((before - after) * k2), 1.0)


@triton.jit
def load(row_pointer, columns, valid):
    return tl.load(row_pointer + columns, mask=columns < valid, other=-INFINITY).to(tl.float32)


@triton.jit
def log_ratio(x, y):
    """log(x / y) of two sums: exactly 0 for equal ones, accurate for close ones."""
    small = (x - y) / y
    near = tl.abs(small) <= 0.5
    return tl.where(near, log1p(tl.where(near, small, 0.0)), tl.log(x) - tl.log(y))


@triton.jit
def entry(z, a, r_s, r_t, inv_s, inv_t, log_s, log_t, gap, k_s, k_t, HAS_TEACHER: tl.constexpr):
    """(p, q, d, lp, lq) of a block. r: reference logits; k = 1 / tau; inv, log: of the
    sums; gap: log(sum_t / sum_s)."""
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
        shift = r_t - r_s
        d = (both - shift) * k_t + tl.where(k_t == k_s, 0.0, x * (k_t - k_s)) - gap
        # Differences of logits near the largest float overflow, those about the maxima do not.
        d = tl.where(tl.abs(both) + tl.abs(shift) < HUGE, d, lp - lq)
        d = tl.where(dead_s, tl.where(dead_t, 0.0, INFINITY), tl.where(dead_t, -INFINITY, d))
    else:
        p, lp, d = q * 0.0, lq, q * 0.0
    return p, q, d, lp, lq


@triton.jit
def fill(row_pointer, width, number, BLOCK: tl.constexpr):
    """Write one number over a row."""
    lanes = tl.arange(0, BLOCK)
    block = tl.zeros((BLOCK,), tl.float32) + number
    for start in range(0, width, BLOCK):
        columns = start + lanes
        tl.store(
            row_pointer + columns,
            round_to(block, row_pointer.dtype.element_ty),
            mask=columns < width,
        )


@triton.jit
def gradients(
    student, teacher, grad_student, grad_teacher, grad_tau,  # this row's; None: not wanted
    widths_s, widths_t, valid_s, valid_t, label,
    r_s, sum_s, r_t, gap, divergence, centre_s, centre_t, slope, lse, value, g,
    tau_s, tau_t, first, second, f, r, x, h, other, label_weight, clip, element,
    F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, OUTER: tl.constexpr, SQUARED: tl.constexpr, CLIP: tl.constexpr,
    ELEMENT: tl.constexpr, LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 3: gradients of g times the row's value, from its statistics."""
    if (g == 0) | (value != value):
        # A row that does not count, NaN in the logits (slope NaN), or parameters out of range.
        number = tl.where(g == 0, 0.0, tl.where(slope != slope, float("nan"), 0.0))
        if grad_student is not None:
            fill(grad_student, widths_s, number, BLOCK)
        if grad_teacher is not None:
            fill(grad_teacher, widths_t, number, BLOCK)
        if grad_tau is not None:
            tl.store(grad_tau, number)
            tl.store(grad_tau + 1, number)
    else:
        k_s, k_t = 1.0 / tau_s, 1.0 / tau_t
        one_s = tl.where(sum_s > 0, sum_s, 1.0)
        log_s = tl.log(one_s)
        one_t, log_t = one_s * tl.exp(gap), log_s + gap
        flows_s = (slope != 0) & (tl.abs(centre_s) < INFINITY)
        flows_t = (slope != 0) & (tl.abs(centre_t) < INFINITY)
        moment_s = tl.zeros((BLOCK,), tl.float32)
        moment_t = tl.zeros((BLOCK,), tl.float32)
        lanes = tl.arange(0, BLOCK)
        hit = tl.where((label >= 0) & (label < widths_s), label, -1).to(tl.int32)
        end = widths_s
        if teacher is not None:
            end = tl.maximum(widths_s, widths_t)
        for start in range(0, end, BLOCK):
            columns = start + lanes
            z = load(student, columns, valid_s)
            if teacher is not None:
                a = load(teacher, columns, valid_t)
            else:
                a = z
            p, q, d, lp, lq = entry(
                z,
                a,
                r_s,
                r_t,
                1.0 / one_s,
                1.0 / one_t,
                log_s,
                log_t,
                gap,
                k_s,
                k_t,
                teacher is not None,
            )
            _, s, t, _, _ = terms(
                p, q, d, lp, lq, f, r, x, h, other, first, second, element,
                F, R, X, H, KIND, DETACH, ELEMENT,
            )  # fmt: skip
            if OUTER >= BHATTACHARYYA:
                _, far_s, far_t = overlap_terms(lp, lq, first, OUTER)
                s = tl.where(slope < 0, far_s, s)
                t = tl.where(slope < 0, far_t, t)
            dead = z == -INFINITY
            slant = tl.where(dead, 0.0, (s - q * centre_s) * (slope * k_s))
            slant = tl.where(flows_s, slant, 0.0)
            if grad_tau is not None:
                # The mean of the logits is free, as the gradient sums to 0.
                moment_s += tl.where(slant != 0, slant * tl.where(dead, 0.0, z - r_s), 0.0)
            if grad_student is not None:
                if LABEL:
                    soft = tl.exp2((tl.where(dead, -INFINITY, z) - lse) * LOG2E)
                    soft = tl.where(columns == hit, soft - 1.0, soft)
                    slant += tl.where(dead, 0.0, label_weight * soft)
                tl.store(
                    grad_student + columns,
                    round_to(g * slant, grad_student.dtype.element_ty),
                    mask=columns < widths_s,
                )
            if teacher is not None:
                dead = a == -INFINITY
                slant = tl.where(dead, 0.0, (t - p * centre_t) * (slope * k_t))
                slant = tl.where(flows_t, slant, 0.0)
                if grad_tau is not None:
                    moment_t += tl.where(slant != 0, slant * tl.where(dead, 0.0, a - r_t), 0.0)
                if grad_teacher is not None:
                    tl.store(
                        grad_teacher + columns,
                        round_to(g * slant, grad_teacher.dtype.element_ty),
                        mask=columns < widths_t,
                    )
        if grad_tau is not None:
            by_s = -k_s * tl.sum(moment_s, 0)
            if SQUARED:
                bounded = divergence
                if CLIP:
                    bounded = tl.minimum(bounded, clip)
                by_s += 2.0 * tau_s * bounded
            tl.store(grad_tau, g * by_s)
            tl.store(grad_tau + 1, -g * k_t * tl.sum(moment_t, 0))
