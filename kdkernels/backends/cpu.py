"""SIMD C++ kernels on CPU tensors: the embedded default."""

from .native import extension

FAMILIES = ("divergence", "transport", "relation", "gromov")
_C = extension("_C")


def why_not() -> str:
    """Why this backend is not available; empty if it is."""
    return f"the extension module is not built ({_C})" if isinstance(_C, str) else ""


if not isinstance(_C, str):
    divergence_fwd = _C.divergence_fwd
    divergence_bwd = _C.divergence_bwd
    divergence_sum_fwd = _C.divergence_sum_fwd
    divergence_sum_bwd = _C.divergence_sum_bwd
    DIVERGENCE_SUM_PARTS = 1 << 30
    token_stats = _C.token_stats
    label_log_probs_fwd = _C.label_log_probs_fwd
    label_log_probs_bwd = _C.label_log_probs_bwd
    scale = _C.scale
    graph_nodes_fwd = _C.graph_nodes_fwd
    graph_nodes_bwd = _C.graph_nodes_bwd
    assignment = _C.assignment
    marginals_fit = _C.marginals_fit
    sinkhorn_workspace = _C.sinkhorn_workspace
    sinkhorn_fwd = _C.sinkhorn_fwd
    sinkhorn_bwd = _C.sinkhorn_bwd
    annealed = _C.annealed
    sorted_workspace = _C.sorted_workspace
    sorted_transport = _C.sorted_transport
    relation_rows = _C.relation_rows
    relation_walk = _C.relation_walk
    isa = _C.isa
    RELATION_WIDTH_UNIT = _C.RELATION_WIDTH_UNIT
    RELATION_PANEL_UNIT = _C.RELATION_PANEL_UNIT
    feature_rows = _C.feature_rows
    feature_columns = _C.feature_columns
    plackett_luce = _C.plackett_luce
