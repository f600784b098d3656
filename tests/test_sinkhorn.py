"""kd.sinkhorn: closed forms, the paper-and-pencil loop in float64, finite differences, POT where it
is installed, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from transport_cases import log_loop, loop, on_backends, precise, problem

import kdkernels as kd

FAMILY = "transport"


@on_backends
@pytest.mark.parametrize("order", ("rows", "columns"))
@pytest.mark.parametrize("denominator", (0.0, 1e-3))
def test_unrolled_equals_autograd_through_the_loop(backend, order, denominator):
    for iterations in (1, 2, 6):
        args = problem(dtype=precise(backend), device=backend.device)
        cost, a, b = args
        value, plan = kd.sinkhorn(
            cost, a, b, epsilon=0.2, iterations=iterations, order=order, denominator=denominator,
            return_plan=True,
        )  # fmt: skip
        weight = torch.linspace(-1, 1, plan.numel(), dtype=plan.dtype).view_as(plan).to(plan)
        grads = torch.autograd.grad(value.sum() + (plan * weight).sum(), args)
        own = [t.detach().double().requires_grad_() for t in args]
        expected, expected_plan = loop(*own, 0.2, iterations, order, denominator)
        wanted = torch.autograd.grad(expected.sum() + (expected_plan * weight.double()).sum(), own)
        bound = 1e-9 if precise(backend) == torch.float64 else 2e-5
        torch.testing.assert_close(value.double(), expected, rtol=bound, atol=bound)
        torch.testing.assert_close(plan.double(), expected_plan, rtol=bound, atol=bound)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=bound, atol=bound)


@on_backends
@pytest.mark.parametrize("order", ("rows", "columns"))
@pytest.mark.parametrize("reach", (None, 0.7, (0.5, None), (None, 2.0)))
@pytest.mark.parametrize("value", ("sharp", "regularized", "dual"))
def test_values_and_gradients_equal_the_reference(backend, order, reach, value):
    def run(tensors):
        out = kd.sinkhorn(
            *tensors, epsilon=0.1, iterations=5, order=order, reach=reach, value=value,
            return_plan=True, return_potentials=True, student_lengths=torch.tensor([5, 5]).to(
                tensors[0].device), teacher_lengths=torch.tensor([7, 6]).to(tensors[0].device),
        )  # fmt: skip
        v, plan, (f, g) = out
        total = v.sum() + plan.square().sum() + 0.1 * (f.sin().sum() + g.cos().sum())
        return v, plan, f, g, *torch.autograd.grad(total, tensors)

    cost, a, b = problem(dtype=precise(backend), device=backend.device)
    with torch.no_grad():
        cost[1, :, 6] = torch.nan  # beyond the lengths nothing is read
        b[1, 6] = 0.0
        b[1] /= b[1].sum()
    if backend.name == "torch":
        return finite_differences(cost, a, b, order, reach, value)
    got = run((cost, a, b))
    with kd.use_backend("torch"):
        cpu = [t.detach().cpu().double().requires_grad_() for t in (cost, a, b)]
        wanted = run(cpu)
    bound = 1e-9 if precise(backend) == torch.float64 else 1e-4
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=bound, atol=bound)


def finite_differences(cost, a, b, order, reach, value):
    """The reference's own gradient against differences of its value."""
    cost = torch.where(cost.isnan(), 0.5, cost).detach().requires_grad_()

    def f(c):
        return kd.sinkhorn(
            c, a, b, epsilon=0.3, iterations=4, order=order, reach=reach, value=value
        ).sum()

    (grad,) = torch.autograd.grad(f(cost), cost)
    direction = torch.randn(cost.shape, generator=torch.Generator().manual_seed(1)).to(cost)
    h = 1e-5
    with torch.no_grad():
        slope = (f(cost + h * direction) - f(cost - h * direction)) / (2 * h)
    assert abs(float((grad * direction).sum() - slope)) < 1e-7


