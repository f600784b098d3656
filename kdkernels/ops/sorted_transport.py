"""Sorted transport under autograd: registered operators for torch.compile and torch.func, one node
for an eager scalar."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.registry import pick
from .common import (
    compute_dtype,
    empty,
    empty_like,
    functorch_active,
    refuse_jvp,
    refuse_vmap,
)
from .once import refuse_dual
from .registered import call, define, implement, library, once

define(
    "sorted_transport(Tensor student, Tensor teacher, Tensor? mask, Tensor? student_scale, "
    "Tensor? teacher_scale, Tensor? exclude_student, Tensor? exclude_teacher, "
    "float student_temperature, float teacher_temperature) -> (Tensor, Tensor)"
)
define(
    "sorted_transport_bwd(Tensor student, Tensor teacher, Tensor? mask, Tensor? student_scale, "
    "Tensor? teacher_scale, Tensor? exclude_student, Tensor? exclude_teacher, Tensor coefficient, "
    "float student_temperature, float teacher_temperature) -> Tensor"
)


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
        return call(torch.ops.kdkernels.sorted_transport_bwd.default, _sorted_bwd_op, *args)

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
    grad_student, grad_teacher, grad_cs, grad_ct = once("sorted_transport", grads, sources)
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
        return (*once("sorted_transport", grads, [ctx.saved_tensors[0], upstream]), *(None,) * 9)

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


implement("sorted_transport", _sorted_op, _sorted_fake)
implement("sorted_transport_bwd", _sorted_bwd_op, _sorted_bwd_fake)
torch.library.register_autograd(
    "kdkernels::sorted_transport", _sorted_autograd, setup_context=_sorted_setup, lib=library
)
