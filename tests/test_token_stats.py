"""kd.token_stats, kd.label_log_probs and kd.kl_estimate on every backend."""

from __future__ import annotations

import pytest
import torch
from numerics.divergence_goldens import STUDENT, TEACHER, TEMPERATURE

import kdkernels as kd
from kdkernels.backends import native
from kdkernels.testing import tolerances

# Published values (float64) of the goldens' row pair at tau = 1.7.
GOLDENS = {
    "student_entropy": 1.2463999233,
    "teacher_entropy": 1.2673262695,
    "student_lse": 1.9433217006,
    "teacher_lse": 1.7238752193,
    "forward_kl": 0.1125597507,
    "reverse_kl": 0.0938653894,
    "total_variation": 1 - 0.8374802589,
    "hellinger": 0.1595065978,
    "dot": 0.2976264640,
    "teacher_square": 0.3083725215,
    "student_square": 0.3228490220,
    "student_max_prob": 0.4644733424,
    "teacher_max_prob": 0.4310538399,
    "student_max_logit": 2.0,
    "teacher_max_logit": 1.5,
    "agreement": 1.0,
}
SMALL = ("forward_kl", "reverse_kl", "total_variation", "hellinger")
IDS = ("student_argmax", "teacher_argmax")


def logits(rows, width, gap=1.0, std=3.0, dtype=torch.float32, device="cpu"):
    """student = teacher + gap x noise; every fourth row collapsed on one entry."""
    teacher = torch.randn(rows, width, dtype=torch.float64) * std
    teacher[::4, width // 2] += 30.0
    student = teacher + gap * torch.randn(rows, width, dtype=torch.float64)
    return student.to(device, dtype), teacher.to(device, dtype)


def plain(student, teacher, labels=None, tau_s=1.0, tau_t=1.0) -> dict:
    """Every statistic in torch's own float64 words, for rows without -inf."""
    z, a = student.double().cpu(), teacher.double().cpu()
    u, v = z / tau_s, a / tau_t
    log_q, log_p = u.log_softmax(-1), v.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    ratio = log_p - log_q

    def kl(x, r):  # sum x (e^-r - 1 + r)
        return (x * (torch.expm1(-r) + r)).sum(-1)

    out = {
        "student_lse": u.logsumexp(-1),
        "teacher_lse": v.logsumexp(-1),
        "student_entropy": -(q * log_q).sum(-1),
        "teacher_entropy": -(p * log_p).sum(-1),
        "forward_kl": kl(p, ratio),
        "reverse_kl": kl(q, -ratio),
        "total_variation": (q * torch.expm1(ratio)).abs().sum(-1) / 2,
        "hellinger": ((q * torch.expm1(ratio / 2) ** 2).sum(-1) / 2).sqrt(),
        "student_argmax": z.argmax(-1),
        "teacher_argmax": a.argmax(-1),
        "student_max_logit": z.amax(-1),
        "teacher_max_logit": a.amax(-1),
        "student_max_prob": q.amax(-1),
        "teacher_max_prob": p.amax(-1),
        "dot": (p * q).sum(-1),
        "student_square": (q * q).sum(-1),
        "teacher_square": (p * p).sum(-1),
    }
    out["agreement"] = (out["student_argmax"] == out["teacher_argmax"]).double()
    if labels is not None:
        index = labels.cpu()[..., None]
        out["student_label_log_prob"] = log_q.gather(-1, index)[..., 0]
        out["teacher_label_log_prob"] = log_p.gather(-1, index)[..., 0]
    return out


def assert_stats(stats, expected: dict) -> None:
    for name, value in expected.items():
        actual = getattr(stats, name)
        if name in IDS:
            assert actual.dtype == torch.int64 and torch.equal(actual.cpu(), value), name
            continue
        assert actual.dtype == torch.float32 and not actual.requires_grad, name
        # Differences of close rows are relative; logarithms carry the rounding of a logit.
        floor = tolerances.floor(name, torch.float32) if name in SMALL else 5e-6
        torch.testing.assert_close(
            actual.double().cpu(),
            value,
            rtol=1e-5,
            atol=floor,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_golden_values(backend):
    z = torch.tensor([STUDENT], device=backend.device)
    a = torch.tensor([TEACHER], device=backend.device)
    label = torch.tensor([1], device=backend.device)
    stats = kd.token_stats(z, a, label, TEMPERATURE)
    for name, value in GOLDENS.items():
        assert abs(getattr(stats, name).item() - value) <= 2e-6, name
    assert stats.student_argmax.item() == 3 and stats.teacher_argmax.item() == 3
    assert abs(stats.student_label_log_prob.exp().item() - 0.1067314569) < 1e-6
    assert abs(stats.teacher_label_log_prob.exp().item() - 0.2692511981) < 1e-6
    names = [name for name in kd.TokenStats._fields if getattr(stats, name) is None]
    assert len(kd.TokenStats._fields) == 20 and not names


@pytest.mark.parametrize("width", [1, 7, 1500])
def test_against_float64(backend, width):
    labels = torch.randint(0, width, (5,))
    for dtype in backend.dtypes:
        student, teacher = logits(5, width, dtype=dtype, device=backend.device)
        stats = kd.token_stats(student, teacher, labels.to(backend.device), 1.5, 2.0)
        assert_stats(stats, plain(student, teacher, labels, 1.5, 2.0))


def test_mixed_dtypes_strides_leading_shapes_and_tensor_temperatures(backend):
    student, teacher = logits(6, 130, device=backend.device)
    student = torch.cat((student, student), 1).view(2, 3, 260)[..., 1:131]  # misaligned, strided
    teacher = teacher.to(torch.bfloat16).t().contiguous().t().view(2, 3, 130)
    tau = torch.rand(2, 3) + 0.5
    stats = kd.token_stats(
        student, teacher, temperature=tau.to(backend.device), teacher_temperature=1.3
    )
    assert_stats(stats, plain(student, teacher, None, tau.double()[..., None], 1.3))
    assert stats.dot.shape == (2, 3) and not stats.student_label_log_prob.any()
    empty = kd.token_stats(student[:0], teacher[:0])
    assert empty.forward_kl.shape == (0, 3)


@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01, 0.001])
def test_small_gaps_keep_their_relative_accuracy(backend, gap):
    # Without fused multiply-add exponentials lose two bits.
    slow = backend.name == "cpu" and native.extension("_C").isa() == "baseline"
    bound = 4e-5 if slow else 1e-5
    for std in (1.0, 5.0, 10.0):
        student, teacher = logits(4, 1500, gap=gap, std=std, device=backend.device)
        student, teacher = student[1:], teacher[1:]  # the collapsed row's values are rounding
        stats, expected = kd.token_stats(student, teacher), plain(student, teacher)
        for name in SMALL:
            torch.testing.assert_close(
                getattr(stats, name).double().cpu(), expected[name], rtol=bound, atol=0
            )


