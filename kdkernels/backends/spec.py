"""The numbers of a divergence call that are the same for all rows, as one flat tuple.

The order is that of `DivergenceSpec` in csrc/divergence/divergence.h; the bindings check the length
and a test checks the names. The meanings stand there.
"""

from __future__ import annotations

from typing import NamedTuple

# Kind, Outer and Reduction of the C++ contract.
KIND_NONE, JENSEN_SHANNON, SKEW_FORWARD, SKEW_REVERSE = range(4)
TOTAL_VARIATION, SQUARED_HELLINGER, TRIANGULAR, CHI_SQUARED, ALPHA_BETA, ALPHA = range(4, 10)
IDENTITY, SQRT, BHATTACHARYYA, RENYI = range(4)
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3, "sequence_mean": 4}
NAMES = tuple(REDUCTIONS)
NONE, SUM, MEAN, BATCHMEAN, SEQUENCE_MEAN = range(5)


class DivergenceSpec(NamedTuple):
    forward_kl: float = 0.0
    reverse_kl: float = 0.0
    cross_entropy: float = 0.0
    entropy: float = 0.0
    kind: float = KIND_NONE
    other: float = 0.0
    first: float = 0.0
    second: float = 0.0
    detach_mixture: float = 0.0
    outer: float = IDENTITY
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    temperature_squared: float = 0.0
    label_weight: float = 0.0
    ignore_index: float = -100.0
    clip_token: float = 0.0
    clip_element: float = 0.0
    clip_signed: float = 0.0
    reduction: float = MEAN
    normalize_weights: float = 0.0
    num_items: float = 0.0
    batch: float = 1.0
    student_columns: float = 0.0
    teacher_columns: float = 0.0


# Columns of the saved statistics, (N, STATS): `Stat` of the C++ contract.
MAX_S, SUM_S, MAX_T, SUM_T, DIVERGENCE, CENTRE_S, CENTRE_T = range(7)
SLOPE, LABEL_LSE, VALUE, FACTOR, UNIT = range(7, 12)
STATS = 12
