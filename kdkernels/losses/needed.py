"""Extras of a loss: a missing one is named."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..functional.feature import Projector


def needed(value: Any, argument: str, loss: str) -> Any:
    """The value, or ValueError that names the argument that is missing."""
    if value is None:
        raise ValueError(f"{argument}: {loss} needs it, got None")
    return value


def pair(value: Any, argument: str, count: int, what: str) -> tuple[Tensor, ...]:
    """A tuple of `count` tensors."""
    if not isinstance(value, (tuple, list)) or len(value) != count:
        raise ValueError(f"{argument}: expected {what}, got {type(value).__name__}")
    return tuple(value)


def projector(student_dim: int | None, teacher_dim: int | None) -> nn.Module | None:
    """kd.Projector where both widths are given, None where none is."""
    if student_dim is None and teacher_dim is None:
        return None
    if student_dim is None or teacher_dim is None:
        raise ValueError("student_dim, teacher_dim: expected both or none")
    return Projector(student_dim, teacher_dim)
