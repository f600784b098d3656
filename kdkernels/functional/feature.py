"""Pointwise feature losses, the layer map and the projector beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_floats, check_number, same_device

FEATURE_KINDS = (
    "mse",
    "normalized_mse",
    "l1",
    "smooth_l1",
    "huber",
    "cosine",
    "margin_cosine",
    "log_sigmoid_cosine",
)
# One value a vector; the others have one an element.
_VECTOR_KINDS = ("normalized_mse", "cosine", "margin_cosine", "log_sigmoid_cosine")
_NORM_FLOOR = 1e-12


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

    Args:
        student, teacher: [..., d] of one shape; float32, float16, bfloat16 or float64.
        kind: "mse" (s - t)^2, "l1" |s - t|, "smooth_l1" and "huber" (beta) per element;
            "normalized_mse" |s/|s| - t/|t||^2, "cosine" 1 - cos, "margin_cosine"
            max(1 - margin - cos, 0), "log_sigmoid_cosine" -log sigmoid(cos) per vector. Norms are
            at least 1e-12.
        normalize: before: "l2", "layer_norm" (over d, without affine, epsilon 1e-5) or
            "standardize" (over the tokens of each entry of the leading dimensions but the last:
            mean 0, standard deviation 1 + 1e-6).
        mask: bool [...]; False vectors do not count and are never read.
        weight: float [...] or [..., d], with gradient; multiplies the values. Weight 0 counts.
        beta, margin: see the kinds.
        reduction: "mean" over the selected elements (vectors for the kinds of vectors), "sum" or
            "none".
        num_items: divisor of "mean" instead: a number > 0 or a 0-d tensor.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    s, t, mask = _vectors(student, teacher, mask)
    if kind not in FEATURE_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(FEATURE_KINDS)}, got {kind!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
    beta = check_number(beta, "beta", positive=True)
    margin = check_number(margin, "margin")
    s, t = _normalize(s, normalize, mask), _normalize(t, normalize, mask)
    value = _values(s, t, kind, beta, margin)
    if weight is not None:
        check_floats(weight, "weight")
        same_device(weight, "weight", s)
        if weight.shape == s.shape[:-1] and value.dim() == s.dim():
            weight = weight[..., None]
        elif weight.shape != value.shape:
            raise ValueError(
                f"weight: expected shape {tuple(s.shape[:-1])} or {tuple(value.shape)}, got "
                f"{tuple(weight.shape)}"
            )
        value = value * weight.to(value.dtype)
    on = None
    if mask is not None:
        on = mask if value.dim() == mask.dim() else mask[..., None]
        value = torch.where(on, value, torch.zeros_like(value))
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "sum":
        return total
    if num_items is not None:
        items = num_items
        if not isinstance(items, Tensor):
            items = check_number(items, "num_items", positive=True)
        return total / items
    if on is None:
        return total / max(value.numel(), 1)
    return total / (on.sum() * (value.numel() // max(on.numel(), 1))).clamp(min=1)


def _vectors(student, teacher, mask) -> tuple[Tensor, Tensor, Tensor | None]:
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
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    s, t = student.to(dtype), teacher.to(dtype)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError("mask: expected a bool tensor")
        if mask.shape != student.shape[:-1]:
            raise ValueError(
                f"mask: expected shape {tuple(student.shape[:-1])}, got {tuple(mask.shape)}"
            )
        same_device(mask, "mask", student)
        s = torch.where(mask[..., None], s, torch.zeros_like(s))
        t = torch.where(mask[..., None], t, torch.zeros_like(t))
    return s, t, mask


def _normalize(x: Tensor, how: str | None, mask: Tensor | None) -> Tensor:
    if how is None:
        return x
    if how == "l2":
        return F.normalize(x, dim=-1, eps=_NORM_FLOOR)
    if how == "layer_norm":
        return F.layer_norm(x, x.shape[-1:])
    if how != "standardize":
        raise ValueError(f"normalize: expected l2, layer_norm or standardize, got {how!r}")
    if x.dim() < 2:
        raise ValueError("normalize: standardize needs tokens [..., N, d]")
    on = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
    count = on.sum(-2, keepdim=True).clamp(min=1)
    centred = (x - (x * on).sum(-2, keepdim=True) / count) * on
    deviation = (centred.square().sum(-2, keepdim=True) / count).sqrt()
    return centred / (deviation + 1e-6)


def _values(s: Tensor, t: Tensor, kind: str, beta: float, margin: float) -> Tensor:
    if kind == "mse":
        return (s - t).square()
    if kind == "l1":
        return (s - t).abs()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(s, t, reduction="none", beta=beta)
    if kind == "huber":
        return F.huber_loss(s, t, reduction="none", delta=beta)
    s, t = (F.normalize(x, dim=-1, eps=_NORM_FLOOR) for x in (s, t))
    if kind == "normalized_mse":
        return (s - t).square().sum(-1)
    cosine = (s * t).sum(-1)
    if kind == "cosine":
        return 1 - cosine
    if kind == "margin_cosine":
        return (1 - margin - cosine).clamp(min=0)
    return -F.logsigmoid(cosine)


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
