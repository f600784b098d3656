"""kd.relation on every backend against the dense float64 statement, and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from relation_cases import (
    ELEMENT_KINDS,
    KINDS,
    ROW_KINDS,
    assert_same,
    gradients,
    options_of,
    tokens,
)

import kdkernels as kd
from kdkernels.ops import relation_stream

FAMILY = "relation"


def _cut(monkeypatch) -> None:
    """With small chunks every graph is cut into several, with a ragged last one."""
    monkeypatch.setattr(relation_stream, "_ENTRIES", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(relation_stream, "_ROWS", 5)
    monkeypatch.setattr(relation_stream, "_ANGLE_ENTRIES", {"cpu": 200, "cuda": 200})


@pytest.fixture
def small_chunks(monkeypatch):
    _cut(monkeypatch)


@pytest.fixture(params=["whole", "chunks"])
def chunking(request, monkeypatch):
    if request.param == "chunks":
        _cut(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_self_relation(kernel_backend, chunking, kind):
    student, teacher = tokens(2, 12, 8), tokens(2, 12, 5)
    student, teacher = student.to(kernel_backend.device), teacher.to(kernel_backend.device)
    assert_same(student, teacher, kind, teacher_grad=True, **options_of(kind))


@pytest.mark.parametrize("kind", ROW_KINDS + ELEMENT_KINDS)
def test_pair_of_queries_and_keys(kernel_backend, small_chunks, kind):
    student = tokens(2, 2, 13, 6), tokens(2, 2, 9, 6)
    teacher = tokens(2, 2, 13, 4), tokens(2, 2, 9, 4)
    student, teacher = (tuple(x.to(kernel_backend.device) for x in s) for s in (student, teacher))
    assert_same(student, teacher, kind, teacher_grad=True, **options_of(kind))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("angle", "cka", "distance")])
@pytest.mark.parametrize("selection", ["tokens", "pairs", "causal", "same", "different", "off"])
def test_selections(kernel_backend, small_chunks, kind, selection):
    student, teacher = tokens(2, 2, 11, 6), tokens(2, 2, 11, 6)
    mask = torch.rand(2, 11) < 0.7
    options = {
        "tokens": {"mask": mask},
        "pairs": {"mask": torch.rand(2, 1, 11, 11) < 0.5},
        "causal": {"causal": True, "mask": mask},
        "same": {"block": torch.arange(11) // 4},
        "different": {"block": torch.arange(11) // 4, "block_mode": "different"},
        "off": {"exclude_diagonal": True},
    }[selection]
    options = {
        k: v.to(kernel_backend.device) if torch.is_tensor(v) else v for k, v in options.items()
    }
    student, teacher = student.to(kernel_backend.device), teacher.to(kernel_backend.device)
    assert_same(student, teacher, kind, teacher_grad=True, **options, **options_of(kind))


@pytest.mark.parametrize("kind", ["distance", "angle", "cka"])
def test_token_masks_of_graph_kinds(kernel_backend, small_chunks, kind):
    student, teacher = tokens(2, 11, 6), tokens(2, 11, 4)
    mask = torch.rand(2, 11) < 0.7
    student[~mask] = float("nan")
    mask = mask.to(kernel_backend.device)
    student, teacher = student.to(kernel_backend.device), teacher.to(kernel_backend.device)
    loss, (gradient,) = gradients(student, teacher, kind, mask=mask)
    assert bool(loss.isfinite()) and float(gradient[~mask].abs().max()) == 0.0
    assert_same(student.nan_to_num(0.0), teacher, kind, mask=mask)


@pytest.mark.parametrize("kind", ROW_KINDS + ELEMENT_KINDS)
@pytest.mark.parametrize("normalization", ["pairs", "rows", "sequence"])
def test_normalizations(kernel_backend, kind, normalization):
    student, teacher = tokens(3, 2, 7, 4, device=kernel_backend.device), tokens(3, 2, 7, 4)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [False] * 7])
    options = {"mask": mask.to(kernel_backend.device), "normalization": normalization}
    options.update(options_of(kind))
    teacher = teacher.to(kernel_backend.device)
    assert_same(student, teacher, kind, **options)
    mean = kd.relation(student, teacher, kind, **options)
    per = kd.relation(student, teacher, kind, **{**options, "reduction": "none"}).double()
    rows, pairs = torch.tensor([7.0, 3.0]), torch.tensor([49.0, 9.0])
    total = per.flatten(1).sum(1).cpu()[:2]
    softmax = kind.startswith("softmax")
    expected = {
        "rows": lambda: total.sum() / (2 * rows.sum()),
        "pairs": lambda: total.sum() / (2 * pairs.sum()),
        "sequence": lambda: (total / (2 * (rows if softmax else pairs))).mean(),
    }[normalization]()
    torch.testing.assert_close(mean.double().cpu(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ROW_KINDS + ELEMENT_KINDS)
def test_values_of_rows_and_pairs_have_gradients(kernel_backend, small_chunks, kind):
    student, teacher = tokens(2, 9, 6), tokens(2, 9, 6)
    student, teacher = student.to(kernel_backend.device), teacher.to(kernel_backend.device)
    size = (2, 9) if kind in ROW_KINDS else (2, 9, 9)
    weight = torch.rand(size, device=kernel_backend.device)
    assert kd.relation(student, teacher, kind, reduction="none", **options_of(kind)).shape == size
    assert_same(
        student,
        teacher,
        kind,
        reduction="none",
        weight=weight,
        teacher_grad=True,
        **options_of(kind),
    )


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("kind", ["softmax_kl", "softmax_cross_entropy", "mse", "gram_row_l2"])
def test_learnable_scales(kernel_backend, similarity, kind):
    options = {
        "student_scale": torch.tensor(1.7, device=kernel_backend.device),
        "teacher_scale": torch.tensor(2.1, device=kernel_backend.device),
        "similarity": similarity,
        "teacher_grad": True,
    }
    student, teacher = tokens(2, 9, 3), tokens(2, 9, 5)
    student, teacher = student.to(kernel_backend.device), teacher.to(kernel_backend.device)
    assert_same(student, teacher, kind, gradient=1e-4, **options)
    if kind != "gram_row_l2":
        rows = {"reduction": "none", "mask": torch.ones(9, 9, dtype=torch.bool)}
        rows["mask"] = rows["mask"].to(kernel_backend.device)
        assert_same(student, teacher, kind, gradient=1e-4, **options, **rows)


@pytest.mark.parametrize("kind", ["softmax_kl", "softmax_cross_entropy", "softmax_reverse_kl"])
def test_label_mix_clamp_and_both_directions(kernel_backend, kind):
    student = tokens(11, 6), tokens(11, 6)
    teacher = tokens(11, 4), tokens(11, 4)
    student, teacher = (tuple(x.to(kernel_backend.device) for x in s) for s in (student, teacher))
    assert_same(student, teacher, kind, label_mix=0.3, both_directions=True, teacher_grad=True)
    assert_same(student, teacher, kind, label_mix=0.3, clamp=-0.1, teacher_grad=True)
    two = kd.relation(student, teacher, kind, both_directions=True)
    one = kd.relation(student, teacher, kind)
    other = kd.relation(student[::-1], teacher[::-1], kind)
    torch.testing.assert_close(two, (one + other) / 2)


def test_label_mix_is_the_mixed_target(backend):
    student, teacher = tokens(9, 6, device=backend.device), tokens(9, 6, device=backend.device)
    loss = kd.relation(student, teacher, "softmax_cross_entropy", label_mix=0.4)
    z, a = ((x @ x.T / 6**0.5).double() for x in (student, teacher))
    target = 0.6 * a.softmax(-1) + 0.4 * torch.eye(9, device=backend.device)
    expected = F.cross_entropy(z, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_clamp_and_detached_norms(kernel_backend):
    student, teacher = tokens(2, 9, 4), tokens(2, 9, 6)
    student, teacher = student.to(kernel_backend.device), teacher.to(kernel_backend.device)
    for options in ({"clamp": 0.0}, {"detach_norm": True}, {"detach_norm": True, "clamp": 0.1}):
        assert_same(student, teacher, "mse", similarity="cosine", **options)
    _, (free,) = gradients(student, teacher, "mse", similarity="cosine")
    _, (detached,) = gradients(student, teacher, "mse", similarity="cosine", detach_norm=True)
    assert not torch.allclose(free, detached)


def test_relation_heads_regroup_the_width(kernel_backend):
    student, teacher = tokens(2, 7, 12, device=kernel_backend.device), tokens(2, 7, 8)
    teacher = teacher.to(kernel_backend.device)
    loss = kd.relation(student, teacher, relation_heads=4, normalization="sequence")
    regrouped = [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (student, teacher)]
    torch.testing.assert_close(loss, kd.relation(*regrouped, normalization="sequence"))
    assert_same(student, teacher, relation_heads=4)


def test_dtypes(kernel_backend):
    for dtype in kernel_backend.dtypes:
        student, teacher = tokens(2, 9, 6), tokens(2, 9, 6)
        student = student.to(kernel_backend.device, dtype)
        other = torch.float64 if dtype == torch.float64 else torch.float32
        teacher = teacher.to(kernel_backend.device, other)
        loss, (gradient,) = gradients(student, teacher)
        assert gradient.dtype == dtype
        assert loss.dtype == other
        assert_same(student, teacher)


def test_half_gradients_do_not_underflow(kernel_backend):
    student, teacher = tokens(1, 300, 4, device=kernel_backend.device), tokens(1, 300, 4)
    student, teacher = student.half(), teacher.to(kernel_backend.device)
    x = student.clone().requires_grad_()
    (kd.relation(x, teacher, "mse", normalization="pairs", mask=None) * 1e4).backward()
    assert float((x.grad == 0).double().mean()) < 0.01


def test_small_gaps(kernel_backend):
    for gap in (0.1, 0.01):
        teacher = tokens(1, 40, 8, device=kernel_backend.device)
        student = teacher + gap * tokens(1, 40, 8, device=kernel_backend.device)
        for kind in ("softmax_kl", "softmax_reverse_kl"):
            # The products themselves are rounded: 2^-24 of a score of size 3 against the gap.
            assert_same(student, teacher, kind, value=2e-6 / gap, gradient=2e-5 / gap)
    same = kd.relation(teacher, teacher.clone(), reduction="none")
    assert torch.equal(same.cpu(), torch.zeros(1, 40))


def test_empty_rows_are_zero(kernel_backend):
    student, teacher = tokens(1, 6, 4, device=kernel_backend.device), tokens(1, 6, 4)
    teacher = teacher.to(kernel_backend.device)
    mask = torch.zeros(6, 6, dtype=torch.bool, device=kernel_backend.device)
    mask[0, 1] = mask[0, 2] = True
    for kind in ROW_KINDS + ELEMENT_KINDS:
        values, (gradient,) = gradients(
            student, teacher, kind, mask=mask, reduction="none", **options_of(kind)
        )
        assert float(values[:, 1:].abs().max()) == 0.0
        assert bool(gradient.isfinite().all())
        assert float(gradient[:, 3:].abs().max()) == 0.0
        nothing = kd.relation(student, teacher, kind, mask=mask & False, **options_of(kind))
        assert float(nothing) == 0.0


def test_no_tokens_and_one_token(kernel_backend):
    for kind in KINDS:
        nothing = torch.zeros(2, 0, 4, device=kernel_backend.device)
        assert float(kd.relation(nothing, nothing, kind, **options_of(kind))) == 0.0
        one = tokens(2, 1, 4, device=kernel_backend.device)
        loss, (gradient,) = gradients(one, one + 1, kind, **options_of(kind))
        assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_strided_and_expanded_inputs(kernel_backend):
    x, y = tokens(2, 9, 16, device=kernel_backend.device), tokens(9, 2, 5).transpose(0, 1)
    y = y.to(kernel_backend.device)
    found = kd.relation(x[..., ::2], y)
    torch.testing.assert_close(found, kd.relation(x[..., ::2].contiguous(), y.contiguous()))
    wide = y[:1].expand(2, -1, -1)
    torch.testing.assert_close(kd.relation(x, wide), kd.relation(x, wide.contiguous()))


def test_masked_tokens_are_never_read(kernel_backend):
    student, teacher = tokens(2, 9, 4), tokens(2, 9, 4)
    mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    expected = gradients(student, teacher, mask=mask)
    student[1, 4:], teacher[1, 4:] = float("nan"), float("inf")
    student, teacher, mask = (x.to(kernel_backend.device) for x in (student, teacher, mask))
    loss, (gradient,) = gradients(student, teacher, mask=mask)
    torch.testing.assert_close(loss.cpu(), expected[0])
    torch.testing.assert_close(gradient.cpu(), expected[1][0])
    cut = kd.relation(student[1, :4], teacher[1, :4])
    rows = kd.relation(student, teacher, mask=mask, reduction="none")[1, :4]
    torch.testing.assert_close(rows.mean(), cut)


# Published formulas, in open form. ----------------------------------------------------------------


def test_minilm_formula(backend):
    q, t = tokens(2, 3, 6, 4, device=backend.device), tokens(2, 3, 6, 4, device=backend.device)
    lengths = (6, 4)
    mask = torch.tensor([[i < n for i in range(6)] for n in lengths], device=backend.device)
    per_sequence = []
    for b, n in enumerate(lengths):
        a = [x[b, :, :n] @ x[b, :, :n].mT / 2 for x in (q, t)]
        kl = F.kl_div(a[0].log_softmax(-1), a[1].softmax(-1), reduction="sum")
        per_sequence.append(kl / (3 * n))
    loss = kd.relation(q, t, mask=mask, normalization="sequence")
    torch.testing.assert_close(loss, sum(per_sequence) / 2, rtol=1e-5, atol=1e-7)


def test_similarity_preserving_formula(backend):
    x, y = tokens(10, 6, device=backend.device), tokens(10, 4, device=backend.device)
    g = [F.normalize(z @ z.T, dim=1) for z in (x, y)]
    expected = (g[1] - g[0]).square().sum() / 100
    torch.testing.assert_close(kd.relation(x, y, "gram_row_l2"), expected, rtol=1e-5, atol=0)


def test_pkt_formula(backend):
    x, y = tokens(10, 6, device=backend.device), tokens(10, 4, device=backend.device)
    p = []
    for z in (x.double(), y.double()):
        z = z / (z.norm(dim=1, keepdim=True) + 1e-7)
        r = (z @ z.T + 1) / 2
        p.append(r / r.sum(1, keepdim=True))
    expected = (p[1] * ((p[1] + 1e-7) / (p[0] + 1e-7)).log()).mean()
    loss = kd.relation(x, y, "gram_row_l1", similarity="cosine")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_rkd_formulas(backend):
    x, y = tokens(10, 6, device=backend.device), tokens(10, 4, device=backend.device)
    x[3] = x[2]
    distances, angles = [], []
    for z in (x.double(), y.double()):
        squared = (z[:, None] - z[None]).square().sum(-1).clamp(min=1e-12)
        d = squared.sqrt()
        d = d * (1 - torch.eye(10, device=d.device))
        distances.append(d / d[d > 0].mean())
        e = F.normalize(z[None] - z[:, None], dim=2)
        angles.append(e @ e.mT)
    torch.testing.assert_close(
        kd.relation(x, y, "distance").double(), F.smooth_l1_loss(*distances), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        kd.relation(x, y, "angle").double(), F.smooth_l1_loss(*angles), rtol=1e-5, atol=0
    )


def test_cka_formula(backend):
    from kdkernels.backends.torch_relation import cka_dense

    x, y = tokens(2, 10, 6, device=backend.device), tokens(2, 10, 4, device=backend.device)
    mask = torch.rand(2, 10, device=backend.device) < 0.7
    for options, on in (({}, None), ({"mask": mask}, mask)):
        found = kd.relation(x, y, "cka", reduction="none", **options)
        torch.testing.assert_close(found.double(), cka_dense(x, y, on), rtol=1e-5, atol=1e-7)


def test_video_relation_formula(backend):
    x, y = tokens(2, 12, 6, device=backend.device), tokens(2, 12, 4, device=backend.device)
    r = [F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).mT for z in (x, y)]
    expected = ((r[0] - r[1]).abs() - 0.1).relu()
    loss = kd.relation(x, y, "margin_l1", similarity="cosine", margin=0.1)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-7)
    frame = torch.arange(12, device=backend.device) // 4
    same = frame[:, None] == frame[None, :]
    for mode, on in (("same", same), ("different", ~same)):
        loss = kd.relation(
            x, y, "margin_l1", similarity="cosine", margin=0.1, block=frame, block_mode=mode
        )
        torch.testing.assert_close(loss, expected[:, on].mean(), rtol=1e-5, atol=1e-7)
