"""Graph-on-logits distillation, with its token-wise terms and several teachers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..functional.gromov import match_graphs
from ..inputs import TopK
from .registry import register
from .rows import chosen_rows, label_cross_entropy
from .selection import selected
from .uld import ULDLoss


@register(
    "graph_on_logits",
    aliases=("gld", "infigfusion"),
    paper="Wang et al., InfiGFusion: Graph-on-Logits Distillation, 2025",
    family="gromov",
    status="secondary",
)
class GraphOnLogitsLoss(nn.Module):
    """sum over teachers of w (kd.graph_on_logits + uld_weight x ULD) + label_weight x CE.

    The graphs are those of the rows that labels and mask select; ULD is `ULDLoss` on the same rows
    (k-th selected student row with k-th selected teacher row), CE the mean label cross entropy of
    the student at temperature 1. Several teachers read the student once.

    Args:
        k, standardize, aggregate, p, temperature, scope: as in `kd.graph_on_logits`; the
            temperature is student's and teacher's, of ULD too.
        uld_weight: factor of the ULD term; 0 leaves it out.
        label_weight: factor of the label cross entropy; 0 leaves it out, otherwise `labels` is
            needed.
    """

    def __init__(
        self,
        k: int = 10,
        standardize: str | None = "vocab",
        aggregate: str = "mean",
        p: int = 1,
        temperature: float = 1.0,
        scope: str = "sequence",
        uld_weight: float = 0.0,
        label_weight: float = 0.0,
    ):
        super().__init__()
        self.k = k
        self.standardize = standardize
        self.aggregate = aggregate
        self.p = p
        self.temperature = temperature
        self.scope = scope
        self.uld_weight = uld_weight
        self.label_weight = label_weight
        self.uld = ULDLoss(temperature, temperature)

    def forward(
        self,
        student: Tensor,  # (..., T, V)
        teacher: Tensor | TopK | Sequence[Tensor | TopK],  # (..., T', V'), or a list of K
        labels: Tensor | None = None,  # (..., T) int64
        *,
        mask: Tensor | None = None,  # (..., T) bool
        teacher_mask: Tensor | Sequence[Tensor | None] | None = None,  # (..., T') or a list of K
        teacher_labels: Tensor | Sequence[Tensor | None] | None = None,  # likewise
        teacher_weights: Tensor | Sequence[float] | None = None,  # (K,), default 1/K
    ) -> Tensor:
        """0-d loss. Without teacher_mask and teacher_labels the teachers' rows are selected as the
        student's, position by position."""
        single = isinstance(teacher, (Tensor, TopK))
        teachers = [teacher] if single else list(teacher)
        count = len(teachers)
        if count == 0:
            raise ValueError("teacher: expected at least one")
        names = ["teacher"] if single else [f"teacher[{i}]" for i in range(count)]
        weights = _weights(teacher_weights, count)
        chosen = None
        if labels is not None or mask is not None:
            chosen = chosen_rows(student, labels, mask)
        masks = _each(teacher_mask, count, "teacher_mask")
        marks = _each(teacher_labels, count, "teacher_labels")
        if self.uld_weight and any(isinstance(t, TopK) for t in teachers):
            raise ValueError("uld_weight: the ULD term needs dense teacher logits, got a TopK")
        shapes = [t.values if isinstance(t, TopK) else t for t in teachers]
        rows = [_rows(t, y, m, chosen) for t, y, m in zip(shapes, marks, masks)]
        loss = match_graphs(
            student,
            teachers,
            rows,
            names,
            weights,
            k=self.k,
            standardize=self.standardize,
            aggregate=self.aggregate,
            p=self.p,
            temperature=self.temperature,
            teacher_temperature=None,
            mask=chosen,
            scope=self.scope,
            reduction="mean",
        )
        if self.uld_weight:
            for weight, t, row in zip(weights, teachers, rows):
                term = self.uld(
                    _sequences(student, 2),
                    _sequences(t, 2),
                    mask=_sequences(chosen, 1),
                    teacher_mask=_sequences(row, 1),
                )
                loss = loss + self.uld_weight * weight * term
        if self.label_weight:
            if labels is None:
                raise ValueError("labels: needed where label_weight is not 0")
            loss = loss + self.label_weight * label_cross_entropy(student, labels, mask)
        return loss


def _rows(teacher: Tensor, labels, mask, chosen: Tensor | None) -> Tensor | None:
    """The teacher's selected rows; None: match_graphs takes the student's or says why not."""
    if labels is not None or mask is not None:
        return selected(teacher, labels, mask, teacher.dim() - 1)
    same = chosen is not None and teacher.shape[:-1] == chosen.shape
    return chosen if same else None


def _sequences(tensor: Tensor | None, inner: int) -> Tensor | None:
    """(B, ...) with `inner` dimensions behind the first."""
    return None if tensor is None else tensor.reshape(-1, *tensor.shape[tensor.dim() - inner :])


def _each(given, count: int, argument: str) -> list:
    """One for each teacher; a single tensor serves all."""
    if given is None or isinstance(given, Tensor):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{argument}: expected one for each of {count} teachers, got {len(given)}")
    return list(given)


def _weights(given: Tensor | Sequence[float] | None, count: int) -> Tensor | list[float]:
    if given is None:
        return [1.0 / count] * count
    if isinstance(given, Tensor) and given.shape != (count,):
        raise ValueError(
            f"teacher_weights: expected shape ({count},), one for each teacher, got "
            f"{tuple(given.shape)}"
        )
    if not isinstance(given, Tensor) and len(given) != count:
        raise ValueError(
            f"teacher_weights: expected one for each of {count} teachers, got {len(given)}"
        )
    return given if isinstance(given, Tensor) else [float(w) for w in given]