def test_equal_rows_are_exactly_equal(backend):
    student, _ = logits(4, 333, device=backend.device)
    stats = kd.token_stats(student, student)
    for name in SMALL:
        assert torch.equal(getattr(stats, name).cpu(), torch.zeros(4)), name
    assert torch.equal(stats.agreement.cpu(), torch.ones(4))


def test_ties_go_to_the_lowest_id(backend):
    student = torch.zeros(2, 3000, device=backend.device)
    student[1, [70, 1500, 2999]] = 2.0
    teacher = torch.zeros(2, 3000, device=backend.device)
    teacher[0, [2999, 1033]] = 1.0
    stats = kd.token_stats(student, teacher)
    assert stats.student_argmax.tolist() == [0, 70]
    assert stats.teacher_argmax.tolist() == [1033, 0]
    assert stats.agreement.tolist() == [0.0, 0.0]


def test_special_rows(backend):
    inf = float("inf")
    student, teacher = logits(7, 40, device=backend.device)
    student[0, 3], teacher[1, 5] = float("nan"), inf
    teacher[2] = -inf
    student[3, 7] = -inf  # q = 0 < p
    teacher[4, 9] = -inf  # p = 0 < q
    student[5, 11] = teacher[5, 11] = -inf
    student[6] = float("nan")
    labels = torch.tensor([1, 1, 1, 7, 1, 1, -100], device=backend.device)
    stats = kd.token_stats(student, teacher, labels)
    reference = plain(student, teacher, labels.clamp(min=0))
    for row in (0, 1):
        for name in set(kd.TokenStats._fields) - set(IDS):
            assert getattr(stats, name)[row].isnan(), (row, name)
        assert stats.student_argmax[row] == 0 and stats.teacher_argmax[row] == 0
    for name in (*SMALL, "dot", "teacher_entropy", "teacher_max_prob", "teacher_square"):
        assert getattr(stats, name)[2] == 0, name
    assert stats.teacher_lse[2] == -inf and stats.teacher_max_logit[2] == -inf
    assert stats.student_label_log_prob[3] == -inf and stats.teacher_argmax[2] == 0
    assert stats.forward_kl[3] == inf and stats.reverse_kl[3].isfinite()
    assert stats.reverse_kl[4] == inf and stats.forward_kl[4].isfinite()
    both = [v for v in range(40) if v != 11]
    assert_stats(
        kd.TokenStats(*(None if f is None else f[5:6] for f in stats)),
        {
            k: v
            for k, v in plain(student[5:6, both], teacher[5:6, both], None).items()
            if k not in IDS
        },
    )
    for field in stats:
        assert field[6] == 0
    for row in (2, 3, 4):
        for name in ("student_lse", "student_max_logit", "student_max_prob"):
            assert abs(getattr(stats, name)[row].cpu() - reference[name][row]) < 1e-4


