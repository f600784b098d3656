"""Many marginals over one cost: the iterations of all problems are GEMMs with one kernel matrix.

Only where exp(-cost / epsilon) is far from underflow; the log-domain kernels serve the rest. The
result is as deterministic as torch's GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.transport_spec import SinkhornSpec
from .once import refuse_second

# Largest |cost| / epsilon: exp(60) squared, times a few thousand, still fits into float32.
_REACH = {torch.float32: 40.0, torch.float64: 300.0}


def fits(cost: Tensor, spec: SinkhornSpec) -> bool:
    """Whether the exponential domain is safe for this cost (N, M); reads it."""
    if cost.numel() == 0:
        return False
    low, high = (float(x) for x in torch.aminmax(cost.detach()))
    return max(abs(low), abs(high)) <= _REACH[cost.dtype] * spec.epsilon  # False for NaN


class SharedSinkhorn(torch.autograd.Function):
    """<P, C> (B,) of cost (N, M), a (B, N), b (B, M), with the unrolled gradient."""

    @staticmethod
    def forward(ctx, cost, a, b, spec: SinkhornSpec):
        # Autocast would make the GEMMs' operands half.
        with torch.autocast(cost.device.type, enabled=False):
            return SharedSinkhorn._value(ctx, cost, a, b, spec)

    @staticmethod
    def _value(ctx, cost, a, b, spec: SinkhornSpec):
        kernel = (-cost / spec.epsilon).exp()
        history = []  # (divisor, scaling over marginal) of each half-iteration, rows and columns
        u, v = (a > 0).to(a.dtype), (b > 0).to(b.dtype)
        start = v if not spec.columns_first else u

        def rows():
            divisor = v @ kernel.T + spec.denominator
            return divisor, divisor.pow(-spec.damping_a)

        def columns():
            divisor = u @ kernel + spec.denominator
            return divisor, divisor.pow(-spec.damping_b)

        for _ in range(int(spec.iterations)):
            if not spec.columns_first:
                row = rows()
                u = a * row[1]
            column = columns()
            v = b * column[1]
            if spec.columns_first:
                row = rows()
                u = a * row[1]
            history.append((*row, *column))
        weighted = kernel * cost
        ctx.spec, ctx.history = spec, history
        ctx.save_for_backward(cost, a, b, kernel, start)
        return ((u @ weighted) * v).sum(-1)

    @staticmethod
    def backward(ctx, upstream):
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            grads = SharedSinkhorn._gradients(ctx, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            sources = (*ctx.saved_tensors[:3], upstream)
            grads = (refuse_second("sinkhorn", grad, *sources) for grad in grads)
        return (*grads, None)

    @staticmethod
    def _gradients(ctx, upstream):
        cost, a, b, kernel, start = ctx.saved_tensors
        spec, history = ctx.spec, ctx.history
        weighted = kernel * cost
        scale = upstream[:, None]
        _, rho, _, sigma = history[-1]
        u, v = a * rho, b * sigma
        alpha = scale * rho * (v @ weighted.T)
        beta = scale * sigma * (u @ weighted)
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        left, right = [], []  # Cbar's sum of outer products
        for t in range(len(history) - 1, -1, -1):
            divisor_a, rho, divisor_b, sigma = history[t]
            u, v = a * rho, b * sigma
            if spec.columns_first:  # u_t came last: from v_t
                z = spec.damping_a * a * alpha / divisor_a
                grad_a += alpha
                left.append(z)
                right.append(v)
                beta = (beta if t == len(history) - 1 else 0.0) - sigma * (z @ kernel)
            grad_b += beta
            w = spec.damping_b * b * beta / divisor_b
            if spec.columns_first:  # v_t came from u_(t-1)
                before, rho = (a * history[t - 1][1], history[t - 1][1]) if t else (start, None)
                left.append(before)
                right.append(w)
                if t:
                    alpha = -rho * (w @ kernel.T)
            else:
                left.append(u)
                right.append(w)
                alpha = (alpha if t == len(history) - 1 else 0.0) - rho * (w @ kernel.T)
                grad_a += alpha
                z = spec.damping_a * a * alpha / divisor_a
                before = b * history[t - 1][3] if t else start
                left.append(z)
                right.append(before)
                if t:
                    beta = -history[t - 1][3] * (z @ kernel)
        grad_cost = None
        if ctx.needs_input_grad[0]:
            _, rho, _, sigma = history[-1]
            plan = (a * rho * scale).T @ (b * sigma) * kernel  # sum over problems, weighted
            outer = torch.cat(left).T @ torch.cat(right)
            grad_cost = plan * (1 - cost / spec.epsilon) + kernel * outer / spec.epsilon
        return grad_cost, grad_a, grad_b
