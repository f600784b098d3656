"""Argument checks that every public function shares. Nothing here reads tensor data."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_floats(tensor: Tensor, argument: str) -> None:
    """A plain tensor of one of the four dtypes, on a device that a kernel can read."""
    if type(tensor) is Tensor and tensor.dtype in LOGIT_DTYPES and tensor.layout is torch.strided:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{argument}: expected float32, float16, bfloat16 or float64, got {tensor.dtype}"
        )
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"{argument}: {type(tensor).__name__} is a wrapper that no kernel can read; "
            "pass its local or full tensor"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{argument}: expected a dense tensor, got layout {tensor.layout}")


def check_number(value: object, argument: str, *, positive: bool = False) -> float:
    """A finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {type(value).__name__}")
    value = float(value)
    if not -math.inf < value < math.inf:  # a comparison that torch.compile can trace
        raise ValueError(f"{argument}: expected a finite number, got {value!r}")
    if positive and value <= 0.0:
        raise ValueError(f"{argument}: expected a number > 0, got {value!r}")
    return value


def per_row(
    value: Tensor, argument: str, leading: torch.Size, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """A tensor of the leading shape (or 0-d, expanded) as contiguous (N,) of `dtype`."""
    if value.device != like.device:
        raise ValueError(
            f"{argument}: expected a tensor on {like.device} like the student, got {value.device}"
        )
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{argument}: expected a floating-point tensor, got {value.dtype}")
    if value.shape != leading:
        if value.dim() != 0:
            raise ValueError(
                f"{argument}: expected shape {tuple(leading)} (the student's without the class "
                f"dimension), got {tuple(value.shape)}"
            )
        value = value.expand(leading)
    return value.to(dtype).reshape(-1).contiguous()


def same_device(tensor: Tensor, argument: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{argument}: expected a tensor on {like.device} like the student, got {tensor.device}"
        )
