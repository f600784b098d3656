"""The maths of csrc/divergence/divergence_math.h in Triton, once, for blocks of float32.

Symbols are those of the C++ header: p, q probabilities of teacher and student, lp, lq their natural
logarithms, d = log p - log q from the difference of the logits. Each group returns

    value    generator(p, q), non-negative entry by entry
    student  s = q dD/dq     (+ const q), so that dD/dz = (s - q S) / tau_s with S = sum s
    teacher  t = p dD/dp     (+ const p), likewise

Where p = 0 or q = 0, d is infinite (0 where both are); every product with it is selected by its
probability. Rows whose value is infinite are named by flags (`stopped_and_flowing`), so sums of
such rows may hold anything.

Triton has neither expm1 nor log1p that run everywhere, so their series stand here. Nothing relies
on a rounding that a fused multiply-add could change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import spec as S

# Triton reads globals only as constexpr.
NO_KIND = tl.constexpr(S.KIND_NONE)
JENSEN_SHANNON = tl.constexpr(S.JENSEN_SHANNON)
SKEW_FORWARD = tl.constexpr(S.SKEW_FORWARD)
SKEW_REVERSE = tl.constexpr(S.SKEW_REVERSE)
TOTAL_VARIATION = tl.constexpr(S.TOTAL_VARIATION)
SQUARED_HELLINGER = tl.constexpr(S.SQUARED_HELLINGER)
TRIANGULAR = tl.constexpr(S.TRIANGULAR)
CHI_SQUARED = tl.constexpr(S.CHI_SQUARED)
ALPHA_BETA = tl.constexpr(S.ALPHA_BETA)
ALPHA = tl.constexpr(S.ALPHA)
SQRT = tl.constexpr(S.SQRT)
BHATTACHARYYA = tl.constexpr(S.BHATTACHARYYA)
RENYI = tl.constexpr(S.RENYI)

INFINITY = tl.constexpr(float("inf"))
# Above it at least one side of an entry is possible, even if its probability underflows.
UNDERFLOW = tl.constexpr(-20000.0)
LOWEST_LOG = tl.constexpr(-30000.0)  # stands in for log 0 where it is multiplied by an exponent


@triton.jit
def small_gap(x):
    """e^-x - 1 + x for |x| < 1, right relative to its own size (x^2 / 2 near 0).

    Taylor to degree 11; the first term left out is 6e-9 of the value at |x| = 1.
    """
    r = -1.0 / 39916800
    r = r * x + 1.0 / 3628800
    r = r * x - 1.0 / 362880
    r = r * x + 1.0 / 40320
    r = r * x - 1.0 / 5040
    r = r * x + 1.0 / 720
    r = r * x - 1.0 / 120
    r = r * x + 1.0 / 24
    r = r * x - 1.0 / 6
    r = r * x + 0.5
    return r * x * x


@triton.jit
def expm1(x):
    """e^x - 1: Taylor to degree 8 for |x| < 1/2 (the rest is 1e-8 of the value), else directly."""
    r = 1.0 / 40320
    r = r * x + 1.0 / 5040
    r = r * x + 1.0 / 720
    r = r * x + 1.0 / 120
    r = r * x + 1.0 / 24
    r = r * x + 1.0 / 6
    r = r * x + 0.5
    r = r * x + 1.0
    return tl.where(tl.abs(x) < 0.5, r * x, tl.exp(x) - 1.0)


@triton.jit
def log1p_series(y):
    """log(1 + y) for |y| <= 1/2 as 2 artanh(y / (2 + y)); the rest is 2e-8 of the value."""
    s = y / (2.0 + y)
    w = s * s
    r = 2.0 / 15
    r = r * w + 2.0 / 13
    r = r * w + 2.0 / 11
    r = r * w + 2.0 / 9
    r = r * w + 2.0 / 7
    r = r * w + 2.0 / 5
    r = r * w + 2.0 / 3
    r = r * w + 2.0
    return r * s


@triton.jit
def log1p(y):
    return tl.where(tl.abs(y) <= 0.5, log1p_series(y), tl.log(1.0 + y))


@triton.jit
def zero_times(x, y):
    """x y with 0 where x is 0, even for infinite or NaN y. x >= 0."""
    return tl.where(x > 0, x * y, 0.0)


@triton.jit
def kl_generator(p, difference, d):
    """p (e^-d - 1 + d), the generator of KL(p || q) with q = p e^-d; `difference` is q - p."""
    direct = tl.maximum(difference + zero_times(p, d), 0.0)
    return tl.where(tl.abs(d) < 1.0, p * small_gap(d), direct)


@triton.jit
def excess_of(p, q, d):
    """q - p, small beside p where d is."""
    return tl.where(tl.abs(d) < 1.0, p * (small_gap(d) - d), q - p)


@triton.jit
def needs_correction(excess, value, KIND: tl.constexpr):
    """Whether the common error of all d, `excess`, moves the value: by its square where d enters
    squared, by itself in the probability and power groups. Never for rows that differ by more than
    rounding does."""
    size = tl.abs(excess)
    moved = size
    if KIND < TOTAL_VARIATION:
        moved = size * size
    return (moved > 1e-6 * value) & (size < 1e-3)


@triton.jit
def linear_terms(
    p, q, d, lp, lq, f, r, x, h, F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr
):
    """f forward KL + r reverse KL + x cross entropy + h entropy; F, R, X, H: which are there.

    Also the summands of S and T, without the q - p in them, which adds up to 0.
    """
    value = tl.zeros_like(p)
    student = tl.zeros_like(p)
    teacher = tl.zeros_like(p)
    centre_s = tl.zeros_like(p)
    centre_t = tl.zeros_like(p)
    # The gradient of close rows is this difference: from d it is right to its own size.
    pq = tl.where(tl.abs(d) < 0.5, p * expm1(-d), q - p)
    if F:
        value += f * kl_generator(p, pq, d)
        rest = f * zero_times(p, d)
        teacher += rest
        centre_t += rest
    if R:
        value += r * kl_generator(q, -pq, -d)
        rest = r * zero_times(q, d)
        student -= rest
        centre_s -= rest
        teacher -= r * pq
    if X:
        rest = x * zero_times(p, lq)
        value -= rest
        teacher -= rest
        centre_t -= rest
    if F or X:
        student += (f + x) * pq
    if H:
        rest = h * zero_times(q, lq)
        value -= rest
        student -= rest
        centre_s -= rest
    return value, student, teacher, centre_s, centre_t


@triton.jit
def mixture_weights(first, KIND: tl.constexpr):
    """(A, B, w) of A KL(p || M) + B KL(q || M), M = w p + (1 - w) q; scalars of one row."""
    if KIND == JENSEN_SHANNON:
        # The ends are forward and reverse KL, the trainers' convention, not the limits (0).
        a = tl.where(first == 0, 1.0, tl.where(first == 1, 0.0, first))
        return a, 1.0 - a, first
    elif KIND == SKEW_FORWARD:
        return first * 0.0 + 1.0, first * 0.0, first
    else:
        return first * 0.0, first * 0.0 + 1.0, 1.0 - first


@triton.jit
def mixture_terms(p, q, d, first, KIND: tl.constexpr, DETACH: tl.constexpr):
    A, B, w = mixture_weights(first, KIND)
    v = 1.0 - w
    above = d >= 0  # p >= q
    # The larger of p and q is the base: smaller = base ratio = base (1 + t).
    distance = tl.abs(d)
    ratio = tl.exp(-distance)
    t = expm1(-distance)
    share = tl.where(above, v, w)  # the smaller one's share of M
    rest = tl.where(above, w, v)
    bare = share == 1.0  # M is the smaller one itself
    y = share * t
    mixed = tl.where(bare, 1.0, rest + share * ratio)  # M / base, without the rounding of 1 + t
    log_mixed = tl.where(y >= -0.5, log1p_series(tl.maximum(y, -0.5)), tl.log(mixed))
    log_base = tl.where(bare, distance, -log_mixed)  # log(base / M)
    log_other = tl.where(bare, 0.0, log_base - distance)
    inverse = tl.where(bare, 0.0, 1.0 / mixed)
    other_ratio = tl.where(bare, 1.0, ratio / mixed)
    xp = tl.where(above, log_base, log_other)  # log(p / M)
    xq = tl.where(above, log_other, log_base)
    rp = tl.where(above, inverse, other_ratio)  # p / M
    rq = tl.where(above, other_ratio, inverse)
    pq = tl.where(above, -p * t, q * t)  # p - q
    slant = (A * v - B * w) * pq  # A (p - M) + B (q - M); 0 for Jensen-Shannon
    value = tl.where(A > 0, A * kl_generator(p, -v * pq, xp), 0.0)
    value += tl.where(B > 0, B * kl_generator(q, w * pq, xq), 0.0)
    student = tl.where(B > 0, B * zero_times(q, xq), 0.0)
    if not DETACH:
        student -= v * rq * slant
    teacher = tl.where(A > 0, A * zero_times(p, xp), 0.0) - w * rp * slant
    exists = tl.maximum(p, q) > 0
    return (
        tl.where(exists, value, 0.0),
        tl.where(exists, student, 0.0),
        tl.where(exists, teacher, 0.0),
    )


@triton.jit
def probability_terms(p, q, d, lp, lq, KIND: tl.constexpr):
    above = d >= 0
    distance = tl.abs(d)
    base = tl.where(above, p, q)
    # smaller = base (1 + t), sqrt(p q) = base (1 + u).
    root = tl.exp(-0.5 * distance)
    u = expm1(-0.5 * distance)
    t = u * (2.0 + u)
    if KIND == TOTAL_VARIATION:
        value = 0.5 * base * tl.abs(t)
        sign = tl.where(d > 0, -1.0, tl.where(d < 0, 1.0, 0.0))  # of q - p
        student = 0.5 * q * sign
        teacher = -0.5 * p * sign
    elif KIND == SQUARED_HELLINGER:
        value = 0.5 * base * u * u
        # (q - sqrt(p q)) / 2 is base u (1 + u) / 2 where p is the base.
        student = 0.5 * base * u * tl.where(above, root, -1.0)
        teacher = 0.5 * base * u * tl.where(above, -1.0, root)
    elif KIND == TRIANGULAR:
        r = tl.where(above, -t, t) / (2.0 + t)  # (p - q) / (p + q)
        value = base * tl.abs(t * r)
        student = -q * r * (2.0 + r)
        teacher = p * r * (2.0 - r)
    else:
        # Chi-squared divides by q: p^2 / q from its logarithm, where 1 + t would round to 0.
        signed = tl.where(above, -t, t)  # (p - q) / base
        scaled = tl.where(above, tl.exp(lp + d), q)  # base^2 / q
        value = scaled * t * t
        student = -scaled * signed * (2.0 + t)
        teacher = 2.0 * signed * tl.where(above, scaled, p)
    # p^2 / q may count where both underflow.
    exists = (tl.maximum(lp, lq) > UNDERFLOW) if KIND == CHI_SQUARED else base > 0
    return (
        tl.where(exists, value, 0.0),
        tl.where(exists, student, 0.0),
        tl.where(exists, teacher, 0.0),
    )


@triton.jit
def power_terms(p, q, d, lp, lq, alpha, beta):
    """The AB divergence with its limits on the axes. P = p^s, Q = q^s, W = p^alpha q^beta,
    s = alpha + beta, g(x, y, l) = y - x + x l:

      D = [g(P, Q, s d) / s - g(P, W, beta d) / beta] / alpha      where |alpha| >= |beta|
        = [g(Q, P, -s d) / s - g(Q, W, -alpha d) / alpha] / beta   elsewhere

    Neither cancels as the small exponent goes to 0. Exponents are scalars of the row, so a division
    by one that is 0 is replaced by a division by 1 and not selected.
    """
    s = alpha + beta
    exists = tl.maximum(lp, lq) > UNDERFLOW
    d = tl.where(exists, d, 0.0)
    lp = tl.maximum(lp, LOWEST_LOG)
    lq = tl.maximum(lq, LOWEST_LOG)
    P = tl.where(s == 1.0, p, tl.exp(s * lp))
    Q = tl.where(s == 1.0, q, tl.exp(s * lq))
    W = tl.exp(alpha * lp + beta * lq)
    teacher_side = tl.abs(alpha) >= tl.abs(beta)
    big = tl.where(teacher_side, alpha, beta)
    little = tl.where(teacher_side, beta, alpha)
    base = tl.where(teacher_side, P, Q)
    other = tl.where(teacher_side, Q, P)
    sd = tl.where(teacher_side, d, -d)
    safe_s = tl.where(s == 0, 1.0, s)
    safe_little = tl.where(little == 0, 1.0, little)
    safe_big = tl.where(big == 0, 1.0, big)
    safe_alpha = tl.where(alpha == 0, 1.0, alpha)
    safe_beta = tl.where(beta == 0, 1.0, beta)
    whole = tl.where(s == 0, 0.0, kl_generator(base, other - base, s * sd) / safe_s)
    part = tl.where(little == 0, 0.0, kl_generator(base, W - base, little * sd) / safe_little)
    # Far from each other, and at zeros, the base sd in both parts cancels before it is rounded.
    far = (tl.abs(s * sd) >= 1.0) & (tl.abs(little * sd) >= 1.0)
    value = tl.where(far, (other - base) / safe_s - (W - base) / safe_little, whole - part)
    value = value / safe_big
    # (Q - W) / alpha and (P - W) / beta; their limits are -Q d and P d.
    x = alpha * d
    student = tl.where(tl.abs(x) < 0.5, -Q * expm1(x), Q - W) / safe_alpha
    student = tl.where(alpha == 0, -zero_times(Q, d), student)
    y = beta * d
    teacher = tl.where(tl.abs(y) < 0.5, -P * expm1(-y), P - W) / safe_beta
    teacher = tl.where(beta == 0, zero_times(P, d), teacher)
    origin = big == 0  # both exponents 0: half the squared log ratio
    value = tl.where(origin, 0.5 * d * d, value)
    student = tl.where(origin, -d, student)
    teacher = tl.where(origin, d, teacher)
    return (
        tl.where(exists, value, 0.0),
        tl.where(exists, student, 0.0),
        tl.where(exists, teacher, 0.0),
    )


@triton.jit
def clipped_terms(
    value, student, teacher, p, q, f, r, x, h, other, first, clip,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    """An entry's terms with its summand bounded by `clip`, no gradient above.

    A bounded sum has no constant that cancels: student and teacher must be q dl/dq and p dl/dp of
    the generator or, where ELEMENT is 2, of the raw summand.
    """
    by_q = q * 0.0 - x - h  # -p log q and -q log q, to which linear_terms adds q
    if ELEMENT == 2:
        apart = f - r
        slant = apart
        mixed = q * 0.0
        by_p = p * 0.0
        if KIND != NO_KIND and KIND <= SKEW_REVERSE:
            A, B, w = mixture_weights(first, KIND)
            slant += other * (A * (1.0 - w) - B * w)
            by_p += other * (A - (A + B) * w)
            mixed += other * B
            if not DETACH:
                mixed -= other * (A + B) * (1.0 - w)
        value += slant * (p - q)
        by_q += mixed - apart
        teacher += (by_p + apart) * p
    student += by_q * q
    free = value <= clip
    return (
        tl.where(free, value, clip),
        tl.where(free, student, 0.0),
        tl.where(free, teacher, 0.0),
    )


@triton.jit
def terms(
    p, q, d, lp, lq, f, r, x, h, other, first, second, clip,
    F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """(value, student, teacher, summand of S, summand of T) of the linear group plus one kind."""
    value, student, teacher, centre_s, centre_t = linear_terms(
        p, q, d, lp, lq, f, r, x, h, F, R, X, H
    )
    if KIND != NO_KIND:
        if KIND <= SKEW_REVERSE:
            v, s, t = mixture_terms(p, q, d, first, KIND, DETACH)
        elif KIND <= CHI_SQUARED:
            v, s, t = probability_terms(p, q, d, lp, lq, KIND)
        else:
            v, s, t = power_terms(p, q, d, lp, lq, first, second)
        value += other * v
        student += other * s
        teacher += other * t
        centre_s += other * s
        centre_t += other * t
    if ELEMENT:
        value, student, teacher = clipped_terms(
            value, student, teacher, p, q, f, r, x, h, other, first, clip, ELEMENT, KIND, DETACH
        )
        centre_s = student
        centre_t = teacher
    return value, student, teacher, centre_s, centre_t


@triton.jit
def overlap_terms(lp, lq, first, OUTER: tl.constexpr):
    """(sum p^a q^(1-a) entry by entry, its student and teacher terms): what Bhattacharyya's and
    Renyi's logarithms are of, summed itself where 1 - sum of generators has lost it."""
    if OUTER == BHATTACHARYYA:
        alpha = first * 0.0 + 0.5
    else:
        alpha = first
    lp = tl.maximum(lp, LOWEST_LOG)
    lq = tl.maximum(lq, LOWEST_LOG)
    w = tl.exp(alpha * lp + (1.0 - alpha) * lq)
    return w, (1.0 - alpha) * w, alpha * w