@on_backends
@pytest.mark.parametrize("reach", (None, 0.5))
@pytest.mark.parametrize(
    "value, gradient", (("sharp", "implicit"), ("regularized", "envelope"), ("dual", "envelope"),
                        ("regularized", "implicit"))
)  # fmt: skip
@pytest.mark.parametrize("order", ("rows", "columns"))
def test_converged_gradients_equal_differences_of_the_converged_value(
    backend, value, gradient, reach, order
):
    if backend.name == "simt" and order == "columns":
        pytest.skip("the same kernel; slow in the emulator")
    args = problem(1, 4, 5, dtype=precise(backend), device=backend.device, seed=3)
    iterations = 60 if backend.name == "simt" else 200

    def f(cost, a, b, iterations=iterations):
        return kd.sinkhorn(
            cost, a, b, epsilon=0.3, iterations=iterations, order=order, reach=reach, value=value,
            gradient=gradient,
        ).sum()  # fmt: skip

    grads = torch.autograd.grad(f(*args), args)
    plain = [t.detach().double().cpu() for t in args]
    generator = torch.Generator().manual_seed(5)
    for index, grad in enumerate(grads):
        direction = torch.randn(plain[index].shape, generator=generator, dtype=torch.float64)
        if index > 0:  # stay among marginals: same mass, zeros stay zero
            direction = torch.where(plain[index] > 0, direction, 0.0)
            if reach is None:
                direction -= plain[index] * direction.sum(-1, keepdim=True)
        h = 1e-5
        moved = [[*plain], [*plain]]
        moved[0][index] = plain[index] + h * direction
        moved[1][index] = plain[index] - h * direction
        with torch.no_grad(), kd.use_backend("torch"):
            slope = (f(*moved[0], 300) - f(*moved[1], 300)) / (2 * h)
        bound = 1e-6 if precise(backend) == torch.float64 else 1e-3
        assert abs(float((grad.cpu().double() * direction).sum() - slope)) < bound


@on_backends
def test_small_epsilon_in_float32_is_finite_and_right(backend):
    cost, a, b = problem(2, 6, 8, dtype=torch.float32, device=backend.device)
    for epsilon in (0.05, 0.005, 1e-3):
        c = (cost.detach() * 2).requires_grad_()
        value = kd.sinkhorn(c, a, b, epsilon=epsilon, iterations=8)
        (grad,) = torch.autograd.grad(value.sum(), c)
        with kd.use_backend("torch"):
            own = c.detach().double().requires_grad_()
            expected = kd.sinkhorn(own, a.double(), b.double(), epsilon=epsilon, iterations=8)
            (want,) = torch.autograd.grad(expected.sum(), own)
        if epsilon < 0.01:  # where the exponential domain has no answer
            assert loop(c.detach(), a.detach(), b.detach(), epsilon, 8)[0].isnan().any()
        # A cost's rounding moves the exponent by 2^-24 max(cost) / epsilon.
        bound = 1e-5 + 40 * 2.0**-24 * 2 / epsilon
        torch.testing.assert_close(value.double(), expected, rtol=bound, atol=bound)
        assert float((grad - want).abs().max()) <= bound * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("epsilon", (1.0, 0.2, 0.05, 0.01, 0.005))
