"""Softmax relations of half tokens in tiles on tensor cores (simt: on the host)."""

from __future__ import annotations

import pytest
import torch
from relation_cases import assert_same, gradients, tokens

import kdkernels as kd
from kdkernels.backends import registry
from kdkernels.ops import relation_stream

FAMILY = "softmax_relation"
KINDS = ("softmax_kl", "softmax_cross_entropy", "softmax_reverse_kl", "softmax_mse")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How many relations went through the tile kernel."""
    seen = []
    tiles = relation_stream._tiles
    monkeypatch.setattr(
        relation_stream, "_tiles", lambda *a: (seen.append(a[0].__name__), tiles(*a))[1]
    )
    return seen


def sides(backend, *shapes, dtype=torch.bfloat16):
    return tuple(tokens(*shape, dtype=dtype, device=backend.device) for shape in shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_self_relation_over_several_tiles(kernel_backend, kind, calls):
    # 70 tokens: two blocks of rows, three tiles of columns, both ragged; 40 columns: two slices, 16
    # bytes at a time; 17: one by one.
    for dtype in HALVES:
        student, teacher = sides(kernel_backend, (2, 70, 40), (2, 70, 17), dtype=dtype)
        assert_same(student, teacher, kind, teacher_grad=True)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_masks_scales_labels_and_bounds(kernel_backend, kind, calls):
    student = sides(kernel_backend, (1, 2, 13, 6), (1, 2, 13, 6))
    teacher = sides(kernel_backend, (1, 2, 13, 4), (1, 2, 13, 4))
    device = kernel_backend.device
    common = {
        "student_scale": torch.tensor(0.7, device=device),
        "teacher_scale": torch.tensor(1.2, device=device),
        "teacher_grad": True,
        "gradient": 1e-4,
        "label_mix": 0.3,
    }
    for options in (
        {"mask": (torch.rand(1, 13) < 0.7).to(device), "causal": True},
        {"mask": (torch.rand(13, 13) < 0.5).to(device), "clamp": -0.1},
        {"block": torch.arange(13, device=device) // 4, "block_mode": "different"},
        {
            "exclude_diagonal": True,
            "reduction": "none",
            "weight": torch.rand(1, 2, 13, device=device),
        },
    ):
        assert_same(student, teacher, kind, **options, **common)
    assert len(calls) == 5  # reduction "none" walks again for its upstream


def test_shapes(kernel_backend, calls):
    """More keys than queries, widths beyond one slice of a gradient, one token."""
    for rows, columns, width, other in ((9, 40, 140, 20), (66, 3, 8, 256), (1, 1, 1, 1)):
        student = sides(kernel_backend, (1, rows, width), (1, columns, width))
        teacher = sides(kernel_backend, (1, rows, other), (1, columns, other))
        assert_same(student, teacher, "softmax_kl", teacher_grad=True, value=2e-5)
    assert len(calls) == 3


def test_scale_of_zero(kernel_backend, calls):
    """A map of zeros still has a slope by its scale."""
    student, teacher = sides(kernel_backend, (1, 12, 8), (1, 12, 8))
    zero = torch.tensor(0.0, device=kernel_backend.device)
    assert_same(student, teacher, "softmax_kl", student_scale=zero, gradient=1e-4)
    assert calls


def test_what_goes_elsewhere(kernel_backend, calls):
    """Wide tokens, cosines and float32 take the chunks."""
    for width, dtype, options in (
        (264, torch.bfloat16, {"student_scale": 0.01, "teacher_scale": 0.01}),
        (8, torch.bfloat16, {"similarity": "cosine"}),
        (8, torch.float32, {}),
    ):
        student, teacher = sides(kernel_backend, (9, width), (9, width), dtype=dtype)
        assert_same(student, teacher, "softmax_kl", **options)
    assert not calls


def test_small_gaps_equal_sides_and_empty_rows(kernel_backend):
    (teacher,) = sides(kernel_backend, (1, 40, 8), dtype=torch.float16)
    student = teacher + 2.0**-9 * sides(kernel_backend, (1, 40, 8), dtype=torch.float16)[0]
    # A score of size 3 is rounded by 2^-23 of itself, twice, against a gap of 2^-7.
    assert_same(student, teacher, "softmax_kl", value=2e-4, gradient=2e-3)
    assert float(kd.relation(teacher, teacher.clone(), reduction="none").abs().max()) == 0.0
    mask = torch.zeros(40, 40, dtype=torch.bool, device=teacher.device)
    mask[0, 1] = True
    values, (gradient,) = gradients(student, teacher, mask=mask, reduction="none")
    assert float(values[:, 1:].abs().max()) == 0.0
    assert bool(gradient.isfinite().all()) and float(gradient[:, 2:].abs().max()) == 0.0


def test_contrastive_of_half_rows(kernel_backend, calls):
    query, key = sides(kernel_backend, (20, 6), (20, 6), dtype=torch.float16)
    x = query.clone().requires_grad_()
    loss = kd.contrastive(x, key, scale=2.0)
    (found,) = torch.autograd.grad(loss, x)
    y = query.double().requires_grad_()
    labels = torch.arange(20, device=y.device)
    expected = torch.nn.functional.cross_entropy(2 * y @ key.double().T, labels)
    (wanted,) = torch.autograd.grad(expected, y)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert float((found.double() - wanted).abs().max()) <= 2.0**-10 * float(wanted.abs().max())
    assert calls


def test_schedule_orders():
    if not any(r.available for r in kd.backends() if (r.backend, r.family) == ("simt", FAMILY)):
        pytest.skip("simt is not built")
    student, teacher = (tokens(1, 70, 40, dtype=torch.bfloat16) for _ in range(2))
    results = []
    for order in ("ascending", "descending", "shuffle"):
        registry.load("simt").set_order(order, 7)
        with kd.use_backend("simt"):
            results.append(gradients(student, teacher, teacher_grad=True))
    registry.load("simt").set_order("ascending", 0)
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        for a, b in zip(found, results[0][1], strict=True):
            assert torch.equal(a, b)
