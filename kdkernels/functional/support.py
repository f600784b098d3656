"""Rows restricted to some columns, and rows standardised: both become plain logits and temperatures
that the kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import TopK
from ..ops.common import compute_dtype
from .checks import may_look, same_device
from .mixed_teacher import coefficient_rows, log_softmax

_INFINITY = float("inf")
TAILS = ("bucket", "renormalize", "renormalize_both", "ignore")


def row_spread(logits: Tensor, columns: int | None) -> Tensor:
    """Population standard deviation [...] over each row's possible (not -inf) valid entries, with
    gradient. 1 where it is 0: a constant row is uniform at any temperature."""
    x = logits[..., :columns].to(compute_dtype(logits))
    # The deviation's derivative by the mean is 0, so the mean may be a constant.
    mean = x.detach().mean(-1, keepdim=True)
    if may_look(x) and bool(mean.isfinite().all()):
        spread = torch.linalg.vector_norm(x - mean, dim=-1) / x.shape[-1] ** 0.5
    else:
        possible = x.detach().abs() < _INFINITY
        count = possible.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(possible, x.detach(), 0.0).sum(-1, keepdim=True) / count
        centred = torch.where(possible, x - mean, 0.0)
        spread = torch.linalg.vector_norm(centred, dim=-1) / count.squeeze(-1).to(x.dtype).sqrt()
    return torch.where(spread == 0, 1.0, spread)


def parse_support(support: object, student: Tensor) -> tuple[Tensor, str]:
    """(ids, tail), checked without reading data."""
    ids, tail = support if isinstance(support, (tuple, list)) else (support, "bucket")
    if not isinstance(ids, Tensor):
        raise TypeError(f"support: expected ids [..., K] or (ids, tail), got {type(ids).__name__}")
    same_device(ids, "support", student)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"support: expected int64 ids, got {ids.dtype}")
    if ids.dim() != student.dim() or ids.shape[:-1] != student.shape[:-1] or ids.shape[-1] < 1:
        raise ValueError(
            f"support: expected ids of shape {tuple(student.shape[:-1])} + (K,), got "
            f"{tuple(ids.shape)}"
        )
    if tail not in TAILS:
        raise ValueError(f"support: expected a tail of {', '.join(TAILS)}, got {tail!r}")
    return ids.to(torch.int64), tail


class Cells:
    """Both rows on the columns `ids` and, where the tail asks for it, one cell for all others."""

    def __init__(self, ids: Tensor, tail: str, width: int, selected: Tensor | None):
        self.tail = tail
        self.width = width
        self.absent = ids < 0  # only -1: checked below
        self.index = ids.clamp(0, width - 1)
        ordered = ids.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        outside = (ids < -1) | (ids >= width)
        self.broken = twice.any(-1) | outside.any(-1)
        if selected is not None:
            self.broken = self.broken & selected
        if may_look(ids) and bool(self.broken.any()):
            raise ValueError(
                f"support: expected distinct ids, each -1 (absent) or 0 to {width - 1}, in every "
                "selected row"
            )
        self.with_rest = tail != "renormalize_both" and not (
            tail == "bucket" and ids.shape[-1] == width and may_look(ids) and not self.absent.any()
        )
        inside = torch.zeros(*ids.shape[:-1], width + 1, dtype=torch.bool, device=ids.device)
        where = self.index.masked_fill(self.absent, width)
        self.inside = inside.scatter(-1, where, True)[..., :width]

    def logits(self, x: Tensor, temperature: float | Tensor, rest: bool) -> Tensor:
        """[..., K] or [..., K + 1] of x [..., V], divided by the temperature."""
        tau = coefficient_rows(temperature, x, "temperature")
        kept = x.gather(-1, self.index).to(compute_dtype(x))
        kept = torch.where(
            kept == -_INFINITY, kept, torch.where(kept == -_INFINITY, 0.0, kept) / tau
        )
        kept = kept.masked_fill(self.absent, -_INFINITY)
        kept = kept.masked_fill(self.broken.unsqueeze(-1), float("nan"))
        if not self.with_rest:
            return kept
        if not rest:
            return torch.cat([kept, torch.full_like(kept[..., :1], -_INFINITY)], -1)
        return torch.cat([kept, _log_sum(x, ~self.inside, tau)], -1)

    def mass(self, x: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """(P, log P) of the columns in the whole row, [...] each."""
        cells = log_softmax(self.logits(x, temperature, True))
        log_mass = _log_sum(
            cells[..., :-1], torch.ones_like(cells[..., :-1], dtype=torch.bool), 1.0
        )
        return log_mass.exp().squeeze(-1), log_mass.squeeze(-1)

    def stored(
        self, teacher: TopK, student: Tensor, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(cells of a stored teacher, P, log P); the last two for tail "ignore" alone."""
        tau = coefficient_rows(temperature, student, "teacher_temperature")
        again = teacher.generation_temperature / tau  # what stored log-probabilities are raised to
        values = teacher.values.to(compute_dtype(student))
        values = values.masked_fill(self.absent | self.broken.unsqueeze(-1), -_INFINITY)
        if teacher.form == "probs":
            gone = values <= 0  # absent ones too
            values = torch.where(gone, 1.0, values).log().masked_fill(gone, -_INFINITY)
        if teacher.form == "logits":
            values = values / teacher.generation_temperature
            if teacher.lse is not None:
                values = values - teacher.lse.to(values.dtype).unsqueeze(-1)
        every = torch.ones_like(values, dtype=torch.bool)
        log_mass = _log_sum(values, every, 1.0)
        kept = torch.where(values == -_INFINITY, 0.0, values) * again
        kept = kept.masked_fill(values == -_INFINITY, -_INFINITY)
        if not self.with_rest:
            return kept, None, None
        rest = torch.full_like(log_mass, -_INFINITY)
        if self.tail == "bucket":
            # Nothing is left where every column is stored, or rounding stored all of the mass.
            none = (log_mass >= 0) | self.inside.all(-1, keepdim=True)
            left = torch.where(none, -1.0, log_mass)
            rest = (torch.log(-torch.expm1(left)) * again).masked_fill(none, -_INFINITY)
        cells = torch.cat([kept, rest], -1)
        if self.tail == "ignore":
            log_mass = log_mass.squeeze(-1)
            return cells, log_mass.exp(), log_mass
        return cells, None, None


