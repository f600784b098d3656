"""Public functions: validate, flatten, choose the reduction."""

from .contrastive import contrastive
from .divergence import divergence, forward_kl, jensen_shannon, reverse_kl, total_variation
from .feature import LayerMatch, Projector, feature, match_layers
from .gromov import graph_on_logits
from .gromov_wasserstein import gromov_wasserstein
from .ranking import plackett_luce, ranking
from .relation import relation
from .sinkhorn import sinkhorn, sinkhorn_assign, transport
from .sinkhorn_divergence import sinkhorn_divergence
from .sliced_gromov_wasserstein import sliced_gromov_wasserstein
from .sorted_transport import sorted_transport
from .token_stats import TokenStats, kl_estimate, label_log_probs, token_stats

__all__ = [
    "LayerMatch",
    "Projector",
    "TokenStats",
    "contrastive",
    "divergence",
    "feature",
    "forward_kl",
    "graph_on_logits",
    "gromov_wasserstein",
    "jensen_shannon",
    "kl_estimate",
    "label_log_probs",
    "match_layers",
    "plackett_luce",
    "ranking",
    "relation",
    "reverse_kl",
    "sinkhorn",
    "sinkhorn_assign",
    "sinkhorn_divergence",
    "sliced_gromov_wasserstein",
    "sorted_transport",
    "token_stats",
    "total_variation",
    "transport",
]
