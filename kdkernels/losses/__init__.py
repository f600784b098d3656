"""Losses of papers, by name: `loss(student, teacher, labels=None, **extras)`."""

from .attention_maps import (
    AlignToDistillLoss,
    AttentionLoss,
    CrossModalAttentionLoss,
    SoftCodeAssignmentLoss,
)
from .clip import CLIPKDLoss, TinyCLIPLoss
from .contrast import (
    ContrastiveLoss,
    CRDLoss,
    DINOLoss,
    MomentumDistillationLoss,
    PixelContrastiveLoss,
    SupervisedContrastiveLoss,
)
from .cot2align import CoT2AlignLoss
from .feature_transport import FeatureTransportLoss
from .features import (
    CATKDLoss,
    CosineLoss,
    HiddenMSELoss,
    L1Loss,
    LayerSelectionLoss,
    LogSigmoidCosineLoss,
    MarginCosineLoss,
    MaskedMSELoss,
    MMDLoss,
    NormalizedMSELoss,
    REPALoss,
    SmoothL1Loss,
    TEDLoss,
    UNICLoss,
    VkDLoss,
)
from .graph_on_logits import GraphOnLogitsLoss
from .minilm import MiniLMLoss, MiniLMv2Loss
from .multi_level_ot import MultiLevelOTLoss
from .opta import OpTALoss
from .rank import (
    ADRMSELoss,
    BiAlignLoss,
    DeARLoss,
    DiSCoLoss,
    FIRSTLoss,
    LEADLoss,
    ListNetLoss,
    MarginMSELoss,
    PairwiseHingeLoss,
    PLDLoss,
    RankNetLoss,
    ScoreBCELoss,
    ScoreKLLoss,
    ScoreMSELoss,
)
from .registry import CatalogueEntry, catalogue, loss, register
from .similarity import AffinityLoss, CKALoss, ICKDLoss, PKTLoss, RKDLoss, SimilarityPreservingLoss
from .sinkd import SinKDLoss
from .token_relations import (
    CIRKDLoss,
    DINOv3GramLoss,
    StructuredPairwiseLoss,
    TokenRelationDistillationLoss,
)
from .trg import TRGLoss
from .uld import ULDLoss
from .wkd import WKDFLoss, WKDLLoss

__all__ = [
    "ADRMSELoss",
    "AffinityLoss",
    "AlignToDistillLoss",
    "AttentionLoss",
    "BiAlignLoss",
    "CATKDLoss",
    "CIRKDLoss",
    "CKALoss",
    "CLIPKDLoss",
    "CRDLoss",
    "CatalogueEntry",
    "CoT2AlignLoss",
    "ContrastiveLoss",
    "CosineLoss",
    "CrossModalAttentionLoss",
    "DINOLoss",
    "DINOv3GramLoss",
    "DeARLoss",
    "DiSCoLoss",
    "FIRSTLoss",
    "FeatureTransportLoss",
    "GraphOnLogitsLoss",
    "HiddenMSELoss",
    "ICKDLoss",
    "L1Loss",
    "LEADLoss",
    "LayerSelectionLoss",
    "ListNetLoss",
    "LogSigmoidCosineLoss",
    "MMDLoss",
    "MarginCosineLoss",
    "MarginMSELoss",
    "MaskedMSELoss",
    "MiniLMLoss",
    "MiniLMv2Loss",
    "MomentumDistillationLoss",
    "MultiLevelOTLoss",
    "NormalizedMSELoss",
    "OpTALoss",
    "PKTLoss",
    "PLDLoss",
    "PairwiseHingeLoss",
    "PixelContrastiveLoss",
    "REPALoss",
    "RKDLoss",
    "RankNetLoss",
    "ScoreBCELoss",
    "ScoreKLLoss",
    "ScoreMSELoss",
    "SimilarityPreservingLoss",
    "SinKDLoss",
    "SmoothL1Loss",
    "SoftCodeAssignmentLoss",
    "StructuredPairwiseLoss",
    "SupervisedContrastiveLoss",
    "TEDLoss",
    "TRGLoss",
    "TinyCLIPLoss",
    "TokenRelationDistillationLoss",
    "ULDLoss",
    "UNICLoss",
    "VkDLoss",
    "WKDFLoss",
    "WKDLLoss",
    "catalogue",
    "loss",
    "register",
]
