"""Entropic transport: `sinkhorn` on a dense cost, `transport` between points, `sinkhorn_assign`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.registry import settings
from ..backends.transport_spec import GRADIENTS, SinkhornSpec
from ..ops import shared_cost
from ..ops import sinkhorn as ops
from .checks import check_floats, check_number, may_look
from .ground_cost import ground_cost
from .sinkhorn_inputs import (
    at_least_zero,
    batch_of,
    check_finite,
    check_marginals,
    marginals_fit,
    parse_lengths,
    parse_marginal,
    parse_reach,
    refuse_nan,
    uniform,
)

_VALUES = ("sharp", "regularized", "dual")
_ORDERS = ("rows", "columns")
# Problems over one cost from which on GEMMs beat the log-domain sweeps of each.
_GEMM_BATCH = 8


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    iterations: int = 100,
    tolerance: float = 0.0,
    order: str = "rows",
    reach: float | tuple[float | None, float | None] | None = None,
    denominator: float = 0.0,
    value: str = "sharp",
    gradient: str = "unrolled",
    student_lengths: Tensor | None = None,
    teacher_lengths: Tensor | None = None,
    return_plan: bool = False,
    return_potentials: bool = False,
):
    """Entropic optimal transport between two histograms (Cuturi 2013), in the log domain.

    With K = exp(-cost / epsilon) and scalings that start at one (zero where a marginal is zero),
    one iteration is u = a / (K v), v = b / (K' u); the plan is P = diag(u) K diag(v) =
    a b exp((f + g - cost) / epsilon). Nothing overflows or underflows, whatever epsilon is. The
    bits do not depend on the number of threads; eight problems and more over one cost that is far
    from underflow are iterated by GEMMs on CPU, which are as deterministic as torch's.

    Args:
        cost: [N, M], or [B, N, M] for a batch; float dtypes. +inf forbids an entry.
        a: Student marginal, [N] or [B, N]; default 1 / N (1 / length). Any non-negative numbers.
        b: Teacher marginal, [M] or [B, M], of the same mass as `a` unless `reach` is given. A cost
            [N, M] with marginals [B, N] or [B, M] is shared by B problems.
        epsilon: Regularisation, > 0, in units of cost.
        iterations: Full iterations, >= 1.
        tolerance: Stops a problem when its L1 marginal error is at most this; looked at on the
            device after each iteration; 0 never stops.
        order: "rows" solves rows, then columns (SinKD), so the columns' marginal is exact;
            "columns" the reverse (POT, CoT2Align, WKD).
        reach: Factor rho of the Kullback-Leibler penalty that replaces a marginal constraint, in
            units of cost; a number for both, or (student, teacher), None = exact. Exponents become
            reach / (reach + epsilon).
        denominator: Added to both divisors K v and K' u.
        value: "sharp" <P, C>; "regularized" <P, C> + epsilon KL(P, a b') with mass terms, plus
            reach times the penalties; "dual" <a, f> + <b, g>, the dual objective with `reach`.
        gradient: "unrolled" differentiates the iterations, exact for any number of them, in
            O(iterations (N + M)) memory; "implicit" differentiates the fixed point (at
            convergence); "envelope" is dC = P, da = f, db = g (not for "sharp", whose derivative
            it is not). Of the regularized and the dual value implicit equals envelope.
        student_lengths: [B] int64: rows of each problem; nothing beyond is read.
        teacher_lengths: [B] int64: columns of each problem.
        return_plan: Also return P, of the cost's shape, differentiable unless "envelope".
        return_potentials: Also return (f, g), in units of cost, zero beyond the lengths.

    Returns:
        The value, of the problem's leading shape, float32 (float64 for float64), then the plan,
        then (f, g), as asked for.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it. On CPU also:
            negative or unequal marginals, lengths beyond the tensor, NaN in the cost. On CUDA such
            a problem gives NaN and no gradient; `kd.debug()` raises there too.
    """
    check_floats(cost, "cost")
    if cost.dim() not in (2, 3):
        raise ValueError(f"cost: expected [N, M] or [B, N, M], got shape {tuple(cost.shape)}")
    epsilon = check_number(epsilon, "epsilon", positive=True)
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations: expected an int, got {type(iterations).__name__}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    tolerance = at_least_zero(tolerance, "tolerance")
    denominator = at_least_zero(denominator, "denominator")
    if order not in _ORDERS:
        raise ValueError(f"order: expected 'rows' or 'columns', got {order!r}")
    if value not in _VALUES:
        raise ValueError(f"value: expected one of {', '.join(_VALUES)}, got {value!r}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: expected one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if value == "sharp" and gradient == "envelope":
        raise ValueError(
            "gradient: 'envelope' is not the derivative of value 'sharp'; use 'unrolled' or "
            "'implicit', or value 'regularized' or 'dual'"
        )
    reach_a, reach_b = parse_reach(reach)

    dtype = torch.float64 if cost.dtype == torch.float64 else torch.float32
    batch, single = batch_of(cost, a, b, student_lengths, teacher_lengths)
    dense = cost if cost.dtype == dtype else cost.to(dtype)
    if dense.stride(-1) != 1 and dense.shape[-1] > 1:
        dense = dense.contiguous()
    if dense.dim() == 2:
        dense = dense.expand(batch, *cost.shape)
    rows, columns = dense.shape[-2:]
    ragged = student_lengths is not None or teacher_lengths is not None
    if ragged:
        student_lengths = parse_lengths(student_lengths, "student_lengths", batch, rows, cost)
        teacher_lengths = parse_lengths(teacher_lengths, "teacher_lengths", batch, columns, cost)
    a = parse_marginal(a, "a", batch, rows, cost, dtype)
    b = parse_marginal(b, "b", batch, columns, cost, dtype)
    balanced = reach_a is None and reach_b is None
    bad = None
    fits = marginals_fit(dense, a, b, student_lengths, teacher_lengths, balanced=balanced)
    if not fits or value != "sharp":
        # The value's formula, and the look at the marginals, want them in full.
        a = uniform(batch, rows, student_lengths, dense) if a is None else a
        b = uniform(batch, columns, teacher_lengths, dense) if b is None else b
        if not fits or ragged:
            a, b, bad = check_marginals(a, b, student_lengths, teacher_lengths, balanced=balanced)
    if not torch.compiler.is_compiling() and settings().debug:
        check_finite(dense, student_lengths, teacher_lengths)

    spec = SinkhornSpec(
        epsilon=epsilon,
        iterations=float(iterations),
        tolerance=tolerance,
        columns_first=float(order == "columns"),
        damping_a=1.0 if reach_a is None else reach_a / (reach_a + epsilon),
        damping_b=1.0 if reach_b is None else reach_b / (reach_b + epsilon),
        denominator=denominator,
        mode=float(GRADIENTS[gradient]),
    )
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (dense, a, b)
    )
    problem = (dense, a, b, student_lengths, teacher_lengths)
    if _gemm_serves(cost, batch, spec, value, gradient, return_plan or return_potentials, problem):
        a = uniform(batch, rows, None, dense) if a is None else a
        b = uniform(batch, columns, None, dense) if b is None else b
        return shared_cost.SharedSinkhorn.apply(cost.to(dtype), a, b, spec)
    if value != "sharp" and gradient != "unrolled":
        out, solution = _envelope_value(problem, spec, value, (reach_a, reach_b), return_plan)
        if return_plan and gradient == "implicit" and differentiable:
            wanted = ops.Wanted(plan=True, potentials=return_potentials)
            solution = ops.sinkhorn(*problem, spec, keep=False, wanted=wanted)
    else:
        wanted = ops.Wanted(
            linear=value == "sharp",
            sums=value == "regularized" or (value == "dual" and reach is not None),
            plan=return_plan,
            potentials=return_potentials or value != "sharp",
        )
        keep = differentiable and gradient == "unrolled"
        solution = ops.sinkhorn(
            *problem, spec, keep=keep, wanted=wanted, differentiable=differentiable
        )
        if value == "sharp":
            out = solution.linear
        else:
            out = _value(value, problem, solution, epsilon, reach_a, reach_b)
    if bad is not None:
        out = torch.where(bad, torch.nan, out)
    refuse_nan(out, dense, student_lengths, teacher_lengths)

    def finished(part: Tensor) -> Tensor:
        part = part.detach() if gradient == "envelope" else part
        return part[0] if single else part

    results = [out[0] if single else out]
    if return_plan:
        results.append(finished(solution.plan))
    if return_potentials:
        unit = epsilon * math.log(2.0)
        results.append((finished(solution.f * unit), finished(solution.g * unit)))
    return results[0] if len(results) == 1 else tuple(results)


def transport(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    **options,
):
    """Entropic transport between two clouds of points; takes every option of `sinkhorn`.

    Args:
        x: Student points, [N, d] or [B, N, d]. y: teacher points, [M, d] or [B, M, d].
        a, b: Marginals as in `sinkhorn`.
        cost: "sqeuclidean" ||x - y||^2 (no 1/2), "euclidean" ||x - y|| (gradient 0 at 0), "cosine"
            1 - cos (norms below 1e-12 count as 1e-12), "l1" sum |x - y|, "dot_softmax" 1 - softmax
            over the teacher of x.y / sqrt(d) (CoT2Align), or a callable (x, y) -> [.., N, M].
            Gradients reach the points. Half inputs, also under autocast, are computed in float32.
            All but "l1" and small clouds go through a GEMM, as deterministic as torch's.

    Returns:
        As `sinkhorn`.
    """
    check_floats(x, "x")
    check_floats(y, "y")
    matrix = ground_cost(x, y, cost, options.get("teacher_lengths"))
    return sinkhorn(matrix, a, b, **options)


def sinkhorn_assign(
    scores: Tensor,
    epsilon: float,
    iterations: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Balanced soft assignment of samples to prototypes (SwAV; DINOv2; BECLR's DyCE).

    exp(scores / epsilon) is normalised over samples for each prototype, then over prototypes for
    each sample, `iterations` times; in the log domain, so no score overflows.

    Args:
        scores: [samples, prototypes]; this process's samples.
        epsilon: > 0. iterations: >= 1.
        group: Process group over which the samples are spread: two small all-reduces an iteration.

    Returns:
        [samples, prototypes] float32 (float64), rows sum to 1, no gradient.
    """
    check_floats(scores, "scores")
    if scores.dim() != 2:
        raise ValueError(f"scores: expected [samples, prototypes], got {tuple(scores.shape)}")
    epsilon = check_number(epsilon, "epsilon", positive=True)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an int >= 1, got {iterations!r}")
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    log_q = scores.detach().to(dtype) / epsilon
    for _ in range(iterations):
        log_q = log_q - _group_log_sum(log_q, group)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


# Pieces. ----------------------------------------------------------------------------------------


def _group_log_sum(log_q: Tensor, group) -> Tensor:
    """log-sum-exp over the samples of all processes, (1, prototypes)."""
    if group is None:
        return log_q.logsumexp(0, keepdim=True)
    top = log_q.amax(0, keepdim=True)
    torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
    total = (log_q - top).exp().sum(0, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return total.log() + top


def _relative_entropy(sums: Tensor, marginal: Tensor) -> Tensor:
    """KL(sums, marginal) with mass terms, (B,)."""
    fine = (sums > 0) & (marginal > 0)
    ratio = torch.where(fine, sums, 1.0) / torch.where(fine, marginal, 1.0)
    return (torch.where(fine, sums * ratio.log(), 0.0) - sums + marginal).sum(-1)


def _value(value, problem, solution: ops.Solution, epsilon: float, reach_a, reach_b) -> Tensor:
    """The regularized or the dual value (B,) from the run's outputs."""
    _, a, b, _, _ = problem
    unit = epsilon * math.log(2.0)
    f, g = solution.f * unit, solution.g * unit
    masses = a.sum(-1) * b.sum(-1)
    sides = ((a, f, solution.rows, reach_a), (b, g, solution.columns, reach_b))
    if value == "regularized":
        # <P, C> + epsilon <P, log P / (a b)> = <P, f + g>
        out = (f * solution.rows).sum(-1) + (g * solution.columns).sum(-1)
        out = out + epsilon * (masses - solution.rows.sum(-1))
        for marginal, _, sums, reach in sides:
            if reach is not None:
                out = out + reach * _relative_entropy(sums, marginal)
        return out
    out = torch.zeros_like(masses)
    for marginal, potential, _, reach in sides:
        if reach is None:
            out = out + (marginal * potential).sum(-1)
        else:
            out = out - reach * (marginal * torch.expm1(-potential / reach)).sum(-1)
    if reach_a is not None or reach_b is not None:
        out = out + epsilon * (masses - solution.rows.sum(-1))
    return out


def _gemm_serves(cost, batch, spec, value, gradient, more, problem) -> bool:
    """Whether all problems share a cost that GEMMs may iterate on: looked at, so eager on CPU."""
    _, _, _, student_lengths, teacher_lengths = problem
    return (
        cost.dim() == 2
        and batch >= _GEMM_BATCH
        and value == "sharp"
        and gradient == "unrolled"
        and not more
        and spec.tolerance == 0.0
        and student_lengths is None
        and teacher_lengths is None
        and cost.device.type == "cpu"
        and may_look(cost)
        and settings().backend is None
        and shared_cost.fits(cost.to(problem[0].dtype), spec)
    )


def _envelope_value(problem, spec: SinkhornSpec, value: str, reach, want_plan: bool):
    """(value with the envelope's gradient, solution)."""
    cost, a, b, _, _ = problem
    spec = spec._replace(mode=float(GRADIENTS["envelope"]))
    wanted = ops.Wanted(linear=True, sums=True, plan=want_plan, potentials=True)
    solution = ops.sinkhorn(*problem, spec, keep=False, wanted=wanted)
    epsilon = spec.epsilon
    reach_a, reach_b = reach
    plain = ops.Solution(*(None if t is None else t.detach() for t in solution))
    fixed = (cost, a.detach(), b.detach(), None, None)
    out = _value(value, fixed, plain, epsilon, reach_a, reach_b)
    # dC = P: the gradient of the linear cost in envelope mode.
    out = out + (solution.linear - plain.linear)
    unit = epsilon * math.log(2.0)
    sides = (
        (a, b, plain.f * unit, plain.rows, reach_a),
        (b, a, plain.g * unit, plain.columns, reach_b),
    )
    for marginal, other, potential, sums, own in sides:
        if not marginal.requires_grad:
            continue
        slope = potential if own is None else -own * torch.expm1(-potential / own)
        if reach_a is not None or reach_b is not None:
            held = marginal.detach()
            idle = 1.0 if own is None else torch.exp(-potential / own)
            relative = torch.where(held > 0, sums / torch.where(held > 0, held, 1.0), idle)
            slope = slope + epsilon * (other.detach().sum(-1, keepdim=True) - relative)
        out = out + ((marginal - marginal.detach()) * slope).sum(-1)
    return out, solution
