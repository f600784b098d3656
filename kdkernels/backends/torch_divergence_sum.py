"""The sum of several divergences of one student in plain torch: part by part, gradients added in
float64 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch import divergence_bwd, divergence_fwd

DIVERGENCE_SUM_PARTS = 1 << 30


def _total(student: Tensor, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return torch.zeros(student.shape, dtype=torch.float64, device=student.device)


def divergence_sum_fwd(student, parts, labels, mask, num_items, grad_student) -> None:
    """Forward of csrc/divergence/divergence.h's sum; `parts` as the bindings take them."""
    total = _total(student, grad_student)
    for teacher, weight, tau_s, tau_t, first, second, value, stats, spec in parts:
        one = None if total is None else torch.empty_like(total)
        divergence_fwd(
            student, teacher, labels, mask, weight, tau_s, tau_t, first, second, num_items,
            value, stats, one, None, None, spec,
        )  # fmt: skip
        if total is not None:
            total += one
    if total is not None:
        grad_student.copy_(total)


def divergence_sum_bwd(student, parts, labels, mask, upstream, grad_student) -> None:
    """Backward of csrc/divergence/divergence.h's sum."""
    total = _total(student, grad_student)
    for teacher, _, tau_s, tau_t, first, second, _, stats, spec in parts:
        one = torch.empty_like(total)
        divergence_bwd(
            student, teacher, labels, mask, tau_s, tau_t, first, second, stats, upstream,
            one, None, None, spec,
        )  # fmt: skip
        total += one
    grad_student.copy_(total)
