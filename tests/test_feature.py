"""The feature kernels on every backend against the float64 reference, and their edges."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kdkernels as kd
from kdkernels.backends.registry import pick
from kdkernels.backends.torch_feature import ELEMENT_KINDS, KINDS

FAMILY = "relation"
NORMALIZE = (None, "l2", "layer_norm", "standardize")
OPTIONS = {"smooth_l1": {"beta": 0.5}, "huber": {"beta": 0.4}, "margin_cosine": {"margin": 0.2}}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def vectors(*shape, dtype=torch.float32, gap=1.0):
    """Two sides that differ by `gap`, neither centred nor of unit size."""
    teacher = 1.5 * torch.randn(shape, dtype=torch.float64) + 0.3
    return (teacher + gap * torch.randn(shape, dtype=torch.float64)).to(dtype), teacher.to(dtype)


def run(student, teacher, kind, upstream=None, weight=None, backend=None, **options):
    """(loss, gradients of student, teacher and weight), computed on the backend's device."""
    device = "cuda" if backend == "cuda" else "cpu"
    sides = [student, teacher] + ([] if weight is None else [weight])
    leaves = [x.detach().to(device, copy=True).requires_grad_() for x in sides]
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    if weight is not None:
        options["weight"] = leaves[2]
    with kd.use_backend(backend):
        loss = kd.feature(leaves[0], leaves[1], kind, **options)
        total = loss.sum() if upstream is None else (loss * upstream.to(loss)).sum()
        found = torch.autograd.grad(total, leaves)
    return loss.detach().cpu(), tuple(g.cpu() for g in found)


def assert_same(backend, student, teacher, kind, bound=2e-6, **options):
    def wide(x):
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    found = run(student, teacher, kind, backend=backend.name, **options)
    wanted = run(
        *(wide(x) for x in (student, teacher)),
        kind,
        backend="torch",
        **{k: wide(v) for k, v in options.items()},
    )
    size = float(wanted[0].abs().max().clamp(min=1e-6))
    assert float((found[0].double() - wanted[0]).abs().max()) <= bound * size
    for a, b in zip(found[1], wanted[1], strict=True):
        allowed = (4 * bound + ROUNDING.get(a.dtype, 0.0)) * float(b.abs().max().clamp(min=1e-6))
        assert float((a.double() - b).abs().max()) <= allowed, (a, b)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kernel_backend, kind, normalize):
    options = {"normalize": normalize, **OPTIONS.get(kind, {})}
    for dtype in kernel_backend.dtypes:
        # 37 columns leave a tail behind every vector length; rows and groups are ragged.
        s, t = vectors(2, 5, 37, dtype=dtype)
        mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
        assert_same(kernel_backend, s, t, kind, **options)
        upstream = torch.rand(2, 5, 37) if kind in ELEMENT_KINDS else torch.rand(2, 5)
        extra = {"mask": mask, "reduction": "none", "upstream": upstream}
        assert_same(kernel_backend, s, t, kind, **extra, **options)
        if dtype == torch.float32:
            assert_same(kernel_backend, s, t, kind, weight=torch.rand(2, 5), mask=mask, **options)


@pytest.mark.parametrize("kind", ELEMENT_KINDS)
def test_weights_of_elements(kernel_backend, kind):
    s, t = vectors(2, 3, 20)
    options = OPTIONS.get(kind, {})
    for weight in (torch.rand(2, 3, 20), torch.rand(2, 3, 1).expand(2, 3, 20)):
        assert_same(kernel_backend, s, t, kind, weight=weight, normalize="layer_norm", **options)
        assert_same(kernel_backend, s, t, kind, weight=weight, reduction="none", **options)


def test_wide_rows(kernel_backend):
    """More than one block of columns, more than a warp's row, more than one strip."""
    s, t = vectors(3, 1100)
    for kind in ("mse", "cosine"):
        for normalize in NORMALIZE:
            assert_same(kernel_backend, s, t, kind, normalize=normalize)
    s, t = vectors(1, 150, 70)
    assert_same(kernel_backend, s, t, "mse", normalize="standardize")