def test_masks_and_padded_heads(backend):
    student, teacher = logits(4, 50, device=backend.device)
    wide = torch.cat((teacher, torch.full((4, 14), 9e9, device=backend.device)), 1)
    mask = torch.tensor([True, False, True, True], device=backend.device)
    stats = kd.token_stats(student, wide, mask=mask, vocab_size=50, teacher_vocab_size=50)
    expected = {k: v * mask.cpu() for k, v in plain(student, teacher).items()}
    assert_stats(stats, expected)
    with pytest.raises(ValueError, match="teacher: the last dimension"):
        kd.token_stats(student, wide)


def test_student_alone(backend):
    student, teacher = logits(3, 65, device=backend.device)
    stats = kd.token_stats(student, labels=torch.zeros(3, dtype=torch.int64).to(backend.device))
    expected = plain(student, teacher, torch.zeros(3, dtype=torch.int64))
    mine = {k: v for k, v in expected.items() if k.startswith("student_")}
    assert_stats(stats, mine)
    assert all(getattr(stats, k) is None for k in expected if k not in mine)


def test_return_stats_of_a_divergence(backend):
    student, teacher = logits(4, 90, device=backend.device)
    labels = torch.tensor([3, -100, 5, 89], device=backend.device)
    options = {"labels": labels, "temperature": 1.3, "teacher_temperature": 0.8}
    z = student.clone().requires_grad_()
    rows, stats = kd.divergence(z, teacher, reduction="none", return_stats=True, **options)
    alone = kd.token_stats(student, teacher, **options)
    assert all(torch.equal(x, y) for x, y in zip(stats, alone))
    torch.testing.assert_close(rows.detach(), stats.forward_kl, rtol=2e-5, atol=1e-9)
    loss, stats = kd.divergence(z * 1.0, teacher, inplace=True, return_stats=True, **options)
    loss.backward()
    assert torch.equal(stats.dot, alone.dot)


def test_return_stats_beside_other_options():
    student, teacher = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    kind = (("hellinger", 0.5), ("forward_kl", 0.5))  # two passes
    loss, stats = kd.divergence(student, teacher, kind, return_stats=True)
    assert_stats(stats, plain(student, teacher))
    torch.testing.assert_close(loss, kd.divergence(student, teacher, kind))
    for options in ({"standardize": True}, {"teacher_bias": torch.zeros(3)}, {"class_dim": 1}):
        with pytest.raises(ValueError, match="return_stats: goes with one dense teacher"):
            kd.divergence(student, teacher, return_stats=True, **options)
    with pytest.raises(ValueError, match="return_stats: goes with one dense teacher"):
        kd.divergence(student, [teacher, teacher], return_stats=True)


# label_log_probs. -------------------------------------------------------------------------------


def label_case(backend, dtype=torch.float32, rows=6, width=97):
    z, _ = logits(rows, width, dtype=dtype, device=backend.device)
    labels = torch.randint(0, width, (rows,), device=backend.device)
    labels[0] = width // 2  # the collapsed entry
    labels[2] = -100
    upstream = torch.randn(rows, dtype=torch.float64)
    return z, labels, upstream.to(backend.device)


