"""What may stand where a teacher's logits stand, and how a row's divergence may be bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Coefficient = float | Tensor
FORMS = ("log_probs", "probs", "logits")
TAILS = ("renormalize", "renormalize_both", "bucket", "ignore")
MAX_TOP_K = 4096  # kMaxTopK of csrc/common/topk.h


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


@dataclass(frozen=True)
class TopK:
    """The K largest entries of a teacher's rows, as stored beside a data set.

    Args:
        values: [..., K], K from 1 to 4096, float: what `form` says.
        indices: [..., K] int64 or int32: vocabulary ids; -1 = absent (rows of fewer entries).
        form: "log_probs" or "probs": absolute (log-)probabilities of the full softmax at
            `generation_temperature`; "logits": raw logits.
        tail: what the rest of the vocabulary counts as: "renormalize", "renormalize_both",
            "bucket", "ignore" or ("floor", c).
        lse: [...]: log-sum-exp over the full vocabulary of logits / generation_temperature.
        generation_temperature: tau > 0 that the probabilities were made with.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    values: Tensor
    indices: Tensor
    form: str = "log_probs"
    tail: str | tuple[str, float] = "bucket"
    lse: Tensor | None = None
    generation_temperature: float = 1.0

    def __post_init__(self):
        for name in ("values", "indices"):
            given = getattr(self, name)
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
        if not self.values.is_floating_point():
            raise TypeError(f"values: expected a float tensor, got {self.values.dtype}")
        if self.indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices: expected int64 or int32, got {self.indices.dtype}")
        if self.values.dim() < 1 or not 1 <= self.values.shape[-1] <= MAX_TOP_K:
            raise ValueError(
                f"values: expected shape [..., K], K from 1 to {MAX_TOP_K}, got "
                f"{tuple(self.values.shape)}"
            )
        if self.indices.shape != self.values.shape:
            raise ValueError(
                f"indices: expected the shape of values, {tuple(self.values.shape)}, got "
                f"{tuple(self.indices.shape)}"
            )
        if self.form not in FORMS:
            raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {self.form!r}")
        floor = isinstance(self.tail, tuple) and len(self.tail) == 2 and self.tail[0] == "floor"
        if not floor and self.tail not in TAILS:
            raise ValueError(
                f"tail: expected one of {', '.join(TAILS)} or ('floor', c), got {self.tail!r}"
            )
        if self.lse is not None:
            if not isinstance(self.lse, Tensor) or not self.lse.is_floating_point():
                raise TypeError("lse: expected a float tensor or None")
            if self.lse.shape != self.values.shape[:-1]:
                raise ValueError(
                    f"lse: expected shape {tuple(self.values.shape[:-1])} (one a row), got "
                    f"{tuple(self.lse.shape)}"
                )
        tau = self.generation_temperature
        if isinstance(tau, bool) or not isinstance(tau, (int, float)):
            raise TypeError(f"generation_temperature: expected a number, got {type(tau).__name__}")
        if not 0 < tau < float("inf"):
            raise ValueError(f"generation_temperature: expected a number > 0, got {tau}")

    def logits(self, name: str = "teacher") -> Tensor:
        """The kept logits [..., K], -inf where absent; `name` is what an error calls this input.

        Raises:
            ValueError: probabilities without `lse` say nothing of the logits' level.
        """
        values = self.values
        if self.form != "logits":
            if self.lse is None:
                raise ValueError(
                    f"{name}: logits are needed; give TopK(form='logits'), or lse beside "
                    f"form={self.form!r}"
                )
            wide = torch.promote_types(values.dtype, torch.float32)
            values = values.to(wide)
            if self.form == "probs":
                values = values.log()
            values = (values + self.lse.to(wide).unsqueeze(-1)) * self.generation_temperature
        return values.masked_fill(self.indices < 0, -torch.inf)


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
