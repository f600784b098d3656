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
from .mixed_targets import (
    LogitStandardizationLoss,
    MEALV2Loss,
    MFTLoss,
    MultiTeacherLoss,
    MutualLoss,
    PSKDLoss,
)
from .multi_level_ot import MultiLevelOTLoss
from .opta import OpTALoss
from .privileged import AlignDistilLoss, OPSDLoss
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
from .restricted_rows import RandomSamplingKDLoss, SDFTLoss, SDZeroLoss, Text2TokenLoss
from .similarity import AffinityLoss, CKALoss, ICKDLoss, PKTLoss, RKDLoss, SimilarityPreservingLoss
from .sinkd import SinKDLoss
from .taid import TAIDLoss
from .token_relations import (
    CIRKDLoss,
    DINOv3GramLoss,
    StructuredPairwiseLoss,
    TokenRelationDistillationLoss,
)
from .trg import TRGLoss
from .uld import ULDLoss
from .unisd import UniSDLoss
from .wkd import WKDFLoss, WKDLLoss

__all__ = [
    "ADRMSELoss",
    "AffinityLoss",
    "AlignDistilLoss",
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
    "LogitStandardizationLoss",
    "MEALV2Loss",
    "MFTLoss",
    "MMDLoss",
    "MarginCosineLoss",
    "MarginMSELoss",
    "MaskedMSELoss",
    "MiniLMLoss",
    "MiniLMv2Loss",
    "MomentumDistillationLoss",
    "MultiLevelOTLoss",
    "MultiTeacherLoss",
    "MutualLoss",
    "NormalizedMSELoss",
    "OPSDLoss",
    "OpTALoss",
    "PKTLoss",
    "PLDLoss",
    "PSKDLoss",
    "PairwiseHingeLoss",
    "PixelContrastiveLoss",
    "REPALoss",
    "RKDLoss",
    "RandomSamplingKDLoss",
    "RankNetLoss",
    "SDFTLoss",
    "SDZeroLoss",
    "ScoreBCELoss",
    "ScoreKLLoss",
    "ScoreMSELoss",
    "SimilarityPreservingLoss",
    "SinKDLoss",
    "SmoothL1Loss",
    "SoftCodeAssignmentLoss",
    "StructuredPairwiseLoss",
    "SupervisedContrastiveLoss",
    "TAIDLoss",
    "TEDLoss",
    "TRGLoss",
    "Text2TokenLoss",
    "TinyCLIPLoss",
    "TokenRelationDistillationLoss",
    "ULDLoss",
    "UNICLoss",
    "UniSDLoss",
    "VkDLoss",
    "WKDFLoss",
    "WKDLLoss",
    "catalogue",
    "loss",
    "register",
]