def test_small_gaps_keep_their_digits(kernel_backend):
    """1 - cos near equal rows is half the squared distance of the unit rows."""
    for gap in (1e-2, 1e-4):
        s, t = vectors(4, 64, gap=gap)
        for kind in ("cosine", "normalized_mse"):
            assert_same(kernel_backend, s, t, kind, bound=1e-6 / gap, reduction="none")
    for kind in ("cosine", "normalized_mse", "mse"):
        assert float(run(t, t, kind, backend=kernel_backend.name, normalize="layer_norm")[0]) == 0.0


def test_zero_and_constant_rows(kernel_backend):
    s, t = vectors(4, 3, 8)
    s[0], t[1], s[2, :, 4], s[3, 1] = 0.0, 0.0, 2.0, 1.5
    for kind in KINDS:
        for normalize in NORMALIZE:
            loss, found = run(s, t, kind, backend=kernel_backend.name, normalize=normalize)
            assert bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in found)
            options = {"normalize": normalize, **OPTIONS.get(kind, {})}
            # A zero row's unit row has a slope of 1e12, which swamps the others' tolerance.
            if kind in ELEMENT_KINDS and normalize != "l2":
                assert_same(kernel_backend, s[2:], t[2:], kind, **options)


def test_unselected_rows_are_not_read_and_nan_stays_in_its_row(kernel_backend):
    s, t = vectors(4, 6)
    mask = torch.tensor([True, False, True, True])
    expected = run(s[mask], t[mask], "mse", backend=kernel_backend.name)
    s[1], t[1] = float("nan"), float("inf")
    loss, found = run(s, t, "mse", backend=kernel_backend.name, mask=mask)
    torch.testing.assert_close(loss, expected[0])
    for a, b in zip(found, expected[1], strict=True):
        torch.testing.assert_close(a[mask], b)
        assert float(a[1].abs().max()) == 0.0
    for kind in KINDS:
        rows, (gradient, _) = run(s, t, kind, backend=kernel_backend.name, reduction="none")
        bad = rows.isnan() if rows.dim() == 1 else rows.isnan().any(-1)
        assert bad.tolist() == [False, True, False, False]
        assert gradient.isnan().any(-1).tolist() == [False, True, False, False]


def test_gradcheck(double_backend):
    s, t = (x.requires_grad_() for x in vectors(2, 3, 5, dtype=torch.float64))
    weight = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
    for normalize in NORMALIZE:
        assert torch.autograd.gradcheck(
            lambda s, t, w, n=normalize: kd.feature(s, t, "huber", normalize=n, weight=w, beta=0.4),
            (s, t, weight),
            fast_mode=True,
        )
        assert torch.autograd.gradcheck(
            lambda s, t, n=normalize: kd.feature(s, t, "log_sigmoid_cosine", normalize=n),
            (s, t),
            fast_mode=True,
        )


def test_autograd_compile_and_functorch(kernel_backend):
    s, t = (x.to(kernel_backend.device) for x in vectors(2, 3, 9))
    x = s.clone().requires_grad_()
    loss = kd.feature(x, t, "cosine", normalize="standardize")
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, x, create_graph=True)
    torch.testing.assert_close(second.detach(), 3 * first)
    with pytest.raises(NotImplementedError, match="second derivative"):
        second.sum().backward()

    def total(s):
        return kd.feature(s, t, "cosine", normalize="standardize")

    torch.testing.assert_close(torch.func.grad(total)(s), first)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda s: kd.feature(s, t[0]))(s)
    if kernel_backend.name == "cpu":
        torch._dynamo.reset()
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], first)
    arguments = (x.view(6, 9), t.view(6, 9), None, None, "huber", "layer_norm", 1, 0.5, 0.0, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.kdkernels.feature, arguments, test_utils=checks)


