"""Standardised rows, restricted rows and stored teachers of kd.divergence, against plain float64
statements of them."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import TAU, golden_rows, leaves, logits, on

import kdkernels as kd
from kdkernels.testing import tolerances

# Standardised rows. -----------------------------------------------------------------------------


def test_standardize_golden(kernel_backend):
    """The published value takes the unbiased deviation: another temperature of ours."""
    z, a = golden_rows(kernel_backend)
    value = kd.divergence(z, a, temperature=TAU * math.sqrt(4 / 3), standardize=True)
    bound = 3e-7 if z.dtype == torch.float64 else 2e-6  # the published form adds 1e-7
    assert abs(TAU**2 * value.item() - 0.2970303150) <= bound


@pytest.mark.parametrize("per_row", (False, True))
def test_standardize(kernel_backend, per_row):
    z, a = logits(4, 9)
    a[0, 3] = z[0, 3] = -math.inf
    labels = torch.tensor([2, 1, -100, 4])
    z[2] = math.nan
    tau = torch.tensor([1.5, 2.0, 1.0, 0.7], dtype=torch.float64) if per_row else 2.0
    (z1, a1), (z2, a2) = on(kernel_backend, z, a), leaves(z, a)
    loss = kd.divergence(
        z1, a1, "reverse_kl", temperature=tau.to(z1) if per_row else tau, temperature_squared=True,
        standardize=True, labels=labels.to(kernel_backend.device), label_weight=0.25, clip=2.0,
    )  # fmt: skip
    rows = []
    for i in (0, 1, 3):
        t = tau[i] if per_row else tau
        alive = z[i] > -math.inf
        score = [(x - x.mean()) / x.std(correction=0) for x in (z2[i][alive], a2[i][alive])]
        lq, lp = ((s / t).log_softmax(-1) for s in score)
        value = (lq.exp() * (lq - lp)).sum().clamp(max=2.0)
        rows.append(t**2 * value - 0.25 * z2[i][alive].log_softmax(-1)[_place(alive, labels[i])])
    alive = z > -math.inf
    expected = torch.stack(rows).mean()
    tolerances.assert_values(loss.detach().cpu(), expected.detach(), z1.dtype)
    bound = 1e-9 if z1.dtype == torch.float64 else 2e-5
    for ours, theirs in zip(
        torch.autograd.grad(loss, (z1, a1)), torch.autograd.grad(expected, (z2, a2))
    ):
        torch.testing.assert_close(
            ours.cpu().double()[alive], theirs[alive], rtol=bound, atol=bound
        )
        assert (ours[2] == 0).all() and ours[0, 3] == 0


def _place(alive, label):
    return int(alive[: int(label)].sum())


def test_standardized_constant_row_is_uniform(kernel_backend):
    z, a = on(kernel_backend, *logits(1, 5))
    loss = kd.divergence(torch.full_like(z, 3.0), a, "cross_entropy", standardize=True)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)


# Support. ---------------------------------------------------------------------------------------

SUPPORTED = [  # published values for ids {3, 1}, temperature 1.7
    ("renormalize_both", "forward_kl", 0.1060376644, [0, -0.1162492966, 0, 0.1162492966]),
    ("renormalize_both", "reverse_kl", 0.0915861397, [0, -0.0893759384, 0, 0.0893759384]),
    (
        "bucket",
        "forward_kl",
        0.1096035975,
        [0.0456795334, -0.0955998477, 0.0302617835, 0.0196585308],
    ),
    (
        "bucket",
        "reverse_kl",
        0.0895216239,
        [0.0407662049, -0.0637155694, 0.027006801, -0.0040574364],
    ),
    ("renormalize", "forward_kl", 0.6660451303, None),
    (
        "ignore",
        "cross_entropy",
        0.9329873415,
        [0.1062506952, -0.1144156595, 0.0703889751, -0.0622240107],
    ),
    (
        "ignore",
        "forward_kl",
        0.2169586045,
        [0.1062506952, -0.1144156595, 0.0703889751, -0.0622240107],
    ),
]


@pytest.mark.parametrize("tail, kind, value, gradient", SUPPORTED)
def test_support_golden(kernel_backend, tail, kind, value, gradient):
    z, a = golden_rows(kernel_backend)
    ids = torch.tensor([[3, 1, -1]], device=kernel_backend.device)
    loss = kd.divergence(z, a, kind, temperature=TAU, support=(ids, tail))
    loss.backward()
    bound = 6e-10 if z.dtype == torch.float64 else 2e-6
    assert abs(loss.item() - value) <= bound
    if gradient is not None:
        torch.testing.assert_close(
            z.grad[0].cpu().double(),
            torch.tensor(gradient, dtype=torch.float64),
            rtol=0,
            atol=bound,
        )


def test_support_of_everything_is_dense(kernel_backend):
    z, a = on(kernel_backend, *logits(3, 7))
    with torch.no_grad():
        z[0, 2] = a[0, 2] = -math.inf
    ids = torch.stack([torch.randperm(7) for _ in range(3)]).to(kernel_backend.device)
    labels = torch.tensor([1, 2, -100], device=kernel_backend.device)
    tau = torch.tensor([1.0, 2.0, 3.0], device=kernel_backend.device).to(z)
    options = {"temperature": tau, "temperature_squared": True, "labels": labels, "label_weight": 1}
    for kind in ("jensen_shannon", "hellinger"):
        dense = kd.divergence(z, a, kind, **options)
        for tail in ("bucket", "renormalize", "renormalize_both"):
            sparse = kd.divergence(z, a, kind, support=(ids, tail), **options)
            tolerances.assert_values(sparse.detach(), dense.detach(), z.dtype, kind)
            for x, y in zip(
                torch.autograd.grad(sparse, (z, a)),
                torch.autograd.grad(dense, (z, a), retain_graph=True),
            ):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_support_refuses():
    z, a = logits(2, 6)
    ids = torch.tensor([[0, 1], [2, 2]])
    with pytest.raises(ValueError, match="distinct"):
        kd.divergence(z, a, support=ids)
    z[1] = a[1] = math.nan  # not selected, like its ids
    z.requires_grad_()
    loss = kd.divergence(z, a, support=ids, mask=torch.tensor([True, False]))
    (gradient,) = torch.autograd.grad(loss, z)
    assert math.isfinite(loss.item()) and bool((gradient[1] == 0).all())
    z, a = logits(2, 6)
    with pytest.raises(ValueError, match="distinct"):
        kd.divergence(z, a, support=torch.tensor([[0, 6], [2, 3]]))
    with pytest.raises(ValueError, match="tail"):
        kd.divergence(z, a, support=(ids, "rest"))
    with pytest.raises(ValueError, match="no reverse_kl"):
        kd.divergence(z, a, "reverse_kl", support=(ids, "ignore"))
    with pytest.raises(TypeError, match="support"):
        kd.divergence(z, a, support=[0, 1])


FORMS = ("log_probs", "probs", "logits")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tail", ("bucket", "renormalize", "renormalize_both", "ignore"))
def test_stored_teacher_is_a_support(kernel_backend, tail, form):
    z, a = on(kernel_backend, *logits(4, 9))
    a = a.detach()
    labels = torch.tensor([1, 2, -100, 3], device=kernel_backend.device)
    kept = a.topk(4, -1)
    ids = kept.indices.clone()
    ids[0, 3], ids[2] = -1, 0  # ragged; the duplicates of row 2 are not selected
    lse = (a / 1.5).logsumexp(-1)
    values = {"logits": kept.values, "log_probs": kept.values / 1.5 - lse[:, None]}
    values["probs"] = values["log_probs"].exp()
    teacher = kd.TopK(values[form], ids, form, tail, lse, 1.5)
    options = {"temperature": 2.0, "teacher_temperature": 1.5, "temperature_squared": True}
    options |= {"labels": labels, "label_weight": 0.5}
    kind = (("forward_kl", 0.7), ("cross_entropy", 0.3))
    ours = kd.divergence(z, teacher, kind, **options)
    theirs = kd.divergence(z, a, kind, support=(ids, tail), **options)
    bound = (
        {"rtol": 1e-9, "atol": 1e-12} if z.dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(ours, theirs, **bound)
    gradients = (torch.autograd.grad(x, z)[0] for x in (ours, theirs))
    torch.testing.assert_close(*gradients, **bound)


def test_stored_teacher_at_another_temperature():
    z, a = logits(3, 6)
    everything = a.log_softmax(-1).topk(6, -1)
    teacher = kd.TopK(everything.values, everything.indices)
    for kind in ("forward_kl", "jensen_shannon"):
        dense = kd.divergence(z, a, kind, temperature=2.0)
        assert kd.divergence(z, teacher, kind, temperature=2.0).item() == pytest.approx(
            dense.item()
        )
    with pytest.raises(ValueError, match="teacher_temperature"):
        kd.divergence(
            z, kd.TopK(everything.values, everything.indices, tail="ignore"), temperature=2.0
        )
    with pytest.raises(ValueError, match="lse"):
        kd.divergence(z, kd.TopK(everything.values, everything.indices, "logits"))
    with pytest.raises(ValueError, match="without support"):
        kd.divergence(z, teacher, standardize=True)
    with pytest.raises(ValueError, match="leading shape"):
        kd.divergence(z[:2], teacher)
