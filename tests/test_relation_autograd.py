"""kd.relation under autograd, torch.func, torch.compile; memory; bad input; closed forms."""

from __future__ import annotations

import pytest
import torch
from relation_cases import KINDS, gradients, options_of, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels.functional import relation_closed
from kdkernels.ops import relation_stream

FAMILY = "relation"

# One kind for each way through the Python above the operator: rows, cosines, the closed form, two
# walks, vertices. What is compiled does not depend on the backend, so one of them takes them all.
COMPILED = ["softmax_kl", "margin_l1", "mse", "distance", "angle"]


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("l1", "margin_l1")])
def test_gradcheck(double_backend, kind):
    student = tokens(1, 6, 3, dtype=torch.float64).requires_grad_()
    teacher = tokens(1, 6, 4, dtype=torch.float64).requires_grad_()
    options = options_of(kind)
    assert torch.autograd.gradcheck(
        lambda s, t: kd.relation(s, t, kind, **options), (student, teacher), fast_mode=True
    )


def test_backward_twice_is_the_same_twice(backend):
    student = tokens(2, 9, 4, device=backend.device).requires_grad_()
    loss = kd.relation(student, tokens(2, 9, 4, device=backend.device))
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    second = torch.autograd.grad(3 * loss, student)[0]
    torch.testing.assert_close(second, 3 * first)


def test_second_derivative_is_refused(kernel_backend):
    student = tokens(1, 5, 3, device=kernel_backend.device).requires_grad_()
    loss = kd.relation(student, tokens(1, 5, 3, device=kernel_backend.device))
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


def test_functorch(kernel_backend):
    student, teacher = (tokens(2, 9, 4, device=kernel_backend.device) for _ in range(2))
    for reduction in ("mean", "none"):

        def total(s, reduction=reduction):
            return kd.relation(s, teacher, reduction=reduction).sum()

        found = torch.func.grad(total)(student)
        _, (expected,) = gradients(student, teacher, reduction=reduction)
        torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda s: kd.relation(s, teacher))(torch.stack([student, student]))


@pytest.mark.parametrize("kind", COMPILED)
def test_compile(kernel_backend, kind):
    if kernel_backend.name != "cpu" and kind != "softmax_kl":
        pytest.skip("the operator of another backend is the same to the compiler")
    torch._dynamo.reset()
    student, teacher = (tokens(2, 9, 4, device=kernel_backend.device) for _ in range(2))
    scale = torch.tensor(0.7, device=kernel_backend.device, requires_grad=True)
    options = options_of(kind)
    if kind not in ("distance", "angle"):
        options["student_scale"] = scale

    def loss(s):
        return kd.relation(s, teacher, kind, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (loss, compiled):
        s = student.clone().requires_grad_()
        scale.grad = None
        value = function(s)
        value.backward()
        results.append((value.detach(), s.grad, scale.grad))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])
    if results[0][2] is not None:
        torch.testing.assert_close(results[1][2], results[0][2])


def test_opcheck(kernel_backend):
    from kdkernels.backends.relation_spec import RelationSpec

    q = tokens(2, 5, 3, device=kernel_backend.device).requires_grad_()
    t = tokens(2, 5, 4, device=kernel_backend.device)
    one = torch.tensor(0.5, device=kernel_backend.device)
    for mode in ("graph", "rows"):
        spec = list(RelationSpec(need_student=1.0))
        arguments = (q, None, t, None, one, one, *[None] * 6, "softmax_kl", spec, mode)
        torch.library.opcheck(torch.ops.kdkernels.relation, arguments)


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes, in entries; views of `known` are not made."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.entries = 0
        self.known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                if x.untyped_storage().data_ptr() in self.known:
                    continue
                self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "angle"])
def test_no_tensor_of_n_by_n_entries(kind, monkeypatch):
    tokens_of = 1100
    student = tokens(1, tokens_of, 8).requires_grad_()
    teacher = tokens(1, tokens_of, 6)
    options = options_of(kind)
    for extra in ({}, {"causal": True}):
        if extra and kind == "cka":
            continue
        with kd.use_backend("cpu"), Largest() as largest:
            kd.relation(student, teacher, kind, **options, **extra).backward()
        # A chunk, or 64 rows; the maps have N^2 entries.
        allowed = max(relation_stream._ENTRIES["cpu"], 64 * tokens_of)
        assert largest.entries <= allowed < tokens_of**2


def test_angle_memory_is_linear():
    student, teacher = tokens(1, 300, 4).requires_grad_(), tokens(1, 300, 4)
    relation_stream_entries = relation_stream._ANGLE_ENTRIES["cpu"]
    with kd.use_backend("cpu"), Largest() as largest:
        kd.relation(student, teacher, "angle", mask=torch.arange(300)[None] < 60).backward()
    assert largest.entries <= max(relation_stream_entries, 300 * 300 * 4)