def test_every_isa_and_schedule_order():
    from kdkernels.backends import registry

    s, t = vectors(9, 37)
    reports = {r.backend: r.available for r in kd.backends() if r.family == "relation"}
    results = []

    def collect(backend):
        results.append(
            [run(s, t, k, backend=backend, normalize=n) for k in KINDS for n in NORMALIZE]
        )

    if reports["cpu"]:
        module = registry.load("cpu")
        for isa in module._C.compiled_isas():
            try:
                module._C.set_isa(isa)
            except ValueError:
                continue
            collect("cpu")
        module._C.set_isa("")
    if reports["simt"]:
        for order in ("ascending", "shuffle"):
            registry.load("simt").set_order(order, 7)
            collect("simt")
        registry.load("simt").set_order("ascending", 0)
    for other in results[1:]:
        for (a, found), (b, wanted) in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_forward_makes_nothing_of_the_size_of_the_inputs():
    from test_relation_autograd import Largest

    s, t = vectors(64, 512, dtype=torch.bfloat16)
    with kd.use_backend("cpu"), torch.no_grad(), Largest(s, t) as largest:
        kd.feature(s, t, "cosine", normalize="layer_norm")
    assert 0 < largest.entries <= 64


def test_empty_and_bad_input(kernel_backend):
    for kind in KINDS:
        for normalize in NORMALIZE:
            nothing = torch.zeros(2, 0, 4, device=kernel_backend.device)
            assert float(kd.feature(nothing, nothing, kind, normalize=normalize)) == 0.0
    s, t = (x.to(kernel_backend.device) for x in vectors(2, 3))
    none = torch.zeros(2, dtype=torch.bool, device=kernel_backend.device)
    assert float(kd.feature(s, t, mask=none, normalize="standardize")) == 0.0
    with pytest.raises(ValueError, match="normalize"):
        kd.feature(s, t, normalize="batch")
    with pytest.raises(ValueError, match="standardize"):
        kd.feature(s[0], t[0], normalize="standardize")
    with pytest.raises(ValueError, match="weight"):
        kd.feature(s, t, "cosine", weight=torch.ones(2, 3))
    with pytest.raises(ValueError, match="beta"):
        kd.feature(s, t, "huber", beta=0.0)
    with pytest.raises(TypeError, match="mask"):
        kd.feature(s, t, mask=torch.ones(2))
    torch.testing.assert_close(kd.feature(s.half(), t), F.mse_loss(s.half().float(), t))


def test_a_mean_makes_its_gradient_along_with_its_value(kernel_backend, monkeypatch):
    module = pick("relation", kernel_backend.device)
    walks = []
    native = module.feature_rows
    monkeypatch.setattr(
        module, "feature_rows", lambda *args: (walks.append(args[9]), native(*args))[1]
    )
    student, teacher = (x.to(kernel_backend.device) for x in vectors(5, 40))
    student.requires_grad_()
    mask = torch.tensor([True, False, True, True, True], device=kernel_backend.device)
    items = torch.tensor(7.0, device=kernel_backend.device)
    for options in ({}, {"mask": mask}, {"num_items": items}, {"reduction": "sum"}):
        walks.clear()
        loss = kd.feature(student, teacher, "cosine", **options)
        (first,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
        assert len(walks) == 1 and walks[0] is not None
        (again,) = torch.autograd.grad(3 * loss, student)
        torch.testing.assert_close(first, again, rtol=1e-6, atol=0)
        wide = student.detach().double().requires_grad_()
        other = torch.nn.functional.cosine_similarity(wide, teacher.double(), dim=-1)
        keep = mask if "mask" in options else torch.ones_like(mask)
        count = {"num_items": 7.0, "reduction": 1.0}.get(next(iter(options), ""), keep.sum())
        (wanted,) = torch.autograd.grad(3 * ((1 - other) * keep).sum() / count, wide)
        torch.testing.assert_close(first.double(), wanted, rtol=1e-5, atol=1e-8)
    half = student.detach().half().requires_grad_()
    walks.clear()
    kd.feature(half, teacher.half(), "cosine").backward()
    assert len(walks) == 2  # a float16 gradient waits for its upstream
    loss = kd.feature(student, teacher, "mse")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()
