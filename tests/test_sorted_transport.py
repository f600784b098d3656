"""kd.sorted_transport (ULD): against torch.sort in float64, ties, vocabularies of different size,
row scales, exclusions, autograd."""

from __future__ import annotations

import pytest
import torch

import kdkernels as kd

FAMILY = "transport"
on_backends = pytest.mark.parametrize("backend", ("torch", "cpu", "simt", "cuda"), indirect=True)


def by_sort(student, teacher, tau=1.0, tau_t=1.0, cs=None, ct=None, ex_s=None, ex_t=None):
    """Row values by sorting probabilities, as the published code does."""

    def side(z, t, scale, out):
        p = (z / t).softmax(-1)
        if out is not None:
            p = p[:, ~out]
        if scale is not None:
            p = p * scale[:, None]
        return p.sort(-1, descending=True).values

    p, q = side(student, tau, cs, ex_s), side(teacher, tau_t, ct, ex_t)
    width = max(p.shape[1], q.shape[1])
    p = torch.nn.functional.pad(p, (0, width - p.shape[1]))
    q = torch.nn.functional.pad(q, (0, width - q.shape[1]))
    return (p - q).abs().sum(-1)


def rows(width, other, dtype, device, seed=0, std=3.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, width, generator=generator) * std
    a = torch.randn(4, other, generator=generator) * std
    a[2, other // 2] += 25.0  # a collapsed row
    return z.to(device, dtype).requires_grad_(), a.to(device, dtype)


@on_backends
@pytest.mark.parametrize("width, other", ((1, 1), (7, 5), (300, 431), (1000, 1000)))
def test_values_and_gradients(backend, width, other):
    if backend.name == "simt" and width > 300:
        width = other = 333
    for dtype in backend.dtypes:
        z, a = rows(width, other, dtype, backend.device, std=3.0)
        value = kd.sorted_transport(
            z, a, temperature=1.5, teacher_temperature=0.8, reduction="none"
        )
        upstream = torch.linspace(0.5, 2.0, 4, dtype=value.dtype, device=backend.device)
        (grad,) = torch.autograd.grad(value, z, upstream)
        own = z.detach().double().requires_grad_()
        expected = by_sort(own, a.double(), 1.5, 0.8)
        bound = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(value.double(), expected, rtol=bound, atol=bound)
        with kd.use_backend("torch"):  # ties get the mean of their signs there too
            reference = kd.sorted_transport(
                own, a.double(), temperature=1.5, teacher_temperature=0.8, reduction="none"
            )
            (want,) = torch.autograd.grad(reference, own, upstream.double())
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, bound)
        torch.testing.assert_close(grad.double(), want, rtol=2 * rounding, atol=max(bound, 3e-8))
        scalar = kd.sorted_transport(z, a, temperature=1.5, teacher_temperature=0.8)
        torch.testing.assert_close(scalar, value.mean())
        (mean_grad,) = torch.autograd.grad(scalar, z)
        torch.testing.assert_close(
            mean_grad.double(),
            torch.autograd.grad(reference_mean(own, a), own)[0],
            rtol=2 * rounding,
            atol=max(bound, 3e-8),
        )


def reference_mean(z, a):
    with kd.use_backend("torch"):
        return kd.sorted_transport(z, a.double(), temperature=1.5, teacher_temperature=0.8)


@on_backends
def test_gradient_without_ties_is_that_of_the_sort(backend):
    z, a = rows(257, 200, torch.float32, backend.device, seed=1)
    (grad,) = torch.autograd.grad(kd.sorted_transport(z, a, reduction="sum"), z)
    own = z.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(by_sort(own, a.double()).sum(), own)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-7)


