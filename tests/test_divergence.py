"""kd.divergence on every backend: golden values, the float64 reference, options, autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from numerics.divergence_goldens import GOLDENS, STUDENT, TEACHER, TEMPERATURE

import kdkernels as kd
from kdkernels.backends import native
from kdkernels.functional.kinds import KINDS
from kdkernels.testing import tolerances

# V below a vector, one vector and a tail, several blocks and a tail, a power of two.
WIDTHS = (1, 7, 33, 1000, 4096)
ALL_KINDS = [k for k in KINDS if k != "entropy"]


def logits(rows, width, gap=1.0, std=3.0, dtype=torch.float32, device="cpu"):
    """Realistic rows: student = teacher + gap x noise; every fourth row collapsed on one entry."""
    teacher = torch.randn(rows, width, dtype=torch.float64) * std
    teacher[::4, width // 2] += 30.0
    student = teacher + gap * torch.randn(rows, width, dtype=torch.float64)
    return student.to(device, dtype), teacher.to(device, dtype)


def reference(student, teacher, *args, **options):
    """Loss and gradient of the float64 reference for the same (rounded) inputs."""
    z = student.detach().double().requires_grad_()
    a = None if teacher is None else teacher.detach().double()
    options = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in options.items()
    }
    with kd.use_backend("torch"):
        loss = kd.divergence(z, a, *args, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


def run(student, teacher, *args, **options):
    z = student.detach().clone().requires_grad_()
    loss = kd.divergence(z, teacher, *args, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


@pytest.mark.parametrize("kind, options, value, gradient", GOLDENS)
def test_golden_values(backend, kind, options, value, gradient):
    dtype = backend.dtypes[-1] if torch.float64 in backend.dtypes else torch.float32
    z = torch.tensor([STUDENT], dtype=dtype, device=backend.device, requires_grad=True)
    a = None if kind == "entropy" else torch.tensor([TEACHER], dtype=dtype, device=backend.device)
    loss = kd.divergence(z, a, kind, temperature=TEMPERATURE, **options)
    loss.backward()
    bound = 6e-10 if dtype == torch.float64 else 2e-6  # ten printed digits; float32 arithmetic
    assert abs(loss.item() - value) <= bound
    torch.testing.assert_close(
        z.grad[0].cpu().double(), torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=bound
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_forward_kl_against_float64(backend, width):
    for dtype in backend.dtypes:
        student, teacher = logits(5, width, dtype=dtype, device=backend.device)
        loss, gradient = run(student, teacher, temperature=2.0, reduction="none")
        expected, expected_gradient = reference(student, teacher, temperature=2.0, reduction="none")
        tolerances.assert_values(loss, expected, dtype)
        tolerances.assert_gradient(gradient, expected_gradient, 0.5, dtype)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_kind_against_float64(backend, kind):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits(6, 203, std=2.0, dtype=dtype, device=backend.device)
        loss, gradient = run(student, teacher, kind, temperature=1.5, reduction="none")
        expected, expected_gradient = reference(
            student, teacher, kind, temperature=1.5, reduction="none"
        )
        tolerances.assert_values(loss, expected, dtype, kind)
        scale = expected_gradient.abs().amax(-1, keepdim=True) + 1
        if kind == "hellinger":  # its slope, 1 / (2 D), multiplies every error
            scale = scale + 0.5 / expected[:, None]
        tolerances.assert_gradient(gradient, expected_gradient, scale, dtype)


@pytest.mark.parametrize(
    "kind",
    [
        "forward_kl",
        "reverse_kl",
        "jeffreys",
        "jensen_shannon",
        "squared_hellinger",
        "total_variation",
        "alpha",
        "triangular",
    ],
)
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01, 0.001])
def test_small_gaps_keep_their_relative_accuracy(backend, kind, gap):
    for std in (1.0, 5.0, 10.0):
        student, teacher = logits(4, 1500, gap=gap, std=std, device=backend.device)
        loss = kd.divergence(student, teacher, kind, reduction="none")
        expected, _ = reference(student, teacher, kind, reduction="none")
        tolerances.assert_values(loss, expected, torch.float32, kind)
        # Without the tolerance's floor, also where a row has nearly all its mass on one entry
        # (std 10).
        ratio = (loss.double() - expected).abs() / expected
        assert float(ratio[1:].max()) <= 1e-5


FAST_WAYS = [
    ("jensen_shannon", {"beta": 0.5}),
    ("jensen_shannon", {"beta": 0.1}),
    ("skew_forward_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("total_variation", {}),
    ("squared_hellinger", {}),
    ("triangular", {}),
    ("chi_squared", {}),
    ("alpha", {"alpha": 0.5}),
    ("alpha", {"alpha": 0.9}),
    ("alpha", {"alpha": 2.5}),
    ("alpha", {"alpha": -1.0}),
    ("alpha_beta", {"alpha": 0.3, "beta": 1.2}),
]


@pytest.mark.parametrize("kind, options", FAST_WAYS)
@pytest.mark.parametrize("gap", [3.0, 1.0, 0.3, 0.1, 0.01, 0.001])
def test_value_beside_a_gradient_keeps_its_relative_accuracy(backend, kind, options, gap):
    """On the CPU the loss of a student gradient in float32 has ways of its own, a row each."""
    if backend.name != "cpu":
        pytest.skip("has no such ways")
    # Without fused multiply-add (the baseline) exponentials lose three bits; AVX2's lose one, which
    # the two exponents of an AB divergence that do not add up to 1 show.
    isa = native.extension("_C").isa()
    loose = {"avx512": 1.0, "avx2": 1.0, "baseline": 8.0}[isa]
    value_bound = 3e-5 if kind == "alpha_beta" and isa != "avx512" else 1e-5
    value_bound = 1e-4 if isa == "baseline" else value_bound
    for std in (0.3, 3.0, 10.0):
        student, teacher = logits(2, 3000, gap=gap, std=std)
        student, teacher = student[1:], teacher[1:]  # the first one is collapsed
        loss, gradient = run(student, teacher, kind, reduction="sum", **options)
        expected, expected_gradient = reference(student, teacher, kind, reduction="sum", **options)
        assert math.isclose(loss, expected, rel_tol=value_bound)
        error = float((gradient.double() - expected_gradient).norm() / expected_gradient.norm())
        # Of d, rounded to 2e-6 at most where a logit is 60; a sign of d near 0 may be wrong.
        bound = 1e-5 / gap + 2e-5 if kind != "total_variation" else 0.02 + 1e-4 / gap
        assert error <= loose * bound


@pytest.mark.parametrize("kind", [k for k in ALL_KINDS if not KINDS[k].outer])
def test_a_coefficient_multiplies_value_and_gradient(backend, kind):
    student, teacher = logits(4, 203, std=2.0, device=backend.device)
    for reduction in ("mean", "none"):
        loss, gradient = run(student, teacher, ((kind, -0.25),), reduction=reduction)
        whole, whole_gradient = run(student, teacher, kind, reduction=reduction)
        torch.testing.assert_close(loss, -0.25 * whole, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(gradient, -0.25 * whole_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_small_gradients_of_a_collapsed_row(backend, reduction):
    """Two columns, one nearly certain: of the large entry's d, 3e-7, 4e-3 cancels."""
    student = torch.tensor([[7.7028, -1.4666], [2.0, 2.5]], device=backend.device)
    teacher = student + torch.tensor([[2.2e-3, -6e-4], [1e-4, 0.0]], device=backend.device)
    _, gradient = run(student, teacher, "hellinger", reduction=reduction)
    _, expected = reference(student, teacher, "hellinger", reduction="sum")
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-2, atol=0)
    assert float(gradient.sum(-1).abs().max()) <= 2e-5 * float(gradient.abs().max())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_equal_rows_give_exactly_zero(backend, kind):
    if kind == "cross_entropy":
        pytest.skip("cross entropy of equal rows is the entropy")
    student, _ = logits(4, 333, device=backend.device)
    loss, gradient = run(student, student, kind, reduction="none")
    assert torch.equal(loss.cpu(), torch.zeros(4))
    assert float(gradient.abs().max()) <= 1e-6


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_student_and_teacher_dtypes_are_independent(backend, dtypes):
    student, teacher = logits(4, 77, device=backend.device)
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    loss, gradient = run(student, teacher)
    expected, expected_gradient = reference(student, teacher)
    assert loss.dtype == torch.float32 and gradient.dtype == dtypes[0]
    tolerances.assert_values(loss, expected, dtypes[0])
    tolerances.assert_gradient(gradient, expected_gradient, 0.25, dtypes[0])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean", "sequence_mean"])