@pytest.mark.parametrize("width", [1, 97, 3000])
def test_label_log_probs_against_float64(backend, width):
    for dtype in backend.dtypes:
        z, labels, upstream = label_case(backend, dtype, width=width)
        tau = torch.rand(6, dtype=torch.float64, device=backend.device) + 0.5
        z.requires_grad_()
        given = tau.to(torch.float64 if dtype == torch.float64 else torch.float32)
        given.requires_grad_()
        value = kd.label_log_probs(z, labels, given)
        value.backward(upstream.to(value.dtype))
        exact = z.detach().double().requires_grad_()
        exact_tau = given.detach().double().requires_grad_()
        log_soft = (exact / exact_tau[:, None]).log_softmax(-1)
        expected = log_soft.gather(-1, labels.clamp(min=0)[:, None])[:, 0] * (labels != -100)
        expected.backward(upstream.to(value.dtype).double())
        double = dtype == torch.float64
        torch.testing.assert_close(
            value.double(), expected, rtol=1e-5, atol=1e-9 if double else 5e-6
        )
        tolerances.assert_gradient(z.grad, exact.grad, upstream.abs()[:, None].cpu() * 2, dtype)
        torch.testing.assert_close(
            given.grad.double(), exact_tau.grad, rtol=2e-5, atol=1e-9 if double else 1e-3
        )


def test_label_log_probs_of_special_rows(backend):
    z, labels, _ = label_case(backend)
    z[1, 4], z[3, 5] = float("nan"), -float("inf")
    z[2], z[4] = float("nan"), -float("inf")
    labels[3] = 5
    z.requires_grad_()
    value = kd.label_log_probs(z, labels)
    assert value[1].isnan() and value[2] == 0
    assert value[3] == -float("inf") and value[4] == -float("inf")
    value.sum().backward()
    assert z.grad[1].isnan().all()
    assert not z.grad[2].any() and not z.grad[4].any()
    soft = z.detach()[3].double().softmax(-1)
    torch.testing.assert_close(z.grad[3].double(), -soft, rtol=1e-5, atol=1e-6)


def test_labels_out_of_range():
    z = torch.randn(2, 5, requires_grad=True)
    for bad in (5, -1):
        with pytest.raises(ValueError, match="labels: expected 0 to 4 or -100"):
            kd.label_log_probs(z, torch.tensor([0, bad]))
        with pytest.raises(ValueError, match="labels"):
            kd.token_stats(z, z, torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="labels"):
        kd.label_log_probs(z, torch.tensor([0, 4]), vocab_size=4)


def test_labels_out_of_range_where_nobody_may_look(backend):
    """The kernels themselves: NaN, gradient 0, nothing outside of the row."""
    from kdkernels.ops import token_stats as ops

    z = torch.randn(3, 5, device=backend.device)
    labels = torch.tensor([1, 10**12, -7], device=backend.device)
    numbers = ops.LabelNumbers(1.0, -100.0, 0.0)
    value, stats = ops._forward(z, labels, None, None, numbers)
    assert value.isnan().tolist() == [False, True, True]
    ones = torch.ones(3, device=backend.device)
    gradient, tau = ops._backward(z, labels, None, None, stats, ones, numbers, True, True)
    assert gradient[0].any() and not gradient[1:].any() and not tau[1:].any()
    out, ids = ops._stats(z, z, labels, None, None, None, ops.StatsNumbers(1, 1, -100, 0, 0))
    assert not out[:, 0].isnan().any() and out[:, 1:].isnan().all() and not ids[:, 1:].any()


def test_label_gradcheck(double_backend):
    z = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    tau = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    labels = torch.tensor([0, 8, -100])
    assert torch.autograd.gradcheck(lambda z, t: kd.label_log_probs(z, labels, t), (z, tau))


def test_autograd_doors(kernel_backend):
    z = torch.randn(4, 11, device=kernel_backend.device, requires_grad=True)
    labels = torch.tensor([0, 10, -100, 3], device=kernel_backend.device)
    value = kd.label_log_probs(z, labels, 2.0).sum()
    (first,) = torch.autograd.grad(value, z, retain_graph=True)
    (second,) = torch.autograd.grad(value, z)
    assert torch.equal(first, second)
    by_func = torch.func.grad(lambda x: kd.label_log_probs(x, labels, 2.0).sum())(z.detach())
    assert torch.equal(first, by_func)

    def weighted(x):
        stats = kd.token_stats(x, x * 0.5, labels)
        return (kd.label_log_probs(x, labels) * stats.student_entropy).sum()

    (expected,) = torch.autograd.grad(weighted(z), z)
    assert torch.equal(torch.func.grad(weighted)(z.detach()), expected)
    (once,) = torch.autograd.grad(kd.label_log_probs(z, labels).sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="label_log_probs has no second derivative"):
        once.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda x: kd.token_stats(x).student_lse)(z.detach()[None])


