"""Pointwise feature losses, the layer map and the projector beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends.torch_feature import ELEMENT_KINDS, KINDS, NORMALIZES
from ..ops import feature as ops
from ..ops.common import compute_dtype
from ..ops.feature import FeatureSpec
from .checks import check_floats, check_number, same_device

FEATURE_KINDS = KINDS


def feature(
    student: Tensor,
    teacher: Tensor,
    kind: str = "mse",
    *,
    normalize: str | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    beta: float = 1.0,
    margin: float = 0.0,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Distance between student and teacher vectors, token by token.

    Normalisation, distance and sum are one kernel that reads each side once ("standardize": twice)
    and keeps nothing; backward reads again and writes the gradients in the inputs' dtype.

    Args:
        student, teacher: [..., d] of one shape; float32, float16, bfloat16 or float64, computed in
            float32 (float64). The teacher gets a gradient only where it requires one.
        kind: "mse" (s - t)^2, "l1" |s - t|, "smooth_l1" and "huber" (beta) per element;
            "normalized_mse" |s/|s| - t/|t||^2, "cosine" 1 - cos, "margin_cosine"
            max(1 - margin - cos, 0), "log_sigmoid_cosine" -log sigmoid(cos) per vector. Norms are
            at least 1e-12.
        normalize: before: "l2", "layer_norm" (over d, without affine, epsilon 1e-5) or
            "standardize" (over the tokens of each entry of the leading dimensions but the last:
            mean 0, standard deviation 1 + 1e-6).
        mask: bool [...]; False vectors do not count and are never read.
        weight: float [...], or [..., d] for the kinds of elements, with gradient; multiplies the
            values. Weight 0 counts.
        beta, margin: see the kinds.
        reduction: "mean" over the selected elements (vectors for the kinds of vectors), "sum" or
            "none".
        num_items: divisor of "mean" instead: a number > 0 or a 0-d tensor.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    s, t, mask, leading = _vectors(student, teacher, mask)
    if kind not in FEATURE_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(FEATURE_KINDS)}, got {kind!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
    if normalize not in (None, *NORMALIZES[1:]):
        raise ValueError(f"normalize: expected l2, layer_norm or standardize, got {normalize!r}")
    if normalize == "standardize" and not leading:
        raise ValueError("normalize: standardize needs tokens [..., N, d]")
    elementwise = kind in ELEMENT_KINDS
    groups = 1
    for size in leading[:-1]:
        groups *= size
    spec = FeatureSpec(
        kind,
        normalize or "none",
        max(groups, 1),
        check_number(beta, "beta", positive=True),
        check_number(margin, "margin"),
        elementwise and reduction == "none",
    )
    row_weight, element_weight = _weights(weight, s, leading, elementwise)
    inside = None if spec.elements or not elementwise else element_weight
    dtype = compute_dtype(s)
    if weight is None and reduction != "none" and ops.takes_sum(s, t, spec):
        factor = 1.0 / _divisor(s, mask, elementwise, reduction, num_items)
        if not isinstance(factor, Tensor):
            factor = torch.full((), factor, dtype=torch.float64, device=s.device)
        return ops.feature_sum(s, t, mask, factor.detach().double(), spec).to(dtype)
    value = ops.feature(s, t, mask, inside, spec)
    if spec.elements:
        for factor in (element_weight, None if row_weight is None else row_weight[:, None]):
            if factor is not None:
                value = _where(mask, value * factor)
        return value.view(student.shape)
    if row_weight is not None:
        value = _where(mask, value * row_weight)
    if reduction == "none":
        return value.to(dtype).view(leading)
    return (value.sum() / _divisor(s, mask, elementwise, reduction, num_items)).to(dtype)


def _divisor(
    s: Tensor, mask: Tensor | None, elementwise: bool, reduction: str, num_items
) -> float | Tensor:
    """What the sum of the rows' values is divided by."""
    if reduction == "sum":
        return 1.0
    if num_items is not None:
        if not isinstance(num_items, Tensor):
            return float(check_number(num_items, "num_items", positive=True))
        if num_items.dim() != 0:
            raise ValueError(f"num_items: expected a 0-d tensor, got {tuple(num_items.shape)}")
        return num_items.detach()
    per_row = s.shape[1] if elementwise else 1
    if mask is None:
        return float(max(s.shape[0] * per_row, 1))
    return (mask.sum() * per_row).clamp(min=1)


def _where(mask: Tensor | None, value: Tensor) -> Tensor:
    """0 where a vector does not count, whatever its weight."""
    if mask is None:
        return value
    on = mask if value.dim() == 1 else mask[:, None]
    return torch.where(on, value, torch.zeros_like(value))


def _weights(weight, s: Tensor, leading, elementwise: bool) -> tuple[Tensor | None, Tensor | None]:
    """(weights of rows (N,) float64, weights of elements (N, d)); one of them at most."""
    if weight is None:
        return None, None
    check_floats(weight, "weight")
    same_device(weight, "weight", s)
    if weight.shape == leading:
        return weight.reshape(-1).to(compute_dtype(s) if elementwise else torch.float64), None
    full = (*leading, s.shape[1])
    if elementwise and tuple(weight.shape) == full:
        return None, weight.to(compute_dtype(s)).reshape(s.shape)
    expected = f"{tuple(leading)} or {full}" if elementwise else f"{tuple(leading)}"
    raise ValueError(f"weight: expected shape {expected}, got {tuple(weight.shape)}")


