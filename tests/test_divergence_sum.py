"""Sums of divergences of one student in one pass: against calls of their own and against float64,
with everything that a row may hold; what is one pass and what is composed."""

from __future__ import annotations

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import simt
from kdkernels.backends import spec as S
from kdkernels.backends.spec import DivergenceSpec
from kdkernels.functional import summed
from kdkernels.ops import divergence as plain_ops
from kdkernels.ops import divergence_sum as ops

NAN, INF = float("nan"), float("inf")
# Every way of the CPU kernels and every group of the CUDA kernels, in an order that mixes those
# that gather from scratch with those that read the logits again.
SPECS = {
    "forward_kl": {"forward_kl": 1.0},
    "reverse_kl": {"reverse_kl": 1.0},
    "linear": {"forward_kl": 0.7, "reverse_kl": 0.2, "cross_entropy": 0.3, "entropy": 0.1},
    "jensen_shannon": {"kind": S.JENSEN_SHANNON, "other": 1.0, "first": 0.3},
    "total_variation": {"kind": S.TOTAL_VARIATION, "other": 1.0},
    "mixed": {"kind": S.JENSEN_SHANNON, "other": 0.5, "first": 0.5, "forward_kl": 0.5},
    "alpha_beta": {"kind": S.ALPHA_BETA, "other": 1.0, "first": 0.7, "second": 0.4},
    "hellinger": {"kind": S.SQUARED_HELLINGER, "other": 1.0, "outer": S.SQRT},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=("torch", "cpu", "simt", "cuda"))
def summing(request):
    """Backends that add divergences up themselves."""
    from conftest import _make

    made = _make(request.param, request)
    with kd.use_backend(made.name):
        yield made


@pytest.fixture
def calls(monkeypatch):
    """Number of parts of every sum that is made in one pass."""
    seen = []
    real = summed.ops.divergence_sum

    def counted(student, common, weights):
        seen.append(len(common.parts))
        return real(student, common, weights)

    monkeypatch.setattr(summed.ops, "divergence_sum", counted)
    return seen


def logits(n, v, count, dtype=torch.float32, gap=1.0):
    student = torch.randn(n, v, dtype=torch.float64) * 2
    teachers = [student + gap * torch.randn(n, v, dtype=torch.float64) for _ in range(count)]
    return student.to(dtype), [t.to(dtype) for t in teachers]


def composed(monkeypatch, *args, **options):
    """The same sum as calls of their own."""
    with monkeypatch.context() as patch:
        patch.setattr(ops, "most_parts", lambda student: 0)
        return kd.divergence(*args, **options)


def close(x, y, dtype=torch.float32):
    bound = 1e-11 if dtype == torch.float64 else 2e-5
    scale = y[y.isfinite()].abs().max().item() if y.numel() and y.isfinite().any() else 1.0
    torch.testing.assert_close(
        x.double(), y.double(), rtol=bound, atol=bound * scale, equal_nan=True
    )


# The kernels' sums, part by part. -----------------------------------------------------------------


def parts_of(n, v, names, teachers, **options):
    """Parts of mixed kinds at temperatures of their own, the third's one a row."""
    parts = []
    for k, (name, teacher) in enumerate(zip(names, teachers)):
        tau = 1.0 + 0.5 * (k % 3)
        numbers = {**SPECS[name], "student_temperature": tau, "teacher_temperature": tau + 0.25}
        dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
        tau_s = torch.linspace(0.7, 2.0, n).to(teacher.device, dtype) if k == 2 else None
        spec = DivergenceSpec(**numbers, label_weight=0.4 * (k == 1), **options)
        parts.append(ops.Part(teacher, tau_s, None, None, None, spec))
    return tuple(parts)


def one_by_one(student, common, weights, upstream):
    """Values and the gradient of the sum, in float64, by plain calls of the same backend."""
    total, gradient = 0.0, 0.0
    for part, weight in zip(common.parts, weights):
        leaf = student.detach().clone().requires_grad_()
        rest = plain_ops.Rest(
            common.labels, common.mask, part.first, part.second, None, part.spec, False, False
        )
        loss, _ = plain_ops.divergence(
            leaf, part.teacher, weight, part.tau_s, part.tau_t, rest, student.shape[0]
        )
        (one,) = torch.autograd.grad(loss, leaf, upstream)
        total, gradient = total + loss.detach().double(), gradient + one.double()
    return total, gradient


