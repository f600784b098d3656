"""Softmax relations streamed tile by tile in Triton (in its interpreter where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from relation_cases import assert_same, gradients, tokens

import kdkernels as kd
from kdkernels.backends import registry

KINDS = ("softmax_kl", "softmax_cross_entropy", "softmax_reverse_kl", "softmax_mse")


@pytest.fixture(autouse=True)
def _triton():
    report = next(
        r for r in kd.backends() if (r.backend, r.family) == ("triton", "softmax_relation")
    )
    if not report.available:
        pytest.skip(report.why_not)
    with kd.use_backend("triton"):
        yield


def on_device(*tensors):
    device = "cpu" if "cpu" in registry.load("triton").READS else "cuda"
    moved = tuple(x.to(device) for x in tensors)
    return moved[0] if len(moved) == 1 else moved


def test_self_relation_over_several_tiles():
    student, teacher = on_device(tokens(1, 70, 5), tokens(1, 70, 17))
    assert_same(student, teacher, "softmax_kl", teacher_grad=True)


# Every kind, every kind of selection: the interpreter is slow, so one with one.
@pytest.mark.parametrize("kind, selection", list(zip(KINDS, ("tokens", "pairs", "blocks", "off"))))
def test_pairs_masks_scales_labels_and_bounds(kind, selection):
    student = on_device(tokens(1, 2, 13, 6), tokens(1, 2, 13, 6))
    teacher = on_device(tokens(1, 2, 13, 4), tokens(1, 2, 13, 4))
    scales = on_device(torch.tensor(0.7), torch.tensor(1.2))
    options = {
        "tokens": {"mask": on_device(torch.rand(1, 13) < 0.7), "causal": True},
        "pairs": {"mask": on_device(torch.rand(13, 13) < 0.5), "clamp": -0.1},
        "blocks": {"block": on_device(torch.arange(13) // 4), "block_mode": "different"},
        "off": {
            "exclude_diagonal": True,
            "reduction": "none",
            "weight": on_device(torch.rand(1, 2, 13)),
        },
    }[selection]
    assert_same(
        student,
        teacher,
        kind,
        student_scale=scales[0],
        teacher_scale=scales[1],
        teacher_grad=True,
        gradient=1e-4,
        label_mix=0.3,
        **options,
    )


def test_more_keys_than_queries_and_wide_heads():
    student = on_device(tokens(1, 9, 70), tokens(1, 40, 70))
    teacher = on_device(tokens(1, 9, 20), tokens(1, 40, 20))
    assert_same(student, teacher, "softmax_kl")


def test_small_gaps_and_equal_sides():
    teacher = on_device(tokens(1, 40, 8))
    student = teacher + 0.01 * on_device(tokens(1, 40, 8))
    assert_same(student, teacher, "softmax_kl", value=2e-4, gradient=2e-3)
    assert float(kd.relation(teacher, teacher.clone(), reduction="none").abs().max()) == 0.0


def test_contrastive_runs_on_it():
    query, key = on_device(tokens(20, 6), tokens(20, 6))
    x = query.clone().requires_grad_()
    loss = kd.contrastive(x, key, scale=2.0)
    (found,) = torch.autograd.grad(loss, x)
    y = query.double().requires_grad_()
    labels = torch.arange(20, device=y.device)
    expected = torch.nn.functional.cross_entropy(2 * y @ key.double().T, labels)
    (wanted,) = torch.autograd.grad(expected, y)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_empty_rows_and_what_it_does_not_serve():
    student, teacher = on_device(tokens(1, 6, 4), tokens(1, 6, 4))
    mask = on_device(torch.zeros(6, 6, dtype=torch.bool))
    values, (gradient,) = gradients(student, teacher, mask=mask, reduction="none")
    assert float(values.abs().max()) == 0.0 and float(gradient.abs().max()) == 0.0
    with pytest.raises(RuntimeError, match="relation"):
        kd.relation(student, teacher, "mse")
    with pytest.raises(TypeError, match="float64"):
        kd.relation(student.double(), teacher.double())
    with pytest.raises(ValueError, match="256"):
        kd.relation(*on_device(tokens(1, 6, 300), tokens(1, 6, 300)))
