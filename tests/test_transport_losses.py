"""The transport losses against their papers' code, restated here in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalise(cost, epsilon, iterations, first_dim):
    """K = exp(-C / epsilon), divided by its sums over first_dim, then over the other."""
    kernel = (-cost / epsilon).exp()
    for _ in range(iterations):
        kernel = kernel / kernel.sum(first_dim, keepdim=True)
        kernel = kernel / kernel.sum(1 - first_dim, keepdim=True)
    return (kernel * cost).sum()


def gradients_agree(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)


def test_sinkd():
    z, a = randn(8, 5).requires_grad_(), randn(8, 5, seed=1)
    p, q = (z / 2).softmax(-1), (a / 2).softmax(-1)
    expected = 0.001 * normalise(torch.cdist(p, q, p=1), 0.1, 20, 1)
    gradients_agree(kd.loss("sinkd")(z, a), expected, z)
    mask = torch.tensor([True] * 6 + [False] * 2)
    torch.testing.assert_close(kd.loss("sinkd")(z, a, mask=mask), kd.loss("sinkd")(z[:6], a[:6]))


def test_uld():
    z, a = randn(3, 6, 11).requires_grad_(), randn(3, 7, 9, seed=1)
    labels = torch.full((3, 6), -100)
    teacher_labels = torch.full((3, 7), -100)
    labels[0, 2:6] = labels[1, 0:2] = 1
    labels[1, 4] = 1
    teacher_labels[0, 1:4] = teacher_labels[1, 0:7] = teacher_labels[2, 1] = 1  # 2: no student

    def literal(skip):
        total = []
        for k in range(3):
            s, t = z[k][labels[k] != -100], a[k][teacher_labels[k] != -100]
            if skip:
                s, t = s[: max(len(s) - 1, 0)], t[: max(len(t) - 1, 0)]
            n = min(len(s), len(t))
            if n == 0:
                continue
            p = (s[:n] / 1.5).softmax(-1).sort(-1, descending=True).values
            q = (t[:n] / 1.2).softmax(-1).sort(-1, descending=True).values
            total.append((p - F.pad(q, (0, 2))).abs().sum(-1).mean())
        return torch.stack(total).mean()

    for skip in (False, True):
        loss = kd.loss("uld", student_temperature=1.5, teacher_temperature=1.2,
                       skip_student_eos=skip, skip_teacher_eos=skip)  # fmt: skip
        gradients_agree(loss(z, a, labels, teacher_labels=teacher_labels), literal(skip), z)


@pytest.mark.parametrize("presort", (False, True))
def test_multi_level_ot(presort):
    z, a = randn(2, 5, 30).requires_grad_(), randn(2, 6, 25, seed=1)
    labels, teacher_labels = torch.full((2, 5), -100), torch.full((2, 6), -100)
    labels[0, 1:4] = labels[1, 0:5] = 1
    teacher_labels[0, 2:6] = teacher_labels[1, 0:2] = 1

    def side(x, chosen):
        out = x.new_zeros(2, 5, x.shape[-1])
        for k in range(2):
            rows = x[k][chosen[k] != -100]
            rows = rows / (rows.std(-1, keepdim=True) + 1e-4)
            p = rows.softmax(-1)
            if presort:
                p = p.sort(-1, descending=True).values
            out = out.clone()
            out[k, : len(p)] = p
        order = out.sum((0, 1)).sort(descending=True).indices[:8]
        return out[:, :, order]

    s, t = side(z, labels), side(a, teacher_labels)
    sizes = (3, 2)
    absolute = torch.stack([(s - t)[k, :n].abs().sum(-1).mean() for k, n in enumerate(sizes)])
    cross = -(s.softmax(-1) * t.log_softmax(-1)).sum(-1).mean()
    sink = sum(
        normalise(torch.cdist((s[k] / 2).softmax(-1), (t[k] / 2).softmax(-1), p=1), 0.1, 10, 0)
        for k in range(2)
    )
    expected = absolute.mean() + 0.1 * cross + 1e-4 * sink
    ours = kd.loss("multi_level_ot", columns=8, presort=presort)(
        z, a, labels, teacher_labels=teacher_labels
    )
    gradients_agree(ours, expected, z)


def test_cot2align():
    x, y = randn(2, 5, 4).requires_grad_(), randn(2, 6, 4, seed=1)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    teacher_mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    values = []
    for k in range(2):
        s, t = x[k][mask[k]], y[k][teacher_mask[k]]
        cost = 1 - (s @ t.T / 2).softmax(-1)
        kernel = (-0.1 * cost).exp()
        a, b = s.new_full((len(s),), 1 / len(s)), s.new_full((len(t),), 1 / len(t))
        u = torch.ones_like(a)
        for _ in range(100):
            v = b / (kernel.T @ u + 1e-9)
            u = a / (kernel @ v + 1e-9)
        values.append((u[:, None] * kernel * v * cost).sum())
    expected = 0.25 * torch.stack(values).mean()
    gradients_agree(kd.loss("cot2align")(x, y, mask=mask, teacher_mask=teacher_mask), expected, x)
    projected = kd.loss("cot2align", student_dim=4, teacher_dim=7).double()
    projected(x, randn(2, 6, 7)).backward()
    assert projected.projector.weight.grad is not None


@pytest.mark.parametrize("compat", (False, True))
def test_wkd_l(compat):
    z, a, labels = randn(6, 7).requires_grad_(), randn(6, 7, seed=1), torch.arange(6)
    cost = randn(7, 7, seed=2).abs()
    total = 0.0
    for k in range(6):
        keep = torch.arange(7) != labels[k]
        p, q = (z[k][keep] / 2).softmax(-1), (a[k][keep] / 2).softmax(-1)
        c = cost[keep][:, keep].relu() + 1e-8
        kernel = (-c / 0.05).exp()
        floor = 1e-8 if compat else 0.0
        u = torch.ones_like(p)
        for _ in range(10):
            v = q / (kernel.T @ u + floor)
            u = p / (kernel @ v + floor)
        total = total + (u[:, None] * kernel * v * c).sum()
    target = -(a.softmax(-1)[labels, labels] * z.log_softmax(-1)[labels, labels]).mean()
    loss = kd.loss("wkd_l", cost=cost, compat=compat)
    gradients_agree(loss(z, a, labels), target + 30 * total / 6, z)
    with pytest.raises(ValueError, match="labels"):
        loss(z, a)


def test_wkd_f():
    s, t = randn(2, 3, 4, 4).requires_grad_(), randn(2, 3, 4, 4, seed=1)

    def distance(x, y):
        sd = [(m.flatten(2).var(-1) + 1e-5).sqrt() for m in (x, y)]
        mean = [m.flatten(2).mean(-1) for m in (x, y)]
        return (2 * (mean[0] - mean[1]).square() + (sd[0] - sd[1]).square()).sum(1).mean()

    gradients_agree(kd.loss("wkd_f")(s, t), 0.02 * distance(s, t), s)
    cells = [distance(s[..., i : i + 2, j : j + 2], t[..., i : i + 2, j : j + 2])
             for i in (0, 2) for j in (0, 2)]  # fmt: skip
    gradients_agree(kd.loss("wkd_f", grid=2)(s, t), 0.02 * sum(cells) / 4, s)


def test_opta_and_feature_transport():
    support, queries = randn(4, 3), randn(9, 3, seed=1) + 1.0
    loss = kd.loss("opta")
    moved = loss.transport(support, queries)
    assert moved.shape == (4, 3)
    # Row-normalised plan: each image is a mean of queries.
    assert bool((moved >= queries.amin(0)).all() and (moved <= queries.amax(0)).all())
    cost = torch.cdist(support, queries).square()
    cost = cost / cost.max()
    _, plan = kd.sinkhorn(cost, epsilon=0.05, iterations=1000, return_plan=True)
    torch.testing.assert_close(
        moved, (plan / plan.sum(1, keepdim=True)) @ queries, rtol=1e-3, atol=1e-3
    )
    assert loss(support, queries).item() == pytest.approx(float((plan * cost).sum()), rel=1e-3)
    x = randn(5, 4).requires_grad_()
    value = kd.loss("feature_transport")(x, randn(5, 4, seed=3))
    assert torch.autograd.grad(value, x)[0].isfinite().all()


class Head(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


def kl(teacher, student):
    """KL(teacher, student) of rows of logits at tau 2."""
    p, q = (teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def nll(logits, labels):
    return -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def test_dskd():
    h_s, w_s = randn(2, 4, 3).requires_grad_(), randn(7, 3, seed=1).requires_grad_()
    h_t, w_t, bias = randn(2, 4, 5, seed=2), randn(7, 5, seed=3), randn(7, seed=4)
    labels = torch.tensor([[1, 2, -100, 3], [0, -100, 6, 5]])
    loss = kd.loss("dskd", student_dim=3, teacher_dim=5, alpha=0.3).double()
    to_student, to_teacher = loss.teacher_to_student, loss.student_to_teacher
    ours = loss(Head(h_s, w_s), Head(h_t, w_t, bias), labels)
    own, theirs = h_s @ w_s.T, h_t @ w_t.T + bias
    in_student = to_student(h_t) @ w_s.detach().T
    in_teacher = to_teacher(h_s) @ w_t.T + bias
    rows = 0.7 * nll(own, labels) + 0.3 * (
        nll(in_student, labels) + kl(in_student.detach(), own) + kl(theirs, in_teacher)
    )
    expected = rows[labels != -100].mean()
    leaves = (h_s, w_s, to_student.map.weight, to_teacher.map.weight)
    gradients_agree(ours, expected, *leaves)
    with pytest.raises(TypeError, match="teacher: expected a head"):
        loss(Head(h_s, w_s), theirs, labels)
    with pytest.raises(ValueError, match="labels"):
        loss(Head(h_s, w_s), Head(h_t, w_t))


def test_dskd_cma():
    h_s, w_s = randn(2, 4, 3).requires_grad_(), randn(7, 3, seed=1).requires_grad_()
    h_t, w_t = randn(2, 6, 5, seed=2), randn(9, 5, seed=3)
    e_s, e_t = randn(2, 4, 6, seed=4), randn(2, 6, 10, seed=5)
    labels = torch.tensor([[1, 2, -100, 3], [0, -100, 6, 5]])
    teacher_labels = torch.tensor([[1, 2, 3, -100, 8, 8], [-100, 0, 1, 2, 3, -100]])
    loss = kd.loss("dskd_cma", student_dim=3, teacher_dim=5).double()
    extras = {"teacher_labels": teacher_labels, "student_embeddings": e_s,
              "teacher_embeddings": e_t}  # fmt: skip
    valid, teacher_valid = labels != -100, teacher_labels != -100

    def literal():
        align = loss.query(e_s) @ (e_t / e_t.std()).mT / 10**0.5
        align = align.masked_fill(~(valid[:, :, None] & teacher_valid[:, None, :]), -1e5)
        target = e_t[..., 5:]
        values = loss.teacher_to_student(h_t / h_t.std() + target / target.std())
        in_student = align.softmax(-1) @ values @ w_s.detach().T
        in_teacher = align.mT.softmax(-1) @ loss.student_to_teacher(h_s) @ w_t.T
        own = h_s @ w_s.T
        right = valid & (in_student.argmax(-1) == labels)
        assert right.any() and (right != valid).any()
        total = (nll(in_student, labels) * valid).sum()
        total = total + (kl(in_student.detach(), own) * right).sum()
        total = total + (kl(h_t @ w_t.T, in_teacher) * teacher_valid).sum()
        return 0.5 * ((nll(own, labels) * valid).sum() + total) / valid.sum()

    for seed in range(50):  # a projector under which some, not all, rows name their label
        torch.manual_seed(seed)
        for projector in (loss.query, loss.teacher_to_student, loss.student_to_teacher):
            projector.map.reset_parameters()
        try:
            expected = literal()
            break
        except AssertionError:
            continue
    ours = loss(Head(h_s, w_s), Head(h_t, w_t), labels, **extras)
    projectors = (loss.query, loss.teacher_to_student, loss.student_to_teacher)
    gradients_agree(ours, expected, h_s, w_s, *(p.map.weight for p in projectors))
    with pytest.raises(ValueError, match="teacher_embeddings"):
        loss(Head(h_s, w_s), Head(h_t, w_t), labels, teacher_labels=teacher_labels,
             student_embeddings=e_s)  # fmt: skip


def test_registry():
    names = {entry.name for entry in kd.catalogue()}
    assert {"sinkd", "uld", "multi_level_ot", "cot2align", "wkd_l", "wkd_f", "opta",
            "feature_transport", "dskd", "dskd_cma"} <= names  # fmt: skip
    entry = next(e for e in kd.catalogue() if e.name == "sinkd")
    assert entry.parameters == {
        "temperature": 2.0, "epsilon": 0.1, "iterations": 20, "weight": 0.001,
    }  # fmt: skip
    assert entry.loss.__name__ == "SinKDLoss" and entry.family == "transport"
    with pytest.raises(ValueError, match="sinkd"):
        kd.loss("sinkdd")
    with pytest.raises(TypeError, match="temprature"):
        kd.loss("sinkd", temprature=1.0)