@pytest.mark.parametrize("v", (5, 700, 4099))
@pytest.mark.parametrize("reduction", (S.MEAN, S.NONE))
def test_kinds_and_types_mixed(summing, v, reduction):
    """Every kind in one sum, in three orders; teachers of mixed types; rows that are not selected,
    have weight 0, or are odd in one teacher."""
    if v == 4099 and reduction == S.NONE:
        pytest.skip("the sizes are the other reduction's affair")
    n = 70 if v == 4099 and summing.name == "cpu" else 6  # 70: the gradient goes around the cache
    names = list(SPECS)
    if summing.name != "cpu":
        names = names[::3] if v > 5 else names
        if v > 5 and summing.name == "torch":
            pytest.skip("no kernel of ours")
    student, teachers = logits(n, v, len(names))
    teachers[-1] = torch.cat([teachers[-1], torch.randn(n, 1030)], -1)  # a wider vocabulary
    teachers = [t.to(DTYPES[k % 3]).to(summing.device) for k, t in enumerate(teachers)]
    teachers[1][1] = -INF
    teachers[0][2, ::2] = -INF
    student[3, 1] = -INF
    student = student.to(summing.device)
    labels = (torch.arange(n) % v).to(summing.device)
    labels[4] = -100
    weights = [None if k == 0 else torch.rand(n).to(summing.device) for k in range(len(names))]
    weights[2][0] = 0.0
    weights[-1][5] = 0.0
    upstream = torch.rand(n if reduction == S.NONE else ()).to(summing.device)
    for turn in range(3):
        names, teachers = names[turn:] + names[:turn], teachers[turn:] + teachers[:turn]
        parts = parts_of(n, v, names, teachers, reduction=reduction, batch=1.0)
        common = ops.Common(parts, labels, None, None, False)
        leaf = student.clone().requires_grad_()
        loss = ops.divergence_sum(leaf, common, weights)
        value, gradient = one_by_one(student, common, weights, upstream)
        close(loss.detach(), value)
        (got,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
        close(got, gradient)
        assert not got[4].any() and got[:, 0].isfinite().all()
        (again,) = torch.autograd.grad(loss, leaf, upstream)  # from the statistics
        close(again, gradient)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_gradients_are_rounded_once(summing, dtype):
    """The gradient of a half student is that of the same student in float32, rounded."""
    n, v = 4, 700
    names = ("forward_kl", "jensen_shannon", "linear", "total_variation", "reverse_kl")
    student, teachers = logits(n, v, len(names), dtype)
    teachers = [t.to(summing.device) for t in teachers]
    parts = parts_of(n, v, names, teachers, reduction=S.SUM)
    labels = torch.arange(n, device=summing.device)
    common = ops.Common(parts, labels, None, None, False)
    wide = student.float().to(summing.device).requires_grad_()
    halves = student.to(summing.device).requires_grad_()
    weights = [torch.full((n,), 1000.0, device=summing.device)] + [None] * 4
    for leaf in (halves, wide):
        loss = ops.divergence_sum(leaf, common, weights)
        loss.backward()
    if dtype == torch.bfloat16:  # prepared in the same way as a float32 gradient
        assert torch.equal(halves.grad, wide.grad.to(dtype))
    off = (halves.grad.float() - wide.grad).abs()
    # Half a unit in the last place of the sum; a second rounding would be seen beside the first.
    unit = 2.0 ** (wide.grad.abs().log2().floor() - (7 if dtype == torch.bfloat16 else 10))
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0
    assert (off <= 0.51 * unit + tiny).all()


def test_bits_do_not_depend_on_threads():
    student, teachers = logits(37, 2000, 3)
    seen = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = student.clone().requires_grad_()
            with kd.use_backend("cpu"):
                loss = kd.divergence(leaf, teachers, (("hellinger", 0.4), ("reverse_kl", 0.3)))
                loss.backward()
            seen.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for value, gradient in seen[1:]:
        assert torch.equal(value, seen[0][0]) and torch.equal(gradient, seen[0][1])


@pytest.mark.skipif(bool(simt.why_not()), reason=simt.why_not() or "built")
@pytest.mark.parametrize("v", (5, 701))
def test_the_order_of_threads_changes_no_bit(v):
    student, teachers = logits(5, v, 3)
    labels = torch.tensor([0, 1, 4, -100, 2])
    seen = []
    try:
        for order in (("ascending", 0), ("descending", 0), ("shuffle", 1), ("warp_ahead", 2)):
            simt.set_order(*order)
            leaf = student.clone().requires_grad_()
            with kd.use_backend("simt"):
                loss = kd.divergence(
                    leaf, teachers, (("bhattacharyya", 0.4), ("forward_kl", 1.0)), labels=labels,
                    label_weight=0.3, teacher_weights=torch.tensor([0.2, 0.5, 0.3]),
                )  # fmt: skip
                loss.backward()
            seen.append((loss.detach(), leaf.grad))
    finally:
        simt.set_order("ascending")
    for value, gradient in seen[1:]:
        assert torch.equal(value, seen[0][0]) and torch.equal(gradient, seen[0][1])


@pytest.mark.skipif(bool(simt.why_not()), reason=simt.why_not() or "built")
@pytest.mark.parametrize("order", ("descending", "warp_ahead"))
def test_more_rows_than_blocks(order):
    """A block takes several rows; what it shares of one must be read before the next one's."""
    student, teachers = logits(1030, 260, 2)
    leaf = student.requires_grad_()
    simt.set_order(order, 0)
    try:
        with kd.use_backend("simt"):
            (gradient,) = torch.autograd.grad(kd.divergence(leaf, teachers), leaf)
    finally:
        simt.set_order("ascending")
    with kd.use_backend("cpu"):
        (expected,) = torch.autograd.grad(kd.divergence(leaf, teachers), leaf)
    close(gradient, expected)


# kd.divergence. -----------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "label": {"labels": True, "label_weight": 0.3, "temperature": 1.5, "temperature_squared": True},
    "numbers": {"teacher_weights": [0.5, 0.0, -2.0], "labels": True, "label_weight": 0.3},
    "tensor": {"teacher_weights": "shared", "labels": True, "label_weight": 0.3},
    "rows": {"teacher_weights": "rows", "weight": True, "labels": True, "label_weight": 0.2},
    "mask": {"mask": True, "weight": True, "teacher_weights": [0.2, 0.3, 0.5]},
    "items": {"num_items": 7.0, "kind": "reverse_kl"},
    "items_tensor": {"num_items": torch.tensor(7.0)},
    "sequences": {"mask": True, "reduction": "sequence_mean", "kind": "jensen_shannon"},
    "batch": {"reduction": "batchmean"},
    "none": {"reduction": "none", "teacher_weights": "rows", "mask": True},
    "sum": {"reduction": "sum", "clip": kd.Clip(element=0.05)},
    "temperatures": {"temperature": "rows", "teacher_temperature": 0.8, "kind": "alpha_beta"},
    "beta": {"kind": "jensen_shannon", "beta": "rows", "teacher_weights": "rows"},
    "split": {"kind": (("hellinger", 0.5), ("forward_kl", 0.4), ("entropy", -0.1))},
    "padded": {"vocab_size": 17, "teacher_vocab_size": 17, "kind": "total_variation"},
}  # fmt: skip


