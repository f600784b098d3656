"""The functions of every backend, called directly, against the float64 reference."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from kdkernels.backends import registry
from kdkernels.backends import spec as S
from kdkernels.backends import torch as reference
from kdkernels.backends.spec import DivergenceSpec

HALVES = (torch.float16, torch.bfloat16)


def _available() -> list[str]:
    return [name for name in ("cpu", "simt", "cuda") if not isinstance(registry._try(name), str)]


@pytest.fixture(params=_available())
def backend(request):
    return registry.load(request.param)


class Call:
    """One forward and one backward on one backend, and what they wrote."""

    def __init__(
        self,
        backend,
        student,
        teacher,
        spec,
        *,
        teacher_gradient=False,
        temperature_gradient=False,
        inplace=False,
        upstream=None,
        gradient=True,
        **rest,
    ):
        device = "cuda" if backend.__name__.endswith("cuda") else "cpu"
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
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        student, teacher = move(student), move(teacher)
        rest = {name: move(rest.get(name)) for name in names}
        rows = student.shape[0]
        exact = backend is reference
        compute = torch.float64 if exact or student.dtype == torch.float64 else torch.float32
        if not exact:
            for name in (
                "weight",
                "student_temperature",
                "teacher_temperature",
                "first",
                "second",
                "num_items",
            ):
                rest[name] = None if rest[name] is None else rest[name].to(compute)
        nan = float("nan")

        def like(tensor):
            dtype = torch.float64 if exact else tensor.dtype
            return torch.full(tensor.shape, nan, dtype=dtype, device=device)

        shape = (rows,) if spec.reduction == S.NONE else ()
        self.value = torch.full(shape, nan, dtype=compute, device=device)
        self.stats = torch.full((rows, S.STATS), nan, dtype=compute, device=device)
        upstream = torch.tensor(1.5) if upstream is None else upstream
        upstream = upstream.to(device, compute)
        if not gradient:
            backend.divergence_fwd(
                student,
                teacher,
                *(rest[n] for n in names),
                self.value,
                self.stats,
                None,
                None,
                None,
                spec,
            )
            return

        def gradients():
            return (
                like(student),
                like(teacher) if teacher_gradient else None,
                torch.full((rows, 2), nan, dtype=compute, device=device)
                if temperature_gradient
                else None,
            )

        self.backward = gradients()
        self.forward = gradients()
        z = student
        if inplace and not exact:
            z = student.clone()
            self.forward = (z, *self.forward[1:])
        backend.divergence_fwd(
            z, teacher, *(rest[n] for n in names), self.value, self.stats, *self.forward, spec
        )
        backend.divergence_bwd(
            student,
            teacher,
            *(
                rest[n]
                for n in (
                    "labels",
                    "mask",
                    "student_temperature",
                    "teacher_temperature",
                    "first",
                    "second",
                )
            ),
            self.stats,
            upstream,
            *self.backward,
            spec,
        )


def _size(*gradients) -> float:
    finite = [g[g.isfinite()].abs().max() for g in gradients if g.isfinite().any()]
    return max([float(g) for g in finite] + [1e-30])


def check(
    backend, student, teacher, spec, *, value_rtol=1e-5, value_atol=0.0, gradient_rtol=2e-6, **rest
):
    """Forward and backward of `backend` equal those of the reference.

    Gradients are differences of terms the size of p + q, so their error is bounded by the row's
    largest s or q times a few float32 roundings; halves round once more.
    """
    want = Call(reference, student, teacher, spec, **rest)
    got = Call(backend, student, teacher, spec, **rest)
    double = student.dtype == torch.float64
    if double:
        value_rtol, gradient_rtol = 1e-10, 1e-11
    torch.testing.assert_close(
        got.value.double().cpu(),
        want.value,
        rtol=value_rtol,
        atol=value_atol or 1e-30,
        equal_nan=True,
    )
    for column in (S.FACTOR, S.UNIT):
        torch.testing.assert_close(
            got.stats[:, column].double().cpu(), want.stats[:, column], rtol=1e-6, atol=0
        )
    torch.testing.assert_close(
        got.stats[:, S.VALUE].double().cpu(),
        want.stats[:, S.VALUE],
        rtol=max(value_rtol, 1e-6 if not double else 0),
        atol=value_atol or 1e-30,
        equal_nan=True,
    )
    for mine, theirs in ((got.forward, want.forward), (got.backward, want.backward)):
        for column, (a, b) in enumerate(zip(mine, theirs)):
            if a is None:
                continue
            # The coefficient of q in a gradient bounds what rounding of q may cost.
            tau = 1.0
            spread = (
                abs(float(want.stats[:, S.FACTOR].abs().max()))
                * (8.0 if column < 2 else 60.0)
                / tau
            )
            atol = gradient_rtol * max(_size(b), spread if math.isfinite(spread) else 0.0)
            rtol = 2e-5 if not double else 1e-9
            if column < 2 and a.dtype in HALVES:
                rtol = 2.0**-8 if a.dtype == torch.bfloat16 else 2.0**-11
                atol += 1e-7 if a.dtype == torch.float16 else 0
            torch.testing.assert_close(a.double().cpu(), b, rtol=rtol, atol=atol, equal_nan=True)
    return got


def logits(rows, columns, dtype=torch.float32, *, gap=1.0, std=5.0, seed=0, other=None):
    generator = torch.Generator().manual_seed(seed)
    teacher = std * torch.randn(rows, columns, generator=generator)
    student = teacher + gap * torch.randn(rows, columns, generator=generator)
    return student.to(dtype), teacher.to(other or dtype)


KINDS = {
    "forward_kl": dict(forward_kl=1.0),
    "reverse_kl": dict(reverse_kl=1.0),
    "cross_entropy": dict(cross_entropy=1.0),
    "entropy": dict(entropy=1.0),
    "linear": dict(forward_kl=0.5, reverse_kl=0.25, cross_entropy=0.75, entropy=-0.1),
    "jensen_shannon": dict(kind=S.JENSEN_SHANNON, other=1.0, first=0.5),
    "jensen_shannon_0.1": dict(kind=S.JENSEN_SHANNON, other=0.7, first=0.1, forward_kl=0.3),
    "jensen_shannon_0": dict(kind=S.JENSEN_SHANNON, other=1.0, first=0.0),
    "jensen_shannon_1": dict(kind=S.JENSEN_SHANNON, other=1.0, first=1.0),
    "skew_forward_kl": dict(kind=S.SKEW_FORWARD, other=1.0, first=0.1),
    "skew_forward_kl_1": dict(kind=S.SKEW_FORWARD, other=1.0, first=1.0),
    "skew_reverse_kl": dict(kind=S.SKEW_REVERSE, other=1.0, first=0.1),
    "skew_reverse_kl_0": dict(kind=S.SKEW_REVERSE, other=1.0, first=0.0),
    "skew_reverse_kl_detached": dict(kind=S.SKEW_REVERSE, other=1.0, first=0.1, detach_mixture=1.0),
    "total_variation": dict(kind=S.TOTAL_VARIATION, other=1.0),
    "squared_hellinger": dict(kind=S.SQUARED_HELLINGER, other=1.0),
    "hellinger": dict(kind=S.SQUARED_HELLINGER, other=1.0, outer=S.SQRT),
    "bhattacharyya": dict(kind=S.SQUARED_HELLINGER, other=1.0, outer=S.BHATTACHARYYA),
    "triangular": dict(kind=S.TRIANGULAR, other=1.0),
    "chi_squared": dict(kind=S.CHI_SQUARED, other=1.0),
    "alpha_0.5": dict(kind=S.ALPHA, other=1.0, first=0.5),
    "alpha_0": dict(kind=S.ALPHA, other=1.0, first=0.0),
    "alpha_1": dict(kind=S.ALPHA, other=1.0, first=1.0),
    "renyi": dict(kind=S.ALPHA, other=1.0, first=0.5, outer=S.RENYI),
    "renyi_1": dict(kind=S.ALPHA, other=1.0, first=1.0, outer=S.RENYI),
    "alpha_beta": dict(kind=S.ALPHA_BETA, other=1.0, first=0.5, second=0.25, reverse_kl=0.1),
    "alpha_beta_wide": dict(kind=S.ALPHA_BETA, other=1.0, first=1.5, second=-0.25),
    "alpha_beta_0": dict(kind=S.ALPHA_BETA, other=1.0, first=0.0, second=0.5),
    "alpha_beta_sum_0": dict(kind=S.ALPHA_BETA, other=1.0, first=0.25, second=-0.25),
    "alpha_beta_0_0": dict(kind=S.ALPHA_BETA, other=0.01, first=0.0, second=0.0),
}
# Sums over the whole vocabulary whose terms do not fade with p and q: a float32 sum of them is
# right relative to its own size only.
HEAVY = {"alpha_beta_sum_0", "alpha_beta_0_0", "alpha_beta_wide", "chi_squared", "alpha_beta_0"}


def spec_of(kind, **options):
    return DivergenceSpec(**{**KINDS[kind], **options})


def gradient_bound(kind):
    return 2e-5 if kind in HEAVY else 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(backend, kind):
    student, teacher = logits(4, 1300, std=4.0)
    check(backend, student, teacher, spec_of(kind), gradient_rtol=gradient_bound(kind))
    check(
        backend,
        student,
        teacher,
        spec_of(
            kind,
            student_temperature=2.0,
            teacher_temperature=1.5,
            temperature_squared=1.0,
            reduction=S.SUM,
        ),
        teacher_gradient=True,
        temperature_gradient=True,
        gradient_rtol=10 * gradient_bound(kind),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_float64(backend, kind):
    if backend.__name__.endswith("cuda"):
        pytest.skip("float64 is served by torch, cpu and simt")
    student, teacher = logits(3, 77, torch.float64, std=3.0)
    spec = spec_of(kind, student_temperature=1.3, teacher_temperature=1.3)
    check(backend, student, teacher, spec, teacher_gradient=True, temperature_gradient=True)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon", "linear"])
def test_dtypes(backend, kind, dtype, other):
    student, teacher = logits(4, 1234, dtype, std=3.0, other=other)
    spec = spec_of(kind, student_temperature=2.0, teacher_temperature=2.0)
    check(backend, student, teacher, spec, teacher_gradient=True)
    check(backend, student, teacher, spec)


@pytest.mark.parametrize("columns", [1, 2, 3, 15, 16, 17, 31, 33, 63, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("kind", ["forward_kl", "skew_forward_kl", "triangular"])
def test_widths_and_misaligned_bases(backend, kind, columns):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits(3, columns + 3, dtype, std=3.0)
        # atol: a row of one or two entries may have a value of 0 or near it by accident.
        check(
            backend,
            student[:, 1 : columns + 1],
            teacher[:, 2 : columns + 2],
            spec_of(kind),
            value_atol=1e-12,
        )


@pytest.mark.parametrize("std", [1.0, 5.0, 10.0])
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01, 0.001])
def test_value_at_every_gap(backend, gap, std):
    for kind in (
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "skew_forward_kl",
        "total_variation",
        "squared_hellinger",
        "triangular",
        "chi_squared",
        "alpha_0.5",
        "skew_reverse_kl",
        "alpha_0",
        "linear",
        "hellinger",
    ):
        student, teacher = logits(4, 1500, gap=gap, std=std, seed=int(1000 * gap + std))
        for row, margin in ((2, 8.0), (3, 3.0)):  # rows that have all but collapsed onto one entry
            peak = teacher[row].logsumexp(-1) + margin
            student[row, 17] += peak - teacher[row, 17]
            teacher[row, 17] = peak
        # Beside KL's square of d, these are of first order in it: float32's p leaves its rounding.
        atol = 5e-7 if kind in ("total_variation", "linear", "hellinger") else 1e-13
        for tau in (1.0, 2.0):
            spec = spec_of(kind, student_temperature=tau, teacher_temperature=tau, reduction=S.NONE)
            want = Call(reference, student, teacher, spec, gradient=False)
            got = Call(backend, student, teacher, spec, gradient=False)
            assert (got.value >= 0).all()
            torch.testing.assert_close(
                got.value.double().cpu(),
                want.value,
                rtol=1e-5,
                atol=atol,
                msg=f"{kind} tau {tau}: {got.value} is not {want.value}",
            )


@pytest.mark.parametrize(
    "kind",
    [
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
        "squared_hellinger",
        "hellinger",
        "triangular",
        "chi_squared",
        "alpha_0.5",
        "renyi",
        "alpha_0",
        "bhattacharyya",
        "alpha_beta",
    ],
)
def test_equal_rows_give_exactly_zero(backend, kind):
    for dtype in (torch.float32, torch.bfloat16):
        teacher = logits(4, 1500, dtype)[1]
        out = Call(backend, teacher.clone(), teacher, spec_of(kind, reduction=S.NONE))
        assert (out.value == 0).all()
        assert out.forward[0].abs().max() <= 1e-6


def test_shifted_rows(backend):
    teacher = logits(4, 2000, std=3.0)[1]
    for gap in (1.0, 0.1, 0.01):
        noise = gap * torch.randn(4, 2000, generator=torch.Generator().manual_seed(5))
        student = teacher + 100 + noise
        for kind in ("forward_kl", "jensen_shannon", "reverse_kl"):
            spec = spec_of(kind, reduction=S.NONE)
            want = Call(reference, student, teacher, spec, gradient=False)
            got = Call(backend, student, teacher, spec, gradient=False)
            torch.testing.assert_close(got.value.double().cpu(), want.value, rtol=1e-5, atol=1e-12)


def test_reference_that_rises_along_the_row(backend):
    # The lazy reference is the first block's maximum; later blocks are far above it.
    ramp = torch.linspace(-400, 400, 5000).expand(3, 5000)
    student, teacher = logits(3, 5000, std=2.0)
    for kind in ("forward_kl", "jensen_shannon"):
        check(backend, student + ramp, teacher + ramp, spec_of(kind))
        check(backend, student - ramp, teacher - ramp, spec_of(kind))
        low = student - 1e4 * (torch.arange(5000) < 1500)
        check(backend, low, teacher, spec_of(kind), value_rtol=2e-5)


REDUCTIONS = ["none", "sum", "mean", "batchmean", "sequence_mean"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [0.0, 1.0])
@pytest.mark.parametrize("items", [None, "number", "tensor"])
def test_reductions_weights_masks(backend, reduction, normalize, items):
    student, teacher = logits(12, 40)
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(12, generator=generator)
    weight[1] = 0
    mask = torch.rand(12, generator=generator) > 0.3
    mask[8:] = False
    labels = torch.randint(0, 40, (12,), generator=generator)
    labels[0] = -100
    spec = spec_of(
        "forward_kl",
        reduction=S.REDUCTIONS[reduction],
        normalize_weights=normalize,
        batch=3.0,
        num_items=7.0 if items == "number" else 0.0,
        label_weight=0.25,
        student_temperature=2.0,
        teacher_temperature=2.0,
    )
    number = torch.tensor(5.0) if items == "tensor" else None
    upstream = torch.rand(12, generator=generator) if reduction == "none" else None
    check(
        backend,
        student,
        teacher,
        spec,
        weight=weight,
        mask=mask,
        labels=labels,
        num_items=number,
        upstream=upstream,
    )


def test_no_selected_row(backend):
    student, teacher = logits(3, 10)
    for reduction in range(5):
        out = Call(
            backend,
            student,
            teacher,
            spec_of("forward_kl", reduction=reduction),
            mask=torch.zeros(3, dtype=torch.bool),
        )
        assert (out.value == 0).all() and (out.forward[0] == 0).all()


def test_no_rows(backend):
    student, teacher = logits(0, 10)
    assert Call(backend, student, teacher, spec_of("forward_kl")).value == 0


@pytest.mark.parametrize(
    "kind", ["forward_kl", "cross_entropy", "linear", "jensen_shannon", "total_variation", "renyi"]
)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_label_term_clip_and_in_place(backend, kind, tau):
    student, teacher = logits(5, 1100)
    labels = torch.tensor([3, 1099, 0, -100, 500])
    for inplace in (False, True):
        for clip in (0.0, 0.05):
            spec = spec_of(
                kind,
                label_weight=0.3,
                student_temperature=tau,
                teacher_temperature=1.5,
                temperature_squared=1.0,
                clip_token=clip,
            )
            check(backend, student, teacher, spec, labels=labels, inplace=inplace)
            check(
                backend,
                student,
                teacher,
                spec,
                labels=labels,
                inplace=inplace,
                teacher_gradient=True,
                temperature_gradient=True,
                gradient_rtol=1e-5,
            )


@pytest.mark.parametrize("kind", ["jensen_shannon", "skew_reverse_kl", "alpha_0.5", "alpha_beta"])
def test_numbers_per_row(backend, kind):
    student, teacher = logits(5, 600, std=3.0)
    first = torch.tensor([0.5, 0.25, 0.75, 0.1, 0.9])
    if kind in ("jensen_shannon", "skew_reverse_kl"):
        first = torch.tensor([0.5, 0.0, 1.0, 0.1, 0.9])
    check(
        backend,
        student,
        teacher,
        spec_of(kind),
        first=first,
        second=torch.tensor([0.5, 0.25, 0.0, 1.0, -0.1]),
        student_temperature=torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0]),
        teacher_temperature=torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]),
        temperature_gradient=True,
        gradient_rtol=2e-5,
        value_atol=1e-12,
    )


@pytest.mark.parametrize(
    "kind",
    [
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "skew_forward_kl",
        "squared_hellinger",
        "alpha_0.5",
        "total_variation",
    ],
)
def test_widths_that_differ_and_valid_columns(backend, kind):
    student, _ = logits(3, 1300, std=3.0)
    _, teacher = logits(3, 1110, std=3.0)
    check(backend, student, teacher, spec_of(kind, student_columns=1110.0), value_atol=1e-12)
    if kind not in ("reverse_kl",):
        check(backend, student, teacher, spec_of(kind, student_columns=1250.0))
    check(
        backend,
        teacher,
        student,
        spec_of(kind, student_columns=1100.0, teacher_columns=1090.0),
        teacher_gradient=kind != "reverse_kl",
    )
    poisoned = student.clone()
    poisoned[:, 1110:] = float("nan")
    check(backend, poisoned, teacher, spec_of(kind, student_columns=1110.0))


INFINITE = [
    "forward_kl",
    "cross_entropy",
    "reverse_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "squared_hellinger",
    "hellinger",
    "triangular",
    "chi_squared",
    "alpha_0.5",
    "alpha_1",
    "alpha_0",
    "linear",
    "alpha_beta",
    "entropy",
]


@pytest.mark.parametrize("kind", INFINITE)
@pytest.mark.parametrize("columns", [24, 1500])
def test_impossible_logits(backend, kind, columns):
    student, teacher = logits(6, columns, std=2.0)
    inf = float("inf")
    student[0, ::3] = teacher[0, ::3] = -inf  # the same vocabulary
    student[1, 5:9] = -inf  # q = 0 < p
    teacher[2, 5:9] = -inf  # p = 0 < q
    teacher[3] = -inf
    student[4, -5:] = teacher[4, -5:] = -1e9  # masks that stop short of -inf
    for reduction in (S.NONE, S.MEAN):
        check(backend, student, teacher, spec_of(kind, reduction=reduction))
    labels = torch.tensor([1, 5, 3, 4, 1, 7])
    spec = spec_of(kind, reduction=S.NONE, label_weight=0.5)
    check(backend, student, teacher, spec, labels=labels)


@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon", "alpha_0.5"])
@pytest.mark.parametrize("columns", [24, 1500])
def test_nan_stays_in_its_row(backend, kind, columns):
    student, teacher = logits(7, columns)
    nan, inf = float("nan"), float("inf")
    student[0, 3] = nan
    teacher[1, -1] = nan
    student[2, 20] = inf
    teacher[3, 20] = inf
    student[5] = nan
    mask = torch.tensor([True, True, True, True, True, False, True])
    check(backend, student, teacher, spec_of(kind, reduction=S.NONE), mask=mask)
    weight = torch.tensor([0.0, 0, 0, 0, 1, 1, 1])
    got = Call(backend, student, teacher, spec_of(kind), mask=mask, weight=weight)
    assert got.value.isfinite() and got.forward[0].isfinite().all()


def test_zero_strides(backend):
    student, teacher = logits(1, 300)
    student, teacher = student.expand(4, 300), teacher.expand(4, 300)
    weight = torch.ones(1).expand(4)
    check(
        backend,
        student,
        teacher,
        spec_of("jensen_shannon"),
        weight=weight,
        mask=torch.ones(1, dtype=torch.bool).expand(4),
    )


def test_entropy_without_teacher(backend):
    student = logits(4, 1300, std=3.0)[0]
    check(backend, student, None, spec_of("entropy", student_temperature=1.5))
    check(backend, student.bfloat16(), None, spec_of("entropy"))


# The CPU backend alone. --------------------------------------------------------------------------


@contextlib.contextmanager
def _isa(module, name):
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa("")


@pytest.fixture
def extension():
    if "cpu" not in _available():
        pytest.skip("the extension module is not built")
    from kdkernels import _C

    return _C


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(extension, isa):
    if isa not in extension.compiled_isas():
        pytest.skip("not compiled for this architecture")
    try:
        extension.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    cpu = registry.load("cpu")
    with _isa(extension, isa):
        assert extension.isa() == isa
        student, teacher = logits(3, 1100, std=4.0)
        for kind in (
            "forward_kl",
            "reverse_kl",
            "linear",
            "jensen_shannon",
            "skew_forward_kl",
            "total_variation",
            "triangular",
            "squared_hellinger",
            "chi_squared",
            "alpha_0.5",
            "alpha_beta",
            "alpha_0",
        ):
            check(cpu, student, teacher, spec_of(kind), gradient_rtol=gradient_bound(kind))
            check(
                cpu,
                student,
                teacher,
                spec_of(kind),
                gradient_rtol=gradient_bound(kind),
                teacher_gradient=True,
            )
        for dtype in DTYPES:
            test_dtypes(cpu, "forward_kl", dtype, dtype)
        for columns in (1, 17, 1025):
            test_widths_and_misaligned_bases(cpu, "skew_forward_kl", columns)
        for kind in ("forward_kl", "jensen_shannon", "reverse_kl"):
            test_impossible_logits(cpu, kind, 1500)
            test_nan_stays_in_its_row(cpu, "forward_kl", 1500)
        test_reference_that_rises_along_the_row(cpu)
        test_label_term_clip_and_in_place(cpu, "forward_kl", 2.0)
        test_float64(cpu, "jensen_shannon")


def test_rows_wider_than_the_scratch(extension):
    cpu = registry.load("cpu")
    student, teacher = logits(1, 263_001, std=3.0)
    for kind in ("forward_kl", "jensen_shannon"):
        check(cpu, student, teacher, spec_of(kind), inplace=kind == "forward_kl")


def test_bits_do_not_depend_on_threads(extension):
    cpu = registry.load("cpu")
    student, teacher = logits(33, 5003)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = Call(cpu, student, teacher, spec_of("jensen_shannon"))
            results.append((out.value, out.forward[0], out.backward[0]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_large_fresh_gradient_around_the_cache(extension):
    cpu = registry.load("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits(20, 15_011, dtype, std=3.0)
        check(cpu, student, teacher, spec_of("forward_kl"))
        spec = spec_of("triangular", label_weight=0.5, student_temperature=2.0)
        check(cpu, student, teacher, spec, labels=torch.arange(20))


def test_bad_numbers_are_refused_before_anything_is_written(extension):
    cpu = registry.load("cpu")
    student, teacher = logits(3, 10)

    def refused(match, spec=None, **rest):
        spec = spec_of("forward_kl") if spec is None else spec
        with pytest.raises(ValueError, match=match):
            Call(cpu, student, teacher, spec, inplace=True, **rest)

    labelled = spec_of("forward_kl", label_weight=1.0)
    refused(r"labels: .*0 to 9, got 10 in row 1", labelled, labels=torch.tensor([0, 10, 3]))
    refused(r"labels: .*got -1", labelled, labels=torch.tensor([0, -1, 3]))
    refused(r"labels: expected a tensor", labelled)
    Call(cpu, student, teacher, spec_of("forward_kl"), labels=torch.tensor([0, 10, 3]))
    refused(r"num_items", num_items=torch.tensor(0.0))
    refused(r"temperature: .*got 0 in row 2", student_temperature=torch.tensor([1.0, 2.0, 0.0]))
    refused(r"teacher_temperature: ", teacher_temperature=torch.tensor([float("nan"), 2.0, 1.0]))


def test_scale(extension):
    cpu = registry.load("cpu")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        for tensor in (
            torch.randn(7, 33).to(dtype),
            torch.randn(8, 40).to(dtype)[::2, 3:20],
            torch.randn(3, 4, 5).to(dtype).transpose(0, 2),
            torch.randn(0).to(dtype),
        ):
            want = (tensor.to(compute) * 0.37).to(dtype)
            cpu.scale(tensor, torch.tensor(0.37, dtype=compute))
            torch.testing.assert_close(tensor, want, rtol=0, atol=0)
    kept = torch.tensor([float("nan"), 1.0])
    cpu.scale(kept, torch.tensor(1.0))
    assert kept[0].isnan() and kept[1] == 1
