"""The sum of several divergences of one student under autograd: one pass over the student, one
gradient, whatever the number of teachers. Eager calls only; who cannot take this door adds plain
calls (functional/summed.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import spec as S
from ..backends.registry import pick
from ..backends.spec import DivergenceSpec
from .common import compute_dtype, empty, empty_like, functorch_active
from .divergence import _rows, _weight_gradient
from .once import refuse_second_of

# Columns up to which a row's gradients are gathered: beyond, a row lies in no cache, and every
# thread would keep one.
WIDEST = 1_000_000


class Part(NamedTuple):
    """One divergence of the sum; none of its tensors carries a gradient. Per-row tensors are
    (N,)."""

    teacher: Tensor | None  # (N, V')
    tau_s: Tensor | None
    tau_t: Tensor | None
    first: Tensor | None
    second: Tensor | None
    spec: DivergenceSpec


class Common(NamedTuple):
    """What the parts have in common."""

    parts: tuple[Part, ...]
    labels: Tensor | None  # (N,) int64
    mask: Tensor | None  # (N,) bool
    num_items: Tensor | None  # () compute dtype
    inplace: bool


def most_parts(student: Tensor) -> int:
    """Divergences that one call may add up on the student's device; 0: no such call here and
    now."""
    if torch.compiler.is_compiling() or functorch_active():
        return 0
    if student.dim() < 1 or student.shape[-1] > WIDEST:  # no logits: a plain call says so
        return 0
    return getattr(pick("divergence", student.device.type), "DIVERGENCE_SUM_PARTS", 0)


def _with_teachers(common: Common, teachers: list[Tensor | None]) -> Common:
    parts = (part._replace(teacher=t) for part, t in zip(common.parts, teachers))
    return common._replace(parts=tuple(parts))


def _described(common: Common, weights, values, stats) -> list[tuple]:
    """The parts as a backend takes them."""
    return [
        (p.teacher, w, p.tau_s, p.tau_t, p.first, p.second, v, s, p.spec)
        for p, w, v, s in zip(common.parts, weights, values, stats)
    ]


def _forward(student: Tensor, common: Common, weights, need_student: bool):
    """(values (K,) or (K, N), statistics (K, N, STATS), the student's gradient or None)."""
    z = _rows(student)
    count, rows = len(common.parts), z.shape[0]
    dtype = compute_dtype(student)
    by_row = common.parts[0].spec.reduction == S.NONE
    values = empty((count, rows) if by_row else (count,), dtype, z.device)
    stats = empty((count, rows, S.STATS), dtype, z.device)
    gradient = None
    if need_student:
        gradient = z if common.inplace else empty_like(z)
    pick("divergence", z.device.type).divergence_sum_fwd(
        z,
        _described(common, weights, values, stats),
        common.labels,
        common.mask,
        common.num_items,
        gradient,
    )
    return values, stats, gradient


def _backward(student: Tensor, common: Common, stats: Tensor, upstream: Tensor, inplace: bool):
    """The student's gradient from the logits and the statistics, for `upstream` () or (N,)."""
    z = _rows(student)
    gradient = z if inplace else empty_like(z)
    nothing = [None] * len(common.parts)
    upstream = upstream.to(stats.dtype).contiguous()
    pick("divergence", z.device.type).divergence_sum_bwd(
        z,
        _described(common, nothing, nothing, stats),
        common.labels,
        common.mask,
        upstream if upstream.dim() == 0 else upstream.view(-1),
        gradient,
    )
    return gradient


class _DivergenceSum(torch.autograd.Function):
    """The door of ops/divergence.py for several parts. `weights`: (N,) or None, one a part."""

    @staticmethod
    def forward(ctx, student, common, *weights):
        need_student, _, *need_weights = ctx.needs_input_grad
        # A float16 gradient waits for GradScaler's upstream, as in ops/divergence.py.
        by_row = common.parts[0].spec.reduction == S.NONE
        ahead = need_student and not by_row and student.dtype != torch.float16
        values, stats, gradient = _forward(student, common, weights, ahead)
        ctx.common = _with_teachers(common, [None] * len(common.parts))  # they are saved below
        ctx.shape = student.shape
        ctx.prepared = gradient
        ctx.values = values if any(need_weights) else None
        ctx.overwritten = ahead and common.inplace
        keep = any(need_weights) or not ctx.overwritten
        if ctx.overwritten:
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(
            None if ctx.overwritten else student,
            stats if keep else None,
            *(None if ctx.overwritten else part.teacher for part in common.parts),
        )
        return values.sum(0)

    @staticmethod
    def backward(ctx, upstream):
        if not torch.is_grad_enabled():
            return _DivergenceSum._gradients(ctx, upstream)
        with torch.no_grad():  # create_graph=True, see ops/divergence.py
            gradients = _DivergenceSum._gradients(ctx, upstream)
        return tuple(None if g is None else refuse_second_of(g, "divergence") for g in gradients)

    @staticmethod
    def _gradients(ctx, upstream):
        need_student, _, *need_weights = ctx.needs_input_grad
        gradient, ctx.prepared = ctx.prepared, None
        if need_student and gradient is None and ctx.overwritten:
            raise RuntimeError(
                "kdkernels.divergence(inplace=True): the logits were overwritten by their "
                "gradient, so backward can run once only; use inplace=False with retain_graph=True"
            )
        student, stats, *teachers = ctx.saved_tensors
        common = _with_teachers(ctx.common, teachers)
        if gradient is not None:
            pick("divergence", upstream.device.type).scale(gradient, upstream)
        elif need_student:
            gradient = _backward(student, common, stats, upstream, common.inplace)
            if common.inplace:
                torch.autograd.graph.increment_version(student)
                ctx.overwritten = True
        weights = [None] * len(common.parts)
        for k, needed in enumerate(need_weights):
            if needed:
                rows = upstream.reshape(-1) if upstream.dim() else upstream
                weights[k] = _weight_gradient(stats[k], ctx.values[k], rows, common.parts[k].spec)
        if gradient is not None and gradient.shape != ctx.shape:
            gradient = gradient.view(ctx.shape)
        return gradient, None, *weights


def divergence_sum(student: Tensor, common: Common, weights: list[Tensor | None]) -> Tensor:
    """The sum of the parts' losses: 0-d, or (N,) for reduction "none". student [..., V]; weights
    (N,) in the compute dtype, one a part with its coefficient in it, with gradient."""
    teachers = [None if p.teacher is None else _rows(p.teacher) for p in common.parts]
    common = _with_teachers(common, teachers)
    leaves = (student, *weights)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in leaves):
        return _forward(student, common, weights, False)[0].sum(0)
    return _DivergenceSum.apply(student, common, *weights)