@on_backends
def test_scales_exclusions_weights_and_their_gradients(backend):
    for dtype in (torch.float32, torch.bfloat16):
        z, a = rows(90, 120, dtype, backend.device, seed=2)
        cs = torch.tensor([1.0, 0.5, 0.1, 2.0], device=backend.device, requires_grad=True)
        ct = torch.tensor([0.7, 1.0, 0.3, 1.0], device=backend.device, requires_grad=True)
        ex_s = torch.tensor([0, 5, 89, 40], device=backend.device)
        ex_t = torch.zeros(120, dtype=torch.bool, device=backend.device)
        ex_t[60:75] = True
        weight = torch.tensor([1.0, 2.0, 0.0, 1.0], device=backend.device)
        options = {"exclude_student": ex_s, "exclude_teacher": ex_t, "weight": weight}
        value = kd.sorted_transport(
            z, a, student_row_scale=cs, teacher_row_scale=ct, reduction="sum", **options
        )
        grads = torch.autograd.grad(value, (z, cs, ct))
        own = [t.detach().double().requires_grad_() for t in (z, cs, ct)]
        out = torch.zeros(90, dtype=torch.bool, device=backend.device)
        out[ex_s] = True
        expected = (by_sort(own[0], a.double(), 1, 1, own[1], own[2], out, ex_t) * weight).sum()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        for got, want in zip(grads[1:], torch.autograd.grad(expected, own[1:], retain_graph=True),
                             strict=True):  # fmt: skip
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        plain = kd.sorted_transport(
            z, a, student_row_scale=cs.detach(), teacher_row_scale=ct.detach(), reduction="sum",
            **options,
        )  # fmt: skip
        (fused,) = torch.autograd.grad(plain, z)
        torch.testing.assert_close(fused, grads[0])
        if dtype == torch.float32:
            (want,) = torch.autograd.grad(expected, own[0])
            torch.testing.assert_close(grads[0].double(), want, rtol=1e-5, atol=1e-6)


@on_backends
def test_ties_share_the_mean_of_their_signs(backend):
    # Student values .4 .4 .2 against .5 .3 .2: ranks 0 and 1 tie with signs - and +.
    z = torch.tensor([[0.4, 0.4, 0.2]], device=backend.device).log().requires_grad_()
    a = torch.tensor([[0.5, 0.3, 0.2]], device=backend.device).log()
    value = kd.sorted_transport(z, a)
    (grad,) = torch.autograd.grad(value, z)
    assert value.item() == pytest.approx(0.2, abs=1e-6)
    assert float(grad[0, :2].abs().max()) < 0.2 + 1e-6
    assert grad[0, 0].item() == pytest.approx(grad[0, 1].item(), abs=1e-7)
    # Three tied entries with signs -, +, + share 1/3.
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.tensor([[0.3, 0.1, 0.3, 0.3]], dtype=torch.float64, device=backend.device)
        q = torch.tensor([[0.2, 0.4, 0.15, 0.25]], dtype=torch.float64, device=backend.device)
        z = p.log().to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(kd.sorted_transport(z, q.log().to(dtype)), z)
        p = z.detach().double().softmax(-1)
        sign = torch.tensor([[1 / 3, -1.0, 1 / 3, 1 / 3]], dtype=torch.float64).to(p)
        want = p * (sign - (sign * p).sum(-1, keepdim=True))
        bound = 1e-6 if dtype == torch.float32 else 2.0**-8
        torch.testing.assert_close(grad.double(), want, rtol=bound, atol=1e-7)
    equal = torch.zeros(2, 50, device=backend.device, requires_grad=True)
    (grad,) = torch.autograd.grad(kd.sorted_transport(equal, equal.detach()), equal)
    assert torch.equal(grad, torch.zeros_like(grad))


@on_backends
def test_masks_infinities_and_nan(backend):
    for dtype in (torch.float32, torch.bfloat16):
        z, a = rows(40, 30, dtype, backend.device, seed=3)
        z = z.detach().clone()
        z[0, :7] = -torch.inf
        z[1] = torch.nan
        a[3] = -torch.inf
        z.requires_grad_()
        mask = torch.tensor([True, False, True, True], device=backend.device)
        value = kd.sorted_transport(z, a, mask=mask, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), z)
        assert value[1].item() == 0.0 and value[3].item() == 0.0
        assert grad.isfinite().all() and not grad[1].any() and not grad[3].any()
        assert not grad[0, :7].any()
        expected = by_sort(z[[0, 2]].double(), a[[0, 2]].double())
        torch.testing.assert_close(value[[0, 2]].double(), expected, rtol=1e-5, atol=1e-6)
        total = kd.sorted_transport(z, a, mask=mask)
        torch.testing.assert_close(total, value.sum() / 3)
        torch.testing.assert_close(
            kd.sorted_transport(z, a, mask=mask, num_items=6), value.sum() / 6
        )
        bad = kd.sorted_transport(z, a, reduction="none")
        (grad,) = torch.autograd.grad(bad.sum(), z)
        assert bad[1].isnan() and grad[1].isnan().all() and grad[[0, 2, 3]].isfinite().all()


