"""The relation, feature, contrastive and ranking losses of the catalogue against open forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.backends.torch_relation import cka_dense

FAMILY = "relation"


def normal(*shape):
    return torch.randn(shape)


def unit(*shape):
    return F.normalize(torch.randn(shape), dim=-1)


def row_kl(a, z):
    """KL of the softmaxes of teacher scores a and student scores z, mean over rows."""
    return (a.softmax(-1) * (a.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()


def check(loss, expected, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(
        loss.double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol
    )


def test_minilm():
    s, t = [normal(2, 3, 5, 4) for _ in range(3)], [normal(2, 3, 5, 6) for _ in range(3)]

    def maps(x):
        return x[0] @ x[1].mT / x[0].shape[-1] ** 0.5, x[2] @ x[2].mT / x[2].shape[-1] ** 0.5

    (qk, vv), (qk_t, vv_t) = maps(s), maps(t)
    check(kd.loss("minilm")(s, t), (row_kl(qk_t, qk) + row_kl(vv_t, vv)) / 2)


def test_minilmv2_relations():
    s, t = [normal(2, 5, 8) for _ in range(3)], [normal(2, 5, 12) for _ in range(3)]

    def score(x, m, n):
        x = [y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (x[m - 1], x[n - 1])]
        return x[0] @ x[1].mT / x[0].shape[-1] ** 0.5

    loss = kd.loss("minilmv2", relation_heads=4, relations={(1, 2): 0.7, (3, 3): 0.3})
    expected = 0.7 * row_kl(score(t, 1, 2), score(s, 1, 2))
    expected = expected + 0.3 * row_kl(score(t, 3, 3), score(s, 3, 3))
    check(loss(s, t), expected)


def test_tinyclip_and_clip_kd():
    s, t = (unit(6, 5), unit(6, 5)), (unit(6, 5), unit(6, 5))
    target = torch.arange(6)

    def ce(z, a):
        return F.cross_entropy(z, a.softmax(-1))

    z, a = 9 * s[0] @ s[1].T, 11 * t[0] @ t[1].T
    scales = {"student_scale": torch.tensor(9.0), "teacher_scale": 11.0}
    check(kd.loss("tinyclip")(s, t, **scales), (ce(z, a) + ce(z.T, a.T)) / 2)
    scales["cross_scale"] = 7.0
    expected = {
        "ckd": (row_kl(a, z) + row_kl(a.T, z.T)) / 2,
        "icl": (
            F.cross_entropy(7 * s[0] @ t[1].T, target) + F.cross_entropy(7 * s[1] @ t[0].T, target)
        )
        / 2,
        "fd": F.mse_loss(s[0], t[0]) + F.mse_loss(s[1], t[1]),
        "cross_kd": (row_kl(a, 7 * s[0] @ t[1].T) + row_kl(a.T, 7 * s[1] @ t[0].T)) / 2,
    }
    for name, value in expected.items():
        check(kd.loss(name)(s, t, **scales), value)
    total = kd.loss("clip_kd", ckd=2.0, icl=3.0, fd=5.0, cross_kd=7.0)(s, t, **scales)
    weights = {"ckd": 2, "icl": 3, "fd": 5, "cross_kd": 7}
    check(total, sum(w * expected[n] for n, w in weights.items()))
    assert float(kd.loss("gd")(s, s, student_scale=9.0, teacher_scale=9.0)) == 0.0
    assert float(kd.loss("gd")(s, t, student_scale=9.0, teacher_scale=9.0)) > 0.0
    wide = kd.loss("afd", student_dim=5, teacher_dim=5)
    assert bool(wide(s, t).isfinite()) and wide.fusion_scale.item() == pytest.approx(
        2.659, abs=1e-3
    )
    with pytest.raises(ValueError, match="student_scale"):
        kd.loss("tinyclip")(s, t)


def test_gram_losses():
    x, y = normal(8, 2, 3), normal(8, 4)
    g = [F.normalize(z.flatten(1) @ z.flatten(1).T, dim=1) for z in (x, y)]
    check(kd.loss("sp")(x, y), (g[0] - g[1]).square().sum() / 64)
    a, b = normal(3, 5, 4, 4), normal(3, 5, 2, 2)
    c = [F.normalize(z.flatten(2) @ z.flatten(2).mT, dim=2) for z in (a, b)]
    check(kd.loss("ickd")(a, b), (c[0] - c[1]).square().sum() / 15)
    x = x.flatten(1)
    p = [(F.normalize(z, dim=1) @ F.normalize(z, dim=1).T + 1) / 2 for z in (x, y)]
    p = [z / z.sum(1, keepdim=True) for z in p]
    check(kd.loss("pkt")(x, y), (p[1] * ((p[1] + 1e-7) / (p[0] + 1e-7)).log()).mean(), 1e-4)
    parts = kd.relation(x, y, "distance"), kd.relation(x, y, "angle")
    check(kd.loss("rkd")(x, y), 25 * parts[0] + 50 * parts[1])
    check(kd.loss("cka")(x, y), cka_dense(x[None], y[None], None)[0])


def test_unbiased_cka():
    x, y = normal(9, 4), normal(9, 5)
    k, m = ((z.double() @ z.double().T).fill_diagonal_(0) for z in (x, y))

    def hsic(k, m):
        n, one = 9, torch.ones(9, dtype=torch.float64)
        a = (k * m).sum() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (a - 2 * (one @ k @ m @ one) / (n - 2)) / (n * (n - 3))

    check(kd.loss("cka", unbiased=True)(x, y), 1 - hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def test_affinity():
    a, b = normal(2, 3, 4, 4), normal(2, 3, 4, 4)
    s, t = (F.normalize(z.flatten(2), dim=-1) for z in (a, b))
    outer = s[..., :, None] * s[..., None, :] - t[..., :, None] * t[..., None, :]
    check(kd.loss("affinity")(a, b), outer.flatten(2).norm(dim=-1).sum(1).mean() / 16)
    x = a.clone().requires_grad_()
    kd.loss("affinity")(x, a).backward()
    assert bool(x.grad.isfinite().all())


def test_token_relations():
    x, y = normal(2, 6, 4), normal(2, 6, 5)
    g = [F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).mT for z in (x, y)]
    check(kd.loss("dinov3_gram")(x, y), F.mse_loss(g[0].relu(), g[1].relu()))
    check(kd.loss("dinov3_gram", remove_neg=False)(x, y), F.mse_loss(*g))
    only = kd.loss("dinov3_gram", remove_neg=False, remove_only_teacher_neg=True)
    check(only(x, y), F.mse_loss(g[0], g[1].relu()))
    whole = [F.normalize(z.flatten(0, 1), dim=-1) for z in (x, y)]
    expected = F.mse_loss(*((z @ z.T).relu() for z in whole))
    check(kd.loss("dinov3_gram", img_level=False)(x, y), expected)
    x, y = normal(2, 3, 4, 5), normal(2, 3, 4, 6)
    g = [F.normalize(z.flatten(1, 2), dim=-1) for z in (x, y)]
    gap = ((g[0] @ g[0].mT - g[1] @ g[1].mT).abs() - 0.1).relu()
    frame = torch.arange(12) // 4
    same = frame[:, None] == frame
    check(kd.loss("trd")(x, y), gap.mean())
    check(kd.loss("videorepa", mode="spatial")(x, y), gap[:, same].mean())
    check(kd.loss("videorepa", mode="temporal")(x, y), gap[:, ~same].mean())


def test_pixel_relations():
    x, y = normal(3, 5, 2, 2), normal(3, 6, 2, 2)
    s, t = (F.normalize(z.flatten(2).mT, dim=-1) for z in (x, y))
    pairs = [row_kl(10 * t[i] @ t[j].T, 10 * s[i] @ s[j].T) for i in range(3) for j in range(3)]
    check(kd.loss("cirkd")(x, y), sum(pairs) / 9)
    x, y = normal(2, 5, 4, 4), normal(2, 6, 4, 4)
    s, t = (F.normalize(F.max_pool2d(z, 2).flatten(2), dim=1) for z in (x, y))
    check(kd.loss("skd_pairwise")(x, y), F.mse_loss(s.mT @ s, t.mT @ t))


def test_trg_equals_dense_graphs():
    x, y = normal(12, 4), normal(12, 4)
    hidden = normal(2, 5, 4), normal(2, 5, 6)

    def graph(z):
        d = torch.cdist(z, z).square().fill_diagonal_(torch.inf)
        near = d.topk(3, largest=False).indices
        on = torch.zeros(12, 12).scatter(1, near, 1.0)
        return torch.where(on > 0, (-d / 2).exp(), 0.0)

    local = row_kl(graph(x), graph(y))  # student first
    check(kd.loss("trg", k=3, global_weight=0.0, inner_weight=0.0)(x, y), local, 1e-4)
    info = F.cross_entropy(10 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T, torch.arange(12))
    s, t = ((z @ z.mT / z.shape[-1] ** 0.5).softmax(-1) for z in hidden)
    total = kd.loss("trg", k=3)(x, y, student_hidden=hidden[0], teacher_hidden=hidden[1])
    check(total, local + info + F.mse_loss(s, t), 1e-4)


def test_attention_maps():
    s, t = normal(2, 4, 5, 5), normal(2, 4, 5, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    maps = {"student_attention": s, "teacher_attention": t}
    check(kd.loss("attention")(None, None, **maps), F.mse_loss(s, t))
    cut = ((s[0] - t[0]).square().sum() + (s[1, :, :3, :3] - t[1, :, :3, :3]).square().sum()) / 136
    check(kd.loss("attention")(None, None, mask=mask, **maps), cut)
    check(kd.loss("attention", kind="kl")(None, None, **maps), row_kl(t, s))
    a2d = kd.loss("a2d", student_maps=4, teacher_maps=3, steps_per_epoch=2)
    target = normal(2, 3, 5, 5)
    maps["teacher_attention"] = target
    first = a2d(None, None, **maps)
    z = a2d.projector(s).flatten(-2)
    check(first, row_kl(target.flatten(-2), z) * 6)
    a2d.step(), a2d.step()
    check(a2d(None, None, **maps), 0.9 * first)
    codes, h, logits = normal(7, 4), normal(5, 4), normal(5, 7)
    found = kd.loss("vqgraph")(h, logits, codebook=codes)
    check(found, 16 * row_kl(logits / 4, -torch.cdist(h, codes) / 4))


def test_cross_modal_attention():
    s, t = (
        ((normal(2, 4, d), normal(2, 3, d)), (normal(2, 3, d), normal(2, 4, d))) for d in (5, 6)
    )
    text = torch.tensor([[True] * 3, [True, True, False]])
    expected = 0.0
    for i in range(2):
        z, a = (x[i][0] @ x[i][1].mT / x[i][0].shape[-1] ** 0.5 for x in (s, t))
        rows = []
        for b, n in enumerate((3, 2)):
            cut = (slice(None), slice(n)) if i == 0 else (slice(n), slice(None))
            zb, ab = z[b][cut], a[b][cut]
            rows.append((ab.softmax(-1) * (ab.log_softmax(-1) - zb.log_softmax(-1))).sum(-1))
        expected = expected + torch.cat(rows).mean()
    check(kd.loss("cross_modal_attention")(s, t, teacher_mask=text), expected)


def test_feature_losses():
    s, t = [normal(3, 5), normal(3, 5)], [normal(3, 5), normal(3, 5)]
    mean = (F.mse_loss(s[0], t[0]) + F.mse_loss(s[1], t[1])) / 2
    check(kd.loss("hidden_mse")(s, t), mean)
    check(kd.loss("smooth_l1", beta=0.5)(s[0], t[0]), F.smooth_l1_loss(s[0], t[0], beta=0.5))
    check(kd.loss("l1")(s[0], t[0]), F.l1_loss(s[0], t[0]))
    cosine = F.cosine_similarity(s[0], t[0])
    check(kd.loss("cosine")(s[0], t[0]), 1 - cosine.mean())
    check(kd.loss("margin_cosine", margin=0.2)(s[0], t[0]), (0.8 - cosine).relu().mean())
    check(kd.loss("log_sigmoid_cosine")(s[0], t[0]), -F.logsigmoid(cosine).mean())
    check(kd.loss("normalized_mse")(s[0], t[0]), (2 - 2 * cosine).mean())
    check(kd.loss("repa")(s[0], t[0]), -cosine.mean())
    index = torch.tensor([3, 1])
    check(kd.loss("mse", index=index)(s[0][:, :2], t[0]), F.mse_loss(s[0][:, :2], t[0][:, index]))
    nearest = kd.loss("hidden_mse", layers="min")([t[1] + 0.01], t)
    check(nearest, 1e-4, 1e-3)
    projected = kd.loss("hidden_mse", student_dim=5, teacher_dim=7)
    check(projected(s[0], normal(3, 7) * 0), projected.projector(s[0]).square().mean())
    weight = torch.rand(3)
    check(
        kd.loss("masked_mse")(s[0], t[0], weight=weight),
        (weight[:, None] * (s[0] - t[0]).square()).mean(),
    )
    selection = kd.loss("layer_selection", student_layers=1, keep=1)
    gaps = torch.stack([(s[0] - x).square().mean(-1) for x in t]).amin(0)
    check(selection([s[0]], t), gaps.mean())
    ted = kd.loss("ted", student_dim=5, teacher_dim=5, filter_dim=3, layers=2)
    parts = [
        F.mse_loss(f(a), g(b))
        for f, a, g, b in zip(ted.student_filters, s, ted.teacher_filters, t, strict=True)
    ]
    check(ted(None, None, student_hidden=s, teacher_hidden=t), sum(parts) / 2)
    vkd = kd.loss("vkd", student_dim=5, teacher_dim=7)
    y = normal(3, 7)
    check(vkd(s[0], y), F.smooth_l1_loss(vkd.projector(s[0]), F.layer_norm(y, (7,))))
    a, b = normal(2, 3, 4, 4), normal(2, 3, 8, 8)
    pooled = [F.normalize(F.adaptive_avg_pool2d(z, 2).flatten(2), dim=-1) for z in (a, b)]
    check(kd.loss("cat_kd")(a, b), F.mse_loss(*pooled))


def test_unic_and_mmd():
    teachers = [(normal(4, 5), normal(4, 3, 5)) for _ in range(2)]
    students = [(normal(4, 5), normal(4, 3, 5)) for _ in range(2)]

    def one(s, t):
        cosine = 1 - F.cosine_similarity(s, t, dim=-1)
        both = (cosine + F.smooth_l1_loss(s, t, reduction="none").mean(-1)) / 2
        return both.reshape(4, -1).mean(1)

    rows = [
        (one(s[0], t[0]) + one(s[1], t[1])) / 2 for s, t in zip(students, teachers, strict=True)
    ]
    check(kd.loss("unic", drop_probability=0.0)(students, teachers), torch.stack(rows).mean())
    dropped = kd.loss("unic", drop_probability=1.0)(students, teachers)
    check(dropped, torch.stack(rows).amax(0).mean())
    x, y = normal(6, 3), normal(5, 3)

    def mmd(k):
        return k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()

    check(kd.loss("mmd")(x, y), mmd(lambda a, b: (-torch.cdist(a, b).square() / 2).exp()), 1e-4)
    check(kd.loss("mmd", kernel="energy")(x, y), mmd(lambda a, b: -torch.cdist(a, b)), 1e-3, 1e-5)
    n = [F.normalize(z, dim=-1) for z in (x, y)]
    grams = [(a @ b.T).square().mean() for a, b in ((n[0], n[0]), (n[1], n[1]), (n[0], n[1]))]
    check(kd.loss("mmd", kernel="polynomial")(x, y), grams[0] + grams[1] - 2 * grams[2])


def test_contrastive_losses():
    x, y = normal(6, 5), normal(6, 5)
    n = [F.normalize(z, dim=-1) for z in (x, y)]
    info = F.cross_entropy(n[0] @ n[1].T / 0.07, torch.arange(6))
    check(kd.loss("info_nce")(x, y), info)
    labels = torch.tensor([0, 1, 0, 1, 2, 0])
    z = (n[0] @ n[0].T / 0.07).fill_diagonal_(-torch.inf).log_softmax(-1)
    same = (labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool)
    rows = -torch.where(same, z, 0.0).sum(-1) / same.sum(-1).clamp(min=1)
    check(kd.loss("supcon")(n[0], None, labels), rows[same.any(-1)].mean())
    s, t = (unit(6, 5), unit(6, 5)), (unit(6, 5), unit(6, 5))
    queue = unit(4, 5), unit(4, 5)
    expected = 0.0
    for i in range(2):
        keys = torch.cat([t[1 - i], queue[1 - i]])
        target = 0.4 * (8 * t[i] @ keys.T).softmax(-1) + 0.6 * torch.eye(6, 10)
        expected = expected + F.cross_entropy(8 * s[i] @ keys.T, target) / 2
    check(kd.loss("albef")(s, t, student_scale=8.0, queue=queue), expected)
    a, b, bank = normal(2, 5, 2, 2), normal(2, 5, 2, 2), normal(7, 5)
    s, t = (F.normalize(z.flatten(2).mT.flatten(0, 1), dim=-1) for z in (a, b))
    logits = torch.cat([(s * t).sum(-1, keepdim=True), s @ F.normalize(bank, dim=-1).T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    check(kd.loss("pcd")(a, b, queue=bank), expected)


def test_crd_and_dino_move_their_state_in_step_only():
    crd = kd.loss("crd", student_dim=4, teacher_dim=5, samples=20, feature_dim=8, negatives=6)
    index = torch.tensor([3, 8])
    before = {k: v.clone() for k, v in crd.state_dict().items()}
    x = normal(2, 4).requires_grad_()
    crd(x, normal(2, 5), index=index).backward()
    assert bool(x.grad.isfinite().all()) and float(x.grad.abs().sum()) > 0
    assert all(torch.equal(v, before[k]) for k, v in crd.state_dict().items())
    crd.step()
    assert not torch.equal(crd.student_bank[index], before["student_bank"][index])
    assert torch.equal(crd.student_bank[:3], before["student_bank"][:3])
    torch.testing.assert_close(crd.student_bank[index].norm(dim=1), torch.ones(2))
    assert float(crd.student_normaliser) > 0
    dino = kd.loss("dino", out_dim=6)
    students, teachers = [normal(3, 6) for _ in range(3)], [normal(3, 6) for _ in range(2)]
    for _ in range(2):
        parts = [
            F.cross_entropy(z / 0.1, ((a - dino.center) / 0.04).softmax(-1))
            for u, a in enumerate(teachers)
            for v, z in enumerate(students)
            if u != v
        ]
        check(dino(students, teachers), sum(parts) / len(parts), 1e-4)
        centre = dino.center.clone()
        dino.step()
        expected = 0.9 * centre + 0.1 * torch.cat(teachers).mean(0)
        torch.testing.assert_close(dino.center, expected)


def test_ranking_losses():
    s, t = normal(3, 5), normal(3, 5)
    ranks = t.argsort(-1, descending=True).argsort(-1) + 1.0
    better = t[:, :, None] > t[:, None, :]
    pairs = F.softplus(-(s[:, :, None] - s[:, None, :]))
    check(kd.loss("ranknet")(s, t), pairs[better].mean())
    weighted = (pairs / (ranks[:, :, None] + ranks[:, None, :]))[better].mean()
    check(kd.loss("ranknet", weighted=True)(s, t), weighted)
    labels = torch.tensor([1, 0, 4])
    check(kd.loss("first")(s, t, labels), 10 * weighted + F.cross_entropy(s, labels))
    check(kd.loss("listnet", temperature=2.0)(s, t), row_kl(t / 2, s / 2))
    check(
        kd.loss("score_kl", temperature=2.0, teacher_temperature=3.0)(s, t),
        4 * row_kl(t / 3, s / 2),
    )
    soft = kd.ranking(s, t, soft=True)
    check(kd.loss("dear")(s, t), 0.9 * soft + 0.1 * 4 * row_kl(t / 2, s / 2))
    zero = torch.zeros(3, dtype=torch.int64)
    check(kd.loss("disco")(s, [t, t]), 0.99 * row_kl(t, s) + 0.01 * F.cross_entropy(s, zero))
    for name in ("margin_mse", "adr_mse", "score_mse", "pairwise_hinge"):
        check(kd.loss(name)(s, t), kd.ranking(s, t, name))
    labels = torch.tensor([1, -100, 4])
    expected = []
    for i in (0, 2):
        order = t[i].scatter(0, labels[i], math.inf).argsort(descending=True)
        w = t[i].softmax(0)[order]
        terms = [s[i][order[k:]].logsumexp(0) - s[i][order[k]] for k in range(5)]
        expected.append((w * torch.stack(terms)).sum())
    check(kd.loss("pld")(s, t, labels), sum(expected) / 2)
    # Evenly spaced scores in the teacher's order just meet every pair's margin; turned round, each
    # pair is behind by twice its margin, whose mean over pairs of 3 is (1/2 + 1/2 + 1) / 3.
    even = torch.tensor([[0.0, 1.0, 2.0]])
    same = kd.loss("bialign")(s, t, student_scores=5 * even, teacher_scores=even)
    check(same, row_kl(t, s))
    turned = kd.loss("bialign", weight=3.0)(s, t, student_scores=-even, teacher_scores=even)
    check(turned, row_kl(t, s) + 3 * 2 * 2 / 3)
    layers = [(normal(3, 4), normal(6, 4)) for _ in range(2)]
    other = [(normal(3, 5), normal(6, 5)) for _ in range(2)]
    nll = torch.tensor([0.3, 1.2])
    parts = [row_kl(b[0] @ b[1].T / 2, a[0] @ a[1].T) for a, b in zip(layers, other, strict=True)]
    w = (-nll).softmax(0)
    expected = w[0] * parts[0] + w[1] * parts[1]
    check(kd.loss("lead", temperature=2.0)(layers, other, teacher_nll=nll), expected)


def test_catalogue_and_names():
    entries = {e.name: e for e in kd.catalogue()}
    assert entries["minilm"].status == "secondary" and entries["rkd"].status == "source"
    assert entries["token_relation_distillation"].aliases == ("trd", "videorepa")
    assert entries["rkd"].parameters == {"distance_weight": 25.0, "angle_weight": 50.0}
    with pytest.raises(ValueError, match="did you mean"):
        kd.loss("minilmv3")
    with pytest.raises(TypeError, match="parameter"):
        kd.loss("rkd", weight=1.0)
