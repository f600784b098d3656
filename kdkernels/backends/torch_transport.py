"""Transport in plain torch, the oracle: the iterations as they are written on paper, in float64 and
in the log domain; gradients by autograd through the very same loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .transport_spec import ENVELOPE, IMPLICIT, SinkhornSpec

_LN2 = math.log(2.0)


def sinkhorn_workspace(rows: int, columns: int, on_cuda: bool = False) -> int:
    """Scratch elements of a problem: none."""
    return 0


def sorted_workspace(
    student_columns: int, teacher_columns: int, wide: bool, on_cuda: bool = False
) -> int:
    """Scratch elements of a row: none."""
    return 0


def _valid(lengths: Tensor | None, size: int, batch: int, like: Tensor) -> Tensor:
    """(B, size) bool: inside the problem."""
    if lengths is None:
        return torch.ones((batch, size), dtype=torch.bool, device=like.device)
    return torch.arange(size, device=like.device) < lengths[:, None]


def _marginal(given: Tensor | None, valid: Tensor) -> Tensor:
    """(B, size) float64, zero outside the problem."""
    if given is None:
        return valid.double() / valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(valid, given.double(), 0.0)


def _log_sum(x: Tensor, weight: Tensor, dim: int, denominator: float) -> Tensor:
    """log(sum weight exp x + denominator). The weight stays a factor, so that its derivative is
    there also where it is zero."""
    top = torch.where(weight > 0, x, -torch.inf).detach().amax(dim, keepdim=True)
    if denominator:
        top = top.clamp(min=math.log(denominator))
    top = torch.where(top.isfinite(), top, 0.0)
    total = (weight * (x - top).exp()).sum(dim, keepdim=True)
    if denominator:
        total = total + (math.log(denominator) - top).exp()
    positive = total > 0
    out = torch.where(positive, torch.where(positive, total, 1.0).log() + top, -torch.inf)
    return out.squeeze(dim)


class _Problem:
    """The batch with everything beyond the lengths at cost +inf."""

    def __init__(self, cost, a, b, student_lengths, teacher_lengths, spec: SinkhornSpec):
        batch, rows, columns = cost.shape
        self.valid_rows = _valid(student_lengths, rows, batch, cost)
        self.valid_columns = _valid(teacher_lengths, columns, batch, cost)
        inside = self.valid_rows[:, :, None] & self.valid_columns[:, None, :]
        self.inside = inside & (cost != torch.inf)
        self.cost = torch.where(self.inside, cost.double(), 0.0)
        self.log_kernel = torch.where(self.inside, -self.cost / spec.epsilon, -torch.inf)
        self.a = _marginal(a, self.valid_rows)
        self.b = _marginal(b, self.valid_columns)
        self.spec = spec
        empty = ~(self.valid_rows.any(-1) & self.valid_columns.any(-1))
        self.empty = empty[:, None]

    def rows(self, g: Tensor, v: Tensor) -> Tensor:
        """log of u / a: one half-iteration, with scalings v exp(g)."""
        s = self.spec
        total = _log_sum(self.log_kernel + g[:, None, :], v[:, None, :], 2, s.denominator)
        f = -s.damping_a * total
        keep = self.valid_rows & ~(torch.isinf(f) & (self.a == 0)) & ~self.empty
        return torch.where(keep, f, 0.0)

    def columns(self, f: Tensor, u: Tensor) -> Tensor:
        s = self.spec
        total = _log_sum(self.log_kernel + f[:, :, None], u[:, :, None], 1, s.denominator)
        g = -s.damping_b * total
        keep = self.valid_columns & ~(torch.isinf(g) & (self.b == 0)) & ~self.empty
        return torch.where(keep, g, 0.0)

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        density = (self.log_kernel + f[:, :, None] + g[:, None, :]).exp()
        return self.a[:, :, None] * density * self.b[:, None, :]


def _iterate(p: _Problem, iterations: int):
    """Yields (f, g, change of the columns' sums) after each iteration, as natural logarithms."""
    start = (p.a if p.spec.columns_first else p.b) > 0
    f, g = torch.zeros_like(p.a), torch.zeros_like(p.b)
    u, v = (start.double(), None) if p.spec.columns_first else (None, start.double())
    for _ in range(iterations):
        if p.spec.columns_first:
            before, g = (g, v), p.columns(f, u)
            error = _change(p, f, u, *before, g)
            f = p.rows(g, p.b)
        else:
            f = p.rows(g, v)
            before, g = (g, v), p.columns(f, p.a)
            error = _change(p, f, p.a, *before, g)
        u, v = p.a, p.b
        yield f, g, error


def _change(p: _Problem, f, u, g_before, v_before, g) -> Tensor:
    """(B,) L1 change of the column sums when v is replaced; inf where there was no v yet."""
    if v_before is None:
        return torch.full((p.a.shape[0],), torch.inf, device=p.a.device, dtype=torch.float64)
    with torch.no_grad():
        total = _log_sum(p.log_kernel + f[:, :, None], u[:, :, None], 1, 0.0)
        change = p.b * (g + total).exp() - v_before * (g_before + total).exp()
        return torch.where(p.b > 0, change.abs(), 0.0).sum(-1)


def _numbers(spec) -> SinkhornSpec:
    return SinkhornSpec(*spec)


def sinkhorn_fwd(
    cost, a, b, student_lengths, teacher_lengths, f, g, done, linear, rows, columns, plan, _, spec
) -> None:
    """Fill the outputs (csrc/transport/transport.h)."""
    spec = _numbers(spec)
    with torch.no_grad():
        p = _Problem(cost, a, b, student_lengths, teacher_lengths, spec)
        keep = f.shape[0] > 1
        f.zero_()
        g.zero_()
        done.zero_()
        last_f, last_g = torch.zeros_like(p.a), torch.zeros_like(p.b)
        running = ~p.empty
        for t, (ft, gt, error) in enumerate(_iterate(p, int(spec.iterations))):
            last_f = torch.where(running, ft, last_f)
            last_g = torch.where(running, gt, last_g)
            if keep:
                f[t] = torch.where(running, ft / _LN2, 0.0)
                g[t] = torch.where(running, gt / _LN2, 0.0)
            done += running[:, 0]
            if spec.tolerance > 0:
                running = running & (error > spec.tolerance)[:, None]
        if not keep:
            f[0] = last_f / _LN2
            g[0] = last_g / _LN2
        full = p.plan(last_f, last_g)
        if linear is not None:
            linear.copy_((full * p.cost).sum((1, 2)))
        if rows is not None:
            rows.copy_(full.sum(2))
        if columns is not None:
            columns.copy_(full.sum(1))
        if plan is not None:
            plan.copy_(full)


def sinkhorn_bwd(
    cost,
    a,
    b,
    student_lengths,
    teacher_lengths,
    f,
    g,
    done,
    linear_bar,
    rows_bar,
    columns_bar,
    plan_bar,
    f_bar,
    g_bar,
    grad_cost,
    grad_a,
    grad_b,
    _,
    spec,
) -> None:
    """Gradients by autograd through the loop (unrolled), through one more iteration and the solved
    adjoint system (implicit), or the plan itself (envelope)."""
    spec = _numbers(spec)
    with torch.enable_grad():
        leaf = cost.detach().double().requires_grad_()
        like = _Problem(leaf.detach(), a, b, student_lengths, teacher_lengths, spec)
        leaf_a = like.a.detach().requires_grad_()
        leaf_b = like.b.detach().requires_grad_()
        p = _Problem(leaf, leaf_a, leaf_b, student_lengths, teacher_lengths, spec)
        slot = done.clamp(min=1) - 1
        keep = f.shape[0] > 1

        def last(history: Tensor) -> Tensor:
            index = slot.view(1, -1, 1).expand(1, -1, history.shape[2])
            chosen = history.gather(0, index)[0] if keep else history[0]
            return chosen.double() * _LN2

        final_f, final_g = last(f), last(g)
        if int(spec.mode) == ENVELOPE:
            full = p.plan(final_f, final_g).detach()
            if grad_cost is not None:
                grad_cost.copy_(full * linear_bar.double()[:, None, None])
            grad_a.zero_()
            grad_b.zero_()
            return
        if int(spec.mode) == IMPLICIT:
            final_f, final_g = _fixed_point(p, final_f, final_g)
        else:
            final_f, final_g = torch.zeros_like(p.a), torch.zeros_like(p.b)
            for t, (ft, gt, _error) in enumerate(_iterate(p, int(spec.iterations))):
                ran = (t < done)[:, None]
                final_f, final_g = torch.where(ran, ft, final_f), torch.where(ran, gt, final_g)
        full = p.plan(final_f, final_g)
        total = full.new_zeros(())
        pairs = (
            (linear_bar, (full * p.cost).sum((1, 2))),
            (rows_bar, full.sum(2)),
            (columns_bar, full.sum(1)),
            (plan_bar, full),
            (f_bar, final_f / _LN2),
            (g_bar, final_g / _LN2),
        )
        for bar, output in pairs:
            if bar is not None:
                total = total + (bar.double() * output).sum()
        grads = torch.autograd.grad(total, (leaf, leaf_a, leaf_b), allow_unused=True)
    for out, grad in zip((grad_cost, grad_a, grad_b), grads, strict=True):
        if out is not None:
            out.copy_(torch.zeros_like(out) if grad is None else grad)


class _Solve(torch.autograd.Function):
    """Identity on the potentials at a fixed point x = F(x); backward sums the Neumann series
    w + F'w + F'F'w + ... by least squares: the balanced system is singular along (1, -1)."""

    @staticmethod
    def forward(ctx, x, jacobian):
        ctx.jacobian = jacobian
        return x.clone()

    @staticmethod
    def backward(ctx, w):
        size = w.shape[-1]
        system = torch.eye(size, dtype=w.dtype, device=w.device) - ctx.jacobian.transpose(-1, -2)
        solution = torch.linalg.lstsq(system, w.unsqueeze(-1), driver="gelsd").solution
        return solution.squeeze(-1), None


def _fixed_point(p: _Problem, f: Tensor, g: Tensor):
    """The potentials as differentiable functions of cost and marginals, by the fixed point."""
    f0, g0 = f.detach(), g.detach()

    def step(x: Tensor) -> Tensor:
        rows = f0.shape[1]
        return torch.cat([p.rows(x[:, rows:], p.b), p.columns(x[:, :rows], p.a)], dim=1)

    x = torch.cat([f0, g0], dim=1).requires_grad_()
    y = step(x)
    size = x.shape[1]
    rows = []
    for k in range(size):
        rows.append(torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0])
    jacobian = torch.stack(rows, dim=1)  # (B, out, in)
    solved = _Solve.apply(step(x.detach()), jacobian)
    return solved[:, : f0.shape[1]], solved[:, f0.shape[1] :]