def test_reductions_with_labels_mask_and_weight(backend, reduction):
    student, teacher = logits(12, 65, device=backend.device)
    student, teacher = student.view(3, 4, 65), teacher.view(3, 4, 65)
    labels = torch.randint(0, 65, (3, 4), device=backend.device)
    labels[0, :2] = -100
    labels[2] = -100
    mask = torch.rand(3, 4, device=backend.device) < 0.8
    mask[1, 0] = True
    weight = torch.rand(3, 4, device=backend.device)
    options = dict(
        labels=labels,
        mask=mask,
        weight=weight,
        label_weight=0.3,
        temperature=1.3,
        temperature_squared=True,
        reduction=reduction,
    )
    loss, gradient = run(student, teacher, **options)
    expected, expected_gradient = reference(student, teacher, **options)
    tolerances.assert_values(loss, expected, torch.float32)
    tolerances.assert_gradient(gradient, expected_gradient, 2.0)
    chosen = (labels != -100) & mask
    assert float(gradient[~chosen].abs().max()) == 0.0
    if reduction == "none":
        assert loss.shape == (3, 4) and float(loss[~chosen].abs().max()) == 0.0
    # The reference itself, against the plain formula.
    log_p, log_q = (F.log_softmax(x.double() / 1.3, -1) for x in (teacher, student))
    rows = 1.69 * (log_p.exp() * (log_p - log_q)).sum(-1)
    nll = -F.log_softmax(student.double(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    rows = torch.where(chosen, (rows + 0.3 * nll) * weight, 0.0)
    per_entry = chosen.sum(-1)
    plain = {
        "none": rows,
        "sum": rows.sum(),
        "mean": rows.sum() / chosen.sum(),
        "batchmean": rows.sum() / 3,
        "sequence_mean": (rows.sum(-1) / per_entry.clamp(min=1)).sum() / (per_entry > 0).sum(),
    }[reduction]
    torch.testing.assert_close(expected, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_is_the_divisor(backend, as_tensor):
    student, teacher = logits(6, 20, device=backend.device)
    items = torch.tensor(17.0, device=backend.device) if as_tensor else 17
    loss = kd.divergence(student, teacher, num_items=items)
    total = kd.divergence(student, teacher, reduction="sum")
    torch.testing.assert_close(loss, total / 17, rtol=1e-6, atol=0)


def test_normalize_by_weights(backend):
    student, teacher = logits(6, 20, device=backend.device)
    weight = torch.rand(6, device=backend.device, requires_grad=True)
    loss = kd.divergence(student, teacher, weight=weight, normalize="weights")
    loss.backward()
    rows = kd.divergence(student, teacher, reduction="none").double()
    w = weight.detach().double().requires_grad_()
    expected = (rows * w).sum() / w.sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-6)


def test_temperatures_per_row_and_their_gradients(backend):
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    student, teacher = logits(5, 40, dtype=dtype, device=backend.device)
    tau = (torch.rand(5, dtype=dtype, device=backend.device) + 0.5).requires_grad_()
    other = (torch.rand(5, dtype=dtype, device=backend.device) + 0.5).requires_grad_()
    z = student.clone().requires_grad_()
    a = teacher.clone().requires_grad_()
    options = dict(temperature=tau, teacher_temperature=other, temperature_squared=True)
    kd.divergence(z, a, **options).backward()
    leaves = [x.detach().double().cpu().requires_grad_() for x in (z, a, tau, other)]
    log_q = F.log_softmax(leaves[0] / leaves[2][:, None], -1)
    log_p = F.log_softmax(leaves[1] / leaves[3][:, None], -1)
    ((log_p.exp() * (log_p - log_q)).sum(-1) * leaves[2] ** 2).mean().backward()
    for mine, theirs in zip((z, a, tau, other), leaves):
        torch.testing.assert_close(mine.grad.double().cpu(), theirs.grad, rtol=2e-4, atol=2e-5)


def test_padded_vocabularies_of_different_width(backend):
    student, _ = logits(4, 60, device=backend.device)
    _, teacher = logits(4, 64, device=backend.device)
    loss, gradient = run(student, teacher, vocab_size=50, teacher_vocab_size=50)
    expected, expected_gradient = run(student[:, :50], teacher[:, :50])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:, :50], expected_gradient, rtol=1e-5, atol=1e-8)
    assert float(gradient[:, 50:].abs().max()) == 0.0