def test_float32_gradients_are_as_good_as_autograd_through_the_loop(epsilon):
    """Error against float64 in units of the largest entry, over eight problems."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(8, 40, 50, generator=generator)
    a = torch.randn(8, 40, generator=generator).softmax(-1)
    b = torch.randn(8, 50, generator=generator).softmax(-1)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (cost, a, b)]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    def literal(*leaves):
        return log_loop(*leaves, epsilon, 20)

    def ours(*leaves):
        return kd.sinkhorn(*leaves, epsilon=epsilon, iterations=20)

    exact = gradients(literal, torch.float64)
    for grad, want in zip(gradients(ours, torch.float64), exact, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-9 * float(want.abs().max()))
    for mine, theirs, want in zip(
        gradients(ours, torch.float32), gradients(literal, torch.float32), exact, strict=True
    ):
        scale = float(want.abs().max())
        error, other = (float((x.double() - want).abs().max()) / scale for x in (mine, theirs))
        if epsilon >= 0.05:
            assert error <= 1e-5
        else:
            assert error <= 2 * other


@on_backends
def test_closed_forms(backend):
    dtype = precise(backend)
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(2, 6, generator=generator).softmax(-1).to(backend.device, dtype)
            for _ in range(2))  # fmt: skip
    # 0/1 cost: total variation; |i - j|: the distance of the cumulative sums.
    discrete = 1.0 - torch.eye(6, dtype=dtype, device=backend.device)
    value = kd.sinkhorn(discrete, p, q, epsilon=0.1, iterations=100)
    torch.testing.assert_close(value, (p - q).abs().sum(-1) / 2, rtol=0, atol=1e-3)
    line = torch.arange(6.0, device=backend.device, dtype=dtype)
    value = kd.sinkhorn((line[:, None] - line).abs(), p, q, epsilon=0.2, iterations=100)
    torch.testing.assert_close(value, (p - q).cumsum(-1).abs().sum(-1), rtol=0, atol=1e-3)
    # Diracs; epsilon to infinity: the product of the marginals.
    one = torch.full((1, 1, 1), 3.5, dtype=dtype, device=backend.device)
    assert kd.sinkhorn(one, epsilon=0.1, iterations=1).item() == pytest.approx(3.5)
    cost = torch.rand(2, 6, 6, generator=generator).to(backend.device, dtype)
    _, plan = kd.sinkhorn(cost, p, q, epsilon=1e5, iterations=3, return_plan=True)
    torch.testing.assert_close(plan, p[:, :, None] * q[:, None, :], rtol=1e-4, atol=1e-6)


def test_gaussians():
    """Entropic transport of unit Gaussians at distance d, cost (x - y)^2: the plan is Gaussian with
    covariance c = sqrt(1 + e^2 / 16) - e / 4, the sharp cost d^2 + 2 - 2 c."""
    grid = torch.linspace(-5, 7, 121, dtype=torch.float64)
    a = (-grid.square() / 2).softmax(0)
    b = (-(grid - 1.5).square() / 2).softmax(0)
    for epsilon in (0.5, 0.1):
        value = kd.sinkhorn((grid[:, None] - grid).square(), a, b, epsilon=epsilon, iterations=400)
        covariance = math.sqrt(1 + epsilon**2 / 16) - epsilon / 4
        assert value.item() == pytest.approx(2.25 + 2 - 2 * covariance, rel=1e-3)


@on_backends
def test_marginals_and_order(backend):
    cost, a, b = problem(dtype=precise(backend), device=backend.device)
    for order, exact in (("rows", b), ("columns", a)):
        _, plan, (f, g) = kd.sinkhorn(
            cost, a, b, epsilon=0.1, iterations=3, order=order, return_plan=True,
            return_potentials=True,
        )  # fmt: skip
        sums = plan.sum(1) if order == "rows" else plan.sum(2)
        torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-6)
        rebuilt = (
            a[:, :, None] * b[:, None, :] * ((f[:, :, None] + g[:, None, :] - cost) / 0.1).exp()
        )
        torch.testing.assert_close(plan, rebuilt, rtol=1e-4, atol=1e-6)


@on_backends
@pytest.mark.parametrize("order", ("rows", "columns"))
def test_tolerance_stops_each_problem_by_itself(backend, order):
    cost, a, b = problem(3, 5, 6, dtype=precise(backend), device=backend.device)
    with torch.no_grad():
        cost[1] *= 20.0  # converges slowly
    tolerance = 1e-3
    values, plan = kd.sinkhorn(
        cost, a, b, epsilon=0.5, iterations=50, tolerance=tolerance, order=order, return_plan=True
    )
    (grad,) = torch.autograd.grad(values.sum(), cost)
    error = (plan.sum(2) - a).abs().sum(-1) + (plan.sum(1) - b).abs().sum(-1)
    assert bool((error[[0, 2]] <= tolerance + 1e-5).all())
    for k in range(3):  # alone it does the same
        c = cost[k].detach().clone().requires_grad_()
        value = kd.sinkhorn(
            c, a[k], b[k], epsilon=0.5, iterations=50, tolerance=tolerance, order=order
        )
        torch.testing.assert_close(value, values[k], rtol=1e-5, atol=1e-6)
        (own,) = torch.autograd.grad(value, c)
        torch.testing.assert_close(own, grad[k], rtol=1e-4, atol=1e-5)


@on_backends
def test_ragged_equals_cut_and_zero_weight(backend):
    cost, _, _ = problem(dtype=precise(backend), device=backend.device)
    ragged = cost.detach().clone()
    ragged[0, 3:], ragged[1, :, 4:] = torch.nan, torch.nan
    ragged.requires_grad_()
    rows, columns = (torch.tensor(x, device=backend.device) for x in ([3, 5], [7, 4]))
    value, plan = kd.sinkhorn(
        ragged, epsilon=0.1, iterations=4, student_lengths=rows, teacher_lengths=columns,
        return_plan=True,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(value.sum(), ragged)
    for k in range(2):
        n, m = int(rows[k]), int(columns[k])
        c = cost[k, :n, :m].detach().clone().requires_grad_()
        alone = kd.sinkhorn(c, epsilon=0.1, iterations=4)
        (own,) = torch.autograd.grad(alone, c)
        torch.testing.assert_close(alone, value[k], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(own, grad[k, :n, :m], rtol=1e-4, atol=1e-6)
        assert not plan[k, n:].any() and not plan[k, :, m:].any()
        assert not grad[k, n:].any() and not grad[k, :, m:].any()


@on_backends
def test_shared_cost_and_empty_batches(backend):
    cost, a, b = problem(dtype=precise(backend), device=backend.device)
    shared = cost[0].detach().clone().requires_grad_()
    value = kd.sinkhorn(shared, a, b, epsilon=0.2, iterations=5)
    (grad,) = torch.autograd.grad(value.sum(), shared, retain_graph=True)
    again = torch.autograd.grad(value.sum(), shared)[0]
    assert torch.equal(grad, again)
    full = shared.detach().expand(2, -1, -1).clone().requires_grad_()
    expected = kd.sinkhorn(full, a, b, epsilon=0.2, iterations=5)
    (want,) = torch.autograd.grad(expected.sum(), full)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, want.sum(0))
    assert kd.sinkhorn(cost[:0].detach(), epsilon=0.1).shape == (0,)


@pytest.mark.parametrize("order", ("rows", "columns"))
@pytest.mark.parametrize("reach", (None, 0.6))
@pytest.mark.parametrize("denominator", (0.0, 1e-2))
def test_many_marginals_over_one_cost(order, reach, denominator, monkeypatch):
    """The GEMM form against the log-domain kernels, values and all gradients."""
    from kdkernels.ops import shared_cost

    cost, a, b = problem(9, 6, 8, seed=6)
    shared = cost[0].detach().clone().requires_grad_()
    options = {"epsilon": 0.1, "iterations": 4, "order": order, "reach": reach,
               "denominator": denominator}  # fmt: skip
    upstream = torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
    calls = []
    apply = shared_cost.SharedSinkhorn.apply
    monkeypatch.setattr(
        shared_cost.SharedSinkhorn, "apply", lambda *args: calls.append(1) or apply(*args)
    )
    value = kd.sinkhorn(shared, a, b, **options)
    grads = torch.autograd.grad(value, (shared, a, b), upstream)
    assert calls
    with kd.use_backend("cpu"):
        expected = kd.sinkhorn(shared, a, b, **options)
        wanted = torch.autograd.grad(expected, (shared, a, b), upstream)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-10)
    # Too small an epsilon for the exponential domain goes to the kernels.
    calls.clear()
    assert kd.sinkhorn(shared, a, b, epsilon=1e-4, iterations=4).isfinite().all()
    assert not calls


def test_pot():
    ot = pytest.importorskip("ot")
    cost, a, b = (t.detach() for t in problem(2, 6, 8, seed=4))
    for k in range(2):
        keep_a, keep_b = a[k] > 0, b[k] > 0
        c, p, q = cost[k][keep_a][:, keep_b], a[k][keep_a], b[k][keep_b]
        _, plan = kd.sinkhorn(
            c, p, q, epsilon=0.1, iterations=500, order="columns", return_plan=True
        )
        theirs = ot.sinkhorn(p, q, c, 0.1, method="sinkhorn_log", stopThr=1e-14, numItermax=5000)
        torch.testing.assert_close(plan, theirs, rtol=1e-8, atol=1e-10)
        _, plan = kd.sinkhorn(
            c, p, q, epsilon=0.1, iterations=2000, reach=0.5, return_plan=True, order="columns"
        )
        theirs = ot.unbalanced.sinkhorn_unbalanced(
            p, q, c, 0.1, 0.5, stopThr=1e-14, numItermax=5000, reg_type="kl"
        )
        torch.testing.assert_close(plan, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"iterations": 0}, "iterations"),
        ({"order": "sideways"}, "order"),
        ({"value": "soft"}, "value"),
        ({"gradient": "exact"}, "gradient"),
        ({"gradient": "envelope"}, "gradient"),
        ({"reach": 0.0}, "reach"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"denominator": -1.0}, "denominator"),
        ({"a": torch.full((3,), -1.0)}, "a:"),
        ({"a": torch.full((3,), 1.0), "b": torch.full((4,), 1.0)}, "b:"),
        ({"a": torch.full((3,), 2.0)}, "b:"),
        ({"a": torch.full((5,), 0.2)}, "a:"),
        ({"a": torch.tensor([-1.0, 1.0, 1.0]), "reach": 1.0}, "a:"),
        ({"a": torch.zeros(3)}, "b:"),
        ({"a": torch.tensor([torch.inf, 0.0, 0.0]), "reach": 1.0}, "a:"),
        ({"b": torch.tensor([torch.nan, 0.0, 0.0, 1.0])}, "b:"),
        ({"a": torch.tensor([1.0, -1.0, 1.0]), "student_lengths": torch.tensor([2])}, "a:"),
        ({"student_lengths": torch.tensor([4])}, "student_lengths"),
        ({"teacher_lengths": torch.tensor([-1])}, "teacher_lengths"),
        ({"cost": torch.rand(3)}, "cost"),
        ({"cost": torch.full((1, 3, 4), torch.nan)}, "cost"),
    ),
)
@pytest.mark.parametrize("debugging", (False, True))
def test_bad_input(options, message, debugging):
    arguments = {"cost": torch.rand(1, 3, 4), "epsilon": 0.1, "iterations": 2, **options}
    for name in ("cpu", "torch"):  # the CPU kernels look at marginals themselves
        with kd.use_backend(name), kd.debug(debugging), pytest.raises(ValueError, match=message):
            kd.sinkhorn(**arguments)
    if "reach" not in options:  # many problems over one cost
        with kd.debug(debugging), pytest.raises(ValueError, match=message):
            kd.sinkhorn(**arguments)


def test_marginals_beyond_the_lengths_are_not_looked_at():
    a = torch.tensor([[0.5, 0.5, torch.nan], [1.0, -3.0, torch.inf]], requires_grad=True)
    lengths = torch.tensor([2, 1])
    cost = torch.rand(2, 3, 4, requires_grad=True)
    for value in ("sharp", "dual"):
        out = kd.sinkhorn(cost, a, epsilon=0.2, iterations=30, value=value, student_lengths=lengths)
        grads = torch.autograd.grad(out.sum(), (cost, a))
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
        assert not grads[1][0, 2:].any() and not grads[1][1, 1:].any()


def test_unequal_masses_are_fine_with_reach():
    value = kd.sinkhorn(torch.rand(3, 4), torch.full((3,), 2.0), torch.full((4,), 0.1),
                        epsilon=0.1, iterations=20, reach=1.0)  # fmt: skip
    assert value.isfinite()