def filled(options, shape, device, dtype):
    """The options with their tensors, and those that carry a gradient."""
    made, leaves = dict(options), []
    if made.get("beta"):
        made["beta"] = torch.linspace(0.0, 1.0, shape.numel()).view(shape).to(device, dtype)
    for name in ("weight", "teacher_weights", "temperature"):
        given = made.get(name)
        if given is True or given == "rows":
            made[name] = torch.rand(*shape, *((3,) if name == "teacher_weights" else ()))
            made[name] = (made[name] + 0.5).to(device, dtype)
        elif given == "shared":
            made[name] = torch.tensor([0.3, 1.2, -0.4], device=device, dtype=dtype)
        if isinstance(made.get(name), torch.Tensor) and name != "temperature":
            leaves.append(made[name].requires_grad_())
    if made.get("labels"):
        made["labels"] = torch.arange(shape.numel(), device=device).view(shape) % 11
        made["labels"][0, 1] = -100
    if made.get("mask"):
        made["mask"] = torch.rand(shape, device=device) < 0.7
    if isinstance(made.get("num_items"), torch.Tensor):
        made["num_items"] = made["num_items"].to(device)
    return made, leaves


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_calls_of_their_own(summing, calls, monkeypatch, name):
    shape = torch.Size((2, 3))
    dtype = torch.float64 if torch.float64 in summing.dtypes else torch.float32
    student, teachers = logits(6, 20, 3, dtype)
    student = student.view(2, 3, 20).to(summing.device)
    teachers = [t.view(2, 3, 20).to(summing.device) for t in teachers]
    options, extra = filled(OPTIONS[name], shape, summing.device, dtype)
    upstream = torch.rand(shape if options.get("reduction") == "none" else ()).to(student)

    def both(run):
        leaf = student.clone().requires_grad_()
        loss = run(leaf, teachers, **options)
        return loss.detach(), torch.autograd.grad(loss, [leaf, *extra], upstream)

    value, gradients = both(kd.divergence)
    assert calls, "not one pass"
    expected, others = both(lambda *a, **o: composed(monkeypatch, *a, **o))
    close(value, expected, dtype)
    for x, y in zip(gradients, others):
        close(x, y, dtype)


