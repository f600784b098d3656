"""Sinkhorn's kernels and its autograd: schedules, launches, instruction sets, threads; compile,
torch.func, second derivatives, autocast."""

from __future__ import annotations

import pytest
import torch
from transport_cases import loop, problem

import kdkernels as kd
from kdkernels.backends.transport_spec import SinkhornSpec

FAMILY = "transport"


@pytest.mark.parametrize(
    "order", (("ascending",), ("descending",), ("shuffle", 7), ("warp_ahead",))
)
def test_simt_schedules_agree(order):
    reason = next(r for r in kd.backends() if (r.family, r.backend) == ("transport", "simt"))
    if not reason.available:
        pytest.skip(reason.why_not)
    from kdkernels.backends import simt

    simt.set_order(*order)
    try:
        cost, a, b = problem(1, 9, 40, dtype=torch.float32)
        with kd.use_backend("simt"):
            value = kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=3)
            grads = torch.autograd.grad(value.sum(), (cost, a, b))
        with kd.use_backend("torch"):
            own = [t.detach().double().requires_grad_() for t in (cost, a, b)]
            expected = kd.sinkhorn(*own, epsilon=0.1, iterations=3)
            wanted = torch.autograd.grad(expected.sum(), own)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-5)
    finally:
        simt.set_order("ascending")


@pytest.mark.parametrize(
    "schedule", (("ascending",), ("descending",), ("shuffle", 7), ("warp_ahead",))
)
@pytest.mark.parametrize("order", ("rows", "columns"))
def test_groups_of_blocks_under_every_schedule(schedule, order):
    """Problems large enough (2^11 entries in the emulator) for a group of blocks each: ragged, one
    that stops early, one that is empty. The bits are those of any schedule."""
    reason = next(r for r in kd.backends() if (r.family, r.backend) == ("transport", "simt"))
    if not reason.available:
        pytest.skip(reason.why_not)
    from kdkernels.backends import simt

    generator = torch.Generator().manual_seed(3)
    cost = torch.rand(3, 41, 67, generator=generator, dtype=torch.float64)
    cost[0] *= 20.0  # converges slowly
    lengths = torch.tensor([[41, 33, 0], [67, 50, 9]])
    marginals = []
    for size, own in zip((41, 67), lengths, strict=True):
        mass = torch.rand(3, size, generator=generator, dtype=torch.float64) + 0.1
        mass = torch.where(torch.arange(size) < own[:, None], mass, 0.0)
        marginals.append(mass / mass.sum(-1, keepdim=True).clamp(min=0.1))
    options = {
        "epsilon": 0.5, "iterations": 3, "tolerance": 1e-3, "order": order, "return_plan": True,
        "student_lengths": lengths[0], "teacher_lengths": lengths[1],
    }  # fmt: skip

    def run(backend, dtype, **more):
        leaves = [t.to(dtype).requires_grad_() for t in (cost, *marginals)]
        with kd.use_backend(backend):
            value, plan = kd.sinkhorn(*leaves, **options, **more)
            grads = torch.autograd.grad(value.sum() + plan.square().sum(), leaves)
        return value, plan, *grads

    wanted = run("torch", torch.float64)
    simt.set_order(*schedule)
    try:
        got = run("simt", torch.float32)
        if schedule[0] == "shuffle":  # of other maths, but the same barriers
            implicit = run("simt", torch.float64, gradient="implicit")
    finally:
        simt.set_order("ascending")
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)
    assert all(torch.equal(x, y) for x, y in zip(got, run("simt", torch.float32), strict=True))
    if schedule[0] == "shuffle":
        again = run("simt", torch.float64, gradient="implicit")
        assert all(torch.equal(x, y) for x, y in zip(implicit, again, strict=True))


@pytest.mark.parametrize("name", ("cpu", "simt"))
def test_large_problems_take_the_other_launch(name):
    """More than 2^18 entries: blocks of rows on CPU, a group of blocks on CUDA."""
    reason = next(r for r in kd.backends() if (r.family, r.backend) == ("transport", name))
    if not reason.available:
        pytest.skip(reason.why_not)
    rows, columns = (530, 520) if name == "cpu" else (260, 1030)
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(1, rows, columns, generator=generator).requires_grad_()
    iterations = 4 if name == "cpu" else 2
    with kd.use_backend(name):
        value = kd.sinkhorn(cost, epsilon=0.05, iterations=iterations, order="columns")
        (grad,) = torch.autograd.grad(value.sum(), cost)
    own = cost.detach().double().requires_grad_()
    expected, _ = loop(
        own, torch.full((1, rows), 1 / rows, dtype=torch.float64),
        torch.full((1, columns), 1 / columns, dtype=torch.float64), 0.05, iterations, "columns",
    )  # fmt: skip
    (want,) = torch.autograd.grad(expected.sum(), own)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("isa", ("avx512", "avx2", "baseline"))
