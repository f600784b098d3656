"""What operators that are registered with torch share: one library, doors for torch.func,
gradients that refuse to be differentiated again."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import functorch_active, refuse_jvp, refuse_vmap
from .once import refuse_second

library = torch.library.Library("kdkernels", "FRAGMENT")


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


def call(op, fn, *args):
    """The operator, or under torch.func the function behind it."""
    return _Opaque.apply(fn, *args) if functorch_active() else op(*args)


def once(name: str, grads: list[Tensor | None], sources: list[Tensor]) -> list[Tensor | None]:
    """The gradients; under create_graph=True such that differentiating them raises."""
    if not torch.is_grad_enabled() or functorch_active():
        return grads
    return [refuse_second(name, grad, *sources) for grad in grads]


def define(schema: str) -> None:
    """Declare an operator of the namespace `kdkernels`."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, kernel, fake) -> None:
    """Its kernel on both devices, and what it gives without data."""
    for key in ("CPU", "CUDA"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"kdkernels::{name}", fake, lib=library)