def test_float64_reference(summing):
    """sum_k c_k KL(p_k, q), with the label, written out."""
    student, teachers = logits(7, 33, 3, torch.float64)
    c = torch.tensor([0.3, 1.2, 0.7], dtype=torch.float64)
    labels = torch.arange(7)
    labels[2] = -100
    dtype = torch.float64 if torch.float64 in summing.dtypes else torch.float32
    z, w, *ts = (x.to(summing.device, dtype) for x in (student, c, *teachers))
    z, w = z.requires_grad_(), w.requires_grad_()
    loss = kd.divergence(
        z, ts, temperature=2.0, temperature_squared=True, teacher_weights=w,
        labels=labels.to(summing.device), label_weight=0.1,
    )  # fmt: skip
    loss.backward()
    zr, cr = student.requires_grad_(), c.requires_grad_()
    lq = (zr / 2).log_softmax(-1)
    rows = 0.1 * -zr.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    for k, t in enumerate(teachers):
        lp = (t / 2).log_softmax(-1)
        rows = rows + cr[k] * 4 * (lp.exp() * (lp - lq)).sum(-1)
    expected = rows[labels >= 0].mean()
    expected.backward()
    close(loss.detach().cpu(), expected.detach(), dtype)
    close(z.grad.cpu(), zr.grad, dtype)
    close(w.grad.cpu(), cr.grad, dtype)


@pytest.mark.parametrize("per_row", (False, True))
def test_gradcheck_with_the_coefficients(double_backend, per_row):
    student, teachers = logits(3, 5, 2, torch.float64)
    c = torch.rand(*((3, 2) if per_row else (2,)), dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 4, 2])

    def loss(z, c):
        return kd.divergence(
            z, teachers, "jensen_shannon", teacher_weights=c, labels=labels, label_weight=0.5
        )

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), c))


