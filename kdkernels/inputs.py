"""What may stand where a teacher's logits stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMS = ("log_probs", "probs", "logits")
TAILS = ("renormalize", "renormalize_both", "bucket", "ignore")
MAX_TOP_K = 4096  # kMaxTopK of csrc/common/topk.h


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
