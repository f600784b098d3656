"""kd.graph_on_logits on every backend: the explicit graph, float64, edges, autograd."""

from __future__ import annotations

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import registry
from kdkernels.testing import tolerances

FAMILY = "gromov"  # conftest: the backends that serve it

# Sums of T k products of z, each z right to a float32 rounding or two; a feature's difference may
# be a thousand times smaller than the feature.
LOSS_FLOAT32 = 1e-4


def explicit(student, teacher, k=10, standardize="vocab", aggregate="mean", p=1, tau=(1.0, 1.0)):
    """The textbook formula with the k x k graphs, float64, torch.topk: values of each sequence."""

    def features(x, tau):
        x = x.double()
        if standardize:
            x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-6)
        z = (x / tau).topk(k, dim=-1).values
        graph = torch.einsum("...ti,...tj->...ij", z, z) / x.shape[-2]
        f = graph.mean(-1) if aggregate == "mean" else graph.sum(-1)
        return f.sort(dim=-1, descending=True).values

    return (features(student, tau[0]) - features(teacher, tau[1])).abs().pow(p).sum(-1)


def logits(*shape, dtype=torch.float32, device="cpu", std=3.0):
    """Distinct values in every dtype: half types would tie at the k-th place of wide rows."""
    x = torch.randn(shape, dtype=torch.float64) * std
    if dtype in (torch.float16, torch.bfloat16):
        ranks = torch.argsort(torch.rand(shape, dtype=torch.float64), dim=-1).double()
        # Multiples of 2^-6 are exact in bfloat16 below 4, in float16 below 32.
        x = (ranks - shape[-1] // 2) / 64.0
    return x.to(device, dtype)


def gradient_of(loss, student):
    return torch.autograd.grad(loss.sum(), student)[0].double().cpu()


@pytest.mark.parametrize("standardize", ("vocab", None))
@pytest.mark.parametrize("aggregate, p", (("mean", 1), ("sum", 2)))
@pytest.mark.parametrize("k, width", ((1, 9), (10, 33), (10, 700), (80, 300)))
def test_explicit_graph(backend, standardize, aggregate, p, k, width):
    options = dict(k=k, standardize=standardize, aggregate=aggregate, p=p)
    for dtype in backend.dtypes:
        if dtype == torch.bfloat16 and width > 300:
            continue  # no 700 distinct values a row
        student = logits(2, 3, width, dtype=dtype, device=backend.device).requires_grad_()
        teacher = logits(2, 5, width + 4, dtype=dtype, device=backend.device)
        loss = kd.graph_on_logits(
            student, teacher, temperature=1.5, teacher_temperature=0.8, reduction="none", **options
        )
        exact = student.detach().double().requires_grad_()
        expected = explicit(exact, teacher, tau=(1.5, 0.8), **options)
        rtol = 1e-11 if dtype == torch.float64 else LOSS_FLOAT32
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
        wanted = gradient_of(expected, exact)
        scale = wanted.abs().amax() * (1 if dtype == torch.float64 else 10)
        tolerances.assert_gradient(gradient_of(loss, student), wanted, scale, dtype)


def test_masks_scope_and_reductions(backend):
    student, teacher = logits(3, 4, 50), logits(3, 6, 41)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    teacher_mask = torch.rand(3, 6) < 0.6
    teacher_mask[:, 2] = True
    # What stands in positions that are not selected is never used.
    student[~mask] = torch.nan
    teacher[~teacher_mask] = torch.inf
    student, teacher = student.to(backend.device), teacher.to(backend.device)
    marks = dict(mask=mask.to(backend.device), teacher_mask=teacher_mask.to(backend.device))
    student.requires_grad_()
    values = kd.graph_on_logits(student, teacher, reduction="none", **marks)
    expected = [
        explicit(student.detach()[i][mask[i]], teacher[i][teacher_mask[i]]).item()
        if mask[i].any()
        else 0.0
        for i in range(3)
    ]
    torch.testing.assert_close(
        values.cpu().double(), torch.tensor(expected).double(), rtol=1e-4, atol=0
    )
    total = kd.graph_on_logits(student, teacher, reduction="sum", **marks)
    mean = kd.graph_on_logits(student, teacher, **marks)
    torch.testing.assert_close(total, values.sum())
    torch.testing.assert_close(mean, values.sum() / 2)
    gradient = gradient_of(mean, student)
    assert bool((gradient[~mask] == 0).all()) and bool((gradient[mask] != 0).any(-1).all())
    whole = kd.graph_on_logits(student, teacher, scope="batch", reduction="none", **marks)
    assert whole.shape == ()
    expected = explicit(student.detach()[mask], teacher[teacher_mask])
    torch.testing.assert_close(whole.double().cpu(), expected.cpu(), rtol=1e-4, atol=0)
    none = kd.graph_on_logits(
        student, teacher, mask=torch.zeros_like(marks["mask"]), teacher_mask=marks["teacher_mask"]
    )
    assert none.item() == 0 and bool((gradient_of(none, student) == 0).all())


def test_teacher_mask_defaults_to_mask(backend):
    student, teacher = (
        logits(2, 4, 30, device=backend.device),
        logits(2, 4, 25, device=backend.device),
    )
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]], dtype=torch.bool, device=backend.device)
    one = kd.graph_on_logits(student, teacher, k=3, mask=mask)
    two = kd.graph_on_logits(student, teacher, k=3, mask=mask, teacher_mask=mask)
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="teacher_mask"):
        kd.graph_on_logits(student, teacher[:, :3], k=3, mask=mask)