def _vectors(student, teacher, mask) -> tuple[Tensor, Tensor, Tensor | None, torch.Size]:
    """(N, d) of one dtype, contiguous; the mask (N,); the leading shape."""
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"student: expected shape [..., d], d >= 1, got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher: expected the student's shape {tuple(student.shape)}, got "
            f"{tuple(teacher.shape)}; a kd.Projector maps one width to another"
        )
    same_device(teacher, "teacher", student)
    leading = student.shape[:-1]
    dtype = student.dtype
    if teacher.dtype != dtype:
        double = torch.float64 in (dtype, teacher.dtype)
        dtype = torch.float64 if double else torch.float32
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError("mask: expected a bool tensor")
        if mask.shape != leading:
            raise ValueError(f"mask: expected shape {tuple(leading)}, got {tuple(mask.shape)}")
        same_device(mask, "mask", student)
        mask = mask.reshape(-1)
    s, t = (x.to(dtype).reshape(-1, x.shape[-1]).contiguous() for x in (student, teacher))
    return s, t, mask, leading


class LayerMatch(NamedTuple):
    """Student layer `student` learns from teacher layer `teacher` with this weight."""

    student: int
    teacher: int
    weight: float | Tensor = 1.0


def match_layers(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    kind: str = "mse",
    rule: str = "uniform",
    *,
    keep: int = 2,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[LayerMatch]:
    """Which teacher layer each student layer learns from.

    Args:
        students, teachers: hidden states [..., d] by layer, student's projected to the teacher's
            width where `rule` measures them. Only their numbers count for "uniform" and "last".
        kind: the feature loss that "min" and "min_k" measure.
        rule: "uniform": student layer i of S takes teacher layer (i + 1) T / S - 1; "last": the
            last S teacher layers in order; "min": the nearest teacher layer; "min_k": the `keep`
            nearest, each with weight 1/keep; "learned": all of them with softmax(weights[i]).
        keep: of "min_k".
        weights: float [S, T] of "learned", with gradient.
        mask: bool [...] of "min" and "min_k".

    Returns:
        list of LayerMatch. "min" and "min_k" read the distances (one synchronisation on CUDA).
    """
    count_s, count_t = len(students), len(teachers)
    if not count_s or not count_t:
        raise ValueError("students, teachers: expected at least one layer each")
    if rule == "uniform":
        return [LayerMatch(i, max(((i + 1) * count_t) // count_s - 1, 0)) for i in range(count_s)]
    if rule == "last":
        if count_t < count_s:
            raise ValueError(f"rule: 'last' needs {count_s} teacher layers, got {count_t}")
        return [LayerMatch(i, count_t - count_s + i) for i in range(count_s)]
    if rule == "learned":
        if not isinstance(weights, Tensor) or tuple(weights.shape) != (count_s, count_t):
            raise ValueError(f"weights: expected a tensor of shape ({count_s}, {count_t})")
        shares = weights.softmax(-1)
        return [LayerMatch(i, j, shares[i, j]) for i in range(count_s) for j in range(count_t)]
    if rule not in ("min", "min_k"):
        raise ValueError(f"rule: expected one of uniform, last, min, min_k, learned, got {rule!r}")
    keep = 1 if rule == "min" else keep
    if not isinstance(keep, int) or not 1 <= keep <= count_t:
        raise ValueError(f"keep: expected an integer from 1 to {count_t}, got {keep!r}")
    with torch.no_grad():
        table = torch.stack(
            [torch.stack([feature(s, t, kind, mask=mask) for t in teachers]) for s in students]
        )
    nearest = table.topk(keep, dim=-1, largest=False).indices.tolist()
    return [LayerMatch(i, j, 1.0 / keep) for i in range(count_s) for j in nearest[i]]


class Projector(nn.Module):
    """Maps features of the student's width to the teacher's.

    Args:
        student_dim, teacher_dim: widths d_s, d_t >= 1.
        kind: "linear" (with bias), "mlp" (linear, SiLU, linear, SiLU, linear at width d_t),
            "conv" (3 x 3 convolution of maps [B, d_s, H, W]) or "orthogonal" (linear without bias,
            under torch's orthogonal parametrisation; VkD, Miles et al., 2024).
    """

    def __init__(self, student_dim: int, teacher_dim: int, kind: str = "linear"):
        super().__init__()
        for value, argument in ((student_dim, "student_dim"), (teacher_dim, "teacher_dim")):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{argument}: expected an integer >= 1, got {value!r}")
        self.kind = kind
        if kind == "linear":
            self.map = nn.Linear(student_dim, teacher_dim)
        elif kind == "mlp":
            self.map = nn.Sequential(
                nn.Linear(student_dim, teacher_dim),
                nn.SiLU(),
                nn.Linear(teacher_dim, teacher_dim),
                nn.SiLU(),
                nn.Linear(teacher_dim, teacher_dim),
            )
        elif kind == "conv":
            self.map = nn.Conv2d(student_dim, teacher_dim, 3, padding=1)
        elif kind == "orthogonal":
            linear = nn.Linear(student_dim, teacher_dim, bias=False)
            self.map = nn.utils.parametrizations.orthogonal(linear)
        else:
            raise ValueError(f"kind: expected linear, mlp, conv or orthogonal, got {kind!r}")

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)