# Annealed potentials. ---------------------------------------------------------------------------

# (cloud of the rows, cloud of the columns, partner) of each side; the clouds are x and y.
_SIDES = ((0, 1, 1), (1, 0, 0), (0, 0, 2), (1, 1, 3))


def annealed(*arguments) -> None:
    """Fill the potentials, and the slopes of the last update or the costs' places
    (csrc/transport/transport.h)."""
    annealed_in(torch.float64, *arguments)


@torch.no_grad()
def annealed_in(
    dtype, x, y, log_a, log_b, costs, potentials, slopes, _workspace, epsilons, root, rho, need_x,
    need_y,
) -> None:  # fmt: skip
    """`annealed` in the given precision; one matrix a side."""
    clouds, logs = (x.to(dtype), y.to(dtype)), (log_a.to(dtype), log_b.to(dtype))
    sides = _SIDES[: len(costs)]

    def differences(side: int, c: int) -> Tensor:
        own, other, _ = sides[side]
        return clouds[own][:, c, :, None] - clouds[other][:, c, None, :]

    def cost_of(side: int) -> Tensor:
        if costs[side] is not None:
            return costs[side].to(dtype)
        square = differences(side, 0).square()
        for c in range(1, x.shape[1]):
            square += differences(side, c).square()
        return square.clamp(min=1e-8).sqrt() if root else square / 2

    def exponents(side: int, cost: Tensor, epsilon: float, phi: list[Tensor] | None) -> Tensor:
        _, other, partner = sides[side]
        h = logs[other] if phi is None else logs[other] + phi[partner] / epsilon
        return h[:, None, :] - cost / epsilon

    def damping(epsilon: float) -> float:
        return 1.0 / (1.0 + epsilon / rho) if rho else 1.0

    def softmin(side: int, cost: Tensor, epsilon: float, phi: list[Tensor] | None) -> Tensor:
        return -damping(epsilon) * epsilon * exponents(side, cost, epsilon, phi).logsumexp(-1)

    fixed = [cost_of(k) for k in range(len(sides))]
    phi = [softmin(k, c, epsilons[0], None) for k, c in enumerate(fixed)]
    for epsilon in epsilons:
        moved = [softmin(k, c, epsilon, phi) for k, c in enumerate(fixed)]
        phi = [(old + new) / 2 for old, new in zip(phi, moved, strict=True)]
    end = 0
    for side, (own, _, _) in enumerate(sides):
        cost = fixed[side]
        final = softmin(side, cost, epsilons[-1], phi)
        part = slice(end, end + final.shape[1])
        end = part.stop
        potentials[:, part] = final
        if not (need_x, need_y)[own]:
            continue
        weights = exponents(side, cost, epsilons[-1], phi).softmax(-1)
        weights *= damping(epsilons[-1])
        if root:  # the distance's derivative is the difference over it, 0 where clamped
            weights = torch.where(cost > 1.000001e-4, weights / cost, 0.0)
        if costs[side] is not None:
            costs[side].copy_(weights)
        elif slopes is not None:
            for c in range(x.shape[1]):
                slopes[:, c, part] = (weights * differences(side, c)).sum(-1)


