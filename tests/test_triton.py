"""The Triton backend against the float64 reference: on a GPU, or in Triton's interpreter on CPU
tensors (TRITON_INTERPRET=1 before triton is imported, as conftest.py does without a GPU)."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kdkernels.backends import registry
from kdkernels.backends import spec as S
from kdkernels.backends import torch as reference
from kdkernels.backends import triton as backend
from kdkernels.backends.spec import DivergenceSpec
from kdkernels.backends.triton import divergence as kernels

if backend.why_not():
    pytest.skip(backend.why_not(), allow_module_level=True)

DEVICE = backend.READS[-1]
INF, NAN = math.inf, math.nan

KINDS = {
    "forward_kl": {"forward_kl": 1.0},
    "reverse_kl": {"reverse_kl": 1.0},
    "cross_entropy": {"cross_entropy": 1.0},
    "jeffreys": {"forward_kl": 1.0, "reverse_kl": 1.0},
    "linear": {"forward_kl": 0.7, "reverse_kl": 0.2, "cross_entropy": 0.4, "entropy": 0.1},
    "one_pass_pair": {"forward_kl": 0.5, "cross_entropy": 0.25},
    "jensen_shannon": {"kind": S.JENSEN_SHANNON, "other": 1.0, "first": 0.3},
    "jensen_shannon_0": {"kind": S.JENSEN_SHANNON, "other": 1.0, "first": 0.0},
    "jensen_shannon_1": {"kind": S.JENSEN_SHANNON, "other": 1.0, "first": 1.0},
    "skew_forward": {"kind": S.SKEW_FORWARD, "other": 0.8, "first": 0.1},
    "skew_reverse": {"kind": S.SKEW_REVERSE, "other": 1.0, "first": 0.1},
    "skew_detached": {
        "kind": S.SKEW_REVERSE,
        "other": 1.0,
        "first": 0.3,
        "detach_mixture": 1.0,
    },
    "total_variation": {"kind": S.TOTAL_VARIATION, "other": 1.0},
    "squared_hellinger": {"kind": S.SQUARED_HELLINGER, "other": 1.0},
    "hellinger": {"kind": S.SQUARED_HELLINGER, "other": 1.0, "outer": S.SQRT},
    "bhattacharyya": {"kind": S.SQUARED_HELLINGER, "other": 1.0, "outer": S.BHATTACHARYYA},
    "triangular": {"kind": S.TRIANGULAR, "other": 1.0},
    "chi_squared": {"kind": S.CHI_SQUARED, "other": 1.0},
    "alpha": {"kind": S.ALPHA, "other": 1.0, "first": 0.5},
    "alpha_0": {"kind": S.ALPHA, "other": 1.0, "first": 0.0},
    "alpha_1": {"kind": S.ALPHA, "other": 1.0, "first": 1.0},
    "alpha_2": {"kind": S.ALPHA, "other": 1.0, "first": 2.0},
    "renyi": {"kind": S.ALPHA, "other": 1.0, "first": 0.7, "outer": S.RENYI},
    "alpha_beta": {"kind": S.ALPHA_BETA, "other": 1.0, "first": 0.4, "second": 0.9},
    "alpha_beta_opposed": {"kind": S.ALPHA_BETA, "other": 1.0, "first": 0.5, "second": -0.5},
    "alpha_beta_origin": {"kind": S.ALPHA_BETA, "other": 1.0, "first": 0.0, "second": 0.0},
    "mixed_with_linear": {
        "kind": S.JENSEN_SHANNON,
        "other": 0.5,
        "first": 0.5,
        "forward_kl": 0.2,
        "reverse_kl": 0.3,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Result(NamedTuple):
    value: Tensor
    grad_student: Tensor
    grad_teacher: Tensor | None
    grad_temperature: Tensor
    stats: Tensor


def rows(
    *, count: int = 3, width: int = 75, seed: int = 0, std: float = 2.0, device: str = DEVICE
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, width, generator=generator) * std
    a = torch.randn(count, width, generator=generator) * std
    return z.to(device), a.to(device)


def call(
    module, student, teacher, numbers, *, gradients=True, upstream=None, inplace=False, **per_row
) -> Result:
    """One forward (and, with `upstream`, a backward instead of the forward's gradients).

    Outputs start as NaN, so whatever is not written shows.
    """
    spec = DivergenceSpec(**{"reduction": S.NONE, **numbers})
    names = (
        "labels",
        "mask",
        "weight",
        "student_temperature",
        "teacher_temperature",
        "first",
        "second",
        "num_items",
    )
    optional = {name: per_row.get(name) for name in names}
    assert not set(per_row) - set(names)
    dtype = torch.float32
    grad_dtypes = [student.dtype, None if teacher is None else teacher.dtype]
    if module is reference:
        dtype, grad_dtypes = torch.float64, [torch.float64, torch.float64]
        optional = {
            n: t.double() if t is not None and t.is_floating_point() else t
            for n, t in optional.items()
        }
    count, device = student.shape[0], student.device
    value = torch.full(
        (count,) if spec.reduction == S.NONE else (), NAN, dtype=dtype, device=device
    )
    stats = torch.full((count, S.STATS), NAN, dtype=dtype, device=device)
    grad_student = torch.full(student.shape, NAN, dtype=grad_dtypes[0], device=device)
    if inplace:
        grad_student = student
    grad_teacher = None
    if teacher is not None:
        grad_teacher = torch.full(teacher.shape, NAN, dtype=grad_dtypes[1], device=device)
    grad_tau = torch.full((count, 2), NAN, dtype=dtype, device=device)
    outputs = (grad_student, grad_teacher, grad_tau)
    early = outputs if gradients and upstream is None else (None, None, None)
    module.divergence_fwd(student, teacher, *optional.values(), value, stats, *early, spec)
    if upstream is not None:
        kept = [v for n, v in optional.items() if n not in ("weight", "num_items")]
        module.divergence_bwd(student, teacher, *kept, stats, upstream, *outputs, spec)
    return Result(value, *outputs, stats)


def both(student, teacher, numbers, **options) -> tuple[Result, Result]:
    return (
        call(backend, student, teacher, numbers, **options),
        call(reference, student, teacher, numbers, **options),
    )


def assert_near(
    mine: Tensor, exact: Tensor, relative: float, what: str = "", floor: float = 1e-12
) -> None:
    """Within `relative` of the largest finite exact number (of each row, for matrices) or `floor`;
    infinities and NaN in the same places."""
    mine, exact = mine.double(), exact.double()
    assert torch.equal(mine.isnan(), exact.isnan()), f"{what}: NaN elsewhere\n{mine}\n{exact}"
    odd = exact.isinf() | mine.isinf()
    assert torch.equal(mine[odd], exact[odd]), f"{what}: inf elsewhere\n{mine}\n{exact}"
    finite = torch.where(exact.isfinite(), exact, 0.0)
    scale = finite.abs()
    if exact.dim() == 2:
        scale = scale.amax(-1, keepdim=True).expand_as(exact)
    error = torch.where(exact.isfinite(), (mine - exact).abs(), 0.0)
    excess = error - relative * scale - floor
    worst = int(excess.argmax()) if excess.numel() else 0
    assert (excess <= 0).all(), (
        f"{what}[{worst}]: off by {error.flatten()[worst]:.1e}, scale {scale.flatten()[worst]:.1e}"
    )


def assert_same(mine: Result, exact: Result, *, value=5e-6, gradient=2e-5, floor=1e-12) -> None:
    assert_near(mine.value, exact.value, value, "value")
    assert_near(mine.stats[:, S.DIVERGENCE], exact.stats[:, S.DIVERGENCE], value, "D")
    for column in (S.VALUE, S.FACTOR, S.UNIT):
        assert_near(mine.stats[:, column], exact.stats[:, column], value, f"stats[{column}]")
    for name in ("grad_student", "grad_teacher", "grad_temperature"):
        if getattr(exact, name) is not None:
            # A temperature's gradient is a sum in which the logits' gradients cancel.
            bound = 5 * gradient if name == "grad_temperature" else gradient
            assert_near(getattr(mine, name), getattr(exact, name), bound, name, floor)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of columns a row, the last one partly filled."""
    monkeypatch.setattr(kernels, "_BLOCK", 32)


# Values and gradients. ----------------------------------------------------------------------------


@every_kind
def test_kind(kind, small_blocks):
    z, a = rows()
    numbers = {**KINDS[kind], "student_temperature": 2.0, "teacher_temperature": 1.5}
    assert_same(*both(z, a, numbers))


def test_entropy_without_teacher(small_blocks):
    z, _ = rows()
    mine, exact = both(z, None, {"entropy": 1.0, "student_temperature": 1.5})
    assert_near(mine.value, exact.value, 5e-6)
    assert_near(mine.grad_student, exact.grad_student, 2e-5)
    assert_near(mine.grad_temperature[:, 0], exact.grad_temperature[:, 0], 2e-5)
    assert (mine.grad_temperature[:, 1] == 0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon", "alpha_beta"])
@pytest.mark.parametrize("std", [0.3, 10.0])
def test_flat_and_collapsed_rows(kind, std, small_blocks):
    z, a = rows(std=std)
    mine, exact = both(z, a, KINDS[kind])
    # In a collapsed row an entry is p (d - D) with p near 1 and d near D.
    assert_same(mine, exact, floor=5e-7 * exact.value.max().item())


@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon", "squared_hellinger", "alpha"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_dtypes(kind, dtypes):
    z, a = rows()
    mine, exact = both(z.to(dtypes[0]), a.to(dtypes[1]), KINDS[kind])
    assert mine.grad_student.dtype == dtypes[0] and mine.grad_teacher.dtype == dtypes[1]
    assert_near(mine.value, exact.value, 5e-6, "value")
    # Half a unit in the last place of the gradient's own dtype.
    for gradient, true, dtype in (
        (mine.grad_student, exact.grad_student, dtypes[0]),
        (mine.grad_teacher, exact.grad_teacher, dtypes[1]),
    ):
        assert_near(gradient, true, 2e-5 + torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(
    "kind",
    [
        "forward_kl",
        "reverse_kl",
        "jeffreys",
        "jensen_shannon",
        "skew_forward",
        "skew_reverse",
        "total_variation",
        "squared_hellinger",
        "hellinger",
        "triangular",
        "chi_squared",
        "alpha",
        "renyi",
        "alpha_beta",
        "alpha_beta_opposed",
        "alpha_beta_origin",
    ],
)
def test_relative_error_at_every_gap(kind, temperature):
    """Rows z + gap * noise, one gap a row; equal rows are exactly 0."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, 400, generator=generator) * 4
    noise = torch.randn(1, 400, generator=generator)
    gaps = torch.tensor([[1.0], [0.1], [0.01], [0.001], [1e-4], [0.0]])
    a = (z + gaps * noise).to(DEVICE)
    z = z.expand(6, -1).to(DEVICE)
    numbers = {
        **KINDS[kind],
        "student_temperature": temperature,
        "teacher_temperature": temperature,
    }
    mine = call(backend, z, a, numbers)
    exact = call(reference, z, a, numbers)
    error = (mine.value.double() - exact.value)[:5] / exact.value[:5]
    assert error.abs().max() < 3e-6, error
    assert mine.value[5] == 0 and (mine.value >= 0).all()
    for gradient in (mine.grad_student, mine.grad_teacher):
        assert gradient[5].abs().max() < 1e-7  # rounding of q - p at most
    # Rounding of d, 1e-6, against the gap (over the temperature).
    for row in range(3):
        bound = 2e-5 + 2e-6 * temperature / gaps[row].item()
        one = slice(row, row + 1)
        assert_near(mine.grad_student[one], exact.grad_student[one], bound, f"row {row}")


def test_gap_beneath_a_shift():
    """A constant between the rows cancels before it is rounded."""
    z, _ = rows(count=1, width=200)
    z = (z * 64).round() / 64  # so that z + 512 is exact
    noise = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    a = z + (noise * 64).round() / 640
    a = ((a * 4096).round() / 4096 + 512).float()
    mine, exact = both(z, a, KINDS["forward_kl"])
    assert abs(mine.value.item() / exact.value.item() - 1) < 1e-5
    mine, exact = both(z * 8, z * 8 + 512, KINDS["forward_kl"])
    assert mine.value.item() == 0


def test_one_pass_and_finishing_pass_agree(monkeypatch):
    """Around 0.05 nats both ways give the value; the threshold itself is what chooses."""
    z, noise = rows(count=6, width=120)
    a = z + noise * torch.linspace(0.08, 0.25, 6, device=DEVICE)[:, None]
    mine, exact = both(z, a, KINDS["forward_kl"])
    assert exact.value.min() < 0.05 < exact.value.max()
    assert_same(mine, exact)


# Special rows. ------------------------------------------------------------------------------------


def special_rows() -> tuple[Tensor, Tensor]:
    """-inf in the student, in the teacher, over the first block of both; a dead teacher; NaN in
    either; an ordinary row."""
    z, a = rows(count=7, width=50, seed=5)
    z[0, 3] = z[0, 40] = -INF
    a[1, 3] = a[1, 49] = -INF
    z[2, :33] = a[2, :33] = -INF
    a[3] = -INF
    z[4, 46] = NAN
    a[5, 0] = NAN
    return z, a


@every_kind
def test_special_rows(kind, small_blocks):
    z, a = special_rows()
    mine, exact = both(z, a, KINDS[kind])
    # Entries impossible on both sides are as if absent (negative exponents make the reference's
    # stand-in for log 0 overflow there), and opposed exponents are infinite at p = 0 < q as well.
    absent = call(reference, z[2:3, 33:], a[2:3, 33:], KINDS[kind])
    exact.value[2] = absent.value[0]
    exact.grad_student[2, :33] = exact.grad_teacher[2, :33] = 0
    exact.grad_student[2, 33:] = absent.grad_student[0]
    exact.grad_teacher[2, 33:] = absent.grad_teacher[0]
    exact.grad_temperature[2] = absent.grad_temperature[0]
    if kind == "alpha_beta_opposed":
        exact.value[1] = INF
    assert_near(mine.value, exact.value, 5e-6, "value")
    # An infinite value has the gradient 0 for the teacher (the reference differentiates its
    # stand-in for log 0), and so has the student where the derivative itself is infinite.
    infinite = exact.value == INF
    if kind in ("alpha_2", "alpha_beta_opposed", "alpha_beta_origin"):
        exact.grad_student[infinite] = 0
    exact.grad_teacher[infinite] = 0
    assert_near(mine.grad_student, exact.grad_student, 2e-5, "grad_student")
    assert_near(mine.grad_teacher, exact.grad_teacher, 2e-5, "grad_teacher")
    assert_near(mine.grad_temperature[~infinite], exact.grad_temperature[~infinite], 1e-4)
    assert mine.grad_temperature[infinite].isfinite().all()
    assert mine.value[3] == 0 and (mine.grad_student[3] == 0).all()
    assert mine.value[4:6].isnan().all() and mine.grad_student[4:6].isnan().all()


def test_forward_kl_of_an_impossible_entry():
    """inf, with gradient (q - p) / tau over the possible entries."""
    z, a = rows(count=1, width=9)
    z[0, 2] = -INF
    numbers = {"forward_kl": 1.0, "student_temperature": 2.0, "teacher_temperature": 2.0}
    mine = call(backend, z, a, numbers)
    p, q = torch.softmax(a.double() / 2, -1), torch.softmax(z.double() / 2, -1)
    assert mine.value.item() == INF
    assert_near(mine.grad_student, torch.where(z == -INF, 0.0, (q - p) / 2), 1e-5)


def test_huge_logits(small_blocks):
    """Logits whose base-2 multiple overflows: the reference logit is the maximum itself."""
    z = torch.tensor([[1e4, 0.0, -1e4], [3e38, -3e38, 0.0], [-3e38, -3.1e38, -3e38]], device=DEVICE)
    a = torch.tensor([[0.0, 1e4, -1e4], [0.0, 3e38, -3e38], [-3e38, -3e38, -3.1e38]], device=DEVICE)
    numbers = {**KINDS["jensen_shannon"], "first": 0.5}
    # The gaps are so large that any large gap stands for them.
    top_z, top_a = z.amax(-1, keepdim=True), a.amax(-1, keepdim=True)
    exact = call(reference, (z - top_z).clamp(min=-1e3), (a - top_a).clamp(min=-1e3), numbers)
    for upstream in (None, torch.ones((), device=DEVICE)):
        mine = call(backend, z, a, numbers, upstream=upstream)
        assert_near(mine.value, exact.value, 5e-6)
        assert_near(mine.grad_student, exact.grad_student, 2e-5)
        assert_near(mine.grad_teacher, exact.grad_teacher, 2e-5)


def test_unselected_rows_are_exactly_zero():
    z, a = rows(count=4)
    z[1] = NAN
    a[2] = INF
    labels = torch.tensor([1, -100, 2, 3], device=DEVICE)
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    weight = torch.tensor([1.0, NAN, NAN, 2.0], device=DEVICE)
    numbers = {**KINDS["jensen_shannon"], "reduction": S.MEAN, "normalize_weights": 1.0}
    mine = call(backend, z, a, numbers, labels=labels, mask=mask, weight=weight)
    kept = [0, 3]
    exact = call(reference, z[kept], a[kept], numbers, weight=weight[kept])
    assert_near(mine.value, exact.value, 5e-6)
    assert_near(mine.grad_student[kept], exact.grad_student, 2e-5)
    assert (mine.grad_student[1:3] == 0).all() and (mine.grad_teacher[1:3] == 0).all()
    assert (mine.grad_temperature[1:3] == 0).all() and (mine.stats[1:3] == 0).all()


def test_no_selected_row():
    z, a = rows()
    mask = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    for reduction in (S.MEAN, S.SEQUENCE_MEAN):
        mine = call(backend, z, a, {"forward_kl": 1.0, "reduction": reduction}, mask=mask)
        assert mine.value == 0 and (mine.grad_student == 0).all()


def test_data_out_of_range_is_nan_without_gradient():
    z, a = rows(count=4)
    labels = torch.tensor([0, 75, -3, 74], device=DEVICE)
    tau = torch.tensor([1.0, 1.0, 1.0, 0.0], device=DEVICE)
    numbers = {"forward_kl": 1.0, "label_weight": 0.5}
    for upstream in (None, torch.ones((), device=DEVICE)):
        mine = call(
            backend, z, a, numbers, labels=labels, student_temperature=tau, upstream=upstream
        )
        assert mine.value[0].isfinite() and mine.value[1:].isnan().all()
        assert (mine.grad_student[1:] == 0).all() and (mine.grad_teacher[1:] == 0).all()
        assert (mine.grad_temperature[1:] == 0).all() and (mine.grad_student[0] != 0).any()
    beta = torch.tensor([0.5, 1.5, -0.1, NAN], device=DEVICE)
    mine = call(backend, z, a, KINDS["jensen_shannon"], first=beta)
    assert mine.value[0].isfinite() and mine.value[1:].isnan().all()
    assert (mine.grad_student[1:] == 0).all()


# Options. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_kl", "total_variation", "mixed_with_linear"])
def test_label_clip_and_temperature_squared(kind, small_blocks):
    z, a = rows(count=5)
    z[4, 7] = -INF  # an impossible label costs inf
    a[4, 7] = -INF
    labels = torch.tensor([0, 74, -1, 40, 7], device=DEVICE)
    exact_d = call(reference, z, a, {**KINDS[kind], "student_temperature": 1.3}).value
    numbers = {
        **KINDS[kind],
        "student_temperature": 1.3,
        "teacher_temperature": 1.3,
        "label_weight": 0.6,
        "ignore_index": -1.0,
        "temperature_squared": 1.0,
        "clip_token": exact_d.median().item(),
    }
    mine, exact = both(z, a, numbers, labels=labels)
    assert_same(mine, exact)
    assert mine.value[4] == INF and mine.value[2] == 0
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.5], device=DEVICE)
    assert_same(*both(z, a, numbers, labels=labels, upstream=upstream))


@pytest.mark.parametrize(
    "kind", ["forward_kl", "jensen_shannon", "skew_reverse", "renyi", "alpha_beta"]
)
def test_numbers_per_row(kind, small_blocks):
    z, a = rows(count=4)
    tau_s = torch.tensor([0.5, 1.0, 2.0, 4.0], device=DEVICE)
    tau_t = torch.tensor([1.0, 1.0, 3.0, 0.7], device=DEVICE)
    first = torch.tensor([0.0, 0.25, 0.6, 1.0], device=DEVICE)
    second = torch.tensor([1.0, 0.0, -0.6, 0.3], device=DEVICE)
    mine, exact = both(
        z,
        a,
        {**KINDS[kind], "temperature_squared": 1.0},
        student_temperature=tau_s,
        teacher_temperature=tau_t,
        first=first,
        second=second,
    )
    assert_same(mine, exact, gradient=1e-4 if kind == "alpha_beta" else 2e-5)


REDUCTIONS = {
    "none": {"reduction": S.NONE},
    "sum": {"reduction": S.SUM},
    "mean": {"reduction": S.MEAN},
    "mean_by_weight": {"reduction": S.MEAN, "normalize_weights": 1.0},
    "batchmean": {"reduction": S.BATCHMEAN, "batch": 3.0},
    "sequence_mean": {"reduction": S.SEQUENCE_MEAN, "batch": 3.0},
    "num_items": {"reduction": S.MEAN, "num_items": 7.0},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduction(reduction):
    """Against the reference, and against the definition spelled out here."""
    z, a = rows(count=6, width=20)
    mask = torch.tensor([True, True, False, True, False, False], device=DEVICE)
    weight = torch.tensor([1.0, 0.5, 3.0, 0.0, 1.0, 1.0], device=DEVICE)
    numbers = {**KINDS["forward_kl"], **REDUCTIONS[reduction]}
    mine, exact = both(z, a, numbers, mask=mask, weight=weight)
    assert_same(mine, exact)
    p = torch.softmax(a.double(), -1)
    d = (p * (torch.log_softmax(a.double(), -1) - torch.log_softmax(z.double(), -1))).sum(-1)
    row = torch.where(mask, d * weight, 0.0)
    expected = {
        "none": row, "sum": row.sum(), "mean": row.sum() / 3, "mean_by_weight": row.sum() / 1.5,
        "batchmean": row.sum() / 3, "sequence_mean": ((row[0] + row[1]) / 2 + row[3]) / 2,
        "num_items": row.sum() / 7,
    }[reduction]  # fmt: skip
    assert_near(mine.value, expected, 5e-6)
    assert (mine.grad_student[3] == 0).all()  # weight 0


def test_num_items_as_a_tensor():
    z, a = rows()
    items = torch.tensor(11.0, device=DEVICE)
    assert_same(*both(z, a, {"reverse_kl": 1.0, "reduction": S.MEAN}, num_items=items))


@pytest.mark.parametrize(
    "kind",
    [
        "one_pass_pair",
        "linear",
        "skew_detached",
        "hellinger",
        "chi_squared",
        "renyi",
        "alpha_beta",
        "mixed_with_linear",
    ],
)
def test_backward_from_statistics(kind, small_blocks):
    z, a = rows()
    upstream = torch.tensor([1.0, -0.5, 0.0], device=DEVICE)
    numbers = {**KINDS[kind], "student_temperature": 2.0, "teacher_temperature": 2.0}
    mine, exact = both(z, a, numbers, upstream=upstream)
    assert_same(mine, exact)
    assert (mine.grad_student[2] == 0).all()


def test_backward_of_special_rows(small_blocks):
    z, a = special_rows()
    upstream = torch.tensor(0.5, device=DEVICE)
    for kind in ("forward_kl", "chi_squared"):
        early = call(backend, z, a, KINDS[kind])
        late = call(backend, z, a, KINDS[kind], upstream=upstream)
        assert_near(late.grad_student, early.grad_student * 0.5, 1e-6)
        assert_near(late.grad_teacher, early.grad_teacher * 0.5, 1e-6)


# Shapes and memory. -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_kl", "skew_forward", "alpha"])
@pytest.mark.parametrize("widths", [(40, 75), (75, 40)])
def test_valid_columns_and_widths(kind, widths, small_blocks):
    """Padding is not read, and its gradient is 0."""
    z, a = rows()
    z, a = z[:, : widths[0]].clone(), a[:, : widths[1]].clone()
    z[:, 36:] = NAN
    a[:, 37:] = NAN
    numbers = {**KINDS[kind], "student_columns": 36.0, "teacher_columns": 37.0}
    mine = call(backend, z, a, numbers)
    z[:, 36:] = -INF
    a[:, 37:] = -INF
    exact = call(reference, z, a, KINDS[kind])
    assert_near(mine.value, exact.value, 5e-6)
    assert_near(mine.grad_student, exact.grad_student, 2e-5)
    assert (mine.grad_student[:, 36:] == 0).all() and (mine.grad_teacher[:, 37:] == 0).all()
    numbers = {**KINDS[kind], "student_columns": 36.0, "teacher_columns": 36.0}
    z, a = torch.nan_to_num(z, neginf=0.0), torch.nan_to_num(a, neginf=0.0)
    assert_same(*both(z, a, numbers))


def test_strides_offsets_and_expansion():
    z, a = rows(count=6, width=40)
    view, expanded = z[1::2, 3:34], a[2, 5:36].expand(3, 31)
    assert_same(*both(view, expanded, KINDS["jensen_shannon"]))


def test_gradient_in_place(small_blocks):
    z, a = rows()
    wide = torch.full((3, 100), 9.0, device=DEVICE)
    wide[:, :75] = z
    exact = call(reference, z, a, KINDS["reverse_kl"])
    mine = call(backend, wide[:, :75], a, KINDS["reverse_kl"], inplace=True)
    assert_near(mine.value, exact.value, 5e-6)
    assert_near(wide[:, :75], exact.grad_student, 2e-5)
    assert (wide[:, 75:] == 9).all()


def test_no_rows_and_one_column():
    empty = torch.empty(0, 5, device=DEVICE)
    for reduction in (S.SUM, S.MEAN):
        assert call(backend, empty, empty, {"forward_kl": 1.0, "reduction": reduction}).value == 0
    z, a = rows(count=2, width=1)
    for kind in ("forward_kl", "jensen_shannon", "alpha_beta"):
        numbers = {**KINDS[kind], "student_temperature": 1.3, "teacher_temperature": 1.3}
        mine = call(backend, z, a, numbers)
        assert (mine.value == 0).all() and (mine.grad_student == 0).all()


def test_lowest_finite_logits():
    """Masks made of finfo.min instead of -inf: probability 0, no NaN, no inf."""
    z, a = rows(count=1)
    z[:, :9] = a[:, :9] = torch.finfo(torch.float32).min
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon", "chi_squared", "alpha_beta"):
        mine = call(backend, z, a, KINDS[kind])
        exact = call(reference, z[:, 9:], a[:, 9:], KINDS[kind])
        assert_near(mine.value, exact.value, 5e-6, kind)
        assert_near(mine.grad_student[:, 9:], exact.grad_student, 2e-5, kind)
        assert (mine.grad_student[:, :9] == 0).all()


def test_float64_is_refused_by_name():
    z, a = rows(width=5)
    with pytest.raises(TypeError, match=r"triton.*student.*float32.*float64"):
        call(backend, z.double(), a, KINDS["forward_kl"])
    with pytest.raises(TypeError, match=r"triton.*teacher.*float32.*float64"):
        call(backend, z, a.double(), KINDS["forward_kl"])


def test_scale(small_blocks):
    for dtype in (torch.float32, torch.bfloat16):
        tensor, _ = rows(count=3, width=50)
        tensor = tensor.to(dtype)
        expected = (tensor.float() * -2.5).to(dtype)
        backend.scale(tensor, torch.tensor(-2.5, device=DEVICE))
        assert torch.equal(tensor, expected)
    wide = torch.ones(4, 60, device=DEVICE)
    backend.scale(wide[:, 5:55], torch.tensor(3.0, device=DEVICE))
    assert (wide[:, 5:55] == 3).all() and wide.sum() == 4 * (50 * 3 + 10)
    odd = torch.tensor([NAN, INF, 2.0], device=DEVICE)
    backend.scale(odd, torch.tensor(1.0, device=DEVICE))
    assert odd[0].isnan() and odd[1] == INF and odd[2] == 2
    backend.scale(torch.empty(0, 4, device=DEVICE), torch.tensor(2.0, device=DEVICE))


def test_registry_serves_it():
    with registry.use_backend("triton"):
        assert registry.pick("divergence", DEVICE) is backend
    assert backend.why_not() == ""


def python(code: str) -> str:
    """What a fresh interpreter without TRITON_INTERPRET prints."""
    root = str(Path(__file__).resolve().parents[1])
    variables = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([root, variables.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_reason_without_a_device():
    said = python("from kdkernels.backends import triton as t; print(t.READS, t.why_not())")
    assert "('cuda',)" in said and "TRITON_INTERPRET=1" in said


def test_reason_without_triton():
    said = python(
        "import sys; sys.modules['triton'] = None\n"
        "from kdkernels.backends import triton as t; print(t.why_not())"
    )
    assert "triton is not installed" in said