def test_teacher_gets_its_gradient_where_it_requires_one(backend):
    for kind in ALL_KINDS:
        student, teacher = logits(4, 50, device=backend.device)
        z, a = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        kd.divergence(z, a, kind, temperature=1.5).backward()
        z64 = student.double().requires_grad_()
        a64 = teacher.double().requires_grad_()
        with kd.use_backend("torch"):
            kd.divergence(z64, a64, kind, temperature=1.5).backward()
        scale = a64.grad.abs().amax(-1, keepdim=True) + 0.25
        tolerances.assert_gradient(a.grad, a64.grad, scale)
        tolerances.assert_gradient(z.grad, z64.grad, z64.grad.abs().amax(-1, keepdim=True) + 0.25)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradcheck(double_backend, kind):
    student, teacher = logits(3, 9, std=1.0, dtype=torch.float64)
    z = student.requires_grad_()
    a = None if kind == "entropy" else teacher.requires_grad_()
    tau = torch.tensor([0.8, 1.0, 1.7], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 2, 8])

    def loss(z, a, tau, weight):
        return kd.divergence(
            z,
            a,
            kind,
            temperature=tau,
            teacher_temperature=1.3 if a is not None else None,
            weight=weight,
            labels=labels,
            label_weight=0.5,
            temperature_squared=True,
        )

    assert torch.autograd.gradcheck(loss, (z, a, tau, weight), atol=1e-7, rtol=1e-5)


