"""What only the emulator can show of the CUDA kernels: the same bits in every order of threads,
shared memory that is written before it is read, rows on every alignment, blocks of every size, a
grid smaller than the rows; and the kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from kdkernels.backends import simt
from kdkernels.backends import spec as S
from kdkernels.backends import torch as reference
from kdkernels.backends.spec import DivergenceSpec

pytestmark = pytest.mark.skipif(bool(simt.why_not()), reason=simt.why_not() or "built")

NAN, INF = float("nan"), float("inf")
ORDERS = (("ascending", 0), ("descending", 0), ("shuffle", 1), ("warp_ahead", 2))

# One of each variant of the row kernel, and the kinds whose formulas differ inside it.
KINDS = {
    "forward_kl": {"forward_kl": 1.0},
    "reverse_kl": {"reverse_kl": 1.0},
    "jeffreys": {"forward_kl": 0.5, "reverse_kl": 0.5},
    "cross_entropy": {"cross_entropy": 1.0},
    "entropy": {"entropy": 1.0},
    "linear": {"forward_kl": 0.7, "reverse_kl": 0.2, "cross_entropy": 0.3, "entropy": 0.1},
    "jensen_shannon": {"kind": S.JENSEN_SHANNON, "other": 1.0, "first": 0.3},
    "skew_forward": {"kind": S.SKEW_FORWARD, "other": 1.0, "first": 0.1},
    "skew_reverse": {"kind": S.SKEW_REVERSE, "other": 1.0, "first": 0.1},
    "total_variation": {"kind": S.TOTAL_VARIATION, "other": 1.0},
    "hellinger": {"kind": S.SQUARED_HELLINGER, "other": 1.0, "outer": S.SQRT},
    "bhattacharyya": {"kind": S.SQUARED_HELLINGER, "other": 1.0, "outer": S.BHATTACHARYYA},
    "triangular": {"kind": S.TRIANGULAR, "other": 1.0},
    "chi_squared": {"kind": S.CHI_SQUARED, "other": 1.0},
    "alpha_beta": {"kind": S.ALPHA_BETA, "other": 1.0, "first": 0.7, "second": 0.4},
    "alpha": {"kind": S.ALPHA, "other": 1.0, "first": 0.5},
    "renyi": {"kind": S.ALPHA, "other": 1.0, "first": 0.5, "outer": S.RENYI},
    "mixture_and_linear": {"kind": S.JENSEN_SHANNON, "other": 0.5, "first": 0.5, "forward_kl": 0.5},
}
VARIANTS = ("forward_kl", "linear", "jensen_shannon", "hellinger", "alpha_beta")
# Kinds whose rows promise a relative error of 1e-5 at every gap (docs/contract: KL-type).
KL_TYPE = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "skew_forward",
    "skew_reverse",
    "triangular",
    "chi_squared",
    "alpha",
    "renyi",
)
# Not 0 for equal rows.
NO_DISTANCE = ("cross_entropy", "entropy", "linear")


@pytest.fixture(autouse=True)
def _ascending_afterwards():
    yield
    simt.set_order("ascending")


def forward(backend, z, a, *, gradients=True, inplace=False, **options):
    """(value, stats, grad_student, grad_teacher, grad_temperature); outputs start as NaN."""
    numbers = {
        k: v
        for k, v in options.items()
        if k in DivergenceSpec._fields and not isinstance(v, torch.Tensor)
    }
    spec = DivergenceSpec(**numbers)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    rows = z.shape[0]

    def per_row(name):
        tensor = options.get(name)
        return tensor.to(dtype) if isinstance(tensor, torch.Tensor) else None

    value = torch.full((rows,) if spec.reduction == S.NONE else (), NAN, dtype=dtype)
    stats = torch.full((rows, S.STATS), NAN, dtype=dtype)
    grads = [None, None, None]
    if gradients:
        grads = [
            torch.full_like(z, NAN),
            None if a is None else torch.full_like(a, NAN),
            torch.full((rows, 2), NAN, dtype=dtype),
        ]
    if inplace:
        grads[0] = z
    backend.divergence_fwd(
        z,
        a,
        options.get("labels"),
        options.get("mask"),
        per_row("weight"),
        per_row("student_temperature"),
        per_row("teacher_temperature"),
        per_row("first"),
        per_row("second"),
        per_row("num_items"),
        value,
        stats,
        *grads,
        tuple(spec),
    )
    return [value, stats, *grads]


def backward(backend, z, a, stats, upstream, **options):
    numbers = {
        k: v
        for k, v in options.items()
        if k in DivergenceSpec._fields and not isinstance(v, torch.Tensor)
    }

    def per_row(name):
        tensor = options.get(name)
        return tensor.to(stats.dtype) if isinstance(tensor, torch.Tensor) else None

    grads = [
        torch.full_like(z, NAN),
        None if a is None else torch.full_like(a, NAN),
        torch.full((z.shape[0], 2), NAN, dtype=stats.dtype),
    ]
    backend.divergence_bwd(
        z,
        a,
        options.get("labels"),
        options.get("mask"),
        per_row("student_temperature"),
        per_row("teacher_temperature"),
        per_row("first"),
        per_row("second"),
        stats,
        upstream.to(stats.dtype),
        *grads,
        tuple(DivergenceSpec(**numbers)),
    )
    return grads


def oracle(z, a, **options):
    return forward(reference, z.double(), None if a is None else a.double(), **options)


def rows(n, v, *, gap=1.0, std=4.0, dtype=torch.float32, seed=0):
    """Logits of a student and of a teacher `gap` away from it."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, v, generator=generator, dtype=torch.float64) * std
    a = z + gap * torch.randn(n, v, generator=generator, dtype=torch.float64)
    return z.to(dtype), a.to(dtype)