@pytest.mark.parametrize("kind", ("forward_kl", "reverse_kl", "jensen_shannon"))
def test_special_rows(summing, monkeypatch, kind):
    """What one teacher makes of a row stays in that row, and is what calls of their own make."""
    v = 40
    student, teachers = logits(8, v, 3)
    teachers[1][0] = -INF  # no teacher: the others count
    teachers[2][1, :5] = -INF
    student[2, 3] = -INF
    teachers[0][3, 7] = NAN
    student[4] = NAN
    teachers[2][5, 0] = INF
    student[6], teachers[1][6] = NAN, NAN  # not selected
    mask = torch.ones(8, dtype=torch.bool)
    mask[6] = False
    z = student.to(summing.device).requires_grad_()
    ts = [t.to(summing.device) for t in teachers]
    options = {"mask": mask.to(summing.device), "reduction": "sum"}
    rows = kd.divergence(z, ts, kind, **{**options, "reduction": "none"}).detach()
    assert rows.isnan().tolist() == [False, False, False, True, True, True, False, False]
    (gradient,) = torch.autograd.grad(kd.divergence(z, ts, kind, **options), z)
    (expected,) = torch.autograd.grad(composed(monkeypatch, z, ts, kind, **options), z)
    for row in range(8):
        close(gradient[row], expected[row])
    assert gradient[3:6].isnan().all() and not gradient[6].any()
    assert gradient[[0, 1, 2, 7]].isfinite().all()


@pytest.mark.parametrize("count", (1, 2, 9))
def test_lists_of_any_length(summing, calls, monkeypatch, count):
    student, teachers = logits(3, 30, count)
    z = student.to(summing.device).requires_grad_()
    ts = [t.to(summing.device) for t in teachers]
    loss = kd.divergence(z, ts, "reverse_kl")
    (gradient,) = torch.autograd.grad(loss, z)
    assert sum(calls) == (0 if count == 1 else count)
    assert all(n <= ops.most_parts(z) for n in calls)
    expected = composed(monkeypatch, z, ts, "reverse_kl")
    close(loss.detach(), expected.detach())
    close(gradient, torch.autograd.grad(expected, z)[0])


def test_teachers_that_are_no_plain_logits(summing, calls, monkeypatch):
    student, (a, b, wide) = logits(4, 12, 3)
    wide = torch.cat([wide, torch.randn(4, 3)], -1)
    index = torch.arange(12).flip(0)
    index[3] = -1
    z, a, b, wide, index = (x.to(summing.device) for x in (student, a, b, wide, index))
    z.requires_grad_()
    teachers = [kd.LogitMix([(0.4, kd.STUDENT), (0.6, a)]), kd.Mapped(wide, index), b]
    teachers.append(kd.ProbMix([(0.5, a), (0.5, b)]))
    loss = kd.divergence(z, teachers, temperature=1.5)
    assert calls == [4]
    (gradient,) = torch.autograd.grad(loss, z)
    expected = composed(monkeypatch, z, teachers, temperature=1.5)
    close(loss.detach(), expected.detach())
    close(gradient, torch.autograd.grad(expected, z)[0])


@pytest.mark.parametrize("v", (30, 1100))
def test_in_place(summing, v):
    student, teachers = logits(5, v, 3)
    ts = [t.to(summing.device) for t in teachers]
    labels = torch.arange(5, device=summing.device)
    options = {"labels": labels, "label_weight": 0.3, "temperature": 1.3, "kind": "reverse_kl"}
    z = student.to(summing.device).requires_grad_()
    (expected,) = torch.autograd.grad(kd.divergence(z, ts, **options), z)
    middle = z * 1.0
    loss = kd.divergence(middle, ts, inplace=True, **options)
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    close(gradient, expected)
    assert torch.equal(middle.detach(), gradient)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_in_place_is_refused_where_it_is_more_than_one_pass(summing):
    student, teachers = logits(2, 8, 9)
    z = student.to(summing.device).requires_grad_() * 1.0
    ts = [t.to(summing.device) for t in teachers]
    if ops.most_parts(z) < 9:
        with pytest.raises(ValueError, match="inplace.*one pass"):
            kd.divergence(z, ts, inplace=True)
    with pytest.raises(ValueError, match="inplace.*one pass"):
        kd.divergence(z, ts[:2], clip=1.0, inplace=True)
    with pytest.raises(ValueError, match="same memory"):
        kd.divergence(z, [ts[0], z.detach()], inplace=True)