def test_equal_rows_are_zero(backend):
    x = logits(2, 3, 60, device=backend.device)
    student = x.clone().requires_grad_()
    loss = kd.graph_on_logits(student, x)
    assert loss.item() == 0 and bool((gradient_of(loss, student) == 0).all())


def test_offset_and_scale_of_the_logits(backend):
    """z-scores forget both; a float32 one-pass variance would not survive the offset."""
    student, teacher = logits(1, 3, 3000), logits(1, 3, 3000)
    expected = explicit(student, teacher)
    moved = (student * 4 + 5000).to(backend.device)  # exact expectation of the rounded inputs below
    loss = kd.graph_on_logits(moved, teacher.to(backend.device), reduction="none")
    exact = explicit(moved, teacher.to(backend.device))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=2e-2, atol=0)


def test_masked_vocabulary(backend):
    """-inf logits are no part of the vocabulary: as if their columns were cut off."""
    for standardize in ("vocab", None):
        short = logits(2, 3, 40)
        student = torch.full((2, 3, 90), -torch.inf)
        columns = torch.randperm(90)[:40].sort().values
        student[..., columns] = short
        student = student.to(backend.device).requires_grad_()
        short.requires_grad_()
        teacher = logits(2, 3, 40)
        loss = kd.graph_on_logits(student, teacher.to(backend.device), standardize=standardize)
        with kd.use_backend("torch"):
            expected = kd.graph_on_logits(short, teacher, standardize=standardize)
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=0)
        gradient, wanted = gradient_of(loss, student), gradient_of(expected, short)
        torch.testing.assert_close(gradient[..., columns], wanted, rtol=1e-4, atol=1e-8)
        dead = torch.ones(90, dtype=torch.bool)
        dead[columns] = False
        assert bool((gradient[..., dead] == 0).all())


def test_fewer_logits_than_k(backend):
    """Ranks that have only -inf left are absent: z = 0, no gradient; a row of -inf is nothing."""
    x = torch.full((1, 3, 300), -torch.inf)
    x[0, 0, 7], x[0, 0, 250], x[0, 0, 30] = 2.0, 3.0, -1.0
    x[0, 1, 11:40] = torch.randn(29)
    student = x.to(backend.device).requires_grad_()
    teacher = logits(1, 2, 20, device=backend.device)
    loss = kd.graph_on_logits(student, teacher, k=6)
    z = torch.zeros(3, 6, dtype=torch.float64)
    for row, alive in ((0, x[0, 0][x[0, 0] > -torch.inf]), (1, x[0, 1, 11:40])):
        alive = alive.double()
        score = (alive - alive.mean()) / (alive.std(unbiased=False) + 1e-6)
        kept = score.sort(descending=True).values[:6]
        z[row, : kept.numel()] = kept
    f = (z.T @ z / 3).mean(-1).sort(descending=True).values
    t = teacher.double().cpu()
    t = (t - t.mean(-1, keepdim=True)) / (t.std(-1, keepdim=True, unbiased=False) + 1e-6)
    w = t.topk(6).values[0]
    expected = (f - (w.T @ w / 2).mean(-1).sort(descending=True).values).abs().sum()
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-4, atol=0)
    gradient = gradient_of(loss, student)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[x == -torch.inf] == 0).all())


