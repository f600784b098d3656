"""Public functions: validate, flatten, choose the reduction."""

from .divergence import divergence, forward_kl, jensen_shannon, reverse_kl, total_variation
from .sinkhorn import sinkhorn, sinkhorn_assign, transport
from .sinkhorn_divergence import sinkhorn_divergence
from .sorted_transport import sorted_transport

__all__ = [
    "divergence",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "sinkhorn",
    "sinkhorn_assign",
    "sinkhorn_divergence",
    "sorted_transport",
    "total_variation",
    "transport",
]