# Sorted transport. ------------------------------------------------------------------------------


def _probabilities(logits: Tensor, tau: float) -> Tensor:
    """softmax in float64; zero everywhere for a row of -inf."""
    z = logits.double() / tau
    top = z.amax(-1, keepdim=True)
    dead = top == -torch.inf
    e = torch.where(dead, 0.0, (z - torch.where(dead, 0.0, top)).exp())
    return e / torch.where(dead, 1.0, e.sum(-1, keepdim=True))


def _side(logits: Tensor, tau: float, scale: Tensor | None, excluded: Tensor | None):
    """(softmax, scaled descending values, their order), excluded entries at -1 behind."""
    p = _probabilities(logits, tau)
    key = logits.double()
    if excluded is not None:
        key = torch.where(excluded, -torch.inf, key)
    order = key.argsort(dim=-1, descending=True, stable=True)
    if excluded is not None:
        # Entries at -inf that are not excluded stay before those that are.
        first = torch.where(excluded, 1, 0).expand_as(order).gather(-1, order)
        order = order.gather(-1, first.argsort(dim=-1, stable=True))
        keep = ~excluded.expand_as(order).gather(-1, order)
    else:
        keep = torch.ones_like(order, dtype=torch.bool)
    values = torch.where(keep, p.gather(-1, order), 0.0)
    return p, values, order, keep


