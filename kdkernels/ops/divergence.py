"""divergence under autograd.

Three doors lead to one backend function. Eager calls take an old-style autograd.Function: one node,
whose forward also reduces and already makes the gradient for upstream 1. An active torch.func
transform takes its `setup_context` twin. Under torch.compile the registered operators are called;
their backward recomputes from the saved statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import spec as S
from ..backends.registry import pick
from ..backends.spec import DivergenceSpec
from .common import compute_dtype, empty, empty_like, functorch_active, refuse_jvp, refuse_vmap
from .once import refuse_second_of


class Rest(NamedTuple):
    """Arguments of a call that never carry a gradient. Per-row tensors are (N,), contiguous."""

    labels: Tensor | None  # (N,) int64
    mask: Tensor | None  # (N,) bool
    first: Tensor | None  # (N,) compute dtype: beta or alpha
    second: Tensor | None  # (N,)
    num_items: Tensor | None  # () compute dtype
    spec: DivergenceSpec
    inplace: bool
    return_stats: bool


def _rows(tensor: Tensor) -> Tensor:
    """[..., V] as (N, V) with a contiguous last dimension; a copy only where there is no view."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(-1, tensor.shape[-1])
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        tensor = tensor.contiguous()
    return tensor


def _forward(student, teacher, weight, tau_s, tau_t, rest, need_student, need_teacher, need_tau):
    """Run the backend once: (value, stats, gradients for upstream 1 or None)."""
    device = student.device
    z = student if student.dim() == 2 and student.is_contiguous() else _rows(student)
    a = teacher
    if a is not None and not (a.dim() == 2 and a.is_contiguous()):
        a = _rows(a)
    dtype = compute_dtype(student)
    rows = z.shape[0]
    value = empty((rows,) if rest.spec.reduction == S.NONE else (), dtype, device)
    stats = empty((rows, S.STATS), dtype, device)
    grad_student = grad_teacher = grad_tau = None
    if need_student:
        grad_student = z if rest.inplace else empty_like(z)
    if need_teacher:
        grad_teacher = empty_like(a)
    if need_tau:
        grad_tau = empty((rows, 2), dtype, device)
    pick("divergence", device.type).divergence_fwd(
        z,
        a,
        rest.labels,
        rest.mask,
        weight,
        tau_s,
        tau_t,
        rest.first,
        rest.second,
        rest.num_items,
        value,
        stats,
        grad_student,
        grad_teacher,
        grad_tau,
        rest.spec,
    )
    return value, stats, grad_student, grad_teacher, grad_tau


def _backward(
    student,
    teacher,
    tau_s,
    tau_t,
    rest,
    stats,
    upstream,
    need_student,
    need_teacher,
    need_tau,
    inplace=False,
):
    """Gradients from the logits and the saved statistics, for `upstream` () or (N,)."""
    backend = pick("divergence", student.device.type)
    z = _rows(student)
    a = None if teacher is None else _rows(teacher)
    grad_student = (z if inplace else empty_like(z)) if need_student else None
    grad_teacher = empty_like(a) if need_teacher else None
    grad_tau = empty((z.shape[0], 2), stats.dtype, z.device) if need_tau else None
    upstream = upstream.to(stats.dtype).contiguous()
    backend.divergence_bwd(
        z,
        a,
        rest.labels,
        rest.mask,
        tau_s,
        tau_t,
        rest.first,
        rest.second,
        stats,
        upstream if upstream.dim() == 0 else upstream.view(-1),
        grad_student,
        grad_teacher,
        grad_tau,
        rest.spec,
    )
    return grad_student, grad_teacher, grad_tau


def _weight_gradient(
    stats: Tensor, value: Tensor, upstream: Tensor, spec: DivergenceSpec
) -> Tensor:
    """d loss / d weight (N,): unit x row value; less the mean if weights are the divisor."""
    rows = stats[:, S.VALUE]
    unit = stats[:, S.UNIT]
    if spec.normalize_weights and spec.reduction == S.MEAN:
        rows = torch.where(unit != 0, rows - value, rows)
    return upstream * torch.where(unit == 0, 0.0, unit * rows)


