"""What is known of each token without a loss: statistics, label log-probabilities, KL estimates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import token_stats as ops
from ..ops.common import compute_dtype
from .checks import check_floats, check_number, per_row, same_device
from .plain_call import _check_rows, _check_teacher, _columns, _labels, _mask, _may_look


class TokenStats(NamedTuple):
    """Statistics of each token, leading shape [...], without gradient.

    p = softmax(teacher / tau_t), q = softmax(student / tau_s); float32, ids int64. A row that is
    not selected is 0 everywhere. The fields of a teacher are None without one.
    """

    student_lse: Tensor  # log sum exp(student / tau_s)
    teacher_lse: Tensor | None
    student_entropy: Tensor  # - sum q log q, nats
    teacher_entropy: Tensor | None
    forward_kl: Tensor | None  # KL(p, q)
    reverse_kl: Tensor | None  # KL(q, p)
    total_variation: Tensor | None  # sum |p - q| / 2; 1 - it is the acceptance rate
    hellinger: Tensor | None  # sqrt(1 - sum sqrt(p q))
    student_label_log_prob: Tensor  # log q[label]; 0 without labels
    teacher_label_log_prob: Tensor | None
    student_argmax: Tensor  # int64; ties: the lowest id
    teacher_argmax: Tensor | None
    agreement: Tensor | None  # 1 where both argmaxes are the same id, else 0
    student_max_logit: Tensor  # not divided by the temperature
    teacher_max_logit: Tensor | None
    student_max_prob: Tensor
    teacher_max_prob: Tensor | None
    dot: Tensor | None  # sum p q
    student_square: Tensor  # sum q^2
    teacher_square: Tensor | None


# Rows of the operator's (18, N), in the order of csrc/divergence/token_stats.h.
_NUMBERS = (
    "student_lse",
    "teacher_lse",
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "total_variation",
    "hellinger",
    "student_label_log_prob",
    "teacher_label_log_prob",
    "agreement",
    "student_max_logit",
    "teacher_max_logit",
    "student_max_prob",
    "teacher_max_prob",
    "dot",
    "student_square",
    "teacher_square",
)
_OF_STUDENT = tuple(n for n in TokenStats._fields if n.startswith("student_"))


def token_stats(
    student: Tensor,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
) -> TokenStats:
    """Statistics of each token in at most two reads of the logits, without gradient.

    Args:
        student: logits [..., V]; float32, float16, bfloat16 or float64.
        teacher: logits [..., V] of any of these dtypes (float64 with float64), or None: then only
            the student's fields are there.
        labels: int64 [...]; their log-probabilities are returned. Rows with `ignore_index` are not
            selected.
        temperature, teacher_temperature: tau_s and tau_t, numbers > 0 or tensors [...] (or 0-d).
            The teacher's defaults to the student's.
        mask: bool [...]; False rows are not selected (ANDed with the labels).
        ignore_index: the label of rows that are not selected.
        vocab_size, teacher_vocab_size: valid columns of padded heads; beyond them a logit counts as
            -inf.

    Returns:
        `TokenStats`, float32 and int64 of shape [...]. forward_kl, reverse_kl, total_variation and
        hellinger have a relative error of at most 1e-5 at any student-teacher gap and are exactly 0
        for equal rows. Rows that are not selected are 0 whatever they hold. -inf logits are legal;
        a teacher row of only -inf has forward_kl, reverse_kl, total_variation, hellinger and dot 0.
        NaN or +inf in a row makes its numbers NaN and its ids 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. What only data can
            tell (label range, tensor temperatures) raises on CPU tensors in eager mode, and on CUDA
            under `kdkernels.debug()`; otherwise that row is NaN.
    """
    _check_logits(student, "student")
    if teacher is not None:
        _check_teacher(student, teacher)
    elif teacher_vocab_size is not None:
        raise ValueError("teacher_vocab_size: there is no teacher")
    leading = student.shape[:-1]
    columns = _columns(vocab_size, "vocab_size", student.shape[-1])
    teacher_columns = 0
    if teacher is not None:
        teacher_columns = _columns(teacher_vocab_size, "teacher_vocab_size", teacher.shape[-1])
        valid = columns or student.shape[-1], teacher_columns or teacher.shape[-1]
        if teacher.shape[-1] != student.shape[-1] and not (columns and teacher_columns):
            if valid[0] != valid[1]:
                raise ValueError(
                    f"teacher: the last dimension is {teacher.shape[-1]}, the student's is "
                    f"{student.shape[-1]}; for padded heads pass vocab_size and "
                    "teacher_vocab_size, the valid columns of each"
                )
    number_s, tau_s = _temperature(temperature, "temperature", student)
    number_t, tau_t = number_s, tau_s
    if teacher_temperature is not None:
        number_t, tau_t = _temperature(teacher_temperature, "teacher_temperature", student)
    if labels is not None:
        labels = _checked_labels(labels, student, columns, ignore_index)
    if mask is not None:
        mask = _mask(mask, leading, student)
    numbers = ops.StatsNumbers(
        number_s, number_t, float(_index(ignore_index)), float(columns), float(teacher_columns)
    )
    out, ids = ops.token_stats(student, teacher, labels, mask, tau_s, tau_t, numbers)
    fields = {name: out[i].view(leading) for i, name in enumerate(_NUMBERS)}
    fields["student_argmax"] = ids[0].view(leading)
    fields["teacher_argmax"] = ids[1].view(leading)
    if teacher is None:
        fields = {name: fields[name] if name in _OF_STUDENT else None for name in fields}
    return TokenStats(**fields)


def label_log_probs(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature)[label] of each token, with gradient.

    One read of the logits; the backward reads them again and writes their gradient,
    (onehot - softmax) / temperature. A full log-softmax never exists.

    Args:
        logits: [..., V]; float32, float16, bfloat16 or float64.
        labels: int64 [...], aligned with the logits (no shift). `ignore_index` gives 0.
        temperature: a number > 0 or a tensor [...] (or 0-d), with gradient.
        mask: bool [...]; False gives 0.
        ignore_index: the label of rows that are not selected.
        vocab_size: valid columns of a padded head; beyond them a logit counts as -inf.

    Returns:
        [...], float32 (float64 for float64 logits); -inf where the label's logit is -inf. Rows that
        are not selected are exactly 0 with gradient 0, whatever they hold.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. A label or a tensor
            temperature out of range raises on CPU tensors in eager mode, and on CUDA under
            `kdkernels.debug()`; otherwise that row is NaN with gradient 0.
    """
    _check_logits(logits, "logits")
    columns = _columns(vocab_size, "vocab_size", logits.shape[-1])
    number, tau = _temperature(temperature, "temperature", logits)
    labels = _checked_labels(labels, logits, columns, ignore_index)
    if mask is not None:
        mask = _mask(mask, logits.shape[:-1], logits)
    numbers = ops.LabelNumbers(number, float(_index(ignore_index)), float(columns))
    return ops.label_log_probs(logits, labels, mask, tau, numbers).view(logits.shape[:-1])


