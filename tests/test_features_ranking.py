"""kd.feature, kd.match_layers, kd.Projector, kd.ranking and kd.plackett_luce."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics.divergence_goldens import STUDENT, TEACHER

import kdkernels as kd

FAMILY = "relation"


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "kind, form",
    [
        ("mse", lambda s, t: F.mse_loss(s, t)),
        ("l1", lambda s, t: F.l1_loss(s, t)),
        ("smooth_l1", lambda s, t: F.smooth_l1_loss(s, t, beta=0.5)),
        ("huber", lambda s, t: F.huber_loss(s, t, delta=0.5)),
        ("cosine", lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean()),
        ("margin_cosine", lambda s, t: (0.9 - F.cosine_similarity(s, t, dim=-1)).relu().mean()),
        (
            "log_sigmoid_cosine",
            lambda s, t: -F.logsigmoid(F.cosine_similarity(s, t, dim=-1)).mean(),
        ),
        (
            "normalized_mse",
            lambda s, t: (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1).mean(),
        ),
    ],
)
def test_feature_kinds(kind, form):
    s, t = normal(3, 5, 7), normal(3, 5, 7)
    beta = {"beta": 0.5} if kind in ("smooth_l1", "huber") else {}
    margin = {"margin": 0.1} if kind == "margin_cosine" else {}
    found = kd.feature(s, t, kind, **beta, **margin)
    torch.testing.assert_close(found, form(s, t))
    mask = torch.rand(3, 5) < 0.6
    s[~mask] = float("nan")
    x = s.clone().requires_grad_()
    masked = kd.feature(x, t, kind, mask=mask, **beta, **margin)
    torch.testing.assert_close(masked, form(s[mask], t[mask]))
    masked.backward()
    assert bool(x.grad.isfinite().all()) and float(x.grad[~mask].abs().max()) == 0.0
    half = kd.feature(s[mask].half(), t[mask].half(), kind, **beta, **margin)
    assert half.dtype == torch.float32


def test_feature_normalizations_and_weights():
    s, t = normal(2, 6, 7), normal(2, 6, 7)
    layer = kd.feature(s, t, normalize="layer_norm")
    torch.testing.assert_close(layer, F.mse_loss(F.layer_norm(s, (7,)), F.layer_norm(t, (7,))))

    def standard(x):
        return (x - x.mean(-2, keepdim=True)) / (x.std(-2, keepdim=True, correction=0) + 1e-6)

    torch.testing.assert_close(
        kd.feature(s, t, normalize="standardize"), F.mse_loss(standard(s), standard(t))
    )
    for shape in ((2, 6), (2, 6, 7)):
        weight = torch.rand(shape, requires_grad=True)
        loss = kd.feature(s, t, weight=weight)
        wide = weight if weight.dim() == 3 else weight[..., None]
        torch.testing.assert_close(loss, (wide * (s - t).square()).mean())
        loss.backward()
        assert weight.grad.shape == shape
    with pytest.raises(ValueError, match="teacher"):
        kd.feature(s, t[..., :3])
    with pytest.raises(ValueError, match="kind"):
        kd.feature(s, t, "l3")
    with pytest.raises(ValueError, match="weight"):
        kd.feature(s, t, weight=torch.ones(7))


def test_layer_map_and_projectors():
    teachers = [normal(4, 6) for _ in range(6)]
    students = [teachers[4] + 0.01, teachers[1] + 0.01, teachers[2] - 0.01]

    def pairs(rule, **options):
        return [
            (m.student, m.teacher)
            for m in kd.match_layers(students, teachers, rule=rule, **options)
        ]

    assert pairs("uniform") == [(0, 1), (1, 3), (2, 5)]
    assert pairs("last") == [(0, 3), (1, 4), (2, 5)]
    assert pairs("min") == [(0, 4), (1, 1), (2, 2)]
    assert [m.weight for m in kd.match_layers(students, teachers, rule="min_k", keep=2)] == [
        0.5
    ] * 6
    weights = torch.zeros(3, 6, requires_grad=True)
    learned = kd.match_layers(students, teachers, rule="learned", weights=weights)
    sum(m.weight * (m.teacher + 1) for m in learned).backward()
    assert float(weights.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="rule"):
        kd.match_layers(students, teachers, rule="first")
    for kind, x in (("linear", normal(3, 5)), ("mlp", normal(3, 5)), ("orthogonal", normal(3, 5))):
        assert kd.Projector(5, 8, kind)(x).shape == (3, 8)
    weight = kd.Projector(5, 8, "orthogonal").map.weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(5), rtol=0, atol=1e-5)
    assert kd.Projector(5, 8, "conv")(normal(2, 5, 4, 4)).shape == (2, 8, 4, 4)
    with pytest.raises(ValueError, match="teacher_dim"):
        kd.Projector(5, 0)


def open_plackett_luce(s, order, weights):
    total = 0.0
    for k in range(order.shape[0]):
        total = total + weights[k] * (s[order[k:]].logsumexp(0) - s[order[k]])
    return total


def test_plackett_luce_golden_value(backend):
    """PLD of the golden rows with label 1: ten published digits of value and gradient."""
    teacher = torch.tensor(TEACHER, dtype=torch.float64)
    order = teacher.scatter(0, torch.tensor([1]), torch.inf).argsort(descending=True)
    assert order.tolist() == [1, 3, 0, 2]
    weights = teacher.softmax(0)[order]
    expected = torch.tensor(
        [0.1375162784, -0.2365580851, 0.1433103771, -0.0442685703], dtype=torch.float64
    )
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        if dtype not in backend.dtypes:
            continue
        x = torch.tensor(STUDENT, dtype=dtype, requires_grad=True)
        loss = kd.plackett_luce(x, order, weights.to(dtype))
        loss.backward()
        assert abs(loss.item() - 1.0488585879) <= bound
        assert float((x.grad.double() - expected).abs().max()) <= bound


def test_plackett_luce_rows(backend):
    for width, count in ((1, 1), (7, 7), (300, 300), (700, 40)):
        for dtype in backend.dtypes:
            scores = (4 * normal(3, width)).to(dtype)
            order = torch.stack([torch.randperm(width)[:count] for _ in range(3)])
            weights = torch.rand(3, count, dtype=torch.float64)
            upstream = torch.rand(3)
            x = scores.clone().requires_grad_()
            same = torch.float64 if dtype == torch.float64 else torch.float32
            rows = kd.plackett_luce(x, order, weights.to(same), reduction="none")
            (rows * upstream.to(rows.dtype)).sum().backward()
            y = scores.double().requires_grad_()
            expected = torch.stack(
                [open_plackett_luce(y[i], order[i], weights.to(same)[i].double()) for i in range(3)]
            )
            (expected * upstream).sum().backward()
            torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)
            tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(dtype, 1e-5)
            bound = tolerance * float(y.grad.abs().max() + 1e-6)
            assert float((x.grad.double() - y.grad).abs().max()) <= bound


def test_plackett_luce_gradcheck_and_bad_ids(double_backend):
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    x = normal(2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kd.plackett_luce(s, order), x)
    found = torch.func.grad(lambda s: kd.plackett_luce(s, order))(x.detach())
    torch.testing.assert_close(found, torch.autograd.grad(kd.plackett_luce(x, order), x)[0])
    with pytest.raises(TypeError, match="order"):
        kd.plackett_luce(x, order.int())
    with pytest.raises(ValueError, match="order"):
        kd.plackett_luce(x, order[:1])
    if double_backend.name == "cpu":
        with pytest.raises(ValueError, match="order"):
            kd.plackett_luce(x, order + 2)
    else:
        loss = kd.plackett_luce(x, order + 2, reduction="none")
        assert bool(loss.isnan().all())


def test_plackett_luce_compiles():
    torch._dynamo.reset()
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    x = normal(2, 4).requires_grad_()
    compiled = torch.compile(kd.plackett_luce, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, order), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(kd.plackett_luce(x, order), x)[0])


def test_ranking_kinds():
    s, t = normal(3, 5).requires_grad_(), normal(3, 5)
    ahead = s[:, :, None] - s[:, None, :]
    better = t[:, :, None] > t[:, None, :]
    order = t.argsort(-1, descending=True)
    ranks = order.argsort(-1) + 1.0
    soft = 1 + (-ahead).sigmoid().sum(-1) - 0.5
    forms = {
        "ranknet": F.softplus(-ahead)[better].mean(),
        "pairwise_hinge": (1 - ahead).relu()[better].mean(),
        "listnet": F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
        "margin_mse": ((s[:, :1] - s[:, 1:]) - (t[:, :1] - t[:, 1:])).square().mean(),
        "adr_mse": ((soft - ranks).square() / (1 + ranks).log2()).mean(),
        "score_mse": F.mse_loss(s, t),
        "plackett_luce": kd.plackett_luce(s, order),
    }
    for kind, expected in forms.items():
        torch.testing.assert_close(kd.ranking(s, t, kind), expected)
    p = t.sigmoid()
    torch.testing.assert_close(
        kd.ranking(s, p, "score_bce"), F.binary_cross_entropy_with_logits(s, p)
    )
    upper = torch.ones(5, 5).triu(1).bool()
    soft_form = F.binary_cross_entropy_with_logits(
        ahead[:, upper], (t[:, :, None] - t[:, None, :])[:, upper].sigmoid()
    )
    torch.testing.assert_close(kd.ranking(s, t, soft=True), soft_form)
    with pytest.raises(ValueError, match="kind"):
        kd.ranking(s, t, "rank")
    with pytest.raises(ValueError, match="teacher_scores"):
        kd.ranking(s, t[:, :3])


@pytest.mark.parametrize(
    "kind", ["ranknet", "listnet", "plackett_luce", "adr_mse", "score_mse", "pairwise_hinge"]
)
def test_ranking_masks_leave_candidates_out(kind):
    s, t = normal(1, 6), normal(1, 6)
    mask = torch.tensor([[True, True, False, True, False, True]])
    expected = kd.ranking(s[:, mask[0]], t[:, mask[0]], kind)
    s[~mask], t[~mask] = float("nan"), float("nan")
    x = s.clone().requires_grad_()
    loss = kd.ranking(x, t, kind, mask=mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert bool(x.grad.isfinite().all())
