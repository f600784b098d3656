"""Teachers that are not plain logits, made into one row of logits: `kdkernels.inputs`.

Plain torch: one pass a part over one temporary of the student's size. Gradients flow to the parts
that require them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inputs import STUDENT, LogitMix, Mapped, ProbMix
from ..ops.common import compute_dtype, functorch_active
from .checks import check_floats, may_look, same_device

_INFINITY = float("inf")


def teacher_logits(
    teacher: Any,
    student: Tensor,
    columns: int | None,
    teacher_columns: int | None,
    temperature: float | Tensor,
    selected: Tensor | None,
) -> tuple[Tensor, int | None, bool]:
    """(logits, valid columns, whether they are at temperature 1 already). `columns`: vocab_size;
    `selected` [...]: rows that count, None for all."""
    if isinstance(teacher, Mapped):
        return _mapped(teacher, student, teacher_columns), None, False
    if isinstance(teacher, (LogitMix, ProbMix)):
        parts = [
            (c, _part(x, student, columns, teacher_columns, type(teacher).__name__))
            for c, x in teacher.parts
        ]
        widths = sorted({x.shape[-1] for _, x in parts})
        if len(widths) > 1:
            raise ValueError(
                f"teacher: {type(teacher).__name__} of different vocabularies, "
                f"{' and '.join(str(w) for w in widths)} columns; bring them onto the student's "
                "with kd.Mapped"
            )
        # torch's derivative of a row that does not count must not be 0 * NaN.
        if selected is not None:
            keep = selected.unsqueeze(-1)
            parts = [(c, torch.where(keep, x, 0.0) if x.requires_grad else x) for c, x in parts]
        if isinstance(teacher, LogitMix):
            return _logit_mix(parts, student), None, False
        return _probability_mix(teacher, parts, student, temperature), None, True
    if isinstance(teacher, Tensor):
        return teacher, teacher_columns, False
    raise TypeError(
        "teacher: expected logits, kd.LogitMix, kd.ProbMix, kd.Mapped, kd.TopK or a list, got "
        f"{type(teacher).__name__}"
    )


def _part(
    x: Any, student: Tensor, columns: int | None, teacher_columns: int | None, name: str
) -> Tensor:
    if x is STUDENT:
        return student.detach()[..., :columns]
    if isinstance(x, Mapped):
        return _mapped(x, student, teacher_columns)
    check_floats(x, f"teacher: {name}")
    same_device(x, f"teacher: {name}", student)
    _check_leading(x, student, name)
    return x[..., :teacher_columns]


def _check_leading(x: Tensor, student: Tensor, name: str) -> None:
    if x.dim() != student.dim() or x.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher: {name} expects leading shape {tuple(student.shape[:-1])} like the student, "
            f"got shape {tuple(x.shape)}"
        )
    if (x.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"teacher: float64 goes with float64 only, got student {student.dtype} and {x.dtype}"
        )


def _mapped(teacher: Mapped, student: Tensor, teacher_columns: int | None) -> Tensor:
    same_device(teacher.logits, "teacher", student)
    _check_leading(teacher.logits, student, "Mapped")
    logits, index = teacher.logits[..., :teacher_columns], teacher.index
    width = logits.shape[-1]
    if may_look(index) and not bool(((index >= -1) & (index < width)).all()):
        raise ValueError(f"index: Mapped expects -1 (absent) to {width - 1}")
    taken = logits.index_select(-1, index.clamp(0, width - 1)).masked_fill(index < 0, -_INFINITY)
    return taken.masked_fill((index < -1) | (index >= width), float("nan"))


def coefficient_rows(c: Any, student: Tensor, argument: str) -> Any:
    """A number, or a tensor [..., 1] in the compute dtype."""
    if not isinstance(c, Tensor):
        return float(c)
    same_device(c, argument, student)
    if c.dim() == 0:
        if may_look(c) and not c.requires_grad:
            return float(c)  # one number for all rows: fewer passes
        c = c.expand(student.shape[:-1])
    if c.shape != student.shape[:-1]:
        raise ValueError(
            f"{argument}: expected shape {tuple(student.shape[:-1])} (the student's without the "
            f"class dimension), got {tuple(c.shape)}"
        )
    return c.to(compute_dtype(student)).unsqueeze(-1)


def _logit_mix(parts: list[tuple[Any, Tensor]], student: Tensor) -> Tensor:
    dtype = compute_dtype(student)
    parts = [(coefficient_rows(c, student, "teacher: LogitMix's coefficient"), x) for c, x in parts]
    parts = [(c, x) for c, x in parts if isinstance(c, Tensor) or c != 0]
    if not parts:
        raise ValueError("teacher: every coefficient of the LogitMix is 0")
    total = dead = None
    # Without such coefficients the sum itself is -inf where a part is.
    careful = any(isinstance(c, Tensor) or c < 0 for c, _ in parts)
    for c, x in parts:
        if careful:
            gone = x == -_INFINITY
            counts = gone & (c != 0) if isinstance(c, Tensor) else gone
            dead = counts if dead is None else dead | counts
            term = c * x.masked_fill(gone, 0.0).to(dtype)
            if isinstance(c, Tensor):
                term = torch.where(c == 0, 0.0, term)
            total = term if total is None else total + term
        elif total is None:
            total = c * x.to(dtype)
        elif x.requires_grad or total.requires_grad or functorch_active():
            total = torch.add(total, x, alpha=c)
        else:
            total = total.add_(x, alpha=c)
    return total if dead is None else total.masked_fill(dead, -_INFINITY)


def _log_add(x: Tensor, y: Tensor) -> Tensor:
    """log(e^x + e^y), -inf (with gradient 0) where both are."""
    if not (x.requires_grad or y.requires_grad or functorch_active()):
        return torch.logaddexp(x, y)
    top = torch.maximum(x, y).detach()
    top = top.masked_fill(top == -_INFINITY, 0.0)
    total = (x - top).exp() + (y - top).exp()
    none = total == 0
    return (total.masked_fill(none, 1.0).log() + top).masked_fill(none, -_INFINITY)


def log_softmax(x: Tensor) -> Tensor:
    """log softmax over the last dimension; a row of only -inf stays one."""
    top = x.detach().amax(-1, keepdim=True)
    if may_look(x) and bool((top > -_INFINITY).all()):
        return x.log_softmax(-1)
    x = x - top.masked_fill(top == -_INFINITY, 0.0)
    total = x.exp().sum(-1, keepdim=True)
    return x - total.masked_fill(total == 0, 1.0).log()


def _probability_mix(
    mix: ProbMix, parts: list[tuple[Any, Tensor]], student: Tensor, temperature: float | Tensor
) -> Tensor:
    dtype = compute_dtype(student)
    tau = coefficient_rows(temperature, student, "teacher_temperature")
    argument = "teacher: ProbMix's coefficient"
    parts = [(coefficient_rows(c, student, argument), x) for c, x in parts]
    label_weight = coefficient_rows(mix.label_weight, student, "label_weight")
    _check_sum([c for c, _ in parts] + [label_weight], student)
    total = None
    for c, x in parts:
        if not isinstance(c, Tensor):
            if c == 0:
                continue
            c = torch.tensor(c, dtype=dtype, device=student.device)
        x = x.to(dtype)
        part = log_softmax(x if isinstance(tau, float) and tau == 1.0 else x / tau) + c.log()
        total = part if total is None else _log_add(total, part)
    if total is None:
        total = torch.full_like(parts[0][1], -_INFINITY, dtype=dtype)
    if mix.labels is None:
        return total
    return _with_label(total, mix.labels, label_weight, student)


def _with_label(total: Tensor, labels: Tensor, weight: Any, student: Tensor) -> Tensor:
    """log(e^total + weight onehot(labels))."""
    same_device(labels, "labels", student)
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels: ProbMix expects shape {tuple(student.shape[:-1])}, got {tuple(labels.shape)}"
        )
    width = total.shape[-1]
    labels = labels.to(torch.int64).unsqueeze(-1)
    wrong = (labels != -100) & ((labels < 0) | (labels >= width))
    if may_look(labels) and bool(wrong.any()):
        raise ValueError(f"labels: ProbMix expects -100 or 0 to {width - 1}")
    if not isinstance(weight, Tensor):
        weight = torch.tensor(weight, dtype=total.dtype, device=total.device)
    index = labels.clamp(0, width - 1)
    hot = _log_add(total.gather(-1, index), weight.log().expand(labels.shape))
    hot = torch.where(labels == -100, total.gather(-1, index), hot)
    return total.scatter(-1, index, hot.masked_fill(wrong, float("nan")))


def _check_sum(coefficients: list[Any], student: Tensor) -> None:
    """Tensor coefficients, where they may be looked at: >= 0 and 1 together."""
    tensors = [c for c in coefficients if isinstance(c, Tensor)]
    if not tensors or not may_look(student):
        return
    total = sum(coefficients)
    if any(bool((c < 0).any()) for c in tensors) or not bool(((total - 1).abs() < 1e-4).all()):
        raise ValueError(
            "teacher: ProbMix's coefficients and label_weight must be >= 0 and 1 in sum"
        )
