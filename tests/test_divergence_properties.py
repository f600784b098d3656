"""Properties that hold for any rows (hypothesis), on the kernels."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels.functional.kinds import KINDS
from kdkernels.testing import tolerances

PAIRED = sorted(k for k in KINDS if k != "entropy")
NON_NEGATIVE = sorted(set(PAIRED) - {"cross_entropy"})
SYMMETRIC = (
    "jeffreys",
    "total_variation",
    "hellinger",
    "squared_hellinger",
    "bhattacharyya",
    "triangular",
)
few = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def row_pairs(draw):
    """Student and teacher rows of realistic spread, with masked columns now and then."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, width = draw(st.integers(1, 5)), draw(st.integers(2, 90))
    std = draw(st.sampled_from([0.1, 1.0, 5.0, 10.0]))
    gap = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 5.0]))
    teacher = torch.randn(rows, width, generator=generator) * std
    student = teacher + gap * torch.randn(rows, width, generator=generator)
    if draw(st.booleans()):
        hidden = torch.rand(width, generator=generator) < 0.3
        hidden[0] = False
        student[:, hidden] = teacher[:, hidden] = float("-inf")
    return student, teacher


def call(student, teacher, kind, **options):
    return kd.divergence(student, teacher, kind, reduction="none", **options)


@few
@given(row_pairs(), st.sampled_from(NON_NEGATIVE))
def test_never_negative(kernel_backend, pair, kind):
    student, teacher = (t.to(kernel_backend.device) for t in pair)
    assert bool((call(student, teacher, kind) >= 0).all())


@few
@given(row_pairs(), st.sampled_from(PAIRED), st.floats(-50, 50))
def test_shifting_a_row_changes_nothing(kernel_backend, pair, kind, shift):
    # Multiples of 1/8 keep the shifted logits exact enough: |z| < 2^7, spacing 2^-16.
    shift = round(shift * 8) / 8
    student, teacher = (t.to(kernel_backend.device).double() for t in pair)
    student, teacher = (torch.round(t * 256) / 256 for t in (student, teacher))
    plain = call(student.float(), teacher.float(), kind)
    moved = call((student + shift).float(), (teacher - shift).float(), kind)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=tolerances.floor(kind, torch.float32))


@few
@given(row_pairs(), st.sampled_from(PAIRED), st.integers(0, 2**31))
def test_order_of_the_vocabulary_does_not_matter(kernel_backend, pair, kind, seed):
    student, teacher = pair
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))
    student, teacher = student.to(kernel_backend.device), teacher.to(kernel_backend.device)
    torch.testing.assert_close(
        call(student[:, order], teacher[:, order], kind),
        call(student, teacher, kind),
        rtol=1e-4,
        atol=tolerances.floor(kind, torch.float32),
    )


@few
@given(row_pairs(), st.sampled_from(SYMMETRIC))
def test_symmetric_kinds_are_symmetric(kernel_backend, pair, kind):
    student, teacher = (t.to(kernel_backend.device) for t in pair)
    torch.testing.assert_close(
        call(student, teacher, kind),
        call(teacher, student, kind),
        rtol=1e-4,
        atol=tolerances.floor(kind, torch.float32),
    )


@few
@given(row_pairs(), st.floats(0.01, 0.99))
def test_jensen_shannon_swaps_with_beta(kernel_backend, pair, beta):
    student, teacher = (t.to(kernel_backend.device) for t in pair)
    torch.testing.assert_close(
        call(student, teacher, "jensen_shannon", beta=beta),
        call(teacher, student, "jensen_shannon", beta=1 - beta),
        rtol=5e-5,
        atol=1e-12,
    )


@few
@given(row_pairs())
def test_bounds_between_kinds(kernel_backend, pair):
    student, teacher = (t.to(kernel_backend.device) for t in pair)
    tv = call(student, teacher, "total_variation")
    h2 = call(student, teacher, "squared_hellinger")
    kl = call(student, teacher, "forward_kl")
    slack = 1e-5
    assert bool((tv <= 1 + slack).all()) and bool((h2 <= tv * (1 + slack) + 1e-12).all())
    assert bool((tv * tv <= 2 * h2 * (1 + slack) + 1e-12).all())  # TV <= sqrt(2) H
    assert bool((2 * tv * tv <= kl * (1 + slack) + 1e-12).all())  # Pinsker
    js = call(student, teacher, "jensen_shannon")
    assert bool((js <= 0.6931472 * (1 + slack)).all())


@few
@given(row_pairs(), st.sampled_from(PAIRED))
def test_gradient_of_a_row_sums_to_zero(kernel_backend, pair, kind):
    student, teacher = (t.to(kernel_backend.device) for t in pair)
    z = student.clone().requires_grad_()
    call(z, teacher, kind).sum().backward()
    size = z.grad.abs().sum(-1) + 1e-6
    assert bool((z.grad.sum(-1).abs() <= 2e-5 * size + 1e-6).all())


@few
@given(row_pairs())
def test_limits_between_kinds(kernel_backend, pair):
    student, teacher = (t.to(kernel_backend.device) for t in pair)
    forward, reverse = call(student, teacher, "forward_kl"), call(student, teacher, "reverse_kl")
    for kind, options, expected in (
        ("alpha", {"alpha": 1.0}, forward),
        ("alpha", {"alpha": 0.0}, reverse),
        ("renyi", {"alpha": 1.0}, forward),
        ("alpha_beta", {"alpha": 1.0, "beta": 0.0}, forward),
        ("alpha_beta", {"alpha": 0.0, "beta": 1.0}, reverse),
        ("skew_forward_kl", {"alpha": 0.0}, forward),
        ("skew_reverse_kl", {"alpha": 0.0}, reverse),
        ("jensen_shannon", {"beta": 0.0}, forward),
        ("jensen_shannon", {"beta": 1.0}, reverse),
    ):
        got = call(student, teacher, kind, **options)
        assert torch.equal(got, expected), kind
    # The same limits reached through tensors take the general path.
    ones = torch.ones(student.shape[0], device=student.device)
    for kind, options, expected in (
        ("alpha", {"alpha": ones}, forward),
        ("alpha", {"alpha": 0 * ones}, reverse),
        ("jensen_shannon", {"beta": 0 * ones}, forward),
        ("jensen_shannon", {"beta": ones}, reverse),
        ("skew_forward_kl", {"alpha": 0 * ones}, forward),
    ):
        got = call(student, teacher, kind, **options)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-12)


@few
@given(row_pairs(), st.floats(0.3, 4.0))
def test_temperature_divides_the_logits(kernel_backend, pair, tau):
    student, teacher = (t.to(kernel_backend.device) for t in pair)
    tau = round(tau * 4) / 4 or 0.25
    got = call(student, teacher, "forward_kl", temperature=tau)
    expected = call(
        (student.double() / tau).float(), (teacher.double() / tau).float(), "forward_kl"
    )
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-9)
