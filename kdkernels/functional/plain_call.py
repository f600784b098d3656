"""A plain call of `divergence`, with one dense teacher or None: validate and flatten."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import spec as S
from ..backends.registry import settings
from ..backends.spec import DivergenceSpec
from ..inputs import Clip
from ..ops import divergence as ops
from ..ops.common import compute_dtype
from .checks import check_floats, check_inplace, check_number, per_row, same_device
from .checks import may_look as _may_look
from .kinds import check_parameter, program


class Call(NamedTuple):
    """A plain call, checked and flattened: the arguments of `ops.divergence` beside the student."""

    teacher: Tensor | None
    weight: Tensor | None  # (N,) compute dtype, as the two temperatures
    tau_s: Tensor | None
    tau_t: Tensor | None
    rest: ops.Rest
    batch: int


def call(
    student,
    teacher,
    kind,
    beta=None,
    alpha=None,
    temperature=1.0,
    teacher_temperature=None,
    temperature_squared=False,
    labels=None,
    ignore_index=-100,
    mask=None,
    weight=None,
    label_weight=0.0,
    clip=None,
    detach_mixture=False,
    reduction="mean",
    normalize="rows",
    num_items=None,
    vocab_size=None,
    teacher_vocab_size=None,
    inplace=False,
) -> tuple:
    """Check and flatten a call of `divergence` with one dense teacher or None: a `Call`, as a tuple
    because every call of the library passes here."""
    check_floats(student, "student")
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"student: expected shape [..., V], V >= 1, got {tuple(student.shape)}")
    if teacher is not None:
        _check_teacher(student, teacher)
    leading = student.shape[:-1]
    batch = (leading[0] if leading else 1) or 1  # no entries: no rows, whatever divides them
    compiling = torch.compiler.is_compiling()
    tensors = (
        isinstance(beta, Tensor)
        or isinstance(alpha, Tensor)
        or isinstance(temperature, Tensor)
        or isinstance(teacher_temperature, Tensor)
        or isinstance(num_items, Tensor)
    )
    numbers = (
        kind,
        None if isinstance(beta, Tensor) else beta,
        None if isinstance(alpha, Tensor) else alpha,
        1.0 if isinstance(temperature, Tensor) else temperature,
        1.0 if isinstance(teacher_temperature, Tensor) else teacher_temperature,
        temperature_squared,
        ignore_index,
        label_weight,
        clip,
        detach_mixture,
        reduction,
        normalize,
        None if isinstance(num_items, Tensor) else num_items,
        vocab_size,
        teacher_vocab_size,
        student.shape[-1],
        None if teacher is None else teacher.shape[-1],
    )
    if compiling:
        rest = _constants(*numbers, 1)
    else:
        sequences = reduction == "batchmean" or reduction == "sequence_mean"
        try:
            rest = _cached_constants(*numbers, batch if sequences else 1)
        except (
            TypeError
        ):  # something unhashable: a list of pairs, or a wrong type, which then says so
            rest = _constants(*numbers, batch if sequences else 1)
    tau_s = tau_t = None
    if tensors:
        rest, tau_s, tau_t = _tensor_parameters(
            rest, kind, beta, alpha, temperature, teacher_temperature, num_items, student
        )
    if labels is not None:
        rest = rest._replace(labels=_labels(labels, leading, student))
    elif label_weight:
        raise ValueError("labels: needed where label_weight is not 0")
    if mask is not None:
        rest = rest._replace(mask=_mask(mask, leading, student))
    if weight is not None:
        weight = _weight(weight, leading, student, rest)
    if inplace and check_inplace(student, teacher, reduction, compiling):
        rest = rest._replace(inplace=True)
    if not compiling and settings().debug:
        _debug(student, teacher, rest.labels, rest.spec)
    return teacher, weight, tau_s, tau_t, rest, batch


def _check_teacher(student: Tensor, teacher: Tensor) -> None:
    check_floats(teacher, "teacher")
    same_device(teacher, "teacher", student)
    if teacher.shape[:-1] != student.shape[:-1] or teacher.dim() != student.dim():
        raise ValueError(
            f"teacher: expected leading shape {tuple(student.shape[:-1])} like the student, got "
            f"shape {tuple(teacher.shape)}"
        )
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"teacher: float64 goes with float64 only, got student {student.dtype} and teacher "
            f"{teacher.dtype}"
        )


def _constants(
    kind,
    beta,
    alpha,
    temperature,
    teacher_temperature,
    temperature_squared,
    ignore_index,
    label_weight,
    clip,
    detach_mixture,
    reduction,
    normalize,
    num_items,
    vocab_size,
    teacher_vocab_size,
    width,
    teacher_width,
    batch,
) -> ops.Rest:
    """Everything about a call that is neither a tensor nor depends on one, checked."""
    described = program(kind, beta, alpha, detach_mixture)
    spec = _spec(
        described.numbers,
        temperature,
        teacher_temperature,
        temperature_squared,
        ignore_index,
        label_weight,
        clip,
        reduction,
        normalize,
        num_items,
        vocab_size,
        teacher_vocab_size,
        width,
        teacher_width,
    )
    nothing = not (spec.kind and spec.other) and not any(spec[:4])
    if nothing:
        if not spec.label_weight:
            raise ValueError(f"kind: every coefficient is 0, got {kind!r}")
        spec = spec._replace(**_NO_KIND)  # the cross entropy with the labels alone
    reads = spec.kind or spec.forward_kl or spec.reverse_kl or spec.cross_entropy
    if teacher_width is None and reads:
        raise ValueError(f"teacher: None is for kind 'entropy' alone, got kind {kind!r}")
    if teacher_width is not None and not reads and not nothing:
        raise ValueError(f"teacher: kind {kind!r} has no teacher; pass None")
    return ops.Rest(None, None, None, None, None, spec._replace(batch=float(batch)), False, False)


# typed: True and 1 are different arguments, and one of them is an error.
_cached_constants = lru_cache(maxsize=512, typed=True)(_constants)


def _tensor_parameters(
    rest, kind, beta, alpha, temperature, teacher_temperature, num_items, student
):
    """Per-row parameters and the divisor that are tensors: (rest, tau_s, tau_t)."""
    leading = student.shape[:-1]
    dtype = compute_dtype(student)
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        described = program(kind, beta, alpha, bool(rest.spec.detach_mixture))
        # A parameter in a tensor may be at a limit in some rows: the general kind serves them all.
        rest = rest._replace(spec=rest.spec._replace(**{**_NO_KIND, **described.numbers}))
        for field, (argument, tensor) in described.tensors.items():
            if tensor.requires_grad:
                raise ValueError(f"{argument}: a constant of the loss; it must not require grad")
            rows = per_row(tensor, argument, leading, student, dtype)
            _check_rows(rows, argument, described.names)
            rest = rest._replace(**{field: rows})
    tau_s = tau_t = None
    if isinstance(temperature, Tensor):
        tau_s = per_row(temperature, "temperature", leading, student, dtype)
        _check_rows(tau_s, "temperature")
    if isinstance(teacher_temperature, Tensor):
        tau_t = per_row(teacher_temperature, "teacher_temperature", leading, student, dtype)
        _check_rows(tau_t, "teacher_temperature")
    elif teacher_temperature is None:
        tau_t = tau_s
    if isinstance(num_items, Tensor):
        reduction = S.NAMES[int(rest.spec.reduction)]
        rest = rest._replace(num_items=_num_items(num_items, reduction, student, dtype))
    return rest, tau_s, tau_t


_NO_KIND = {
    field: DivergenceSpec._field_defaults[field]
    for field in (
        "forward_kl",
        "reverse_kl",
        "cross_entropy",
        "entropy",
        "kind",
        "other",
        "first",
        "second",
        "detach_mixture",
        "outer",
    )
}


def _spec(
    numbers,
    temperature,
    teacher_temperature,
    temperature_squared,
    ignore_index,
    label_weight,
    clip,
    reduction,
    normalize,
    num_items,
    vocab_size,
    teacher_vocab_size,
    width,
    teacher_width,
) -> DivergenceSpec:
    """Every number of the call, checked."""
    tau = check_number(temperature, "temperature", positive=True)
    teacher_tau = tau
    if teacher_temperature is not None:
        teacher_tau = check_number(teacher_temperature, "teacher_temperature", positive=True)
    if reduction not in S.REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(S.REDUCTIONS)}, got {reduction!r}")
    if normalize not in ("rows", "weights"):
        raise ValueError(f"normalize: expected 'rows' or 'weights', got {normalize!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if num_items is not None:
        num_items = check_number(num_items, "num_items", positive=True)
        if reduction != "mean":
            raise ValueError(f"num_items: goes with reduction 'mean', got {reduction!r}")
    bounds = clip if isinstance(clip, Clip) else Clip(token=clip)
    token, element = (
        0.0 if bound is None else check_number(bound, f"clip{name}", positive=True)
        for bound, name in ((bounds.token, ""), (bounds.element, ": element"))
    )
    columns = _columns(vocab_size, "vocab_size", width)
    teacher_columns = 0
    if teacher_width is not None:
        teacher_columns = _columns(teacher_vocab_size, "teacher_vocab_size", teacher_width)
        valid = (columns or width, teacher_columns or teacher_width)
        named = columns and teacher_columns
        if teacher_width != width and not named and valid[0] != valid[1]:
            raise ValueError(
                f"teacher: the last dimension is {teacher_width}, the student's is {width}; for "
                "padded heads pass vocab_size and teacher_vocab_size, the valid columns of each"
            )
    elif teacher_vocab_size is not None:
        raise ValueError("teacher_vocab_size: there is no teacher")
    return DivergenceSpec(
        **numbers,
        student_temperature=tau,
        teacher_temperature=teacher_tau,
        temperature_squared=float(bool(temperature_squared)),
        label_weight=check_number(label_weight, "label_weight"),
        ignore_index=float(ignore_index),
        clip_token=token,
        clip_element=element,
        clip_signed=float(bool(bounds.signed)),
        reduction=float(S.REDUCTIONS[reduction]),
        normalize_weights=float(normalize == "weights"),
        num_items=num_items or 0.0,
        student_columns=float(columns),
        teacher_columns=float(teacher_columns),
    )


def _columns(size, argument: str, width) -> int:
    """Valid columns; 0 for all of them, so that the spec does not depend on V."""
    if size is None:
        return 0
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{argument}: expected an int, got {type(size).__name__}")
    if not 1 <= size <= width:
        raise ValueError(f"{argument}: expected 1 to {width} (the last dimension), got {size}")
    return size


def _labels(labels: Tensor, leading: torch.Size, student: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    same_device(labels, "labels", student)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if labels.shape != leading:
        raise ValueError(
            f"labels: expected shape {tuple(leading)} (the student's without the class dimension), "
            f"got {tuple(labels.shape)}"
        )
    return labels.to(torch.int64).reshape(-1).contiguous()


def _weight(weight: Tensor, leading: torch.Size, student: Tensor, rest: ops.Rest) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    weight = per_row(weight, "weight", leading, student, compute_dtype(student))
    if _may_look(weight) and bool(weight.detach().isnan().any()):
        broken = weight.detach().isnan()
        if rest.labels is not None:
            broken = broken & (rest.labels != int(rest.spec.ignore_index))
        if bool((broken if rest.mask is None else broken & rest.mask).any()):
            raise ValueError("weight: NaN in a selected row")
    return weight


def _mask(mask: Tensor, leading: torch.Size, student: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    same_device(mask, "mask", student)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    if mask.shape != leading:
        raise ValueError(f"mask: expected shape {tuple(leading)}, got {tuple(mask.shape)}")
    return mask.reshape(-1).contiguous()


def _num_items(num_items: Tensor, reduction: str, student: Tensor, dtype: torch.dtype) -> Tensor:
    if num_items.dim() != 0:
        raise ValueError(f"num_items: expected a 0-d tensor, got shape {tuple(num_items.shape)}")
    if reduction != "mean":
        raise ValueError(f"num_items: goes with reduction 'mean', got {reduction!r}")
    if num_items.requires_grad:
        raise ValueError("num_items: a constant of the loss; it must not require grad")
    items = num_items.to(device=student.device, dtype=dtype)
    if _may_look(num_items) and not bool(num_items > 0):
        raise ValueError(f"num_items: expected a number > 0, got {num_items.item()!r}")
    return items


def _check_rows(rows: Tensor, argument: str, names: tuple[str, ...] = ()) -> None:
    """Data of a per-row parameter, where it may be looked at."""
    if not _may_look(rows) or rows.numel() == 0:
        return
    low, high = (float(x) for x in torch.aminmax(rows.detach()))
    if argument in ("temperature", "teacher_temperature"):
        if not (low > 0.0 and high < float("inf")):
            raise ValueError(f"{argument}: expected finite numbers > 0, got {low!r} to {high!r}")
    else:
        for name in names:
            check_parameter(name, argument, low)
            check_parameter(name, argument, high)


def _debug(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, spec: DivergenceSpec
) -> None:
    """kd.debug(): look at the data whatever it costs."""
    if labels is not None and spec.label_weight:
        chosen = labels[labels != int(spec.ignore_index)]
        columns = int(spec.student_columns) or student.shape[-1]
        if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < columns):
            raise ValueError(
                f"labels: expected 0 to {columns - 1} or ignore_index, got "
                f"{int(chosen.min())} to {int(chosen.max())}"
            )
    for argument, tensor in (("student", student), ("teacher", teacher)):
        if tensor is not None and bool(torch.isnan(tensor).any()):
            raise ValueError(f"{argument}: contains NaN")
