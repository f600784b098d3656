"""Loss kernels for knowledge distillation. Student first, teacher second, everywhere."""

from importlib import metadata as _metadata

from .backends import backends, debug, use_backend
from .functional import (
    LayerMatch,
    Projector,
    TokenStats,
    contrastive,
    divergence,
    feature,
    forward_kl,
    graph_on_logits,
    gromov_wasserstein,
    jensen_shannon,
    kl_estimate,
    label_log_probs,
    match_layers,
    plackett_luce,
    ranking,
    relation,
    reverse_kl,
    sinkhorn,
    sinkhorn_assign,
    sinkhorn_divergence,
    sliced_gromov_wasserstein,
    sorted_transport,
    token_stats,
    total_variation,
    transport,
)
from .inputs import STUDENT, Clip, LogitMix, Mapped, ProbMix, TopK
from .losses.registry import catalogue, loss

try:
    __version__ = _metadata.version("kdkernels")
except _metadata.PackageNotFoundError:  # a source tree that was built in place
    __version__ = "0+source"

__all__ = [
    "STUDENT",
    "Clip",
    "LayerMatch",
    "LogitMix",
    "Mapped",
    "ProbMix",
    "Projector",
    "TokenStats",
    "TopK",
    "backends",
    "catalogue",
    "contrastive",
    "debug",
    "divergence",
    "feature",
    "forward_kl",
    "graph_on_logits",
    "gromov_wasserstein",
    "jensen_shannon",
    "kl_estimate",
    "label_log_probs",
    "loss",
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
    "use_backend",
]
