"""Sums of divergences of one student, over teachers or kinds, in one pass over the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import divergence_sum as ops
from ..ops.common import compute_dtype
from .plain_call import Call, call

if TYPE_CHECKING:
    from .composed import Part


def _counts(part: Part) -> bool:
    return isinstance(part.coefficient, Tensor) or part.coefficient != 0.0


def fits(student: Tensor, parts: list[Part], inplace: bool) -> bool:
    """Whether the kernels add these parts up: there are several, and none has a gradient but the
    student's and its coefficient's. In place they must be one call."""
    counting = [part for part in parts if _counts(part)]
    most = ops.most_parts(student)
    if len(counting) < 2 or most == 0 or (inplace and len(counting) + 1 > most):
        return False
    if not torch.is_grad_enabled():
        return True
    fixed = [part.teacher for part in counting]
    for part in counting:
        fixed += [part.options["temperature"], part.options["teacher_temperature"]]
    return not any(isinstance(t, Tensor) and t.requires_grad for t in fixed)


def summed(
    student: Tensor,
    parts: list[Part],
    label_alone: dict[str, Any],
    options: dict[str, Any],
    inplace: bool,
) -> Tensor:
    """The sum of the parts. `label_alone`: the label's cross entropy as a call of its own;
    `options`: what all parts have in common."""
    counting = [part for part in parts if _counts(part)]
    numbers = [p for p in counting if not isinstance(p.coefficient, Tensor)]
    # The label rides on the largest coefficient, whose division rounds least.
    bearer = max(numbers, key=lambda p: abs(p.coefficient)) if numbers else None
    calls, weights = [], []
    for part in counting:
        label = label_alone["label_weight"] if part is bearer else 0.0
        made = call(
            student,
            part.teacher,
            **part.options,
            **options,
            label_weight=label / part.coefficient if label else 0.0,
            inplace=inplace,
        )
        calls.append(Call(*made))
        weights.append(_weight(part.coefficient, calls[-1].weight, student))
    if label_alone["label_weight"] and bearer is None:
        alone = {k: v for k, v in label_alone.items() if k != "student"}
        made = call(student, **alone, **{**options, "clip": None}, inplace=inplace)
        calls.append(Call(*made))
        weights.append(calls[-1].weight)
    most = ops.most_parts(student)
    total = None
    for begin in range(0, len(calls), most):
        some = slice(begin, begin + most)
        loss = ops.divergence_sum(student, _common(calls[some]), weights[some])
        total = loss if total is None else total + loss
    return total.view(student.shape[:-1]) if options["reduction"] == "none" else total


def _common(calls: list[Call]) -> ops.Common:
    first = calls[0].rest
    return ops.Common(
        tuple(
            ops.Part(c.teacher, c.tau_s, c.tau_t, c.rest.first, c.rest.second, c.rest.spec)
            for c in calls
        ),
        first.labels,
        first.mask,
        first.num_items,
        first.inplace,
    )


def _weight(coefficient: float | Tensor, weight: Tensor | None, student: Tensor) -> Tensor | None:
    """coefficient x weight (N,), None for 1."""
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(compute_dtype(student)).reshape(-1)
    elif weight is not None:
        return weight if coefficient == 1.0 else weight * coefficient
    elif coefficient == 1.0:
        return None
    else:
        coefficient = torch.full((1,), coefficient, dtype=compute_dtype(student)).to(student.device)
    if weight is not None:
        return weight * coefficient
    return coefficient.expand(student.shape[:-1].numel())
