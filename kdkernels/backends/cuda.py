"""Hand-written CUDA kernels on CUDA tensors."""

import torch

from .native import extension

FAMILIES = ("divergence", "transport", "relation", "softmax_relation", "gromov")
_C = extension("_C")


def why_not() -> str:
    """Why this backend is not available; empty if it is."""
    if isinstance(_C, str):
        return f"the extension module is not built ({_C})"
    if not hasattr(_C, "cuda_info"):
        return "this build has no CUDA kernels; build with KDK_CUDA=on and nvcc on the PATH"
    info = _C.cuda_info()
    if not info["devices"]:
        need, have = info["runtime"], info["driver"]
        if have and have < need:
            return f"the driver serves CUDA {have // 1000}, this build needs {need // 1000}"
        return f"no CUDA device ({info['error'] or 'none found'})"
    if not torch.cuda.is_available():
        return "torch was installed without CUDA"
    return ""


if not isinstance(_C, str) and hasattr(_C, "cuda_info"):
    divergence_fwd = _C.divergence_fwd
    divergence_bwd = _C.divergence_bwd
    divergence_sum_fwd = _C.divergence_sum_fwd
    divergence_sum_bwd = _C.divergence_sum_bwd
    DIVERGENCE_SUM_PARTS = _C.DIVERGENCE_SUM_PARTS
    token_stats = _C.token_stats
    label_log_probs_fwd = _C.label_log_probs_fwd
    label_log_probs_bwd = _C.label_log_probs_bwd
    scale = _C.scale
    graph_nodes_fwd = _C.graph_nodes_fwd
    graph_nodes_bwd = _C.graph_nodes_bwd
    assignment = _C.assignment
    sinkhorn_workspace = _C.sinkhorn_workspace
    sinkhorn_fwd = _C.sinkhorn_fwd
    sinkhorn_bwd = _C.sinkhorn_bwd
    annealed = _C.annealed
    sorted_workspace = _C.sorted_workspace
    sorted_transport = _C.sorted_transport
    relation_rows = _C.relation_rows
    feature_rows = _C.feature_rows
    feature_columns = _C.feature_columns
    softmax_relation = _C.softmax_relation
    plackett_luce = _C.plackett_luce
