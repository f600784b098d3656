"""Public functions: validate, flatten, choose the reduction."""

from .divergence import divergence, forward_kl, jensen_shannon, reverse_kl, total_variation
from .gromov import graph_on_logits
from .gromov_wasserstein import gromov_wasserstein
from .sinkhorn import sinkhorn, sinkhorn_assign, transport
from .sinkhorn_divergence import sinkhorn_divergence
from .sliced_gromov_wasserstein import sliced_gromov_wasserstein
from .sorted_transport import sorted_transport

__all__ = [
    "divergence",
    "forward_kl",
    "graph_on_logits",
    "gromov_wasserstein",
    "jensen_shannon",
    "reverse_kl",
    "sinkhorn",
    "sinkhorn_assign",
    "sinkhorn_divergence",
    "sliced_gromov_wasserstein",
    "sorted_transport",
    "total_variation",
    "transport",
]
