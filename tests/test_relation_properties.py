"""Laws that relations and feature losses obey on any tokens, on every backend with kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relation_cases import ELEMENT_KINDS, ROW_KINDS, options_of

import kdkernels as kd

FAMILY = "relation"
KINDS = tuple(k for k in (*ROW_KINDS, *ELEMENT_KINDS, "distance", "angle", "cka"))
few = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SHAPES = st.tuples(st.integers(2, 19), st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 2**31)


def sides(shape, seed, device):
    """(student (N, d), teacher (N, e)), a third of the entries large."""
    tokens, width, other = shape
    generator = torch.Generator().manual_seed(seed)

    def make(d):
        x = torch.randn(tokens, d, generator=generator)
        return torch.where(torch.rand(x.shape, generator=generator) < 0.3, 3 * x, x).to(device)

    return make(width), make(other)


def value(student, teacher, kind, **options):
    return kd.relation(student, teacher, kind, **{**options_of(kind), **options}).double()


@pytest.mark.parametrize("kind", KINDS)
@few
@given(shape=SHAPES, seed=SEEDS)
def test_order_and_rotations_of_tokens_change_nothing(kernel_backend, kind, shape, seed):
    s, t = sides(shape, seed, kernel_backend.device)
    expected = value(s, t, kind)
    assert bool(expected >= 0) or kind == "softmax_cross_entropy"
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))[0]
    turned = (s.double() @ rotation.to(s.device)).float()
    # Relations are made of inner products alone; a KL of nearly one-hot rows magnifies a rounded
    # score by its size, at most 50 here.
    for other in (value(s[order], t[order], kind), value(turned, t, kind)):
        torch.testing.assert_close(other, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "softmax_cross_entropy"])
@few
@given(shape=SHAPES, seed=SEEDS)
def test_equal_sides_cost_nothing(kernel_backend, kind, shape, seed):
    x = sides(shape, seed, kernel_backend.device)[0]
    leaf = x.clone().requires_grad_()
    loss = value(leaf, x.clone(), kind)
    (gradient,) = torch.autograd.grad(loss, leaf)
    # Exact closed forms are differences of large terms.
    assert abs(float(loss.detach())) <= (1e-6 if kind in ("cka", "gram_row_l2", "mse") else 0.0)
    if kind not in ("l1", "margin_l1"):
        assert float(gradient.abs().max()) <= 1e-4


@few
@given(shape=SHAPES, seed=SEEDS, split=st.integers(0, 3))
def test_rows_that_a_mask_leaves_out_are_cut_out(kernel_backend, shape, seed, split):
    s, t = sides(shape, seed, kernel_backend.device)
    mask = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < 0.3 * split
    mask = mask.to(s.device)
    for kind in ("softmax_kl", "gram_row_l1", "huber", "distance"):
        if not bool(mask.any()):
            assert float(value(s, t, kind, mask=mask)) == 0.0
            continue
        expected = value(s[mask], t[mask], kind)
        torch.testing.assert_close(value(s, t, kind, mask=mask), expected, rtol=1e-4, atol=1e-6)


@few
@given(shape=SHAPES, seed=SEEDS)
def test_softmax_relations_join(kernel_backend, shape, seed):
    """KL = cross entropy - entropy of the teacher; reversed sides swap KL and reverse KL."""
    s, t = sides(shape, seed, kernel_backend.device)
    kl = value(s, t, "softmax_kl")
    entropy = value(t, t, "softmax_cross_entropy")
    torch.testing.assert_close(
        kl, value(s, t, "softmax_cross_entropy") - entropy, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(kl, value(t, s, "softmax_reverse_kl"), rtol=1e-4, atol=1e-6)


@few
@given(shape=SHAPES, seed=SEEDS, factor=st.floats(0.1, 10.0))
def test_feature_cosines_ignore_length(kernel_backend, shape, seed, factor):
    s, t = sides((shape[0], shape[1], shape[1]), seed, kernel_backend.device)
    for kind in ("cosine", "normalized_mse", "log_sigmoid_cosine"):
        expected = kd.feature(s, t, kind)
        torch.testing.assert_close(kd.feature(factor * s, t, kind), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kd.feature(t, s, kind), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        kd.feature(s, t, "normalized_mse"), 2 * kd.feature(s, t, "cosine"), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        kd.feature(factor * s, t, "mse", normalize="l2"),
        kd.feature(s, t, "normalized_mse") / shape[1],
        rtol=1e-4,
        atol=1e-6,
    )
