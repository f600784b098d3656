"""The doors: torch.compile, torch.func, registered operators, checkpoint, autocast, GradScaler."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import kdkernels as kd

CALLS = [
    ("forward_kl", {}),
    ("jensen_shannon", {"beta": 0.3}),
    ("alpha_beta", {"alpha": 0.3, "beta": 0.6}),
    ((("forward_kl", 0.5), ("reverse_kl", 0.5)), {}),
]


def pair(device, *shape):
    return torch.randn(2, *shape, device=device).unbind()


def value_and_gradient(function, student, teacher):
    z = student.clone().requires_grad_()
    loss = function(z, teacher)
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


@pytest.mark.parametrize("kind, options", CALLS)
def test_fullgraph_compile_equals_eager(backend, kind, options):
    student, teacher = pair(backend.device, 6, 40)
    labels = torch.randint(0, 40, (6,), device=backend.device)
    labels[1] = -100

    def call(z, a):
        return (
            kd.divergence(
                z,
                a,
                kind,
                temperature=1.5,
                labels=labels,
                label_weight=0.2,
                temperature_squared=True,
                **options,
            )
            * 2.0
        )

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected = value_and_gradient(call, student, teacher)
    actual = value_and_gradient(compiled, student, teacher)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_compile_with_dynamic_shapes_does_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(z, a):
        return kd.divergence(z, a, "jensen_shannon", reduction="batchmean")

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    compiled_frames = []
    for rows, width in ((4, 30), (5, 31), (9, 64), (7, 100)):
        student, teacher = pair("cpu", 2, rows, width)
        expected = value_and_gradient(call, student, teacher)
        actual = value_and_gradient(compiled, student, teacher)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
        compiled_frames.append(counter.frame_count)
    assert compiled_frames == compiled_frames[:1] * 4


@pytest.mark.slow
def test_inductor_fullgraph():
    torch._dynamo.reset()
    student, teacher = pair("cpu", 4, 50)

    def call(z, a):
        return kd.divergence(z * 1.5, a, temperature=2.0)

    compiled = torch.compile(call, fullgraph=True)
    expected = value_and_gradient(call, student, teacher)
    torch.testing.assert_close(
        value_and_gradient(compiled, student, teacher), expected, rtol=1e-5, atol=1e-7
    )


def test_compile_with_tensor_parameters_and_gradients_to_them():
    torch._dynamo.reset()
    student, teacher = pair("cpu", 5, 20)

    def call(z, a, tau, weight):
        return kd.divergence(z, a, temperature=tau, weight=weight)

    def gradients(function):
        leaves = [
            student.clone().requires_grad_(),
            teacher.clone().requires_grad_(),
            torch.linspace(0.5, 2.0, 5).requires_grad_(),
            torch.linspace(0.1, 1.0, 5).requires_grad_(),
        ]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(call), rtol=1e-5, atol=1e-7)


def test_a_list_of_teachers_compiles_as_a_call_each():
    student = torch.randn(3, 9, requires_grad=True)
    teachers = [torch.randn(3, 9), torch.randn(3, 9)]

    def loss(z):
        return kd.divergence(z, teachers, teacher_weights=[0.5, 2.0])

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for run in (compiled, loss):
        student.grad = None
        value = run(student)
        value.backward()
        if run is compiled:
            expected, gradient = value.detach(), student.grad
    torch.testing.assert_close(value.detach(), expected)
    torch.testing.assert_close(student.grad, gradient)


def test_opcheck():
    student, teacher = pair("cpu", 3, 17)
    from kdkernels.backends.spec import DivergenceSpec

    spec = list(DivergenceSpec(forward_kl=1.0, label_weight=0.5))
    labels = torch.tensor([1, -100, 16])
    weight = torch.rand(3)
    for reduction in (0.0, 2.0):
        spec[DivergenceSpec._fields.index("reduction")] = reduction
        arguments = (
            student.clone().requires_grad_(),
            teacher.clone().requires_grad_(),
            labels,
            None,
            weight.clone().requires_grad_(),
            None,
            None,
            None,
            None,
            None,
            1,
            spec,
        )
        result = torch.library.opcheck(torch.ops.kdkernels.divergence_fwd.default, arguments)
        assert set(result.values()) == {"SUCCESS"}, result


def test_opcheck_of_the_backward_operator():
    from kdkernels.backends.spec import DivergenceSpec

    student, teacher = pair("cpu", 3, 17)
    spec = list(DivergenceSpec(forward_kl=1.0))
    rest = (None,) * 8
    _, stats = torch.ops.kdkernels.divergence_fwd.default(student, teacher, *rest, 1, spec)
    result = torch.library.opcheck(
        torch.ops.kdkernels.divergence_bwd.default,
        (student, teacher, *rest, stats, torch.tensor(2.0), 1, spec, True, True, True),
    )
    assert set(result.values()) == {"SUCCESS"}, result


def test_func_grad_equals_eager(backend):
    student, teacher = pair(backend.device, 4, 30)
    tau = torch.full((4,), 1.5, device=backend.device)
    weight = torch.rand(4, device=backend.device)

    def call(z, a, tau, weight):
        return kd.divergence(z, a, temperature=tau, weight=weight)

    got = torch.func.grad(call, argnums=(0, 1, 2, 3))(student, teacher, tau, weight)
    leaves = [t.clone().requires_grad_() for t in (student, teacher, tau, weight)]
    expected = torch.autograd.grad(call(*leaves), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_vmap_and_forward_mode_are_refused_by_name():
    student, teacher = pair("cpu", 4, 3, 30)
    with pytest.raises(NotImplementedError, match=r"kdkernels\.divergence.*vmap"):
        torch.func.vmap(kd.divergence)(student, teacher)
    with pytest.raises(NotImplementedError, match=r"kdkernels\.divergence.*forward-mode"):
        torch.func.jvp(lambda z: kd.divergence(z, teacher), (student,), (student,))
    with pytest.raises(NotImplementedError, match=r"kdkernels\.divergence.*second derivative"):
        torch.func.grad(lambda z: torch.func.grad(lambda y: kd.divergence(y, teacher))(z).sum())(
            student
        )


def test_checkpoint(backend):
    student, teacher = pair(backend.device, 4, 30)

    def call(z, a):
        return kd.divergence(torch.tanh(z), a)

    def checkpointed(z, a):
        return checkpoint(call, z, a, use_reentrant=False)

    torch.testing.assert_close(
        value_and_gradient(checkpointed, student, teacher),
        value_and_gradient(call, student, teacher),
    )


def test_autocast(backend):
    head = torch.nn.Linear(16, 50, device=backend.device)
    hidden = torch.randn(4, 16, device=backend.device)
    teacher = torch.randn(4, 50, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        logits = head(hidden)
        loss = kd.divergence(logits, teacher)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert bool(head.weight.grad.isfinite().all())


def test_float16_gradient_keeps_what_the_loss_scale_saves(backend):
    # 4096 columns and 64 rows under "mean": most gradient entries lie below float16's 6e-8.
    student, teacher = pair(backend.device, 64, 4096)
    student, teacher = (teacher + 0.1 * student).half(), teacher.half()
    scale = 2.0**14
    z = student.clone().requires_grad_()
    (kd.divergence(z, teacher) * scale).backward()
    exact = student.double().requires_grad_()
    with kd.use_backend("torch"):
        (kd.divergence(exact, teacher.double()) * scale).backward()
    error = (z.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-3  # rounding to 11 bits; 0.2 and more if rounded before scaling


def test_two_nodes_share_one_student(backend):
    student, teacher = pair(backend.device, 4, 30)
    z = student.clone().requires_grad_()
    (kd.divergence(z, teacher) + kd.divergence(z, teacher, "reverse_kl")).backward()
    y = student.clone().requires_grad_()
    kd.divergence(y, teacher, "jeffreys").backward()
    torch.testing.assert_close(z.grad, y.grad, rtol=1e-5, atol=1e-7)


def test_anomaly_mode_and_hooks_see_the_gradient(backend):
    student, teacher = pair(backend.device, 4, 30)
    seen = []
    z = student.clone().requires_grad_()
    z.register_hook(lambda g: seen.append(g.clone()))
    with torch.autograd.detect_anomaly(check_nan=True):
        kd.divergence(z, teacher).backward()
    assert torch.equal(seen[0], z.grad)
