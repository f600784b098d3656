"""The numbers of a relation call, as one flat tuple in the order of csrc/relation/relation.h."""

from __future__ import annotations

from typing import NamedTuple

import torch

SOFTMAX_KINDS = (
    "softmax_kl",
    "softmax_cross_entropy",
    "softmax_reverse_kl",
    "softmax_mse",
)
ELEMENT_KINDS = ("mse", "l1", "smooth_l1", "huber", "margin_l1")
GRAM_KINDS = ("gram_row_l2", "gram_row_l1")
GRAPH_KINDS = ("distance", "angle", "cka")
KINDS = SOFTMAX_KINDS + ELEMENT_KINDS + GRAM_KINDS + GRAPH_KINDS

# RelationKind of the C++ contract; "angle" and "cka" are made of others by the caller.
CODES = {
    name: code
    for code, name in enumerate(
        SOFTMAX_KINDS + ELEMENT_KINDS + GRAM_KINDS + ("log_sum_exp", "distance_sum", "distance")
    )
}


class RelationSpec(NamedTuple):
    kind: float = 0.0
    need_student: float = 0.0
    need_teacher: float = 0.0
    causal: float = 0.0
    exclude_diagonal: float = 0.0
    block: float = 0.0
    beta: float = 1.0
    margin: float = 0.0
    clamped: float = 0.0
    clamp: float = 0.0
    label_mix: float = 0.0
    first_row: float = 0.0
    diagonal: float = 0.0
    half: float = 0.0  # a position of HALVES


# What the tokens held before they were widened, if their numbers are still the same.
HALVES = (torch.float32, torch.float16, torch.bfloat16)


# Columns of the row report, `RelationRow` of the C++ contract.
VALUE, COUNT, SCALE_S, SCALE_T, WEIGHT_S, WEIGHT_T, SUM_S, SUM_T, POSITIVE_S, POSITIVE_T = range(10)
ROW = 10

# The widest tokens that the tile kernels of the softmax kinds take.
WIDEST = 256
# Statistics that they keep of a row, `SoftmaxStatistic` of the C++ contract.
STATISTICS = 9

NORM_FLOOR = 1e-12
SQUARED_FLOOR = 1e-12
PKT_EPSILON = 1e-7