def sorted_transport(
    student,
    teacher,
    mask,
    student_scale,
    teacher_scale,
    student_excluded,
    teacher_excluded,
    coefficient,
    value,
    slopes,
    grad_student,
    _workspace,
    student_temperature,
    teacher_temperature,
) -> None:
    """Fill value, slopes and the gradient (csrc/transport/transport.h)."""
    with torch.no_grad():
        p, sp, order, keep = _side(student, student_temperature, student_scale, student_excluded)
        _, sq, _, _ = _side(teacher, teacher_temperature, teacher_scale, teacher_excluded)
        width = max(sp.shape[1], sq.shape[1])
        sp = torch.nn.functional.pad(sp, (0, width - sp.shape[1]))
        sq = torch.nn.functional.pad(sq, (0, width - sq.shape[1]))
        one = torch.ones(student.shape[0], dtype=torch.float64, device=student.device)
        cs = one if student_scale is None else student_scale.double()
        ct = one if teacher_scale is None else teacher_scale.double()
        difference = cs[:, None] * sp - ct[:, None] * sq
        sign = difference.sign()
        row = difference.abs().sum(-1)
        slope_s = (sign * sp).sum(-1)
        slope_t = -(sign * sq).sum(-1)
        nothing = (teacher == -torch.inf).all(-1)
        count = torch.ones_like(nothing) if mask is None else mask
        live = count & ~nothing
        value.copy_(torch.where(live, row, 0.0))
        slopes.copy_(torch.where(live[:, None], torch.stack([slope_s, slope_t], -1), 0.0))
        if grad_student is None:
            return
        mean_sign = _mean_over_ties(student, order, keep, sign[:, : student.shape[1]])
        by_entry = torch.zeros_like(p).scatter(-1, order, torch.where(keep, mean_sign, 0.0))
        factor = cs / student_temperature
        if coefficient is not None:
            factor = factor * coefficient.double()
        grad = factor[:, None] * p * (by_entry - slope_s[:, None])
        grad_student.copy_(torch.where(live[:, None], grad, 0.0))


def _mean_over_ties(logits: Tensor, order: Tensor, keep: Tensor, sign: Tensor) -> Tensor:
    """The sign of each rank, averaged over ranks whose logits are equal."""
    values = logits.double().gather(-1, order)
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[:, 1:] = (values[:, 1:] != values[:, :-1]) | (keep[:, 1:] != keep[:, :-1])
    group = starts.long().cumsum(-1) - 1
    size = torch.zeros_like(values).scatter_add(-1, group, torch.ones_like(values))
    total = torch.zeros_like(values).scatter_add(-1, group, sign)
    return (total / size.clamp(min=1)).gather(-1, group)
