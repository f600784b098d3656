"""What the Sinkhorn kernels are made of: sizes, masses, exponents, half-iterations.

Logarithms are to base 2; the formulas stand in csrc/transport/transport.h. A row of the cost is
held whole in registers, so its sum is taken about its largest term and needs no second try.
"""

from __future__ import annotations

import triton
import triton.language as tl

# transport_math.h: sums outside 2^-100 .. 2^100 are made again, exponents stop at 120.
SMALL_SUM = tl.constexpr(2.0**-100)
LARGE_SUM = tl.constexpr(2.0**100)
MAX_EXPONENT = tl.constexpr(120.0)
NO_LOG = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sizes(student_lengths, teacher_lengths, problem, rows, columns):
    """(n, m, bad): this problem's rows and columns; lengths that no tensor has make it empty."""
    n = tl.zeros((), tl.int32) + rows
    m = tl.zeros((), tl.int32) + columns
    if student_lengths is not None:
        n = tl.load(student_lengths + problem).to(tl.int32)
    if teacher_lengths is not None:
        m = tl.load(teacher_lengths + problem).to(tl.int32)
    bad = (n < 0) | (n > rows) | (m < 0) | (m > columns)
    return tl.where(bad, 0, n), tl.where(bad, 0, m), bad


@triton.jit
def masses(marginal, stride, problem, index, size):
    """The marginal at `index`, zero beyond the problem; None is uniform."""
    inside = index < size
    if marginal is None:
        return tl.where(inside, 1.0 / size.to(tl.float32), 0.0)
    else:
        return tl.load(marginal + problem * stride + index, mask=inside, other=0.0)


@triton.jit
def log2_of(mass):
    """log2, -inf for zero (numpy, which interprets, warns about the logarithm of 0)."""
    positive = mass > 0
    return tl.where(positive, tl.log2(tl.where(positive, mass, 1.0)), NO_LOG)


@triton.jit
def potential(log_sum, log_denominator, damping, DAMPED: tl.constexpr):
    """log2 of (sum + denominator)^-damping."""
    if DAMPED:
        high = tl.maximum(log_sum, log_denominator)
        gap = tl.where(high == NO_LOG, 0.0, tl.minimum(log_sum, log_denominator) - high)
        return -damping * tl.where(high == NO_LOG, NO_LOG, high + tl.log2(1.0 + tl.exp2(gap)))
    else:
        return -log_sum


@triton.jit
def divisor_ratio(log_rho, damping):
    """1 / (sum + d) over (sum + d)^-damping, bounded."""
    exponent = log_rho * (1.0 / damping - 1.0)
    return tl.exp2(tl.minimum(tl.maximum(exponent, -MAX_EXPONENT), MAX_EXPONENT))


@triton.jit
def corrected_ratio(log_rho, damping, denominator, total):
    """divisor_ratio from the sum of rho K v as the sweep has added it up; transport_math.h."""
    ratio = divisor_ratio(log_rho, damping)
    if denominator > 0:
        total += denominator * tl.exp2(log_rho)
    near = total * ratio
    fine = tl.abs(near - 1.0) < 0.015625
    return tl.where(fine, ratio / tl.where(fine, near, 1.0), ratio)


@triton.jit
def kernel_row(cost, log_v, k, columns, m, HAS_V: tl.constexpr):
    """log2 v_j - k C_ij of one row; -inf beyond the problem."""
    inside = columns < m
    x = -k * tl.load(cost + columns, mask=inside, other=0.0)
    if HAS_V:
        x += log_v
    return tl.where(inside, x, NO_LOG)


@triton.jit
def solved_row(x, a, log_denominator, damping, DAMPED: tl.constexpr):
    """(f, e, factor): the row's potential; factor e is its share of the plan over v."""
    top = tl.max(x, 0)
    top = tl.where(top == NO_LOG, 0.0, top)
    e = tl.exp2(x - top)
    total = tl.sum(e, 0)
    # Nothing is reachable from this row: without mass that is no matter, with mass it is NaN.
    idle = (a == 0) & (total == 0)
    log_sum = log2_of(total) + top
    f = potential(log_sum, log_denominator, damping, DAMPED)
    lost = idle & (log_denominator == NO_LOG)
    f = tl.where(lost, 0.0, f)
    factor = tl.where(idle, 0.0, a * tl.exp2(tl.where(idle, 0.0, f + top)))
    return f, e, factor


@triton.jit
def column_log_sum(cost, a, a_stride, f, problem, step, k, columns, n, m, HAS_F: tl.constexpr):
    """log2 of (K' u)_j about its largest term, for sums that have underflowed."""
    inside = columns < m
    top = tl.full(columns.shape, NO_LOG, tl.float32)
    total = tl.zeros(columns.shape, tl.float32)
    for i in range(n):
        log_u = log2_of(masses(a, a_stride, problem, i, n))
        if HAS_F:
            log_u += tl.load(f + i)
        else:
            log_u = tl.where(log_u == NO_LOG, NO_LOG, 0.0)
        c = tl.load(cost + i * step + columns, mask=inside, other=0.0)
        term = log_u - k * c
        higher = tl.maximum(top, term)
        about = tl.where(higher == NO_LOG, 0.0, higher)
        total = total * tl.exp2(tl.where(top == NO_LOG, NO_LOG, top - about)) + tl.exp2(
            term - about
        )
        top = higher
    return log2_of(total) + tl.where(top == NO_LOG, 0.0, top)


@triton.jit
def density(cost, g, f, k, columns, m):
    """2^(f_i + g_j - k C_ij), the plan over its marginals; bounded, as on the other backends."""
    inside = columns < m
    c = tl.load(cost + columns, mask=inside, other=0.0)
    e = tl.exp2(tl.minimum(g - k * c + f, MAX_EXPONENT))
    return tl.where(inside, e, 0.0), c
