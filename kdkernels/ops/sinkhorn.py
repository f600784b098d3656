"""Sinkhorn under autograd.

A run gives everything a value is made of (linear cost, sums of the plan, the plan, the potentials),
each differentiable; the public function combines them with ordinary tensor operations. Three doors
lead to one backend function: eager calls take an old-style autograd.Function, one node that makes
only what was asked for; torch.func takes its `setup_context` twin; torch.compile the registered
operators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.registry import pick
from ..backends.transport_spec import ENVELOPE, UNROLLED, SinkhornSpec
from .common import empty, functorch_active, refuse_jvp, refuse_vmap
from .once import refuse_dual
from .registered import call, define, implement, library, once


class Solution(NamedTuple):
    """What a Sinkhorn run leaves. What was not asked for is None or an empty tensor."""

    linear: Tensor | None  # (B,): <P, C>
    rows: Tensor | None  # (B, N): P 1
    columns: Tensor | None  # (B, M): P' 1
    plan: Tensor | None  # (B, N, M)
    f: Tensor | None  # (B, N): log2 of the scaling over the marginal
    g: Tensor | None  # (B, M)


class Wanted(NamedTuple):
    """Which of them a caller asks for."""

    linear: bool = False
    sums: bool = False
    plan: bool = False
    potentials: bool = False


define(
    "sinkhorn(Tensor cost, Tensor? a, Tensor? b, Tensor? student_lengths, Tensor? teacher_lengths, "
    "float[] spec, int history, bool linear, bool sums, bool plan) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
define(
    "sinkhorn_bwd(Tensor cost, Tensor? a, Tensor? b, Tensor? student_lengths, "
    "Tensor? teacher_lengths, Tensor f, Tensor g, Tensor done, Tensor? linear_bar, "
    "Tensor? rows_bar, Tensor? columns_bar, Tensor? plan_bar, Tensor? f_bar, Tensor? g_bar, "
    "float[] spec, bool need_cost) -> (Tensor, Tensor, Tensor)"
)


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


def _run(cost, a, b, student_lengths, teacher_lengths, spec: SinkhornSpec, history: int, wanted):
    """(linear, rows, columns, plan, f history, g history, done)."""
    backend = pick("transport", cost.device.type)
    batch, rows, columns = cost.shape
    dtype, device = cost.dtype, cost.device
    f = empty((history, batch, rows), dtype, device)
    g = empty((history, batch, columns), dtype, device)
    done = torch.empty((batch,), dtype=torch.int64, device=device)
    out_linear = empty((batch,), dtype, device) if wanted.linear else None
    out_rows = empty((batch, rows), dtype, device) if wanted.sums else None
    out_columns = empty((batch, columns), dtype, device) if wanted.sums else None
    out_plan = empty((batch, rows, columns), dtype, device) if wanted.plan else None
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
        spec,
    )
    return out_linear, out_rows, out_columns, out_plan, f, g, done


def _walk_back(cost, a, b, student_lengths, teacher_lengths, f, g, done, bars, spec, need_cost):
    """(cost gradient or None, a's, b's) from the adjoints of the six outputs, each or None."""
    backend = pick("transport", cost.device.type)
    batch, rows, columns = cost.shape
    grad_cost = empty((batch, rows, columns), cost.dtype, cost.device) if need_cost else None
    grad_a = empty((batch, rows), cost.dtype, cost.device)
    grad_b = empty((batch, columns), cost.dtype, cost.device)
    backend.sinkhorn_bwd(
        cost,
        a,
        b,
        student_lengths,
        teacher_lengths,
        f,
        g,
        done,
        *[None if x is None else x.contiguous() for x in bars],
        grad_cost,
        grad_a,
        grad_b,
        _workspace(backend, cost),
        spec,
    )
    return grad_cost, grad_a, grad_b


def _bars_of(spec: SinkhornSpec, bars: list[Tensor | None], kept: int) -> list[Tensor | None]:
    """The adjoints that this mode differentiates."""
    if kept != int(spec.iterations) and spec.mode == UNROLLED:
        raise RuntimeError("kdkernels.sinkhorn: the iterations were not kept for this backward")
    return [bars[0], None, None, None, None, None] if spec.mode == ENVELOPE else bars


# The eager door. --------------------------------------------------------------------------------


class _Sinkhorn(torch.autograd.Function):
    """One node; outputs that were not asked for are None."""

    @staticmethod
    def forward(ctx, cost, a, b, student_lengths, teacher_lengths, spec, history, wanted):
        *outputs, f, g, done = _run(
            cost, a, b, student_lengths, teacher_lengths, spec, history, wanted
        )
        ctx.save_for_backward(cost, a, b, student_lengths, teacher_lengths, f, g, done)
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        if wanted.potentials:
            return (*outputs, _last(f, done), _last(g, done))
        return (*outputs, None, None)

    @staticmethod
    def backward(ctx, *upstream):
        if not torch.is_grad_enabled():
            return _Sinkhorn._gradients(ctx, upstream)
        with torch.no_grad():
            grads = _Sinkhorn._gradients(ctx, upstream)
        sources = [x for x in (*ctx.saved_tensors[:3], *upstream) if x is not None]
        return tuple(once("sinkhorn", grads, sources))

    @staticmethod
    def _gradients(ctx, upstream):
        cost, a, b, student_lengths, teacher_lengths, f, g, done = ctx.saved_tensors
        bars = _bars_of(ctx.spec, list(upstream), f.shape[0])
        if all(bar is None for bar in bars):
            return (None,) * 8
        need = ctx.needs_input_grad
        grad_cost, grad_a, grad_b = _walk_back(
            cost, a, b, student_lengths, teacher_lengths, f, g, done, bars, ctx.spec, need[0]
        )
        return (
            grad_cost,
            grad_a if need[1] else None,
            grad_b if need[2] else None,
            *(None,) * 5,
        )


# The doors of torch.compile and torch.func. -----------------------------------------------------


def _sinkhorn(cost, a, b, student_lengths, teacher_lengths, spec, history, linear, sums, plan):
    *outputs, f, g, done = _run(
        cost, a, b, student_lengths, teacher_lengths, SinkhornSpec(*spec), history,
        Wanted(linear, sums, plan),
    )  # fmt: skip
    made = [cost.new_empty((0,)) if x is None else x for x in outputs]
    return (*made, _last(f, done), _last(g, done), f, g, done)


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
    bars = (linear_bar, rows_bar, columns_bar, plan_bar, f_bar, g_bar)
    grad_cost, grad_a, grad_b = _walk_back(
        cost, a, b, student_lengths, teacher_lengths, f, g, done, bars, SinkhornSpec(*spec),
        need_cost,
    )  # fmt: skip
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
    bars = _bars_of(spec, bars, f.shape[0])
    if all(bar is None for bar in bars):
        return (None,) * 10
    need = ctx.needs_input_grad[:3]
    made = call(
        torch.ops.kdkernels.sinkhorn_bwd.default, _sinkhorn_bwd,
        cost, a, b, student_lengths, teacher_lengths, f, g, done, *bars, list(spec), need[0],
    )  # fmt: skip
    grads = [grad if wanted else None for grad, wanted in zip(made, need, strict=True)]
    sources = [x for x in (cost, a, b, *bars) if x is not None]
    return (*once("sinkhorn", grads, sources), *(None,) * 7)


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
    wanted: Wanted,
    differentiable: bool = True,
) -> Solution:
    """One run over a batch of problems. `keep`: all iterations are stored, for the unrolled
    backward; otherwise only the last. `differentiable`: whether any input requires grad."""
    problem = (cost, a, b, student_lengths, teacher_lengths)
    history = int(spec.iterations) if keep else 1
    if torch.compiler.is_compiling() or functorch_active():
        refuse_dual("sinkhorn", cost, a, b)
        door = _FunctorchSinkhorn.apply if functorch_active() else None
        run = door or torch.ops.kdkernels.sinkhorn.default
        return Solution(*run(*problem, list(spec), history, *wanted[:3])[:6])
    if torch.autograd.forward_ad._current_level >= 0:
        refuse_dual("sinkhorn", cost, a, b)
    if differentiable:
        return Solution(*_Sinkhorn.apply(*problem, spec, history, wanted))
    *outputs, f, g, done = _run(*problem, spec, history, wanted)
    if wanted.potentials:
        return Solution(*outputs, _last(f, done), _last(g, done))
    return Solution(*outputs, None, None)


implement("sinkhorn", _sinkhorn, _sinkhorn_fake)
implement("sinkhorn_bwd", _sinkhorn_bwd, _sinkhorn_bwd_fake)
torch.library.register_autograd(
    "kdkernels::sinkhorn", _sinkhorn_autograd, setup_context=_sinkhorn_setup, lib=library
)
