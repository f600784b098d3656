"""Gromov-Wasserstein between two cost matrices: bounds, certificates, the exact value of small
problems.

Everything here is torch operations in float64 but the assignment. All bounds are written so that
autograd gives their derivative: an optimal coupling is found first, without gradient, and the value
is read off it.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from ..ops import gromov as ops
from .checks import check_floats, check_number, same_device
from .sinkhorn import sinkhorn

METHODS = ("first_lower_bound", "third_lower_bound", "sorted", "entropic", "exact")
MAX_ASSIGNMENT = 512
MAX_EXACT = 8
# Entropic: outer steps until the plan moves by less than this, Sinkhorn to the same marginal error.
PLAN_TOLERANCE = 1e-9
MAX_STEPS, MAX_SINKHORN = 1000, 10000


def gromov_wasserstein(
    student_cost: Tensor,
    teacher_cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    method: str = "first_lower_bound",
    loss: str = "square",
    epsilon: float | None = None,
    return_bounds: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Gromov-Wasserstein GW_p^p = min_T sum |C_ij - D_kl|^p T_ik T_jl over couplings T of a and b.

    p = 2 for loss "square", 1 for "absolute"; the p-th power is returned, no root is taken.

    Methods, and what each is a bound of:

    * "first_lower_bound" <= GW_p^p, O(n^2): one-dimensional transport between one number a node.
      "absolute": the weighted row means. "square": the larger of two bounds, with the root mean
      squares of the rows (Memoli's) and with the row means. k x this value ("absolute", uniform) is
      the number of InfiGFusion (`graph_on_logits`). It is 0 for graphs with the same node numbers:
      a 6-cycle against two triangles gives 0, the exact value is 0.2222.
    * "third_lower_bound" <= GW_p^p, never below the first, O(n^3): transport between rows, as
      sorted values, then the best assignment of rows. Uniform weights, equal sizes up to 512. It
      is 0 for the two graphs above, too.
    * "sorted" >= GW_p^p, O(n^2): the value of the coupling that sorts the row means of both.
    * "entropic" >= GW_p^p: the value of the plan that entropic transport settles at, from T = a b^T
      by T <- Sinkhorn(2 L(T), epsilon) with L(T)_ik = sum_jl (C_ij - D_kl)^2 T_jl, each Sinkhorn
      run to a marginal error of 1e-9 (POT's entropic_gromov_wasserstein2). O(n^3) a step. The
      entropy is not in the value. Symmetric costs, loss "square", constant weights. The gradient
      includes the plan's own change, by the implicit function theorem.
    * "exact" = GW_p^p: the best of all n! permutations. That is the minimum over couplings where
      both matrices are positive semidefinite, or both conditionally negative definite (squared
      Euclidean distances), for then the objective is concave; other inputs are refused. n <= 8,
      equal sizes, uniform weights, loss "square".

    Args:
        student_cost: C [..., n, n], any real numbers; "exact" and "entropic" need symmetric ones.
        teacher_cost: D [..., m, m], the same leading shape, device and (float64 or not) dtype.
        a, b: weights [..., n] and [..., m] or [n] and [m], >= 0, adding up to 1; None: uniform.
        method: see above.
        loss: "square" or "absolute".
        epsilon: of "entropic", > 0, in units of the costs squared.
        return_bounds: also return (lower, upper) with lower <= GW_p^p <= upper: the larger of the
            first and (where it can be had) the third lower bound, and the sorted coupling's value
            (for "exact" both are the value). Computed in float64 and rounded outwards, so they
            hold for the given numbers.

    Returns:
        value [...], float32 (float64 for float64 costs), or (value, lower, upper). The gradient
        reaches both costs and the weights, through the coupling found; where several are optimal it
        is that of one of them. The bounds carry none.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and the way out. What
            only data can tell is read for "exact" and "entropic" (symmetry, definiteness) on any
            device, and for weights on CPU tensors.

    "third_lower_bound", "entropic", "exact" and return_bounds look at data on the host: no CUDA
    graphs, no fullgraph compile.

    Memoli, Found. Comput. Math. 11 (2011); Peyre, Cuturi, Solomon (2016).
    """
    c, d, a, b = _check(student_cost, teacher_cost, a, b, method, loss, epsilon)
    leading, p = c.shape[:-2], 2 if loss == "square" else 1
    c, d = c.reshape(-1, *c.shape[-2:]), d.reshape(-1, *d.shape[-2:])
    uniform = a is None and b is None and c.shape[-1] == d.shape[-1]
    weights = [_weights(w, x, leading) for w, x in ((a, c), (b, d))]
    if method == "first_lower_bound":
        value = _first(c, d, *weights, p)
    elif method == "third_lower_bound":
        value = _third(c, d, p)
    elif method == "sorted":
        value = _sorted(c, d, *weights, p)
    elif method == "entropic":
        value = _entropic(c, d, *weights, epsilon)
    else:
        value = _exact(c, d)
    dtype = torch.float64 if student_cost.dtype == torch.float64 else torch.float32
    out = value.to(dtype).view(leading)
    if not return_bounds:
        return out
    with torch.no_grad():
        lower, upper = _bounds(c, d, weights, p, uniform, method, value)
        return (
            out,
            _outwards(lower, dtype, -1).view(leading),
            _outwards(upper, dtype, 1).view(leading),
        )