def assert_close(got, want, relative, what=""):
    """Infinities and NaN in the same places, elsewhere |got - want| <= relative x max |want|."""
    if want is None:
        assert got is None
        return
    got, want = got.double(), want.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN elsewhere than in the reference"
    assert torch.equal(got.isinf(), want.isinf()), f"{what}: inf elsewhere than in the reference"
    finite = want.isfinite()
    if not finite.any():
        return
    error = (got - want)[finite].abs().max().item()
    bound = relative * want[finite].abs().max().item()
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e}"


def compare(got, want, value=1e-5, gradient=2e-5, half=0.0):
    gradient = max(gradient, half)
    assert_close(got[0], want[0], value, "value")
    for name, column in (("factor", S.FACTOR), ("unit", S.UNIT)):
        assert_close(got[1][:, column], want[1][:, column], 1e-6, name)
    for name, x, y in zip(("grad_student", "grad_teacher", "grad_temperature"), got[2:], want[2:]):
        assert_close(x, y, gradient if name != "grad_temperature" else max(2e-5, value), name)


# ---- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 2.0), (2.0, 1.5)])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_forward_and_backward(name, temperatures):
    z, a = rows(5, 301)
    teacher = None if name == "entropy" else a
    options = {
        **KINDS[name],
        "student_temperature": temperatures[0],
        "teacher_temperature": temperatures[1],
        "reduction": S.NONE,
    }
    got, want = forward(simt, z, teacher, **options), oracle(z, teacher, **options)
    compare(got, want)
    upstream = torch.linspace(-1, 2, 5)
    gradients = backward(simt, z, teacher, got[1], upstream, **options)
    for x, y in zip(
        gradients,
        backward(
            reference,
            z.double(),
            None if teacher is None else teacher.double(),
            want[1],
            upstream,
            **options,
        ),
    ):
        assert_close(x, y, 2e-5)


@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("name", KL_TYPE)
def test_relative_error_at_every_gap(name, gap):
    z, a = rows(16, 500, gap=gap, std=3.0)
    options = {**KINDS[name], "reduction": S.NONE}
    got = forward(simt, z, a, **options)[0].double()
    want = oracle(z, a, **options)[0]
    assert ((got - want) / want).abs().max().item() <= 1e-5
    assert (got >= 0).all()


