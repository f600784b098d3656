"""The CUDA sources compiled for the host and run on CPU tensors: for tests only."""

from .native import extension

FAMILIES = ("divergence", "transport", "relation", "softmax_relation", "gromov")
_simt = extension("_simt")


def why_not() -> str:
    """Why this backend is not available; empty if it is."""
    if isinstance(_simt, str):
        return f"not built; build with KDK_SIMT=1 (development only; {_simt})"
    return ""


if not isinstance(_simt, str):
    divergence_fwd = _simt.divergence_fwd
    divergence_bwd = _simt.divergence_bwd
    divergence_sum_fwd = _simt.divergence_sum_fwd
    divergence_sum_bwd = _simt.divergence_sum_bwd
    DIVERGENCE_SUM_PARTS = _simt.DIVERGENCE_SUM_PARTS
    token_stats = _simt.token_stats
    label_log_probs_fwd = _simt.label_log_probs_fwd
    label_log_probs_bwd = _simt.label_log_probs_bwd
    scale = _simt.scale
    graph_nodes_fwd = _simt.graph_nodes_fwd
    graph_nodes_bwd = _simt.graph_nodes_bwd
    assignment = _simt.assignment
    relation_rows = _simt.relation_rows
    feature_rows = _simt.feature_rows
    feature_columns = _simt.feature_columns
    softmax_relation = _simt.softmax_relation
    plackett_luce = _simt.plackett_luce
    set_order = _simt.set_order
    sinkhorn_workspace = _simt.sinkhorn_workspace
    sinkhorn_fwd = _simt.sinkhorn_fwd
    sinkhorn_bwd = _simt.sinkhorn_bwd
    annealed = _simt.annealed
    sorted_workspace = _simt.sorted_workspace
    sorted_transport = _simt.sorted_transport
