"""Properties of transport that hold for every problem."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd

few = settings(max_examples=15, deadline=None)
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)


def make(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    a = torch.rand(rows, generator=generator, dtype=torch.float64) + 1e-3
    b = torch.rand(columns, generator=generator, dtype=torch.float64) + 1e-3
    return cost, a / a.sum(), b / b.sum()


@few
@given(seeds, sizes, sizes, st.floats(0.01, 10.0))
def test_marginals_are_met_and_transposition_swaps_the_orders(seed, rows, columns, epsilon):
    cost, a, b = make(seed, rows, columns)
    value, plan = kd.sinkhorn(cost, a, b, epsilon=epsilon, iterations=7, return_plan=True)
    torch.testing.assert_close(plan.sum(0), b, rtol=1e-9, atol=1e-12)
    other, back = kd.sinkhorn(
        cost.T, b, a, epsilon=epsilon, iterations=7, order="columns", return_plan=True
    )
    torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(plan, back.T, rtol=1e-8, atol=1e-12)


@few
@given(seeds, sizes, sizes)
def test_scaling_shifts_and_permutations(seed, rows, columns):
    cost, a, b = make(seed, rows, columns)
    value = kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=5)
    torch.testing.assert_close(
        kd.sinkhorn(3 * cost, a, b, epsilon=0.3, iterations=5), 3 * value, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        kd.sinkhorn(cost + 2.0, a, b, epsilon=0.1, iterations=5), value + 2.0, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        kd.sinkhorn(cost, 5 * a, 5 * b, epsilon=0.1, iterations=5), 5 * value, rtol=1e-9, atol=1e-12
    )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        kd.sinkhorn(cost[order], a[order], b, epsilon=0.1, iterations=5), value,
        rtol=1e-9, atol=1e-12,
    )  # fmt: skip


@few
@given(seeds, sizes, sizes)
def test_unbalanced_tends_to_balanced(seed, rows, columns):
    cost, a, b = make(seed, rows, columns)
    for value in ("sharp", "regularized", "dual"):
        exact = kd.sinkhorn(cost, a, b, epsilon=0.5, iterations=100, value=value)
        near = kd.sinkhorn(cost, a, b, epsilon=0.5, iterations=100, value=value, reach=1e6)
        torch.testing.assert_close(near, exact, rtol=1e-4, atol=1e-4)


@few
@given(seeds, sizes, sizes)
def test_at_convergence_the_regularized_value_is_the_dual(seed, rows, columns):
    cost, a, b = make(seed, rows, columns)
    for reach in (None, 0.7, (None, 0.3)):
        options = {"epsilon": 0.5, "iterations": 400, "reach": reach}
        torch.testing.assert_close(
            kd.sinkhorn(cost, a, b, value="regularized", **options),
            kd.sinkhorn(cost, a, b, value="dual", **options),
            rtol=1e-7, atol=1e-9,
        )  # fmt: skip


@few
@given(
    seeds,
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_sorted_transport_is_a_distance_of_value_laws(seed, width, other, dtype):
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(3, width, generator=generator) * 3).to(dtype)
    a = (torch.randn(3, other, generator=generator) * 3).to(dtype)
    value = kd.sorted_transport(z, a, reduction="none")
    assert bool((value >= 0).all() and (value <= 2 + 1e-5).all())
    torch.testing.assert_close(
        kd.sorted_transport(a, z, reduction="none"), value, rtol=1e-5, atol=1e-6
    )
    order = torch.randperm(width, generator=generator)
    torch.testing.assert_close(
        kd.sorted_transport(z[:, order], a, reduction="none"), value, rtol=1e-5, atol=1e-6
    )
    # The order of the normaliser's sum is all that differs.
    assert bool((kd.sorted_transport(z, z[:, order], reduction="none") <= 1e-6).all())
    assert bool((kd.sorted_transport(z, z.clone(), reduction="none") == 0).all())
    shifted = kd.sorted_transport(z.float() + 1.0, a.float(), reduction="none")
    torch.testing.assert_close(shifted, value, rtol=1e-4, atol=1e-5)
