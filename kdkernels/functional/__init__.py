"""Public functions: validate, flatten, choose the reduction."""

from .divergence import divergence, forward_kl, jensen_shannon, reverse_kl, total_variation
from .gromov import graph_on_logits

__all__ = [
    "divergence",
    "forward_kl",
    "graph_on_logits",
    "jensen_shannon",
    "reverse_kl",
    "total_variation",
]
