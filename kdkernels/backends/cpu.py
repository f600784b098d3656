"""SIMD C++ kernels on CPU tensors: the embedded default."""

from .native import extension

FAMILIES = ("divergence", "relation")
_C = extension("_C")


def why_not() -> str:
    """Why this backend is not available; empty if it is."""
    return f"the extension module is not built ({_C})" if isinstance(_C, str) else ""


if not isinstance(_C, str):
    divergence_fwd = _C.divergence_fwd
    divergence_bwd = _C.divergence_bwd
    scale = _C.scale
    relation_rows = _C.relation_rows
    plackett_luce = _C.plackett_luce