def test_second_derivatives_and_stale_logits_are_refused(summing):
    student, teachers = logits(2, 8, 2)
    z = student.to(summing.device).requires_grad_()
    ts = [t.to(summing.device) for t in teachers]
    (gradient,) = torch.autograd.grad(kd.divergence(z, ts), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()
    loss = kd.divergence(z, ts, reduction="none").sum()
    ts[1].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input_is_named():
    z, a = torch.randn(2, 5), torch.randn(2, 5)
    with pytest.raises(ValueError, match="student"):
        kd.divergence(torch.tensor(1.0), [a, a])
    with pytest.raises(ValueError, match="teacher"):
        kd.divergence(z, [a, torch.randn(3, 5)])
    with pytest.raises(ValueError, match="teacher.*vocab_size"):
        kd.divergence(z, [a, torch.randn(2, 6)])
    with pytest.raises(ValueError, match="labels"):
        kd.divergence(z, [a, a], labels=torch.tensor([0, 5]), label_weight=0.5)


COMPOSED = {
    "token bound of the sum": {"clip": 0.5},
    "quantile": {"clip": kd.Clip(quantile=0.5)},
    "weights as divisor": {"normalize": "weights", "weight": torch.ones(3)},
    "standardize": {"standardize": True},
    "support": {"support": torch.tensor([[0, 2]]).expand(3, 2)},
    "learned temperature": {"temperature": torch.tensor(1.5, requires_grad=True)},
}


@pytest.mark.parametrize("why", [*COMPOSED, "teacher's gradient", "stored teacher", "torch.func"])
def test_what_is_composed(calls, why):
    """The table of docs/divergence.md; each is the sum of its parts."""
    student, (a, b) = logits(3, 6, 2)
    options = COMPOSED.get(why, {})
    teachers = [a, b]
    if why == "teacher's gradient":
        a.requires_grad_()
    if why == "stored teacher":
        top = b.log_softmax(-1).topk(4)
        teachers[1] = kd.TopK(top.values, top.indices)
    z = student.requires_grad_()

    def loss(z):
        return kd.divergence(z, teachers, **options)

    value = loss(z)
    if why == "torch.func":
        calls.clear()
        torch.func.grad(loss)(z.detach())
    assert calls == []
    value.backward()
    if "clip" not in options:
        each = sum(kd.divergence(z, t, **options) for t in teachers)
        close(value.detach(), each.detach())


def test_triton_adds_plain_calls(calls):
    pytest.importorskip("triton")
    if not next(r for r in kd.backends() if r.backend == "triton").available:
        pytest.skip("triton")
    student, teachers = logits(2, 9, 2)
    with kd.use_backend("triton"):
        z = student.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_()
        ts = [t.to(z.device) for t in teachers]
        loss = kd.divergence(z, ts)
        (gradient,) = torch.autograd.grad(loss, z)
    assert calls == []
    with kd.use_backend("torch"):
        close(gradient, torch.autograd.grad(kd.divergence(z, ts), z)[0])


def test_memory_is_one_gradient():
    """Everything that is allocated from the call to the gradient, with 4 teachers."""
    from torch.profiler import ProfilerActivity, profile

    student, teachers = logits(64, 3000, 4)
    with kd.use_backend("cpu"):
        z = student.requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            kd.divergence(z, teachers, "jensen_shannon", teacher_weights=[0.1, 0.2, 0.3, 0.4])\
                .backward()  # fmt: skip
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profiled.events())
    unit = student.numel() * student.element_size()
    assert unit <= allocated <= 1.05 * unit


def test_values_alone_make_no_gradient(summing, monkeypatch):
    student, teachers = logits(2, 8, 2)
    z, *ts = (x.to(summing.device) for x in (student, *teachers))
    monkeypatch.setattr(ops, "empty_like", lambda t: pytest.fail("a gradient was allocated"))
    assert not kd.divergence(z, ts).requires_grad
    c = torch.ones(2, device=summing.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(kd.divergence(z, ts, teacher_weights=c), c)
    for k in range(2):
        close(gradient[k], kd.divergence(z, ts[k]))