def _tau_gradients(grad_tau: Tensor | None, need_s: bool, need_t: bool):
    if grad_tau is None:
        return None, None
    return (grad_tau[:, 0] if need_s else None), (grad_tau[:, 1] if need_t else None)


class _Divergence(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx, student, teacher, weight, tau_s, tau_t, rest):
        need_student, need_teacher, need_weight, need_s, need_t, _ = ctx.needs_input_grad
        # A float16 gradient for upstream 1 underflows under a mean over many tokens, which is what
        # GradScaler's upstream is there to prevent: it is made in backward instead.
        halves = (need_student and student.dtype == torch.float16) or (
            need_teacher and teacher.dtype == torch.float16
        )
        ahead = rest.spec.reduction != S.NONE and not halves
        value, stats, *gradients = _forward(
            student,
            teacher,
            weight,
            tau_s,
            tau_t,
            rest,
            need_student and ahead,
            need_teacher and ahead,
            (need_s or need_t) and ahead,
        )
        ctx.rest = rest
        ctx.shape_s, ctx.shape_t = student.shape, None if teacher is None else teacher.shape
        ctx.prepared = gradients if ahead else None
        ctx.overwritten = False
        ctx.value = value.detach() if need_weight else None
        if rest.inplace and need_student and ahead:
            torch.autograd.graph.increment_version(student)
            ctx.overwritten = True
            ctx.save_for_backward(None, None, tau_s, tau_t, stats if need_weight else None)
        else:
            ctx.save_for_backward(student, teacher, tau_s, tau_t, stats)
        if not rest.return_stats:
            return value
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return value, stats

    @staticmethod
    def backward(ctx, upstream, _=None):
        if not torch.is_grad_enabled():
            return _Divergence._gradients(ctx, upstream)
        # create_graph=True. `once_differentiable` would leave the gradients without a graph where
        # upstream is a constant, and a penalty on them would silently count for nothing.
        with torch.no_grad():
            gradients = _Divergence._gradients(ctx, upstream)
        return tuple(None if g is None else refuse_second_of(g, "divergence") for g in gradients)

    @staticmethod
    def _gradients(ctx, upstream):
        if upstream is None:
            return None, None, None, None, None, None
        need_student, need_teacher, need_weight, need_s, need_t, _ = ctx.needs_input_grad
        rest = ctx.rest
        prepared, ctx.prepared = ctx.prepared, None
        if prepared is None and ctx.overwritten:
            raise RuntimeError(
                "kdkernels.divergence(inplace=True): the logits were overwritten by their "
                "gradient, so backward can run once only; use inplace=False with retain_graph=True"
            )
        student, teacher, tau_s, tau_t, stats = ctx.saved_tensors
        if prepared is not None:
            # Upstream is 1 in `loss.backward()`: `scale` looks at it where it lies and returns.
            grad_student, grad_teacher, grad_tau = prepared
            scale = pick("divergence", upstream.device.type).scale
            for gradient in prepared:
                if gradient is not None:
                    scale(gradient, upstream)
        else:
            inplace = rest.inplace and need_student
            grad_student, grad_teacher, grad_tau = _backward(
                student,
                teacher,
                tau_s,
                tau_t,
                rest,
                stats,
                upstream,
                need_student,
                need_teacher,
                need_s or need_t,
                inplace,
            )
            if inplace:
                torch.autograd.graph.increment_version(student)
                ctx.overwritten = True
        grad_weight = None
        if need_weight:
            grad_weight = _weight_gradient(stats, ctx.value, upstream, rest.spec)
        grad_s, grad_t = _tau_gradients(grad_tau, need_s, need_t)
        if grad_student is not None and grad_student.shape != ctx.shape_s:
            grad_student = grad_student.view(ctx.shape_s)
        if grad_teacher is not None and grad_teacher.shape != ctx.shape_t:
            grad_teacher = grad_teacher.view(ctx.shape_t)
        return grad_student, grad_teacher, grad_weight, grad_s, grad_t, None


