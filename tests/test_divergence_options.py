"""kd.divergence's options beyond the plain call, against plain float64 statements of them."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import TAU, check, golden_rows, kl, leaves, logits, on

import kdkernels as kd
from kdkernels.functional.kinds import KINDS
from kdkernels.ops.divergence import _rows
from kdkernels.testing import tolerances


@pytest.fixture(params=(torch.float64, torch.float32), ids=("float64", "float32"))
def kernel_dtype(backend, request):
    """What the kernels themselves are tested in."""
    if request.param not in backend.dtypes:
        pytest.skip(f"{backend} has no {request.param}")
    return request.param


# Class dimension, bias. -------------------------------------------------------------------------


def test_class_dim(kernel_backend):
    z, a = logits(2, 5, 3, 4)
    labels = torch.randint(0, 5, (2, 3, 4))
    labels[0, 0, :2] = -100
    (z1, a1), (z2, a2) = on(kernel_backend, z, a), leaves(z, a)
    loss = kd.divergence(
        z1, a1, "reverse_kl", class_dim=1, labels=labels.to(kernel_backend.device), label_weight=0.3
    )
    p, q = a2.log_softmax(1), z2.log_softmax(1)
    rows = kl(q.movedim(1, -1), p.movedim(1, -1))
    rows = rows - 0.3 * q.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    check(loss, (z1, a1), rows[labels >= 0].mean(), (z2, a2))
    none = kd.divergence(z1, a1, class_dim=-3, reduction="none")
    assert none.shape == (2, 3, 4)


def test_channels_last_is_not_copied():
    z = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
    assert _rows(z.movedim(1, -1)).data_ptr() == z.data_ptr()


def test_teacher_bias(kernel_backend):
    z, a = logits(6, 9)
    bias = torch.randn(9, dtype=torch.float64)
    (z1, a1, b1), (z2, a2, b2) = on(kernel_backend, z, a, bias), leaves(z, a, bias)
    loss = kd.divergence(z1, a1, "cross_entropy", teacher_bias=b1, teacher_temperature=0.5)
    p = ((a2 + b2) / 0.5).softmax(-1)
    check(loss, (z1, a1, b1), -(p * z2.log_softmax(-1)).sum(-1).mean(), (z2, a2, b2))


# Clips. -----------------------------------------------------------------------------------------

CLIPS = [  # published values (kind, clip, value, gradient), temperature 1.7
    (
        "forward_kl",
        kd.Clip(element=0.02),
        0.0459335946,
        [0.0090377177, -0.010203511, 0.0259108433, -0.02474505],
    ),
    (
        "reverse_kl",
        kd.Clip(element=0.02),
        0.0487569768,
        [0.0230134724, -0.0062443241, -0.0099967611, -0.0067723871],
    ),
    (
        "forward_kl",
        kd.Clip(element=0.02, signed=True),
        -0.1165861465,
        [-0.0071556422, 0.0458787555, 0.0151830641, -0.0539061773],
    ),
    (
        "reverse_kl",
        kd.Clip(element=0.02, signed=True),
        -0.0387616946,
        [-0.0012091771, 0.0041877282, -0.0008010558, -0.0021774954],
    ),
    (
        "jensen_shannon",
        kd.Clip(element=0.01),
        0.0169405834,
        [0.0022772313, -0.0027526902, 0.0074493845, -0.0069739257],
    ),
    (
        "jensen_shannon",
        kd.Clip(element=0.01, signed=True),
        0.0169405834,
        [0.0022772313, -0.0027526902, 0.0074493845, -0.0069739257],
    ),
]


@pytest.mark.parametrize("kind, clip, value, gradient", CLIPS)
def test_element_clip_golden(backend, kind, clip, value, gradient):
    z, a = golden_rows(backend)
    loss = kd.divergence(z, a, kind, temperature=TAU, clip=clip)
    loss.backward()
    bound = 6e-10 if z.dtype == torch.float64 else 2e-6
    assert abs(loss.item() - value) <= bound
    torch.testing.assert_close(
        z.grad[0].cpu().double(), torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=bound
    )


COMBINED = (("forward_kl", 0.7), ("cross_entropy", 0.2), ("entropy", 0.1), ("skew_reverse_kl", 0.5))


KL_KINDS = ["forward_kl", "reverse_kl", "jeffreys", "skew_forward_kl", "skew_reverse_kl", COMBINED]


@pytest.mark.parametrize(
    "kind, signed",
    [(k, False) for k in [*KINDS, COMBINED] if k != "entropy"] + [(k, True) for k in KL_KINDS],
)
def test_element_clip_is_the_reference(backend, kernel_dtype, kind, signed):
    z, a = logits(5, 40)
    a[1, 3] = z[2, 4] = a[3, 5] = z[3, 5] = -math.inf
    a[4] = z[4]
    clip = kd.Clip(element=0.003, signed=signed)
    options = {"temperature": 1.3, "temperature_squared": True, "clip": clip}
    if kind in ("forward_kl", COMBINED):
        options |= {"labels": torch.tensor([1, -100, 3, 4, 5]), "label_weight": 0.5}
    (z1, a1) = on(backend, z, a, dtype=kernel_dtype)
    with kd.use_backend("torch"):
        z2, a2 = leaves(z1, a1)
        expected = kd.divergence(z2, a2, kind, reduction="none", **options)
        theirs = torch.autograd.grad(expected.sum(), (z2, a2))
    if "labels" in options:
        options["labels"] = options["labels"].to(backend.device)
    loss = kd.divergence(z1, a1, kind, reduction="none", **options)
    ours = torch.autograd.grad(loss.sum(), (z1, a1))
    whole = kd.divergence(z1, a1, kind, reduction="none", **{**options, "clip": None})
    assert not torch.equal(whole, loss), "nothing was clipped"
    tight = z1.dtype == torch.float64
    torch.testing.assert_close(
        loss.detach().cpu().double(), expected.detach(), rtol=1e-9 if tight else 1e-5,
        atol=1e-12 if tight else 3e-7,
    )  # fmt: skip
    for a, b in zip(ours, theirs):
        bound = 1e-9 if tight else 1e-5
        torch.testing.assert_close(a.cpu().double(), b, rtol=bound, atol=bound)


@pytest.mark.parametrize("detach", (False, True))
def test_signed_clip_of_a_detached_mixture(backend, detach):
    z, a = logits(3, 12)
    (z1, a1), (z2, a2) = on(backend, z, a), leaves(z, a)
    clip = kd.Clip(element=0.01, signed=True)
    loss = kd.divergence(z1, a1, "skew_reverse_kl", alpha=0.3, clip=clip, detach_mixture=detach)
    p, q = a2.softmax(-1), z2.softmax(-1)
    m = 0.7 * p + 0.3 * (q.detach() if detach else q)
    entries = q * (q / m).log()
    check(loss, (z1, a1), entries.clamp(max=0.01).sum(-1).mean(), (z2, a2))


@pytest.mark.parametrize("signed", (False, True))
def test_element_clip_gradcheck(double_backend, signed):
    z, a = logits(2, 7)
    clip = kd.Clip(element=0.02, signed=signed)
    for kind in ("jeffreys", "jensen_shannon", "skew_forward_kl", "chi_squared", "alpha_beta"):
        function = lambda z, a: kd.divergence(z, a, kind, clip=clip)  # noqa: E731, B023
        assert torch.autograd.gradcheck(function, (z.requires_grad_(), a.requires_grad_()))


def test_element_clip_bounds_infinite_rows(backend):
    z, a = on(backend, *logits(1, 6))
    with torch.no_grad():
        z[0, 2] = -math.inf
    loss = kd.divergence(z, a, "forward_kl", clip=kd.Clip(element=0.5))
    (gradient,) = torch.autograd.grad(loss, z)
    assert math.isfinite(loss.item()) and bool(gradient.isfinite().all())
    assert gradient[0, 2] == 0


def test_quantile_clip(kernel_backend):
    z, a = logits(3, 4, 20)
    mask = torch.rand(3, 4) < 0.8
    mask[0, 0], mask[0, 1] = True, False
    z[0, 1] = math.nan  # not selected
    (z1, a1), (z2, a2) = on(kernel_backend, z, a), leaves(z.nan_to_num(), a)
    clip = kd.Clip(quantile=0.6)
    loss = kd.divergence(
        z1,
        a1,
        temperature=2.0,
        temperature_squared=True,
        mask=mask.to(kernel_backend.device),
        clip=clip,
    )
    rows = kl((a2 / 2).log_softmax(-1), (z2 / 2).log_softmax(-1))[mask]
    bound = torch.quantile(rows.detach(), 0.6)
    check(loss, (z1, a1), 4 * torch.where(rows > bound, bound, rows).mean(), (z2, a2))
    tight = kd.divergence(
        z1, a1, mask=mask.to(kernel_backend.device), clip=kd.Clip(token=1e-3, quantile=0.6)
    )
    assert tight.item() == pytest.approx(1e-3, rel=1e-5)
    assert (
        kd.divergence(z1, a1, mask=torch.zeros_like(mask).to(kernel_backend.device), clip=clip) == 0
    )


# Mixes. -----------------------------------------------------------------------------------------


def test_logit_mix(kernel_backend):
    z, a = logits(4, 11)
    b = torch.randn(4, 11, dtype=torch.float64)
    c = torch.tensor([0.3, -0.5, 0.0, 1.5], dtype=torch.float64)
    b[2] = math.nan  # its coefficient is 0
    a[:, 5] = b[:, 5] = -math.inf
    b[0, 7] = -math.inf
    (z1, a1, b1), (z2, a2, b2) = on(kernel_backend, z, a, b), leaves(z, a, b)
    mix = kd.LogitMix([(0.4, kd.STUDENT), (1.2, a1), (c.to(z1), b1), (0.0, a1)])
    loss = kd.divergence(z1, mix, temperature=1.5, vocab_size=10, teacher_vocab_size=10)
    dead = torch.zeros(4, 11, dtype=torch.bool)
    dead[:, 5] = dead[0, 7] = True
    total = 0.4 * z2.detach() + 1.2 * a2.masked_fill(dead, 0.0)
    total = total + torch.where(c == 0, 0.0, c)[:, None] * b2.nan_to_num().masked_fill(dead, 0.0)
    lp = (total.masked_fill(dead, -math.inf) / 1.5)[:, :10].log_softmax(-1)
    check(loss, (z1, a1), kl(lp, (z2 / 1.5)[:, :10].log_softmax(-1)).mean(), (z2, a2))


def test_taid_is_a_logit_mix(kernel_backend):
    """Published: t = 0.4, tau = 1."""
    z, a = golden_rows(kernel_backend)
    loss = kd.divergence(z, kd.LogitMix([(0.6, kd.STUDENT), (0.4, a)]), "cross_entropy")
    loss.backward()
    bound = 6e-10 if z.dtype == torch.float64 else 2e-6
    assert abs(loss.item() - 1.0805064088) <= bound
    gradient = torch.tensor(
        [[0.0240389879, -0.0496793811, 0.0300564656, -0.0044160725]], dtype=torch.float64
    )
    torch.testing.assert_close(z.grad.cpu().double(), gradient, rtol=0, atol=bound)


def test_probability_mix(kernel_backend):
    z, a = logits(5, 8)
    b = torch.randn(5, 8, dtype=torch.float64)
    labels = torch.tensor([0, 3, -100, 7, 2])
    w = torch.tensor([0.5, 0.2, 0.0, 0.5, 0.1], dtype=torch.float64)
    a[1, 4] = b[1, 4] = a[3, 7] = b[3, 7] = -math.inf
    (z1, a1, b1), (z2, a2, b2) = on(kernel_backend, z, a, b), leaves(z, a, b)
    parts = [(((1 - w) * 0.25).to(z1), a1), (((1 - w) * 0.75).to(z1), b1)]
    mix = kd.ProbMix(parts, labels.to(kernel_backend.device), w.to(z1))
    loss = kd.divergence(z1, mix, "reverse_kl", temperature=1.3, teacher_temperature=2.0, clip=9.0)
    p = (1 - w)[:, None] * (0.25 * (a2 / 2).softmax(-1) + 0.75 * (b2 / 2).softmax(-1))
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), 8) * w[:, None]
    lq = (z2 / 1.3).log_softmax(-1)
    entries = lq.exp() * (lq - (p + hot).log())
    rows = entries.sum(-1)  # row 1 is infinite: an entry is impossible in the mix
    rows = torch.where(torch.arange(5) == 1, 9.0, rows)
    expected = torch.where(rows > 9, 9.0, rows).mean()
    (za, aa) = torch.autograd.grad(loss, (z1, a1))
    keep = torch.tensor([0, 2, 3, 4])
    zb, ab = torch.autograd.grad(rows[keep].sum() / 5, (z2, a2))
    tolerances.assert_values(loss.detach().cpu(), expected.detach(), z1.dtype)
    bound = 1e-9 if z1.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(za.cpu().double()[keep], zb[keep], rtol=bound, atol=bound)
    torch.testing.assert_close(aa.cpu().double()[keep], ab[keep], rtol=bound, atol=bound)


def test_mapped(kernel_backend):
    z, _ = logits(4, 6)
    wide = torch.randn(4, 9, dtype=torch.float64)
    index = torch.tensor([8, 0, -1, 3, 3, 5])
    (z1, w1), (z2, w2) = on(kernel_backend, z, wide), leaves(z, wide)
    loss = kd.divergence(z1, kd.Mapped(w1, index.to(kernel_backend.device)))
    lp = w2[:, index.clamp(min=0)].masked_fill(index < 0, -math.inf).log_softmax(-1)
    check(loss, (z1, w1), kl(lp, z2.log_softmax(-1)).mean(), (z2, w2))


def test_mixes_refuse():
    z, a = logits(2, 6)
    with pytest.raises(ValueError, match="vocabularies, 5 and 6 columns"):
        kd.divergence(z, kd.LogitMix([(0.5, kd.STUDENT), (0.5, a[:, :5])]))
    with pytest.raises(ValueError, match="add up to 1"):
        kd.ProbMix([(0.5, a), (0.4, a)])
    with pytest.raises(ValueError, match="1 in sum"):
        kd.divergence(z, kd.ProbMix([(0.5, a), (torch.full((2,), 0.4).double(), a)]))
    with pytest.raises(ValueError, match="require grad"):
        kd.LogitMix([(torch.tensor(0.5, requires_grad=True), a)])
    with pytest.raises(ValueError, match="leading shape"):
        kd.divergence(z, kd.LogitMix([(0.5, a[:1])]))
    with pytest.raises(ValueError, match="index"):
        kd.divergence(z, kd.Mapped(a, torch.tensor([0, 1, 2, 3, 4, 6])))
    with pytest.raises(ValueError, match="standardize"):
        kd.divergence(z, kd.ProbMix([(1.0, a)]), standardize=True)
    with pytest.raises(TypeError, match="teacher"):
        kd.divergence(z, "a")


# Several teachers. ------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", (False, True))
@pytest.mark.parametrize("option", ("plain", "token", "weights"))
def test_several_teachers(kernel_backend, per_row, option):
    z, a = logits(3, 4, 10)
    b = torch.randn(3, 4, 10, dtype=torch.float64)
    w = torch.rand(3, 4, 2, dtype=torch.float64) if per_row else torch.tensor([0.3, 1.2]).double()
    weight = torch.rand(3, 4, dtype=torch.float64)
    labels = torch.randint(0, 10, (3, 4))
    labels[1, 1] = -100
    (z1, a1, b1, w1), (z2, a2, b2, w2) = on(kernel_backend, z, a, b, w), leaves(z, a, b, w)
    options = {"token": {"clip": 1.1}, "weights": {"normalize": "weights"}}.get(option, {})
    loss = kd.divergence(
        z1, [a1, b1], "forward_kl", temperature=1.4, temperature_squared=True, teacher_weights=w1,
        labels=labels.to(kernel_backend.device), label_weight=0.3, weight=weight.to(z1), **options,
    )  # fmt: skip
    lq = (z2 / 1.4).log_softmax(-1)
    rows = sum(w2[..., k] * kl((t / 1.4).log_softmax(-1), lq) for k, t in enumerate((a2, b2)))
    if option == "token":
        assert 0 < (rows > 1.1).sum() < 12
        rows = torch.where(rows > 1.1, 1.1, rows)
    nll = -z2.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    rows = ((1.4**2 * rows + 0.3 * nll) * weight)[labels >= 0]
    divisor = weight[labels >= 0].sum() if option == "weights" else rows.numel()
    check(loss, (z1, a1, b1, w1), rows.sum() / divisor, (z2, a2, b2, w2))


def test_weights_of_composed_calls():
    z, a = logits(3, 6)
    options = {"standardize": True, "temperature_squared": True, "clip": kd.Clip(quantile=0.5)}
    tau = torch.full((3,), 2.0, dtype=torch.float64)
    single = kd.divergence(z.float(), a.float(), temperature=tau, **options)
    assert single.dtype == torch.float32
    w = torch.tensor([1.0, 0.0, 2.0])
    rows = kd.divergence(z, a, temperature=tau, reduction="none", **options)
    total = kd.divergence(z, a, temperature=tau, weight=w, reduction="sum", **options)
    assert total.item() == pytest.approx((rows * w).sum().item())
    with pytest.raises(TypeError, match="weight"):
        kd.divergence(z, a, weight=[1.0, 2.0, 3.0], **options)
    with pytest.raises(ValueError, match="weight"):
        kd.divergence(z, a, weight=torch.ones(2), **options)
    with pytest.raises(ValueError, match="coefficient"):
        kd.divergence(z, [a, a], teacher_weights=[0.0, 0.0])


def test_teacher_weights_refuse():
    z, a = logits(2, 6)
    for weights, error in (([1.0], ValueError), (torch.ones(3), ValueError), ("x", TypeError)):
        with pytest.raises(error, match="teacher_weights"):
            kd.divergence(z, [a, a], teacher_weights=weights)
    with pytest.raises(ValueError, match="teacher_weights"):
        kd.divergence(z, a, teacher_weights=[1.0])
    assert kd.divergence(z, [a, a]).item() == pytest.approx(2 * kd.divergence(z, a).item())


# Sums and far rows. -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("hellinger", "bhattacharyya", "renyi"))
def test_a_sum_with_a_function_of_a_sum(kernel_backend, kind):
    z, a = on(kernel_backend, *logits(4, 9))
    labels = torch.tensor([1, 2, -100, 3], device=kernel_backend.device)
    options = {"labels": labels, "temperature": 2.0, "temperature_squared": True}
    pair = (("forward_kl", 0.5), ("entropy", 0.1), (kind, 2.0))
    loss = kd.divergence(z, a, pair, label_weight=0.2, **options)
    expected = kd.divergence(z, a, pair[:2], label_weight=0.2, **options)
    expected = expected + 2 * kd.divergence(z, a, kind, **options)
    check(loss, (z,), expected.cpu().double(), (z,))
    alone = kd.divergence(
        z, a, ((kind, 0.0),), label_weight=0.2, clip=kd.Clip(quantile=0.5), **options
    )
    nll = torch.nn.functional.cross_entropy(z, labels)
    assert alone.item() == pytest.approx(0.2 * nll.item(), rel=1e-6)
    bounded = kd.divergence(z, a, pair, clip=1e-3, **options)
    assert bounded.item() == pytest.approx(4e-3, rel=1e-5)


@pytest.mark.parametrize("distance", (20.0, 60.0, 100.0))
@pytest.mark.parametrize("kind", ("bhattacharyya", "renyi"))
def test_rows_that_hardly_overlap(backend, kernel_dtype, kind, distance):
    """1 - overlap is 1 in float32 from 17 on, in float64 from 37 on."""
    z = torch.tensor([[distance, 0.0, 0.3, -1.0], [0.0, 1.0, 0.5, 0.2]], dtype=torch.float64)
    a = torch.tensor([[0.0, distance, -0.5, 1.0], [0.0, 0.5, 0.7, 0.1]], dtype=torch.float64)
    (z1, a1), (z2, a2) = on(backend, z, a, dtype=kernel_dtype), leaves(z, a)
    options = {"alpha": 0.4} if kind == "renyi" else {}
    loss = kd.divergence(z1, a1, kind, reduction="none", **options)
    alpha = options.get("alpha", 0.5)
    power = torch.logsumexp(alpha * a2.log_softmax(-1) + (1 - alpha) * z2.log_softmax(-1), -1)
    check(loss, (z1, a1), -power if kind == "bhattacharyya" else power / (alpha - 1), (z2, a2))
    mean = kd.divergence(z1, a1, kind, **options)  # the gradient made in the forward pass
    forward = torch.autograd.grad(mean, z1)[0]
    backward = torch.autograd.grad(
        kd.divergence(z1, a1, kind, reduction="none", **options).mean(), z1
    )
    torch.testing.assert_close(forward, backward[0], rtol=1e-5, atol=1e-6)


def test_disjoint_rows_have_no_gradient(backend):
    z = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]], dtype=torch.float64)
    a = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0]], dtype=torch.float64)
    for kind in ("bhattacharyya", "renyi"):
        z1, a1 = on(backend, z, a)
        loss = kd.divergence(z1, a1, kind)
        assert loss.item() == math.inf
        for gradient in torch.autograd.grad(loss, (z1, a1)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("distance", (18.0, 30.0))
def test_chi_squared_far_apart(backend, kernel_dtype, distance):
    z = torch.tensor([[0.0, 1.0, -distance, 0.5], [-distance, 0.3, 0.0, 0.1]], dtype=torch.float64)
    a = torch.tensor([[0.2, 0.0, 1.0, -distance], [0.1, -distance, 0.2, 0.0]], dtype=torch.float64)
    (z1, a1), (z2, a2) = on(backend, z, a, dtype=kernel_dtype), leaves(z, a)
    loss = kd.divergence(z1, a1, "chi_squared", reduction="none")
    p, q = a2.softmax(-1), z2.softmax(-1)
    expected = ((p - q) ** 2 / q).sum(-1)
    tolerances.assert_values(loss.detach().cpu(), expected.detach(), z1.dtype)
    rtol = 1e-9 if z1.dtype == torch.float64 else 1e-4
    for x, y in zip(
        torch.autograd.grad(loss.sum(), (z1, a1)), torch.autograd.grad(expected.sum(), (z2, a2))
    ):
        scale = y.abs().amax(-1, keepdim=True)
        assert bool(((x.cpu().double() - y).abs() <= rtol * scale).all())
        # Entries of the teacher's own size, however small beside the row's largest.
        small = (p.detach() < 1e-6) & (y != 0)
        share = (x.cpu().double() / y)[small]
        torch.testing.assert_close(share, torch.ones_like(share), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha, beta", ((1.0, -2.0), (-2.0, 1.0), (0.5, -0.5), (-0.5, 0.5)))
def test_opposed_exponents_at_zeros(backend, alpha, beta):
    for impossible in ("student", "teacher"):
        z, a = on(backend, *logits(1, 5))
        with torch.no_grad():
            (z if impossible == "student" else a)[0, 1] = -math.inf
        loss = kd.divergence(z, a, "alpha_beta", alpha=alpha, beta=beta)
        assert loss.item() == math.inf
        assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_nan_weight_of_unselected_rows(backend):
    z, a = on(backend, *logits(3, 6))
    mask = torch.tensor([True, False, True], device=backend.device)
    weight = torch.tensor([1.0, math.nan, 2.0], device=backend.device).to(z)
    for normalize in ("rows", "weights"):
        loss = kd.divergence(z, a, mask=mask, weight=weight, normalize=normalize)
        clean = kd.divergence(z, a, mask=mask, weight=weight.nan_to_num(), normalize=normalize)
        assert loss.item() == clean.item()
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
    if backend.device == "cpu":
        with pytest.raises(ValueError, match="weight"):
            kd.divergence(z, a, weight=weight)


@pytest.mark.parametrize("tau", (1.0, 2.0))
@pytest.mark.parametrize("with_teacher", (False, True))
def test_labels_alone(backend, tau, with_teacher):
    z, a = logits(3, 40)
    labels = torch.tensor([4, -100, 39])
    (z1,), (z2,) = on(backend, z), leaves(z)
    kind = (("forward_kl", 0.0), ("reverse_kl", 0.0))
    loss = kd.divergence(
        z1, a.to(z1) if with_teacher else None, kind, temperature=tau, label_weight=0.5,
        labels=labels.to(backend.device),
    )  # fmt: skip
    check(loss, (z1,), 0.5 * torch.nn.functional.cross_entropy(z2, labels), (z2,))
    with pytest.raises(ValueError, match="coefficient"):
        kd.divergence(z1, a.to(z1), kind)


# Autograd of the compositions. ------------------------------------------------------------------


def test_options_compile_and_func(kernel_backend):
    if kernel_backend.name != "cpu":
        pytest.skip("what is composed does not depend on the kernel")
    backend = kernel_backend
    z, a = on(backend, *logits(4, 8))
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])

    def loss(z):
        mixed = kd.divergence(z, kd.LogitMix([(0.5, kd.STUDENT), (0.5, a)]), "cross_entropy")
        several = kd.divergence(
            z, [a, 2 * a], teacher_weights=[0.5, 0.5], clip=kd.Clip(quantile=0.5)
        )
        restricted = kd.divergence(z, a, support=ids, standardize=True, temperature_squared=True)
        return mixed + several + restricted + kd.divergence(z, a, clip=kd.Clip(element=0.01))

    (expected,) = torch.autograd.grad(loss(z), z)
    torch.testing.assert_close(torch.func.grad(loss)(z.detach()), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z)[0], expected)
