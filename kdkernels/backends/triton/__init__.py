"""Triton kernels on CUDA tensors: the fallback of a GPU for which there is no prebuilt kernel.

Under TRITON_INTERPRET=1, set before triton is imported, the same kernels run in numpy on CPU
tensors (for tests). float32, float16 and bfloat16; float64 is refused by name.
"""

import torch

FAMILIES = ("divergence", "transport", "softmax_relation")
READS: tuple[str, ...] = ("cuda",)

try:
    import triton
except ImportError as error:
    _reason = f"triton is not installed ({error})"
else:
    from .common import INTERPRETED
    from .divergence import divergence_bwd as divergence_bwd
    from .divergence import divergence_fwd as divergence_fwd
    from .divergence import scale as scale
    from .relation import softmax_relation as softmax_relation
    from .sinkhorn import annealed as annealed
    from .sinkhorn import sinkhorn_bwd as sinkhorn_bwd
    from .sinkhorn import sinkhorn_fwd as sinkhorn_fwd
    from .sinkhorn import sinkhorn_workspace as sinkhorn_workspace
    from .sinkhorn import sorted_transport as sorted_transport
    from .sinkhorn import sorted_workspace as sorted_workspace
    from .token_stats import label_log_probs_bwd as label_log_probs_bwd
    from .token_stats import label_log_probs_fwd as label_log_probs_fwd
    from .token_stats import token_stats as token_stats

    _reason = ""
    if INTERPRETED:
        READS = ("cuda", "cpu")
    elif not torch.cuda.is_available():
        _reason = (
            f"triton {triton.__version__} finds no CUDA device (TRITON_INTERPRET=1, set before the "
            "first import of triton, runs the kernels on CPU tensors)"
        )


def why_not() -> str:
    """Why this backend is not available; empty if it is."""
    return _reason