@pytest.mark.parametrize("kind", ["mse", "gram_row_l2"])
@pytest.mark.parametrize("masked", [False, True])
def test_closed_forms_equal_the_walk(kind, masked, monkeypatch):
    for gap in (1.0, 1e-2):
        teacher = tokens(2, 60, 5)
        student = teacher + gap * tokens(2, 60, 5)
        mask = torch.rand(2, 60) < 0.8 if masked else None
        for similarity in ("dot", "cosine"):
            options = {
                "similarity": similarity,
                "mask": mask,
                "teacher_grad": True,
                "student_scale": torch.tensor(0.9),
                "teacher_scale": torch.tensor(1.1 - gap / 10),
            }
            with kd.use_backend("cpu"):
                monkeypatch.setattr(relation_closed, "is_cheaper", lambda s, t: True)
                loss, found = gradients(student, teacher, kind, **options)
                monkeypatch.setattr(relation_closed, "is_cheaper", lambda s, t: False)
                expected, wanted = gradients(student, teacher, kind, **options)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-12)
            for a, b in zip(found, wanted, strict=True):
                assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) / gap + 1e-9


BAD = [
    ("teacher", dict(teacher=torch.zeros(2, 6, 4))),
    ("teacher", dict(teacher=torch.zeros(3, 5, 4))),
    ("student", dict(student=torch.zeros(2, 5, 0))),
    ("student", dict(student=torch.zeros(5))),
    ("student", dict(student=torch.zeros(2, 5, 4, dtype=torch.int64))),
    ("kind", dict(kind="softmax")),
    ("student_scale", dict(similarity="cosine", student_scale=0.0)),
    ("student_scale", dict(similarity="cosine", student_scale=torch.tensor(-1.0))),
    ("teacher_scale", dict(kind="distance", teacher_scale=2.0)),
    ("relation_heads", dict(relation_heads=3)),
    ("relation_heads", dict(relation_heads=0)),
    ("mask", dict(mask=torch.ones(2, 6, dtype=torch.bool))),
    ("mask", dict(mask=torch.ones(2, 5))),
    ("block", dict(block=torch.zeros(2, 5))),
    ("both_directions", dict(both_directions=True)),
    ("label_mix", dict(kind="mse", label_mix=0.5)),
    ("label_mix", dict(label_mix=1.5)),
    ("beta", dict(kind="huber", beta=0.0)),
    ("margin", dict(kind="margin_l1", margin=-1.0)),
    ("similarity", dict(similarity="l2")),
    ("similarity", dict(kind="gram_row_l1", similarity="dot")),
    ("mask", dict(kind="cka", causal=True)),
    ("reduction", dict(reduction="batchmean")),
    ("normalization", dict(normalization="weights")),
    ("num_items", dict(num_items=0)),
]


@pytest.mark.parametrize("name, options", BAD)
def test_bad_input_names_the_argument(name, options):
    arguments = {"student": torch.zeros(2, 5, 4), "teacher": torch.zeros(2, 5, 4), **options}
    with pytest.raises((ValueError, TypeError), match=name):
        kd.relation(**arguments)


def test_every_schedule_order_and_isa():
    """simt in three orders, the CPU on every ISA: the same numbers."""
    student, teacher = tokens(2, 37, 8), tokens(2, 37, 6)
    mask = torch.rand(37, 37) < 0.6
    from kdkernels.backends import registry

    results = []

    def collect():
        for kind in KINDS:
            if kind in ("angle", "cka"):
                continue
            options = options_of(kind)
            if kind != "distance":
                options["mask"] = mask
            results[-1].append(gradients(student, teacher, kind, **options))

        # Thread 0 reads the row's own product before any thread overwrites it.
        results[-1].append(gradients(student, teacher, "softmax_kl", label_mix=0.3))

    reports = {r.backend: r.available for r in kd.backends() if r.family == "relation"}
    if reports["cpu"]:
        module = registry.load("cpu")
        for isa in module._C.compiled_isas():
            try:
                module._C.set_isa(isa)
            except ValueError:
                continue
            results.append([])
            with kd.use_backend("cpu"):
                collect()
        module._C.set_isa("")
    if reports["simt"]:
        for order in ("ascending", "descending", "shuffle"):
            registry.load("simt").set_order(order, 7)
            results.append([])
            with kd.use_backend("simt"):
                collect()
        registry.load("simt").set_order("ascending", 0)
    assert results
    for other in results[1:]:
        for (a, (b,)), (c, (d,)) in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-9)
            assert float((b - d).abs().max()) <= 1e-5 * float(b.abs().max())


def test_threads_do_not_change_the_row_kernel():
    student, teacher = tokens(1, 200, 16), tokens(1, 200, 16)
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        with kd.use_backend("cpu"):
            found.append(kd.relation(student, teacher, "softmax_kl", reduction="none"))
    torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
