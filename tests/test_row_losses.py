"""The divergence losses of the catalogue against plain torch float64, value and gradient.

Rows that are not selected hold NaN, so that a loss that multiplies by 0 shows.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd

B, L, V = 4, 5, 11


def batch():
    """(student, teacher, labels, rows that count); NaN where they do not."""
    z = 2 * torch.randn(B, L, V, dtype=torch.float64)
    a = z + torch.randn(B, L, V, dtype=torch.float64)
    y = torch.randint(0, V, (B, L))
    y[0, 1] = y[1, 4] = y[2, 0] = y[3, 2] = -100
    on = y != -100
    z[~on], a[~on] = math.nan, math.nan
    return z, a, y, on


def logs(z, a, tau=1.0, tau_t=None):
    return (z / tau).log_softmax(-1), (a / (tau_t or tau)).log_softmax(-1)


def kl(lp, lq):
    return (lp.exp() * (lp - lq)).sum(-1)


def nll(z, y):
    return -z.log_softmax(-1).gather(-1, y[..., None])[..., 0]


def jensen_shannon(lp, lq, beta):
    lm = (beta * lp.exp() + (1 - beta) * lq.exp()).log()
    return beta * kl(lp, lm) + (1 - beta) * kl(lq, lm)


def entropy(lq):
    return -(lq.exp() * lq).sum(-1)


def run(loss, z, *args, **extras):
    """(value, gradient) of a loss for a leaf."""
    leaf = z.clone().requires_grad_()
    value = loss(leaf, *args, **extras)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def check(loss, plain, teacher=True, **extras):
    """`plain(z, a, y)` takes the selected rows (n, V) alone."""
    z, a, y, on = batch()
    value, gradient = run(loss, z, a if teacher else None, y, **extras)
    expected, expected_gradient = run(plain, z[on], a[on], y[on])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient[on], expected_gradient, rtol=1e-5, atol=1e-8)
    assert not gradient[~on].any()


def forward(z, a, y, tau=1.0):
    lq, lp = logs(z, a, tau)
    return tau**2 * kl(lp, lq).mean()


def cross(z, a, y, tau=1.0):
    lq, lp = logs(z, a, tau)
    return -(lp.exp() * lq).sum(-1).mean()


def reverse(z, a, y, tau=1.0):
    lq, lp = logs(z, a, tau)
    return kl(lq, lp).mean()


def test_hinton_and_its_relatives():
    ce = lambda z, y: nll(z, y).mean()  # noqa: E731
    check(
        kd.loss("kd", alpha=0.3, temperature=2.0),
        lambda z, a, y: 0.3 * forward(z, a, y, 2.0) + 0.7 * ce(z, y),
    )
    check(kd.loss("kd", alpha=1.0), forward)
    check(kd.loss("kd", alpha=0.0), lambda z, a, y: ce(z, y))
    weight = torch.rand(V, dtype=torch.float64)
    check(
        kd.loss("hinton", alpha=0.3, class_weight=weight),
        lambda z, a, y: 0.3 * forward(z, a, y) + 0.7 * F.cross_entropy(z, y, weight),
    )
    check(kd.loss("born_again", temperature=2.0), lambda z, a, y: cross(z, a, y, 2.0))
    check(kd.loss("cartridges"), cross)
    check(kd.loss("minillm", temperature=2.0), lambda z, a, y: reverse(z, a, y, 2.0))
    check(
        kd.loss("entropy", temperature=2.0),
        lambda z, a, y: entropy((z / 2).log_softmax(-1)).mean(),
        teacher=False,
    )
    check(kd.loss("gkd", beta=0.3), lambda z, a, y: jensen_shannon(*logs(z, a)[::-1], 0.3).mean())
    check(kd.loss("distillspec", kind="reverse_kl"), reverse)
    check(kd.loss("kv_distill"), lambda z, a, y: 0.6 * forward(z, a, y) + 0.4 * reverse(z, a, y))
    check(
        kd.loss("pi_distill", entropy_weight=0.6),
        lambda z, a, y: reverse(z, a, y) + 0.4 * entropy(z.log_softmax(-1)).mean(),
    )
    check(
        kd.loss("distillm", kind="skew_reverse_kl"),
        lambda z, a, y: kl(
            z.log_softmax(-1), (0.9 * a.softmax(-1) + 0.1 * z.softmax(-1)).log()
        ).mean(),
    )
    with pytest.raises(ValueError, match="labels: kd needs it"):
        kd.loss("kd")(torch.randn(2, 3), torch.randn(2, 3))


def test_joint_pi_distill_and_padded_heads():
    z, a, y, on = batch()
    z, a = z.nan_to_num(0.0).requires_grad_(), a.nan_to_num(0.0).requires_grad_()
    value = kd.loss("pi_distill", kind="joint", alpha=0.3)(z, a, y)
    lq, lp = logs(z, a)
    plain = 0.3 * kl(lp, lq.detach())[on].mean() + 0.7 * kl(lp.detach(), lq)[on].mean()
    torch.testing.assert_close(value, plain)
    for actual, expected in zip(
        torch.autograd.grad(value, (z, a)), torch.autograd.grad(plain, (z, a))
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    z, a = z.detach(), torch.cat((a.detach(), a.detach()), -1)
    value = kd.loss("llava_mod", vocab_size=9)(z, a, y)
    torch.testing.assert_close(value, cross(z[on][:, :9], a[on][:, :9], None))


def test_abkd():
    def plain(alpha, beta):
        def value(z, a, y):
            q, p = z.softmax(-1), a.softmax(-1)
            s = alpha + beta
            rows = p**alpha * q**beta - alpha / s * p**s - beta / s * q**s
            return -rows.sum(-1).mean() / (alpha * beta)

        return value

    check(kd.loss("abkd"), plain(0.5, 0.5))
    check(kd.loss("abkd", alpha=0.2, beta=0.7), plain(0.2, 0.7))

    def released(z, a, y):  # beta = 0, alpha = .5
        q, p = z.softmax(-1) ** 0.5, a.softmax(-1) ** 0.5
        return 2 * (p * (p / q).log() - p + q).sum(-1).mean()

    check(kd.loss("abkd", alpha=0.5, beta=0.0, compat=True), released)
    check(kd.loss("abkd", alpha=0.5, beta=0.0), lambda z, a, y: 2 * released(z, a, y))


def test_hard_labels():
    check(
        kd.loss("hard_label", alpha=0.3),
        lambda z, a, y: 0.7 * nll(z, y).mean() + 0.3 * nll(z, a.argmax(-1)).mean(),
    )
    z, a, y, on = batch()
    weight = torch.rand(V, dtype=torch.float64)
    value = kd.loss("deit", class_weight=weight)((z, 2 * z), a, y)
    hard = F.cross_entropy(2 * z[on], a[on].argmax(-1), weight)
    torch.testing.assert_close(value, (nll(z[on], y[on]).mean() + hard) / 2)
    check(
        kd.loss("confidence_weighted_labels"),
        lambda z, a, y: (nll(z, y) * a.softmax(-1).amax(-1)).sum() / a.softmax(-1).amax(-1).sum(),
    )


def test_permuted_targets():
    z, a, _, on = batch()
    loss = kd.loss("dkpp", generator=torch.Generator().manual_seed(3))
    target = loss.permuted(a[on])
    assert torch.equal(target.sort(-1).values, a[on].sort(-1).values)
    assert torch.equal(target.argmax(-1), a[on].argmax(-1)) and not torch.equal(target, a[on])
    loss = kd.loss("dkpp", generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss(z[on], a[on]), cross(z[on], target, None))


def test_hidden_states_beside_logits():
    z, a, y, on = batch()
    s, t = torch.randn(B, L, 6, dtype=torch.float64), torch.randn(B, L, 6, dtype=torch.float64)
    hidden = {"student_hidden": s, "teacher_hidden": t}
    value = kd.loss("minitron", temperature=2.0, hidden_weight=0.5)(z, a, y, **hidden)
    mse = F.mse_loss(s[on], t[on])
    torch.testing.assert_close(value, forward(z[on], a[on], None, 2.0) + 0.5 * mse)
    smooth = F.smooth_l1_loss(s[on], t[on])
    value = kd.loss("fspad")(z, a, y, **hidden)
    torch.testing.assert_close(value, 0.1 * cross(z[on], a[on], None) + smooth)
    loss = kd.loss("falcon", hard_weight=0.0)
    p, (lq, lp) = a.softmax(-1), logs(z, a, 0.95)
    soft = (p * (lp - lq)).sum(-1)[on].mean()
    torch.testing.assert_close(loss(z, a, y, **hidden), 0.1 * 0.9 * soft + smooth)
    real = torch.rand(B, L) < 0.8
    value = kd.loss("distilbert")(z.nan_to_num(0.0), a.nan_to_num(0.0), y, mask=real, **hidden)
    z, a = z.nan_to_num(0.0), a.nan_to_num(0.0)
    cosine = (1 - F.cosine_similarity(s[real], t[real], dim=-1)).mean()
    plain = 5 * forward(z[real], a[real], None, 2.0) + cosine
    both = on & real
    torch.testing.assert_close(value, plain + 2 * nll(z[both], y[both]).mean())
    with pytest.raises(ValueError, match="student_hidden: fspad needs it"):
        kd.loss("fspad")(z, a, y)


def test_falcon_draws_from_the_teacher():
    a = torch.tensor([2.0, 0.0, 1.0]).log_softmax(-1).expand(20000, 3)
    loss = kd.loss(
        "falcon", soft_weight=0.0, hard_weight=1.0, logit_weight=1.0, hidden_weight=0.0,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    z = torch.tensor([1.0, -1.0, 0.5]).expand(20000, 3)
    # The mean of the drawn ids' cross entropy is the cross entropy; 5 standard errors.
    assert abs(loss(z, a).item() - cross(z[:1], a[:1], None).item()) < 0.05


def test_dkd():
    def plain(z, a, y):
        hot = F.one_hot(y, V).bool()
        lq, lp = logs(z, a, 1.7)
        cells = [
            torch.stack((x[hot], x.masked_fill(hot, -math.inf).logsumexp(-1)), -1) for x in (lq, lp)
        ]
        rest = [x[~hot].view(-1, V - 1).log_softmax(-1) for x in (lq, lp)]
        return 1.7**2 * (2 * kl(cells[1], cells[0]) + 8 * kl(rest[1], rest[0])).mean()

    check(kd.loss("dkd", alpha=2.0, temperature=1.7), plain)
    z, a = (
        torch.tensor([row], dtype=torch.float64) for row in ([1, -0.5, 0.3, 2], [0.2, 0.7, -1, 1.5])
    )
    golden = kd.loss("dkd", temperature=1.7)(z, a, torch.tensor([1]))
    assert abs(golden.item() - 0.6174138718) < 1e-9


def test_golden_values_of_the_papers():
    z, a = (
        torch.tensor([row], dtype=torch.float64) for row in ([1, -0.5, 0.3, 2], [0.2, 0.7, -1, 1.5])
    )
    y = torch.tensor([1])
    rows = {
        "ofa_kd": ({"temperature": 1.7, "exponent": 1.5}, 1.3558828303),
        "akl": ({}, 0.1817313859),
        "binary_kd": ({}, 0.6406938310),
        "falcon": (
            {"hidden_weight": 0.0, "hard_weight": 0.0, "logit_weight": 1 / 0.9},
            0.2584278945,
        ),
        "curiosft": ({"temperature_range": (1.7, 1.7)}, 4.3982007711),
    }
    for name, (parameters, value) in rows.items():
        assert abs(kd.loss(name, **parameters)(z, a, y).item() - value) < 1e-8, name
    # The entropy at 0.5 is that of the goldens; the label is the argmax of the student.
    value = kd.loss("dparallel")(z, None, torch.tensor([3]))
    assert abs(value.item() - nll(z, torch.tensor([3])).item() - 0.5171125049) < 1e-9


def test_ctkd():
    z, a, y, on = batch()
    loss = kd.loss("ctkd", ramp_steps=4)
    value = loss(z, a, y)
    tau = 1 + 20 / (1 + math.exp(-1))
    torch.testing.assert_close(value, forward(z[on], a[on], None, tau), rtol=1e-6, atol=1e-9)
    value.backward()
    assert loss.theta.grad == 0  # no reversal before the first step
    loss.step(), loss.step()
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    plain = forward(z[on], a[on], None, 1 + 20 * theta.sigmoid())
    (expected,) = torch.autograd.grad(plain, theta)
    loss.theta.grad = None
    loss(z, a, y).backward()
    torch.testing.assert_close(
        loss.theta.grad.double(), -(1 - math.cos(math.pi / 2)) / 2 * expected, rtol=1e-5, atol=1e-7
    )


def test_dtkd():
    def plain(z, a, y):
        top, other = z.amax(-1, keepdim=True), a.amax(-1, keepdim=True)
        lq = (z * (top + other) / (2 * top)).log_softmax(-1)
        lp = (a * (top + other) / (2 * other)).log_softmax(-1)
        return kl(lp, lq).mean()

    check(kd.loss("dtkd"), plain)


def test_dist():
    def pearson(x, y):
        x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + 1e-8)

    def plain(z, a, y):
        q, p = (z / 1.5).softmax(-1), (a / 1.5).softmax(-1)
        return 2 * (1 - pearson(q, p)).mean() + 3 * (1 - pearson(q.mT, p.mT)).mean()

    check(kd.loss("dist", beta=2.0, gamma=3.0, temperature=1.5), plain)


def test_weights_from_the_rows():
    def akl(z, a, y):
        q, p = z.detach().softmax(-1), a.softmax(-1)
        order = p.argsort(-1, descending=True)
        head = p.gather(-1, order).cumsum(-1) <= 0.5
        head[:, 0] = True
        gap = (p - q).abs().gather(-1, order)
        w = (gap * head).sum(-1) / gap.sum(-1)
        lq, lp = logs(z, a)
        return (w * kl(lp, lq) + (1 - w) * kl(lq, lp)).mean()

    check(kd.loss("akl"), akl)

    def bdkd(z, a, y):
        lq, lp = logs(z, a)
        wider = entropy(lq) > entropy(lp)
        u, v = torch.where(wider, 1.0, 3.0), torch.where(wider, 3.0, 1.0)
        return (-u * (lp.exp() * lq).sum(-1) + v * kl(lq, lp)).mean()

    check(kd.loss("bdkd"), bdkd)


def test_ofa_kd_and_windows():
    def ofa(z, a, y):
        hot = F.one_hot(y, V)
        target = (a.softmax(-1) + hot) ** 1.3 - hot
        return -(target * z.log_softmax(-1)).sum(-1).mean()

    check(kd.loss("ofa_kd", exponent=1.3), ofa)
    z, a, y, on = batch()
    stages = kd.loss("ofa_kd", exponent=1.3)([z, 2 * z], a, y)
    torch.testing.assert_close(stages, ofa(z[on], a[on], y[on]) + ofa(2 * z[on], a[on], y[on]))

    def window(z, a, y):
        p = a.softmax(-1)
        inside = (p >= 0.02) & (p <= 0.3) | F.one_hot(y, V).bool()
        lq, lp = (x.masked_fill(~inside, -1e9).log_softmax(-1) for x in (z, a))
        return kl(lp, lq).mean()

    check(kd.loss("windowed_kl", lower=0.02, upper=0.3), window)


def hellinger(z, a):
    root = (z.log_softmax(-1) / 2).exp() - (a.log_softmax(-1) / 2).exp()
    return root.norm(dim=-1) / math.sqrt(2)


def test_adakd():
    def plain(compat):
        def value(z, a, y):
            s = hellinger(z if compat else z.detach(), a)
            keep = s.detach().argsort(descending=True)[: max(1, math.floor(len(s) * 0.6))]
            median = s[keep].median()  # the lower one
            tau = torch.exp(-0.5 * torch.tanh(torch.log(s[keep] / median)))[:, None]
            lq, lp = (z[keep] / tau).log_softmax(-1), (a[keep] / tau).log_softmax(-1)
            return (tau[:, 0] ** 2 * kl(lq, lp)).mean()

        return value

    check(kd.loss("adakd", selection_ratio=0.6), plain(False))
    check(kd.loss("adakd", selection_ratio=0.6, compat=True), plain(True))
    equal = torch.randn(3, 7)
    assert kd.loss("adakd")(equal, equal) == 0
    assert kd.loss("adakd")(equal, equal, mask=torch.zeros(3, dtype=torch.bool)) == 0


def test_adakd_moves_its_ratio():
    loss = kd.loss("adakd", selection_ratio=0.5, ema_decay=0.0, warmup_steps=1)
    ratios = []
    for seen in (1.0, 1.02, 1.2, 1.0, 0.99):
        loss._seen = torch.tensor(seen)
        loss.step()
        ratios.append(round(float(loss.selection_ratio), 6))
    # Within the tolerance of the last change; a rise; a fall; within it again.
    assert ratios == [0.5, 0.5, 0.525, 0.49875, 0.49875]


def test_adaspec():
    z, a, y, on = batch()
    reference = z + torch.randn(B, L, V, dtype=torch.float64)
    check_rows = z[on], a[on], reference[on]

    def plain(z, a, ref):
        d = kl(*logs(z, a)[::-1]) - kl(*logs(ref, a)[::-1])
        keep = d >= d.quantile(0.6)
        return kl(*logs(z, a)[::-1])[keep].mean()

    value = kd.loss("adaspec")(z, a, y, reference=reference)
    torch.testing.assert_close(value, plain(*check_rows))
    with pytest.raises(ValueError, match="reference: adaspec needs it"):
        kd.loss("adaspec")(z, a, y)


@pytest.mark.parametrize("compat", [False, True])
def test_tsd_kd(compat):
    z, a, y, on = batch()
    lq, lp = logs(z, a)
    h = entropy(lq)
    direct = (torch.sigmoid(h - entropy(lp)) * jensen_shannon(lp, lq, 0.9))[on].mean()
    kept = h[on] >= h[on].quantile(0.1)
    total, count = 0.0, 0
    for b in range(B):
        rows = [t for t in range(L) if on[b, t]]
        spent = torch.stack([h[b, t] for t in rows]).cumsum(0) / sum(h[b, t] for t in rows)
        for t, so_far in zip(rows, spent):
            if so_far >= 0.5:
                break
            ids = z[b, t].topk(4).indices
            s = z[b, t][ids[a[b, t][ids].argsort(descending=True)]]
            s = s.flip(0) if compat else s
            total, count = total + (s.flip(0).logcumsumexp(0).flip(0) - s).sum(), count + 1
    expected = direct + h[on][kept].mean() + 0.1 * total / max(count, 1)
    value = kd.loss("tsd_kd", top_k=4, opener=0.5, compat=compat)(z, a, y)
    torch.testing.assert_close(value, expected)


def test_dparallel():
    def plain(z, a, y):
        right = z.argmax(-1) == y
        sure = entropy((z[right] / 0.5).log_softmax(-1)).sum() / max(int(right.sum()), 1)
        return nll(z, y).mean() + 2 * sure

    check(kd.loss("dparallel", entropy_weight=2.0), plain, teacher=False)


# Log-probabilities of labels. -------------------------------------------------------------------


def test_estimates_of_kl():
    def k1(z, a, y):
        return nll(a, y) - nll(z, y)

    check(kd.loss("kdrl"), lambda z, a, y: 5e-3 * (k1(z, a, y) ** 2 / 2).mean())
    loss = kd.loss("kdrl", beta=2e-3, beta_end=1e-3, beta_step=6e-4)
    loss.step()
    assert abs(float(loss.beta) - 1.4e-3) < 1e-15
    loss.step()
    assert float(loss.beta) == 1e-3
    old = torch.randn(B, L, dtype=torch.float64)
    on = batch()[3]

    def weighted(z, a, y):
        x = k1(z, a, y)
        return (torch.exp(-nll(z, y) - old[on]) * (torch.exp(-x) - 1 + x)).mean()

    check(kd.loss("skill_sd"), weighted, old_log_probs=old)

    def sdpo(z, a, y):
        ratio = torch.exp(-nll(z, y).detach() - old[on]).clamp(max=2.0)
        return (ratio * k1(z, a, y).detach() * -nll(z, y)).mean()

    check(kd.loss("sdpo"), sdpo, old_log_probs=old)
    check(kd.loss("sdpo"), lambda z, a, y: (k1(z, a, y).detach() * -nll(z, y)).mean())


def test_iw_opd_and_rltf_sd():
    z, a, y, on = batch()
    old, gain = (torch.randn(B, L, dtype=torch.float64) for _ in range(2))
    old = old - 4
    log_q, log_p = (torch.where(on, -nll(x.nan_to_num(0.0), y.clamp(min=0)), 0.0) for x in (z, a))
    size = torch.where(on, log_p - old, 0.0)
    before = torch.stack([size[:, :t].abs().sum(1) for t in range(L)], 1)
    weight = 1 + 0.5 * (1 - before / size.abs().sum(1, keepdim=True))
    expected = -(weight * size * log_q)[on].mean()
    torch.testing.assert_close(kd.loss("iw_opd")(z, a, y, old_log_probs=old), expected)
    keep = on & (old >= -5)
    values = (log_q - old).exp() * gain
    means = [values[b][keep[b]].mean() for b in range(B) if keep[b].any()]
    value = kd.loss("rltf_sd")(z, None, y, old_log_probs=old, advantages=gain)
    torch.testing.assert_close(value, -0.1 * torch.stack(means).mean())


def test_dpo():
    z, a, y, on = batch()

    def plain(z):
        q, p = (
            torch.where(on, -nll(x.nan_to_num(0.0), y.clamp(min=0)), 0.0).sum(1) for x in (z, a)
        )
        gap = q - p
        return -F.logsigmoid(0.1 * (gap[:2] - gap[2:])).mean()

    torch.testing.assert_close(kd.loss("dpo")(z, a, y), plain(z))
    with pytest.raises(ValueError, match="even size of dim 0"):
        kd.loss("dpo")(z[:3], a[:3], y[:3])


def test_curiosft_temperature():
    a = torch.randn(6, 40, dtype=torch.float64) * torch.tensor(
        [[0.5], [1.0], [2.0], [1.0], [1.0], [30.0]]
    )
    loss = kd.loss("curiosft", top_k=40)
    tau = loss.temperature(a, torch.ones(6, dtype=torch.bool))
    one = entropy(a.log_softmax(-1))
    target = one + torch.sigmoid(2 * (one - 1.2)) / 2
    reached = entropy((a / tau[:, None]).log_softmax(-1))
    inside = (tau > 1.1001) & (tau < 1.4999)
    torch.testing.assert_close(reached[inside], target[inside], rtol=1e-4, atol=1e-4)
    assert bool((reached[tau < 1.1001] >= target[tau < 1.1001] - 1e-4).all() | (one[-1] < 0.03))
    assert bool((reached[tau > 1.4999] <= target[tau > 1.4999] + 1e-4).all())
    assert tau[-1] == 1.1


@pytest.mark.parametrize("compat", [False, True])
def test_distillm_2(compat):
    loss = kd.loss("distillm_2", weight=1.2, compat=compat)

    def plain(z, a, y, on, anchors):
        total = 0.0
        for side, name in enumerate(("chosen_anchor", "rejected_anchor")):
            half = slice(2 * side, 2 * side + 2)
            rows = [(z[b][on[b]], a[b][on[b]], y[b][on[b]]) for b in range(B)[half]]
            gap = torch.stack(
                [(-nll(t, c)).mean().exp() - (-nll(s, c)).mean().exp() for s, t, c in rows]
            )
            gap = -gap if side else gap
            anchor = anchors.get(name, gap.detach().mean())
            skew = (1 - 0.9 * anchor / (gap + 1e-5)).clamp(0.01, 0.1)
            skew = skew if compat else skew.detach()
            for alpha, (s, t, _) in zip(skew, rows):
                lq, lp = logs(s, t)
                q = lq.exp().detach() if side else lq.exp()
                if side:
                    value = kl(lq, ((1 - alpha) * lp.exp() + alpha * q).log()).mean()
                else:
                    value = kl(lp, (alpha * lp.exp() + (1 - alpha) * q).log()).mean()
                total = total + (1.2 if side else 0.8) * value / 2
        return total

    z, a, y, on = batch()
    value, gradient = run(loss, z, a, y)
    expected, plain_gradient = run(plain, z, a, y, on, {})
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient[on], plain_gradient[on], rtol=1e-5, atol=1e-8)
    loss.step()
    anchors = {n: getattr(loss, n) for n in ("chosen_anchor", "rejected_anchor")}
    z, a, y, on = batch()
    torch.testing.assert_close(loss(z, a, y), plain(z, a, y, on, anchors), rtol=1e-6, atol=1e-9)
    fixed = kd.loss("distillm2", adaptive=False)(z, a, y)
    torch.testing.assert_close(
        fixed, kd.loss("distillm_2", alpha=0.1, alpha_min=0.1)(z, a, y), rtol=1e-6, atol=1e-9
    )


# Classifiers and detectors. ---------------------------------------------------------------------


def test_sigmoid_scores():
    def focal(z, a, beta):
        gap = (a.sigmoid() - z.sigmoid()).abs() ** beta
        return gap * F.binary_cross_entropy_with_logits(z, a.sigmoid(), reduction="none")

    check(kd.loss("binary_kd", beta=2.0), lambda z, a, y: focal(z, a, 2.0).sum(-1).mean())
    check(kd.loss("bckd"), lambda z, a, y: focal(z, a, 1.0).sum() / 7, num_items=7)
    check(kd.loss("quality_focal"), lambda z, a, y: focal(z, a, 1.0).mean())
    x = torch.randn(3, 4, requires_grad=True)
    kd.loss("bckd", beta=0.5)(x, x.detach()).backward()
    assert bool(x.grad.isfinite().all())


def test_label_augmentation():
    joint, single = torch.randn(3 * 5, 3 * 4), torch.randn(5, 4)
    y = torch.tensor([0, 3, -100, 1, 2])
    value = kd.loss("sla_sd", temperature=2.0)((joint, single), None, y)
    on = y != -100
    target = torch.stack([joint[i::3, i::3] for i in range(3)]).mean(0)
    wide = torch.stack([3 * y + i for i in range(3)], 1)[on].reshape(-1)
    rows = joint.view(5, 3, 12)[on].reshape(-1, 12)
    expected = F.cross_entropy(rows, wide) + F.cross_entropy(single[on], y[on])
    torch.testing.assert_close(value, expected + forward(single[on], target[on], None, 2.0))


def test_xded_and_subclasses():
    z, y = torch.randn(6, 4), torch.tensor([1, 0, 1, -100, 1, 0])
    on = y != -100
    mean = torch.stack([z[(y == c)].mean(0) for c in y[on]])
    expected = F.cross_entropy(z[on], y[on]) + 5 * forward(z[on], mean, None, 4.0)
    torch.testing.assert_close(kd.loss("xded")(z, None, y), expected, rtol=1e-5, atol=1e-6)
    z, a = torch.randn(5, 8), torch.randn(5, 8)
    y = torch.tensor([0, 3, 1, 2, 0])
    classes = z.softmax(-1).view(5, 4, 2).sum(-1).log()
    expected = 0.3 * forward(z, a, None, 2.0) + 0.7 * F.nll_loss(classes, y)
    value = kd.loss("subclass_kd", subclasses=2, alpha=0.3, temperature=2.0)(z, a, y)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_num_items_replaces_the_mean_and_half_inputs_give_float32():
    z, a, y, on = batch()
    for name in ("kd", "gkd", "bdkd", "adakd", "dkd", "sdpo", "curiosft", "binary_kd", "ofa_kd"):
        loss = kd.loss(name)
        mean, given = loss(z, a, y), loss(z, a, y, num_items=32)
        torch.testing.assert_close(given, mean * int(on.sum()) / 32)
        half = loss(z.nan_to_num(0.0).half(), a.nan_to_num(0.0).half(), y)
        assert half.dtype == torch.float32, name
        torch.testing.assert_close(half.double(), mean, rtol=2e-2, atol=1e-2)