# Bounds. C (B, n, n), D (B, m, m), weights (B, n) and (B, m), float64. --------------------------


def _line_transport(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of values u (B, n), v (B, m): (i, j, mass), each (B, n + m)."""
    order_u, order_v = u.argsort(dim=-1, stable=True), v.argsort(dim=-1, stable=True)
    up, down = a.gather(-1, order_u).cumsum(-1), b.gather(-1, order_v).cumsum(-1)
    # The ends are 1 up to rounding; made equal, no mass is left over.
    up, down = up / up[..., -1:], down / down[..., -1:]
    levels, _ = torch.cat([up, down], -1).sort(-1)
    mass = torch.diff(levels, dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    middle = (levels - mass / 2).detach()
    rank_u = torch.searchsorted(up.detach().contiguous(), middle).clamp(max=u.shape[-1] - 1)
    rank_v = torch.searchsorted(down.detach().contiguous(), middle).clamp(max=v.shape[-1] - 1)
    return order_u.gather(-1, rank_u), order_v.gather(-1, rank_v), mass


def _power(x: Tensor, p: int) -> Tensor:
    return x * x if p == 2 else x.abs()


def _transport_cost(u: Tensor, v: Tensor, a: Tensor, b: Tensor, p: int) -> Tensor:
    """W_p^p (B,) between weighted numbers."""
    i, j, mass = _line_transport(u.detach(), v.detach(), a, b)
    return (mass * _power(u.gather(-1, i) - v.gather(-1, j), p)).sum(-1)


def _row_mean(c: Tensor, a: Tensor) -> Tensor:
    return (c * a[..., None, :]).sum(-1)


def _row_root(c: Tensor, a: Tensor) -> Tensor:
    """Root mean squares of rows; the gradient of a zero row is taken as 0."""
    square = (c * c * a[..., None, :]).sum(-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _first(c: Tensor, d: Tensor, a: Tensor, b: Tensor, p: int) -> Tensor:
    means = _transport_cost(_row_mean(c, a), _row_mean(d, b), a, b, p)
    if p == 1:
        return means
    return torch.maximum(means, _transport_cost(_row_root(c, a), _row_root(d, b), a, b, p))


def _third(c: Tensor, d: Tensor, p: int) -> Tensor:
    rows_c, rows_d = c.sort(-1).values, d.sort(-1).values
    n = c.shape[-1]
    with torch.no_grad():
        # Not through a matrix product: it cancels.
        exact = "donot_use_mm_for_euclid_dist"
        table = torch.cdist(rows_c, rows_d, p=float(p), compute_mode=exact)
        columns = ops.assignment(_power(table, p) / n)
    partners = rows_d.gather(-2, columns[..., None].expand(-1, -1, n))
    return _power(rows_c - partners, p).mean((-1, -2))


def _sorted(c: Tensor, d: Tensor, a: Tensor, b: Tensor, p: int) -> Tensor:
    i, j, mass = _line_transport(_row_mean(c, a).detach(), _row_mean(d, b).detach(), a, b)
    difference = _pairs(c, i) - _pairs(d, j)
    return torch.einsum("bi,bj,bij->b", mass, mass, _power(difference, p))


def _pairs(c: Tensor, i: Tensor) -> Tensor:
    """C[i, i] (B, k, k) for indices (B, k)."""
    k = i.shape[-1]
    rows = c.gather(-2, i[..., None].expand(-1, -1, c.shape[-1]))
    return rows.gather(-1, i[..., None, :].expand(-1, k, -1))


@lru_cache(maxsize=MAX_EXACT)
def _permutations(n: int) -> Tensor:
    return torch.tensor(list(itertools.permutations(range(n))))


def _exact(c: Tensor, d: Tensor) -> Tensor:
    n = c.shape[-1]
    with torch.no_grad():
        permutations = _permutations(n).to(c.device)
        best = []
        for one, other in zip(c, d):
            moved = other[permutations[:, :, None], permutations[:, None, :]]  # (n!, n, n)
            best.append(permutations[((moved - one) ** 2).sum((-1, -2)).argmin()])
        empty = permutations.new_empty((0, n))
        index = torch.stack(best) if best else empty
    return ((c - _pairs(d, index)) ** 2).mean((-1, -2))


def _square_loss(c: Tensor, d: Tensor, a: Tensor, b: Tensor, plan: Tensor) -> Tensor:
    """L(T)_ik = sum_jl (C_ij - D_kl)^2 T_jl for a plan with marginals a, b: n^3, not n^4."""
    own = (c * c) @ a[..., None] + ((d * d) @ b[..., None]).mT
    return own - 2 * c @ plan @ d.mT


def _entropic(c: Tensor, d: Tensor, a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    # The kernels of a GPU compute in float32.
    working = torch.float64 if c.device.type == "cpu" else torch.float32
    a, b = a.detach(), b.detach()

    def step(plan, c, d):
        cost = 2 * _square_loss(c, d, a, b, plan)
        return sinkhorn(
            cost.to(working),
            a.to(working),
            b.to(working),
            epsilon=epsilon,
            iterations=MAX_SINKHORN,
            tolerance=PLAN_TOLERANCE,
            order="columns",
            gradient="implicit",
            return_plan=True,
        )[1].double()

    with torch.no_grad():
        plan = a[..., None] * b[..., None, :]
        for _ in range(MAX_STEPS if plan.numel() else 0):
            moved = step(plan, c, d)
            distance = (moved - plan).square().sum((-1, -2)).amax().sqrt()
            plan = moved
            if not bool(distance > PLAN_TOLERANCE):
                break
    if torch.is_grad_enabled() and (c.requires_grad or d.requires_grad):
        plan = _implicit(step, plan, c, d)
    return (_square_loss(c, d, a, b, plan) * plan).sum((-1, -2))


def _implicit(step, fixed: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The plan T = step(T, C, D) with its gradient to C and D: that of one step, with the upstream
    gradient g replaced by the solution of v = g + J^T v, J the step's derivative in T."""
    held = fixed.detach().requires_grad_()
    with torch.enable_grad():
        again = step(held, c.detach(), d.detach())
        out = step(fixed, c, d)

    def solve(gradient: Tensor | None) -> Tensor | None:
        v = gradient
        if v is None:
            return None
        for _ in range(MAX_STEPS):
            (back,) = torch.autograd.grad(again, held, v, retain_graph=True)
            new = gradient + back
            settled = (new - v).abs().amax() <= PLAN_TOLERANCE * new.abs().amax()
            v = new
            if bool(settled):
                break
        return v

    out.register_hook(solve)
    return out


def _bounds(c, d, weights, p, uniform, method, value) -> tuple[Tensor, Tensor]:
    """(lower, upper) in float64, moved outwards by what rounding can have done."""
    if method == "exact":
        lower = upper = value
    else:
        lower, upper = _first(c, d, *weights, p), _sorted(c, d, *weights, p)
        if uniform and c.shape[-1] <= MAX_ASSIGNMENT:
            lower = torch.maximum(lower, _third(c, d, p))
    # Each is a sum of at most (n + m)^2 terms no larger than the square of the largest difference.
    size = c.shape[-1] + d.shape[-1]
    largest = c.abs().amax((-1, -2)) + d.abs().amax((-1, -2))
    slack = 4 * size * torch.finfo(torch.float64).eps * largest**p
    return (lower - slack).clamp(min=0.0), upper + slack


def _outwards(x: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
    """x in `dtype`, rounded down (sign -1) or up (sign 1)."""
    rounded = x.to(dtype)
    wrong = rounded.double() > x if sign < 0 else rounded.double() < x
    edge = torch.full_like(rounded, sign * math.inf)
    return torch.where(wrong, torch.nextafter(rounded, edge), rounded)


# Checks. ----------------------------------------------------------------------------------------


def _check(c, d, a, b, method, loss, epsilon):
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if loss not in ("square", "absolute"):
        raise ValueError(f"loss: expected 'square' or 'absolute', got {loss!r}")
    if method == "entropic":
        if epsilon is None:
            raise ValueError("epsilon: needed for method 'entropic', a number > 0")
        check_number(epsilon, "epsilon", positive=True)
        if loss != "square":
            raise ValueError(
                f"loss: method 'entropic' is for 'square', got {loss!r}; use method 'sorted' for "
                "an upper bound"
            )
        for weights, name in ((a, "a"), (b, "b")):
            if isinstance(weights, Tensor) and weights.requires_grad:
                raise ValueError(f"{name}: constant in method 'entropic'; it must not require grad")
    elif epsilon is not None:
        raise ValueError(f"epsilon: goes with method 'entropic', got method {method!r}")
    for cost, name in ((c, "student_cost"), (d, "teacher_cost")):
        check_floats(cost, name)
        if cost.dim() < 2 or cost.shape[-1] != cost.shape[-2] or cost.shape[-1] < 1:
            raise ValueError(
                f"{name}: expected a square matrix [..., n, n], n >= 1, got {tuple(cost.shape)}"
            )
    same_device(d, "teacher_cost", c)
    if c.shape[:-2] != d.shape[:-2]:
        raise ValueError(
            f"teacher_cost: expected leading shape {tuple(c.shape[:-2])} like student_cost, got "
            f"{tuple(d.shape[:-2])}"
        )
    if (c.dtype == torch.float64) != (d.dtype == torch.float64):
        raise TypeError(
            f"teacher_cost: float64 goes with float64 only, got {c.dtype} and {d.dtype}"
        )
    for weights, cost, name in ((a, c, "a"), (b, d, "b")):
        _check_weights(weights, cost, name)
    if method in ("third_lower_bound", "exact"):
        way_out = "use 'first_lower_bound' with return_bounds=True for an interval"
        if a is not None or b is not None:
            raise ValueError(f"a, b: method {method!r} takes uniform weights only; {way_out}")
        if c.shape[-1] != d.shape[-1]:
            raise ValueError(
                f"teacher_cost: method {method!r} needs equal sizes, got {c.shape[-1]} and "
                f"{d.shape[-1]}; {way_out}"
            )
        limit = MAX_EXACT if method == "exact" else MAX_ASSIGNMENT
        if c.shape[-1] > limit:
            raise ValueError(
                f"student_cost: method {method!r} is for n <= {limit}, got {c.shape[-1]}; {way_out}"
            )
    slack = 8 * max(torch.finfo(c.dtype).eps, torch.finfo(d.dtype).eps)
    c, d = c.double(), d.double()
    if method in ("entropic", "exact"):
        for cost, name in ((c, "student_cost"), (d, "teacher_cost")):
            _check_symmetric(cost, name, method, slack)
    if method == "exact":
        _check_definite(c, d, loss, slack * c.shape[-1])
    return c, d, a, b


def _check_weights(weights, cost: Tensor, name: str) -> None:
    if weights is None:
        return
    check_floats(weights, name)
    same_device(weights, name, cost)
    n = cost.shape[-1]
    if weights.shape != (n,) and weights.shape != cost.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape ({n},) or {tuple(cost.shape[:-1])}, got {tuple(weights.shape)}"
        )
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        held = weights.detach()
        total = held.double().sum(-1)
        if not bool((held >= 0).all()) or not bool(((total - 1).abs() < 1e-3).all()):
            raise ValueError(f"{name}: expected weights >= 0 that add up to 1")


def _weights(weights: Tensor | None, cost: Tensor, leading: torch.Size) -> Tensor:
    """(B, n) float64; cost (B, n, n)."""
    batch, n = cost.shape[:2]
    if weights is None:
        return torch.full((batch, n), 1.0 / n, dtype=torch.float64, device=cost.device)
    return weights.double().expand(*leading, n).reshape(batch, n)


def _check_symmetric(cost: Tensor, name: str, method: str, slack: float) -> None:
    with torch.no_grad():
        if not bool(torch.isfinite(cost).all()):
            raise ValueError(f"{name}: method {method!r} needs finite entries")
        size = cost.abs().amax((-1, -2), keepdim=True)
        if not bool(((cost - cost.mT).abs() <= slack * size).all()):
            raise ValueError(
                f"{name}: method {method!r} needs a symmetric matrix; pass (C + C^T) / 2, or use "
                "method 'sorted' for an upper bound, 'first_lower_bound' for a lower one"
            )


def _check_definite(c: Tensor, d: Tensor, loss: str, slack: float) -> None:
    """Whether enumeration over permutations is the minimum over couplings. `slack`: how far from
    symmetric or semidefinite rounded entries may be, relative to the largest."""
    way_out = (
        "use method 'sorted' for an upper bound, 'third_lower_bound' for a lower one, or "
        "return_bounds=True for both"
    )
    if loss != "square":
        raise ValueError(f"loss: method 'exact' is for 'square', got {loss!r}; {way_out}")
    kinds = []
    with torch.no_grad():
        for cost in (c, d):
            n = cost.shape[-1]
            size = cost.abs().amax((-1, -2)) * slack
            even = (cost + cost.mT) / 2
            centre = torch.eye(n, dtype=cost.dtype, device=cost.device) - 1.0 / n
            low = torch.linalg.eigvalsh(even)[..., 0]
            high = torch.linalg.eigvalsh(centre @ even @ centre)[..., -1]
            kinds.append((low >= -size, high <= size))
    (c_semidefinite, c_distance), (d_semidefinite, d_distance) = kinds
    fits = (c_semidefinite & d_semidefinite) | (c_distance & d_distance)
    if not bool(fits.all()):
        raise ValueError(
            "student_cost, teacher_cost: method 'exact' needs both positive semidefinite or both "
            "conditionally negative definite (like squared Euclidean distances), because only then "
            f"is the best permutation the best coupling; {way_out}"
        )
