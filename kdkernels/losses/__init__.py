"""Losses of papers, by name: `loss(student, teacher, labels=None, **extras)`."""

from .cot2align import CoT2AlignLoss
from .feature_transport import FeatureTransportLoss
from .graph_on_logits import GraphOnLogitsLoss
from .multi_level_ot import MultiLevelOTLoss
from .opta import OpTALoss
from .registry import CatalogueEntry, catalogue, loss, register
from .sinkd import SinKDLoss
from .uld import ULDLoss
from .wkd import WKDFLoss, WKDLLoss

__all__ = [
    "CatalogueEntry",
    "CoT2AlignLoss",
    "FeatureTransportLoss",
    "GraphOnLogitsLoss",
    "MultiLevelOTLoss",
    "OpTALoss",
    "SinKDLoss",
    "ULDLoss",
    "WKDFLoss",
    "WKDLLoss",
    "catalogue",
    "loss",
    "register",
]