@pytest.mark.parametrize("top", [10.0, 25.0, 60.0])
@pytest.mark.parametrize("name", [*KL_TYPE, "total_variation"])
def test_rows_on_one_entry(name, top):
    """Values of 1e-3 to 1e-20: all of them lies in the small probabilities."""
    z, a = rows(8, 500, gap=0.1, std=2.0)
    z[:, 17], a[:, 17] = z[:, 17] + top, a[:, 17] + top
    options = {**KINDS[name], "reduction": S.NONE}
    got = forward(simt, z, a, **options)[0].double()
    want = oracle(z, a, **options)[0]
    # Below 1e-12 the reference's own float64 shows.
    assert ((got - want).abs() <= 1e-5 * want + 1e-18).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [n for n in KINDS if n not in NO_DISTANCE])
def test_equal_rows_give_exactly_zero(name, dtype):
    z, _ = rows(4, 700, dtype=dtype)
    value = forward(simt, z, z.clone(), **KINDS[name], reduction=S.NONE)[0]
    assert (value == 0).all()


@pytest.mark.parametrize("teacher", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("student", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_pair_of_dtypes(name, student, teacher):
    z, a = rows(3, 133, dtype=student)[0], rows(3, 133, dtype=teacher)[1]
    options = {**KINDS[name], "reduction": S.SUM}
    # One rounding into the gradient's own dtype.
    half = max(
        2.0**-11 if torch.float16 in (student, teacher) else 0.0,
        2.0**-8 if torch.bfloat16 in (student, teacher) else 0.0,
    )
    compare(forward(simt, z, a, **options), oracle(z, a, **options), half=half)


@pytest.mark.parametrize("teacher", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KINDS)
def test_float64(name, teacher):
    z, a = rows(3, 133, dtype=torch.float64)[0], rows(3, 133, dtype=teacher)[1]
    options = {**KINDS[name], "student_temperature": 2.0, "teacher_temperature": 2.0}
    got, want = forward(simt, z, a, **options), oracle(z, a, **options)
    if teacher != torch.float64:
        got[3], want[3] = None, None
    compare(got, want, value=1e-12, gradient=1e-12)


@pytest.mark.parametrize("shift", [-1000.0, 17.5, 1000.0])
@pytest.mark.parametrize("name", ["forward_kl", "linear", "jensen_shannon", "alpha"])
def test_shifted_rows(name, shift):
    """A constant on all of the teacher's logits changes nothing."""
    z, a = rows(4, 400)
    a = (a + shift).float()
    options = {**KINDS[name], "reduction": S.NONE}
    compare(forward(simt, z, a, **options), oracle(z, a, **options))


# ---- options -----------------------------------------------------------------------------------

LABELS = torch.tensor([3, -100, 0, 132, 7, 9])
MASK = torch.tensor([True, True, False, True, True, True])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 0.25])
OPTIONS = {
    "labels": {"labels": LABELS},
    "label_weight": {"labels": LABELS, "label_weight": 0.3},
    "label_weight_tau": {
        "labels": LABELS,
        "label_weight": 0.3,
        "student_temperature": 3.0,
        "teacher_temperature": 2.0,
        "temperature_squared": 1.0,
    },
    "mask": {"mask": MASK},
    "all": {
        "labels": LABELS,
        "mask": MASK,
        "weight": WEIGHT,
        "label_weight": 0.3,
        "student_temperature": 2.0,
        "teacher_temperature": 2.0,
        "temperature_squared": 1.0,
    },
    "weight": {"weight": WEIGHT},
    "weighted_mean": {"weight": WEIGHT, "normalize_weights": 1.0, "mask": MASK},
    "weighted_mean_alone": {"weight": WEIGHT, "normalize_weights": 1.0},
    "clip": {"clip_token": 1.2, "labels": LABELS},
    "clip_tau": {
        "clip_token": 0.3,
        "student_temperature": 2.0,
        "teacher_temperature": 2.0,
        "temperature_squared": 1.0,
    },
    "num_items": {"num_items": 11.0, "mask": MASK},
    "num_items_tensor": {"num_items": torch.tensor(11.0), "mask": MASK},
    "columns": {"student_columns": 101.0, "teacher_columns": 101.0},
    "tensor_temperatures": {
        "student_temperature": torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0, 1.0]),
        "teacher_temperature": torch.tensor([1.0, 1.0, 0.5, 2.5, 3.0, 1.2]),
    },
    "ignore_index": {"labels": LABELS.abs(), "ignore_index": 7.0},
    "none_selected": {"mask": torch.zeros(6, dtype=torch.bool)},
}