def test_every_instruction_set(isa):
    extension = pytest.importorskip("kdkernels._C")
    try:
        extension.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        cost, a, b = problem(2, 9, 37, dtype=torch.float32)
        value = kd.sinkhorn(cost, a, b, epsilon=0.05, iterations=4)
        grads = torch.autograd.grad(value.sum(), (cost, a, b))
        z = (torch.randn(2, 500) * 3).requires_grad_()
        t = torch.randn(2, 450) * 3
        loss = kd.sorted_transport(z, t)
        (grad_z,) = torch.autograd.grad(loss, z)
        half = kd.sorted_transport(z.detach().bfloat16(), t.bfloat16())
        with kd.use_backend("torch"):
            own = [x.detach().double().requires_grad_() for x in (cost, a, b, z)]
            expected = kd.sinkhorn(*own[:3], epsilon=0.05, iterations=4)
            wanted = torch.autograd.grad(expected.sum(), own[:3])
            loss64 = kd.sorted_transport(own[3], t.double())
            half64 = kd.sorted_transport(z.detach().bfloat16(), t.bfloat16())
            (want_z,) = torch.autograd.grad(loss64, own[3])
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        for grad, want in zip(grads, wanted, strict=True):
            assert float((grad - want).abs().max()) <= 1e-4 * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(half, half64, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grad_z.double(), want_z, rtol=1e-4, atol=1e-7)
    finally:
        extension.set_isa("")


def test_bits_do_not_depend_on_threads():
    cost = torch.rand(2, 520, 512, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(kd.sinkhorn(cost, epsilon=0.05, iterations=2, return_plan=True))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    finally:
        torch.set_num_threads(threads)


def test_threads_share_a_problem_from_two_blocks_on():
    """256 x 256 is two blocks: one less row is one, and both are right."""
    for rows in (255, 256, 257):
        cost = torch.rand(1, rows, 256, generator=torch.Generator().manual_seed(rows))
        value = kd.sinkhorn(cost, epsilon=0.05, iterations=3)
        with kd.use_backend("torch"):
            expected = kd.sinkhorn(cost.double(), epsilon=0.05, iterations=3)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_unrolled_gradient_keeps_vectors_only():
    """What the graph holds: the cost, which is the caller's, and T (N + M) numbers a problem."""
    batch, rows, columns, iterations = 2, 50, 40, 12
    cost = torch.rand(batch, rows, columns, requires_grad=True)
    kept = []

    def keep(tensor):
        if tensor.data_ptr() != cost.data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kd.sinkhorn(cost, epsilon=0.1, iterations=iterations).sum()
    vectors = batch * iterations * (rows + columns)
    assert vectors <= sum(kept) <= vectors + batch * (rows + columns + 1)


def test_spec_fields_are_those_of_the_kernels():
    extension = pytest.importorskip("kdkernels._C")
    assert SinkhornSpec._fields == extension.SINKHORN_SPEC_FIELDS


def test_gradcheck_functorch_and_opcheck():
    args = problem(1, 3, 4, seed=2)
    a, b = (t.detach() for t in args[1:])

    def f(cost):
        return kd.sinkhorn(cost, a, b, epsilon=0.3, iterations=3)

    assert torch.autograd.gradcheck(f, args[:1])
    grad = torch.func.grad(lambda c: f(c).sum())(args[0].detach())
    torch.testing.assert_close(grad, torch.autograd.grad(f(args[0]).sum(), args[0])[0])
    spec = list(SinkhornSpec(epsilon=0.3, iterations=3.0))
    torch.library.opcheck(
        torch.ops.kdkernels.sinkhorn.default,
        (args[0], args[1], args[2], None, None, spec, 3, True, True, True),
    )


@pytest.mark.parametrize("value, gradient", (("sharp", "unrolled"), ("regularized", "envelope")))
def test_compiles_whole(value, gradient):
    cost, a, b = problem(dtype=torch.float32)

    def f(cost):
        return kd.sinkhorn(
            cost, a.detach(), b.detach(), epsilon=0.2, iterations=3, value=value, gradient=gradient
        ).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    loss, expected = compiled(cost), f(cost)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, cost)[0], torch.autograd.grad(expected, cost)[0]
    )


def test_second_derivatives_and_forward_mode_are_refused_by_name():
    cost, a, b = problem(8, 3, 4)
    calls = {
        "kernels": lambda: kd.sinkhorn(cost, a, b, epsilon=0.3, iterations=3),
        "gemms": lambda: kd.sinkhorn(cost[0], a, b, epsilon=0.3, iterations=3),
    }
    for call in calls.values():
        (grad,) = torch.autograd.grad(call().sum(), cost, create_graph=True)
        with pytest.raises(NotImplementedError, match="sinkhorn has no second derivative"):
            (grad.square().sum() + call().sum()).backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(cost.detach(), torch.ones_like(cost))
        with pytest.raises(NotImplementedError, match="sinkhorn does not support forward-mode"):
            kd.sinkhorn(dual, epsilon=0.3, iterations=2)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda c: kd.sinkhorn(c, epsilon=0.3, iterations=2))(cost.detach())


def test_autocast_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator) + 3.0
    y = torch.randn(180, 32, generator=generator).requires_grad_()
    cost = torch.rand(6, 8, generator=generator).requires_grad_()
    a, b = (torch.randn(9, n, generator=generator).softmax(-1) for n in (6, 8))

    def run():
        values = [
            *(kd.transport(x, y, cost=cost, epsilon=2.0, iterations=2)
              for cost in ("sqeuclidean", "cosine", "dot_softmax")),
            kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=3).sum(),
            kd.sinkhorn_divergence(x, y, blur=0.5),
        ]  # fmt: skip
        return torch.stack(values)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run()
    assert torch.equal(mixed, plain)
    for got, want in zip(
        torch.autograd.grad(mixed.sum(), (y, cost)), torch.autograd.grad(plain.sum(), (y, cost)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want)
