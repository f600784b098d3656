"""What the ops of every family share: output buffers, dtypes, refusals by name."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Tests fill every output with NaN before the launch: what a kernel forgets to write then shows.
_POISON = os.environ.get("KDK_POISON", "0") not in ("", "0")


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, poisoned with NaN under KDK_POISON=1."""
    if _POISON and dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(tensor: Tensor) -> Tensor:
    """A contiguous, uninitialised (poisoned) tensor of the same shape and dtype."""
    if _POISON or not tensor.is_contiguous():
        return empty(tuple(tensor.shape), tensor.dtype, tensor.device)
    return torch.empty_like(tensor)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) runs now."""
    return torch._C._are_functorch_transforms_active()


def refuse_vmap(name: str):
    """A `vmap` staticmethod that says no by name."""

    def vmap(info, in_dims, *args):
        raise NotImplementedError(f"kdkernels.{name} does not support torch.vmap; batch the rows")

    return staticmethod(vmap)


def refuse_jvp(name: str):
    """A `jvp` staticmethod that says no by name."""

    def jvp(ctx, *args):
        raise NotImplementedError(f"kdkernels.{name} does not support forward-mode differentiation")

    return staticmethod(jvp)
