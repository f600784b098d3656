"""Argument checks that public functions share. Nothing here reads tensor data."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..backends.registry import settings

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


def may_look(tensor: Tensor) -> bool:
    """Whether reading the tensor's data costs no synchronisation, or the caller asked for it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu" or settings().debug


def check_inplace(student: Tensor, teacher: Tensor | None, reduction: str, compiling: bool) -> bool:
    """Refuse what must not be overwritten; False where there is no gradient to write."""
    if compiling or torch._C._are_functorch_transforms_active():
        raise ValueError("inplace: not under torch.compile or torch.func; use inplace=False")
    if reduction == "none":
        raise ValueError("inplace: reduction 'none' has no gradient to write in the forward pass")
    if not (student.requires_grad and torch.is_grad_enabled()):
        return False
    if student.is_leaf:
        raise ValueError("inplace: student is a leaf that requires grad; it would be overwritten")
    if any(n > 1 and s == 0 for n, s in zip(student.shape, student.stride())):
        raise ValueError("inplace: student is expanded; its rows share memory")
    if overlaps(student):
        raise ValueError("inplace: student overlaps itself in memory")
    if teacher is not None and teacher.data_ptr() == student.data_ptr():
        raise ValueError("inplace: student and teacher are the same memory")
    return True


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory: some stride is shorter than what lies inside it."""
    extent = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n > 1):
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False
