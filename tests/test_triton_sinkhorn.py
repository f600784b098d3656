"""Triton's Sinkhorn against the float64 reference: on a GPU, or in Triton's interpreter on CPU
tensors (TRITON_INTERPRET=1 before triton is imported, as conftest.py does without a GPU)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import kdkernels as kd
from kdkernels.backends import triton as backend

if backend.why_not():
    pytest.skip(backend.why_not(), allow_module_level=True)

DEVICE = backend.READS[-1]


def problem(rows=5, columns=7, batch=2):
    """Costs and marginals; problem 0 has a zero in each marginal."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(batch, rows, columns, generator=generator)
    a = torch.rand(batch, rows, generator=generator) + 0.1
    b = torch.rand(batch, columns, generator=generator) + 0.1
    a[0, 1] = b[0, 2] = 0.0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return [t.to(DEVICE).requires_grad_() for t in (cost, a, b)]


def outputs(tensors, **options):
    """Value, plan, potentials, and the gradients of a sum that uses all that have some."""
    mode = options.get("gradient", "unrolled")
    value, plan, (f, g) = kd.sinkhorn(*tensors, return_plan=True, return_potentials=True, **options)
    total = value.sum()
    if mode != "envelope":
        total = total + plan.square().sum()
    if mode == "unrolled":  # at the fixed point potentials are defined up to a constant
        total = total + 0.1 * (f.sin().sum() + g.cos().sum())
    return value, plan, f, g, *torch.autograd.grad(total, tensors)


def compare(tensors, bound=1e-4, **options):
    with kd.use_backend("triton"):
        got = outputs(tensors, **options)
    with kd.use_backend("torch"):
        want = outputs([t.detach().double().requires_grad_() for t in tensors], **options)
    for mine, exact in zip(got, want, strict=True):
        assert mine.isfinite().all()
        mine, exact = mine.detach().double(), exact.detach()
        if options.get("gradient") == "implicit" and mine.dim() == 2:  # so are marginals' gradients
            mine, exact = mine - mine.mean(-1, keepdim=True), exact - exact.mean(-1, keepdim=True)
        assert float((mine - exact).abs().max()) <= bound * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("order", ("rows", "columns"))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"value": "regularized", "reach": (0.5, None), "denominator": 1e-2},
        {"value": "dual", "gradient": "envelope", "reach": 0.7},
        {"tolerance": 0.05, "iterations": 6},
    ),
    ids=("sharp", "unbalanced", "envelope", "tolerance"),
)
def test_values_plans_potentials_and_gradients(order, options):
    compare(problem(), **{"epsilon": 0.1, "iterations": 3, "order": order, **options})


@pytest.mark.parametrize("order", ("rows", "columns"))
def test_ragged_reads_nothing_beyond(order):
    cost, a, b = problem()
    with torch.no_grad():
        cost[0, 4:], cost[1, :, 6:], a[0, 4:], b[1, 6:] = torch.nan, torch.nan, 0.0, 0.0
        a /= a.sum(-1, keepdim=True)
        b /= b.sum(-1, keepdim=True)
    lengths = {
        "student_lengths": torch.tensor([4, 5], device=DEVICE),
        "teacher_lengths": torch.tensor([7, 6], device=DEVICE),
    }
    compare((cost, a, b), epsilon=0.1, iterations=2, order=order, **lengths)


@pytest.mark.parametrize("order", ("rows", "columns"))
def test_implicit(order, monkeypatch):
    from kdkernels.backends.triton import sinkhorn as kernels

    monkeypatch.setattr(kernels, "_ROUNDS", 25)
    compare(
        problem(3, 4, 1), epsilon=0.5, iterations=20, order=order, gradient="implicit", bound=2e-3
    )


def test_tiles_of_rows_and_a_shared_cost():
    cost, a, b = problem(19, 3)
    shared = cost[0].detach().clone().requires_grad_()
    compare((shared, a, b), epsilon=0.1, iterations=2)


def test_small_epsilon_has_no_underflow():
    cost, _, _ = problem(4, 5)
    for order in ("rows", "columns"):
        with kd.use_backend("triton"):
            value = kd.sinkhorn(cost.detach(), epsilon=1e-3, iterations=3, order=order)
        with kd.use_backend("torch"):
            exact = kd.sinkhorn(cost.detach().double(), epsilon=1e-3, iterations=3, order=order)
        torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-4)


def test_infinite_costs_and_empty_problems():
    cost, _, _ = problem()
    with torch.no_grad():
        cost[0, 0, 1:] = torch.inf
    empty = torch.tensor([5, 0], device=DEVICE)
    with kd.use_backend("triton"):
        value, plan = kd.sinkhorn(
            cost, epsilon=0.2, iterations=3, student_lengths=empty, return_plan=True
        )
        (grad,) = torch.autograd.grad(value.sum(), cost)
    with kd.use_backend("torch"):
        exact = kd.sinkhorn(cost.double(), epsilon=0.2, iterations=3, student_lengths=empty)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    assert not plan[0, 0, 1:].any() and not plan[1].any() and not grad[1].any()


def test_sorted_transport_in_chunks(monkeypatch):
    from kdkernels.backends.triton import sinkhorn as kernels

    monkeypatch.setattr(kernels, "_SORTED_ROWS", 2)
    z = torch.randn(5, 9, device=DEVICE).requires_grad_()
    t = torch.randn(5, 7, device=DEVICE)
    mask = torch.tensor([True, True, False, True, True], device=DEVICE)
    results = []
    for name in ("triton", "torch"):
        with kd.use_backend(name):
            value = kd.sorted_transport(z, t, mask=mask)
            results.append((value, torch.autograd.grad(value, z)[0]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_refusals_name_the_argument():
    cost, _, _ = problem()
    with kd.use_backend("triton"):
        with pytest.raises(TypeError, match="cost: backend 'triton' takes float32"):
            kd.sinkhorn(cost.detach().double(), epsilon=0.1)
        with pytest.raises(ValueError, match="cost: backend 'triton' takes up to 4096 columns"):
            kd.sinkhorn(torch.rand(1, 4097, device=DEVICE), epsilon=0.1)