def test_nan_stays_in_its_graph(backend):
    for bad in (torch.nan, torch.inf):
        for standardize in ("vocab", None):
            student = logits(3, 4, 40, device=backend.device)
            teacher = logits(3, 4, 40, device=backend.device)
            clean = student.clone().requires_grad_()
            student[1, 2, 5] = bad
            student.requires_grad_()
            options = dict(reduction="none", standardize=standardize)
            values = kd.graph_on_logits(student, teacher, **options)
            expected = kd.graph_on_logits(clean, teacher, **options)
            assert not bool(values[1].isfinite()), (bad, standardize)
            assert torch.equal(values[::2], expected[::2])
            gradient = gradient_of(values, student)
            torch.testing.assert_close(
                gradient[::2], gradient_of(expected, clean)[::2], rtol=0, atol=0
            )


def test_kept_entries(backend):
    """The k first: descending, NaN first, equal logits by the lowest index; indices int32."""
    from kdkernels.ops import gromov as ops

    rows = torch.randint(-4, 5, (6, 1500)).float()
    rows[1] = 0.0
    rows[2] = torch.arange(1500)
    rows[3] = -torch.arange(1500)
    rows[4, 700:703] = torch.nan
    rows[5, :1400] = -torch.inf
    for dtype in backend.dtypes:
        for k in (1, 3, 64, 65, 200, 1500):
            x = rows.to(backend.device, dtype)
            options = ops.NodeOptions(k, 1, False, True, 1.0)
            _, values, indices, _, _ = ops._forward(x, None, options)
            expected = x.sort(dim=-1, descending=True, stable=True)
            assert torch.equal(indices.long(), expected.indices[:, :k]), (dtype, k)
            kept = expected.values[:, :k]
            kept = torch.where(kept == -torch.inf, 0.0, kept)
            torch.testing.assert_close(
                values, kept.to(values.dtype), rtol=0, atol=0, equal_nan=True
            )


def test_ties_give_a_directional_derivative(double_backend):
    """Where logits or features are equal, the gradient is the derivative along a direction that
    the tie-break agrees with: earlier ones of the equal logits rise more."""
    base = torch.tensor([[[1.0, 3.0, 3.0, 0.0, 3.0, -2.0, 1.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.3, 2.0, 2.0, 1.0, -1.0]]], dtype=torch.float64)
    direction = torch.tensor([[[0.5, 0.9, 0.4, -0.3, 0.1, 0.2, 0.05]]], dtype=torch.float64)
    for k in (1, 2, 3, 4):
        student = base.clone().requires_grad_()
        loss = kd.graph_on_logits(student, teacher, k=k)
        slope = (gradient_of(loss, student) * direction).sum()
        step = 1e-7
        ahead = kd.graph_on_logits(base + step * direction, teacher, k=k)
        assert abs((ahead - loss.detach()) / step - slope) < 1e-5, k


def test_gradcheck(double_backend):
    student = logits(2, 3, 12, dtype=torch.float64).requires_grad_()
    teacher = logits(2, 2, 9, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    for options in (
        dict(k=4),
        dict(k=4, p=2, scope="batch", aggregate="sum"),
        dict(k=9, standardize=None, p=2, temperature=2.0),
    ):

        def loss(s, t, options=options):
            marks = dict(mask=mask, teacher_mask=torch.ones(2, 2, dtype=torch.bool))
            return kd.graph_on_logits(s, t, **marks, **options)

        torch.autograd.gradcheck(loss, (student, teacher), eps=1e-6, atol=1e-6)


def test_rows_that_are_not_contiguous(kernel_backend):
    base = logits(2, 6, 130, device=kernel_backend.device)
    teacher = logits(2, 3, 64, device=kernel_backend.device)
    for view in (base[:, ::2, 1:], base[:, :3, :129], base[..., ::2], base[:1].expand(2, 6, 130)):
        one = view.detach().requires_grad_()
        two = view.clone().requires_grad_()
        losses = [kd.graph_on_logits(x, teacher) for x in (one, two)]
        # Not the same bits: on CUDA the chunks of a row follow its alignment.
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
        gradients = gradient_of(losses[0], one), gradient_of(losses[1], two)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", (10, 300))
def test_simt_schedules_give_the_same_bits(k):
    """Selection, sums and gradient do not depend on which thread is first."""
    simt = registry._try("simt")
    if isinstance(simt, str):
        pytest.skip(simt)
    student, teacher = logits(1, 3, 2500), logits(1, 2, 1200)
    results = []
    try:
        with kd.use_backend("simt"):
            for order in (
                ("ascending", 0),
                ("descending", 0),
                ("warp_ahead", 1),
                ("warp_ahead", 2),
            ):
                simt.set_order(*order)
                x = student.clone().requires_grad_()
                loss = kd.graph_on_logits(x, teacher, k=k)
                results.append((loss.detach(), gradient_of(loss, x)))
    finally:
        simt.set_order("ascending")
    for loss, gradient in results:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_threads_and_instruction_sets_agree():
    """The same bits for any number of threads; every instruction set against float64."""
    native = registry._try("cpu")
    if isinstance(native, str):
        pytest.skip(native)
    student, teacher = logits(2, 40, 5000), logits(2, 30, 4000)

    def run():
        x = student.clone().requires_grad_()
        loss = kd.graph_on_logits(x, teacher)
        return loss.detach(), gradient_of(loss, x)

    expected = explicit(student, teacher).mean()
    threads = torch.get_num_threads()
    try:
        with kd.use_backend("cpu"):
            for isa in native._C.compiled_isas():
                try:
                    native._C.set_isa(isa)
                except ValueError:
                    continue  # compiled in, but not for this machine
                results = []
                for number in (1, 2, 3):
                    torch.set_num_threads(number)
                    results.append(run())
                assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0])), isa
                torch.testing.assert_close(results[0][0].double(), expected, rtol=1e-4, atol=0)
    finally:
        native._C.set_isa("")
        torch.set_num_threads(threads)


