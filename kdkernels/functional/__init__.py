"""Public functions: validate, flatten, choose the reduction."""

from .divergence import divergence, forward_kl, jensen_shannon, reverse_kl, total_variation
from .relation import relation

__all__ = [
    "divergence",
    "forward_kl",
    "jensen_shannon",
    "relation",
    "reverse_kl",
    "total_variation",
]