def test_upstream_other_than_one_and_retain_graph(backend):
    student, teacher = logits(4, 30, device=backend.device)
    z = student.clone().requires_grad_()
    loss = kd.divergence(z, teacher)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 3.0, z, retain_graph=True)
    (third,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(first, third, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(second, 3 * first, rtol=1e-5, atol=6e-6)
    z = student.clone().requires_grad_()
    (scaled,) = torch.autograd.grad(kd.divergence(z, teacher) * 3.0, z)
    torch.testing.assert_close(scaled, 3 * first, rtol=1e-6, atol=1e-9)


def test_vector_upstream(backend):
    student, teacher = logits(4, 30, device=backend.device)
    z = student.clone().requires_grad_()
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5], device=backend.device)
    kd.divergence(z, teacher, reduction="none").backward(upstream)
    _, rows = run(student, teacher, reduction="none")
    torch.testing.assert_close(z.grad, rows * upstream[:, None], rtol=1e-5, atol=1e-8)


def test_double_backward_is_refused(backend):
    student, teacher = logits(2, 10, device=backend.device)
    z = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kd.divergence(z, teacher), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"kdkernels\.divergence has no second derivative"):
        gradient.sum().backward()
    # Beside a loss that has a gradient the penalty must not count for nothing either.
    loss = kd.divergence(z, teacher)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (loss + gradient.pow(2).sum()).backward()


def test_inplace_overwrites_the_logits_once(backend):
    student, teacher = logits(6, 130, device=backend.device)
    leaf = student.clone().requires_grad_()
    _, expected = run(student, teacher)
    middle = leaf * 1.0
    before = middle._version
    loss = kd.divergence(middle, teacher, inplace=True)
    assert middle._version > before
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-8)
    assert leaf.grad.data_ptr() != 0 and torch.equal(middle.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_inplace_is_seen_by_other_nodes(backend):
    student, teacher = logits(3, 11, device=backend.device)
    middle = student.clone().requires_grad_() * 1.0
    other = (middle * middle).sum()
    loss = kd.divergence(middle, teacher, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_forward_only_makes_no_gradient(backend, monkeypatch):
    student, teacher = logits(3, 11, device=backend.device)
    from kdkernels.ops import divergence as ops

    monkeypatch.setattr(ops, "empty_like", lambda t: pytest.fail("a gradient was allocated"))
    assert kd.divergence(student, teacher).requires_grad is False
    with torch.no_grad():
        kd.divergence(student.clone().requires_grad_(), teacher)


def test_named_functions(backend):
    student, teacher = logits(3, 11, device=backend.device)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation"):
        named = getattr(kd, name)(student, teacher, temperature=1.2)
        torch.testing.assert_close(named, kd.divergence(student, teacher, name, temperature=1.2))


def test_beta_and_alpha_per_row(backend):
    student, teacher = logits(5, 40, device=backend.device)
    beta = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], device=backend.device)
    for kind, name in (
        ("jensen_shannon", "beta"),
        ("skew_forward_kl", "alpha"),
        ("skew_reverse_kl", "alpha"),
        ("alpha", "alpha"),
        ("renyi", "alpha"),
    ):
        loss, gradient = run(student, teacher, kind, reduction="none", **{name: beta})
        for row in range(5):
            one, one_gradient = reference(
                student[row : row + 1],
                teacher[row : row + 1],
                kind,
                reduction="none",
                **{name: float(beta[row])},
            )
            tolerances.assert_values(loss[row : row + 1], one, torch.float32)
            tolerances.assert_gradient(gradient[row : row + 1], one_gradient, 2.0)