@pytest.mark.parametrize("reduction", S.REDUCTIONS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_options(name, option, reduction):
    z, a = rows(6, 133)
    options = {**KINDS[name], **OPTIONS[option], "reduction": S.REDUCTIONS[reduction], "batch": 2.0}
    got, want = forward(simt, z, a, **options), oracle(z, a, **options)
    compare(got, want)
    # The backward for upstream 1 repeats the gradients of the forward, to the bit.
    for x, y in zip(backward(simt, z, a, got[1], torch.tensor(1.0), **options), got[2:]):
        assert torch.equal(x, y)


def test_parameters_per_row():
    z, a = rows(6, 133)
    first = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0, 0.3])
    for kind in (S.JENSEN_SHANNON, S.SKEW_FORWARD, S.SKEW_REVERSE, S.ALPHA):
        options = {"kind": kind, "other": 1.0, "reduction": S.NONE}
        if kind in (S.SKEW_FORWARD, S.SKEW_REVERSE):
            first = first.clamp(max=0.95)
        got = forward(simt, z, a, **options, first=first)
        compare(got, oracle(z, a, **options, first=first))
    options = {
        "kind": S.ALPHA_BETA,
        "other": 1.0,
        "reduction": S.NONE,
        "first": first,
        "second": first.flip(0),
    }
    compare(forward(simt, z, a, **options), oracle(z, a, **options))


@pytest.mark.parametrize("widths", [(133, 140), (140, 133), (2, 9), (9, 2)])
@pytest.mark.parametrize("name", ["forward_kl", "linear", "jensen_shannon", "hellinger"])
def test_vocabularies_of_different_width(name, widths):
    z, a = rows(3, widths[0])[0], rows(3, widths[1], seed=1)[1]
    # Beyond its own end a row is impossible; infinite rows are another test's.
    options = {
        **KINDS[name],
        "reduction": S.NONE,
        "student_columns": 1.0 * min(widths),
        "teacher_columns": 1.0 * min(widths),
    }
    compare(forward(simt, z, a, **options), oracle(z, a, **options))


# ---- special rows ------------------------------------------------------------------------------


def special_rows():
    """Row by row: plain; NaN; dead teacher; q = 0 < p; p = 0 < q; padded in both; plain."""
    z, a = rows(7, 133)
    z[1, 5] = NAN
    a[2] = -INF
    z[3, 4] = -INF
    a[4, 4] = -INF
    z[5, 100:], a[5, 100:] = -INF, -INF
    return z, a


# Where an infinite row flows, the reference differentiates its stand-in for log 0 by the teacher.
STUDENT_ONLY = 3


@pytest.mark.parametrize("reduction", [S.NONE, S.MEAN])
@pytest.mark.parametrize("name", KINDS)
def test_special_rows(name, reduction):
    z, a = special_rows()
    options = {
        **KINDS[name],
        "reduction": reduction,
        "student_temperature": 2.0,
        "teacher_temperature": 2.0,
    }
    got, want = forward(simt, z, a, **options), oracle(z, a, **options)
    infinite = want[1][:, S.VALUE].isinf() | (torch.arange(7) == 3)
    for index in range(STUDENT_ONLY, 5):
        got[index], want[index] = got[index][~infinite], want[index][~infinite]
    compare(got, want)


def test_unselected_rows_are_never_read():
    z, a = rows(4, 133)
    z[1], a[1] = NAN, INF
    mask = torch.tensor([True, False, True, True])
    for name in VARIANTS:
        got = forward(simt, z, a, **KINDS[name], mask=mask)
        want = forward(simt, z[mask], a[mask], **KINDS[name])
        assert_close(got[0], want[0], 1e-6)
        assert (got[2][1] == 0).all() and (got[3][1] == 0).all() and (got[4][1] == 0).all()
        assert (got[1][1, S.VALUE] == 0) and (got[1][1, S.FACTOR] == 0)


