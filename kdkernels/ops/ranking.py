"""plackett_luce under autograd: eager and torch.func by a Function, compile by an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.registry import pick
from .common import compute_dtype, empty, refuse_jvp, refuse_vmap

_NO_SECOND = "kdkernels.plackett_luce has no second derivative"


def dense(scores: Tensor, order: Tensor, weights: Tensor | None) -> Tensor:
    """The torch reference: (N,) float64, gradients by autograd."""
    ordered = scores.double().gather(-1, order)
    suffix = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    terms = suffix - ordered
    if weights is None:
        return terms.sum(-1)
    used = weights != 0
    zero = torch.zeros_like(terms)
    return (torch.where(used, terms, zero) * weights.double()).sum(-1)


def _run(scores: Tensor, order: Tensor, weights: Tensor | None, need: bool):
    rows, items = order.shape
    if not hasattr(pick("relation", scores.device.type), "plackett_luce"):
        leaf = scores.detach().clone().requires_grad_(need)
        with torch.enable_grad():
            value = dense(leaf, order, weights)
        gradient = torch.autograd.grad(value.sum(), leaf)[0] if need else None
        return value.detach(), None if gradient is None else gradient.to(compute_dtype(scores))
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    value = empty((rows,), torch.float64, scores.device)
    gradient = suffix = None
    if need:
        gradient = torch.zeros(scores.shape, dtype=compute_dtype(scores), device=scores.device)
        suffix = empty((rows, items), torch.float64, scores.device)
    pick("relation", scores.device.type).plackett_luce(
        scores, order, weights, value, gradient, suffix
    )
    return value, gradient


class _PlackettLuce(torch.autograd.Function):
    vmap = refuse_vmap("plackett_luce")
    jvp = refuse_jvp("plackett_luce")

    @staticmethod
    def forward(scores, order, weights, need):
        value, gradient = _run(scores, order, weights, need)
        return value, scores.new_empty(0) if gradient is None else gradient

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], inputs[0])

    @staticmethod
    def backward(ctx, upstream, _):
        return _Scale.apply(upstream, *ctx.saved_tensors, ctx.dtype), None, None, None


class _Scale(torch.autograd.Function):
    vmap = refuse_vmap("plackett_luce")
    jvp = refuse_jvp("plackett_luce")

    @staticmethod
    def forward(upstream, gradient, scores, dtype):
        return (gradient * upstream.to(gradient.dtype)[:, None]).to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(_NO_SECOND)


_library = torch.library.Library("kdkernels", "FRAGMENT")
_library.define(
    "plackett_luce(Tensor scores, Tensor order, Tensor? weights, bool need) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op(scores, order, weights, need):
    value, gradient = _run(scores, order, weights, need)
    return value, scores.new_empty(0) if gradient is None else gradient


def _fake(scores, order, weights, need):
    value = scores.new_empty((scores.shape[0],), dtype=torch.float64)
    if not need:
        return value, scores.new_empty(0)
    return value, scores.new_empty(scores.shape, dtype=compute_dtype(scores))


def _op_setup(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _op_backward(ctx, upstream, _):
    (gradient,) = ctx.saved_tensors
    scaled = gradient * upstream.to(gradient.dtype)[:, None]
    return scaled.to(ctx.dtype), None, None, None


for _device in ("CPU", "CUDA"):
    _library.impl("plackett_luce", _op, _device)
torch.library.register_fake("kdkernels::plackett_luce", _fake, lib=_library)
torch.library.register_autograd(
    "kdkernels::plackett_luce", _op_backward, setup_context=_op_setup, lib=_library
)


def plackett_luce(scores: Tensor, order: Tensor, weights: Tensor | None) -> Tensor:
    """(N,) float64."""
    need = torch.is_grad_enabled() and scores.requires_grad
    if torch.compiler.is_compiling():
        return torch.ops.kdkernels.plackett_luce(scores, order, weights, need)[0]
    if not hasattr(pick("relation", scores.device.type), "plackett_luce"):
        return dense(scores, order, weights)
    return _PlackettLuce.apply(scores, order, weights, need)[0]
