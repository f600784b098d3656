"""token_stats and label_log_probs under autograd: one backend function behind three doors.

Eager calls take an old-style Function (label_log_probs) or none (token_stats has no gradient); an
active torch.func transform takes the `setup_context` twins; torch.compile the operators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.registry import pick
from .common import compute_dtype, empty, empty_like, functorch_active, refuse_jvp, refuse_vmap
from .divergence import _rows

NUMBERS = 18  # TokenNumber of csrc/divergence/token_stats.h
_NO_SECOND = "kdkernels.label_log_probs has no second derivative"


class StatsNumbers(NamedTuple):
    """What is the same for every row of token_stats."""

    student_temperature: float
    teacher_temperature: float
    ignore_index: float
    student_columns: float
    teacher_columns: float


class LabelNumbers(NamedTuple):
    """What is the same for every row of label_log_probs."""

    temperature: float
    ignore_index: float
    columns: float


# token_stats. -----------------------------------------------------------------------------------


def _stats(student, teacher, labels, mask, tau_s, tau_t, numbers) -> tuple[Tensor, Tensor]:
    """(18, N) float32 and (2, N) int64."""
    z = _rows(student)
    a = None if teacher is None else _rows(teacher)
    out = empty((NUMBERS, z.shape[0]), torch.float32, z.device)
    ids = torch.empty((2, z.shape[0]), dtype=torch.int64, device=z.device)
    backend = pick("divergence", z.device.type)
    backend.token_stats(z, a, labels, mask, tau_s, tau_t, out, ids, *numbers)
    return out, ids


class _FunctorchStats(torch.autograd.Function):
    """Unwraps the tensors of a torch.func transform."""

    vmap = refuse_vmap("token_stats")
    jvp = refuse_jvp("token_stats")

    @staticmethod
    def forward(student, teacher, labels, mask, tau_s, tau_t, numbers):
        return _stats(student, teacher, labels, mask, tau_s, tau_t, numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx, *_):
        return (None,) * 7


_library = torch.library.Library("kdkernels", "FRAGMENT")
_library.define(
    "token_stats(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor? tau_s, "
    "Tensor? tau_t, float[] numbers) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op_stats(student, teacher, labels, mask, tau_s, tau_t, numbers):
    return _stats(student, teacher, labels, mask, tau_s, tau_t, StatsNumbers(*numbers))


def _row_count(logits: Tensor) -> int:
    return logits.shape[0] if logits.dim() == 2 else logits.numel() // logits.shape[-1]


def _fake_stats(student, teacher, labels, mask, tau_s, tau_t, numbers):
    rows = _row_count(student)
    return (
        student.new_empty((NUMBERS, rows), dtype=torch.float32),
        student.new_empty((2, rows), dtype=torch.int64),
    )


def token_stats(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    tau_s: Tensor | None,
    tau_t: Tensor | None,
    numbers: StatsNumbers,
) -> tuple[Tensor, Tensor]:
    """(18, N) float32 and (2, N) int64, without gradient. Logits [..., V], the rest (N,)."""
    if torch.compiler.is_compiling():
        student = student.detach()
        teacher = None if teacher is None else teacher.detach()
        tau_s = None if tau_s is None else tau_s.detach()
        tau_t = None if tau_t is None else tau_t.detach()
        return torch.ops.kdkernels.token_stats.default(
            student, teacher, labels, mask, tau_s, tau_t, list(numbers)
        )
    if functorch_active():
        return _FunctorchStats.apply(student, teacher, labels, mask, tau_s, tau_t, numbers)
    with torch.no_grad():
        return _stats(student, teacher, labels, mask, tau_s, tau_t, numbers)


# label_log_probs. -------------------------------------------------------------------------------


def _forward(logits, labels, mask, tau, numbers) -> tuple[Tensor, Tensor]:
    z = _rows(logits)
    dtype = compute_dtype(z)
    value = empty((z.shape[0],), dtype, z.device)
    stats = empty((z.shape[0], 2), dtype, z.device)
    backend = pick("divergence", z.device.type)
    backend.label_log_probs_fwd(z, labels, mask, tau, value, stats, *numbers)
    return value, stats


def _backward(logits, labels, mask, tau, stats, upstream, numbers, need_logits, need_tau):
    """(gradient of the logits, of the temperatures), None where it is not wanted."""
    z = _rows(logits)
    gradient = empty_like(z) if need_logits else None
    grad_tau = empty((z.shape[0],), stats.dtype, z.device) if need_tau else None
    upstream = upstream.to(stats.dtype).contiguous()
    backend = pick("divergence", z.device.type)
    backend.label_log_probs_bwd(z, labels, mask, tau, stats, upstream, gradient, grad_tau, *numbers)
    return None if gradient is None else gradient.view(logits.shape), grad_tau


class _LabelLogProbs(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx, logits, labels, mask, tau, numbers):
        value, stats = _forward(logits, labels, mask, tau, numbers)
        ctx.save_for_backward(logits, labels, mask, tau, stats)
        ctx.numbers = numbers
        return value

    @staticmethod
    def backward(ctx, upstream):
        needs = ctx.needs_input_grad
        # Under create_graph=True the gradient hangs on a node that refuses to be differentiated.
        run = _FunctorchBackward.apply if torch.is_grad_enabled() else _backward
        grad, grad_tau = run(*ctx.saved_tensors, upstream, ctx.numbers, needs[0], needs[3])
        return grad, None, None, grad_tau, None


class _FunctorchLabels(torch.autograd.Function):
    """The torch.func door."""

    vmap = refuse_vmap("label_log_probs")
    jvp = refuse_jvp("label_log_probs")

    @staticmethod
    def forward(logits, labels, mask, tau, numbers):
        return _forward(logits, labels, mask, tau, numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, mask, tau, ctx.numbers = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, labels, mask, tau, output[1])

    @staticmethod
    def backward(ctx, upstream, _):
        needs = ctx.needs_input_grad
        grad, grad_tau = _FunctorchBackward.apply(
            *ctx.saved_tensors, upstream, ctx.numbers, needs[0], needs[3]
        )
        return grad, None, None, grad_tau, None


class _FunctorchBackward(torch.autograd.Function):
    vmap = refuse_vmap("label_log_probs")
    jvp = refuse_jvp("label_log_probs")

    @staticmethod
    def forward(*arguments):
        return _backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(_NO_SECOND)


_library.define(
    "label_log_probs(Tensor logits, Tensor labels, Tensor? mask, Tensor? tau, float[] numbers) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "label_log_probs_bwd(Tensor logits, Tensor labels, Tensor? mask, Tensor? tau, Tensor stats, "
    "Tensor upstream, float[] numbers, bool need_logits, bool need_tau) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op_labels(logits, labels, mask, tau, numbers):
    return _forward(logits, labels, mask, tau, LabelNumbers(*numbers))


def _op_labels_bwd(logits, labels, mask, tau, stats, upstream, numbers, need_logits, need_tau):
    gradients = _backward(
        logits, labels, mask, tau, stats, upstream, numbers, need_logits, need_tau
    )
    return tuple(logits.new_empty((0,)) if g is None else g for g in gradients)


def _fake_labels(logits, labels, mask, tau, numbers):
    rows, dtype = _row_count(logits), compute_dtype(logits)
    return logits.new_empty((rows,), dtype=dtype), logits.new_empty((rows, 2), dtype=dtype)


def _fake_labels_bwd(logits, labels, mask, tau, stats, upstream, numbers, need_logits, need_tau):
    return (
        logits.new_empty(logits.shape if need_logits else (0,)),
        stats.new_empty((stats.shape[0],)) if need_tau else logits.new_empty((0,)),
    )


def _op_setup(ctx, inputs, output):
    logits, labels, mask, tau, ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, mask, tau, output[1])


def _op_backward(ctx, upstream, _):
    needs = ctx.needs_input_grad
    grad, grad_tau = torch.ops.kdkernels.label_log_probs_bwd.default(
        *ctx.saved_tensors, upstream, ctx.numbers, needs[0], needs[3]
    )
    return grad if needs[0] else None, None, None, grad_tau if needs[3] else None, None


for _key in ("CPU", "CUDA"):
    _library.impl("token_stats", _op_stats, _key)
    _library.impl("label_log_probs", _op_labels, _key)
    _library.impl("label_log_probs_bwd", _op_labels_bwd, _key)
torch.library.register_fake("kdkernels::token_stats", _fake_stats, lib=_library)
torch.library.register_fake("kdkernels::label_log_probs", _fake_labels, lib=_library)
torch.library.register_fake("kdkernels::label_log_probs_bwd", _fake_labels_bwd, lib=_library)
torch.library.register_autograd(
    "kdkernels::label_log_probs", _op_backward, setup_context=_op_setup, lib=_library
)


def label_log_probs(
    logits: Tensor, labels: Tensor, mask: Tensor | None, tau: Tensor | None, numbers: LabelNumbers
) -> Tensor:
    """(N,) in the compute dtype. logits [..., V]; labels, mask and tau (N,)."""
    if torch.compiler.is_compiling():
        return torch.ops.kdkernels.label_log_probs.default(
            logits, labels, mask, tau, list(numbers)
        )[0]
    if functorch_active():
        return _FunctorchLabels.apply(logits, labels, mask, tau, numbers)[0]
    if torch.is_grad_enabled() and (
        logits.requires_grad or (tau is not None and tau.requires_grad)
    ):
        return _LabelLogProbs.apply(logits, labels, mask, tau, numbers)
    return _forward(logits, labels, mask, tau, numbers)[0]
