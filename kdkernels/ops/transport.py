"""Transport under autograd: registered operators for eager, torch.func and torch.compile alike.

`sinkhorn` returns everything a value is made of (linear cost, sums of the plan, the plan, the
potentials), each differentiable; the public function combines them with ordinary tensor operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.registry import pick
from ..backends.transport_spec import ENVELOPE, UNROLLED, SinkhornSpec
from .common import (
    compute_dtype,
    empty,
    empty_like,
    functorch_active,
    refuse_jvp,
    refuse_vmap,
)
from .once import refuse_dual, refuse_second

_library = torch.library.Library("kdkernels", "FRAGMENT")


class Solution(NamedTuple):
    """What a Sinkhorn run leaves. What was not asked for is an empty tensor."""

    linear: Tensor  # (B,): <P, C>
    rows: Tensor  # (B, N): P 1
    columns: Tensor  # (B, M): P' 1
    plan: Tensor  # (B, N, M)
    f: Tensor  # (B, N): log2 of the scaling over the marginal
    g: Tensor  # (B, M)
    f_history: Tensor  # (T or 1, B, N)
    g_history: Tensor
    done: Tensor  # (B,) int64


_library.define(
    "sinkhorn(Tensor cost, Tensor? a, Tensor? b, Tensor? student_lengths, Tensor? teacher_lengths, "
    "float[] spec, int history, bool linear, bool sums, bool plan) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sinkhorn_bwd(Tensor cost, Tensor? a, Tensor? b, Tensor? student_lengths, "
    "Tensor? teacher_lengths, Tensor f, Tensor g, Tensor done, Tensor? linear_bar, "
    "Tensor? rows_bar, Tensor? columns_bar, Tensor? plan_bar, Tensor? f_bar, Tensor? g_bar, "
    "float[] spec, bool need_cost) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sorted_transport(Tensor student, Tensor teacher, Tensor? mask, Tensor? student_scale, "
    "Tensor? teacher_scale, Tensor? exclude_student, Tensor? exclude_teacher, "
    "float student_temperature, float teacher_temperature) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sorted_transport_bwd(Tensor student, Tensor teacher, Tensor? mask, Tensor? student_scale, "
    "Tensor? teacher_scale, Tensor? exclude_student, Tensor? exclude_teacher, Tensor coefficient, "
    "float student_temperature, float teacher_temperature) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# Sinkhorn. --------------------------------------------------------------------------------------


def _workspace(backend, cost: Tensor) -> Tensor:
    batch, rows, columns = cost.shape
    size = backend.sinkhorn_workspace(rows, columns, cost.device.type == "cuda")
    return empty((batch, size), cost.dtype, cost.device)


def _last(history: Tensor, done: Tensor) -> Tensor:
    """The last slot that was written of (H, B, X), as a tensor of its own."""
    if history.shape[0] == 1:
        return history[0].clone()
    index = (done.clamp(min=1) - 1).view(1, -1, 1).expand(1, -1, history.shape[2])
    return history.gather(0, index)[0]


def _sinkhorn(cost, a, b, student_lengths, teacher_lengths, spec, history, linear, sums, plan):
    backend = pick("transport", cost.device.type)
    batch, rows, columns = cost.shape
    dtype, device = cost.dtype, cost.device
    f = empty((history, batch, rows), dtype, device)
    g = empty((history, batch, columns), dtype, device)
    done = torch.empty((batch,), dtype=torch.int64, device=device)
    out_linear = empty((batch,), dtype, device) if linear else None
    out_rows = empty((batch, rows), dtype, device) if sums else None
    out_columns = empty((batch, columns), dtype, device) if sums else None
    out_plan = empty((batch, rows, columns), dtype, device) if plan else None
    backend.sinkhorn_fwd(
        cost,
        a,
        b,
        student_lengths,
        teacher_lengths,
        f,
        g,
        done,
        out_linear,
        out_rows,
        out_columns,
        out_plan,
        _workspace(backend, cost),
        SinkhornSpec(*spec),
    )
    nothing = [
        cost.new_empty((0,)) if x is None else x for x in (out_linear, out_rows, out_columns)
    ]
    full = cost.new_empty((0,)) if out_plan is None else out_plan
    return (*nothing, full, _last(f, done), _last(g, done), f, g, done)


def _sinkhorn_fake(cost, a, b, student_lengths, teacher_lengths, spec, history, linear, sums, plan):
    batch, rows, columns = cost.shape
    new = cost.new_empty
    return (
        new((batch,) if linear else (0,)),
        new((batch, rows) if sums else (0,)),
        new((batch, columns) if sums else (0,)),
        new((batch, rows, columns) if plan else (0,)),
        new((batch, rows)),
        new((batch, columns)),
        new((history, batch, rows)),
        new((history, batch, columns)),
        new((batch,), dtype=torch.int64),
    )


def _sinkhorn_bwd(
    cost, a, b, student_lengths, teacher_lengths, f, g, done, linear_bar, rows_bar, columns_bar,
    plan_bar, f_bar, g_bar, spec, need_cost,
):  # fmt: skip
    backend = pick("transport", cost.device.type)
    batch, rows, columns = cost.shape
    grad_cost = empty((batch, rows, columns), cost.dtype, cost.device) if need_cost else None
    grad_a = empty((batch, rows), cost.dtype, cost.device)
    grad_b = empty((batch, columns), cost.dtype, cost.device)
    bars = [
        None if x is None else x.contiguous()
        for x in (linear_bar, rows_bar, columns_bar, plan_bar, f_bar, g_bar)
    ]
    backend.sinkhorn_bwd(
        cost,
        a,
        b,
        student_lengths,
        teacher_lengths,
        f,
        g,
        done,
        *bars,
        grad_cost,
        grad_a,
        grad_b,
        _workspace(backend, cost),
        SinkhornSpec(*spec),
    )
    return (cost.new_empty((0,)) if grad_cost is None else grad_cost), grad_a, grad_b


def _sinkhorn_bwd_fake(
    cost, a, b, student_lengths, teacher_lengths, f, g, done, linear_bar, rows_bar, columns_bar,
    plan_bar, f_bar, g_bar, spec, need_cost,
):  # fmt: skip
    batch, rows, columns = cost.shape
    return (
        cost.new_empty((batch, rows, columns) if need_cost else (0,)),
        cost.new_empty((batch, rows)),
        cost.new_empty((batch, columns)),
    )


class _Opaque(torch.autograd.Function):
    """fn(*args) without a derivative, as torch.func wants it: tensors come unwrapped."""

    vmap = refuse_vmap("transport")
    jvp = refuse_jvp("transport")

    @staticmethod
    def forward(fn, *args):
        return fn(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("kdkernels: transport has no second derivative")


def _call(op, fn, *args):
    """The operator, or under torch.func the function behind it."""
    return _Opaque.apply(fn, *args) if functorch_active() else op(*args)


def _once(name: str, grads: list[Tensor | None], sources: list[Tensor]) -> list[Tensor | None]:
    """The gradients; under create_graph=True such that differentiating them raises."""
    if not torch.is_grad_enabled() or functorch_active():
        return grads
    return [refuse_second(name, grad, *sources) for grad in grads]


def _sinkhorn_setup(ctx, inputs, output):
    cost, a, b, student_lengths, teacher_lengths, spec, _, linear, sums, plan = inputs
    f, g, done = output[6:]
    ctx.mark_non_differentiable(f, g, done)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cost, a, b, student_lengths, teacher_lengths, f, g, done)
    ctx.spec = spec
    ctx.made = (linear, sums, sums, plan, True, True)


def _sinkhorn_autograd(ctx, *upstream):
    cost, a, b, student_lengths, teacher_lengths, f, g, done = ctx.saved_tensors
    bars = [bar if made else None for bar, made in zip(upstream[:6], ctx.made, strict=True)]
    if all(bar is None for bar in bars):
        return (None,) * 10
    spec = SinkhornSpec(*ctx.spec)
    if f.shape[0] != int(spec.iterations) and spec.mode == UNROLLED:
        raise RuntimeError("kdkernels.sinkhorn: the iterations were not kept for this backward")
    if spec.mode == ENVELOPE:
        bars = [bars[0], None, None, None, None, None]
        if bars[0] is None:
            return (None,) * 10
    need = ctx.needs_input_grad[:3]
    made = _call(
        torch.ops.kdkernels.sinkhorn_bwd.default, _sinkhorn_bwd,
        cost, a, b, student_lengths, teacher_lengths, f, g, done, *bars, list(spec), need[0],
    )  # fmt: skip
    grads = [grad if wanted else None for grad, wanted in zip(made, need, strict=True)]
    sources = [x for x in (cost, a, b, *bars) if x is not None]
    return (*_once("sinkhorn", grads, sources), *(None,) * 7)


class _FunctorchSinkhorn(torch.autograd.Function):
    """The torch.func door."""

    vmap = refuse_vmap("sinkhorn")
    jvp = refuse_jvp("sinkhorn")
    forward = staticmethod(_sinkhorn)
    setup_context = staticmethod(_sinkhorn_setup)
    backward = staticmethod(_sinkhorn_autograd)


def sinkhorn(
    cost: Tensor,  # (B, N, M) float32 or float64, last stride 1
    a: Tensor | None,  # (B, N)
    b: Tensor | None,  # (B, M)
    student_lengths: Tensor | None,  # (B,) int64
    teacher_lengths: Tensor | None,
    spec: SinkhornSpec,
    *,
    keep: bool,
    linear: bool,
    sums: bool,
    plan: bool,
) -> Solution:
    """One run over a batch of problems. `keep`: all iterations are stored, for the unrolled
    backward; otherwise only the last."""
    refuse_dual("sinkhorn", cost, a, b)
    history = int(spec.iterations) if keep else 1
    run = _FunctorchSinkhorn.apply if functorch_active() else torch.ops.kdkernels.sinkhorn.default
    return Solution(
        *run(cost, a, b, student_lengths, teacher_lengths, list(spec), history, linear, sums, plan)
    )


# Sorted transport. ------------------------------------------------------------------------------


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


def _run_sorted(
    student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
    coefficient, student_temperature, teacher_temperature, want_grad,
):  # fmt: skip
    backend = pick("transport", student.device.type)
    z, a = _rows(student), _rows(teacher)
    dtype, device = compute_dtype(z), z.device
    rows = z.shape[0]
    on_cuda = device.type == "cuda"
    size = backend.sorted_workspace(z.shape[1], a.shape[1], dtype == torch.float64, on_cuda)
    # Rows in work at a time: two blocks a multiprocessor in at most 512 MiB, or the threads.
    most = min(264, max(32, (1 << 27) // max(size, 1))) if on_cuda else torch.get_num_threads()
    slots = max(1, min(rows, most))
    workspace = torch.empty((slots, size), dtype=torch.int32, device=device)
    value = empty((rows,), dtype, device)
    slopes = empty((rows, 2), dtype, device)
    grad = empty_like(z) if want_grad else None
    backend.sorted_transport(
        z,
        a,
        mask,
        student_scale,
        teacher_scale,
        exclude_student,
        exclude_teacher,
        coefficient,
        value,
        slopes,
        grad,
        workspace,
        student_temperature,
        teacher_temperature,
    )
    return value, slopes, grad


def _sorted_op(
    student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
    student_temperature, teacher_temperature,
):  # fmt: skip
    return _run_sorted(
        student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
        None, student_temperature, teacher_temperature, False,
    )[:2]  # fmt: skip


def _sorted_fake(student, *_):
    rows = student.shape[0]
    dtype = compute_dtype(student)
    return student.new_empty((rows,), dtype=dtype), student.new_empty((rows, 2), dtype=dtype)


def _sorted_bwd_op(
    student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
    coefficient, student_temperature, teacher_temperature,
):  # fmt: skip
    return _run_sorted(
        student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
        coefficient.contiguous(), student_temperature, teacher_temperature, True,
    )[2]  # fmt: skip


def _sorted_bwd_fake(student, *_):
    return student.new_empty(student.shape)


def _sorted_setup(ctx, inputs, output):
    *tensors, ctx.student_temperature, ctx.teacher_temperature = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _sorted_autograd(ctx, upstream, _):
    student, teacher, mask, cs, ct, ex_s, ex_t, slopes = ctx.saved_tensors
    need = ctx.needs_input_grad

    def backward(*args):
        return _call(torch.ops.kdkernels.sorted_transport_bwd.default, _sorted_bwd_op, *args)

    tau_s, tau_t = ctx.student_temperature, ctx.teacher_temperature
    grad_student = grad_teacher = None
    if need[0]:
        grad_student = backward(student, teacher, mask, cs, ct, ex_s, ex_t, upstream, tau_s, tau_t)
    if need[1]:  # the distance is symmetric
        grad_teacher = backward(teacher, student, mask, ct, cs, ex_t, ex_s, upstream, tau_t, tau_s)
    grads = [
        grad_student,
        grad_teacher,
        upstream * slopes[:, 0] if need[3] else None,
        upstream * slopes[:, 1] if need[4] else None,
    ]
    sources = [x for x in (student, teacher, cs, ct, upstream) if x is not None]
    grad_student, grad_teacher, grad_cs, grad_ct = _once("sorted_transport", grads, sources)
    return (grad_student, grad_teacher, None, grad_cs, grad_ct, None, None, None, None)


class _FunctorchSorted(torch.autograd.Function):
    """The torch.func door."""

    vmap = refuse_vmap("sorted_transport")
    jvp = refuse_jvp("sorted_transport")
    forward = staticmethod(_sorted_op)
    setup_context = staticmethod(_sorted_setup)
    backward = staticmethod(_sorted_autograd)


class _Sorted(torch.autograd.Function):
    """The eager door of a scalar reduction: forward also makes the gradient, times what the
    reduction will multiply each row by, so that the logits are sorted once."""

    @staticmethod
    def forward(ctx, student, teacher, mask, cs, ct, ex_s, ex_t, coefficient, tau_s, tau_t):
        value, slopes, grad = _run_sorted(
            student, teacher, mask, cs, ct, ex_s, ex_t, coefficient, tau_s, tau_t, True
        )
        ctx.prepared = grad
        ctx.arguments = (mask, ex_s, ex_t, tau_s, tau_t)
        ctx.save_for_backward(student, teacher, cs, ct, coefficient)
        ctx.mark_non_differentiable(slopes)
        return (value * coefficient).sum()

    @staticmethod
    def backward(ctx, upstream):
        grads = [_Sorted._gradient(ctx, upstream)]
        return (*_once("sorted_transport", grads, [ctx.saved_tensors[0], upstream]), *(None,) * 9)

    @staticmethod
    @torch.no_grad()
    def _gradient(ctx, upstream):
        student, teacher, cs, ct, coefficient = ctx.saved_tensors
        grad, ctx.prepared = ctx.prepared, None
        if grad is None:  # a second backward of a retained graph
            mask, ex_s, ex_t, tau_s, tau_t = ctx.arguments
            grad = _run_sorted(
                student, teacher, mask, cs, ct, ex_s, ex_t, coefficient * upstream, tau_s, tau_t,
                True,
            )[2]  # fmt: skip
        else:
            grad = _scaled(grad, upstream)
        return grad


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """grad * upstream in place; nothing is touched where upstream is 1 and may be looked at."""
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return grad
    return (
        grad.mul_(upstream.to(grad.dtype))
        if grad.dtype.itemsize > 2
        else (grad.copy_(grad.float() * upstream))
    )


def sorted_transport(
    student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
    student_temperature: float, teacher_temperature: float,
) -> Tensor:  # fmt: skip
    """Row values (N,) of logits (N, V) and (N, V')."""
    refuse_dual("sorted_transport", student, teacher, student_scale, teacher_scale)
    op = torch.ops.kdkernels.sorted_transport.default
    return (_FunctorchSorted.apply if functorch_active() else op)(
        student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
        student_temperature, teacher_temperature,
    )[0]  # fmt: skip


def sorted_transport_total(
    student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
    coefficient: Tensor, student_temperature: float, teacher_temperature: float,
) -> Tensor:  # fmt: skip
    """sum coefficient_n value_n, with gradient to the student alone; eager only."""
    return _Sorted.apply(
        student, teacher, mask, student_scale, teacher_scale, exclude_student, exclude_teacher,
        coefficient, student_temperature, teacher_temperature,
    )  # fmt: skip


for _key in ("CPU", "CUDA"):
    _library.impl("sinkhorn", _sinkhorn, _key)
    _library.impl("sinkhorn_bwd", _sinkhorn_bwd, _key)
    _library.impl("sorted_transport", _sorted_op, _key)
    _library.impl("sorted_transport_bwd", _sorted_bwd_op, _key)
for _name, _fake in (
    ("sinkhorn", _sinkhorn_fake),
    ("sinkhorn_bwd", _sinkhorn_bwd_fake),
    ("sorted_transport", _sorted_fake),
    ("sorted_transport_bwd", _sorted_bwd_fake),
):
    torch.library.register_fake(f"kdkernels::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "kdkernels::sinkhorn", _sinkhorn_autograd, setup_context=_sinkhorn_setup, lib=_library
)
torch.library.register_autograd(
    "kdkernels::sorted_transport", _sorted_autograd, setup_context=_sorted_setup, lib=_library
)
