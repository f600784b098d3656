"""What may stand where a teacher's logits stand, and how a row's divergence may be bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Coefficient = float | Tensor


class Clip(NamedTuple):
    """Bounds of a divergence; above a bound the gradient is 0.

    Attributes:
        token: min(D, token) for each row's D.
        element: sum of min(l_i, element) over the vocabulary. l_i are the non-negative generators
            with the same sum as D: p log(p/q) - p + q for forward KL, q log(q/p) - q + p for
            reverse KL, the kind's own summand where that is non-negative (Jensen-Shannon, total
            variation, ...). A row that would be infinite is then finite.
        quantile: a token bound from the batch: this quantile (linear interpolation) of D over the
            selected rows; a constant, without gradient.
        signed: the raw summands p log(p/q) instead of the generators, as OPSD was released (Zhao et
            al.): negative ones are never clipped, so the value may be negative and the gradient may
            point away from the teacher. Jensen-Shannon's combined summand is the same either way.
    """

    token: float | None = None
    element: float | None = None
    quantile: float | None = None
    signed: bool = False


class _Student:
    """The type of `STUDENT`."""

    def __repr__(self) -> str:
        return "kdkernels.STUDENT"


STUDENT = _Student()
"""In a mix: the detached student row of this call."""


class _Mix:
    """Parts (coefficient, logits); logits are a tensor, `Mapped` or `STUDENT`."""

    def __init__(self, parts: Sequence[tuple[Coefficient, Any]]):
        name = type(self).__name__
        if not isinstance(parts, (list, tuple)) or not parts:
            raise TypeError(
                f"{name}: expected a list of (coefficient, logits), got {type(parts).__name__}"
            )
        for part in parts:
            if not isinstance(part, (tuple, list)) or len(part) != 2:
                raise TypeError(f"{name}: expected pairs (coefficient, logits), got {part!r}")
            _check_coefficient(part[0], name)
            if not isinstance(part[1], (Tensor, Mapped, _Student)):
                raise TypeError(
                    f"{name}: expected a tensor, kd.Mapped or kd.STUDENT, got "
                    f"{type(part[1]).__name__}"
                )
        self.parts = tuple((c, x) for c, x in parts)


class LogitMix(_Mix):
    """Logits sum_k c_k x_k, of any real coefficients.

    Args:
        parts: (c_k, x_k). c_k: a number or a constant tensor of the leading shape; x_k: logits
            [..., V], `Mapped` or `STUDENT`. A part with c_k = 0 counts nothing, whatever it holds.
            An entry that is -inf in any other part is impossible in the mix.

    The mixed row is one temporary tensor of the student's size in float32 (float64 for float64).
    TAID (Shing et al., 2025) is LogitMix([(1 - t, STUDENT), (t, teacher)]).
    """


class ProbMix(_Mix):
    """Probabilities sum_k c_k softmax(x_k / tau_t) + label_weight onehot(labels).

    Args:
        parts: as of `LogitMix`, c_k >= 0. `STUDENT` is taken at the teacher's temperature.
        labels: int64 [...]; a row whose label is -100 has no one-hot.
        label_weight: a number >= 0 or a tensor of the leading shape. Coefficients and label_weight
            add up to 1 in every row.

    The mixed row is one temporary tensor of log-probabilities, of the student's size in float32
    (float64 for float64).
    """

    def __init__(
        self,
        parts: Sequence[tuple[Coefficient, Any]],
        labels: Tensor | None = None,
        label_weight: Coefficient = 0.0,
    ):
        super().__init__(parts)
        _check_coefficient(label_weight, "ProbMix", "label_weight")
        numbers = [c for c, _ in self.parts] + [label_weight]
        if any(not isinstance(c, Tensor) and c < 0 for c in numbers):
            raise ValueError("ProbMix: expected coefficients and label_weight >= 0")
        if not any(isinstance(c, Tensor) for c in numbers) and abs(sum(numbers) - 1.0) > 1e-6:
            raise ValueError(
                f"ProbMix: coefficients and label_weight must add up to 1, got {sum(numbers)!r}"
            )
        if labels is None and (isinstance(label_weight, Tensor) or label_weight != 0):
            raise ValueError("labels: ProbMix needs them where label_weight is not 0")
        if labels is not None and (
            not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32)
        ):
            raise TypeError("labels: ProbMix expects an int64 tensor")
        self.labels = labels
        self.label_weight = label_weight


class Mapped:
    """Teacher logits over another vocabulary: column j of the student is column index[j] here.

    Args:
        logits: [..., V_t].
        index: int64 [V]; -1 = absent, which counts as -inf. Columns that no student column points
            to are left out, and the softmax is over the rest.

    The mapped row is one temporary tensor of the student's width.
    """

    def __init__(self, logits: Tensor, index: Tensor):
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 1:
            raise TypeError("Mapped: expected floating-point logits [..., V]")
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            raise TypeError("index: Mapped expects an int64 tensor [V]")
        if index.dim() != 1 or index.numel() < 1:
            raise ValueError(f"index: Mapped expects shape [V], got {tuple(index.shape)}")
        if index.device != logits.device:
            raise ValueError(
                f"index: expected a tensor on {logits.device} like the logits, got {index.device}"
            )
        self.logits = logits
        self.index = index.to(torch.int64)


def _check_coefficient(c: object, name: str, argument: str = "coefficient") -> None:
    if isinstance(c, Tensor):
        if not c.is_floating_point():
            raise TypeError(f"{argument}: {name} expects a floating-point tensor, got {c.dtype}")
        if c.requires_grad:
            raise ValueError(f"{argument}: a constant of {name}; it must not require grad")
    elif isinstance(c, bool) or not isinstance(c, (int, float)):
        raise TypeError(f"{argument}: {name} expects a number or a tensor, got {type(c).__name__}")
    elif not -float("inf") < c < float("inf"):
        raise ValueError(f"{argument}: {name} expects a finite number, got {c!r}")
