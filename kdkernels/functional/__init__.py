"""Public functions: validate, flatten, choose the reduction."""

from .contrastive import contrastive
from .divergence import divergence, forward_kl, jensen_shannon, reverse_kl, total_variation
from .feature import LayerMatch, Projector, feature, match_layers
from .ranking import plackett_luce, ranking
from .relation import relation

__all__ = [
    "LayerMatch",
    "Projector",
    "contrastive",
    "divergence",
    "feature",
    "forward_kl",
    "jensen_shannon",
    "match_layers",
    "plackett_luce",
    "ranking",
    "relation",
    "reverse_kl",
    "total_variation",
]