def test_autograd_and_compile(kernel_backend):
    student = logits(2, 3, 200, device=kernel_backend.device).requires_grad_()
    teacher = logits(2, 4, 150, device=kernel_backend.device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=kernel_backend.device)
    mask[0, 1] = False
    marks = dict(mask=mask, teacher_mask=torch.ones_like(teacher[..., 0], dtype=torch.bool))

    def loss(s):
        return kd.graph_on_logits(s, teacher, k=5, **marks)

    value = loss(student)
    first = torch.autograd.grad(value, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, student)[0])
    assert torch.equal(first, torch.func.grad(loss)(student.detach()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    again = compiled(student)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(torch.autograd.grad(again, student)[0], first)
    with pytest.raises(NotImplementedError, match="second derivative"):
        (g,) = torch.autograd.grad(loss(student), student, create_graph=True)
        g.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(loss)(torch.stack([student.detach()] * 2))


def test_opcheck(kernel_backend):
    rows = logits(6, 60, device=kernel_backend.device).requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool, device=kernel_backend.device)
    arguments = (rows, mask, 4, 2, True, True, 1.5)
    torch.library.opcheck(torch.ops.kdkernels.graph_nodes_fwd.default, arguments)


def test_teacher_with_gradient_and_upstream(backend):
    """Mutual distillation; and a scaled float16 loss, whose small gradients must not be made for
    upstream 1 first: they would be 0."""
    student = logits(1, 3, 80, device=backend.device).requires_grad_()
    teacher = logits(1, 3, 70, device=backend.device).requires_grad_()
    for a in (student, teacher):
        loss = kd.graph_on_logits(student, teacher)
        with kd.use_backend("torch"):
            expected = kd.graph_on_logits(student, teacher)
        (gradient,) = torch.autograd.grad(loss, a, retain_graph=True)
        torch.testing.assert_close(
            gradient, torch.autograd.grad(expected, a)[0], rtol=1e-4, atol=1e-7
        )
    half = logits(1, 4, 300, dtype=torch.float16, device=backend.device).requires_grad_()
    small = kd.graph_on_logits(half, teacher.detach(), temperature=1e4, teacher_temperature=1e4)
    (gradient,) = torch.autograd.grad(small * 2.0**20, half)
    assert int((gradient != 0).sum()) > 100


def test_no_graph_and_no_copy_of_the_logits():
    """Peak memory of a forward: no T x V tensor; of k = 2000: no k x k tensor."""
    from torch.profiler import ProfilerActivity, profile

    student, teacher = logits(1, 64, 20000), logits(1, 64, 20000)
    for k in (10, 2000):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            kd.graph_on_logits(student, teacher, k=k)
        sizes = [abs(e.self_cpu_memory_usage) for e in profiled.events()]
        kept = 64 * k * (4 + 4)  # values and indices of one side
        assert max(sizes) <= max(kept, 1 << 16), k
        assert max(sizes) < 2000 * 2000 * 4 and max(sizes) < student.nbytes


def test_bad_input():
    s, t = logits(2, 3, 20), logits(2, 3, 30)
    for options, words in (
        (dict(k=21), "k: 21 is more than the 20 logits of the student"),
        (dict(k=0), "k: expected 1"),
        (dict(k=20), "k = V = 20"),
        (dict(standardize="topk"), "add up to 0"),
        (dict(standardize="row"), "standardize"),
        (dict(aggregate="max"), "aggregate"),
        (dict(p=3), "p: expected 1 or 2"),
        (dict(scope="token"), "scope"),
        (dict(reduction="batchmean"), "reduction"),
        (dict(temperature=0.0), "temperature"),
        (dict(teacher_temperature=-1.0), "teacher_temperature"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), "mask: expected shape"),
        (dict(teacher_mask=torch.ones(3, dtype=torch.bool)), "teacher_mask: expected shape"),
    ):
        with pytest.raises(ValueError, match=words):
            kd.graph_on_logits(s, t, **options)
    for options, words in (
        (dict(k=2.0), "k: expected an int"),
        (dict(mask=torch.ones(2, 3)), "mask: expected a bool"),
        (dict(temperature="1"), "temperature"),
    ):
        with pytest.raises(TypeError, match=words):
            kd.graph_on_logits(s, t, **options)
    with pytest.raises(ValueError, match="position"):
        kd.graph_on_logits(s[:, :0], t)
    with pytest.raises(ValueError, match="leading shape"):
        kd.graph_on_logits(s, t[:1])
    with pytest.raises(TypeError, match="teacher: expected float32"):
        kd.graph_on_logits(s, t.long())
    with pytest.raises(TypeError, match="float64 goes with float64"):
        kd.graph_on_logits(s, t.double())
    with kd.debug(), pytest.raises(ValueError, match="NaN"):
        kd.graph_on_logits(s * torch.nan, t)


