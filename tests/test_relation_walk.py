"""The CPU's walk in blocks (csrc/relation/relation_walk.h): against float64, which takes chunks, on
shapes that are cut into several blocks, parts, panels and groups of widths."""

from __future__ import annotations

import contextlib

import pytest
import torch
from relation_cases import ELEMENT_KINDS, ROW_KINDS, gradients, options_of, tokens

import kdkernels as kd
from kdkernels.backends import cpu
from kdkernels.backends.registry import pick
from kdkernels.ops import relation_stream


@contextlib.contextmanager
def instruction_set(name: str):
    from kdkernels.backends.native import extension

    module = extension("_C")
    try:
        module.set_isa(name)
    except ValueError:
        pytest.skip(f"this machine has no {name}")
    try:
        yield
    finally:
        module.set_isa("")


@pytest.fixture(params=["avx512", "avx2"])
def walk(request, monkeypatch):
    """The calls of the walk that the test makes."""
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    calls = []
    native = cpu.relation_walk

    def watched(*arguments):
        calls.append(arguments)
        native(*arguments)

    monkeypatch.setattr(cpu, "relation_walk", watched)
    with kd.use_backend("cpu"), instruction_set(request.param):
        assert pick("relation", "cpu") is cpu
        yield calls


def same(walk, student, teacher, kind: str, *, parts: int, **options):
    """Loss and gradients of float32 tokens as those of the same numbers in float64."""
    found = gradients(student, teacher, kind, **options)
    assert len(walk) == 1 and walk[0][-2] == parts
    sides = [s if isinstance(s, tuple) else (s,) for s in (student, teacher)]
    wide = [tuple(x.double() for x in s) for s in sides]
    wide = [w if isinstance(s, tuple) else w[0] for w, s in zip(wide, (student, teacher))]
    options = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in options.items()
    }
    expected = gradients(*wide, kind, **options)
    assert len(walk) == 1  # float64 walks in chunks
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-10)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        bound = 2e-5 * float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


# Rows: 3 parts of one graph, the last block of 1 row. Widths: one group of 64 and a rest, several
# groups, less than a unit.
@pytest.mark.parametrize("widths", [(80, 136), (64, 9), (200, 16)])
@pytest.mark.parametrize("kind", ["softmax_kl", "softmax_cross_entropy", "gram_row_l1"])
def test_one_graph_in_parts(walk, kind, widths):
    student, teacher = tokens(193, widths[0]), tokens(193, widths[1])
    same(walk, student, teacher, kind, teacher_grad=True, parts=3, **options_of(kind))