def test_alpha_beta_near_its_axes(backend):
    student, teacher = logits(3, 40, std=1.0, device=backend.device)
    for alpha, beta in ((1e-3, 0.7), (0.0, 0.7), (0.7, 1e-3), (0.7, 0.0), (0.6, -0.6), (0.0, 0.0)):
        loss, gradient = run(
            student, teacher, "alpha_beta", alpha=alpha, beta=beta, reduction="none"
        )
        expected, expected_gradient = reference(
            student, teacher, "alpha_beta", alpha=alpha, beta=beta, reduction="none"
        )
        torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-9)
        scale = expected_gradient.abs().amax(-1, keepdim=True) + 1
        tolerances.assert_gradient(gradient, expected_gradient, scale)


def test_clip_bounds_the_row_and_stops_its_gradient(backend):
    student, teacher = logits(6, 40, gap=2.0, device=backend.device)
    rows = kd.divergence(student, teacher, reduction="none")
    bound = float(rows.median())
    loss, gradient = run(student, teacher, clip=bound, reduction="none")
    torch.testing.assert_close(loss, rows.clamp(max=bound), rtol=1e-6, atol=0)
    assert float(gradient[rows > bound].abs().max()) == 0.0
    assert bool((gradient[rows < bound].abs().amax(-1) > 0).all())


def test_mean_over_no_rows_is_zero(backend):
    student, teacher = logits(3, 11, device=backend.device)
    labels = torch.full((3,), -100, device=backend.device)
    loss, gradient = run(student, teacher, labels=labels)
    assert loss.item() == 0.0 and float(gradient.abs().max()) == 0.0


def test_loss_is_deterministic(backend):
    student, teacher = logits(7, 500, device=backend.device)
    once, once_gradient = run(student, teacher, "jensen_shannon")
    again, again_gradient = run(student, teacher, "jensen_shannon")
    assert torch.equal(once, again) and torch.equal(once_gradient, again_gradient)


def test_cross_entropy_is_forward_kl_plus_entropy_of_the_teacher():
    student, teacher = logits(4, 100, dtype=torch.float64)
    cross = kd.divergence(student, teacher, "cross_entropy")
    entropy = kd.divergence(teacher, None, "entropy")
    assert math.isclose(cross, kd.divergence(student, teacher) + entropy, rel_tol=1e-10)


def test_return_stats_of_composed_calls():
    """A sum that takes two passes has the statistics of its rows; a changed row refuses."""
    student, teacher = logits(4, 33)
    pair = (("forward_kl", 0.5), ("hellinger", 0.5))
    loss, stats = kd.divergence(student, teacher, pair, return_stats=True)
    torch.testing.assert_close(loss, kd.divergence(student, teacher, pair))
    expected = kd.divergence(student, teacher, reduction="none")
    torch.testing.assert_close(stats.forward_kl, expected, rtol=1e-5, atol=0)
    for options in ({"standardize": True}, {"teacher_bias": torch.zeros(33)}, {"class_dim": 0}):
        with pytest.raises(ValueError, match="return_stats"):
            kd.divergence(student, teacher, return_stats=True, **options)
    with pytest.raises(ValueError, match="return_stats"):
        kd.divergence(student, [teacher, teacher], return_stats=True)
