"""Rows and shapes that break losses: -inf, NaN, nothing selected, V = 1, strides, bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

import kdkernels as kd
from kdkernels.functional.kinds import KINDS
from kdkernels.testing import tolerances

INF = float("inf")
NAN = float("nan")
PAIRED = [k for k in KINDS if k != "entropy"]
FINITE_EVERYWHERE = (
    "jensen_shannon",
    "skew_forward_kl",
    "total_variation",
    "hellinger",
    "squared_hellinger",
    "triangular",
    "alpha",
)


def rows(values, backend, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=backend.device)


def grad(student, teacher, *args, **options):
    z = student.clone().requires_grad_()
    loss = kd.divergence(z, teacher, *args, **options)
    loss.sum().backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("kind", PAIRED)
def test_columns_masked_in_both_rows_are_as_if_absent(backend, kind):
    student, teacher = torch.randn(2, 4, 40, device=backend.device).unbind()
    expected, expected_gradient = grad(student[:, :31], teacher[:, :31], kind, reduction="none")
    student, teacher = student.clone(), teacher.clone()
    student[:, 31:] = -INF
    teacher[:, 31:] = -INF
    loss, gradient = grad(student, teacher, kind, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(gradient[:, :31], expected_gradient, rtol=1e-4, atol=1e-6)
    assert float(gradient[:, 31:].abs().max()) == 0.0


def test_student_impossible_where_teacher_is_not(backend):
    student, teacher = torch.randn(2, 3, 9, device=backend.device).unbind()
    student = student.clone()
    student[1, 4] = -INF
    loss, gradient = grad(student, teacher, "forward_kl", temperature=2.0, reduction="none")
    assert loss[1] == INF and bool(loss[[0, 2]].isfinite().all())
    p = F.softmax(teacher.double() / 2, -1)
    q = F.softmax(student.double() / 2, -1)
    expected = (q - p) / 2
    expected[1, 4] = 0.0
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)


def test_teacher_impossible_where_student_is_not(backend):
    student, teacher = torch.randn(2, 3, 9, device=backend.device).unbind()
    teacher = teacher.clone()
    teacher[1, 4] = -INF
    loss, gradient = grad(student, teacher, "reverse_kl", reduction="none")
    assert loss[1] == INF and bool(loss[[0, 2]].isfinite().all())
    assert float(gradient[1].abs().max()) == 0.0 and bool(gradient.isfinite().all())
    loss, gradient = grad(student, teacher, "forward_kl", reduction="none")
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", FINITE_EVERYWHERE)
def test_bounded_kinds_stay_finite_on_disjoint_support(backend, kind):
    student = rows([[0.0, 1.0, -INF, -INF]], backend)
    teacher = rows([[-INF, -INF, 0.5, 0.0]], backend)
    with kd.use_backend("torch"):
        expected, _ = grad(student.double(), teacher.double(), kind, reduction="none")
    loss, gradient = grad(student, teacher, kind, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", PAIRED)
def test_dead_teacher_row_is_zero(backend, kind):
    student, teacher = torch.randn(2, 3, 9, device=backend.device).unbind()
    teacher = teacher.clone()
    teacher[1] = -INF
    loss, gradient = grad(student, teacher, kind, reduction="none")
    assert loss[1] == 0.0 and float(gradient[1].abs().max()) == 0.0
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    "kind", ["forward_kl", "reverse_kl", "jensen_shannon", "hellinger", "alpha_beta"]
)
def test_nan_stays_in_its_row(backend, bad, side, kind):
    pair = dict(zip(("student", "teacher"), torch.randn(2, 3, 70, device=backend.device)))
    clean, clean_gradient = grad(**pair, kind=kind, reduction="none")
    pair[side] = pair[side].clone()
    pair[side][1, 33] = bad
    loss, gradient = grad(**pair, kind=kind, reduction="none")
    assert loss[1].isnan() and bool(gradient[1].isnan().all())
    torch.testing.assert_close(loss[[0, 2]], clean[[0, 2]])
    torch.testing.assert_close(gradient[[0, 2]], clean_gradient[[0, 2]])


@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon", "total_variation", "alpha"])
def test_unselected_rows_are_never_read(backend, kind):
    student, teacher = torch.randn(2, 5, 33, device=backend.device).unbind()
    labels = torch.tensor([1, -100, 2, 3, 4], device=backend.device)
    mask = torch.tensor([True, True, True, False, True], device=backend.device)
    kept = torch.tensor([0, 2, 4], device=backend.device)
    expected, expected_gradient = grad(student[kept], teacher[kept], kind)
    student, teacher = student.clone(), teacher.clone()
    student[1], teacher[1] = NAN, INF
    student[3], teacher[3] = INF, NAN
    loss, gradient = grad(student, teacher, kind, labels=labels, mask=mask)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[kept], expected_gradient)
    assert torch.equal(gradient[[1, 3]].cpu(), torch.zeros(2, 33))


def test_weight_zero_contributes_nothing_and_counts(backend):
    student, teacher = torch.randn(2, 4, 9, device=backend.device).unbind()
    student = student.clone()
    student[2, 0] = -INF  # an infinite row, 0 * inf = 0
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0], device=backend.device)
    loss, gradient = grad(student, teacher, weight=weight)
    kept = [0, 1, 3]
    expected, expected_gradient = grad(student[kept], teacher[kept], reduction="sum")
    torch.testing.assert_close(loss, expected / 4)
    torch.testing.assert_close(gradient[kept], expected_gradient / 4)
    assert float(gradient[2].abs().max()) == 0.0


@pytest.mark.parametrize("kind", PAIRED)
def test_one_column(backend, kind):
    student, teacher = torch.randn(2, 3, 1, device=backend.device).unbind()
    loss, gradient = grad(student, teacher, kind)
    assert abs(loss.item()) <= tolerances.floor(kind, torch.float32)
    assert float(gradient.abs().max()) <= 1e-6


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean", "sequence_mean"])
def test_no_rows(backend, reduction):
    student = torch.randn(0, 7, 5, device=backend.device)
    loss, gradient = grad(student, student, reduction=reduction)
    assert gradient.shape == (0, 7, 5)
    assert loss.shape == ((0, 7) if reduction == "none" else ())
    assert reduction == "none" or loss.item() == 0.0


def test_one_row_without_leading_dimensions(backend):
    student, teacher = torch.randn(2, 50, device=backend.device).unbind()
    loss, gradient = grad(student, teacher, reduction="none")
    expected, expected_gradient = grad(student[None], teacher[None])
    assert loss.shape == () and gradient.shape == (50,)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient[0])


def strided_views(device):
    base = torch.randn(6, 40, 50, device=device)
    yield "every second row", base[::2, :4]
    yield "columns of a wider head", base[:3, :4, 5:38]
    yield "strided columns", base[:3, :4, ::2]
    yield "transposed", base[:3, :20, :4].transpose(1, 2)
    yield "expanded rows", base[:1, :1].expand(3, 4, 50)
    yield "misaligned storage", base.flatten()[3 : 3 + 3 * 4 * 35].view(3, 4, 35)
    yield "zero-stride columns", base[:3, :4, :1].expand(3, 4, 30)


def test_strides_and_offsets(backend):
    for name, student in strided_views(backend.device):
        teacher = torch.randn(student.shape, device=backend.device)
        z = student.detach().requires_grad_()
        loss = kd.divergence(z, teacher, temperature=1.5)
        (gradient,) = torch.autograd.grad(loss, z)
        expected, expected_gradient = grad(student.contiguous(), teacher, temperature=1.5)
        torch.testing.assert_close(loss, expected, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(gradient, expected_gradient, msg=lambda m, n=name: f"{n}: {m}")
        swapped = kd.divergence(teacher, student, temperature=1.5)
        expected = kd.divergence(teacher, student.contiguous(), temperature=1.5)
        torch.testing.assert_close(swapped, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_rows_further_apart_than_32_bits(kernel_backend):
    # Two rows of a matrix whose row stride is 2^31 + 3 elements: only the touched pages exist.
    if kernel_backend.device != "cpu":
        pytest.skip("virtual memory without backing is a CPU matter")
    stride = 2**31 + 3
    try:
        storage = torch.empty(stride + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    student = storage.as_strided((2, 64), (stride, 1))
    values = torch.randn(2, 64, dtype=torch.bfloat16)
    student.copy_(values)
    teacher = torch.randn(2, 64)
    loss, gradient = grad_of_view(student, teacher)
    expected, expected_gradient = grad(values, teacher)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def grad_of_view(student, teacher):
    z = student.detach().requires_grad_()
    loss = kd.divergence(z, teacher)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def test_huge_logits(backend):
    student = rows([[1e4, 0.0, -1e4], [1e6, -1e6, 0.0]], backend)
    teacher = rows([[0.0, 1e4, -1e4], [0.0, 1e6, -1e6]], backend)
    loss, gradient = grad(student, teacher, "jensen_shannon", reduction="none")
    torch.testing.assert_close(loss.cpu(), torch.full((2,), 0.6931472), rtol=1e-6, atol=0)
    assert bool(gradient.isfinite().all())


def test_underflow_in_both_models_is_no_nan(backend):
    student = torch.full((1, 64), -200.0, device=backend.device)
    student[0, 0] = 0.0
    teacher = student.clone()
    for kind in PAIRED:
        loss, gradient = grad(student, teacher, kind)
        assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


# Bad input. --------------------------------------------------------------------------------------

GOOD = {"student": torch.zeros(2, 3, 5), "teacher": torch.zeros(2, 3, 5)}
BAD_CALLS = [
    ({"student": [1.0]}, TypeError, "student"),
    ({"student": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, "student"),
    ({"student": torch.zeros(2, 3, 5).to(torch.float8_e4m3fn)}, TypeError, "student"),
    ({"student": torch.tensor(1.0)}, ValueError, "student"),
    ({"student": torch.zeros(2, 3, 0)}, ValueError, "student"),
    ({"teacher": torch.zeros(2, 4, 5)}, ValueError, "teacher"),
    ({"teacher": torch.zeros(6, 5)}, ValueError, "teacher"),
    ({"teacher": torch.zeros(2, 3, 6)}, ValueError, "vocab_size"),
    ({"teacher": torch.zeros(2, 3, 5, dtype=torch.float64)}, TypeError, "teacher"),
    ({"teacher": None}, ValueError, "teacher"),
    ({"teacher": torch.zeros(2, 3, 5, device="meta")}, ValueError, "teacher"),
    ({"kind": "entropy"}, ValueError, "teacher"),
    ({"kind": "forward_lk"}, ValueError, "forward_kl"),
    ({"kind": 3}, TypeError, "kind"),
    ({"kind": ()}, TypeError, "kind"),
    ({"kind": (("forward_kl", 0.0),)}, ValueError, "kind"),
    ({"kind": (("forward_kl", "x"),)}, TypeError, "kind"),
    ({"kind": (("alpha", 1.0), ("triangular", 1.0))}, ValueError, "kind"),
    ({"kind": (("hellinger", 1.0), ("alpha", 1.0))}, ValueError, "kind"),
    ({"clip": kd.Clip(token=-1.0)}, ValueError, "clip"),
    ({"clip": kd.Clip(element=0.0)}, ValueError, "clip: element"),
    ({"clip": kd.Clip(quantile=1.0)}, ValueError, "clip: quantile"),
    ({"class_dim": 3}, ValueError, "class_dim"),
    ({"class_dim": 1.0}, TypeError, "class_dim"),
    ({"teacher": []}, ValueError, "teacher"),
    ({"teacher_bias": torch.zeros(4)}, ValueError, "teacher_bias"),
    ({"standardize": True, "inplace": True}, ValueError, "inplace"),
    ({"standardize": True, "labels": torch.zeros(6, dtype=torch.int64)}, ValueError, "labels"),
    ({"standardize": True, "mask": [True]}, TypeError, "mask"),
    ({"beta": 0.5}, ValueError, "beta"),
    ({"kind": "jensen_shannon", "beta": 1.5}, ValueError, "beta"),
    ({"kind": "jensen_shannon", "beta": NAN}, ValueError, "beta"),
    ({"kind": "jensen_shannon", "alpha": 0.5}, ValueError, "alpha"),
    ({"kind": "jensen_shannon", "beta": torch.full((2, 3), 2.0)}, ValueError, "beta"),
    ({"kind": "jensen_shannon", "beta": torch.zeros(2, 3, requires_grad=True)}, ValueError, "beta"),
    ({"kind": "skew_forward_kl", "alpha": -0.1}, ValueError, "alpha"),
    ({"kind": "renyi", "alpha": "x"}, TypeError, "alpha"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": -1}, ValueError, "temperature"),
    ({"temperature": "1"}, TypeError, "temperature"),
    ({"temperature": torch.zeros(2, 3)}, ValueError, "temperature"),
    ({"temperature": torch.ones(3, 2)}, ValueError, "temperature"),
    ({"temperature": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "temperature"),
    ({"teacher_temperature": INF}, ValueError, "teacher_temperature"),
    ({"labels": torch.zeros(6, dtype=torch.int64)}, ValueError, "labels"),
    ({"labels": torch.zeros(2, 3)}, TypeError, "labels"),
    ({"labels": [0]}, TypeError, "labels"),
    ({"label_weight": 1.0}, ValueError, "labels"),
    ({"labels": torch.full((2, 3), 5), "label_weight": 1.0}, ValueError, "labels"),
    ({"labels": torch.full((2, 3), -1), "label_weight": 1.0}, ValueError, "labels"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index"),
    ({"mask": torch.zeros(2, 3)}, TypeError, "mask"),
    ({"mask": torch.zeros(3, 2, dtype=torch.bool)}, ValueError, "mask"),
    ({"weight": torch.ones(2)}, ValueError, "weight"),
    ({"weight": 2.0}, TypeError, "weight"),
    ({"weight": torch.full((2, 3), NAN)}, ValueError, "weight"),
    ({"clip": -1.0}, ValueError, "clip"),
    ({"detach_mixture": True}, ValueError, "detach_mixture"),
    ({"reduction": "average"}, ValueError, "reduction"),
    ({"normalize": "tokens"}, ValueError, "normalize"),
    ({"num_items": 0}, ValueError, "num_items"),
    ({"num_items": torch.ones(2)}, ValueError, "num_items"),
    ({"num_items": torch.tensor(-1.0)}, ValueError, "num_items"),
    ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items"),
    ({"vocab_size": 6}, ValueError, "vocab_size"),
    ({"vocab_size": 2.0}, TypeError, "vocab_size"),
    ({"teacher_vocab_size": 0}, ValueError, "teacher_vocab_size"),
    ({"inplace": True, "reduction": "none"}, ValueError, "inplace"),
]


@pytest.mark.parametrize("change, error, name", BAD_CALLS)
def test_bad_input_names_the_argument(change, error, name):
    options = {**GOOD, **change}
    before = {k: v.clone() for k, v in options.items() if torch.is_tensor(v) and not v.is_meta}
    with pytest.raises(error, match=name):
        kd.divergence(options.pop("student"), options.pop("teacher"), **options)
    for key, tensor in before.items():
        now = {**GOOD, **change}[key]
        assert torch.equal(
            now.nan_to_num(9.0) if now.is_floating_point() and now.itemsize > 1 else now.float(),
            tensor.nan_to_num(9.0)
            if tensor.is_floating_point() and tensor.itemsize > 1
            else tensor.float(),
        )


def test_inplace_refuses_what_must_not_be_overwritten(backend):
    teacher = torch.randn(3, 8, device=backend.device)
    leaf = torch.randn(3, 8, device=backend.device, requires_grad=True)
    kept = leaf.detach().clone()
    with pytest.raises(ValueError, match="inplace.*leaf"):
        kd.divergence(leaf, teacher, inplace=True)
    row = (torch.randn(1, 8, device=backend.device, requires_grad=True) * 1).expand(3, 8)
    with pytest.raises(ValueError, match="inplace.*expanded"):
        kd.divergence(row, teacher, inplace=True)
    wide = torch.randn(30, device=backend.device, requires_grad=True) * 1
    with pytest.raises(ValueError, match="inplace.*overlap"):
        kd.divergence(wide.as_strided((3, 8), (4, 1)), teacher, inplace=True)
    middle = leaf * 1
    with pytest.raises(ValueError, match="inplace.*same memory"):
        kd.divergence(middle, middle.detach(), inplace=True)
    assert torch.equal(leaf.detach(), kept)


def test_wrapper_subclasses_are_refused_and_parameters_are_not():
    from torch.nested import nested_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ragged = nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged)
    with pytest.raises(TypeError, match="student"):
        kd.divergence(ragged, ragged)
    parameter = torch.nn.Parameter(torch.randn(3, 5))
    kd.divergence(parameter, torch.randn(3, 5)).backward()
    assert parameter.grad is not None


def test_debug_finds_nan():
    student = torch.randn(3, 5)
    student[0, 0] = NAN
    kd.divergence(student, torch.randn(3, 5))
    with kd.debug(), pytest.raises(ValueError, match="student"):
        kd.divergence(student, torch.randn(3, 5))