@pytest.mark.parametrize("kind", ["margin_l1", "mse", "huber"])
def test_symmetric_maps(walk, kind):
    options = {**options_of(kind), "clamp": -0.9, "similarity": "cosine"}
    same(walk, tokens(3, 130, 24), tokens(3, 130, 9), kind, teacher_grad=True, parts=2, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_distances(walk, masked):
    student, teacher = tokens(2, 140, 24), tokens(2, 140, 9)
    options = {"mask": torch.rand(2, 140) < 0.6} if masked else {}
    student[:, 3] = student[:, 7]  # duplicates carry no gradient
    found = gradients(student, teacher, "distance", teacher_grad=True, **options)
    assert len(walk) == 2 and all(call[-3] for call in walk)
    wide = student.double(), teacher.double()
    expected = gradients(*wide, "distance", teacher_grad=True, **options)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        bound = 1e-4 * float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("shape", [(131, 70), (70, 131), (64, 33), (3, 400), (400, 3)])
def test_queries_and_keys(walk, shape):
    rows, columns = shape
    student = tokens(2, rows, 20), tokens(2, columns, 20)
    teacher = tokens(2, rows, 72), tokens(2, columns, 72)
    parts = max(1, min(4, rows // 64))
    same(walk, student, teacher, "softmax_reverse_kl", teacher_grad=True, parts=parts)


@pytest.mark.parametrize("kind", ROW_KINDS + ELEMENT_KINDS)
def test_every_kind_of_queries_and_keys(walk, kind):
    student = tokens(2, 64, 20), tokens(2, 33, 20)
    teacher = tokens(2, 64, 72), tokens(2, 33, 72)
    same(walk, student, teacher, kind, teacher_grad=True, parts=1, **options_of(kind))


@pytest.mark.parametrize("selection", ["causal", "tokens", "pairs", "same", "off", "narrow causal"])
def test_selections(walk, selection):
    student, teacher = tokens(2, 2, 150, 24), tokens(2, 2, 150, 8)
    mask = torch.rand(2, 150) < 0.7
    if selection == "narrow causal":  # fewer columns than rows and more, from queries and keys
        student, teacher = (tokens(2, 2, 150, 8), tokens(2, 2, 40, 8)), (tokens(2, 2, 150, 8),) * 2
        teacher = teacher[0], tokens(2, 2, 40, 8)
    options = {
        "causal": {"causal": True, "mask": mask},
        "narrow causal": {"causal": True},
        "tokens": {"mask": mask},
        "pairs": {"mask": torch.rand(2, 1, 150, 150) < 0.1},
        "same": {"block": torch.arange(150) // 40},
        "off": {"exclude_diagonal": True},
    }[selection]
    same(walk, student, teacher, "softmax_kl", teacher_grad=True, parts=2, **options)


def test_row_values_and_label_mix_and_scales(walk):
    weight = torch.rand(2, 100)
    student, teacher = tokens(2, 100, 24), tokens(2, 100, 24)
    scale = torch.tensor(0.3)
    found = gradients(
        student, teacher, "softmax_kl", reduction="none", weight=weight, label_mix=0.2,
        student_scale=scale, teacher_scale=0.4,
    )  # fmt: skip
    assert len(walk) == 2  # the rows' values, then their gradients with the upstream as weights
    expected = gradients(
        student.double(), teacher.double(), "softmax_kl", reduction="none", weight=weight.double(),
        label_mix=0.2, student_scale=scale.double(), teacher_scale=0.4,
    )  # fmt: skip
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        bound = 2e-5 * float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


def test_contrast_makes_its_gradient_along_with_the_value(walk):
    query, key = tokens(140, 24).requires_grad_(), tokens(140, 24).requires_grad_()
    loss = kd.contrastive(query, key, scale=0.5)
    ours = torch.autograd.grad(loss, (query, key))
    assert len(walk) == 1
    a, b = query.detach().double().requires_grad_(), key.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(0.5 * a @ b.T, torch.arange(140))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    for x, y in zip(ours, torch.autograd.grad(wanted, (a, b))):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-5 * float(y.abs().max()))


def test_bits_do_not_depend_on_the_threads(walk):
    student, teacher = tokens(260, 24), tokens(260, 24)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients(student, teacher, "softmax_kl", teacher_grad=True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], other[1]))


def test_no_rows_and_no_columns(walk, monkeypatch):
    monkeypatch.setattr(relation_stream, "_SMALL_MAP", 0)
    for rows, columns in ((0, 5), (5, 0)):
        q, k = torch.zeros(1, rows, 16, requires_grad=True), torch.zeros(1, columns, 16)
        k.requires_grad_()
        loss = kd.relation((q, k), (q.detach(), k.detach()), reduction="sum")
        assert loss == 0
        assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(loss, (q, k)))
    assert len(walk) == 2


def test_slow_instruction_sets_and_other_dtypes_walk_in_chunks(walk):
    with instruction_set("baseline"):
        kd.relation(tokens(70, 8), tokens(70, 8))
    kd.relation(tokens(70, 8).double(), tokens(70, 8).double())
    kd.relation(tokens(70, 8), tokens(70, 7))
    kd.relation(tokens(9, 31, 16), tokens(9, 31, 16))
    assert not walk


def test_bad_calls_are_named(walk):
    native = cpu.relation_walk
    q, out = torch.zeros(1, 3, 16), torch.zeros(1, 3, 10, dtype=torch.float64)
    panels, one = torch.zeros(1, 32, 16), torch.ones(())
    none = (None,) * 6
    spec = relation_stream.RelationSpec(kind=0.0)

    def call(student=(q, None, panels, None, None, None), teacher=None, parts=1, spec=spec):
        teacher = student if teacher is None else teacher
        native(student, teacher, one, one, *(None,) * 9, out, False, parts, spec)

    call()
    with pytest.raises(ValueError, match="d a multiple of 16"):
        call((q[..., :7].contiguous(), None, panels, None, None, None))
    with pytest.raises(ValueError, match="32 rows of 16"):
        call((q, None, panels[:, :16].contiguous(), None, None, None))
    with pytest.raises(ValueError, match="teacher: expected tokens"):
        call(teacher=none)
    with pytest.raises(ValueError, match="parts: expected 1 to 3"):
        call(parts=4)
    with pytest.raises(ValueError, match="student: expected a gradient"):
        call(spec=spec._replace(need_student=1.0))
    with pytest.raises(ValueError, match="where symmetric"):
        call(spec=spec._replace(kind=13.0))
