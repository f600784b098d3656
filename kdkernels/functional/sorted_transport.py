"""Sorted transport between softmaxed rows (ULD)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import sorted_transport as ops
from ..ops.common import functorch_active
from .checks import check_floats, check_number, same_device

_REDUCTIONS = ("none", "sum", "mean")


def sorted_transport(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    student_row_scale: Tensor | None = None,
    teacher_row_scale: Tensor | None = None,
    exclude_student: Tensor | None = None,
    exclude_teacher: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Distance of two vocabularies that share no ids: sum over ranks of |p_(r) - q_(r)|, the sorted
    probabilities of teacher and student (universal logit distillation, Boizard et al. 2024).

    It is the least L1 distance over all matchings of the vocabularies. Softmax keeps the order, so
    the logits are sorted: 16-bit logits by counting their values, wider ones by radix.

    Args:
        student: Logits [..., V], float32, float16, bfloat16 or float64.
        teacher: Logits [..., V'], the same leading shape; V' may differ, the shorter side is padded
            with probability 0. Its dtype is free (float64 goes with float64).
        temperature: Of the student, > 0.
        teacher_temperature: Of the teacher; default the student's.
        mask: Bool, leading shape: rows that count. Others give 0 and no gradient.
        weight: Float, leading shape: factor of each row; constant.
        student_row_scale: Float, leading shape, >= 0: multiplies the row's probabilities (merged
            tokens); gets its gradient.
        teacher_row_scale: Likewise for the teacher.
        exclude_student: Ids (int64 [E]) or a bool mask [V] that are left out after the softmax.
        exclude_teacher: Likewise [V'].
        reduction: "none", "sum" or "mean" (over selected rows).
        num_items: Divisor in place of the mean's count.

    Returns:
        float32 (float64), a scalar or the leading shape. Where probabilities tie, the gradient
        takes the mean of the signs the tied entries share.
    """
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    same_device(teacher, "teacher", student)
    if student.dim() < 1 or teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher: expected leading shape {tuple(student.shape[:-1])} like the student, got "
            f"shape {tuple(teacher.shape)}"
        )
    if student.shape[-1] == 0 or teacher.shape[-1] == 0:
        raise ValueError("student, teacher: expected at least one column")
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"teacher: float64 goes with float64 only, got student {student.dtype} and teacher "
            f"{teacher.dtype}"
        )
    tau = check_number(temperature, "temperature", positive=True)
    tau_t = tau
    if teacher_temperature is not None:
        tau_t = check_number(teacher_temperature, "teacher_temperature", positive=True)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: goes with reduction 'mean', got {reduction!r}")
    leading = student.shape[:-1]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    z, t = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', mask)}")
        same_device(mask, "mask", student)
        if mask.shape != leading:
            raise ValueError(f"mask: expected shape {tuple(leading)}, got {tuple(mask.shape)}")
        mask = mask.reshape(-1).contiguous()
    scale_s = _per_row(student_row_scale, "student_row_scale", leading, student, dtype)
    scale_t = _per_row(teacher_row_scale, "teacher_row_scale", leading, student, dtype)
    weight = _per_row(weight, "weight", leading, student, dtype)
    arguments = (
        z,
        t,
        mask,
        scale_s,
        scale_t,
        _excluded(exclude_student, "exclude_student", student),
        _excluded(exclude_teacher, "exclude_teacher", teacher),
    )
    if reduction == "none":
        rows = ops.sorted_transport(*arguments, tau, tau_t)
        return (rows if weight is None else rows * weight).view(leading)
    factor = _factor(reduction, num_items, z.shape[0], mask, weight, dtype, student)
    only_student = student.requires_grad and not any(
        x is not None and x.requires_grad for x in (teacher, scale_s, scale_t, factor)
    )
    eager = not torch.compiler.is_compiling() and not functorch_active()
    # A float16 gradient made before the loss scale arrives would have lost its small entries.
    prepare = eager and torch.is_grad_enabled() and student.dtype != torch.float16
    if only_student and prepare:
        return ops.sorted_transport_total(*arguments, factor, tau, tau_t)
    return (ops.sorted_transport(*arguments, tau, tau_t) * factor).sum()


# Pieces. ----------------------------------------------------------------------------------------


def _per_row(value, argument: str, leading: torch.Size, student: Tensor, dtype) -> Tensor | None:
    """(N,) of the compute dtype, keeping its gradient."""
    if value is None:
        return None
    check_floats(value, argument)
    same_device(value, argument, student)
    if value.shape != leading:
        raise ValueError(f"{argument}: expected shape {tuple(leading)}, got {tuple(value.shape)}")
    return value.to(dtype).reshape(-1).contiguous()


def _excluded(ids, argument: str, logits: Tensor) -> Tensor | None:
    """(V,) bool."""
    if ids is None:
        return None
    size = logits.shape[-1]
    ids = torch.as_tensor(ids, device=logits.device)
    if ids.dtype == torch.bool:
        if ids.shape != (size,):
            raise ValueError(
                f"{argument}: expected a mask of shape ({size},), got {tuple(ids.shape)}"
            )
        return ids.contiguous()
    if ids.dtype not in (torch.int64, torch.int32) and ids.numel():
        raise TypeError(f"{argument}: expected integer ids or a bool mask, got {ids.dtype}")
    ids = ids.to(torch.int64).reshape(-1)
    if ids.numel() and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(f"{argument}: expected ids 0 to {size - 1}, got {low} to {high}")
    mask = torch.zeros(size, dtype=torch.bool, device=logits.device)
    return mask.index_fill(0, ids, True)


def _factor(reduction, num_items, rows: int, mask, weight, dtype, student: Tensor) -> Tensor:
    """(N,) what each row is multiplied by before the sum."""
    factor = torch.ones(rows, dtype=dtype, device=student.device) if weight is None else weight
    if mask is not None:
        factor = torch.where(mask, factor, 0.0)
    if reduction == "sum":
        return factor
    if isinstance(num_items, Tensor):
        return factor / num_items.to(device=student.device, dtype=dtype)
    if num_items is not None:
        return factor / check_number(num_items, "num_items", positive=True)
    if mask is not None:
        return factor / mask.sum().clamp(min=1).to(dtype)
    return factor / max(rows, 1)