@pytest.mark.parametrize("bad", ["label", "label_negative", "tau", "tau_nan"])
def test_refused_rows(bad):
    """What only data can tell: that row's loss NaN, its gradient 0, nothing else touched."""
    z, a = rows(4, 133)
    options = {
        "forward_kl": 1.0,
        "labels": torch.tensor([1, 2, 3, 4]),
        "label_weight": 0.5,
        "student_temperature": torch.ones(4),
        "reduction": S.NONE,
    }
    good = forward(simt, z, a, **options)
    options["labels"] = options["labels"].clone()
    options["student_temperature"] = options["student_temperature"].clone()
    if bad.startswith("label"):
        options["labels"][2] = 133 if bad == "label" else -7
    else:
        options["student_temperature"][2] = 0.0 if bad == "tau" else NAN
    got = forward(simt, z, a, **options)
    again = backward(simt, z, a, got[1], torch.ones(4), **options)
    others = torch.tensor([0, 1, 3])
    assert got[0][2].isnan() and torch.equal(got[0][others], good[0][others])
    for x, y, w in zip(got[2:], good[2:], again):
        assert (x[2] == 0).all() and torch.equal(x[others], y[others]) and torch.equal(x, w)


@pytest.mark.parametrize("v", [1, 2, 3, 7, 8, 9, 31, 33])
def test_tiny_vocabularies(v):
    z, a = rows(3, v)
    for name in VARIANTS:
        options = {**KINDS[name], "reduction": S.NONE}
        got, want = forward(simt, z, a, **options), oracle(z, a, **options)
        if v == 1:  # every softmax is 1; Hellinger takes a root of the rounding
            assert got[0].abs().max() <= 1e-6
            assert (got[2].abs() <= 1e-6).all() and (got[3].abs() <= 1e-6).all()
        else:
            # Hellinger divides by a root: 1e-3 here, which multiplies what is lost in p and q.
            compare(got, want, gradient=2e-4 if v == 2 else 2e-5)


def test_no_rows():
    z, a = rows(0, 7)
    assert forward(simt, z, a, forward_kl=1.0)[0].item() == 0.0
    assert forward(simt, z, a, forward_kl=1.0, reduction=S.NONE)[0].shape == (0,)


# ---- what only the emulator shows --------------------------------------------------------------


def everything(name, z, a, **options):
    got = forward(simt, z, a, **KINDS[name], **options)
    return [*got, *backward(simt, z, a, got[1], torch.tensor(0.5), **KINDS[name], **options)]


@pytest.mark.parametrize("v", [5, 700, 3001])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_order_of_threads_changes_no_bit(name, v):
    """A missing barrier shows as other bits, as NaN (fresh shared memory) or as an error."""
    z, a = rows(6, v)
    options = {
        "labels": LABELS.clamp(max=v - 1),
        "label_weight": 0.2,
        "student_temperature": 2.0,
        "teacher_temperature": 2.0,
        "batch": 2.0,
        "reduction": S.SEQUENCE_MEAN,
    }
    simt.set_order(*ORDERS[0])
    first = everything(name, z, a, **options)
    assert all(t.isfinite().all() for t in first)
    for order in ORDERS[1:]:
        simt.set_order(*order)
        for x, y in zip(first, everything(name, z, a, **options)):
            assert torch.equal(x, y), order


@pytest.mark.parametrize("order", ORDERS)
def test_in_place_equals_out_of_place(order):
    simt.set_order(*order)
    for name in VARIANTS:
        for v in (7, 260, 1500):
            z, a = rows(4, v)
            options = {**KINDS[name], "labels": torch.tensor([0, 1, v - 1, 2]), "label_weight": 0.5}
            apart = forward(simt, z, a, **options)
            together = forward(simt, z.clone(), a, **options, inplace=True)
            for x, y in zip(apart, together):
                assert torch.equal(x, y)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_every_alignment(dtypes):
    """Offsets and row strides that are no multiple of 16 bytes; neighbours stay untouched."""
    z0, a0 = rows(3, 45, dtype=dtypes[0])[0], rows(3, 45, dtype=dtypes[1])[1]
    want = forward(simt, z0, a0, forward_kl=1.0, reduction=S.NONE)
    for offset_z, offset_a, width in [(1, 1, 53), (3, 0, 64), (0, 5, 51), (7, 2, 52), (2, 6, 61)]:
        store_z = torch.full((3, width), 99.0, dtype=dtypes[0])
        store_a = torch.full((3, width), 99.0, dtype=dtypes[1])
        z, a = store_z[:, offset_z : offset_z + 45], store_a[:, offset_a : offset_a + 45]
        z.copy_(z0), a.copy_(a0)
        got = forward(simt, z, a, forward_kl=1.0, reduction=S.NONE)
        for x, y in zip(got[:4], want[:4]):
            assert_close(x, y, 2e-2 if x.dtype != torch.float32 else 2e-6)
        forward(simt, z, a, forward_kl=1.0, inplace=True, reduction=S.NONE)
        outside = torch.ones(width, dtype=torch.bool)
        outside[offset_z : offset_z + 45] = False
        assert (store_z[:, outside] == 99.0).all() and (store_a != 99.0).sum() == 3 * 45


