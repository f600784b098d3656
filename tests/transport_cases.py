"""What the transport tests share: problems, the literal iterations in both domains."""

from __future__ import annotations

import pytest
import torch

on_backends = pytest.mark.parametrize("backend", ("torch", "cpu", "simt", "cuda"), indirect=True)


def problem(batch=2, rows=5, columns=7, dtype=torch.float64, device="cpu", seed=0):
    """Random costs and marginals; problem 0 has a zero in each marginal."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, rows, columns, generator=generator, dtype=torch.float64)
    a = torch.rand(batch, rows, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(batch, columns, generator=generator, dtype=torch.float64) + 0.1
    a[0, 1] = 0.0
    b[0, 2] = 0.0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return [t.to(device, dtype).requires_grad_() for t in (cost, a, b)]


def loop(cost, a, b, epsilon, iterations, order="rows", denominator=0.0):
    """The iterations as papers write them, in the exponential domain."""
    kernel = (-cost / epsilon).exp()
    u, v = (a > 0).to(cost.dtype), (b > 0).to(cost.dtype)
    for _ in range(iterations):
        if order == "rows":
            u = a / ((kernel * v[:, None, :]).sum(2) + denominator)
        v = b / ((kernel * u[:, :, None]).sum(1) + denominator)
        if order == "columns":
            u = a / ((kernel * v[:, None, :]).sum(2) + denominator)
    plan = u[:, :, None] * kernel * v[:, None, :]
    return (plan * cost).sum((1, 2)), plan


def log_loop(cost, a, b, epsilon, iterations):
    """The iterations with torch.logsumexp, as one writes them against underflow."""
    kernel, log_a, log_b = -cost / epsilon, a.log(), b.log()
    v = torch.zeros_like(b)
    for _ in range(iterations):
        u = log_a - torch.logsumexp(kernel + v[:, None, :], 2)
        v = log_b - torch.logsumexp(kernel + u[:, :, None], 1)
    return ((kernel + u[:, :, None] + v[:, None, :]).exp() * cost).sum((1, 2))


def precise(backend):
    return torch.float64 if torch.float64 in backend.dtypes else torch.float32
