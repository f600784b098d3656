"""Torch reference of the feature losses: float64, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions are the codes of csrc/relation/feature.h.
KINDS = (
    "mse",
    "l1",
    "smooth_l1",
    "huber",
    "normalized_mse",
    "cosine",
    "margin_cosine",
    "log_sigmoid_cosine",
)
ELEMENT_KINDS = KINDS[:4]
NORMALIZES = ("none", "l2", "layer_norm", "standardize")

NORM_FLOOR = 1e-12
LAYER_EPSILON = 1e-5
DEVIATION_EPSILON = 1e-6


def _normalized(x: Tensor, how: str, on: Tensor, groups: int) -> Tensor:
    """x: (N, d); on: (N,) bool."""
    if how == "l2":
        return F.normalize(x, dim=-1, eps=NORM_FLOOR)
    if how == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], eps=LAYER_EPSILON)
    if how == "none":
        return x
    tokens = x.view(groups, x.shape[0] // groups, x.shape[1])
    weight = on.view(*tokens.shape[:2], 1).to(x.dtype)
    count = weight.sum(1, keepdim=True).clamp(min=1)
    centred = (tokens - (tokens * weight).sum(1, keepdim=True) / count) * weight
    variance = centred.square().sum(1, keepdim=True) / count
    # A column without spread: deviation 0, and no gradient through it.
    spread = variance > (1e-3 * DEVIATION_EPSILON) ** 2
    deviation = torch.where(spread, torch.where(spread, variance, 1.0).sqrt(), 0.0)
    return (centred / (deviation + DEVIATION_EPSILON)).view(x.shape)


def feature_dense(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    kind: str,
    normalize: str,
    groups: int,
    beta: float,
    margin: float,
    elements: bool,
) -> Tensor:
    """Values of rows (N,), or of elements (N, d) without weight, float64.

    student, teacher: (N, d); mask: (N,) bool; weight: (N, d).
    """
    s, t = student.double(), teacher.double()
    on = torch.ones(s.shape[:1], dtype=torch.bool, device=s.device) if mask is None else mask
    zero = torch.zeros((), dtype=torch.float64, device=s.device)
    s, t = (torch.where(on[:, None], x, zero) for x in (s, t))
    s, t = (_normalized(x, normalize, on, groups) for x in (s, t))
    if kind in ELEMENT_KINDS:
        value = {
            "mse": lambda: (s - t).square(),
            "l1": lambda: (s - t).abs(),
            "smooth_l1": lambda: F.smooth_l1_loss(s, t, reduction="none", beta=beta),
            "huber": lambda: F.huber_loss(s, t, reduction="none", delta=beta),
        }[kind]()
        if elements:
            return torch.where(on[:, None], value, zero)
        if weight is not None:
            value = value * torch.where(on[:, None], weight.double(), zero)
        return torch.where(on, value.sum(-1), zero)
    u, v = (F.normalize(x, dim=-1, eps=NORM_FLOOR) for x in (s, t))
    if kind == "normalized_mse":
        return torch.where(on, (u - v).square().sum(-1), zero)
    cosine = (u * v).sum(-1)
    value = {
        "cosine": lambda: 1 - cosine,
        "margin_cosine": lambda: (1 - margin - cosine).clamp(min=0),
        "log_sigmoid_cosine": lambda: -F.logsigmoid(cosine),
    }[kind]()
    return torch.where(on, value, zero)
