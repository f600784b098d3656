"""Derivatives that do not exist are refused by name, never silently left out."""

from __future__ import annotations

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """Identity on a gradient whose own derivative is refused."""

    @staticmethod
    def forward(ctx, name: str, gradient: Tensor, *_sources: Tensor):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"kdkernels.{ctx.name} has no second derivative")


def refuse_second(name: str, gradient: Tensor | None, *sources: Tensor) -> Tensor | None:
    """The gradient, joined to what it was made of: differentiating it raises by name."""
    return gradient if gradient is None else _Once.apply(name, gradient, *sources)


def refuse_second_of(gradient: Tensor, name: str) -> Tensor:
    """`refuse_second` where nothing that the gradient was made of was kept."""
    node = torch._C._functions.DelayedError(f"kdkernels.{name} has no second derivative", 1)
    return node(gradient.detach().requires_grad_())


def refuse_dual(name: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries a forward-mode tangent, which an operator would drop."""
    forward_ad = torch.autograd.forward_ad
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"kdkernels.{name} does not support forward-mode differentiation"
            )