def check_stored(teacher: TopK, student: Tensor, tau: float | Tensor) -> tuple[Tensor, str]:
    """(ids, tail) of a stored teacher that `divergence` can read."""
    if teacher.values.shape[:-1] != student.shape[:-1] or teacher.values.dim() != student.dim():
        raise ValueError(
            f"teacher: TopK expects leading shape {tuple(student.shape[:-1])} like the student, "
            f"got shape {tuple(teacher.values.shape)}"
        )
    if not isinstance(teacher.tail, str):
        raise ValueError("teacher: a TopK with a floor has no divergence here")
    if teacher.tail in ("bucket", "ignore") and teacher.form == "logits" and teacher.lse is None:
        raise ValueError(f"teacher: TopK(form='logits', tail={teacher.tail!r}) needs lse")
    if teacher.tail == "ignore" and (
        isinstance(tau, Tensor) or tau != teacher.generation_temperature
    ):
        raise ValueError(
            "teacher_temperature: a TopK with tail 'ignore' is at its generation_temperature, "
            f"{teacher.generation_temperature}; got {tau}"
        )
    return parse_support((teacher.indices, teacher.tail), student)


def _log_sum(x: Tensor, inside: Tensor, tau: float | Tensor) -> Tensor:
    """log sum exp(x / tau) over the entries inside, [..., 1]; -inf (gradient 0) where none is."""
    if isinstance(tau, Tensor) and tau.requires_grad:  # by tau, -inf / tau is 0 * inf
        counts = inside & (x != -_INFINITY)
        scaled = torch.where(counts, x, 0.0).to(compute_dtype(x)) / tau
        scaled = torch.where(counts, scaled, -_INFINITY)
    else:
        scaled = torch.where(inside, x, -_INFINITY).to(compute_dtype(x))
        if isinstance(tau, Tensor) or tau != 1.0:
            scaled = scaled / tau
    top = scaled.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -_INFINITY, 0.0)
    total = (scaled - top).exp().sum(-1, keepdim=True)
    none = total == 0
    return (total.masked_fill(none, 1.0).log() + top).masked_fill(none, -_INFINITY)