@on_backends
def test_mixed_dtypes_teacher_gradient_and_second_backward(backend):
    z, a = rows(60, 80, torch.bfloat16, backend.device, seed=4)
    teacher = a.float().requires_grad_()
    value = kd.sorted_transport(z, teacher)
    torch.testing.assert_close(
        value.double(), by_sort(z.double(), teacher.double()).mean(), rtol=1e-5, atol=1e-6
    )
    (grad,) = torch.autograd.grad(value, teacher)
    own = teacher.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(by_sort(z.double(), own).mean(), own)
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)
    loss = 3.0 * kd.sorted_transport(z, a.float())
    first = torch.autograd.grad(loss, z, retain_graph=True)[0]
    second = torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-6)


@on_backends
def test_upcast_half_logits_tie_heavily(backend):
    """float32 rows that hold bf16 values are sorted, bf16 rows counted: the same numbers."""
    z, a = rows(400, 350, torch.bfloat16, backend.device, seed=5, std=2.0)
    wide = z.detach().float().requires_grad_()
    value, other = kd.sorted_transport(z, a), kd.sorted_transport(wide, a.float())
    torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    (grad,), (want,) = torch.autograd.grad(value, z), torch.autograd.grad(other, wide)
    torch.testing.assert_close(grad.float(), want, rtol=1e-2, atol=1e-6)


def test_autograd_compile_functorch_opcheck():
    z, a = rows(20, 30, torch.float64, "cpu")

    def f(x):
        return kd.sorted_transport(x, a, reduction="sum")

    assert torch.autograd.gradcheck(f, (z,))
    expected = torch.autograd.grad(f(z), z)[0]
    torch.testing.assert_close(torch.func.grad(f)(z.detach()), expected)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z)[0], expected)
    torch.library.opcheck(
        torch.ops.kdkernels.sorted_transport.default,
        (z, a, None, None, None, None, None, 1.0, 1.0),
    )


def test_float16_gradient_keeps_what_the_loss_scale_saves():
    z, a = rows(3000, 3000, torch.float16, "cpu", std=2.0)
    (grad,) = torch.autograd.grad(65536.0 * kd.sorted_transport(z, a), z)
    own = z.detach().float().requires_grad_()
    (want,) = torch.autograd.grad(65536.0 * kd.sorted_transport(own, a), own)
    torch.testing.assert_close(grad, want.half(), rtol=2e-3, atol=1e-6)


def test_second_derivatives_are_refused_by_name():
    z, a = rows(20, 30, torch.float64, "cpu")
    for reduction in ("mean", "none"):
        (grad,) = torch.autograd.grad(
            kd.sorted_transport(z, a, reduction=reduction).sum(), z, create_graph=True
        )
        with pytest.raises(NotImplementedError, match="sorted_transport has no second derivative"):
            (grad.square().sum() + z.sum()).backward()


def test_layouts():
    z, a = rows(33, 33, torch.float32, "cpu")
    expected = kd.sorted_transport(z, a)
    strided = torch.empty(4, 70)[:, 3:36].copy_(z.detach())
    torch.testing.assert_close(kd.sorted_transport(strided, a), expected)
    columns = z.detach().t().contiguous().t()
    torch.testing.assert_close(kd.sorted_transport(columns, a), expected)
    folded = kd.sorted_transport(z.view(2, 2, 33), a.view(2, 2, 33), reduction="none")
    assert folded.shape == (2, 2)
    one = a[:1].expand(4, -1)
    torch.testing.assert_close(kd.sorted_transport(z, one), kd.sorted_transport(z, one.clone()))
    assert kd.sorted_transport(z[:0].detach(), a[:0]).item() == 0.0


@pytest.mark.parametrize(
    "options, message",
    (
        ({"temperature": 0.0}, "temperature"),
        ({"reduction": "median"}, "reduction"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask"),
        ({"weight": torch.ones(3)}, "weight"),
        ({"student_row_scale": torch.ones(3)}, "student_row_scale"),
        ({"exclude_student": torch.tensor([9])}, "exclude_student"),
        ({"exclude_teacher": torch.ones(3, dtype=torch.bool)}, "exclude_teacher"),
        ({"teacher": torch.randn(3, 5)}, "teacher"),
        ({"num_items": 3, "reduction": "sum"}, "num_items"),
    ),
)
def test_bad_input(options, message):
    arguments = {"student": torch.randn(4, 8), "teacher": torch.randn(4, 5), **options}
    with pytest.raises(ValueError, match=message):
        kd.sorted_transport(**arguments)
