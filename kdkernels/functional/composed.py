"""`divergence` with the options that its kernels do not know, composed from calls of the plain one.

Some options only change what the kernels read (another teacher row, another temperature, a few
columns): one plain call. Sums over teachers or over kinds that do not share a pass are one call of
the kernels' sums where that fits (`summed`), else that many plain calls, each with its gradient
made in the forward pass; where the sum must be looked at before it is reduced (a token bound on a
sum, a quantile), the calls give row values and the reduction is torch's (`reduce_rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import Clip, LogitMix, Mapped, ProbMix, TopK
from ..ops.common import compute_dtype
from .checks import check_floats, check_number, per_row, same_device
from .kinds import KINDS, parts_of
from .mixed_teacher import teacher_logits
from .reduction import check_reduction, reduce_rows, row_quantile, selected_rows
from .summed import fits, summed
from .support import Cells, check_stored, parse_support, row_spread

_LABEL_ALONE = (("entropy", 0.0),)
_NOTHING = "kind, teacher_weights: every coefficient is 0"


class Part(NamedTuple):
    """One plain call and what its loss is multiplied by."""

    coefficient: float | Tensor  # a tensor is 0-d or of the leading shape
    student: Tensor
    teacher: Tensor | None
    options: dict[str, Any]
    # "ignore": D of the renormalised teacher becomes mass x D + shift.
    mass: Tensor | None = None
    shift: Tensor | None = None


def composed(
    divergence: Callable[..., Tensor],
    student: Tensor,
    teacher: Any,
    kind: Any,
    *,
    beta: Any,
    alpha: Any,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    temperature_squared: bool,
    standardize: bool,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    weight: Tensor | None,
    label_weight: float,
    clip: Any,
    support: Any,
    detach_mixture: bool,
    reduction: str,
    normalize: str,
    num_items: Any,
    vocab_size: int | None,
    teacher_vocab_size: int | None,
    class_dim: int,
    teacher_weights: Any,
    inplace: bool,
) -> Tensor:
    """See `divergence`, which is the first argument."""
    check_floats(student, "student")
    if class_dim != -1:
        class_dim = _check_class_dim(class_dim, student, inplace)
        student, teacher = student.movedim(class_dim, -1), _moved(teacher, class_dim)
    bounds = clip if isinstance(clip, Clip) else Clip(token=clip)
    if bounds.quantile is not None:
        check_number(bounds.quantile, "clip: quantile", positive=True)
        if bounds.quantile >= 1:
            raise ValueError(f"clip: quantile: expected a number in (0, 1), got {bounds.quantile}")
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
        leading = student.shape[:-1]
        weight = per_row(weight, "weight", leading, student, compute_dtype(student)).view(leading)
    check_number(label_weight, "label_weight")
    check_reduction(reduction, normalize, num_items)
    rows = {
        "labels": labels,
        "ignore_index": ignore_index,
        "mask": mask,
        "num_items": num_items,
        "normalize": normalize,
        "reduction": reduction,
    }
    parts = _parts(
        student,
        teacher,
        kind,
        beta=beta,
        alpha=alpha,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        standardize=standardize,
        teacher_bias=teacher_bias,
        support=support,
        detach_mixture=detach_mixture,
        vocab_size=vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        teacher_weights=teacher_weights,
        selected=None
        if labels is None and mask is None
        else selected_rows(labels, mask, ignore_index, student[..., 0]),
    )
    # The kernels see the whole temperature, so tau^2 is made here.
    stored = any(
        isinstance(one, TopK)
        for one in (teacher if isinstance(teacher, (list, tuple)) else [teacher])
    )
    cells = support is not None or stored
    hidden = standardize or cells
    squared = bool(temperature_squared)
    plain = len(parts) == 1 and not isinstance(parts[0].coefficient, Tensor)
    plain = plain and parts[0].coefficient == 1.0
    by_rows = (
        bounds.quantile is not None
        or (bounds.token is not None and not plain)
        or (squared and hidden and isinstance(temperature, Tensor))
        or (normalize == "weights" and not plain)
        or any(part.mass is not None for part in parts)
    )
    one_pass = not (by_rows or hidden or plain) and fits(student, parts, inplace)
    if inplace and (by_rows or hidden or not (plain or one_pass)):
        raise ValueError(
            "inplace: not with standardize, support, a quantile, or several teachers or sums that "
            "one pass does not serve (docs/divergence.md)"
        )
    label_alone = {
        "student": student,
        "teacher": None,
        "kind": _LABEL_ALONE,
        "label_weight": label_weight,
        "vocab_size": vocab_size,
    }
    if by_rows:
        return _by_rows(
            divergence, parts, label_alone, rows, bounds, weight,
            _squares(temperature) if squared else None,
        )  # fmt: skip
    if one_pass:
        options = {**rows, "clip": bounds, "weight": weight, "temperature_squared": squared}
        return summed(student, parts, label_alone, options, inplace)
    outer = _squares(temperature) if squared and hidden else 1.0
    label_left = label_weight
    total = None
    for part in parts:
        c = part.coefficient
        if not isinstance(c, Tensor):
            c = c * outer
            if c == 0:
                continue
        options = {**part.options, **rows, "clip": bounds, "weight": weight, "inplace": inplace}
        options["temperature_squared"] = squared and not hidden
        if label_left and not cells and not isinstance(c, Tensor):
            options["label_weight"] = label_left / c
            label_left = 0.0
        if isinstance(c, Tensor) and c.dim() > 0:
            c = c.to(compute_dtype(student))
            options["weight"] = c if weight is None else c * weight
            c = outer
        loss = divergence(part.student, part.teacher, **options)
        if isinstance(c, Tensor) or c != 1.0:
            loss = loss * (c.to(loss.dtype) if isinstance(c, Tensor) else c)
        if isinstance(part.coefficient, Tensor) and part.coefficient.dim() == 0 and outer != 1.0:
            loss = loss * outer
        total = loss if total is None else total + loss
    if label_left:
        label = divergence(**label_alone, **rows, weight=weight)
        total = label if total is None else total + label
    if total is None:
        raise ValueError(_NOTHING)
    return total


def _by_rows(
    divergence: Callable[..., Tensor],
    parts: list[Part],
    label_alone: dict[str, Any],
    rows: dict[str, Any],
    bounds: Clip,
    weight: Tensor | None,
    squares: float | Tensor | None,
) -> Tensor:
    """Row values first, then bounds, tau^2, label, weight and reduction."""
    chosen = {name: rows[name] for name in ("labels", "ignore_index", "mask")}
    total = None
    for part in parts:
        c = part.coefficient
        if not isinstance(c, Tensor) and c == 0:
            continue
        element = bounds._replace(token=None, quantile=None)
        value = divergence(
            part.student, part.teacher, **part.options, **chosen, clip=element, reduction="none"
        )
        if part.mass is not None:
            value = part.mass * value + part.shift
        if isinstance(c, Tensor) or c != 1.0:
            value = torch.where(c == 0, 0.0, c * value) if isinstance(c, Tensor) else c * value
        total = value if total is None else total + value
    if total is None:
        if not label_alone["label_weight"]:
            raise ValueError(_NOTHING)
        like = label_alone["student"]
        total = torch.zeros(like.shape[:-1], dtype=compute_dtype(like), device=like.device)
    selected = selected_rows(rows["labels"], rows["mask"], rows["ignore_index"], total)
    # What mass and shift made of unselected rows.
    total = torch.where(selected, total, 0.0)
    bound = None
    if bounds.quantile is not None:
        bound = row_quantile(total, selected, bounds.quantile)
    if bounds.token is not None:
        token = check_number(bounds.token, "clip: token", positive=True)
        bound = token if bound is None else bound.clamp(max=token)
    if bound is not None:
        total = torch.where(total > bound, bound, total)
    if squares is not None:
        total = total * (squares.to(total.dtype) if isinstance(squares, Tensor) else squares)
    if label_alone["label_weight"]:
        total = total + divergence(**label_alone, **chosen, reduction="none")
    return reduce_rows(
        total, selected, weight, rows["reduction"], rows["normalize"], rows["num_items"]
    )


def _squares(temperature: float | Tensor) -> float | Tensor:
    return temperature * temperature


def _parts(
    student: Tensor,
    teacher: Any,
    kind: Any,
    *,
    beta: Any,
    alpha: Any,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    standardize: bool,
    teacher_bias: Tensor | None,
    support: Any,
    detach_mixture: bool,
    vocab_size: int | None,
    teacher_vocab_size: int | None,
    teacher_weights: Any,
    selected: Tensor | None,
) -> list[Part]:
    several = isinstance(teacher, (list, tuple))
    teachers = list(teacher) if several else [teacher]
    if not teachers:
        raise ValueError("teacher: expected at least one, got an empty list")
    weights = _weights(teacher_weights, len(teachers), several, student)
    kinds = parts_of(kind, beta, alpha)
    tau_t = temperature if teacher_temperature is None else teacher_temperature
    parts = []
    cells = None
    for coefficient, one in zip(weights, teachers):
        z, tau_s, columns = student, temperature, vocab_size
        a, tau, teacher_columns, tempered = None, tau_t, None, False
        mass = log_mass = None
        if isinstance(one, TopK):
            given = (support, teacher_bias, teacher_vocab_size, standardize or None)
            if any(option is not None for option in given):
                raise ValueError(
                    "teacher: a kd.TopK goes without support, teacher_bias, teacher_vocab_size and "
                    "standardize"
                )
            ids, tail = check_stored(one, student, tau)
            _check_tail(tail, kinds, one.values)
            if selected is not None:
                z = torch.where(selected.unsqueeze(-1), z, 0.0)
            z = z[..., :columns]
            stored = Cells(ids, tail, z.shape[-1], selected)
            a, mass, log_mass = stored.stored(one, student, tau)
            z = stored.logits(z, tau_s, True)
            tau_s = tau = 1.0
            columns = None
        elif one is not None:
            a, teacher_columns, tempered = teacher_logits(
                one, student, vocab_size, teacher_vocab_size, tau_t, selected
            )
        elif teacher_vocab_size is not None:
            raise ValueError("teacher_vocab_size: there is no teacher")
        if tempered:
            tau = 1.0
            if standardize or teacher_bias is not None:
                option = "standardize" if standardize else "teacher_bias"
                raise ValueError(f"{option}: a kd.ProbMix has no logits to change")
        if teacher_bias is not None:
            a = _biased(a, teacher_bias)
        if standardize:
            tau_s = tau_s * row_spread(z, columns)
            if a is not None:
                tau = tau * row_spread(a, teacher_columns)
        if support is not None:
            z, a = z[..., :columns], None if a is None else a[..., :teacher_columns]
            if selected is not None:  # torch's derivative of other rows must not be 0 * NaN
                keep = selected.unsqueeze(-1)
                z, a = (None if x is None else torch.where(keep, x, 0.0) for x in (z, a))
            if cells is None:
                ids, tail = parse_support(support, student)
                _check_tail(tail, kinds, a)
                cells = Cells(ids, tail, z.shape[-1], selected)
            if a is not None and a.shape[-1] != z.shape[-1]:
                raise ValueError(
                    f"teacher: {a.shape[-1]} columns, the student has {z.shape[-1]}; a support "
                    "needs one vocabulary"
                )
            z = cells.logits(z, tau_s, True)
            if a is not None:
                if cells.tail == "ignore":
                    mass, log_mass = cells.mass(a, tau)
                a = cells.logits(a, tau, cells.tail == "bucket")
            tau_s = tau = 1.0
            columns = teacher_columns = None
        for factor, name, parameters in kinds:
            options = {
                "kind": name,
                **parameters,
                "temperature": tau_s,
                "teacher_temperature": None if a is None else tau,
                "detach_mixture": detach_mixture and "skew_reverse_kl" in name,
                "vocab_size": columns,
                "teacher_vocab_size": teacher_columns,
            }
            c = coefficient if factor == 1.0 else coefficient * factor
            by = None
            if mass is not None:
                some = mass > 0
                shift = torch.where(some, mass * torch.where(some, log_mass, 0.0), 0.0)
                by = _forward_kl_share(name) * shift
            parts.append(Part(c, z, a, options, mass, by))
    return parts


def _forward_kl_share(kind: Any) -> float:
    pairs = ((kind, 1.0),) if isinstance(kind, str) else kind
    return float(sum(c for n, c in pairs if n == "forward_kl"))


def _check_tail(tail: str, kinds: list, teacher: Tensor | None) -> None:
    """Kinds that a lumped cell, or a row that does not add up to 1, would falsify."""
    names = {
        n
        for _, kind, _ in kinds
        for n in ([kind] if isinstance(kind, str) else [p[0] for p in kind])
    }
    allowed = set(KINDS)
    if tail == "renormalize":
        allowed -= {"entropy", "alpha_beta"}
    if tail == "ignore":
        allowed = {"forward_kl", "cross_entropy"}
    wrong = sorted(names - allowed)
    if wrong:
        raise ValueError(f"support: tail {tail!r} has no {', '.join(wrong)}")
    if teacher is None and tail in ("renormalize", "ignore"):
        raise ValueError(f"support: tail {tail!r} needs a teacher")


def _weights(given: Any, count: int, several: bool, student: Tensor) -> list[float | Tensor]:
    """One coefficient a teacher: numbers, or tensors that are 0-d or of the leading shape."""
    if given is None:
        return [1.0] * count
    if not several:
        raise ValueError("teacher_weights: goes with a list of teachers")
    if isinstance(given, (list, tuple)):
        if len(given) != count:
            raise ValueError(f"teacher_weights: expected {count} numbers, got {len(given)}")
        return [check_number(c, "teacher_weights") for c in given]
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(
            "teacher_weights: expected numbers or a floating-point tensor [K] or [..., K], got "
            f"{given.dtype if isinstance(given, Tensor) else type(given).__name__}"
        )
    same_device(given, "teacher_weights", student)
    if given.shape not in ((count,), (*student.shape[:-1], count)):
        raise ValueError(
            f"teacher_weights: expected shape ({count},) or "
            f"{(*student.shape[:-1], count)}, got {tuple(given.shape)}"
        )
    return list(given.unbind(-1))


def _biased(teacher: Tensor | None, bias: Tensor) -> Tensor:
    if teacher is None:
        raise ValueError("teacher_bias: there is no teacher")
    check_floats(bias, "teacher_bias")
    same_device(bias, "teacher_bias", teacher)
    if bias.shape != teacher.shape[-1:]:
        raise ValueError(
            f"teacher_bias: expected shape {tuple(teacher.shape[-1:])}, got {tuple(bias.shape)}"
        )
    return teacher + bias.to(compute_dtype(teacher))


def _check_class_dim(class_dim: int, student: Tensor, inplace: bool) -> int:
    if isinstance(class_dim, bool) or not isinstance(class_dim, int):
        raise TypeError(f"class_dim: expected an int, got {type(class_dim).__name__}")
    if not -student.dim() <= class_dim < student.dim():
        raise ValueError(
            f"class_dim: expected {-student.dim()} to {student.dim() - 1}, got {class_dim}"
        )
    if inplace:
        raise ValueError("inplace: not with class_dim; the kernels read rows of classes")
    return class_dim


def _moved(teacher: Any, dim: int) -> Any:
    """A teacher with its class dimension at the end."""
    if isinstance(teacher, Tensor):
        if not -teacher.dim() <= dim < teacher.dim():
            raise ValueError(f"class_dim: the teacher of shape {tuple(teacher.shape)} has no {dim}")
        return teacher.movedim(dim, -1)
    if isinstance(teacher, (list, tuple)):
        return [_moved(one, dim) for one in teacher]
    if isinstance(teacher, Mapped):
        return Mapped(_moved(teacher.logits, dim), teacher.index)
    if isinstance(teacher, ProbMix):
        parts = [(c, _moved(x, dim)) for c, x in teacher.parts]
        return ProbMix(parts, teacher.labels, teacher.label_weight)
    if isinstance(teacher, LogitMix):
        return LogitMix([(c, _moved(x, dim)) for c, x in teacher.parts])
    return teacher  # a TopK keeps its entries in the last dimension