@pytest.mark.parametrize("v", [256, 257, 1024, 1025, 4097, 16385])
def test_every_block_size(v):
    z, a = rows(2, v, std=3.0)
    for name in ("forward_kl", "jensen_shannon"):
        options = {**KINDS[name], "reduction": S.SUM}
        compare(forward(simt, z, a, **options), oracle(z, a, **options))


def test_more_rows_than_blocks():
    z, a = rows(1030, 3)
    labels = torch.arange(1030) % 5 - 1
    options = {"forward_kl": 1.0, "labels": labels.clamp(max=2), "ignore_index": -1.0}
    compare(forward(simt, z, a, **options), oracle(z, a, **options))
    # Many entries for the warps of the select kernel.
    options.update(reduction=S.SEQUENCE_MEAN, batch=103.0)
    options["labels"] = torch.where(torch.arange(1030) < 40, -1, options["labels"])
    compare(forward(simt, z, a, **options), oracle(z, a, **options))


def test_expanded_rows():
    z, a = rows(1, 133)
    wide = forward(simt, z.expand(4, 133), a.expand(4, 133), forward_kl=1.0, reduction=S.NONE)
    once = forward(simt, z, a, forward_kl=1.0, reduction=S.NONE)
    assert torch.equal(wide[0], once[0].expand(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scale(dtype):
    factor = torch.tensor(0.37, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for shape in [(), (1,), (5,), (3, 7), (2, 4099), (0, 4)]:
        tensor = torch.randn(shape).to(dtype)
        want = (tensor.to(factor.dtype) * factor).to(dtype)
        simt.scale(tensor, factor)
        assert torch.equal(tensor, want)
    store = torch.ones(4, 21, dtype=dtype)
    simt.scale(store[:, 3:17], factor)
    assert (store[:, 3:17] == factor.to(dtype)).all()
    assert (store[:, :3] == 1).all() and (store[:, 17:] == 1).all()


def test_scale_by_one_touches_nothing():
    """A signalling NaN shows it: any arithmetic, x 1 too, makes it a quiet one."""
    bits = torch.tensor([0x7F800001, 0x7F800002, 0], dtype=torch.int32)
    simt.scale(bits.view(torch.float32), torch.tensor(1.0))
    assert bits.tolist() == [0x7F800001, 0x7F800002, 0]
    simt.scale(bits.view(torch.float32), torch.tensor(2.0))
    assert bits.tolist() == [0x7FC00001, 0x7FC00002, 0]


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"z": torch.zeros(3, 4, 5)}, "student: expected shape"),
        ({"a": torch.zeros(4, 5)}, "teacher: expected shape"),
        ({"a": torch.zeros(3, 5, dtype=torch.float64)}, "teacher: expected float32"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels: expected int64"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, "mask: expected shape"),
        ({"a": None}, "teacher: every divergence but entropy"),
        ({"label_weight": 1.0}, "labels: label_weight is 1"),
        ({"student_temperature": 0.0}, "student_temperature: expected a positive"),
        ({"reduction": S.SEQUENCE_MEAN, "batch": 2.0}, "batch: 3 rows"),
    ],
)
def test_refusals_name_the_argument(change, message):
    options = {"z": torch.zeros(3, 5), "a": torch.zeros(3, 5), "forward_kl": 1.0, **change}
    z, a = options.pop("z"), options.pop("a")
    with pytest.raises(ValueError, match=message):
        forward(simt, z, a, **options, gradients=False)