def test_no_sequences(backend):
    student = torch.zeros(0, 3, 20, device=backend.device, requires_grad=True)
    loss = kd.graph_on_logits(student, torch.zeros(0, 3, 20, device=backend.device))
    assert loss.item() == 0
    assert gradient_of(loss, student).shape == (0, 3, 20)


def test_top_k_teachers(backend):
    """The kept logits alone, however they were stored, give the dense teacher's loss."""
    student = torch.randn(2, 5, 40, device=backend.device, requires_grad=True)
    dense = torch.randn(2, 6, 50, device=backend.device)
    values, ids = dense.topk(8)
    tau = 0.7
    lse = (dense / tau).logsumexp(-1)
    log_probs = values / tau - lse[..., None]
    ragged = ids.clone()
    ragged[..., 5:] = -1  # the wanted 4 are there
    stored = (
        kd.TopK(values, ids, form="logits"),
        kd.TopK(values, ragged, form="logits"),
        kd.TopK(log_probs, ids, lse=lse, generation_temperature=tau),
        kd.TopK(log_probs.exp(), ids, form="probs", lse=lse, generation_temperature=tau),
    )
    options = dict(k=4, standardize=None, temperature=1.3)
    expected = kd.graph_on_logits(student, dense, **options)
    (gradient,) = torch.autograd.grad(expected, student)
    for teacher in stored:
        found = kd.graph_on_logits(student, teacher, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(found, student)[0], gradient, rtol=1e-4, atol=1e-6
        )
    two = kd.losses.GraphOnLogitsLoss(k=4, standardize=None, temperature=1.3)
    torch.testing.assert_close(
        two(student[:, :5], [stored[0], dense]), expected, rtol=1e-4, atol=1e-5
    )


def test_top_k_teachers_are_checked():
    student, dense = torch.randn(2, 5, 40), torch.randn(2, 5, 50)
    values, ids = dense.topk(8)
    short = ids.clone()
    short[0, 1, 3:] = -1
    for match, teacher, options in (
        ("standardize", kd.TopK(values, ids, form="logits"), dict(k=4)),
        ("teacher: .*lse", kd.TopK(values, ids), dict(k=4, standardize=None)),
        ("k: 9", kd.TopK(values, ids, form="logits"), dict(k=9, standardize=None)),
        ("teacher: .*k = 4", kd.TopK(values, short, form="logits"), dict(k=4, standardize=None)),
    ):
        with pytest.raises(ValueError, match=match):
            kd.graph_on_logits(student, teacher, **options)
    everywhere = torch.ones(2, 5, dtype=torch.bool)
    everywhere[0, 1] = False  # the short row is not selected
    teacher = kd.TopK(values, short, form="logits")
    kd.graph_on_logits(student, teacher, k=4, standardize=None, mask=everywhere)
    for match, error, arguments in (
        ("values", TypeError, (ids, ids)),
        ("indices", TypeError, (values, values)),
        ("indices", ValueError, (values, ids[..., :3])),
        ("form", ValueError, (values, ids, "log")),
        ("tail", ValueError, (values, ids, "logits", "rest")),
        ("lse", ValueError, (values, ids, "probs", "bucket", values)),
        ("generation_temperature", ValueError, (values, ids, "probs", "bucket", None, 0.0)),
    ):
        with pytest.raises(error, match=match):
            kd.TopK(*arguments)