KL_ESTIMATES = ("k1", "k2", "k3", "k1_policy")


def kl_estimate(
    log_q: Tensor, log_p: Tensor, kind: str = "k1", old_log_q: Tensor | None = None
) -> Tensor:
    """An estimate of KL(q, p) from one sample y ~ q_old a token; the gradient is that of the
    expression.

    With k1 = log q - log p: "k1" k1; "k2" k1^2 / 2; "k3" exp(-k1) - 1 + k1, never negative
    (Schulman, 2020, Approximating KL Divergence); "k1_policy" sg(k1) log q, whose expected gradient
    is that of KL(q, p) where q_old = q. Each is multiplied by rho = q / sg(q_old) if `old_log_q` is
    given: rho k3 has the value of KL(q, p) and its gradient; of k2 only the gradient is that of
    KL(q, p), of k3 only the value.

    Args:
        log_q: log-probabilities of the sampled tokens under the student [...].
        log_p: under the teacher, same shape and device.
        kind: "k1", "k2", "k3" or "k1_policy".
        old_log_q: under the policy that sampled them; it is a constant.

    Returns:
        [...], in the wider dtype of the arguments, at least float32.

    Raises:
        ValueError: unknown kind, other shape or device.
        TypeError: not floating-point tensors.
    """
    if kind not in KL_ESTIMATES:
        raise ValueError(f"kind: expected one of {', '.join(KL_ESTIMATES)}, got {kind!r}")
    check_floats(log_q, "log_q")
    for name, tensor in (("log_p", log_p), ("old_log_q", old_log_q)):
        if tensor is None and name == "old_log_q":
            continue
        check_floats(tensor, name)
        same_device(tensor, name, log_q)
        if tensor.shape != log_q.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(log_q.shape)} like log_q, got {tuple(tensor.shape)}"
            )
    dtype = torch.promote_types(compute_dtype(log_q), compute_dtype(log_p))
    log_q, log_p = log_q.to(dtype), log_p.to(dtype)
    k1 = log_q - log_p
    if kind == "k1":
        value = k1
    elif kind == "k2":
        value = k1 * k1 / 2
    elif kind == "k3":
        value = torch.expm1(-k1) + k1
    else:
        value = k1.detach() * log_q
    if old_log_q is None:
        return value
    return (log_q - old_log_q.detach().to(dtype)).exp() * value


# Pieces. ----------------------------------------------------------------------------------------


def _check_logits(logits: Tensor, argument: str) -> None:
    check_floats(logits, argument)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{argument}: expected shape [..., V], V >= 1, got {tuple(logits.shape)}")


def _index(ignore_index: int) -> int:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    return ignore_index


def _temperature(
    temperature: float | Tensor, argument: str, logits: Tensor
) -> tuple[float, Tensor | None]:
    """(number, None) or (1, rows (N,))."""
    if not isinstance(temperature, Tensor):
        return check_number(temperature, argument, positive=True), None
    rows = per_row(temperature, argument, logits.shape[:-1], logits, compute_dtype(logits))
    _check_rows(rows, argument)
    return 1.0, rows


def _checked_labels(labels: Tensor, logits: Tensor, columns: int, ignore_index: int) -> Tensor:
    """(N,) int64; their range where it may be looked at."""
    rows = _labels(labels, logits.shape[:-1], logits)
    if rows.numel() and _may_look(rows):
        columns = columns or logits.shape[-1]
        bad = (rows != _index(ignore_index)) & ((rows < 0) | (rows >= columns))
        if bool(bad.any()):
            raise ValueError(
                f"labels: expected 0 to {columns - 1} or {ignore_index}, got {int(rows[bad][0])}"
            )
    return rows