def test_compile_and_opcheck():
    z = torch.randn(2, 3, 13, requires_grad=True)
    teacher = torch.randn(2, 3, 13)
    labels = torch.tensor([[0, 1, -100], [12, 3, 4]])

    def both(z):
        loss, stats = kd.divergence(z, teacher, labels=labels, return_stats=True)
        return loss + (kd.label_log_probs(z, labels, 1.5) * stats.teacher_entropy).sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(both(z), z)
    (actual,) = torch.autograd.grad(compiled(z), z)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    flat, tau = labels.view(-1), torch.full((6,), 1.5, requires_grad=True)
    torch.library.opcheck(
        torch.ops.kdkernels.label_log_probs.default, (z, flat, None, tau, [1.0, -100.0, 0.0])
    )
    torch.library.opcheck(
        torch.ops.kdkernels.token_stats.default,
        (z.detach(), teacher, flat, None, None, None, [1.0, 1.0, -100.0, 0.0, 0.0]),
    )


# kl_estimate. -----------------------------------------------------------------------------------

KL_GOLDENS = {  # value, gradient of the goldens' student logits through log q[1]
    "k1": (-0.9253288343, [-0.1517205923, 0.5254520843, -0.1005118788, -0.2732196134]),
    "k2": (0.4281167258, [0.1403914388, -0.4862159646, 0.0930065396, 0.2528179864]),
    "k3": (0.5973688392, [0.231024593, -0.8001046661, 0.1530492035, 0.4160308695]),
}


@pytest.mark.parametrize("kind", KL_GOLDENS)
def test_kl_estimate_golden_values(backend, kind):
    z = torch.tensor([STUDENT], device=backend.device, requires_grad=True)
    a = torch.tensor([TEACHER], device=backend.device)
    label = torch.tensor([1], device=backend.device)
    log_q = kd.label_log_probs(z, label, TEMPERATURE)
    value = kd.kl_estimate(log_q, kd.label_log_probs(a, label, TEMPERATURE), kind)
    value.sum().backward()
    expected, gradient = KL_GOLDENS[kind]
    assert abs(value.item() - expected) < 2e-6
    torch.testing.assert_close(z.grad[0].cpu(), torch.tensor(gradient), rtol=0, atol=2e-6)


def test_kl_estimate_weights_and_policy():
    log_q = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([-1.5, -0.5], dtype=torch.float64)
    k1 = log_q.detach() - log_p
    policy = kd.kl_estimate(log_q, log_p, "k1_policy")
    torch.testing.assert_close(policy, k1 * log_q)
    torch.testing.assert_close(torch.autograd.grad(policy.sum(), log_q)[0], k1)
    # rho k3 at q_old = q: the value of k3, the gradient of k2.
    weighted = kd.kl_estimate(log_q, log_p, "k3", old_log_q=log_q)
    torch.testing.assert_close(weighted, torch.exp(-k1) - 1 + k1)
    torch.testing.assert_close(torch.autograd.grad(weighted.sum(), log_q)[0], k1)
    old = log_q.detach() - torch.tensor([0.3, -0.2], dtype=torch.float64)
    rho = torch.tensor([0.3, -0.2], dtype=torch.float64).exp()
    torch.testing.assert_close(kd.kl_estimate(log_q, log_p, "k2", old), rho * k1 * k1 / 2)
    with pytest.raises(ValueError, match="kind: expected one of k1, k2, k3, k1_policy"):
        kd.kl_estimate(log_q, log_p, "k4")
    with pytest.raises(ValueError, match="log_p: expected shape"):
        kd.kl_estimate(log_q, log_p[:1])


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffle"])
def test_schedule_orders_of_simt(order):
    report = next(r for r in kd.backends() if r.backend == "simt" and r.family == "divergence")
    if not report.available:
        pytest.skip(report.why_not)
    from kdkernels.backends import simt

    student, teacher = logits(3, 1100, gap=0.01)
    labels = torch.tensor([5, 7, 1099])
    z = student.clone().requires_grad_()
    simt.set_order(order, 3)
    try:
        with kd.use_backend("simt"):
            stats = kd.token_stats(student, teacher, labels)
            kd.label_log_probs(z, labels).sum().backward()
    finally:
        simt.set_order("ascending")
    assert_stats(stats, plain(student, teacher, labels))
    hot = torch.nn.functional.one_hot(labels, 1100).double()
    tolerances.assert_gradient(z.grad, hot - student.double().softmax(-1), 1.0)