class _FunctorchDivergence(torch.autograd.Function):
    """The torch.func door: statistics are an output, the gradient is made in backward."""

    vmap = refuse_vmap("divergence")
    jvp = refuse_jvp("divergence")

    @staticmethod
    def forward(student, teacher, weight, tau_s, tau_t, rest):
        value, stats, *_ = _forward(
            student, teacher, weight, tau_s, tau_t, rest, False, False, False
        )
        return value, stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        student, teacher, _, tau_s, tau_t, rest = inputs
        value, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(student, teacher, tau_s, tau_t, stats, value)
        ctx.rest = rest

    @staticmethod
    def backward(ctx, upstream, _):
        student, teacher, tau_s, tau_t, stats, value = ctx.saved_tensors
        need_student, need_teacher, need_weight, need_s, need_t, _ = ctx.needs_input_grad
        grads = _FunctorchBackward.apply(
            student,
            teacher,
            tau_s,
            tau_t,
            stats,
            upstream,
            ctx.rest,
            need_student,
            need_teacher,
            need_s or need_t,
        )
        grad_student, grad_teacher, grad_tau = grads
        grad_s, grad_t = _tau_gradients(grad_tau, need_s, need_t)
        return (
            None if grad_student is None else grad_student.view(student.shape),
            None if grad_teacher is None else grad_teacher.view(teacher.shape),
            _weight_gradient(stats, value, upstream, ctx.rest.spec) if need_weight else None,
            grad_s,
            grad_t,
            None,
        )


