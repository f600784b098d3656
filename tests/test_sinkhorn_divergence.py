"""kd.sinkhorn_divergence: GeomLoss where it is installed, the float64 reference, its definition."""

from __future__ import annotations

import math

import pytest
import torch

import kdkernels as kd

FAMILY = "transport"
on_kernels = pytest.mark.parametrize(
    "backend", ("torch", "cpu", "simt", "triton", "cuda"), indirect=True
)


def clouds(rows=9, columns=7, width=3, batch=2, seed=0):
    """Points and weights in float64; problem 0 has a point without weight in each cloud."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, rows, width, generator=generator, dtype=torch.float64)
    y = torch.rand(batch, columns, width, generator=generator, dtype=torch.float64) + 0.3
    a = torch.rand(batch, rows, generator=generator, dtype=torch.float64)
    b = torch.rand(batch, columns, generator=generator, dtype=torch.float64)
    a[0, 1] = b[0, 2] = 0.0
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def literal(x, y, a, b, p, blur, scaling, diameter, reach, debias):
    """The definition step by step; the last one under autograd, by its own points alone."""
    rho = None if reach is None else reach**p
    ends = p * math.log(diameter), p * math.log(blur), p * math.log(scaling)
    steps = torch.arange(*ends, dtype=torch.float64)
    epsilons = [diameter**p, *steps.exp().tolist(), blur**p]

    def cost(u, v):
        square = (u[:, :, None] - v[:, None]).square().sum(-1)
        return square / 2 if p == 2 else square.clamp(min=1e-8).sqrt()

    def log(weights):
        return torch.where(weights > 0, weights.detach().log(), -1e5)

    def softmin(epsilon, c, h):
        damping = 1.0 if rho is None else 1.0 / (1.0 + epsilon / rho)
        return -damping * epsilon * (h[:, None, :] - c / epsilon).logsumexp(-1)

    clouds, logs = (x, y), (log(a), log(b))
    sides = ((0, 1, 1), (1, 0, 0), (0, 0, 2), (1, 1, 3))[: 4 if debias else 2]
    costs = [cost(clouds[i], clouds[j].detach()) for i, j, _ in sides]
    plain = [c.detach() for c in costs]
    phi = [softmin(epsilons[0], c, logs[j]) for c, (_, j, _) in zip(plain, sides, strict=True)]
    for epsilon in epsilons:
        moved = [
            softmin(epsilon, c, logs[j] + phi[partner] / epsilon)
            for c, (_, j, partner) in zip(plain, sides, strict=True)
        ]
        phi = [(old + new) / 2 for old, new in zip(phi, moved, strict=True)]
    f, g, *rest = (
        softmin(epsilon, c, logs[j] + phi[partner] / epsilon)
        for c, (_, j, partner) in zip(costs, sides, strict=True)
    )
    own_f, own_g = rest or (0.0, 0.0)
    if rho is None:
        value = (a * (f - own_f)).sum(-1) + (b * (g - own_g)).sum(-1)
    else:
        f, g, own_f, own_g = (torch.as_tensor(t).neg().div(rho).exp() for t in (f, g, own_f, own_g))
        value = (rho + epsilon / 2) * ((a * (own_f - f)).sum(-1) + (b * (own_g - g)).sum(-1))
    return value


@on_kernels
@pytest.mark.parametrize("p", (1, 2))
@pytest.mark.parametrize("width", (1, 2, 3, 6, 18))
def test_values_and_gradients_equal_the_definition(backend, p, width):
    """Widths: each one of its own, the general one, and one that takes cost matrices."""
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    bound = 1e-9 if dtype == torch.float64 else 1e-4
    for reach, debias in ((None, True), (0.8, True), (None, False), (0.8, False)):
        options = {"p": p, "blur": 0.1, "scaling": 0.5, "diameter": 2.5, "reach": reach,
                   "debias": debias}  # fmt: skip
        own = [t.requires_grad_() for t in clouds(width=width)]
        given = [t.detach().to(backend.device, dtype).requires_grad_() for t in own]
        value = kd.sinkhorn_divergence(*given, **options)
        expected = literal(*own, **options)
        torch.testing.assert_close(value.cpu().double(), expected, rtol=bound, atol=bound)
        upstream = torch.tensor([1.0, -0.5], dtype=torch.float64)
        grads = torch.autograd.grad(value, given, upstream.to(value))
        wanted = torch.autograd.grad(expected, own, upstream)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.cpu().double(), want, rtol=bound, atol=bound)
        if backend.name == "simt" and width > 1:
            break  # the other combinations differ outside of the kernel, or with width 1


@on_kernels
def test_only_what_is_wanted_is_made(backend):
    x, y, a, b = (t.float().to(backend.device) for t in clouds(width=4))
    options = {"blur": 0.1, "diameter": 2.0}
    both = [t.clone().requires_grad_() for t in (x, y)]
    wanted = torch.autograd.grad(kd.sinkhorn_divergence(*both, a, b, **options).sum(), both)
    for index in (0, 1):
        pair = [x.clone(), y.clone()]
        pair[index].requires_grad_()
        value = kd.sinkhorn_divergence(*pair, a, b, **options)
        (grad,) = torch.autograd.grad(value.sum(), pair[index])
        assert torch.equal(grad, wanted[index])
    assert not kd.sinkhorn_divergence(x, y, a, b, **options).requires_grad


@pytest.mark.parametrize("backend", ("cpu", "simt", "cuda"), indirect=True)
@pytest.mark.parametrize("p", (1, 2))
def test_sums_that_leave_the_range_are_made_again(backend, p):
    """Far clouds at a small blur after one large step: the potential before is no base for them."""
    x = torch.tensor([[0.0], [0.01], [5.0]], device=backend.device).requires_grad_()
    y = torch.tensor([[4.0], [-3.0]], device=backend.device)
    options = {"p": p, "blur": 0.05, "scaling": 0.01, "diameter": 8.0}
    value = kd.sinkhorn_divergence(x, y, **options)
    (grad,) = torch.autograd.grad(value, x)
    with kd.use_backend("torch"):
        own = x.detach().double().cpu().requires_grad_()
        expected = kd.sinkhorn_divergence(own, y.double().cpu(), **options)
        (want,) = torch.autograd.grad(expected, own)
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.cpu().double(), want, rtol=1e-3, atol=1e-4)


def test_bits_do_not_depend_on_threads():
    x, y = torch.rand(2, 300, 3), torch.rand(2, 170, 3)
    threads = torch.get_num_threads()
    try:
        values = []
        for count in (1, 2):
            torch.set_num_threads(count)
            values.append(kd.sinkhorn_divergence(x, y, diameter=2.0, return_potentials=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*values, strict=True))


@pytest.mark.parametrize("isa", ("avx512", "avx2", "baseline"))
def test_every_instruction_set(isa):
    extension = pytest.importorskip("kdkernels._C")
    try:
        extension.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for width, p in ((3, 1), (5, 2), (20, 1)):
            x, y, a, b = clouds(21, 19, width)
            options = {"p": p, "blur": 0.1, "diameter": 3.0}
            given = x.float().requires_grad_()
            value = kd.sinkhorn_divergence(given, *(t.float() for t in (y, a, b)), **options)
            (grad,) = torch.autograd.grad(value.sum(), given)
            own = x.requires_grad_()
            expected = literal(own, y, a, b, scaling=0.5, reach=None, debias=True, **options)
            (want,) = torch.autograd.grad(expected.sum(), own)
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grad.double(), want, rtol=1e-3, atol=1e-5)
    finally:
        extension.set_isa("")


def test_compile_functorch_and_refusals():
    x, y, a, b = clouds()
    options = {"blur": 0.2, "diameter": 2.0}

    def f(x):
        return kd.sinkhorn_divergence(x, y, a, b, **options).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(x), expected)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)
    (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="sinkhorn_divergence has no second derivative"):
        grad.square().sum().backward()
    logs = [torch.full(t.shape[:2], -2.0, dtype=t.dtype) for t in (x, y)]
    numbers = ([1.0, 0.1], True, 0.5, True, True, True)
    torch.library.opcheck(torch.ops.kdkernels.annealed.default, (leaf, y, *logs, *numbers))
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda u: kd.sinkhorn_divergence(u, y[0], **options))(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            f(dual)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"p": 3}, "p:"),
        ({"blur": 0.0}, "blur"),
        ({"scaling": 1.0}, "scaling"),
        ({"reach": -1.0}, "reach"),
        ({"diameter": 0.0}, "diameter"),
        ({"y": torch.rand(4, 2)}, "y:"),
        ({"y": torch.rand(1, 4, 3)}, "y:"),
        ({"a": torch.rand(4)}, "a:"),
        ({"b": torch.rand(2, 4)}, "b:"),
    ),
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        kd.sinkhorn_divergence(**{"x": torch.rand(5, 3), "y": torch.rand(4, 3), **options})


@pytest.mark.parametrize("p", (1, 2))
@pytest.mark.parametrize("reach", (None, 0.8))
@pytest.mark.parametrize("debias", (True, False))
def test_geomloss(p, reach, debias):
    geomloss = pytest.importorskip("geomloss")
    generator = torch.Generator().manual_seed(p)
    x = torch.rand(2, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = (torch.rand(2, 7, 3, generator=generator, dtype=torch.float64) + 0.3).requires_grad_()
    a = torch.rand(2, 9, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    b = torch.rand(2, 7, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    theirs = geomloss.SamplesLoss("sinkhorn", p=p, blur=0.05, reach=reach, debias=debias,
                                  backend="tensorized")(a, x, b, y)  # fmt: skip
    ours = kd.sinkhorn_divergence(x, y, a, b, p=p, blur=0.05, reach=reach, debias=debias)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for got, want in zip(
        torch.autograd.grad(ours.sum(), (x, y, a, b)),
        torch.autograd.grad(theirs.sum(), (x, y, a, b)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", ("discs", "line"))
def test_geomloss_own_examples(shape):
    """Two clouds in the unit square and on the line, as in its gallery, in float32."""
    geomloss = pytest.importorskip("geomloss")
    generator = torch.Generator().manual_seed(0)
    if shape == "discs":
        x = torch.randn(60, 2, generator=generator) * 0.05 + torch.tensor([0.3, 0.4])
        y = torch.randn(50, 2, generator=generator) * 0.1 + torch.tensor([0.7, 0.6])
    else:
        x, y = torch.linspace(0.1, 0.4, 40)[:, None], torch.linspace(0.5, 0.9, 40)[:, None]
    for options in ({}, {"p": 1}, {"blur": 0.1, "scaling": 0.9}, {"reach": 0.3}):
        x = x.detach().requires_grad_()
        theirs = geomloss.SamplesLoss("sinkhorn", backend="tensorized", **options)(x, y)
        ours = kd.sinkhorn_divergence(x, y, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        got, want = (torch.autograd.grad(value, x)[0] for value in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_divergence_of_equal_clouds_is_zero():
    x = torch.rand(8, 3, requires_grad=True)
    value = kd.sinkhorn_divergence(x, x.detach().clone())
    assert abs(value.item()) < 1e-6
    assert float(torch.autograd.grad(value, x)[0].abs().max()) < 1e-5
    f, g = kd.sinkhorn_divergence(x.detach(), x.detach() + 1.0, return_potentials=True)
    assert f.shape == (8,) and g.shape == (8,)
