"""The numbers of a Sinkhorn call as one flat tuple, in the order of `SinkhornSpec` in
csrc/transport/transport.h (a test compares the names)."""

from __future__ import annotations

from typing import NamedTuple

UNROLLED, IMPLICIT, ENVELOPE = range(3)
GRADIENTS = {"unrolled": UNROLLED, "implicit": IMPLICIT, "envelope": ENVELOPE}


class SinkhornSpec(NamedTuple):
    epsilon: float = 1.0
    iterations: float = 1.0
    tolerance: float = 0.0
    columns_first: float = 0.0
    damping_a: float = 1.0
    damping_b: float = 1.0
    denominator: float = 0.0
    mode: float = UNROLLED