class _FunctorchBackward(torch.autograd.Function):
    """The backward as a function of its own, so that torch.func unwraps its tensors; a second
    derivative is refused."""

    vmap = refuse_vmap("divergence")
    jvp = refuse_jvp("divergence")

    @staticmethod
    def forward(student, teacher, tau_s, tau_t, stats, upstream, rest, *needs):
        return _backward(student, teacher, tau_s, tau_t, rest, stats, upstream, *needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("kdkernels.divergence has no second derivative")


# The compile door. ------------------------------------------------------------------------------

_library = torch.library.Library("kdkernels", "FRAGMENT")
_ROWS = (
    "Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor? weight, "
    "Tensor? tau_s, Tensor? tau_t, Tensor? first, Tensor? second, Tensor? num_items"
)
_library.define(
    f"divergence_fwd({_ROWS}, SymInt batch, float[] spec) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"divergence_bwd({_ROWS}, Tensor stats, Tensor upstream, SymInt batch, float[] spec, "
    "bool need_student, bool need_teacher, bool need_tau) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rest(labels, mask, first, second, num_items, batch, spec) -> Rest:
    numbers = DivergenceSpec(*spec)._replace(batch=float(batch))
    return Rest(labels, mask, first, second, num_items, numbers, False, True)


def _op_fwd(
    student, teacher, labels, mask, weight, tau_s, tau_t, first, second, num_items, batch, spec
):
    rest = _rest(labels, mask, first, second, num_items, batch, spec)
    return _forward(student, teacher, weight, tau_s, tau_t, rest, False, False, False)[:2]


def _op_bwd(
    student,
    teacher,
    labels,
    mask,
    weight,
    tau_s,
    tau_t,
    first,
    second,
    num_items,
    stats,
    upstream,
    batch,
    spec,
    need_student,
    need_teacher,
    need_tau,
):
    rest = _rest(labels, mask, first, second, num_items, batch, spec)
    grads = _backward(
        student, teacher, tau_s, tau_t, rest, stats, upstream, need_student, need_teacher, need_tau
    )
    like = (student, teacher, None)
    return tuple(
        student.new_empty((0,)) if g is None else g if t is None else g.view(t.shape)
        for g, t in zip(grads, like)
    )


def _fake_fwd(
    student, teacher, labels, mask, weight, tau_s, tau_t, first, second, num_items, batch, spec
):
    rows = student.numel() // student.shape[-1] if student.dim() != 2 else student.shape[0]
    dtype = compute_dtype(student)
    value = (rows,) if spec[DivergenceSpec._fields.index("reduction")] == S.NONE else ()
    return student.new_empty(value, dtype=dtype), student.new_empty((rows, S.STATS), dtype=dtype)


def _fake_bwd(
    student,
    teacher,
    labels,
    mask,
    weight,
    tau_s,
    tau_t,
    first,
    second,
    num_items,
    stats,
    upstream,
    batch,
    spec,
    need_student,
    need_teacher,
    need_tau,
):
    return (
        student.new_empty(student.shape if need_student else (0,)),
        teacher.new_empty(teacher.shape) if need_teacher else student.new_empty((0,)),
        stats.new_empty((stats.shape[0], 2)) if need_tau else student.new_empty((0,)),
    )


def _op_setup(ctx, inputs, output):
    (
        student,
        teacher,
        labels,
        mask,
        weight,
        tau_s,
        tau_t,
        first,
        second,
        num_items,
        batch,
        spec,
    ) = inputs
    value, stats = output
    ctx.save_for_backward(
        student, teacher, labels, mask, weight, tau_s, tau_t, first, second, num_items, stats, value
    )
    ctx.mark_non_differentiable(stats)
    ctx.batch, ctx.spec = batch, spec


def _op_backward(ctx, upstream, _):
    *inputs, stats, value = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need_student, need_teacher, need_weight = needs[0], needs[1], needs[4]
    need_s, need_t = needs[5], needs[6]
    grad_student, grad_teacher, grad_tau = torch.ops.kdkernels.divergence_bwd.default(
        *inputs, stats, upstream, ctx.batch, ctx.spec, need_student, need_teacher, need_s or need_t
    )
    grad_weight = None
    if need_weight:
        grad_weight = _weight_gradient(stats, value, upstream, DivergenceSpec(*ctx.spec))
    grad_s, grad_t = _tau_gradients(grad_tau, need_s, need_t)
    return (
        grad_student if need_student else None,
        grad_teacher if need_teacher else None,
        None,
        None,
        grad_weight,
        grad_s,
        grad_t,
        None,
        None,
        None,
        None,
        None,
    )


for _key in ("CPU", "CUDA"):
    _library.impl("divergence_fwd", _op_fwd, _key)
    _library.impl("divergence_bwd", _op_bwd, _key)
torch.library.register_fake("kdkernels::divergence_fwd", _fake_fwd, lib=_library)
torch.library.register_fake("kdkernels::divergence_bwd", _fake_bwd, lib=_library)
torch.library.register_autograd(
    "kdkernels::divergence_fwd", _op_backward, setup_context=_op_setup, lib=_library
)


def divergence(
    student: Tensor,
    teacher: Tensor | None,
    weight: Tensor | None,
    tau_s: Tensor | None,
    tau_t: Tensor | None,
    rest: Rest,
    batch: int,
):
    """(value, stats or None). student [..., V]; per-row tensors (N,) in the compute dtype."""
    if torch.compiler.is_compiling():
        value, stats = torch.ops.kdkernels.divergence_fwd.default(
            student,
            teacher,
            rest.labels,
            rest.mask,
            weight,
            tau_s,
            tau_t,
            rest.first,
            rest.second,
            rest.num_items,
            batch,
            list(rest.spec),
        )
        return value, stats
    if functorch_active():
        return _FunctorchDivergence.apply(student, teacher, weight, tau_s, tau_t, rest)
    leaves = (student, teacher, weight, tau_s, tau_t)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in leaves):
        return _forward(student, teacher, weight, tau_s, tau_t, rest, False, False, False)[:2]
    out = _Divergence.apply(student, teacher, weight, tau_s, tau_t, rest)
    return out if rest.return_stats else (out, None)