@triton.jit
def hardly_overlaps(total, first, OUTER: tl.constexpr):
    """Whether a row is one of those. Renyi beyond alpha = 1 has none."""
    if OUTER == BHATTACHARYYA:
        return total > 0.75
    else:
        return (first * (1.0 - first) * total > 0.75) & (first > 0) & (first < 1)


@triton.jit
def stopped_and_flowing(
    no_q, no_p, first, second, F: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
    KIND: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Rows whose value is infinite: (with gradient 0, with the gradient of their finite part).

    no_q: somewhere q = 0 < p; no_p: somewhere p = 0 < q.
    """
    flowing = no_q & (first != first)  # false, with the type of a comparison
    stopped = no_p & (first != first)
    if ELEMENT:  # every summand is bounded
        return stopped, flowing
    if F or X:
        flowing = flowing | no_q
    if R:
        stopped = stopped | no_p
    if KIND == JENSEN_SHANNON:
        flowing = flowing | (no_q & (first == 0))
        stopped = stopped | (no_p & (first == 1))
    elif KIND == SKEW_FORWARD:
        flowing = flowing | (no_q & (first == 0))
    elif KIND == SKEW_REVERSE:
        stopped = stopped | (no_p & (first == 0))
    elif KIND == CHI_SQUARED:
        stopped = stopped | no_q
    elif KIND >= ALPHA_BETA:
        # q^beta diverges for beta < 0, and beta = 0 keeps p^alpha log(p / q), as forward KL.
        flowing = flowing | (no_q & (second == 0))
        stopped = stopped | (no_q & (second < 0)) | (no_p & (first <= 0))
        # Opposed exponents whose sum is not positive diverge at either zero.
        stopped = stopped | ((no_q | no_p) & (first + second <= 0) & (second != 0))
    return stopped, flowing


@triton.jit
def outer_value(total, overlap, first, OUTER: tl.constexpr):
    """(D, dD/d total) of the row's sum; a derivative that does not exist is 0. `overlap` > 0: the
    sum of `overlap_terms`, which the derivative, a negative one, is then taken by."""
    divergence = total
    slope = tl.where(total == total, 1.0, total)
    if OUTER == SQRT:
        divergence = tl.sqrt(total)
        slope = tl.where(total > 0, 0.5 / tl.where(total > 0, divergence, 1.0), 0.0)
    elif OUTER == BHATTACHARYYA:
        left = 1.0 - total
        divergence = tl.where(left > 0, -log1p(tl.where(left > 0, -total, 0.0)), INFINITY)
        slope = tl.where(left > 0, 1.0 / tl.where(left > 0, left, 1.0), 0.0)
    elif OUTER == RENYI:
        k = first - 1.0
        inside = first * k * total
        possible = inside > -1.0
        safe_k = tl.where(k == 0, 1.0, k)
        logarithm = log1p(tl.where(possible, inside, 0.0)) / safe_k
        divergence = tl.where(k == 0, total, tl.where(possible, logarithm, INFINITY))
        slope = tl.where(possible, first / tl.where(possible, 1.0 + inside, 1.0), 0.0)
        slope = tl.where(k == 0, 1.0, slope)
    if OUTER >= BHATTACHARYYA:
        power = first * 0.0 - 1.0
        if OUTER == RENYI:
            power = first - 1.0
        safe = tl.where(overlap > 0, overlap, 1.0)
        safe_power = tl.where(power == 0, 1.0, power)
        divergence = tl.where(overlap > 0, tl.log(safe) / safe_power, divergence)
        slope = tl.where(overlap > 0, 1.0 / (safe * safe_power), slope)
        slope = tl.where(tl.abs(slope) < 1e37, slope, 0.0)
    return divergence, slope
